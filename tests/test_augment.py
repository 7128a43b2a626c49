import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as reference

import augment as augment_script
from augment import apply, augment, draw
from config import Config
from utils import generator

PLAIN = {"crop_padding": 0, "rotation_degrees": 0.0, "flip": "none"}


@pytest.fixture
def images():
    return torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=generator("test"))


@pytest.mark.parametrize("rotation", [0, 5, 180])
@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
@pytest.mark.parametrize("flip", ["none", "random"])
def test_augment_is_torchvisions_crop_rotate_flip(images, rotation, padding, mode, flip):
    config = Config(crop_padding=padding, rotation_degrees=float(rotation), flip=flip, seed=1)
    *draws, _ = draw(config, torch.arange(len(images)), epoch=1)
    ours = augment(images, *draws, mode)
    torchvision_mode = {"zeros": "constant", "reflect": "reflect"}[mode]
    differing = 0
    for image, (dy, dx), angle, mirrored, result in zip(images, *draws, ours, strict=True):
        expected = reference.pad(image, padding, padding_mode=torchvision_mode)
        expected = reference.crop(expected, int(dy) + padding, int(dx) + padding, 32, 32)
        expected = reference.rotate(expected, float(angle))
        if mirrored:
            expected = reference.horizontal_flip(expected)
        differing += (result != expected).sum().item()
    # float32 may round a source that lies half-way between two pixels the other way
    assert differing <= 1e-4 * ours.numel()
    if not (rotation or padding):
        assert differing == 0


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_batches_are_padded_as_asked(images, mode):
    config = Config(padding_mode=mode, rotation_degrees=0.0)
    shift, _, flip, _ = draws = draw(config, torch.arange(len(images)), epoch=1)
    expected = augment(images, shift, None, flip, mode) / 255
    assert torch.equal(apply(config, images, draws, lambda x: x), expected)


def test_cutout_is_torchvisions_erase(images):
    normal = images.float() + 1
    corners = draw(Config(cutout_size=10), torch.arange(len(images)), epoch=1)[3]
    ours = augment_script.cut_out(normal, corners, 10)
    for image, (row, column), result in zip(normal, corners, ours, strict=True):
        top, left = max(0, int(row)), max(0, int(column))  # it may reach over the edge
        height, width = int(row) + 10 - top, int(column) + 10 - left
        expected = reference.erase(image, top, left, height, width, torch.zeros(1))
        assert torch.equal(result, expected)


def test_images_are_cut_out_after_normalization(images):
    """The square is gray, the mean, and not black."""
    config = Config(**PLAIN, cutout_size=8)
    draws = draw(config, torch.arange(len(images)), epoch=1)
    whole, cut = (apply(c, images, draws, lambda x: x + 1) for c in (Config(**PLAIN), config))
    assert torch.equal(whole, images / 255 + 1)
    grayed = (cut == 0).all(1).sum((1, 2))
    assert grayed.max() == 64
    assert 16 <= grayed.min() < 64  # of a square that reaches over an edge, or two
    assert torch.equal(cut[cut != 0], whole[cut != 0])


def test_augmentation_is_drawn_per_image_over_its_whole_range():
    indices = torch.arange(4000)
    shift, angle, flip, corner = draw(Config(cutout_size=8), indices, epoch=1)
    assert sorted(set(corner.flatten().tolist())) == list(range(-4, 28))  # the center is any pixel
    assert sorted(set(shift.flatten().tolist())) == list(range(-4, 5))
    assert -5 <= angle.min() < -4.9
    assert 4.9 < angle.max() <= 5
    assert 0.45 < flip.float().mean() < 0.55
    # rows and columns move independently of each other, and of the angle
    assert abs(np.corrcoef([*shift.T.numpy(), angle.numpy()])[np.triu_indices(3, 1)]).max() < 0.06
    shift, angle, flip, _ = draw(Config(**PLAIN), indices, epoch=1)
    assert not shift.any()
    assert not angle.any()
    assert not flip.any()


def test_alternating_flips_show_every_image_both_ways_in_two_epochs():
    config = Config(flip="alternating", seed=7)
    orders = [torch.randperm(1000, generator=generator("order", epoch)) for epoch in range(1, 5)]
    flips = []
    for epoch, order in enumerate(orders, start=1):
        by_image = torch.empty(1000, dtype=torch.bool)
        by_image[order] = draw(config, order, epoch)[2]
        flips.append(by_image)
    assert 400 < flips[0].sum() < 600
    assert torch.equal(flips[1], ~flips[0])
    assert torch.equal(flips[2], flips[0])
    assert torch.equal(flips[3], flips[1])
    other_seed = draw(Config(flip="alternating", seed=8), torch.arange(1000), epoch=1)[2]
    assert not torch.equal(other_seed, flips[0])


@pytest.mark.parametrize("views", [1, 2, 3])
def test_alternating_flips_show_every_view_both_ways_in_two_visits(views):
    config, indices = Config(flip="alternating", teacher_views=views), torch.arange(100)
    flips = [draw(config, indices, epoch)[2] for epoch in range(1, 3 * views + 1)]
    for flip, next_visit in zip(flips, flips[views:], strict=False):
        assert torch.equal(next_visit, ~flip)


