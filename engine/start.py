"""A trained network from whose weights another one starts, for the same classes or others."""

import hashlib
from dataclasses import fields, replace

import torch
from torch import nn

from config import Config
from data import Dataset
from engine.checkpoint import load_other
from model import Architecture, per_stage, stage_channels
from utils import InputError, part_of


class Start:
    """The network in `config.init`.

    Raises:
        InputError: the file is no network, is that of this run, or has another architecture; or a
            folder of several is named.
    """

    def __init__(self, config: Config) -> None:
        self.name = config.init
        self.path, self.model, self.info = load_other(
            "init", config.init, config.name, config.resume
        )
        self.sha256 = hashlib.sha256(self.path.read_bytes()).hexdigest()
        theirs, ours = (comparable(a) for a in (self.model.architecture, config))
        different = [f.name for f in fields(Architecture) if theirs[f.name] != ours[f.name]]
        if different:
            has, wants = (
                ", ".join(f"{name} {values[name]}" for name in different)
                for values in (theirs, ours)
            )
            raise InputError(
                f"init: {config.init} has {has}, and this run {wants}; give it the same"
                ' architecture, name another file, or none (--init "")'
            )

    def normalized(self, data: Dataset) -> Dataset:
        """The same data with the normalization that the weights were trained with."""
        return replace(data, mean=tuple(self.info["mean"]), std=tuple(self.info["std"]))

    def has_classes(self, class_names: tuple[str, ...]) -> bool:
        """True if these are the network's classes, so that its last layer is of use."""
        return self.info["class_names"] == list(class_names)

    @torch.no_grad()
    def fill(self, model: nn.Module, class_names: tuple[str, ...]) -> None:
        """Copy the weights to `model`; those of the last layer only if the classes are the same."""
        weights = self.model.state_dict()
        if not self.has_classes(class_names):
            weights = {k: v for k, v in weights.items() if not k.startswith("linear.")}
        model.load_state_dict(weights, strict=False)

    @property
    def described(self) -> dict[str, str]:
        """The file, as it was named, and its hash: what a model file records."""
        return {"name": self.name, "sha256": self.sha256}

    def state_dict(self) -> dict[str, str]:
        """The weights that a run was started with."""
        return {"sha256": self.sha256}

    def load_state_dict(self, state: dict[str, str]) -> None:
        """Raise ValueError if a run was started with other weights."""
        if state["sha256"] != self.sha256:
            raise ValueError(f"{self.path.as_posix()} is not the file that it was started from")


def comparable(architecture: Architecture) -> dict[str, object]:
    """All that two networks must share so that one can start from the weights of the other."""
    stages = len(architecture.num_blocks)
    plain = replace(
        part_of(architecture, Architecture),
        channels=stage_channels(architecture),
        width=1,
        conv_kernel=per_stage(architecture.conv_kernel, stages),
        skip_kernel=per_stage(architecture.skip_kernel, stages),
        dropout=0.0,
        classifier_dropout=0.0,
        num_classes=2,
    )
    return {f.name: getattr(plain, f.name) for f in fields(Architecture)}
