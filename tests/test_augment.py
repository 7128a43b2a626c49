from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as reference

import augment as augment_script
import data
import distributed
from augment import Augmentation, augment, train_batches
from data import Split, load_dataset
from utils import generator


@pytest.fixture
def images():
    return torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=generator("test"))


# ---------------------------------------------------------------- augmentation


@pytest.mark.parametrize("rotation", [0, 5, 180])
@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
@pytest.mark.parametrize("flip", ["none", "random"])
def test_augment_is_torchvisions_crop_rotate_flip(images, rotation, padding, mode, flip):
    augmentation = Augmentation(padding, mode, rotation, flip, 0)
    *draws, _ = augmentation.draw(torch.arange(len(images)), 1, 1)
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


def test_cutout_is_torchvisions_erase(images):
    normal = images.float() + 1
    corners = Augmentation(0, "zeros", 0.0, "none", 10).draw(torch.arange(len(images)), 1, 1)[3]
    ours = augment_script.cut_out(normal, corners, 10)
    for image, (row, column), result in zip(normal, corners, ours, strict=True):
        top, left = max(0, int(row)), max(0, int(column))  # it may reach over the edge
        height, width = int(row) + 10 - top, int(column) + 10 - left
        expected = reference.erase(image, top, left, height, width, torch.zeros(1))
        assert torch.equal(result, expected)


def test_batches_are_cut_out_after_normalisation():
    augmentation = Augmentation(0, "zeros", 0.0, "none", 8)
    toy = labelled_by_position(100)
    images, labels, _ = next(train_batches(toy, augmentation, 100, 0, 1))
    greyed = (images == 0).all(1).sum((1, 2))[labels > 0]
    assert greyed.max() == 64
    assert 16 <= greyed.min() < 64  # of a square that reaches over an edge, or two


def test_augmentation_is_drawn_per_image_over_its_whole_range():
    indices = torch.arange(4000)
    shift, angle, flip, corner = Augmentation(4, "zeros", 5.0, "random", 8).draw(indices, 0, 1)
    assert sorted(set(corner.flatten().tolist())) == list(range(-4, 28))  # the center is any pixel
    assert sorted(set(shift.flatten().tolist())) == list(range(-4, 5))
    assert -5 <= angle.min() < -4.9
    assert 4.9 < angle.max() <= 5
    assert 0.45 < flip.float().mean() < 0.55
    # rows and columns move independently of each other, and of the angle
    assert abs(np.corrcoef([*shift.T.numpy(), angle.numpy()])[np.triu_indices(3, 1)]).max() < 0.06
    shift, angle, flip, _ = Augmentation(0, "zeros", 0.0, "none", 0).draw(indices, 0, 1)
    assert not shift.any()
    assert not angle.any()
    assert not flip.any()


def test_alternating_flips_show_every_image_both_ways_in_two_epochs():
    augmentation = Augmentation(0, "zeros", 0.0, "alternating", 0)
    orders = [torch.randperm(1000, generator=generator("order", epoch)) for epoch in range(1, 5)]
    flips = []
    for epoch, order in enumerate(orders, start=1):
        by_image = torch.empty(1000, dtype=torch.bool)
        by_image[order] = augmentation.draw(order, 7, epoch)[2]
        flips.append(by_image)
    assert 400 < flips[0].sum() < 600
    assert torch.equal(flips[1], ~flips[0])
    assert torch.equal(flips[2], flips[0])
    assert torch.equal(flips[3], flips[1])
    other_seed = augmentation.draw(torch.arange(1000), 8, 1)[2]
    assert not torch.equal(other_seed, flips[0])


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
    draws = augment_script.draw_pairs(64, seed=0, epoch=1)
    together = augment_script.auto_augment(images, *draws)
    for i in range(64):
        alone = augment_script.auto_augment(images[i : i + 1], *(draw[i : i + 1] for draw in draws))
        assert torch.equal(together[i : i + 1], alone)
    assert not torch.equal(together, images)


def test_pairs_are_drawn_evenly_and_anew_in_each_epoch():
    pair, *others = augment_script.draw_pairs(100_000, seed=0, epoch=1)
    assert (pair.bincount(minlength=25) - 4000).abs().max() < 320  # 5 deviations
    for draw in others:
        assert (draw.mean(dim=0) - 0.5).abs().max() < 0.01
        assert torch.cov(draw.T)[0, 1].abs() < 0.002
    assert not torch.equal(augment_script.draw_pairs(100_000, seed=0, epoch=2)[0], pair)


# ---------------------------------------------------------------- batches


def labelled_by_position(num_images):
    """A data set in which every image shows its own number, which is also its label."""
    numbers = torch.arange(num_images)
    pixels = numbers.to(torch.uint8)[:, None, None, None].expand(-1, 3, 32, 32)
    split = Split(pixels, numbers)
    return data.Dataset("toy", ("a",), (0, 0, 0), (1 / 255,) * 3, split, split[:0], split, "")


