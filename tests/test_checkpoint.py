"""The two files of a run: saved whole or not at all, and refused in one line if damaged."""

import errno
import importlib
import json
import pickle
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import ROOT, Bomb

from engine import checkpoint
from engine.checkpoint import checksum, load_model, load_state, save_model, save_state
from model import Architecture, ResNet
from utils import InputError, read_json, write_json

SMALL = {"num_blocks": (1, 1, 1), "c1": 4}
INFO = {
    "dataset": "cifar10",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "class_names": list("abcdefghij"),
}


# ---------------------------------------------------------------- the network


def test_saved_model_explains_itself(tmp_path):
    torch.manual_seed(0)
    network = ResNet(
        Architecture(num_blocks=(1, 2), c1=3, conv_kernel=(3, 5), skip_kernel=3, dropout=0.1)
    )
    network(torch.randn(8, 3, 32, 32))  # moves the BN statistics
    path = tmp_path / "new folder" / "a.safetensors"
    save_model(path, network, INFO | {"seed": 3})
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]

    loaded, info = load_model(path)
    x = torch.randn(2, 3, 32, 32)
    assert not loaded.training
    assert torch.equal(loaded(x), network.eval()(x))
    assert info["seed"] == 3
    assert info["mean"] == INFO["mean"]
    assert info["architecture"]["num_blocks"] == [1, 2]


def test_half_precision_weights_load_as_float(tmp_path):
    save_model(tmp_path / "a.safetensors", ResNet(Architecture(**SMALL)).half(), INFO)
    loaded, _ = load_model(tmp_path / "a.safetensors")
    assert loaded(torch.randn(1, 3, 32, 32)).dtype == torch.float32


def tampered(path, **changes):
    """A file of ours with other metadata, and the hash of that; a key set to None is removed."""
    save_model(path, ResNet(Architecture(**SMALL)), INFO)
    with safetensors.safe_open(path, "pt") as file:
        texts = file.metadata()
    texts |= {k: json.dumps(v) for k, v in changes.items()}
    marks = {"file_format": texts.pop("file_format")}
    texts = {k: v for k, v in texts.items() if v != "null" and k != "sha256"}
    tensors = safetensors.torch.load(path.read_bytes())
    marks["sha256"] = checksum(tensors, texts)
    path.write_bytes(safetensors.torch.save(tensors, texts | marks))


def built(**changes):
    """The small network's architecture as JSON, changed."""
    return asdict(Architecture(**SMALL)) | changes


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: p.unlink(),
        lambda p: p.write_bytes(b""),
        lambda p: p.write_bytes(p.read_bytes()[:1000]),
        lambda p: p.write_bytes(p.read_bytes()[:-1]),
        lambda p: p.write_bytes(p.read_bytes()[:-4] + bytes(4)),  # the last number is 0
        lambda p: p.write_bytes((2**63).to_bytes(8, "little") + p.read_bytes()[8:]),
        lambda p: p.write_bytes(pickle.dumps(Bomb())),
        lambda p: torch.save({"model": Bomb()}, p),
        lambda p: safetensors.torch.save_file({"weight": torch.ones(3)}, p),
        lambda p: tampered(p, architecture=None),
        lambda p: tampered(p, architecture=built(num_blocks=[99] * 4, c1=4096, pool_kernel=4)),
        lambda p: tampered(p, architecture=built(c1=5)),
        lambda p: tampered(p, architecture=built(c1="many")),
        lambda p: tampered(p, architecture=built(layers=3)),
        lambda p: tampered(p, architecture=[1, 2]),
        lambda p: tampered(p, mean=None),
        lambda p: tampered(p, std=[0, 1, "x"]),
        lambda p: tampered(p, class_names=["one"]),
        lambda p: (p.unlink(), p.mkdir()),
    ],
)
def test_damaged_and_hostile_files_are_refused_in_one_line(tmp_path, damage):
    path = tmp_path / "a.safetensors"
    save_model(path, ResNet(Architecture(**SMALL)), INFO)
    damage(path)
    with pytest.raises(InputError, match=r"^checkpoint: .*a\.safetensors .*; .*") as error:
        load_model(path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "bomb_went_off").exists()


