import hashlib
import pickle
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as reference

import augment as augment_script
import data
import distributed
from augment import Augmentation, augment, train_batches
from data import Split, load_dataset
from utils import InputError, generator


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
        expected = reference.erase(image, int(row), int(column), 10, 10, torch.zeros(1))
        assert torch.equal(result, expected)


def test_batches_are_cut_out_after_normalisation():
    augmentation = Augmentation(0, "zeros", 0.0, "none", 8)
    toy = labelled_by_position(100)
    images, labels, _ = next(train_batches(toy, augmentation, 100, 0, 1))
    greyed = (images == 0).all(1).sum((1, 2))
    assert set(greyed[labels > 0].tolist()) == {64}


def test_augmentation_is_drawn_per_image_over_its_whole_range():
    indices = torch.arange(4000)
    shift, angle, flip, corner = Augmentation(4, "zeros", 5.0, "random", 8).draw(indices, 0, 1)
    assert sorted(set(corner.flatten().tolist())) == list(range(25))
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


def test_normalize_gives_zero_mean_and_unit_variance():
    digits = load_dataset("digits")
    pixels = digits.normalize(digits.train.images)
    assert pixels.dtype == torch.float32
    assert pixels.mean().abs() < 1e-3
    assert (pixels.std() - 1).abs() < 1e-3


# ---------------------------------------------------------------- digits, validation split


def test_digits_are_all_there_stratified_and_readable():
    digits = load_dataset("digits")
    assert (len(digits.train), len(digits.val), len(digits.test)) == (1438, 0, 359)
    shares = digits.test.labels.bincount() / (digits.train.labels.bincount() * 1.0)
    assert (shares - 0.25).abs().max() < 0.01
    assert digits.train.images.shape == (1438, 3, 32, 32)
    assert digits.train.images.dtype == torch.uint8
    assert (digits.train.images.min(), digits.train.images.max()) == (0, 255)


def test_validation_split_is_stratified_disjoint_and_the_same_for_everyone():
    digits = load_dataset("digits")
    split = load_dataset("digits", val_size=300)
    assert (len(split.train), len(split.val), len(split.test)) == (1138, 300, 359)
    together = torch.cat([split.train.images, split.val.images]).flatten(1)
    assert torch.equal(together.unique(dim=0), digits.train.images.flatten(1).unique(dim=0))
    shares = split.val.labels.bincount() / digits.train.labels.bincount()
    assert (shares - 300 / 1438).abs().max() < 0.01
    assert torch.equal(split.val.images, load_dataset("digits", val_size=300).val.images)
    assert split.fingerprint == digits.fingerprint


def test_fewer_training_images_are_stratified_and_leave_the_other_splits_alone():
    whole = load_dataset("digits", val_size=300)
    few = load_dataset("digits", val_size=300, train_size=400)
    assert torch.equal(few.val.images, whole.val.images)
    assert torch.equal(few.test.images, whole.test.images)
    assert len(few.train) == 400
    pool = {image.numpy().tobytes() for image in whole.train.images}
    assert {image.numpy().tobytes() for image in few.train.images} <= pool
    shares = few.train.labels.bincount() / whole.train.labels.bincount()
    assert (shares - 400 / 1138).abs().max() < 0.01
    assert load_dataset("digits", train_size=1438).train.images.shape[0] == 1438


@pytest.mark.parametrize("size", [1, 9, 1429, 5000])
def test_validation_split_that_cannot_be_stratified_is_refused(size):
    with pytest.raises(InputError, match=f"val_size: {size} .* use 0, or 10 to 1,428"):
        load_dataset("digits", val_size=size)


# ---------------------------------------------------------------- CIFAR-10


def test_binary_layout_is_read_whole_and_a_foreign_copy_is_noted(cifar10_bin, capsys):
    dataset = load_dataset("cifar10", cifar10_bin)
    assert (len(dataset.train), len(dataset.test)) == (50_000, 10_000)
    record = np.fromfile(cifar10_bin / data.BINARY_FOLDER / "data_batch_3.bin", np.uint8)
    record = record.reshape(-1, 3073)[1234]
    assert dataset.train.labels[21_234] == record[0]
    assert torch.equal(dataset.train.images[21_234].flatten(), torch.tensor(record[1:]))
    assert dataset.unofficial == tuple(data.BINARY_SHA1)
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert "6 of 6 files differ from the official" in warning


def test_a_file_with_the_official_sha1_is_not_noted(cifar10_bin, capsys, monkeypatch):
    folder = cifar10_bin / data.BINARY_FOLDER
    sha1 = {n: hashlib.sha1((folder / n).read_bytes()).hexdigest() for n in data.BINARY_SHA1}
    monkeypatch.setattr(data, "BINARY_SHA1", sha1)
    assert load_dataset("cifar10", cifar10_bin).unofficial == ()
    assert capsys.readouterr().err == ""


