"""A network taught by another one: its targets, the answers that are kept, resuming."""

import functools
import hashlib
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY
from torch.nn import functional as F

from augment import apply_policy
from config import check_config
from data import Normalize, epoch_order, load_dataset, train_batches
from engine.checkpoint import load_model, read_state, save_model
from engine.start import NamedNetwork
from engine.teacher import Teacher
from learner import Learner
from train import train as train_on
from train import train_seeds
from utils import CHECKPOINTS, InputError, StoppedError

CPU = torch.device("cpu")
ON_DIGITS = replace(TINY, name="student", teacher="digits.safetensors", train_size=200)
# The same images under the name of CIFAR-10, since digits may not be moved.
IMAGES = replace(load_dataset(ON_DIGITS), name="cifar10")
VIEWED = replace(
    ON_DIGITS,
    teacher="teacher.safetensors",
    dataset="cifar10",
    trivial_augment=True,
    crop_padding=4,
    flip="alternating",
)
ROUNDING = 5e-3  # of probabilities, if a logit of 16 to 32 is another of float16's numbers
train = functools.partial(train_on, data=IMAGES)


@pytest.fixture(autouse=True)
def teacher_files(demo):
    shutil.copy(demo[0] / "model.safetensors", "digits.safetensors")
    shutil.copy("digits.safetensors", "teacher.safetensors")
    rewritten(dataset="cifar10")


def nothing():
    """Called between two batches of answers."""


def weights(name):
    model, _ = load_model(Path("checkpoints", name, "model.safetensors"))
    return model.state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def teacher_of(config, data=IMAGES):
    teacher = Teacher(config)
    teacher.prepare(data, CPU)
    return teacher


def answer_files():
    return sorted(Path("data/answers").rglob("*.safetensors"))


def targets_of(config, epoch):
    """The images and targets that a student sees in an epoch, in the order of the training set."""
    config = replace(config, max_steps_per_epoch=0)
    answers = teacher_of(config).answers(epoch, nothing)
    images, targets, _ = zip(*train_batches(IMAGES, config, epoch, answers=answers), strict=True)
    place = epoch_order(config, len(IMAGES.train), epoch).argsort()
    return torch.cat(images)[place], torch.cat(targets)[place]


def probabilities(images):
    """Of the teacher, to images with the normalization of IMAGES."""
    network, info = load_model("teacher.safetensors")
    pixels = images * IMAGES.normalize.std + IMAGES.normalize.mean
    images = Normalize(info["mean"], info["std"])(pixels)
    with torch.no_grad():
        return network(images).half().float().softmax(1)


@pytest.fixture(params=["the same", "another"])
def normalization(request):
    """Of the teacher."""
    if request.param == "another":
        rewritten(mean=[0.3, 0.4, 0.5], std=[0.4, 0.2, 0.3])


@pytest.mark.usefixtures("normalization")
def test_a_teacher_that_answers_in_every_epoch_sees_what_the_student_sees():
    config = replace(VIEWED, rotation_degrees=10.0, cutout_size=8, bfloat16=False)
    for epoch in (1, 3):
        images, targets = targets_of(config, epoch)
        assert torch.allclose(targets, probabilities(images), atol=ROUNDING)
        assert targets.argmax(1).unique().numel() > 1


@pytest.mark.usefixtures("normalization")
def test_kept_answers_are_those_to_the_whole_views():
    """Not to the crop of some epoch, which no other epoch would show."""
    config = replace(VIEWED, teacher_views=2, bfloat16=False)
    for epoch, view in ((1, 1), (2, 2), (3, 1)):
        images, targets = targets_of(config, epoch)
        whole = apply_policy(config, IMAGES.train.images, view)
        expected = probabilities(IMAGES.normalize(whole / 255))
        assert torch.allclose(targets, expected, atol=ROUNDING)
        assert not torch.allclose(targets, probabilities(images), atol=0.1)


def test_a_training_learns_from_the_answers_to_the_views_that_it_shows():
    config = replace(VIEWED, teacher_views=2, epochs=2)
    rows, _ = train(config)
    teacher, learner = teacher_of(config), Learner(config, IMAGES, CPU)
    for epoch, row in enumerate(rows, start=1):
        loss, seen = 0.0, 0
        answers = teacher.answers(epoch, nothing)
        for images, targets, n in train_batches(IMAGES, config, epoch, answers=answers):
            loss += learner.step(images, targets, n)[0].item()
            seen += n
        assert row["train_loss"] == pytest.approx(loss / seen, rel=1e-5)
    _, info = load_model("checkpoints/student/model.safetensors")
    content = Path("teacher.safetensors").read_bytes()
    assert info["teacher_sha256"] == hashlib.sha256(content).hexdigest()


