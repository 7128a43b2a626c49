"""`python -m search` with a space of tiny networks: python tests/tiny_search.py demo --epochs 2"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from engine.script import run_script

    run_script("tiny_search")

from search import run
from search.space import SPACE, LogUniform

TINY = SPACE | {
    "num_blocks": (1, 2),
    "c1": range(2, 5),
    "conv_kernel": (1, 3),
    "lr": LogUniform(1e-4, 1.0),
    "optimizer": ("sgd", "muon"),
    "batch_size": (128, 256),
}


def main(args):
    run.main(args, TINY)
