"""One training step: a network with its optimizers, learning rate and average; and the proxy."""

import contextlib
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from config import Config, steps_per_epoch
from data import Batch, Dataset
from engine import distributed
from engine.layers import FasterLayers
from engine.recorded import Recorded
from engine.start import Start
from model import ResNet, num_parameters
from utils import InputError, derive_seed, first_line, warn

ADAM_BETAS = (0.9, 0.95)
PROXY_INTERVAL = 4  # steps; a proxy learns from the first of as many


class Learner:
    """A network, and all that changes while it learns.

    Attributes:
        model: the network that is trained.
        eval_model: the network to be tested and saved: the average if there is one, else `model`.

    Args:
        start: the weights to start from, instead of random ones.
    """

    def __init__(
        self, config: Config, data: Dataset, device: torch.device, start: Start | None = None
    ) -> None:
        self.config, self.steps = config, 0
        self.steps_per_epoch = steps_per_epoch(config, len(data.train))
        self.model = make_model(config, data, device)
        if start:
            start.fill(self.model, data.class_names)
        distributed.synchronize(self.model)
        self.ema = AveragedModel(self.model) if config.ema_decay else None
        self.eval_model = self.ema.module if self.ema else self.model
        dtype = distributed.compute_dtype(device, config.bfloat16)
        self.autocast = distributed.make_autocast(device, config.bfloat16)
        faster = device.type == "cpu" and dtype == torch.bfloat16 and not config.compile
        self.faster_layers = FasterLayers() if faster else contextlib.nullcontext()
        self.optimizers = make_optimizers(self.model, config, dtype)
        self.rates = (config.lr, config.adam_lr)[: len(self.optimizers)]
        self.recorded = Recorded(self._learn)

    @property
    def lr(self) -> float:
        """Learning rate of SGD or Muon in the next step."""
        return self.config.lr * lr_factor(self.config, self.steps, self.steps_per_epoch)

    def step(self, images: Tensor, targets: Tensor, n: int) -> Tensor:
        """Learn from this process's share of a global batch of `n` images.

        Args:
            targets: a probability for each class, (N, num_classes).

        Returns:
            The summed cross entropy, and how many predictions are the most probable class of their
            target, (2,), left on the device.
        """
        self.begin_step()
        (totals,) = self.recorded(images, targets, n)
        if self.ema:
            update_average(self.ema, self.model, self.config.ema_decay)
        self.steps += 1
        return totals

    def begin_step(self) -> None:
        """Seed the dropout and set the learning rates, by the number of steps so far."""
        epoch, step = divmod(self.steps, self.steps_per_epoch)
        # Reseeded in every step, so that dropout, like the batches, needs no saved state.
        key = (self.config.seed, epoch + 1, step, distributed.rank())
        torch.manual_seed(derive_seed("dropout", *key))
        factor = lr_factor(self.config, self.steps, self.steps_per_epoch)
        for optimizer, lr in zip(self.optimizers, self.rates, strict=True):
            set_lr(optimizer, lr * factor)

    def _learn(self, images: Tensor, targets: Tensor, n: int) -> tuple[Tensor]:
        logits = self.forward(images)
        loss = F.cross_entropy(logits, targets, reduction="sum")
        self.update(loss / n)  # its gradients are summed over the processes
        return (torch.stack([loss.detach(), (logits.argmax(1) == targets.argmax(1)).sum()]),)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) normalized images to (N, num_classes) float32 logits, in training mode."""
        with self.autocast, self.faster_layers:
            return self.model(images).float()

    def update(self, loss: Tensor) -> None:
        """Step against the gradient of `loss`, summed over all processes."""
        try:
            loss.backward()
            distributed.sum_gradients(self.model)
            for optimizer in self.optimizers:
                optimizer.step()
        finally:  # also after a failed recording, which leaves gradients without values
            self.model.zero_grad()  # here, before memory peaks at the end of the next forward pass

    def synchronize(self) -> None:
        """Copy the network of the main process to all: BN statistics differ between them."""
        distributed.synchronize(self.model)
        if self.ema:
            distributed.synchronize(self.ema.module)

    def state_dict(self) -> dict[str, object]:
        """Everything that changes while it learns."""
        return {
            "model": self.model.state_dict(),
            "optimizers": [{"state": o.state_dict()["state"]} for o in self.optimizers],
            "ema": self.ema and self.ema.state_dict(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Restore the state returned by `state_dict`."""
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            # The constants are those of this run and device, where a learning rate may be a tensor.
            constants = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict(saved | {"param_groups": constants})
            for weight, kept in optimizer.state.items():
                for name, value in kept.items():
                    if isinstance(value, Tensor) and value.shape == weight.shape:
                        # Fused updates need the memory layout of the weight.
                        kept[name] = torch.empty_like(weight).copy_(value)
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        self.steps = state["steps"]


