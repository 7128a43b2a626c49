"""Augmentation: AutoAugment, TrivialAugment, random crop, rotation, flip and Cutout; and mixing.

Mixing is drawn once for a batch, all else for each image. Every draw is a pure function of the
configuration, the epoch and the order of the images; that of mixing, of the step too.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from config import Config
from utils import IMAGE_SIZE, derive_seed, generator

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
AUTO_LEVELS = 10
FAR = 150 / 331 * IMAGE_SIZE  # pixels: 150 of ImageNet's 331 in the paper
ENHANCEMENTS = ("brightness", "color", "contrast", "sharpness")
AUTO_RANGES = {  # the strength of an operation at the highest level; the others have none
    "shear_y": 0.3,
    "translate_x": FAR,
    "translate_y": FAR,
    "rotate": 30,
    **dict.fromkeys(ENHANCEMENTS, 0.9),
    "posterize": 4,
    "solarize": 1,
}
# TrivialAugment's operations, all equally likely, in torchvision's wide ranges.
TRIVIAL_LEVELS = 31
TRIVIAL_RANGES = {
    "shear_x": 0.99,
    "shear_y": 0.99,
    "translate_x": 32,
    "translate_y": 32,
    "rotate": 135,
    **dict.fromkeys(ENHANCEMENTS, 0.99),
    "posterize": 6,
    "solarize": 1,
}
TRIVIAL_OPERATIONS = (*TRIVIAL_RANGES, "autocontrast", "equalize", "identity")

MIXUP_ALPHA, CUTMIX_ALPHA = 0.2, 1.0  # parameters of the beta distribution of the shares


def draw(config: Config, indices: Tensor, epoch: int) -> tuple[Tensor, ...]:
    """Draw an augmentation for each of the images `indices`, (N,), in their order.

    Alternating flips mirror a random half of the images in the first epoch, the other half in the
    second, and so on: two epochs show every image both ways (Jordan, arXiv:2404.00498). With
    `teacher_views`, two visits to a view do, even if the number of views is even.

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
        visit, view = divmod(epoch - 1, config.teacher_views or epoch)
        flip = first[indices] ^ ((visit + view) % 2 == 1)
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
    angle = angle if config.rotation_degrees else None
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
    images: Tensor,
    shift: Tensor,
    angle: Tensor | None,
    flip: Tensor,
    padding_mode: str = "zeros",
) -> Tensor:
    """Crop, then rotate, then flip, each image its own way: one gather for the whole batch.

    Equal to torchvision's crop after padding, rotate (nearest pixel, zero fill) and
    horizontal_flip: every output pixel is traced back through the three to its source.

    Args:
        images: (N, C, S, S) uint8.
        shift: (N, 2) pixels: the crop's first row and column, counted from the image's.
        angle: (N,) degrees, counter-clockwise; None for no rotation, which takes less memory.
        flip: (N,) bool.
        padding_mode: fills a crop outside the image with `zeros`, or the mirror image (`reflect`).
    """
    n, channels, size, _ = images.shape
    center = (size - 1) / 2
    offset = torch.arange(size, device=images.device) - center  # pixels from the center
    y = offset[None, :, None]  # (1, S, 1)
    x = offset[None, None, :] * torch.where(flip, -1.0, 1.0)[:, None, None]  # (N, 1, S)
    if angle is not None:
        radians = angle.deg2rad()[:, None, None]
        sin, cos = radians.sin(), radians.cos()
        y, x = y * cos + x * sin, x * cos - y * sin  # (N, S, S)
    row, column = ((place + center).round().long() for place in (y, x))  # in the cropped image
    inside = (row >= 0) & (row < size) & (column >= 0) & (column < size)
    row, column = row + shift[:, 0, None, None], column + shift[:, 1, None, None]
    if padding_mode == "reflect":
        last = size - 1
        row = (last - (last - row.abs()).abs()).clamp_(0)
        column = (last - (last - column.abs()).abs()).clamp_(0)
    else:
        inside = inside & (row >= 0) & (row < size) & (column >= 0) & (column < size)

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


