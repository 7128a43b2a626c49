"""search.py with a space of tiny networks; in it the first two trials fail once, each its own way.

python tests/tiny_search.py demo --num-samples 6 --epochs 2

With GREEDY=1 in the environment, only the first one fails: it takes 6 GB, and Ray is to kill it.
"""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import search
import utils

search.SPACE |= {
    "num_blocks": (1, 2),
    "c1": range(2, 5),
    "conv_kernel": (1, 3),
    "optimizer": ("sgd",),
    "batch_size": (128, 256),
}
train_trial = search.run_trial


def run_trial(trial, search, root, data):
    """Train it, but for the first time of the first two."""
    if os.environ.get("GREEDY"):
        taken = []
        while trial["number"] == 1 and len(taken) < 60:
            taken.append(b"x" * 100_000_000)
            time.sleep(0.05)
        return train_trial(trial, search, root, data)
    mark = Path(root, f"failed-{trial['number']}")
    if trial["number"] <= 2 and not mark.exists():
        mark.touch()
        if trial["number"] == 1:
            raise MemoryError("no memory is left\nfor this")
        os.kill(os.getpid(), signal.SIGKILL)
    return train_trial(trial, search, root, data)


if __name__ == "__main__":
    search.run_trial = run_trial
    utils.run_script(search.main)
