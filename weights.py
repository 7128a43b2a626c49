"""The model file: weights, and all that is needed to use them, in one `.safetensors` file.

It needs PyTorch, NumPy and safetensors alone, so that an application can load a network by this
file, model.py and utils.py.
"""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from model import Architecture, ResNet
from utils import TEMPORARY, InputError, atomic_path, check_number, first_line, from_json

FILE_FORMAT = "tpsnet-2"  # marks our files, with the version of their metadata
TEMPERATURES = (0.05, 20)  # that logits may be divided by, for probabilities to believe


def save_model(path: str | Path, model: nn.Module, metadata: dict[str, object]) -> None:
    """Write weights and `metadata` to one `.safetensors` file, whole or not at all.

    `metadata` holds JSON values, at least the `mean` and `std` that images are normalised with,
    the `class_names` of the logits, and the `dataset` that the model is tested on.

    The wrappers of DDP and torch.compile are taken off first, so names never carry their prefixes.
    """
    while (inner := getattr(model, "module", getattr(model, "_orig_mod", None))) is not None:
        model = inner
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    described = {"architecture": asdict(model.architecture), **metadata}
    check_metadata(described)
    texts = {key: json.dumps(value) for key, value in described.items()}
    marks = {"file_format": FILE_FORMAT, "sha256": checksum(tensors, texts)}
    with atomic_path(path) as temporary:
        # Not save_file: it makes files that only their owner can read.
        temporary.write_bytes(safetensors.torch.save(tensors, marks | texts))


def checksum(tensors: dict[str, Tensor], texts: dict[str, str]) -> str:
    """SHA-256 of all that a model file says: names, types, shapes and values, and the metadata."""
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def check_metadata(metadata: dict[str, object]) -> None:
    """Raise InputError, KeyError or TypeError if a model cannot be used with this metadata."""
    if len(metadata["class_names"]) != metadata["architecture"]["num_classes"]:
        raise InputError("as many class_names as num_classes are needed")
    texts = *metadata["class_names"], metadata.get("dataset", "")
    if not all(isinstance(text, str) for text in texts):
        raise InputError("class_names and dataset must be texts")
    for name, low in (("mean", 0), ("std", 1e-6)):
        red, green, blue = metadata[name]
        for value in (red, green, blue):
            check_number(name, value, low, 255)
    if (temperature := metadata.get("temperature")) is not None:
        check_number("temperature", temperature, *TEMPERATURES)


def load_model(path: str | Path) -> tuple[ResNet, dict[str, object]]:
    """The network in `path`, on the CPU in eval mode, and the metadata it was saved with.

    Images must be scaled to [0, 1], then normalised with `metadata["mean"]` and `["std"]`.
    Nothing in the file is executed, and no memory is taken on its word.

    Raises:
        InputError: the file is missing, damaged, or not one of ours.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            texts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        if os.path.lexists(path):  # safetensors says the same where it may not open a file
            raise InputError(
                f"checkpoint: {path} cannot be opened; check its permissions, or name another"
            ) from None
        raise InputError(
            f"checkpoint: {path} does not exist; train one (`python train.py demo` takes"
            " two minutes), or name another"
        ) from None
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"checkpoint: {path} is damaged or no .safetensors file ({first_line(error)});"
            " name a model.safetensors that train.py wrote"
        ) from None
    try:
        if texts.pop("file_format", None) != FILE_FORMAT:
            raise ValueError(f"its metadata lacks file_format {FILE_FORMAT}")
        if texts.pop("sha256", None) != checksum(tensors, texts):
            raise ValueError("its SHA-256 is another: it is damaged")
        metadata = {key: json.loads(text) for key, text in texts.items()}
        check_metadata(metadata)
        # Built without memory and filled from the file: a lying architecture costs nothing.
        with torch.device("meta"):
            model = ResNet(from_json(Architecture, metadata["architecture"]))
        model.load_state_dict(tensors, assign=True)
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError("its weights are not finite")
    except (InputError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"checkpoint: {path} is not one of ours ({first_line(error)});"
            " name a model.safetensors that train.py wrote"
        ) from None
    return model.float().eval(), metadata


def find_checkpoint(path: Path) -> Path:
    """`path` itself if it is a file; of a folder the newest run, else a released model.

    Raises:
        InputError: the folder has neither.
    """
    if not path.is_dir():
        return path
    depths = ("", "*/", "*/*/")  # a run, a folder of runs, and of groups of them
    found = (run for depth in depths for run in path.glob(f"{depth}model.safetensors"))
    runs = [run for run in found if not run.parent.name.startswith(TEMPORARY)]  # half written
    if runs:
        return max(runs, key=lambda run: run.stat().st_mtime)
    if released := sorted(path.glob("*.safetensors")):
        return released[0]
    raise InputError(
        f"checkpoint: {path.as_posix()} holds no run and no released model; train one with"
        " `python train.py demo`, or name a file"
    )
