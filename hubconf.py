"""The released networks for torch.hub, by name, from a copy of this repository.

    model = torch.hub.load("path/to/this/folder", "fast", source="local")
    logits = model(model.normalize(images))  # RGB scaled to [0, 1], (N, 3, 32, 32)
    model.info["class_names"][logits[0].argmax()]

A network comes on the CPU, in eval mode. `model.info` is the metadata that `load_model` in
engine/checkpoint.py returns: class names, mean and std, accuracy, temperature. `model.normalize` is
no layer of the network, and `model.to(device)` leaves it on the CPU: move the images after they are
normalized, or call `model.normalize.to(device)` too.
"""

import builtins as _builtins
import importlib.util as _import_util
import sys as _sys
from pathlib import Path as _Path
from threading import RLock as _RLock
from types import ModuleType as _Module

from torch import device as _device
from torch import nn as _nn

dependencies = ["torch", "numpy", "safetensors"]
_FOLDER = _Path(__file__).resolve().parent
# The files that a network needs; each imports only from those before it.
_FILES = (
    *("utils", "model", "engine.script", "config", "augment", "engine.distributed", "data"),
    "engine.checkpoint",
)


def best(pretrained: bool = True) -> _nn.Module:
    """[3, 3, 3] blocks of 64, 128 and 256 channels, 4.33M parameters: 96.85% on CIFAR-10."""
    return _load("best", pretrained)


def fast(pretrained: bool = True) -> _nn.Module:
    """[1, 1, 1] blocks of 96, 192 and 384 channels, 4.34M parameters: 94.76% on CIFAR-10.

    The first convolution, which whitens, is frozen. With `pretrained=False` its weights are random
    like all others.
    """
    return _load("fast", pretrained)


def small(pretrained: bool = True) -> _nn.Module:
    """[1, 1, 1] blocks of 48, 96 and 192 channels, 1.09M parameters: 93.72% on CIFAR-10."""
    return _load("small", pretrained)


def tiny(pretrained: bool = True) -> _nn.Module:
    """[3, 3, 3] blocks of 16, 32 and 64 channels, 0.27M parameters: 93.97% on CIFAR-10."""
    return _load("tiny", pretrained)


def _load(name: str, pretrained: bool) -> _nn.Module:
    """Load a released network, or make a new one of its architecture."""
    modules = _import_files()
    path = _FOLDER / "checkpoints" / f"{name}.safetensors"
    model, info = modules["engine.checkpoint"].load_model(path)
    if not pretrained:
        with _device("cpu"):  # and .float(), whatever defaults the user's program has set
            model = modules["model"].ResNet(model.architecture).float().eval()
        info = {key: info[key] for key in ("architecture", "class_names", "mean", "std")}
    model.info = info
    # As a plain attribute: `model.children()` and the state stay those of the network.
    object.__setattr__(model, "normalize", modules["data"].Normalize(info["mean"], info["std"]))
    return model


def _import_files() -> dict[str, _Module]:
    """Import our files as tpsnet_utils, tpsnet_model and so on, once for all networks.

    The files import each other by their plain names, which the user's own files may have too. So
    their `import` knows ours, and `sys.modules` has them under the other names alone.
    """
    private = {name: f"tpsnet_{name.replace('.', '_')}" for name in _FILES}
    paths = {name: _FOLDER / f"{name.replace('.', '/')}.py" for name in _FILES}
    # torch.hub runs this file anew for every network, so a lock of its own would hold up nobody.
    with vars(_sys).setdefault("_tpsnet_lock", _RLock()):
        found = {name: _sys.modules.get(private[name]) for name in _FILES}
        if all(found[name] and _Path(found[name].__file__) == paths[name] for name in _FILES):
            return found  # of two copies of a class, pickle would know only one
        found = {}

        def import_ours(name: str, *args: object) -> _Module:
            return found.get(name) or _builtins.__import__(name, *args)

        for name in _FILES:
            spec = _import_util.spec_from_file_location(private[name], paths[name])
            module = _import_util.module_from_spec(spec)
            module.__builtins__ = vars(_builtins) | {"__import__": import_ours}
            spec.loader.exec_module(module)
            found[name] = module
        _sys.modules.update({private[name]: module for name, module in found.items()})
        return found