def test_batches_hold_what_auto_augment_made_of_the_whole_epochs_images():
    toy, augmentation = labelled_by_position(100), Augmentation(0, "zeros", 0.0, "none", 0, True)
    for epoch in (1, 2):
        draws = augment_script.draw_pairs(100, seed=5, epoch=epoch)
        changed = augment_script.auto_augment(toy.train.images, *draws)
        assert not torch.equal(changed, toy.train.images)
        for images, labels, _ in train_batches(toy, augmentation, 40, 5, epoch):
            assert torch.equal(images, toy.normalize(changed[labels]))


def test_an_epoch_visits_every_image_once_in_an_order_of_its_own():
    toy, plain = labelled_by_position(100), Augmentation(0, "zeros", 0.0, "none", 0)
    orders = []
    for seed, epoch in ((0, 1), (0, 2), (1, 1)):
        batches = list(train_batches(toy, plain, 32, seed, epoch))
        assert [size for _, _, size in batches] == [32, 32, 32, 4]
        labels = torch.cat([labels for _, labels, _ in batches])
        shown = torch.cat([images[:, 0, 0, 0] for images, _, _ in batches])
        torch.testing.assert_close(shown, labels.float())
        assert sorted(labels.tolist()) == list(range(100))
        orders.append(labels.tolist())
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]


def test_batches_are_a_pure_function_of_seed_epoch_and_step():
    digits, strong = load_dataset("digits"), Augmentation(4, "zeros", 30.0, "random", 0)
    first = list(train_batches(digits, strong, 500, seed=3, epoch=7))
    torch.manual_seed(123)
    again = list(train_batches(digits, strong, 500, seed=3, epoch=7))
    for (images, labels, _), (images_again, labels_again, _) in zip(first, again, strict=True):
        assert torch.equal(images, images_again)
        assert torch.equal(labels, labels_again)
    other = next(train_batches(digits, strong, 500, seed=3, epoch=8))
    assert not torch.equal(first[0][0], other[0])


def test_every_image_is_augmented_by_draws_of_its_own():
    """One picture, a hundred times: in no batch, epoch or seed is it augmented as in another."""
    picture = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=generator(0))
    toy = labelled_by_position(100)
    toy = replace(toy, train=replace(toy.train, images=picture.expand(100, -1, -1, -1)))
    strong = Augmentation(4, "zeros", 180.0, "random", 0)
    views = set()
    for seed in range(3):
        for epoch in range(4):
            for images, _, _ in train_batches(toy, strong, 25, seed, epoch):
                views |= {image.numpy().tobytes() for image in images}
    assert len(views) > 0.99 * 3 * 4 * 100


def test_processes_share_each_global_batch_as_one_process_augments_it(monkeypatch):
    digits, strong = load_dataset("digits"), Augmentation(4, "zeros", 30.0, "random", 0)
    whole = train_batches(digits, strong, 101, seed=0, epoch=1)
    whole, shares = list(whole), []
    monkeypatch.setattr(distributed, "num_processes", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(list(train_batches(digits, strong, 101, 0, 1)))
    for (images, labels, size), *parts in zip(whole, *shares, strict=True):
        for rank, (share, share_labels, global_size) in enumerate(parts):
            assert torch.equal(share, images[rank::3])
            assert torch.equal(share_labels, labels[rank::3])
            assert global_size == size == len(labels)


def test_small_batches_are_the_centre_of_the_whole_ones():
    digits, augmentation = load_dataset("digits"), Augmentation(4, "reflect", 5.0, "random", 0)
    whole, labels, _ = next(train_batches(digits, augmentation, 50, 0, 1))
    small, same_labels, _ = next(train_batches(digits, augmentation, 50, 0, 1, image_size=28))
    assert torch.equal(small, whole[:, :, 2:30, 2:30])
    assert torch.equal(labels, same_labels)


def test_scaled_down_batches_are_what_pillow_makes_of_the_whole_ones():
    digits = load_dataset("digits")
    augmentation = Augmentation(4, "reflect", 5.0, "random", 8, small_images="scale")
    whole, labels, _ = next(train_batches(digits, augmentation, 20, 0, 1))
    small, same_labels, _ = next(train_batches(digits, augmentation, 20, 0, 1, image_size=24))
    assert small.shape == (20, 3, 24, 24)
    assert torch.equal(labels, same_labels)
    for image, scaled in zip(whole[:, 0], small[:, 0], strict=True):
        expected = Image.fromarray(image.numpy()).resize((24, 24), Image.Resampling.BILINEAR)
        assert np.allclose(scaled, np.asarray(expected), atol=1e-4)


def test_normalize_gives_zero_mean_and_unit_variance():
    digits = load_dataset("digits")
    pixels = digits.normalize(digits.train.images)
    assert pixels.dtype == torch.float32
    assert pixels.mean().abs() < 1e-3
    assert (pixels.std() - 1).abs() < 1e-3
