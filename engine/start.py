"""Trained networks that a run names, and the one from whose weights it starts."""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from config import Config
from data import Dataset
from engine.checkpoint import PREVIOUS, checksum, find_checkpoint, load_model
from model import Architecture, per_stage, stage_channels
from utils import CHECKPOINTS, InputError, part_of, warn


class NamedNetwork:
    """The network that a constant of a run names: that of another run, or a released one.

    A resumed run must be given the same weights, in whatever file.

    Args:
        field: the name of the constant, `init` or `teacher`.

    Attributes:
        sha256: of the file, which is another one after every save of the same network.
        weights_sha256: of the weights, normalization and class names: what a run learns from.

    Raises:
        InputError: it is no network, or that of this run; or a folder of several is named.
    """

    def __init__(self, field: str, config: Config) -> None:
        self.field, self.name = field, getattr(config, field)
        try:
            self.path = find_checkpoint(Path(self.name))
            self.model, self.info = load_model(self.path)
        except InputError as error:
            problem = str(error).removeprefix("checkpoint: ")
            run = CHECKPOINTS / config.name
            if config.resume and any((run / state).exists() for state in ("last.pt", PREVIOUS)):
                problem = f"{problem.partition(';')[0]}; restore it, which --resume needs"
            raise InputError(f"{field}: {problem}") from None
        own, is_file = (CHECKPOINTS / config.name).resolve(), Path(self.name).is_file()
        if self.path.resolve().parent == own:
            raise InputError(
                f"{field}: {self.name} is the network of this run itself; give another --name"
            )
        known_as = self.path.parent.name, self.path.name, self.path.stem
        if not is_file and Path(self.name).name not in known_as:
            raise InputError(  # the newest of them is another one tomorrow
                f"{field}: {self.name} is a folder of several networks; name one of them, such as"
                f" {self.path.as_posix()}"
            )
        named = (Path(self.name), CHECKPOINTS / self.name)
        if not is_file and any(own.is_relative_to(folder.resolve()) for folder in named):
            raise InputError(
                f"{field}: {self.name} would be this run itself as soon as it is saved; give"
                f" another --name, or name the file {self.path.as_posix()}"
            )
        self.sha256 = hashlib.sha256(self.path.read_bytes()).hexdigest()
        texts = {name: json.dumps(self.info[name]) for name in ("mean", "std", "class_names")}
        self.weights_sha256 = checksum(self.model.state_dict(), texts)

    def warn_of_seen_images(self, data: Dataset) -> None:
        """Warn if it was trained on images that are set aside for validation here."""
        is_same_data = self.info.get("dataset") == data.name  # in whatever copy
        is_same_split = self.info.get("config", {}).get("val_size") == len(data.val)
        was, comes_out = "was", "comes out"
        if data.name == "folder" and self.info.get("data_fingerprint") != data.fingerprint:
            # Pictures have been added or removed, or these are others.
            is_same_data = is_same_data and self.info["class_names"] == list(data.class_names)
            is_same_split, was, comes_out = False, "may have been", "may come out"
        if len(data.val) and is_same_data and not is_same_split:
            warn(
                f"{self.field}: {self.name} {was} trained on images that val_size sets aside: the"
                f" validation accuracy {comes_out} too high"
            )

    def state_dict(self) -> dict[str, str]:
        """The network that a run was started with."""
        return {"weights_sha256": self.weights_sha256}

    def load_state_dict(self, state: dict[str, str]) -> None:
        """Raise ValueError if a run was started with another network."""
        # Older states have the hash of the file.
        if any(getattr(self, name) != value for name, value in state.items()):
            raise ValueError(
                f"{self.field}: {self.path.as_posix()} is not the network that it was started with"
            )


class Start(NamedNetwork):
    """The network in `config.init`.

    Raises:
        InputError: it has another architecture; or as for every `NamedNetwork`.
    """

    def __init__(self, config: Config) -> None:
        super().__init__("init", config)
        theirs, ours = comparable(self.model.architecture), comparable(config)
        different = [name for name in theirs if theirs[name] != ours[name]]
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


def comparable(architecture: Architecture) -> dict[str, object]:
    """Everything that two networks must share so that one can start from the other's weights."""
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
    return asdict(plain)