def test_teacher_sees_whole_images_where_the_student_sees_small_ones():
    small = replace(VIEWED, small_fraction=1.0, small_size=24, small_images="scale")
    answers = teacher_of(small).answers(1, nothing)
    images, targets, _ = next(train_batches(IMAGES, small, 1, answers=answers))
    whole, expected, _ = next(train_batches(IMAGES, VIEWED, 1, answers=answers))
    assert images.shape[-1] == 24
    assert torch.equal(images, F.interpolate(whole, (24, 24), mode="bilinear", antialias=True))
    assert torch.equal(targets, expected)


def test_views_repeat_in_another_order_and_moved_anew():
    config = replace(VIEWED, teacher_views=2)
    orders = [epoch_order(config, len(IMAGES.train), epoch) for epoch in (1, 3)]
    assert not torch.equal(*orders)
    still = {"crop_padding": 0, "flip": "none", "rotation_degrees": 0.0, "cutout_size": 0}
    first, second, third = (targets_of(replace(config, **still), epoch)[0] for epoch in (1, 2, 3))
    assert torch.equal(first, third)
    assert not torch.equal(first, second)
    whole = apply_policy(config, IMAGES.train.images, 1)
    assert torch.equal(first, IMAGES.normalize(whole / 255))
    for move in ({"crop_padding": 4}, {"rotation_degrees": 30.0}, {"cutout_size": 8}):
        moved = replace(config, **still | move)
        first, third = (targets_of(moved, epoch)[0] for epoch in (1, 3))
        assert (first != third).flatten(1).any(1).float().mean() > 0.8, move


def test_answers_are_computed_once_and_shared():
    config = replace(VIEWED, teacher_views=2)
    train(config)
    files = answer_files()
    assert [path.name for path in files] == ["0001.safetensors", "0002.safetensors"]
    written = [path.stat().st_mtime_ns for path in files]
    train(replace(config, name="wider", c1=9, small_fraction=1.0))
    assert [path.stat().st_mtime_ns for path in answer_files()] == written
    train(replace(config, name="other-views", seed=1, epochs=1))
    assert len(answer_files()) == 3


def test_the_time_of_an_epoch_includes_its_answers(monkeypatch):
    compute = Teacher.compute

    def slow(*args):
        time.sleep(0.5)
        return compute(*args)

    monkeypatch.setattr(Teacher, "compute", slow)
    rows, _ = train(replace(VIEWED, epochs=2, teacher_views=2))
    assert min(row["seconds"] for row in rows) > 0.5


def folder_of(data=IMAGES, **changes):
    """Where a run keeps its teacher's answers."""
    return teacher_of(replace(VIEWED, teacher_views=1, **changes), data).folder


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 1),
        ("val_size", 20),
        ("train_size", 20),
        ("auto_augment", True),
        ("trivial_augment", False),
    ],
)
def test_runs_with_other_views_share_no_answers(name, value):
    assert folder_of(**{name: value}) != folder_of()


def test_runs_of_another_teacher_or_other_data_share_no_answers():
    before = folder_of()
    assert folder_of(replace(IMAGES, fingerprint="another")) != before
    assert folder_of(bfloat16=False) != before
    rewritten(scale=2)
    assert folder_of() != before


def test_runs_share_answers_whatever_does_not_change_the_views():
    moved = {"crop_padding": 2, "padding_mode": "reflect", "rotation_degrees": 9.0, "flip": "none"}
    small = {"small_fraction": 0.5, "small_size": 24, "small_images": "scale", "cutout_size": 4}
    assert folder_of(**moved, **small, mixing=0.5, lr=0.5, c1=9, name="other") == folder_of()


def test_answers_about_the_users_own_pictures_are_kept_beside_the_runs():
    model, info = load_model("teacher.safetensors")
    del info["architecture"]
    save_model("own.safetensors", model, info | {"dataset": "folder"})
    own = replace(IMAGES, name="folder")
    config = replace(VIEWED, teacher="own.safetensors", teacher_views=1, data_dir="photos")
    assert teacher_of(config, own).folder.parent == CHECKPOINTS / "answers"


def test_damaged_answers_are_computed_again(capsys):
    config = replace(VIEWED, teacher_views=1)
    train(config)
    (path,) = answer_files()
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    train(replace(config, name="again"))
    assert "is damaged; computing its answers again" in capsys.readouterr().err
    assert path.read_bytes() == content
    assert same(weights("student"), weights("again"))


