"""The two files of a run: model.safetensors, the network, and last.pt, the state of its training.

An application that loads a network needs this file, model.py and utils.py, with PyTorch, NumPy and
safetensors.
"""

import hashlib
import io
import json
import os
import warnings
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from model import Architecture, ResNet
from utils import (
    CHECKPOINTS,
    TEMPORARY,
    InputError,
    atomic_path,
    check_number,
    first_line,
    quoted,
)

FILE_FORMAT = "tpsnet-2"  # marks our model files, with the version of their metadata
RELEASED = Path(__file__).resolve().parents[1] / "checkpoints"  # beside the scripts
TEMPERATURES = (0.05, 20)  # the range of temperatures, by which logits are divided
PREVIOUS = "previous.pt"  # the training state that was saved before the last one


# ---------------------------------------------------------------- the network


def save_model(path: str | Path, model: nn.Module, metadata: dict[str, object]) -> None:
    """Write weights and metadata to one `.safetensors` file, whole or not at all.

    Args:
        metadata: JSON values; at least the `mean` and `std` of the normalization, the `class_names`
            of the logits, and the `dataset` that the model is tested on.
    """
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    described = {"architecture": asdict(model.architecture), **metadata}
    check_metadata(described)
    texts = {key: json.dumps(value) for key, value in described.items()}
    marks = {"file_format": FILE_FORMAT, "sha256": checksum(tensors, texts)}
    with atomic_path(path) as temporary:
        # Not save_file, which makes files that only their owner can read.
        temporary.write_bytes(safetensors.torch.save(tensors, marks | texts))


def checksum(tensors: dict[str, Tensor], texts: dict[str, str]) -> str:
    """SHA-256 of the content of a model file: names, types, shapes, values and metadata."""
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def check_metadata(metadata: dict[str, object]) -> None:
    """Raise InputError, KeyError, TypeError or ValueError if metadata is missing or wrong."""
    if len(metadata["class_names"]) != metadata["architecture"]["num_classes"]:
        raise InputError("as many class_names as num_classes are needed")
    texts = *metadata["class_names"], metadata.get("dataset", ""), metadata.get("data_dir", "")
    if not all(isinstance(text, str) for text in texts):
        raise InputError("class_names, dataset and data_dir must be texts")
    for name, low in (("mean", 0), ("std", 1e-6)):
        red, green, blue = metadata[name]
        for value in (red, green, blue):
            check_number(name, value, low, 255)
    if (temperature := metadata.get("temperature")) is not None:
        check_number("temperature", temperature, *TEMPERATURES)


