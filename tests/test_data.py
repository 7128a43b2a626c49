import errno
import hashlib
import io
import os
import pickle
import shutil
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Bomb, make_pictures
from PIL import Image
from torchvision.transforms import v2

import augment
import data
from config import PRESETS, Config
from data import Split, epoch_order, load_dataset, train_batches
from engine.pictures import list_files, read_picture
from utils import InputError, derive_seed, generator

DIGITS = PRESETS["demo"]
CIFAR10 = data.RELEASES["cifar10"]
PLAIN = Config(crop_padding=0, rotation_degrees=0.0, flip="none")


def cifar10(folder, **options):
    """CIFAR-10, or CIFAR-100, in a folder, if it is there."""
    names = ("dataset", "val_size", "download")
    changes = {name: options.pop(name) for name in names if name in options}
    return load_dataset(Config(data_dir=str(folder), **{"download": False} | changes), **options)


# ---------------------------------------------------------------- digits, validation split


def test_digits_are_all_there_stratified_and_readable():
    digits = load_dataset(DIGITS)
    assert (len(digits.train), len(digits.val), len(digits.test)) == (1438, 0, 359)
    shares = digits.test.labels.bincount() / (digits.train.labels.bincount() * 1.0)
    assert (shares - 0.25).abs().max() < 0.01
    assert digits.train.images.shape == (1438, 3, 32, 32)
    assert digits.train.images.dtype == torch.uint8
    assert (digits.train.images.min(), digits.train.images.max()) == (0, 255)


def test_validation_split_is_stratified_disjoint_and_the_same_for_everyone():
    digits = load_dataset(DIGITS)
    split = load_dataset(replace(DIGITS, val_size=300))
    assert (len(split.train), len(split.val), len(split.test)) == (1138, 300, 359)
    together = torch.cat([split.train.images, split.val.images]).flatten(1)
    assert torch.equal(together.unique(dim=0), digits.train.images.flatten(1).unique(dim=0))
    shares = split.val.labels.bincount() / digits.train.labels.bincount()
    assert (shares - 300 / 1438).abs().max() < 0.01
    assert torch.equal(split.val.images, load_dataset(replace(DIGITS, val_size=300)).val.images)
    assert split.fingerprint == digits.fingerprint


def test_fewer_training_images_are_stratified_and_leave_the_other_splits_alone():
    whole = load_dataset(replace(DIGITS, val_size=300))
    few = load_dataset(replace(DIGITS, val_size=300, train_size=400))
    assert torch.equal(few.val.images, whole.val.images)
    assert torch.equal(few.test.images, whole.test.images)
    assert len(few.train) == 400
    pool = {image.numpy().tobytes() for image in whole.train.images}
    assert {image.numpy().tobytes() for image in few.train.images} <= pool
    shares = few.train.labels.bincount() / whole.train.labels.bincount()
    assert (shares - 400 / 1138).abs().max() < 0.01
    assert load_dataset(replace(DIGITS, train_size=1438)).train.images.shape[0] == 1438


@pytest.mark.parametrize("size", [1, 9, 1429, 5000])
def test_validation_split_that_cannot_be_stratified_is_refused(size):
    with pytest.raises(InputError, match=f"val_size: {size} .* use 0, or 10 to 1,428"):
        load_dataset(replace(DIGITS, val_size=size))


def test_what_saved_runs_and_released_networks_rely_on_stays_as_it_was():
    """Or a resumed run sees other batches, or trains on the images that it is validated on."""
    numbers = torch.arange(40)
    pixels = numbers.to(torch.uint8)[:, None, None, None].repeat(1, 3, 32, 32)
    split = Split(pixels, numbers % 4)
    assert derive_seed("order", 0, 1) == 2164609937
    val = data.stratified(split, 8)[1].images[:, 0, 0, 0]
    assert val.tolist() == [0, 15, 17, 19, 20, 29, 30, 38]
    assert data.fingerprint(split).startswith("2ee14213f859aad5f1adc4fb")


