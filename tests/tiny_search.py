"""search.py with a space of tiny networks, and with trials that fail as the environment asks.

    FAULTS=two python tests/tiny_search.py demo --num-samples 6 --epochs 2

FAULTS=two: the first two trials fail once, each its own way. FAULTS=greedy: the first one takes
6 GB, and Ray is to kill it. FAULTS=full: none can write more than 2 kB, as if the disk were full.
"""

import os
import resource
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import script

import search
from trials import LogUniform

TINY = search.SPACE | {
    "num_blocks": (1, 2),
    "c1": range(2, 5),
    "conv_kernel": (1, 3),
    "lr": LogUniform(1e-4, 1.0),
    "optimizer": ("sgd",),
    "batch_size": (128, 256),
}
FAULTS = os.environ.get("FAULTS", "")
run_trial, train = search.run_trial, search.train


def run_faulty(trial, trials, root, data):
    """Run a trial whose training fails."""

    def train_faulty(config, *args):
        number = trial["number"]
        taken = []
        while FAULTS == "greedy" and number == 1 and len(taken) < 60:
            taken.append(b"x" * 100_000_000)
            time.sleep(0.05)
        mark = Path(root, f"failed-{number}")
        if FAULTS == "two" and number <= 2 and not mark.exists():
            mark.touch()
            if number == 1:
                raise MemoryError("no memory is left\nfor this")
            os.kill(os.getpid(), signal.SIGKILL)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if FAULTS == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        try:
            return train(config, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    search.train = train_faulty
    run_trial(trial, trials, root, data)


if __name__ == "__main__":
    if FAULTS:
        search.run_trial = run_faulty
    script.run_script(lambda args: search.main(args, TINY))