class Proxy:
    """A narrow copy of the network (width 1) that picks the hardest images of every batch.

    It classifies every batch, picks the images of the largest loss, and learns from those of every
    fourth batch (PROXY_INTERVAL). Late in a training most images are easy and would teach the
    network little (Jordan, airbench96_faster, github.com/KellerJordan/cifar10-airbench, 2024).
    """

    def __init__(self, config: Config, data: Dataset, device: torch.device) -> None:
        narrow = replace(config, width=1, channels=(), ema_decay=0.0)
        # A proxy costs about 1.5 forward passes of every batch; training on the kept images, three.
        if config.keep_fraction >= 0.5 and num_parameters(narrow) >= num_parameters(config):
            warn(
                f"keep_fraction: {config.keep_fraction} saves no time, since the proxy, of width 1,"
                " is no smaller than this network; 1 trains on all images"
            )
        self.learner = Learner(narrow, data, device)
        self.keep_fraction = config.keep_fraction
        self.criterion = nn.CrossEntropyLoss(
            reduction="none", label_smoothing=config.label_smoothing
        )
        self.recorded = Recorded(self._pick)
        self.state_dict = self.learner.state_dict
        self.load_state_dict = self.learner.load_state_dict

    def hardest(self, batches: Iterable[Batch], first_step: int = 0) -> Iterator[Batch]:
        """Yield the fraction of each batch with the largest loss, hardest first.

        Under torchrun every process picks from its own share.

        Args:
            first_step: number of the first batch in its epoch, from 0.
        """
        processes = distributed.num_processes()
        for step, (images, targets, n) in enumerate(batches, start=first_step):
            shares = (len(range(rank, n, processes)) for rank in range(processes))
            n = sum(map(self.kept, shares))
            self.learner.begin_step()
            hardest = self.recorded(images, targets, n, step % PROXY_INTERVAL == 0)
            self.learner.steps += 1
            yield *hardest, n

    def _pick(self, images: Tensor, targets: Tensor, n: int, learns: bool) -> tuple[Tensor, Tensor]:
        with torch.set_grad_enabled(learns):
            losses = self.criterion(self.learner.forward(images), targets.argmax(1))
            losses, chosen = losses.topk(self.kept(len(targets)))
        if learns:
            self.learner.update(losses.sum() / n)
        return images[chosen], targets[chosen]

    def kept(self, num_images: int) -> int:
        """How many of `num_images` are kept, at least one."""
        return max(1, round(self.keep_fraction * num_images))


# ---------------------------------------------------------------- the network


def make_model(config: Config, data: Dataset, device: torch.device) -> ResNet:
    """Build the network with the initial weights of its seed."""
    torch.manual_seed(config.seed)
    model = ResNet(config)
    model.to(device, memory_format=memory_format(model, device))
    if config.stem == "whitening":
        model.set_whitening(data.normalize(data.train.images[:5000] / 255))
    if config.compile:
        check_compiler(device)
        # Code for every shape, which is faster than code for all, is more than the default limit of
        # 8 pieces. On GPUs block by block, since identical blocks are compiled once; on CPUs that
        # is slower than no compilation, and the whole network faster.
        torch._dynamo.config.recompile_limit = 64
        on_cpu = device.type == "cpu"
        for module in [model] if on_cpu else itertools.chain.from_iterable(model.stages):
            module.compile(dynamic=False)
    return model


def memory_format(model: nn.Module, device: torch.device) -> torch.memory_format:
    """Channels last, which is faster, except where PyTorch has a bug.

    On Apple's GPUs, the gradients of batch normalization are wrong in versions before 2.14, and
    those of poolings can end the process (github.com/pytorch/pytorch/issues/175189 and 175190). On
    CPUs with AVX2 alone, the gradient of a strided 1x1 convolution of fewer than 8 channels
    writes past the end of its memory (github.com/uxlfoundation/oneDNN/issues/6035).
    """
    fatal = any(
        conv.kernel_size == (1, 1) and conv.stride != (1, 1) and conv.in_channels < 8
        for conv in model.modules()
        if isinstance(conv, nn.Conv2d)
    )
    contiguous = device.type == "mps" or (fatal and device.type == "cpu")
    return torch.contiguous_format if contiguous else torch.channels_last


def check_compiler(device: torch.device) -> None:
    """Raise InputError if torch.compile does not work here."""
    try:
        torch.compile(torch.sin)(torch.zeros(1, device=device))
    except Exception as error:  # it depends on what is missing
        raise InputError(
            f"compile: torch.compile does not work here ({first_line(error)}); install what it"
            " needs, on a CPU a C++ compiler, or use --no-compile"
        ) from None


# ---------------------------------------------------------------- the optimizers