def test_what_is_drawn_for_an_epoch_stays_as_it_was():
    """Or a resumed run sees other batches, and a teacher's kept answers are to other images."""
    config = replace(PRESETS["best"], rotation_degrees=5.0, mixing=1.0, seed=3)
    order = epoch_order(config, 4, 2)
    assert order.tolist() == [0, 3, 2, 1]
    shift, angle, flip, corner = augment.draw(config, order, 2)
    assert shift.tolist() == [[-3, 2], [-1, 0], [-2, -3], [2, -3]]
    assert angle.tolist() == pytest.approx([-2.037917, 4.246255, 2.497061, 2.349140], abs=1e-6)
    assert flip.tolist() == [True, False, False, False]
    assert corner.tolist() == [[15, 0], [20, -1], [5, 1], [3, 23]]
    pair, chance, side = augment.draw_pairs(4, 3, 2)
    assert pair[:2].tolist() == [20, 4]
    assert chance[0].tolist() == pytest.approx([0.776389, 0.871048], abs=1e-6)
    assert side[0].tolist() == pytest.approx([0.736657, 0.292235], abs=1e-6)
    operation, level, side = augment.draw_trivial(4, 3, 2)
    assert (operation[:2].tolist(), level[:2].tolist()) == ([8, 11], [5, 0])
    assert side[:2].tolist() == pytest.approx([0.956298, 0.755199], abs=1e-6)
    mixed = [augment.mix(config, torch.zeros(2, 3, 32, 32), torch.eye(2), 2, n) for n in range(4)]
    shares = [targets[0, 1].item() for _, targets in mixed]
    assert shares == pytest.approx([0.287109, 0.222656, 0.380859, 0.566406], abs=1e-6)


# ---------------------------------------------------------------- CIFAR-10


def test_binary_layout_is_read_whole_and_a_foreign_copy_is_noted(cifar10_bin, capsys):
    dataset = cifar10(cifar10_bin)
    assert (len(dataset.train), len(dataset.test)) == (50_000, 10_000)
    record = np.fromfile(cifar10_bin / CIFAR10.binary_folder / "data_batch_3.bin", np.uint8)
    record = record.reshape(-1, 3073)[1234]
    assert dataset.train.labels[21_234] == record[0]
    assert torch.equal(dataset.train.images[21_234].flatten(), torch.tensor(record[1:]))
    assert dataset.unofficial == tuple(CIFAR10.binary_files)
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert "6 of 6 files differ from the official" in warning


@pytest.fixture
def tiny_cifar10(monkeypatch, tmp_path):
    """20 images a file, known to torchvision by their MD5, in both layouts."""
    return make_release("cifar10", monkeypatch, tmp_path)


def make_release(name, monkeypatch, tmp_path):
    """Write a tiny release, which becomes the official one; returns the folders of its layouts."""
    release = data.RELEASES[name]
    archive, binary = tmp_path / "archive", tmp_path / "binary"
    python_folder, binary_folder = archive / release.python_folder, binary / release.binary_folder
    python_folder.mkdir(parents=True)
    binary_folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    md5, label = {}, release.label_bytes - 1
    for file in release.binary_files:
        records = rng.integers(0, 256, (20, release.record_bytes), dtype=np.uint8)
        records[:, label] %= len(data.FACTS[name][0])
        records.tofile(binary_folder / file)
        batch = {
            "data": records[:, label + 1 :],
            release.python_labels: records[:, label].tolist(),
        }
        # The flags are numbers, as in the official files: NumPy 2.4.0 to 2.4.4 warn about them.
        content = pickle.dumps(batch, 2).replace(b"\x89\x88\x87", b"K\x00K\x01\x87", 1)
        (python_folder / file.removesuffix(".bin")).write_bytes(content)
        md5[file.removesuffix(".bin")] = hashlib.md5(content).hexdigest()
    *train, test = md5.items()
    official = release.torchvision
    monkeypatch.setattr(official, "train_list", train)
    monkeypatch.setattr(official, "test_list", [test])
    monkeypatch.setattr(official, "tgz_md5", pack(python_folder, archive / official.filename))
    monkeypatch.setattr(official, "url", f"http://127.0.0.1:9/{official.filename}")  # refuses
    change(
        name,
        monkeypatch,
        binary_md5=pack(binary_folder, binary / release.binary_archive),
        binary_files=dict.fromkeys(release.binary_files, (20, "another")),
    )
    return archive, binary


def change(name, monkeypatch, **fields):
    """Change what is known of a release."""
    monkeypatch.setitem(data.RELEASES, name, replace(data.RELEASES[name], **fields))


