"""Does a taught network know its teacher's answers, or the views that it saw by heart?

    python -m studies.teacher.views    # a few minutes on two cores

Question: `tiny` saw the same ten views of each image thirty times. Does it agree with its teacher
on them alone, or also on views of the same images that it never saw?

The two classify every fifth training image: as the first and the last of the ten views show it, as
two new views do, and plain. No test image is read. The answer is in docs/family.md.
"""

if __name__ == "__main__":  # above the imports: a missing library or an old Python is one line
    from engine.script import run_script

    run_script("studies.teacher.views")

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from config import Config
from data import augmented, load_dataset
from engine.checkpoint import RELEASED, load_model
from engine.distributed import init_processes
from engine.evaluate import EVAL_BATCH
from engine.teacher import Teacher
from utils import from_json

EVERY = 5  # one of so many training images is classified


@torch.no_grad()
def compare() -> None:
    """Print a row for each kind of view."""
    device = init_processes()
    student, info = load_model(RELEASED / "tiny.safetensors")
    student.to(device)
    config = from_json(Config, info["config"])
    data = load_dataset(config, test=False).to(device)
    teacher = Teacher(config)
    teacher.prepare(data, device)

    def row(kind: str, views: Callable[[Tensor], Tensor]) -> str:
        logits, answers, labels = [], [], data.train.labels[::EVERY]
        for chosen in torch.arange(0, len(data.train), EVERY, device=device).split(EVAL_BATCH):
            images = views(chosen)
            logits.append(student(images))
            answers.append(teacher.logits(images))
        ours, theirs = torch.cat(logits), torch.cat(answers)
        pairs = ((ours.argmax(1), labels), (theirs.argmax(1), labels))
        right = [f"{100 * (a == b).float().mean().item():.2f}%" for a, b in pairs]
        divergence = F.kl_div(
            ours.log_softmax(1), theirs.log_softmax(1), reduction="batchmean", log_target=True
        )
        return f"| {kind} | {right[0]} | {right[1]} | {divergence.item():.3f} |"

    print("| training images | right | teacher right | divergence from the teacher, nats |")
    print("|---|---|---|---|")
    last = config.teacher_views
    for view in (1, last, last + 1, last + 2):
        kind = f"view {view}, {'known' if view <= last else 'new'}"
        print(row(kind, augmented(data, config, view)), flush=True)
    print(row("plain", lambda chosen: data.normalize(data.train.images[chosen] / 255)))


def main(args: list[str]) -> None:
    """Parse the command line, which has no option but -h, and compare."""
    import tyro

    tyro.cli(compare, args=args, prog="python -m studies.teacher.views", description=__doc__)