def apply_policy(config: Config, images: Tensor, epoch: int) -> Tensor:
    """Apply AutoAugment or TrivialAugment to all (N, 3, S, S) uint8 images, if either is on."""
    if config.auto_augment:
        return auto_augment(images, *draw_pairs(len(images), config.seed, epoch))
    if config.trivial_augment:
        return trivial_augment(images, *draw_trivial(len(images), config.seed, epoch))
    return images


def auto_augment(images: Tensor, pair: Tensor, chance: Tensor, side: Tensor) -> Tensor:
    """Apply one of 25 pairs of operations to each image: AutoAugment (Cubuk, arXiv:1805.09501).

    torchvision's transform draws once for all images of a call. Here each image has its own draw,
    and the images of equal draws are changed together: 58 calls for any number of images.

    Args:
        images: (N, 3, S, S) uint8.
        pair: (N,) indices into AUTO_AUGMENT, on the CPU.
        chance: (N, 2) from 0 to 1: an operation is skipped if its probability is smaller.
        side: (N, 2) from 0 to 1: up to 0.5 the direction of an operation is reversed.
    """
    for j in range(2):
        names, probabilities, levels = zip(*(both[j] for both in AUTO_AUGMENT), strict=True)
        calls = [
            (name, strength(name, level, sign, AUTO_RANGES, AUTO_LEVELS))
            for name, level in zip(names, levels, strict=True)
            for sign in (-1, 1)
        ]
        applied = chance[:, j] <= torch.tensor(probabilities)[pair]
        which = 2 * pair + (side[:, j] > 0.5)
        images = call_together(images, calls, which.where(applied, len(calls)))
    return images


def trivial_augment(images: Tensor, operation: Tensor, level: Tensor, side: Tensor) -> Tensor:
    """Apply one operation of one strength to each image: TrivialAugment (arXiv:2103.10158).

    Args:
        images: (N, 3, S, S) uint8.
        operation: (N,) indices into TRIVIAL_OPERATIONS, on the CPU.
        level: (N,) from 0 to TRIVIAL_LEVELS - 1.
        side: (N,) from 0 to 1: up to 0.5 the direction of the operation is reversed.
    """
    calls = [
        (name, strength(name, i, sign, TRIVIAL_RANGES, TRIVIAL_LEVELS))
        for name in TRIVIAL_OPERATIONS
        for i in range(TRIVIAL_LEVELS)
        for sign in (-1, 1)
    ]
    return call_together(images, calls, 2 * (TRIVIAL_LEVELS * operation + level) + (side > 0.5))


def strength(name: str, level: int, sign: int, ranges: dict[str, float], levels: int) -> float:
    """The argument of an operation at one of several levels; 0 if it takes none."""
    if name not in ranges:
        return 0.0
    # In float32, as in torchvision.
    if name == "solarize":  # the threshold falls
        return torch.linspace(ranges[name], 0, levels)[level].item()
    at = torch.linspace(0, ranges[name], levels)[level].item()
    return 8 - round(at) if name == "posterize" else sign * at  # posterize keeps so many bits


def call_together(images: Tensor, calls: list[tuple[str, float]], which: Tensor) -> Tensor:
    """Change each image by one call of an operation, all images of equal calls together.

    Args:
        images: (N, 3, S, S) uint8.
        calls: operations and their strengths.
        which: (N,) indices into `calls`, or their number to leave an image as it is; on the CPU.
    """
    operations, images = operations_by_name(), images.clone()
    different = list(dict.fromkeys(calls))
    code = torch.tensor([*map(different.index, calls), len(different)])[which]
    sizes = code.bincount(minlength=len(different) + 1).tolist()
    chosen = code.argsort(stable=True).to(images.device).split(sizes)
    for (name, value), some in zip(different, chosen[:-1], strict=True):
        if len(some):
            images[some] = operations[name](images[some], value)
    return images