def pack(folder, archive):
    """Write an archive of `folder`; returns its MD5."""
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    return hashlib.md5(archive.read_bytes()).hexdigest()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_archive_and_binary_layout_are_the_same_data(name, monkeypatch, tmp_path):
    layouts = make_release(name, monkeypatch, tmp_path)
    archive, binary = (cifar10(folder, dataset=name) for folder in layouts)
    assert archive.class_names == data.class_names_of(Config(dataset=name))
    assert archive.train.labels.max() > len(archive.class_names) // 2
    assert torch.equal(archive.train.images, binary.train.images)
    assert torch.equal(archive.test.labels, binary.test.labels)
    assert archive.fingerprint == binary.fingerprint
    changed = replace(binary.test, labels=(binary.test.labels + 1) % 10)
    assert data.fingerprint(binary.train, binary.test) == binary.fingerprint
    assert data.fingerprint(binary.train, changed) != binary.fingerprint


def test_cifar100_has_100_classes_and_its_own_lines(monkeypatch, tmp_path, capsys):
    _, folder = make_release("cifar100", monkeypatch, tmp_path)
    names = cifar10(folder, dataset="cifar100").class_names
    assert (len(set(names)), names) == (100, tuple(sorted(names)))
    assert "differ from the official CIFAR-100" in capsys.readouterr().err
    path = folder / "cifar-100-binary" / "train.bin"
    content = bytearray(path.read_bytes())
    content[3 * 3074 + 1] = 100  # the second of two labels
    path.write_bytes(content)
    next(folder.glob("*.tar.gz")).unlink()
    with pytest.raises(InputError, match=r"record 3: label 100 is not 0 to 99; unpack CIFAR-100's"):
        cifar10(folder, dataset="cifar100")
    with pytest.raises(InputError, match=r"no CIFAR-100 in x; .*put cifar-100-python\.tar\.gz"):
        cifar10("x", dataset="cifar100")


def test_a_tilde_is_the_home_folder_and_official_files_are_not_noted(
    tiny_cifar10, monkeypatch, capsys
):
    _, binary = tiny_cifar10
    files = [binary / CIFAR10.binary_folder / name for name in CIFAR10.binary_files]
    sha1 = {path.name: (20, hashlib.sha1(path.read_bytes()).hexdigest()) for path in files}
    change("cifar10", monkeypatch, binary_files=sha1)
    monkeypatch.setenv("HOME", str(binary))
    assert cifar10("~").unofficial == ()
    assert capsys.readouterr().err == ""


def test_without_test_images_the_rest_is_the_same_and_their_file_is_not_read(tiny_cifar10):
    archive, binary = tiny_cifar10
    whole = cifar10(binary, val_size=20)
    (binary / CIFAR10.binary_folder / "test_batch.bin").unlink()
    for folder in (archive, binary):
        found = cifar10(folder, val_size=20, test=False)
        assert (len(found.train), len(found.val), len(found.test)) == (80, 20, 0)
        assert torch.equal(found.val.images, whole.val.images)
        assert found.fingerprint != whole.fingerprint  # which is of all images that were read
    digits = load_dataset(DIGITS, test=False)
    assert len(digits.test) == 0
    assert torch.equal(digits.train.labels, load_dataset(DIGITS).train.labels)


LAYOUTS = pytest.mark.parametrize(
    ("layout", "name"),
    [(0, CIFAR10.python_folder), (1, CIFAR10.binary_folder)],
    ids=["python", "binary"],
)


@LAYOUTS
def test_archive_that_was_put_there_is_unpacked_without_a_download(tiny_cifar10, layout, name):
    folder = tiny_cifar10[layout]
    for file in (folder / name).iterdir():
        file.unlink()
    assert len(cifar10(folder / name).train) == 100  # the archive is beside this folder
    assert len(list((folder / name).glob("data_batch_?*"))) == 5


@LAYOUTS
@pytest.mark.parametrize("place", ["inner folder", "renamed folder", "unpacked twice"])
def test_unpacked_files_are_found_without_their_archive(tiny_cifar10, layout, name, place):
    folder = tiny_cifar10[layout]
    for archive in folder.glob("*.tar.gz"):
        archive.unlink()
    if place == "inner folder":
        folder = folder / name
    elif place == "renamed folder":
        folder = (folder / name).rename(folder / "mine")
    else:
        (folder / name).rename(folder / "inner")
        (folder / name).mkdir()
        (folder / "inner").rename(folder / name / name)
    assert len(cifar10(folder).train) == 100


