"""Did a taught network learn to answer as its teacher does, or did it memorize its images?

    python -m studies.teacher.views                      # 8 minutes on two cores with AVX2
    git show 38ead2d:checkpoints/tiny.safetensors >first.safetensors
    python -m studies.teacher.views first.safetensors    # the `tiny` that was released first

Question: `tiny` saw ten views of each image, thirty times each; the first one always with the same
crop and flip, the present one with new ones. Does it agree with its teacher on these views alone,
or also when they are mirrored or cropped elsewhere, and on other views? And how far do the
teacher's own answers change?

The two classify every tenth training image. No test image is read. The answer is in
docs/family.md.
"""

if __name__ == "__main__":  # above the imports: a missing library or an old Python is one line
    from engine.script import run_script

    run_script("studies.teacher.views")

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import augment
from config import Config
from data import Dataset, epoch_order, load_dataset
from engine.checkpoint import RELEASED, load_model
from engine.evaluate import EVAL_BATCH
from engine.teacher import Teacher

EVERY = 10  # one of so many training images is classified
NEW = 22  # an epoch after the ten views; even, so that it mirrors the images that epoch 1 does not
ROWS = {  # the epochs that draw the view, the crop and the flip; 0 for the image as it is
    "as in the first epoch": (1, 1, 1),
    "mirrored": (1, 1, NEW),
    "cropped elsewhere": (1, NEW, 1),
    "mirrored and cropped elsewhere": (1, NEW, NEW),
    "the whole view": (1, 0, 0),
    "another view": (NEW, NEW, NEW),
    "plain": (0, 0, 0),
}


def shown(data: Dataset, config: Config, view: int, crop: int, flip: int) -> Tensor:
    """Every tenth training image as these epochs draw it, (N, 3, 32, 32), normalized."""
    images, chosen = data.train.images, torch.arange(0, len(data.train), EVERY)

    def draws(epoch: int) -> list[Tensor]:
        order = epoch_order(config, len(images), epoch)
        place = order.argsort()[chosen]
        return [drawn[place] for drawn in augment.draw(config, order, epoch)]

    shift, angle, _, corner = draws(crop or NEW)
    moves = shift * bool(crop), angle, draws(flip or NEW)[2] & bool(flip), corner
    images = augment.apply_policy(config, images, view) if view else images
    return augment.apply(config, images[chosen], moves, data.normalize)


@torch.no_grad()
def compare(network: Path = RELEASED / "tiny.safetensors", /) -> None:
    """Print a row for each way to show the images to a taught network and to its teacher."""
    cpu = torch.device("cpu")
    student, info = load_model(network)
    config = Config(**info["config"])
    data = load_dataset(config, test=False)
    labels = data.train.labels[::EVERY]
    teacher = Teacher(config)
    teacher.prepare(data, cpu)
    config = replace(config, teacher_views=0)  # each epoch has its own draws
    first = None
    print("| training images | right | teacher right | KL | the teacher's own, from the first |")
    print("|---|---|---|---|---|")
    for kind, epochs in ROWS.items():
        batches = shown(data, config, *epochs).split(EVAL_BATCH)
        ours, theirs = (
            torch.cat([classify(images) for images in batches]).log_softmax(1)
            for classify in (student, teacher.logits)
        )
        first = theirs if first is None else first
        right = [f"{100 * (x.argmax(1) == labels).float().mean():.2f}%" for x in (ours, theirs)]
        far = [f"{divergence(*pair):.3f}" for pair in ((ours, theirs), (theirs, first))]
        print("|", " | ".join((kind, *right, *far)), "|", flush=True)


def divergence(q: Tensor, p: Tensor) -> Tensor:
    """KL(p || q) in nats, the mean over (N, C) logarithms of probabilities."""
    return F.kl_div(q, p, reduction="batchmean", log_target=True)


def main(args: list[str]) -> None:
    """Parse the command line and compare."""
    import tyro

    tyro.cli(compare, args=args, prog="python -m studies.teacher.views", description=__doc__)