def draw_pairs(num_images: int, seed: int, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the arguments `pair`, `chance` and `side` of `auto_augment` for an epoch."""
    rng = generator("auto_augment", seed, epoch)
    pair = torch.randint(len(AUTO_AUGMENT), (num_images,), generator=rng)
    chance, side = torch.rand(2, num_images, 2, generator=rng)
    return pair, chance, side


def draw_trivial(num_images: int, seed: int, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the arguments `operation`, `level` and `side` of `trivial_augment` for an epoch."""
    rng = generator("trivial_augment", seed, epoch)
    operation = torch.randint(len(TRIVIAL_OPERATIONS), (num_images,), generator=rng)
    level = torch.randint(TRIVIAL_LEVELS, (num_images,), generator=rng)
    return operation, level, torch.rand(num_images, generator=rng)


def operations_by_name() -> dict[str, Callable[[Tensor, float], Tensor]]:
    """The operations of both policies, called with (N, 3, S, S) images and a strength."""
    from torchvision.transforms.v2 import functional as v2

    def affine(
        x: Tensor, right: float = 0, down: float = 0, shear_x: float = 0, shear_y: float = 0
    ) -> Tensor:
        degrees = [math.degrees(math.atan(shear)) for shear in (shear_x, shear_y)]
        return v2.affine(x, 0, [int(right), int(down)], 1, degrees, center=[0, 0])

    return {
        "shear_x": lambda x, value: affine(x, shear_x=value),
        "shear_y": lambda x, value: affine(x, shear_y=value),
        "translate_x": lambda x, value: affine(x, right=value),
        "translate_y": lambda x, value: affine(x, down=value),
        "rotate": v2.rotate,
        "brightness": lambda x, value: v2.adjust_brightness(x, 1 + value),
        "color": lambda x, value: v2.adjust_saturation(x, 1 + value),
        "contrast": lambda x, value: v2.adjust_contrast(x, 1 + value),
        "sharpness": lambda x, value: v2.adjust_sharpness(x, 1 + value),
        "posterize": v2.posterize,
        "solarize": lambda x, value: v2.solarize(x, 255 * value),
        "autocontrast": lambda x, _: v2.autocontrast(x),
        "equalize": lambda x, _: v2.equalize(x),
        "invert": lambda x, _: v2.invert(x),
        "identity": lambda x, _: x,
    }


# ---------------------------------------------------------------- mixing


def mix(
    config: Config, images: Tensor, targets: Tensor, epoch: int, step: int
) -> tuple[Tensor, Tensor]:
    """Mix each image of a batch with the one before it, and their targets alike, in some batches.

    Half of these by mixup, a weighted mean (Zhang et al., arXiv:1710.09412), and half by CutMix, a
    rectangle of the other image (Yun et al., arXiv:1905.04899). There is one draw for a batch, a
    pure function of (seed, epoch, step). Under torchrun each process mixes its own images.

    Args:
        images: (N, 3, S, S) normalized.
        targets: (N, num_classes).
    """
    rng = np.random.default_rng(derive_seed("mixing", config.seed, epoch, step))
    if rng.random() >= config.mixing:
        return images, targets
    others, size = images.roll(1, 0), images.shape[-1]
    if rng.random() < 0.5:
        share = rng.beta(MIXUP_ALPHA, MIXUP_ALPHA)  # of the other image
        images = images.lerp(others, share)
    else:
        half = size * rng.beta(CUTMIX_ALPHA, CUTMIX_ALPHA) ** 0.5 / 2  # of the rectangle's side
        # Its center is any pixel, and what reaches over the edge is cut off, as theirs is.
        (top, bottom), (left, right) = (
            (max(0, int(at - half)), min(size, int(at + half))) for at in rng.integers(size, size=2)
        )
        images = images.clone()
        images[..., top:bottom, left:right] = others[..., top:bottom, left:right]
        share = (bottom - top) * (right - left) / size**2
    return images, targets.lerp(targets.roll(1, 0), share)