@pytest.mark.parametrize("download", [False, True])
@pytest.mark.parametrize("damage", ["nothing there", "archive", "truncated", "hostile", "missing"])
def test_without_sound_files_one_line_says_what_to_do(
    tiny_cifar10, tmp_path, capsys, download, damage
):
    folder, _ = tiny_cifar10
    archive, batch = (
        folder / name for name in ("cifar-10-python.tar.gz", "cifar-10-batches-py/data_batch_2")
    )
    content = {"hostile": pickle.dumps(Bomb()), "truncated": batch.read_bytes()[:100]}
    problem = f"{batch} is damaged (its MD5 is not the official one)"
    if damage == "archive":
        archive.write_bytes(archive.read_bytes()[:-1])
        problem = f"{archive} is damaged (its MD5 is not the official one)"
    else:
        archive.unlink()
    if damage in content:
        batch.write_bytes(content[damage])
    else:
        batch.unlink()
    if damage == "missing":
        problem = f"{batch} is missing"
    if damage == "nothing there":
        folder = tmp_path / "nothing here"
        problem = f"no CIFAR-10 in {folder}"
    with pytest.raises(InputError) as error:
        cifar10(folder, download=download)
    message = str(error.value)
    assert message.startswith(f"data_dir: {problem}")
    assert "\n" not in message
    assert ("and the download failed (" in message) == download
    assert "put cifar-10-python.tar.gz" in message
    assert "train.py demo" in message
    assert not Path("bomb_went_off").exists()
    assert archive.exists() == (damage == "archive")
    warning = capsys.readouterr().err
    assert ("downloading CIFAR-10 again" in warning) == (download and damage != "nothing there")
    if damage == "nothing there":
        assert not folder.exists()


@pytest.mark.parametrize("place", ["photos", "photos/train"])
def test_cifar_is_not_downloaded_into_folders_of_pictures(place):
    make_pictures(place, cat=2, dog=2)
    with pytest.raises(
        InputError, match=r"^data_dir: photos holds no CIFAR-10, but .* --dataset f"
    ):
        cifar10("photos", download=True)
    make_pictures("photos/more/inner", bee=1)
    with pytest.raises(InputError, match=r"^data_dir: no CIFAR-10 in photos; allow its download"):
        cifar10("photos")


def test_of_two_processes_one_downloads_and_the_other_waits(tiny_cifar10, monkeypatch, capsys):
    begun, calls = threading.Event(), []

    def slow(release, data_dir, download):
        calls.append(data_dir)
        begun.set()
        time.sleep(0.5)
        shutil.copytree(tiny_cifar10[0], data_dir, dirs_exist_ok=True)

    monkeypatch.setattr(data, "unpack_archive", slow)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(cifar10, Path("new"))
        begun.wait()
        second = cifar10(Path("new"))
    assert second.fingerprint == first.result().fingerprint
    assert len(calls) == 1
    assert "waiting for another process that downloads to new" in capsys.readouterr().out
    assert not Path("new/download.lock").exists()


@pytest.mark.parametrize("download", [False, True])
def test_folder_that_cannot_be_looked_into_is_one_line(download):
    name = "long" * 100
    with pytest.raises(InputError, match=f"^data_dir: .*{name}"):
        cifar10(name, download=download)


def damaged(path, how):
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[:-1]
    elif how == "a record short":
        content = content[: -CIFAR10.record_bytes]
    elif how == "cifar100":  # two label bytes a record
        content += bytes(20)
    elif how == "empty":
        content = b""
    elif how == "label":
        content[5 * CIFAR10.record_bytes] = 10
    path.write_bytes(content)


@pytest.mark.parametrize(
    "how", ["truncated", "a record short", "cifar100", "empty", "label", "missing"]
)
def test_damaged_binary_file_is_refused_by_name_or_unpacked_again(tiny_cifar10, how):
    """A killed unpacking leaves one, too."""
    _, folder = tiny_cifar10
    archive = folder / CIFAR10.binary_archive
    path = folder / CIFAR10.binary_folder / "data_batch_4.bin"
    path.unlink() if how == "missing" else damaged(path, how)
    beside = archive.rename("elsewhere")
    with pytest.raises(InputError, match=r"^data_dir: .*data_batch_4\.bin") as error:
        cifar10(folder)
    assert "unpack" in str(error.value)
    if how == "label":
        assert "record 5: label 10" in str(error.value)
    beside.rename(archive)
    assert len(cifar10(folder).train) == 100