def make_optimizers(
    model: nn.Module, config: Config, dtype: torch.dtype = torch.float32
) -> list[torch.optim.Optimizer]:
    """`sgd` for all parameters; or `muon` for the convolutions and Adam for the rest.

    `nesterov` and `weight_decay` apply to SGD alone. Muon multiplies matrices in `dtype`.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    on_gpu, lr, adam_lr = parameters[0].is_cuda, config.lr, config.adam_lr
    if on_gpu:  # tensors, which a CUDA graph reads anew in every step
        lr, adam_lr = (torch.tensor(rate, device=parameters[0].device) for rate in (lr, adam_lr))
    if config.optimizer == "sgd":
        decayed = [p for p in parameters if config.decay_norms or p.ndim > 1]
        others = [p for p in parameters if not (config.decay_norms or p.ndim > 1)]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}]
        if others:
            groups.append({"params": others})
        return [torch.optim.SGD(groups, lr, config.momentum, nesterov=config.nesterov, fused=True)]
    filters = [p for p in parameters if p.ndim == 4]
    others = [p for p in parameters if p.ndim < 4]  # of batch normalization and the linear layer
    adam = torch.optim.Adam(others, adam_lr, ADAM_BETAS, fused=True, capturable=on_gpu)
    return [Muon(filters, lr, config.momentum, dtype), adam]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of the next step, in place if it is a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def lr_factor(config: Config, step: int, steps_per_epoch: int) -> float:
    """The learning rate of a step as a fraction of its constant (`lr`, `adam_lr`).

    It rises to 1 in the warm-up. After that `linear` falls to 0 by the step, and `cosine` and
    `cosine_restarts` by whole epochs, as in the paper's code (in SGDR, whose restarts these are, by
    the step; Loshchilov & Hutter, arXiv:1608.03983).

    Args:
        step: from 0, over all epochs.
    """
    epoch = step / steps_per_epoch - config.warmup_epochs
    if epoch < 0:
        return (step + 1) / (config.warmup_epochs * steps_per_epoch)
    annealed_epochs = config.epochs - config.warmup_epochs
    if config.schedule == "linear":
        return 1 - epoch / annealed_epochs
    period = annealed_epochs if config.schedule == "cosine" else config.restart_epochs
    return (1 + math.cos(math.pi * (int(epoch) % period) / period)) / 2


@torch.no_grad()
def update_average(ema: AveragedModel, model: nn.Module, decay: float) -> None:
    """Take a step's weights and BN statistics into their exponential moving average.

    It keeps `decay` of itself and takes the rest from the network. At first it keeps less,
    (1 + n) / (10 + n) after n steps, or a short training would test its random initial weights (as
    TensorFlow's ExponentialMovingAverage with `num_updates`).

    AveragedModel.update_parameters would wait for a GPU twice in every step.
    """
    n = int(ema.n_averaged)  # which stays on the CPU
    kept = min(decay, (1 + n) / (10 + n)) if n else 0.0
    average, current = (
        [t for t in (*m.parameters(), *m.buffers()) if t.is_floating_point()]
        for m in (ema.module, model)
    )
    get_ema_multi_avg_fn(kept)(average, current, None)
    ema.n_averaged += 1


class Muon(torch.optim.Optimizer):
    """Momentum on convolution filters, with orthogonalized updates.

    The (O, I, K, K) weights of a layer are one matrix of O rows. Its update, with Nesterov
    momentum, is replaced by a matrix with the same singular vectors and singular values of about 1,
    so that all directions learn at the same pace (Jordan et al., kellerjordan.github.io/posts/muon,
    2024).
    The weights are kept at the norm sqrt(O). The loss does not depend on their scale, because batch
    normalization follows; so `lr` is the angle of a step, and weight decay would only be another
    learning rate.

    torch.optim.Muon takes matrices alone and does not hold the norm.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        """Update all filters from their gradients."""
        for group in self.param_groups:
            same_shape = defaultdict(list)  # orthogonalized together, which is faster on a GPU
            for weight in group["params"]:
                if weight.grad is None:  # frozen
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                velocity = state["momentum_buffer"].mul_(group["momentum"]).add_(weight.grad)
                update = weight.grad.add(velocity, alpha=group["momentum"])
                same_shape[weight.shape].append((weight, update))
            for pairs in same_shape.values():
                weights, updates = zip(*pairs, strict=True)
                matrices = torch.stack(updates).flatten(2).to(self.dtype)
                for weight, update in zip(weights, orthogonalize(matrices), strict=True):
                    weight.mul_(len(weight) ** 0.5 / weight.norm())
                    if isinstance(lr := group["lr"], Tensor):
                        weight.sub_(update.view_as(weight).float() * lr)
                    else:  # rounds once
                        weight.add_(update.view_as(weight), alpha=-lr)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Move the singular values of (N, R, C) matrices to about 1 and keep the singular vectors.

    Three Newton-Schulz steps of a quintic polynomial. With Jordan's coefficients it rises fast from
    0: values over about 1% of the matrix's norm end between 0.5 and 1.2, which is enough, and
    smaller ones grow up to 41-fold.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalize(matrices.mT).mT  # the smaller of the two Gram matrices
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(3):
        gram = x @ x.mT
        quadratic = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, quadratic, x, beta=3.4445)
    return x