@pytest.mark.parametrize("value", [0.0, 0.15, 0.25, 0.45, 0.55, 0.65, 0.85, 0.95])
def test_auto_augment_is_torchvisions_on_each_image(value, monkeypatch):
    """Every pair of operations, with all that is drawn set to `value`."""
    small = 256 * torch.rand(25, 3, 5, 5, generator=generator("smooth"))
    images = torch.nn.functional.interpolate(small, (32, 32), mode="bilinear").to(torch.uint8)
    draws = torch.full((25, 2), value)
    changed = augment_script.auto_augment(images, torch.arange(25), draws, draws)
    transform = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
    monkeypatch.setattr(torch, "rand", lambda *size: torch.tensor(value))
    for i in range(25):
        monkeypatch.setattr(torch, "randint", lambda *args, i=i: torch.tensor(i))
        assert torch.equal(changed[i], transform(images[i])), augment_script.AUTO_AUGMENT[i]


def test_auto_augment_changes_each_image_by_its_own_draw(images):
    images = images[:16]
    draws = augment_script.draw_pairs(16, seed=0, epoch=1)
    together = augment_script.auto_augment(images, *draws)
    for i in range(16):
        alone = augment_script.auto_augment(images[i : i + 1], *(d[i : i + 1] for d in draws))
        assert torch.equal(together[i : i + 1], alone)
    assert not torch.equal(together, images)


def test_pairs_are_drawn_evenly_and_anew_in_each_epoch_and_seed():
    pair, *others = augment_script.draw_pairs(100_000, seed=0, epoch=1)
    assert (pair.bincount(minlength=25) - 4000).abs().max() < 320  # 5 deviations
    for values in others:
        assert (values.mean(dim=0) - 0.5).abs().max() < 0.01
        assert torch.cov(values.T)[0, 1].abs() < 0.002
    for seed, epoch in ((0, 2), (1, 1)):
        assert not torch.equal(augment_script.draw_pairs(100_000, seed, epoch)[0], pair)


@pytest.mark.parametrize("level", range(31))
def test_trivial_augment_is_torchvisions_on_each_image(level, monkeypatch):
    """Every operation at every level, in one direction or the other."""
    operations = augment_script.TRIVIAL_OPERATIONS
    n, value = len(operations), 0.4 if level % 2 else 0.6
    small = 256 * torch.rand(n, 3, 5, 5, generator=generator("smooth"))
    images = torch.nn.functional.interpolate(small, (32, 32), mode="bilinear").to(torch.uint8)
    changed = augment_script.trivial_augment(
        images, torch.arange(n), torch.full((n,), level), torch.full((n,), value)
    )
    transform = v2.TrivialAugmentWide()
    names = {name.lower(): name for name in transform._AUGMENTATION_SPACE}
    assert set(names) == {name.replace("_", "") for name in operations}
    monkeypatch.setattr(torch, "rand", lambda *size: torch.tensor(value))
    monkeypatch.setattr(torch, "randint", lambda *args: torch.tensor(level))
    for i, name in enumerate(operations):
        chosen = names[name.replace("_", "")]
        choice = (chosen, transform._AUGMENTATION_SPACE[chosen])
        monkeypatch.setattr(transform, "_get_random_item", lambda space, choice=choice: choice)
        assert torch.equal(changed[i], transform(images[i])), name


def test_trivial_augment_is_drawn_evenly_and_anew_in_each_epoch_and_seed():
    operation, level, side = augment_script.draw_trivial(140_000, seed=0, epoch=1)
    assert (operation.bincount(minlength=14) - 10_000).abs().max() < 500
    assert (level.bincount(minlength=31) - 140_000 / 31).abs().max() < 350
    assert abs(side.mean() - 0.5) < 0.01
    for seed, epoch in ((0, 2), (1, 1)):
        assert not torch.equal(augment_script.draw_trivial(140_000, seed, epoch)[0], operation)


# ---------------------------------------------------------------- mixing


def test_mixing_is_a_weighted_mean_or_a_rectangle_of_the_image_before(images):
    """Of images and targets alike, and by each of the two in half of the mixed batches."""
    images, size = images.float(), 32
    targets = torch.eye(64)
    others, kinds, shares = images.roll(1, 0), {"none": 0, "mixup": 0, "cutmix": 0}, []
    of_mixup = []
    for step in range(400):
        mixed, soft = augment_script.mix(Config(mixing=0.8), images, targets, 3, step)
        share = soft[0, 63].item()  # of the image before the first one, the last
        assert torch.allclose(soft, targets.lerp(targets.roll(1, 0), share), atol=1e-6)
        of_other = (mixed == others) & (images != others)
        inside = of_other.any(dim=(0, 1))
        if torch.equal(mixed, images):
            kinds["none"] += 1
            assert share == 0
        elif torch.allclose(mixed, images.lerp(others, share), atol=1e-3):
            kinds["mixup"] += 1
            of_mixup.append(share)
        else:
            kinds["cutmix"] += 1
            rows, columns = (inside.any(dim=d).nonzero().flatten() for d in (1, 0))
            assert inside.sum() == len(rows) * len(columns)  # a rectangle
            assert torch.equal(mixed, torch.where(inside, others, images))
            assert share == pytest.approx(inside.sum().item() / size**2)
            shares.append(share)
    assert 40 < kinds["none"] < 120
    assert abs(kinds["mixup"] - kinds["cutmix"]) < 80
    assert min(shares) < 0.1 < 0.6 < max(shares)
    assert np.mean([min(share, 1 - share) < 0.1 for share in of_mixup]) > 0.5  # alpha is 0.2


def test_mixing_is_a_pure_function_of_seed_epoch_and_step(images):
    images, targets = images.float(), torch.eye(64)

    def mixed(seed, epoch, step):
        return augment_script.mix(Config(mixing=1.0, seed=seed), images, targets, epoch, step)[1]

    first = mixed(0, 1, 0)
    assert torch.equal(mixed(0, 1, 0), first)
    assert not any(torch.equal(mixed(*key), first) for key in ((1, 1, 0), (0, 2, 0), (0, 1, 1)))
