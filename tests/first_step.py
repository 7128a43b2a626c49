"""Loss and gradient norm of the demo's first step, one JSON line per batch size.

A helper of test_distributed.py. BN runs in eval mode: in training each process normalizes with its
own share of the batch, and the loss of two halves is not that of the whole.
"""

import contextlib
import json
import sys
from dataclasses import replace

import torch

from config import PRESETS
from data import load_dataset, train_batches
from engine import distributed
from learner import Learner


def main(batch_sizes):
    device = distributed.init_processes()
    digits = load_dataset(PRESETS["demo"]).to(device)
    for batch_size in map(int, batch_sizes):  # an odd one shares out unevenly
        config = replace(PRESETS["demo"], bfloat16=False, batch_size=batch_size)
        learner = Learner(config, digits, device)
        learner.model.eval()
        before = [p.detach().clone() for p in learner.model.parameters()]
        images, targets, n = next(train_batches(digits, config, 1))
        totals = distributed.all_reduce_sum(learner.step(images, targets, n))
        moved = [b - p.detach() for b, p in zip(before, learner.model.parameters(), strict=True)]
        change = torch.cat([m.flatten() for m in moved])  # lr times the gradient and the decay
        if distributed.is_main():
            loss, correct = (totals / n).tolist()
            result = {"processes": distributed.num_processes(), "loss": loss, "correct": correct}
            print(json.dumps(result | {"change": change.norm().item()}))


if __name__ == "__main__":
    main(sys.argv[1:])
    with contextlib.suppress(ValueError):  # of a single process; one left open may abort at exit
        torch.distributed.destroy_process_group()
