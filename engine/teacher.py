"""A trained network that teaches another one: its answers to augmented views are the targets.

The student learns from the teacher's probabilities alone, without the labels (knowledge
distillation; Hinton et al., arXiv:1503.02531). A teacher that answers in every epoch sees what the
student sees (Beyer et al., arXiv:2106.05237). With `teacher_views`, answers are kept and repeated
instead (Shen & Xing, arXiv:2112.01528): those to a few views of each image, as AutoAugment or
TrivialAugment changes it, before crop, rotation, flip and Cutout. These are new whenever a view
comes again, or the student would learn its images by heart (docs/family.md).
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from augment import apply_policy
from config import Config, view_of
from data import EVAL_BATCH, Answers, Dataset, Normalize
from engine.checkpoint import checksum
from engine.distributed import (
    all_reduce_max,
    all_reduce_sum,
    is_main,
    local_rank,
    make_autocast,
    num_processes,
    rank,
)
from engine.start import NamedNetwork
from learner import memory_format
from utils import CHECKPOINTS, InputError, atomic_path, check_writable, expanded, warn, write_json

# The constants that choose the images and change their views.
OF_VIEWS = ("val_size", "train_size", "auto_augment", "trivial_augment", "seed")


class Teacher(NamedNetwork):
    """The network in `config.teacher`, and its answers that are kept."""

    answers_to = "whole views"  # if they are kept

    def __init__(self, config: Config) -> None:
        super().__init__("teacher", config)
        self.config = config

    def state_dict(self) -> dict[str, str]:
        """The teacher that a run was started with, and what its kept answers are about."""
        return super().state_dict() | {"answers_to": self.answers_to}

    def load_state_dict(self, state: dict[str, str]) -> None:
        """Raise ValueError if a run was started with another teacher, or other answers."""
        super().load_state_dict(state)
        if self.config.teacher_views and "answers_to" not in state:
            raise ValueError("an older version began it, with answers to cropped views")

    def prepare(self, data: Dataset, device: torch.device) -> None:
        """Make ready to answer about these images, on `device`.

        Raises:
            InputError: it was trained with other classes or other data.
        """
        for name, ours in (("dataset", data.name), ("class_names", list(data.class_names))):
            if (theirs := self.info.get(name)) != ours:
                raise InputError(
                    f"teacher: {self.path} was trained with another {name} ({theirs}) than this run"
                    f' has ({ours}); name another teacher, or none (--teacher "")'
                )
        self.data, self.device = data, device
        mean, std = self.info["mean"], self.info["std"]
        self.normalize = Normalize(mean, std).to(device)
        self.is_normalized_alike = (mean, std) == (list(data.mean), list(data.std))
        self.model.to(device, memory_format=memory_format(self.model, device))
        self.autocast = make_autocast(device, self.config.bfloat16)

    def answers(self, epoch: int, after_batch: Callable[[], None]) -> Answers:
        """The targets of an epoch: a function of augmented images and their indices, (N,).

        With `teacher_views` they are read from the files in `folder`, or computed and written.

        Args:
            after_batch: called after each batch that is computed; one that raises ends that.
        """
        if not self.config.teacher_views:
            return lambda images, _: self.targets(self.logits(self.renormalized(images)))
        kept = self.kept(view_of(self.config, epoch), after_batch).to(self.device)
        return lambda _, chosen: self.targets(kept[chosen].float())

    def targets(self, logits: Tensor) -> Tensor:
        """(N, C) logits to targets: their probabilities, at temperature 1."""
        return logits.softmax(1)

    def renormalized(self, images: Tensor) -> Tensor:
        """Images with the student's normalization to those with the teacher's."""
        if self.is_normalized_alike:
            return images
        ours = self.data.normalize
        return self.normalize(images * ours.std + ours.mean)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """(N, 3, 32, 32) images with its own normalization to (N, C) logits, as they are kept."""
        with self.autocast:
            return self.model(images).half().float()

    def kept(self, view: int, after_batch: Callable[[], None]) -> Tensor:
        """The logits of a view of every training image, (N, C) float16."""
        path = self.folder / f"{view:04d}.safetensors"
        logits = read_answers(path)
        shape = (len(self.data.train), self.config.num_classes)
        whole = logits is not None and logits.shape == shape
        (is_lacking,) = all_reduce_max(int(not whole))  # on one of several machines, perhaps
        if not is_lacking:
            return logits
        if not whole and path.exists():
            warn(f"{path} is damaged; computing its answers again")
        if local_rank() == 0:
            self.check_folder()  # before hours of work
        logits = self.compute(view, after_batch)
        if local_rank() == 0:
            write_json(self.folder / "views.json", self.described)
            write_answers(path, logits)
        return logits

    def check_folder(self) -> None:
        """Raise InputError if answers cannot be written."""
        try:
            check_writable("data_dir", self.folder)
        except InputError as error:
            raise InputError(
                f"{error}, or start a run with --teacher-views 0: the teacher's answers are kept"
                " beside the data"
            ) from None

    def compute(self, view: int, after_batch: Callable[[], None]) -> Tensor:
        """Classify a view of every training image; each process takes every n-th batch."""
        images = apply_policy(self.config, self.data.train.images, view)
        indices = torch.arange(len(self.data.train), device=self.device)
        logits = torch.zeros(len(indices), self.config.num_classes, device=self.device)
        with tqdm(
            total=len(indices),
            desc=f"teacher, view {view}/{self.config.teacher_views}",
            unit="img",
            unit_scale=True,
            leave=False,
            dynamic_ncols=True,
            disable=None if is_main() else True,
        ) as bar:
            for chosen in indices.split(EVAL_BATCH)[rank() :: num_processes()]:
                logits[chosen] = self.logits(self.normalize(images[chosen] / 255))
                bar.update(len(chosen) * num_processes())
                after_batch()
        return all_reduce_sum(logits).half().cpu()

    @property
    def described(self) -> dict[str, object]:
        """All that the answers depend on, except the view's number and how a device rounds."""
        views = {name: getattr(self.config, name) for name in OF_VIEWS}
        facts = {"teacher": self.weights_sha256, "data": self.data.fingerprint, "views": views}
        return facts if self.config.bfloat16 else facts | {"bfloat16": False}

    @property
    def folder(self) -> Path:
        """The folder of the kept answers: beside the data, or, of the user's pictures, the runs."""
        name = hashlib.sha256(json.dumps(self.described, sort_keys=True).encode()).hexdigest()
        is_users = self.data.name == "folder"
        beside = CHECKPOINTS if is_users else expanded(self.config.data_dir)
        return beside / "answers" / name[:16]


def write_answers(path: Path, logits: Tensor) -> None:
    """Write (N, C) logits with their SHA-256, whole or not at all."""
    tensors = {"logits": logits}
    with atomic_path(path) as temporary:
        content = safetensors.torch.save(tensors, {"sha256": checksum(tensors, {})})
        temporary.write_bytes(content)


def read_answers(path: Path) -> Tensor | None:
    """Read what `write_answers` wrote; None if it is missing or damaged."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {"logits": file.get_tensor("logits")}
            return tensors["logits"] if checksum(tensors, {}) == file.metadata()["sha256"] else None
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError):
        return None
