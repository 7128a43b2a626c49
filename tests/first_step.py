"""Loss and gradient norm of the demo's first step, one JSON line per batch size.

A helper of test_distributed.py.

BN runs in eval mode: in training each process normalises with its own share of the batch, and
the loss of two halves is not that of the whole.
"""

import script

import json
from dataclasses import replace

import torch

import distributed
from augment import Augmentation, train_batches
from config import PRESETS
from data import load_dataset
from learner import Learner


def main(batch_sizes):
    device = distributed.init_processes()
    digits = load_dataset("digits").to(device)
    config = replace(PRESETS["demo"], bfloat16=False)
    for batch_size in map(int, batch_sizes):  # an odd one shares out unevenly
        learner = Learner(config, digits, device, steps_per_epoch=1)
        learner.model.eval()
        before = [p.detach().clone() for p in learner.model.parameters()]
        augmentation = Augmentation(0, "zeros", 5.0, "none", 0)
        images, labels, n = next(train_batches(digits, augmentation, batch_size, 0, 1))
        totals = distributed.all_reduce_sum(learner.step(images, labels, n))
        moved = [b - p.detach() for b, p in zip(before, learner.model.parameters(), strict=True)]
        change = torch.cat([m.flatten() for m in moved])  # lr times the gradient and the decay
        if distributed.is_main():
            loss, correct = (totals / n).tolist()
            result = {"processes": distributed.num_processes(), "loss": loss, "correct": correct}
            print(json.dumps(result | {"change": change.norm().item()}))


if __name__ == "__main__":
    script.run_script(main)  # which ends the process group: a process that leaves it open may abort