def test_unknown_dataset_is_refused():
    with pytest.raises(
        InputError, match="dataset: 'mnist' is not one of cifar10, cifar100, digits, folder"
    ):
        load_dataset(replace(DIGITS, dataset="mnist"))


# ---------------------------------------------------------------- pictures of one's own


def folder(path="photos", **options):
    """The class folders in a folder."""
    changes = {name: options.pop(name) for name in ("val_size", "train_size") if name in options}
    return load_dataset(Config(dataset="folder", data_dir=str(path), **changes), **options)


def as_bytes(images):
    return sorted(image.numpy().tobytes() for image in images)


def test_class_folders_are_read_as_predict_reads_them_and_a_fifth_is_for_the_test(monkeypatch):
    monkeypatch.setattr("engine.folders.CHUNK", 3)  # as with more than 500 pictures
    monkeypatch.setattr(data, "EVAL_BATCH", 4)
    make_pictures("photos", size=(50, 70), dog=10, cat=4)
    make_pictures("photos/cat", suffix="jpg", **{"deep/er": 2, ".hidden": 2})
    found = folder()
    assert found.class_names == ("cat", "dog")
    assert data.class_names_of(Config(dataset="folder", data_dir="photos")) == ("cat", "dog")
    assert found.train.labels.bincount().tolist() == [5, 8]
    assert found.test.labels.bincount().tolist() == [1, 2]
    for label, name in enumerate(found.class_names):
        seen = [s.images[s.labels == label] for s in (found.train, found.test)]
        paths = [path for path in Path("photos", name).rglob("*.*g") if "hidden" not in str(path)]
        expected = [read_picture(io.BytesIO(path.read_bytes())) for path in paths]
        assert as_bytes(torch.cat(seen)) == as_bytes(expected)
    pixels = found.train.images / 255
    assert found.mean == pytest.approx(pixels.mean(dim=(0, 2, 3)).tolist(), abs=1e-4)
    assert found.std == pytest.approx(pixels.std(dim=(0, 2, 3)).tolist(), abs=1e-3)
    again, without = folder(), folder(test=False)
    assert again.fingerprint == found.fingerprint
    assert torch.equal(again.test.images, found.test.images)
    assert torch.equal(without.train.images, found.train.images)
    assert len(without.test) == 0


def test_new_pictures_move_few_others_into_the_test():
    make_pictures("photos", cat=50, dog=50)
    before = folder()
    make_pictures("new", bird=10)
    for path in Path("new/bird").iterdir():
        path.rename(Path("photos/cat", f"new-{path.name}"))
    after = folder()
    dogs = [as_bytes(split.images[split.labels == 1]) for split in (before.test, after.test)]
    assert dogs[0] == dogs[1]
    moved = set(as_bytes(before.train.images)) & set(as_bytes(after.test.images))
    assert len(moved) <= 2


@pytest.mark.parametrize("tested", ["test", "val"])
def test_train_and_test_folders_stay_apart(tested, capsys):
    make_pictures("photos/train", cat=3, dog=4)
    make_pictures(f"photos/{tested}", cat=1, dog=2)
    found = folder()
    assert (len(found.train), len(found.test)) == (7, 3)
    for split in (found.train, found.test):  # so the first ones stand for all: export.py --limit
        assert split.labels.tolist() != split.labels.sort().values.tolist()
    assert folder(test=False).mean == found.mean
    assert len(folder(test=False).test) == 0
    assert len(folder("photos/train").test) == 2
    assert capsys.readouterr().err == ""
    make_pictures("photos/val", cat=1, dog=2)
    make_pictures("photos/test", cat=3, dog=2)
    assert len(folder().test) == 5
    assert "not used beside test" in capsys.readouterr().err
    make_pictures("photos/Validation", cat=1, dog=1)
    assert len(folder().test) == 5
    assert capsys.readouterr().err.count("not used beside test") == 2
    make_pictures("vehicles", train=3, plane=3)
    assert folder("vehicles").class_names == ("plane", "train")