def load_model(path: str | Path) -> tuple[ResNet, dict[str, object]]:
    """Load the network in `path`, on the CPU in eval mode, and its metadata.

    Images must be scaled to [0, 1], then normalized with `metadata["mean"]` and `["std"]`.
    Nothing in the file is executed.

    Raises:
        InputError: the file is missing, damaged, or not one of ours.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            texts = file.metadata() or {}
            # Copies: Windows replaces no file that is mapped into memory, as that of a run that
            # trains on must be.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        if os.path.lexists(path):  # safetensors raises the same without permission
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
        # Built without memory and filled from the file, whatever size the metadata claims.
        with torch.device("meta"):
            model = ResNet(Architecture(**metadata["architecture"]))
        model.load_state_dict(tensors, assign=True)
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError("its weights are not finite")
    except (InputError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"checkpoint: {path} is not one of ours ({first_line(error)});"
            " name a model.safetensors that train.py wrote"
        ) from None
    return model.float().eval(), metadata


def find_checkpoint(path: str | Path) -> Path:
    """Return the model file that a path or a name stands for.

    A file stands for itself, a folder for its newest run, else for its first released network. What
    is neither may be the name of a run or of a released network. Where the current folder has
    none, those beside the scripts count.

    Raises:
        InputError: the folder has none, or no run in it has saved its network yet.
    """
    path = Path(path)
    places = [path]
    if not path.is_file() and path.name not in ("", ".."):  # which are no names of networks
        folders = (Path(), CHECKPOINTS, RELEASED)
        places = [folder / name for folder in folders for name in (path, f"{path}.safetensors")]
    if path == CHECKPOINTS:
        places.append(RELEASED)
    for place in places:
        if place.is_file():
            return place
        if place.is_dir() and (found := network_in(place)):
            return found
    if not path.is_dir():
        if path.name == "model.safetensors" and (path.parent / "last.pt").exists():
            raise unfinished(path.parent)
        return path
    raise InputError(
        f"checkpoint: {path.as_posix()} holds no run and no released model; train one with"
        " `python train.py demo`, or name a file"
    )


def network_in(folder: Path) -> Path | None:
    """The network of the newest run in a folder, else the first released one, if there is one.

    Raises:
        InputError: all that there is are runs that have not saved their network yet.
    """
    depths = ("", "*/", "*/*/")  # a run, a folder of runs, and of groups of them

    def newest(name: str) -> Path | None:
        found = (path for depth in depths for path in folder.glob(f"{depth}{name}"))
        whole = [path for path in found if not path.parent.name.startswith(TEMPORARY)]
        return max(whole, key=lambda path: path.stat().st_mtime, default=None)

    network = newest("model.safetensors") or min(folder.glob("*.safetensors"), default=None)
    if not network and (state := newest("last.pt")):
        raise unfinished(state.parent)
    return network


def unfinished(run: Path) -> InputError:
    """The error of a run without a network, which is first written at the end of an epoch."""
    return InputError(
        f"checkpoint: the run in {run.as_posix()} has saved no network yet; go on with it by"
        f" `python train.py --config {quoted(run / 'config.json')} --resume`, or name another"
    )


# ---------------------------------------------------------------- the state of a training


def save_state(path: Path, state: dict[str, object]) -> None:
    """Write a training state of tensors and plain values, whole or not at all.

    The state that was there becomes `previous.pt`. The SHA-256 of the content is appended, because
    PyTorch notices few damages.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()  # not getbuffer: after a failed write it crashed Python 3.12.1
    with (
        atomic_path(path, keep=path.with_name(PREVIOUS)) as temporary,
        temporary.open("wb") as file,
    ):
        file.write(content)
        file.write(hashlib.sha256(content).digest())


def load_state(path: Path) -> tuple[dict[str, object], bool]:
    """Load the state that `save_state` wrote, on the CPU; if it is damaged, the previous one.

    Nothing in the file is executed.

    Returns:
        The state, and whether it is the previous one.

    Raises:
        InputError: both files are missing, damaged, or hold more than tensors and plain values; or
            one cannot be read, by an OSError.
    """
    for file in (path, path.with_name(PREVIOUS)):
        try:
            return read_state(file), file != path
        except ValueError:
            continue
        except OSError as error:
            raise InputError(
                f"resume: {file} cannot be read ({error.strerror}); change that, or train under"
                " another --name"
            ) from error
    problem = "is damaged" if path.exists() else "is missing"
    raise InputError(
        f"resume: {path} {problem} or was not written by train.py, and there is no sound"
        f" {PREVIOUS}; restore a copy of it, train under another --name, or --overwrite it"
    )


def read_state(path: Path) -> dict[str, object]:
    """Read the state in one file.

    Raises:
        ValueError: it is missing, damaged, or holds more than tensors and plain values.
        OSError: it cannot be read, though it may be sound.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    try:
        content, digest = content[:-32], content[-32:]
        if hashlib.sha256(content).digest() != digest:
            raise ValueError("its SHA-256 is another")
        with warnings.catch_warnings(action="ignore"):  # about foreign pickles, which are refused
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise TypeError("it holds no dictionary")
        return state
    except Exception as error:  # a foreign file can raise anything
        raise ValueError(f"{path}: {first_line(error)}") from None


def all_finite(state: object) -> bool:
    """True if every tensor in nested dictionaries and lists is finite."""
    # One question to each device, since a GPU makes the program wait for every answer.
    by_device = defaultdict(list)
    for leaf in tree_leaves(state):
        if isinstance(leaf, Tensor):
            by_device[leaf.device].append(leaf.isfinite().all())
    return all(torch.stack(answers).all() for answers in by_device.values())