def test_failed_save_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_model(path, ResNet(Architecture(**SMALL)), INFO)
    before = path.read_bytes()
    write = Path.write_bytes

    def fill_the_disk(path, content):
        write(path, content[:1000])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill_the_disk)
    with pytest.raises(InputError, match="No space left on device"):
        save_model(path, ResNet(Architecture(**SMALL)), INFO)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_on_windows_a_file_is_replaced_once_the_program_that_reads_it_closes_it(monkeypatch):
    refusals, replace = [1, 2], Path.replace

    def replace_later(path, to):
        if refusals:
            raise PermissionError(refusals.pop(), "Access is denied", str(path))
        return replace(path, to)

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(Path, "replace", replace_later)
    write_json(Path("a.json"), 1)
    assert read_json(Path("a.json")) == 1


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_file_of_a_network_that_is_in_use_is_not_mapped_into_memory():
    """Windows would refuse to replace it, and so end the training that writes it."""
    save_model("mapped.safetensors", ResNet(Architecture(**SMALL)), INFO)
    network, _ = load_model("mapped.safetensors")
    assert "mapped.safetensors" not in Path("/proc/self/maps").read_text()
    assert network.linear.weight.isfinite().all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"class_names": list(range(10))}, "class_names, dataset and data_dir must be texts"),
        ({"class_names": ["cat", "dog"]}, "as many class_names as num_classes"),
        ({"dataset": ["digits"]}, "class_names, dataset and data_dir must be texts"),
        ({"std": [0.5, 0, 0.5]}, "std: 0 must be"),
        ({"temperature": 99}, "temperature: 99 must be"),
    ],
)
def test_metadata_that_no_script_can_use_is_not_saved(change, words):
    with pytest.raises(InputError, match=words):
        save_model("m.safetensors", ResNet(Architecture(**SMALL)), INFO | change)
    assert not Path("m.safetensors").exists()


def test_weights_that_are_not_finite_are_refused():
    network = ResNet(Architecture(**SMALL))
    network.linear.bias.data[3] = float("nan")
    save_model("nan.safetensors", network, INFO)
    with pytest.raises(InputError, match="its weights are not finite"):
        load_model("nan.safetensors")


def test_file_that_cannot_be_opened():
    Path("loop.safetensors").symlink_to("loop.safetensors")
    with pytest.raises(InputError, match=r"checkpoint: loop.safetensors cannot be opened; check"):
        load_model("loop.safetensors")


def test_application_needs_three_files(tmp_path, new_imports, monkeypatch):
    """To load a network: engine/checkpoint.py, model.py and utils.py."""
    for name in ("engine/checkpoint.py", "model.py", "utils.py"):
        path = tmp_path / "app" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((ROOT / name).read_bytes())
    save_model("m.safetensors", ResNet(Architecture(**SMALL)), INFO)
    path = [folder for folder in sys.path if Path(folder).resolve() != ROOT]
    monkeypatch.setattr(sys, "path", [str(tmp_path / "app"), *path])
    _, info = importlib.import_module("engine.checkpoint").load_model("m.safetensors")
    assert info["class_names"][3] == "d"


# ---------------------------------------------------------------- the state of a training


def test_state_comes_back_and_the_one_before_is_kept():
    path = Path("run/last.pt")
    for step in range(3):
        save_state(path, {"step": step, "weights": [torch.full((3,), 0.1 * step)]})
    for file, step in ((path, 2), (path.with_name(checkpoint.PREVIOUS), 1)):
        state = checkpoint.read_state(file)
        assert state["step"] == step
        assert torch.equal(state["weights"][0], torch.full((3,), 0.1 * step))
    assert load_state(path)[1] is False


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FOREIGN = {
    "missing": lambda p: p.unlink(),
    "empty": lambda p: p.write_bytes(b""),
    "text": lambda p: p.write_text("not a state"),
    "a flipped bit": flip_a_bit,
    "truncated": lambda p: p.write_bytes(p.read_bytes()[:-1]),
    "no checksum": lambda p: torch.save({"step": 1}, p),
    "code, with a checksum": lambda p: save_state(p, {"model": Bomb()}),
    "a list, with a checksum": lambda p: save_state(p, [1, 2]),
}


@pytest.mark.parametrize("damage", FOREIGN.values(), ids=FOREIGN)
def test_damaged_state_is_replaced_by_the_previous_one_or_refused(damage):
    path, previous = Path("last.pt"), Path(checkpoint.PREVIOUS)
    save_state(path, {"step": 1})
    content = path.read_bytes()
    damage(path)
    previous.write_bytes(content)
    assert load_state(path) == ({"step": 1}, True)
    damage(previous)
    with pytest.raises(InputError, match=r"^resume: last.pt is .*; restore .*") as error:
        load_state(path)
    assert "\n" not in str(error.value)
    assert not Path("bomb_went_off").exists()


def test_state_that_cannot_be_read_is_not_taken_for_damaged():
    save_state(Path(checkpoint.PREVIOUS), {"step": 1})
    Path("last.pt").mkdir()  # a file without permission, to users other than root
    with pytest.raises(
        InputError, match=r"^resume: last.pt cannot be read \(.*\); change that, or"
    ):
        load_state(Path("last.pt"))