def test_answers_that_another_machine_lacks_are_computed_by_all(monkeypatch):
    """Or some processes would wait for sums to which the others add nothing."""
    teacher = teacher_of(replace(VIEWED, teacher_views=1))
    here = teacher.kept(1, nothing)
    monkeypatch.setattr("engine.teacher.all_reduce_max", lambda value: [1])
    batches = []
    there = teacher.kept(1, lambda: batches.append(1))
    assert batches
    assert torch.equal(there, here)


@pytest.mark.parametrize("views", [0, 2])
def test_a_stopped_run_goes_on_to_the_bit_also_without_kept_answers(views):
    config = replace(VIEWED, teacher_views=views, save_minutes=0.0)
    train(replace(config, name="whole"))

    class Kill(BaseException):
        """Ends a training as nothing that it catches does."""

    def kill_after_two_epochs(log):
        if len(log) == 2:
            raise Kill

    with pytest.raises(Kill):
        train(config, report=kill_after_two_epochs)
    shutil.rmtree("data", ignore_errors=True)
    train(replace(config, resume=True))
    assert same(weights("student"), weights("whole"))


def test_an_epoch_that_ended_is_kept_when_a_signal_ends_the_answers_for_the_next_one():
    with pytest.raises(StoppedError, match="after epoch 1, saved in"):
        train(
            replace(VIEWED, teacher_views=3),
            report=lambda log: os.kill(os.getpid(), signal.SIGTERM),
        )
    state = read_state(Path("checkpoints/student/last.pt"))
    assert (len(state["metrics"]["log"]), state["metrics"]["step"]) == (1, 0)


def test_taught_by_itself_a_network_has_no_gradient_but_of_weight_decay():
    """The cross entropy with one's own answers is least where one is."""
    config = replace(VIEWED, bfloat16=False)
    network, _ = load_model("teacher.safetensors")
    images, targets, _ = next(
        train_batches(IMAGES, config, 1, answers=teacher_of(config).answers(1, nothing))
    )
    F.cross_entropy(network(images), targets).backward()
    largest = max(p.grad.abs().max() for p in network.parameters())
    F.cross_entropy(network(images), targets.flip(0)).backward()
    assert largest < 1e-2 < max(p.grad.abs().max() for p in network.parameters())


def rewritten(scale=1.0, **changes):
    """The teacher's file, with its last layer scaled and other metadata."""
    network, info = load_model("teacher.safetensors")
    info.pop("architecture")
    network.linear.weight.data *= scale
    save_model("teacher.safetensors", network, info | changes)


@pytest.mark.parametrize("field", ["teacher", "init"])
def test_validation_images_that_the_network_was_trained_on_are_a_warning(field, capsys):
    def warned(name, val_size, network="digits.safetensors", **changes):
        config = replace(ON_DIGITS, **{"teacher": "", field: network}, c1=8, epochs=1)
        config = replace(config, name=name, val_size=val_size)
        train_on(config, replace(load_dataset(config), **changes))
        return f"{field}: {network} was trained on images that val" in capsys.readouterr().err

    assert warned("some-aside", 20)
    assert not warned("the-same-aside", 20, "some-aside")
    assert warned("others-aside", 40, "some-aside")
    assert not warned("none-aside", 0, "some-aside")
    assert warned("another-copy", 20, fingerprint="another")


def test_images_of_the_user_are_those_that_the_network_was_trained_on_or_others(capsys):
    """Of a data set that all have, every copy counts."""
    pictures = replace(load_dataset(replace(ON_DIGITS, val_size=20)), name="folder")
    network = NamedNetwork("init", replace(ON_DIGITS, init="digits.safetensors"))
    network.info |= {"dataset": "folder", "data_fingerprint": pictures.fingerprint}
    more = replace(pictures, fingerprint="more")
    others = replace(more, class_names=tuple("abcdefghij"))
    for data, words in (
        (pictures, "init: digits.safetensors was trained on images that val_size sets aside"),
        (more, "init: digits.safetensors may have been trained on images that val_size sets"),
        (others, ""),
    ):
        network.warn_of_seen_images(data)
        warning = capsys.readouterr().err
        assert words in warning
        assert bool(warning) == bool(words)


