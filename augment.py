"""Augmentation: AutoAugment, random crop, rotation, flip and Cutout, drawn for each image.

Every draw is a pure function of (seed, epoch) and the order of the images.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from config import Config
from utils import IMAGE_SIZE, generator

# AutoAugment's policy for CIFAR-10: pairs of operations, each with the probability of being applied
# and a level from 0 to 9, which some operations ignore.
AUTO_AUGMENT = (
    (("invert", 0.1, 0), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.5, 0), ("equalize", 0.9, 0)),
    (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 0), ("equalize", 0.5, 0)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translate_x", 0.5, 8)),
    (("equalize", 0.3, 0), ("autocontrast", 0.4, 0)),
    (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 0)),
    (("equalize", 0.2, 0), ("autocontrast", 0.6, 0)),
    (("equalize", 0.2, 0), ("equalize", 0.6, 0)),
    (("color", 0.9, 9), ("equalize", 0.6, 0)),
    (("autocontrast", 0.8, 0), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("autocontrast", 0.9, 0)),
    (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.9, 0), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 0), ("invert", 0.1, 0)),
    (("translate_y", 0.7, 9), ("autocontrast", 0.9, 0)),
)


def draw(config: Config, indices: Tensor, epoch: int) -> tuple[Tensor, ...]:
    """Draw an augmentation for each of the images `indices`, (N,), in their order.

    Alternating flips mirror a random half of the images in the first epoch, the other half in the
    second, and so on: two epochs show every image both ways (Jordan, arXiv:2404.00498).

    Returns:
        Shifts (N, 2) in pixels, angles (N,) in degrees, flips (N,) and Cutout's corners (N, 2).
    """
    rng, n = generator("augmentation", config.seed, epoch), len(indices)
    low, high = -config.crop_padding, config.crop_padding + 1
    shift = torch.randint(low, high, (n, 2), generator=rng)
    angle = (2 * torch.rand(n, generator=rng) - 1) * config.rotation_degrees
    flip = torch.rand(n, generator=rng) < 0.5 * (config.flip == "random")
    if config.flip == "alternating":
        first = torch.rand(n, generator=generator("flip", config.seed)) < 0.5  # by image
        flip = first[indices] ^ (epoch % 2 == 0)
    # The center of a square is any pixel, so that the square may reach over the edge.
    corner = torch.randint(0, IMAGE_SIZE, (n, 2), generator=rng) - config.cutout_size // 2
    return shift, angle, flip, corner


def apply(
    config: Config,
    images: Tensor,
    draws: Sequence[Tensor],
    normalize: Callable[[Tensor], Tensor],
) -> Tensor:
    """Augment (N, 3, 32, 32) uint8 images as drawn and normalize them."""
    shift, angle, flip, corner = draws
    images = normalize(augment(images, shift, angle, flip, config.padding_mode) / 255)
    return cut_out(images, corner, config.cutout_size) if config.cutout_size else images


def shrink(config: Config, images: Tensor, size: int) -> Tensor:
    """(N, 3, 32, 32) augmented images to (N, 3, size, size)."""
    if size == IMAGE_SIZE:
        return images
    if config.small_images == "scale":
        return F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    margin = (IMAGE_SIZE - size) // 2
    center = slice(margin, margin + size)
    return images[:, :, center, center]


def augment(
    images: Tensor, shift: Tensor, angle: Tensor, flip: Tensor, padding_mode: str = "zeros"
) -> Tensor:
    """Crop, then rotate, then flip, each image its own way: one gather for the whole batch.

    Equal to torchvision's crop after padding, rotate (nearest pixel, zero fill) and
    horizontal_flip: every output pixel is traced back through the three to its source.

    Args:
        images: (N, C, S, S) uint8.
        shift: (N, 2) pixels: the crop's first row and column, counted from the image's.
        angle: (N,) degrees, counter-clockwise.
        flip: (N,) bool.
        padding_mode: fills a crop outside the image with `zeros`, or the mirror image (`reflect`).
    """
    n, channels, size, _ = images.shape
    center = (size - 1) / 2
    offset = torch.arange(size, device=images.device) - center  # pixels from the center
    y = offset[None, :, None]  # (1, S, 1)
    x = offset[None, None, :] * torch.where(flip, -1.0, 1.0)[:, None, None]  # (N, 1, S)
    radians = angle.deg2rad()[:, None, None]
    sin, cos = radians.sin(), radians.cos()
    row = (y * cos + x * sin + center).round().long()  # (N, S, S), in the cropped image
    column = (x * cos - y * sin + center).round().long()
    inside = (row >= 0) & (row < size) & (column >= 0) & (column < size)
    row, column = row + shift[:, 0, None, None], column + shift[:, 1, None, None]
    if padding_mode == "reflect":
        last = size - 1
        row = (last - (last - row.abs()).abs()).clamp_(0)
        column = (last - (last - column.abs()).abs()).clamp_(0)
    else:
        inside &= (row >= 0) & (row < size) & (column >= 0) & (column < size)

    source = (row * size + column) * inside  # pixel 0 stands in for those outside
    source = source.view(n, 1, -1).expand(-1, channels, -1)
    pixels = images.reshape(n, channels, -1).gather(2, source).view_as(images)
    return pixels * inside[:, None]


def cut_out(images: Tensor, corner: Tensor, size: int) -> Tensor:
    """Set a square of each image to the mean, 0 (DeVries & Taylor, arXiv:1708.04552).

    Args:
        images: (N, C, S, S) normalized.
        corner: (N, 2) the square's first row and column; it may reach over the edge, as theirs do.
        size: its side, in pixels.
    """
    place = torch.arange(images.shape[-1], device=images.device)
    inside = (place >= corner[:, :, None]) & (place < corner[:, :, None] + size)  # (N, 2, S)
    square = inside[:, 0, :, None] & inside[:, 1, None, :]  # (N, S, S)
    return images.masked_fill(square[:, None], 0)


def auto_augment(images: Tensor, pair: Tensor, chance: Tensor, side: Tensor) -> Tensor:
    """Apply one of 25 pairs of operations to each image: AutoAugment (Cubuk, arXiv:1805.09501).

    torchvision's transform draws once for all images of a call. Here each image has its own draw,
    and the images of equal draws are changed together: 100 calls for any number of images.

    Args:
        images: (N, 3, S, S) uint8.
        pair: (N,) indices into AUTO_AUGMENT, on the CPU.
        chance: (N, 2) from 0 to 1: an operation is skipped if its probability is smaller.
        side: (N, 2) from 0 to 1: up to 0.5 the direction of an operation is reversed.
    """
    operations, images = auto_operations(), images.clone()
    for i, j, sign in itertools.product(range(len(AUTO_AUGMENT)), range(2), (-1, 1)):
        name, probability, level = AUTO_AUGMENT[i][j]
        chosen = (pair == i) & (chance[:, j] <= probability) & ((side[:, j] <= 0.5) == (sign < 0))
        chosen = chosen.nonzero().flatten().to(images.device)
        if len(chosen):
            images[chosen] = operations[name](images[chosen], level, sign)
    return images


def draw_pairs(num_images: int, seed: int, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the arguments `pair`, `chance` and `side` of `auto_augment` for an epoch."""
    rng = generator("auto_augment", seed, epoch)
    pair = torch.randint(len(AUTO_AUGMENT), (num_images,), generator=rng)
    chance, side = torch.rand(2, num_images, 2, generator=rng)
    return pair, chance, side