def test_folder_that_cannot_be_read_is_left_out_with_a_warning(monkeypatch, capsys):
    make_pictures("photos/cat", **{"private": 1, ".": 2})
    iterdir = Path.iterdir

    def refuse(path):
        if path.name == "private":
            raise PermissionError(errno.EACCES, "Permission denied")
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert len(list_files(Path("photos/cat"))[0]) == 2
    warning = "warning: photos/cat/private: cannot be read (Permission denied); left out\n"
    assert capsys.readouterr().err == warning


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
def test_links_are_followed_but_not_in_circles():
    make_pictures("photos", cat=1)
    make_pictures("elsewhere", **{".hidden": 1, ".": 1})
    for name, to in {"linked": "elsewhere", "back": "photos", "gone.png": "nowhere"}.items():
        Path("photos/cat", name).symlink_to(Path(to).absolute())
    os.mkfifo("photos/cat/pipe.png")
    found, others = list_files(Path("photos/cat"))
    assert [path.as_posix() for path in found] == [
        f"photos/cat/{name}" for name in ("0.png", "gone.png", "linked/0.png")
    ]
    assert others == []


def test_files_that_are_no_pictures_are_left_out_with_a_line_each_and_a_count(capsys):
    make_pictures("photos", cat=5, dog=5)
    Path("photos/cat/notes.txt").write_text("of cats")
    Path("photos/cat/broken.jpg").write_bytes(b"no picture")
    Path("photos/cat/1.png").write_bytes(Path("photos/cat/1.png").read_bytes()[:300])
    Path("photos/README.md").write_text("beside the classes")
    found = folder()
    labels = torch.cat([found.train.labels, found.test.labels])
    images = torch.cat([found.train.images, found.test.images])
    assert labels.bincount().tolist() == [4, 5]
    strongest = images.float().mean(dim=(2, 3)).argmax(1)  # red of a cat, green of a dog
    assert torch.equal(labels, strongest)
    *lines, last = sorted(capsys.readouterr().err.splitlines(), key=lambda line: "data_dir" in line)
    assert len(lines) == 3
    for line, name in zip(
        sorted(lines), ["cat/1.png", "cat/broken.jpg", "cat/notes.txt"], strict=True
    ):
        assert line.startswith(f"warning: {Path('photos', name)}: ")
        assert line.endswith("; left out")
    assert last == "warning: data_dir: 3 of 12 files are no pictures, and are left out"
    for i in range(1, 5):
        Path(f"photos/dog/{i}.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"^data_dir: .*dog holds one picture alone"):
        folder()


def test_pictures_beside_the_class_folders_are_left_out_with_a_warning(capsys):
    make_pictures("photos/train", **{"cat": 3, "dog": 3, ".": 2})
    make_pictures("photos/test", **{"cat": 1, "dog": 1, ".": 1})
    Path("photos/train/notes.txt").write_text("no picture")
    assert len(folder().train) == 6
    assert capsys.readouterr().err.splitlines() == [
        "warning: photos/train: 2 pictures are beside the class folders, in none (0.png); left out",
        "warning: photos/test: 1 picture is beside the class folders, in none (0.png); left out",
    ]


def test_other_pictures_than_those_of_the_training_are_reported(capsys):
    make_pictures("photos", cat=5, dog=5)
    trained = {"dataset": "folder", "class_names": ["cat", "dog"]}
    trained["data_fingerprint"] = folder().fingerprint
    data.load_data_of(Path("a.safetensors"), trained, "photos", False)
    assert not capsys.readouterr().err
    make_pictures("photos", cat=6, dog=5)
    data.load_data_of(Path("a.safetensors"), trained, "photos", False)
    assert "the pictures are not those that a.safetensors was trained" in capsys.readouterr().err


def test_validation_images_of_a_class_of_one_are_refused():
    make_pictures("photos", cat=9, dog=2)
    with pytest.raises(InputError, match=r"^val_size: 2, .* one training image alone of dog"):
        folder(val_size=2)
    make_pictures("photos", cat=9, dog=9)
    assert len(folder(val_size=2).val) == 2


@pytest.mark.parametrize(
    ("sizes", "remedy"), [({"val_size": 30}, "a smaller one"), ({"train_size": 4}, "a larger one")]
)
def test_no_class_is_left_without_images_to_train_on(sizes, remedy):
    make_pictures("photos", cat=40, dog=3)
    ((name, size),) = sizes.items()
    words = f"^{name}: {size} of 34 training images leaves none of dog to train on; use {remedy}$"
    with pytest.raises(InputError, match=words):
        folder(**sizes)


def test_digits_in_class_folders_are_the_digits():
    digits = load_dataset(DIGITS)
    images = torch.cat([digits.train.images, digits.test.images])
    labels = torch.cat([digits.train.labels, digits.test.labels])
    for i in range(0, len(labels), 20):
        path = Path("photos", str(int(labels[i])), f"{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i].permute(1, 2, 0).numpy()).save(path)
    found = folder()
    assert found.class_names == digits.class_names
    assert as_bytes([*found.train.images, *found.test.images]) == as_bytes(images[::20])


def test_fingerprint_depends_on_each_of_1000_classes():
    split = Split(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([300, 5]))
    other = replace(split, labels=torch.tensor([300 - 256, 5]))
    assert data.fingerprint(split) != data.fingerprint(other)


# ---------------------------------------------------------------- batches


IMAGES = replace(PLAIN, num_classes=100)  # a class for each image


def labeled_by_position(num_images):
    """A data set in which every image shows its own number, which is also its label."""
    numbers = torch.arange(num_images)
    pixels = numbers.to(torch.uint8)[:, None, None, None].expand(-1, 3, 32, 32)
    split = Split(pixels, numbers)
    return data.Dataset("toy", ("a",), (0, 0, 0), (1 / 255,) * 3, split, split[:0], split, "")


@pytest.mark.parametrize(
    ("policy", "drawn"),
    [("auto_augment", augment.draw_pairs), ("trivial_augment", augment.draw_trivial)],
)
def test_batches_hold_what_the_policy_made_of_the_whole_epochs_images(policy, drawn):
    toy, config = labeled_by_position(50), replace(IMAGES, seed=5, batch_size=40, **{policy: True})
    for epoch in (1, 2):
        changed = getattr(augment, policy)(toy.train.images, *drawn(50, 5, epoch))
        assert not torch.equal(changed, toy.train.images)
        for images, targets, _ in train_batches(toy, config, epoch):
            assert torch.equal(images, toy.normalize(changed[targets.argmax(1)] / 255))


def test_alternating_flips_of_the_batches_show_every_image_both_ways():
    """Of images whose left half alone is white."""
    toy, flipped = labeled_by_position(100), []
    white_left = torch.zeros(100, 3, 32, 32, dtype=torch.uint8)
    white_left[..., :16] = 255
    toy = replace(toy, train=replace(toy.train, images=white_left))
    for epoch in (1, 2, 3):
        by_image = torch.zeros(100, dtype=torch.bool)
        config = replace(IMAGES, flip="alternating", batch_size=40)
        for images, targets, _ in train_batches(toy, config, epoch):
            by_image[targets.argmax(1)] = images[:, 0, 0, 0] == 0
        flipped.append(by_image)
    assert 20 < flipped[0].sum() < 80
    assert torch.equal(flipped[1], ~flipped[0])
    assert torch.equal(flipped[2], flipped[0])


def test_an_epoch_visits_every_image_once_in_an_order_of_its_own():
    toy, orders = labeled_by_position(100), []
    for seed, epoch in ((0, 1), (0, 2), (1, 1)):
        batches = list(train_batches(toy, replace(IMAGES, seed=seed, batch_size=32), epoch))
        assert [size for _, _, size in batches] == [32, 32, 32, 4]
        labels = torch.cat([targets.argmax(1) for _, targets, _ in batches])
        shown = torch.cat([images[:, 0, 0, 0] for images, _, _ in batches])
        torch.testing.assert_close(shown, labels.float())
        assert sorted(labels.tolist()) == list(range(100))
        orders.append(labels.tolist())
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]


@pytest.mark.parametrize("mixing", [0.0, 1.0])
def test_batches_are_a_pure_function_of_seed_epoch_and_step(mixing):
    toy = labeled_by_position(100)
    config = Config(batch_size=40, seed=3, rotation_degrees=30.0, mixing=mixing, num_classes=100)
    first = list(train_batches(toy, config, epoch=7))
    torch.manual_seed(123)
    again = list(train_batches(toy, config, epoch=7))
    rest = list(train_batches(toy, config, epoch=7, first_step=1))
    for one, other in zip([*first, *first[1:]], [*again, *rest], strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
    assert not torch.equal(first[0][0], next(train_batches(toy, config, epoch=8))[0])
    assert list(train_batches(toy, config, epoch=7, first_step=3)) == []  # resumed at its end


def test_targets_are_the_smoothed_labels():
    toy = labeled_by_position(10)
    config = replace(PLAIN, label_smoothing=0.2, batch_size=10)
    images, targets, _ = next(train_batches(toy, config, 1))
    expected = torch.full((10, 10), 0.02)
    expected[range(10), images[:, 0, 0, 0].round().long()] = 0.82
    torch.testing.assert_close(targets, expected)


@pytest.mark.parametrize("size", [32, 24])
def test_targets_of_mixed_batches_tell_how_much_of_each_image_is_seen(size):
    """Of images that show their own number: the mean pixel is the target's mean number."""
    toy, numbers, mixed = labeled_by_position(100), torch.arange(100.0), []
    config = replace(IMAGES, mixing=1.0, label_smoothing=0.1, batch_size=10)
    config = replace(config, small_fraction=1.0, small_size=size)
    for images, targets, _ in train_batches(toy, config, 1):
        assert images.shape[-1] == size
        shares = (targets - 0.1 / 100) / 0.9
        torch.testing.assert_close(images.mean((1, 2, 3)), shares @ numbers, atol=0.01, rtol=1e-4)
        mixed.append((targets > 0.01).sum(1) == 2)
    assert torch.cat(mixed).float().mean() > 0.3


def test_rehearsal_ends_after_so_many_steps():
    config = replace(IMAGES, batch_size=32, max_steps_per_epoch=2)
    assert [n for *_, n in train_batches(labeled_by_position(100), config, 1)] == [32, 32]


def test_every_image_is_augmented_by_draws_of_its_own():
    """One picture, a hundred times: in no batch, epoch or seed is it augmented as in another."""
    picture = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=generator(0))
    toy = labeled_by_position(100)
    toy = replace(toy, train=replace(toy.train, images=picture.expand(100, -1, -1, -1)))
    strong = Config(rotation_degrees=180.0, batch_size=25, num_classes=100)
    views = set()
    for seed in range(3):
        for epoch in range(4):
            for images, _, _ in train_batches(toy, replace(strong, seed=seed), epoch):
                views |= {image.numpy().tobytes() for image in images}
    assert len(views) > 0.99 * 3 * 4 * 100


def test_small_batches_are_the_center_of_the_whole_ones_or_what_pillow_makes_of_them():
    toy = labeled_by_position(100)
    config = Config(small_fraction=0.5, padding_mode="reflect", cutout_size=8, epochs=2)
    config = replace(config, num_classes=100)
    whole, labels, _ = next(train_batches(toy, replace(config, small_fraction=0.0), 1))
    cropped, same_labels, _ = next(train_batches(toy, config, 1))
    assert torch.equal(cropped, whole[:, :, 2:30, 2:30])
    assert torch.equal(labels, same_labels)
    assert next(train_batches(toy, config, 2))[0].shape[-1] == 32
    config = replace(config, small_images="scale", small_size=24)
    scaled, same_labels, _ = next(train_batches(toy, config, 1))
    assert torch.equal(labels, same_labels)
    for image, small in zip(whole[:20, 0], scaled[:20, 0], strict=True):
        expected = Image.fromarray(image.numpy()).resize((24, 24), Image.Resampling.BILINEAR)
        assert np.allclose(small, np.asarray(expected), atol=1e-4)


def test_images_are_normalized_by_channel():
    images = torch.randint(0, 256, (11, 3, 32, 32), dtype=torch.uint8, generator=generator(0))
    normalize = data.Normalize((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    expected = v2.functional.normalize(images / 255, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    torch.testing.assert_close(normalize(images / 255), expected)
    assert normalize.state_dict() == {}  # nothing that a checkpoint would have to hold
    digits = load_dataset(DIGITS)
    pixels = digits.normalize(digits.train.images / 255)
    assert pixels.mean().abs() < 1e-3
    assert (pixels.std() - 1).abs() < 1e-3
