"""Count the weights that differ to the bit once a training has gone on from a saved state.

A helper of test_distributed.py. Two learners take the same steps, the second one from the third on.
"""

import copy
from dataclasses import replace

import torch

from config import PRESETS
from data import load_dataset, train_batches
from engine import distributed
from learner import Learner


def main():
    device = distributed.init_processes()
    config = replace(PRESETS["demo"], width=2, batch_size=62, train_size=300, lr=0.1)
    digits = load_dataset(config).to(device)
    whole, resumed = Learner(config, digits, device), None
    for step, (images, targets, n) in enumerate(train_batches(digits, config, 1)):
        if step == 3:
            resumed = Learner(config, digits, device)
            resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
        for learner in filter(None, (whole, resumed)):
            learner.step(images, targets, n)
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    differences = sum((one != other).sum() for one, other in pairs)
    if distributed.is_main():
        print(f"differences: {differences}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