def auto_operations() -> dict[str, Callable[[Tensor, int, int], Tensor]]:
    """AutoAugment's operations, called with (N, 3, S, S) images, a level of 0 to 9 and a sign."""
    from torchvision.transforms.v2 import functional as v2

    far = 150 / 331 * IMAGE_SIZE  # pixels: 150 of ImageNet's 331 in the paper

    def affine(x: Tensor, right: float = 0, down: float = 0, shear: float = 0) -> Tensor:
        degrees = [0, math.degrees(math.atan(shear))]
        return v2.affine(x, 0, [int(right), int(down)], 1, degrees, center=[0, 0])

    def at(level: int, most: float) -> float:
        return torch.linspace(0, most, 10)[level].item()  # in float32, as in torchvision

    return {
        "shear_y": lambda x, level, sign: affine(x, shear=sign * at(level, 0.3)),
        "translate_x": lambda x, level, sign: affine(x, right=sign * at(level, far)),
        "translate_y": lambda x, level, sign: affine(x, down=sign * at(level, far)),
        "rotate": lambda x, level, sign: v2.rotate(x, sign * at(level, 30)),
        "brightness": lambda x, level, sign: v2.adjust_brightness(x, 1 + sign * at(level, 0.9)),
        "color": lambda x, level, sign: v2.adjust_saturation(x, 1 + sign * at(level, 0.9)),
        "contrast": lambda x, level, sign: v2.adjust_contrast(x, 1 + sign * at(level, 0.9)),
        "sharpness": lambda x, level, sign: v2.adjust_sharpness(x, 1 + sign * at(level, 0.9)),
        "posterize": lambda x, level, _: v2.posterize(x, 8 - round(at(level, 4))),
        "solarize": lambda x, level, _: v2.solarize(x, 255 * (1 - at(level, 1))),
        "autocontrast": lambda x, *_: v2.autocontrast(x),
        "equalize": lambda x, *_: v2.equalize(x),
        "invert": lambda x, *_: v2.invert(x),
    }
