"""What learns in a run: the network with all that moves it, and the proxy that picks its images."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

import distributed
from config import Config
from data import Dataset
from model import ResNet
from optim import lr_factor, make_average, make_optimizers
from utils import InputError, first_line

PROXY_INTERVAL = 4  # steps: a proxy learns from the first of as many
Batch = tuple[Tensor, Tensor, int]  # images, labels, size of the global batch


class Learner:
    """A network and all that moves it: optimizers, average, precision and criterion."""

    def __init__(
        self, config: Config, data: Dataset, device: torch.device, steps_per_epoch: int
    ) -> None:
        self.config, self.steps_per_epoch, self.steps = config, steps_per_epoch, 0
        self.model = make_model(config, data, device)
        self.ema = make_average(self.model, config.ema_decay) if config.ema_decay else None
        self.eval_model = self.ema.module if self.ema else self.model  # to be tested and saved
        self.parallel = distributed.wrap_ddp(self.model)
        self.autocast = distributed.make_autocast(device, config.bfloat16)
        self.criterion = nn.CrossEntropyLoss(
            reduction="sum", label_smoothing=config.label_smoothing
        )
        self.optimizers = make_optimizers(
            self.model,
            config.optimizer,
            config.lr,
            config.momentum,
            config.nesterov,
            config.weight_decay,
            config.adam_lr,
            distributed.compute_dtype(device, config.bfloat16),
        )
        self.rates = (config.lr, config.adam_lr)[: len(self.optimizers)]

    @property
    def lr(self) -> float:
        """Learning rate of the next step, of SGD or Muon."""
        return self.rates[0] * self.lr_factor

    @property
    def lr_factor(self) -> float:
        """The same for all optimizers, as a fraction of their rates at the start."""
        c = self.config
        annealing = (c.epochs, c.schedule, c.warmup_epochs, c.restart_epochs)
        return lr_factor(self.steps, self.steps_per_epoch, *annealing)

    def step(self, images: Tensor, labels: Tensor, n: int) -> Tensor:
        """Learn from this process's share of a global batch of `n` images.

        Returns the summed loss and how many were right, (2,), left on the device.
        """
        logits = self.forward(images)
        loss = self.criterion(logits, labels)
        # DDP averages the gradients over the processes. Scaled like this, their mean is that of
        # the mean loss over the global batch, even where its images do not share out evenly.
        self.update(loss * distributed.num_processes() / n)
        return torch.stack([loss.detach(), (logits.argmax(1) == labels).sum()])

    def forward(self, images: Tensor) -> Tensor:
        """(N, num_classes) float32 logits of (N, 3, S, S) normalised images."""
        with self.autocast:
            return self.parallel(images).float()

    def update(self, loss: Tensor) -> None:
        """Move the weights along the gradient of `loss`."""
        loss.backward()
        factor = self.lr_factor
        for optimizer, lr in zip(self.optimizers, self.rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            optimizer.step()
        self.model.zero_grad()  # here, since the end of the next forward pass is the memory's peak
        if self.ema:
            self.ema.update_parameters(self.model)
        self.steps += 1

    def synchronize_buffers(self) -> None:
        """Give every process the main one's BN statistics."""
        distributed.synchronize_buffers(self.model)
        if self.ema:
            distributed.synchronize_buffers(self.ema.module)

    def state_dict(self) -> dict[str, object]:
        """All that changes while it learns."""
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "ema": self.ema and self.ema.state_dict(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Be as when `state` was taken."""
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
            for weight, kept in optimizer.state.items():
                for name, value in kept.items():
                    if isinstance(value, Tensor) and value.shape == weight.shape:
                        # Laid out as the weight is: fused updates pair the two by their memory.
                        kept[name] = torch.empty_like(weight).copy_(value)
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        self.steps = state["steps"]


class Proxy:
    """A narrow copy of the network (width 1) that picks the images worth a step of the network.

    It looks at every batch and learns from every fourth (PROXY_INTERVAL), from what it picks: the
    images of the largest loss. Late in a training most are easy and would teach the network little
    (Jordan, airbench96_faster, github.com/KellerJordan/cifar10-airbench, 2024).
    """

    def __init__(
        self, config: Config, data: Dataset, device: torch.device, steps_per_epoch: int
    ) -> None:
        narrow = replace(config, width=1, ema_decay=0.0)
        self.learner = Learner(narrow, data, device, steps_per_epoch)
        self.keep_fraction = config.keep_fraction
        self.criterion = nn.CrossEntropyLoss(
            reduction="none", label_smoothing=config.label_smoothing
        )
        self.state_dict = self.learner.state_dict
        self.load_state_dict = self.learner.load_state_dict

    def hardest(self, batches: Iterable[Batch], first_step: int = 0) -> Iterator[Batch]:
        """An epoch's batches, of each the fraction with the largest loss, hardest first.

        The first one is the epoch's batch number `first_step`. Under torchrun every process picks
        from its own share.
        """
        for step, (images, labels, n) in enumerate(batches, start=first_step):
            learns = step % PROXY_INTERVAL == 0
            with torch.set_grad_enabled(learns):
                losses = self.criterion(self.learner.forward(images), labels)
                losses, chosen = losses.topk(self.kept(len(labels)))
            processes = distributed.num_processes()
            shares = (len(range(rank, n, processes)) for rank in range(processes))
            n = sum(map(self.kept, shares))
            if learns:
                self.learner.update(losses.sum() * processes / n)  # scaled as in Learner.step
            else:
                self.learner.steps += 1
            yield images[chosen], labels[chosen], n

    def kept(self, num_images: int) -> int:
        """How many of `num_images` are trained on, at least one."""
        return max(1, round(self.keep_fraction * num_images))


def make_model(config: Config, data: Dataset, device: torch.device) -> ResNet:
    """The network with its initial weights, as the seed has them."""
    torch.manual_seed(config.seed)
    model = ResNet(config)
    model.to(device, memory_format=memory_format(model, device))
    if config.stem == "whitening":
        model.set_whitening(data.normalize(data.train.images[:5000]))
    if config.compile:
        check_compiler(device)
        # With CUDA graphs on a GPU, where launching the kernels takes time. A code for every shape:
        # one for all would be slower. A network and its proxy, which share `forward`, have more
        # than the 8 that are allowed: each with and without gradients, whole and last batches.
        torch._dynamo.config.recompile_limit = 64
        mode = "reduce-overhead" if device.type == "cuda" else "default"
        model.compile(mode=mode, dynamic=False)
    return model


def memory_format(model: nn.Module, device: torch.device) -> torch.memory_format:
    """Channels last, which is faster, except where oneDNN cannot do it.

    On a CPU with AVX2 alone, the gradient of its strided 1x1 convolution of fewer than 8 channels
    writes past the end of its memory (github.com/uxlfoundation/oneDNN/issues/6035).
    """
    fatal = any(
        conv.kernel_size == (1, 1) and conv.stride != (1, 1) and conv.in_channels < 8
        for conv in model.modules()
        if isinstance(conv, nn.Conv2d)
    )
    return torch.contiguous_format if fatal and device.type == "cpu" else torch.channels_last


def check_compiler(device: torch.device) -> None:
    """Raise InputError if torch.compile does not work here, of which the network would say more."""
    try:
        torch.compile(torch.sin)(torch.zeros(1, device=device))
    except Exception as error:  # whatever it lacks
        raise InputError(
            f"compile: torch.compile does not work here ({first_line(error)}); install what it"
            " lacks, on a CPU a C++ compiler, or use --no-compile"
        ) from None
