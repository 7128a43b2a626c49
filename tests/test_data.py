import hashlib
import pickle
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision

import data
from data import load_dataset
from utils import InputError

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


def test_a_tilde_is_the_home_folder(cifar10_bin, monkeypatch):
    monkeypatch.setenv("HOME", str(cifar10_bin))
    assert len(data.load_dataset("cifar10", "~", download=False).test) == 10_000


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
    assert data.fingerprints(binary.train, binary.test)[-1] == binary.fingerprint
    assert data.fingerprints(binary.train, changed)[-1] != binary.fingerprint


def test_without_test_images_the_rest_is_the_same_and_their_file_is_not_read(tiny_cifar10):
    archive, binary = tiny_cifar10
    whole = load_dataset("cifar10", binary, val_size=20)
    (binary / data.BINARY_FOLDER / "test_batch.bin").unlink()
    for folder in (archive, binary):
        found = load_dataset("cifar10", folder, val_size=20, test=False)
        assert (len(found.train), len(found.val), len(found.test)) == (80, 20, 0)
        assert torch.equal(found.val.images, whole.val.images)
        assert found.fingerprint != whole.fingerprint
        assert whole.is_known_as(found.fingerprint)  # the same images, as far as that run read any
        assert not found.is_known_as(whole.fingerprint)
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