@pytest.mark.parametrize(
    ("name", "value"),
    [("dataset", "digits"), ("class_names", list("9876543210"))],
)
def test_teacher_of_other_data_is_refused(name, value):
    rewritten(**{name: value})
    with pytest.raises(InputError, match=f"teacher: teacher.safetensors .* another {name} "):
        train(VIEWED)
    assert not Path("checkpoints/student").exists()


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("nothing.safetensors", "nothing.safetensors does not exist"),
        (
            "checkpoints/student/model.safetensors",
            "is the network of this run itself; give another",
        ),
    ],
)
def test_teacher_that_is_missing_or_would_be_deleted_is_refused(path, problem):
    Path("checkpoints/student").mkdir(parents=True)
    shutil.copy("teacher.safetensors", "checkpoints/student/model.safetensors")
    with pytest.raises(InputError, match=f"^teacher: .*{problem}"):
        train(replace(VIEWED, teacher=path, overwrite=True))


def test_a_bad_teacher_is_refused_before_the_data_is_read_and_the_first_seed_is_trained():
    bad = replace(VIEWED, teacher="checkpoints", dataset="cifar10", data_dir="nowhere")
    for name in ("a", "b"):
        Path("checkpoints", name).mkdir(parents=True)
        shutil.copy("teacher.safetensors", f"checkpoints/{name}/model.safetensors")
    with pytest.raises(InputError, match=r"^teacher: checkpoints is a folder of several networks;"):
        train_on(bad)
    for seed in range(2):
        Path(f"checkpoints/student-{seed}").mkdir(parents=True)
    shutil.copy("teacher.safetensors", "checkpoints/student-1/model.safetensors")
    with pytest.raises(InputError, match=r"^teacher: student-1 is the network of this run itself"):
        train_seeds(replace(VIEWED, teacher="student-1", seeds=2, overwrite=True))
    assert Path("checkpoints/student-1/model.safetensors").exists()
    assert not Path("checkpoints/student-0/last.pt").exists()


def test_teacher_is_named_as_a_run_is():
    Path("checkpoints/large").mkdir(parents=True)
    shutil.copy("teacher.safetensors", "checkpoints/large/model.safetensors")
    train(replace(VIEWED, epochs=1, teacher="large"))
    Path("checkpoints/large/model.safetensors").unlink()
    with pytest.raises(InputError, match=r"^teacher: .*; restore it, which --resume needs"):
        train(replace(VIEWED, epochs=2, teacher="large", resume=True))
    with pytest.raises(InputError, match=r"^teacher: large .*; train one"):  # the first start
        train(replace(VIEWED, name="new", teacher="large", resume=True))


def test_answers_that_cannot_be_written_are_not_computed():
    computed = []
    Path("data").touch()
    words = r"^data_dir: .*data is no folder that can be written to; .* --teacher-views 0"
    with pytest.raises(InputError, match=words):
        teacher_of(replace(VIEWED, teacher_views=1)).kept(1, lambda: computed.append(1))
    assert not computed


def test_the_same_teacher_in_another_file_goes_on_and_another_one_cannot():
    viewed = replace(VIEWED, teacher_views=1)
    train(replace(viewed, epochs=1))
    Path("moved").mkdir()
    rewritten(seed=1)  # a finished run writes its file again when it is resumed
    shutil.move("teacher.safetensors", "moved/same.safetensors")
    train(replace(viewed, epochs=2, resume=True, teacher="moved/same.safetensors"))
    assert len(answer_files()) == 1
    shutil.move("moved/same.safetensors", "teacher.safetensors")
    rewritten(scale=2)
    with pytest.raises(InputError, match=r"resume: .*teacher: .* is not the network that it was"):
        train(replace(viewed, epochs=3, resume=True))


def test_a_run_with_answers_to_cropped_views_of_an_older_version_cannot_go_on(monkeypatch):
    with monkeypatch.context() as older:
        older.setattr(Teacher, "state_dict", NamedNetwork.state_dict)
        train(replace(VIEWED, epochs=1))
        train(replace(VIEWED, name="kept", epochs=1, teacher_views=1))
    train(replace(VIEWED, epochs=2, resume=True))
    with pytest.raises(InputError, match=r"^resume: .* \(an older version began it, with answers"):
        train(replace(VIEWED, name="kept", epochs=2, teacher_views=1, resume=True))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"label_smoothing": 0.1}, "label_smoothing"),
        ({"teacher": "", "teacher_views": 3}, "teacher_views"),
        ({"trivial_augment": False, "teacher_views": 2}, "teacher_views"),
    ],
)
def test_bad_constants(changes, field):
    with pytest.raises(InputError, match=f"^{field}: "):
        check_config(replace(VIEWED, **changes))