@pytest.fixture
def tiny_cifar10(monkeypatch, tmp_path):
    """20 images a file, known to torchvision by their MD5, in both layouts."""
    monkeypatch.setattr(data, "IMAGES_PER_FILE", 20)
    archive, binary = tmp_path / "archive", tmp_path / "binary"
    python_folder, binary_folder = archive / "cifar-10-batches-py", binary / data.BINARY_FOLDER
    python_folder.mkdir(parents=True)
    binary_folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    md5 = {}
    for name in data.BINARY_SHA1:
        records = rng.integers(0, 256, (20, data.RECORD_BYTES), dtype=np.uint8)
        records[:, 0] %= 10
        records.tofile(binary_folder / name)
        content = pickle.dumps({"data": records[:, 1:], "labels": records[:, 0].tolist()})
        (python_folder / name.removesuffix(".bin")).write_bytes(content)
        md5[name.removesuffix(".bin")] = hashlib.md5(content).hexdigest()
    meta = pickle.dumps({"label_names": data.FACTS["cifar10"][0]})
    (python_folder / "batches.meta").write_bytes(meta)
    *train, test = md5.items()
    cifar10 = torchvision.datasets.CIFAR10
    with tarfile.open(archive / cifar10.filename, "w:gz") as tar:
        tar.add(python_folder, python_folder.name)
    monkeypatch.setattr(cifar10, "train_list", train)
    monkeypatch.setattr(cifar10, "test_list", [test])
    monkeypatch.setattr(cifar10, "meta", cifar10.meta | {"md5": hashlib.md5(meta).hexdigest()})
    tgz = (archive / cifar10.filename).read_bytes()
    monkeypatch.setattr(cifar10, "tgz_md5", hashlib.md5(tgz).hexdigest())
    monkeypatch.setattr(cifar10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")  # refuses
    return archive, binary


def test_archive_and_binary_layout_are_the_same_data(tiny_cifar10):
    archive, binary = (load_dataset("cifar10", folder) for folder in tiny_cifar10)
    assert torch.equal(archive.train.images, binary.train.images)
    assert torch.equal(archive.test.labels, binary.test.labels)
    assert archive.fingerprint == binary.fingerprint
    changed = replace(binary.test, labels=(binary.test.labels + 1) % 10)
    assert data.fingerprint(binary.train, changed) != binary.fingerprint


def test_without_test_images_the_rest_is_the_same_and_their_file_is_not_read(tiny_cifar10):
    archive, binary = tiny_cifar10
    whole = load_dataset("cifar10", binary, val_size=20)
    (binary / data.BINARY_FOLDER / "test_batch.bin").unlink()
    for folder in (archive, binary):
        found = load_dataset("cifar10", folder, val_size=20, test=False)
        assert (len(found.train), len(found.val), len(found.test)) == (80, 20, 0)
        assert torch.equal(found.val.images, whole.val.images)
        assert found.fingerprint != whole.fingerprint
    digits = load_dataset("digits", test=False)
    assert len(digits.test) == 0
    assert torch.equal(digits.train.labels, load_dataset("digits").train.labels)


def test_archive_that_was_put_there_is_unpacked_without_a_download(tiny_cifar10):
    folder, _ = tiny_cifar10
    for file in (folder / "cifar-10-batches-py").iterdir():
        file.unlink()
    assert len(load_dataset("cifar10", folder, download=False).train) == 100


@pytest.mark.parametrize("download", [False, True])
@pytest.mark.parametrize("damage", ["missing", "truncated", "foreign"])
def test_without_a_sound_archive_one_line_says_what_to_do(tiny_cifar10, tmp_path, download, damage):
    folder, _ = tiny_cifar10
    if damage == "missing":
        folder = tmp_path / "nothing here"
    else:
        batch = folder / "cifar-10-batches-py" / "data_batch_2"
        content = batch.read_bytes()
        batch.write_bytes(content[:100] if damage == "truncated" else content[::-1])
        (folder / "cifar-10-python.tar.gz").unlink()
    with pytest.raises(InputError) as error:
        load_dataset("cifar10", folder, download=download)
    message = str(error.value)
    assert message.startswith(f"data_dir: no CIFAR-10 in {folder} (")
    assert "\n" not in message
    assert "put cifar-10-python.tar.gz" in message
    assert "train.py demo" in message
    if damage == "missing":
        assert not folder.exists()


def damaged(path, how):
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[:-1]
    elif how == "a record short":
        content = content[: -data.RECORD_BYTES]
    elif how == "cifar100":  # two label bytes a record
        content += bytes(data.IMAGES_PER_FILE)
    elif how == "empty":
        content = b""
    elif how == "label":
        content[5 * data.RECORD_BYTES] = 10
    path.write_bytes(content)


@pytest.mark.parametrize(
    "how", ["truncated", "a record short", "cifar100", "empty", "label", "missing"]
)
def test_damaged_binary_file_is_refused_by_name(tiny_cifar10, how):
    _, folder = tiny_cifar10
    path = folder / data.BINARY_FOLDER / "data_batch_4.bin"
    path.unlink() if how == "missing" else damaged(path, how)
    with pytest.raises(InputError, match=r"^data_dir: .*data_batch_4\.bin") as error:
        load_dataset("cifar10", folder)
    assert "unpack" in str(error.value)
    if how == "label":
        assert "record 5: label 10" in str(error.value)


def test_unknown_dataset_is_refused():
    with pytest.raises(InputError, match="dataset: 'mnist' is not one of cifar10, digits"):
        load_dataset("mnist")
