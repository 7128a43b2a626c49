"""The released networks for torch.hub, which gives them by name from a copy of this repository:

    model = torch.hub.load("path/to/this/folder", "fast", source="local")
    logits = model(normalized)  # RGB scaled to [0, 1], minus model.info["mean"], over ["std"]

`model.info` is what `weights.load_model` tells of a network: class names, normalization, accuracy.
"""

import importlib as _importlib
import sys as _sys
from pathlib import Path as _Path
from types import ModuleType as _Module

from torch import nn as _nn

dependencies = ["torch", "numpy", "safetensors"]
_FOLDER = _Path(__file__).resolve().parent


def best(pretrained: bool = True) -> _nn.Module:
    """[3, 3, 3] blocks of 64, 128 and 256 channels, 4.33M parameters: 96.85% on CIFAR-10."""
    return _load("best", pretrained)


def fast(pretrained: bool = True) -> _nn.Module:
    """[1, 1, 1] blocks of 96, 192 and 384 channels, 4.34M parameters: 94.76% on CIFAR-10.

    In eval mode, on the CPU, as all of them. Without `pretrained` the weights are random, and those
    of the whitening stem too.
    """
    return _load("fast", pretrained)


def small(pretrained: bool = True) -> _nn.Module:
    """[1, 1, 1] blocks of 48, 96 and 192 channels, 1.09M parameters: 93.72% on CIFAR-10."""
    return _load("small", pretrained)


def tiny(pretrained: bool = True) -> _nn.Module:
    """[1, 1, 1] blocks of 24, 48 and 96 channels, 0.28M parameters: 89.98% on CIFAR-10."""
    return _load("tiny", pretrained)


def _load(name: str, pretrained: bool) -> _nn.Module:
    """A released network, or a new one of its architecture."""
    weights = _import_ours("weights")
    model, info = weights.load_model(_FOLDER / "checkpoints" / f"{name}.safetensors")
    if not pretrained:
        model = weights.ResNet(model.architecture).eval()
        info = {key: info[key] for key in ("architecture", "class_names", "mean", "std")}
    model.info = info
    return model


def _import_ours(name: str) -> _Module:
    """One of our scripts, as `tpsnet_NAME`, whatever `utils` or `model` the user has loaded.

    The scripts import each other by their plain names, so those of the user step aside meanwhile.
    Once for all networks: of two copies of a class pickle knows only one.
    """
    before = _sys.modules.get(f"tpsnet_{name}")
    if before and _Path(before.__file__).resolve().parent == _FOLDER:
        return before
    ours = {path.stem for path in _FOLDER.glob("*.py")}
    theirs = {name: _sys.modules.pop(name) for name in ours & _sys.modules.keys()}
    _sys.path.insert(0, str(_FOLDER))
    try:
        imported = _importlib.import_module(name)
    finally:
        _sys.path.remove(str(_FOLDER))
        loaded = [_sys.modules.pop(name) for name in ours & _sys.modules.keys()]
        _sys.modules.update(theirs)
    for module in loaded:  # where torch.compile, pickle and typing look their names up
        plain, module.__name__ = module.__name__, f"tpsnet_{module.__name__}"
        _sys.modules[module.__name__] = module
        for value in vars(module).values():
            if getattr(value, "__module__", None) == plain:
                value.__module__ = module.__name__
    return imported
