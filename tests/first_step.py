"""Loss and gradient norm of the demo's first step with ASAM, one JSON line per batch size.

A helper of test_distributed.py.

BN runs in eval mode: in training each process normalises with its own share of the batch, and
the loss of two halves is not that of the whole.
"""

import itertools
import json

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import train
import utils
from data import Augmentation, load_dataset, train_batches
from model import ResNet


def main(batch_sizes):
    device, rank, world_size = utils.init_processes()
    digits = load_dataset("digits").to(device)
    for batch_size in map(int, batch_sizes):  # an odd one shares out unevenly
        torch.manual_seed(0)
        model = ResNet(**train.PRESETS["demo"].architecture()).to(device).eval()
        parallel = DistributedDataParallel(model) if world_size > 1 else model
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.1)]
        criterion = torch.nn.CrossEntropyLoss(reduction="sum")
        float32 = torch.autocast(device.type, enabled=False)
        augmentation = Augmentation(0, "zeros", 5.0, "none", 0)
        batches = train_batches(digits, augmentation, batch_size, 0, 1, rank, world_size)
        one = itertools.islice(batches, 1)
        progress, bar = train.Progress(), tqdm(disable=True)
        train.train_one_epoch(
            parallel, criterion, optimizers, [], one, float32, progress, bar, asam=0.5
        )
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        if rank == 0:
            result = {"processes": world_size, "loss": progress.mean_loss}
            result |= {"accuracy": progress.accuracy}
            result |= {"gradient": gradient.norm().item(), "weights": weights.norm().item()}
            print(json.dumps(result))


if __name__ == "__main__":
    utils.run_script(main)  # which ends the process group: a process that leaves it open may abort
