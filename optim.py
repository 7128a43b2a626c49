"""What moves the weights: SGD or Muon, the learning rate of every step, and their average."""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

ADAM_BETAS = (0.9, 0.95)


def make_optimizers(
    model: nn.Module,
    optimizer: str,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    adam_lr: float,
    dtype: torch.dtype = torch.float32,
) -> list[torch.optim.Optimizer]:
    """`sgd` for all parameters; or `muon` for the convolutions' and Adam for the rest.

    Nesterov's momentum and weight decay are SGD's alone, and Muon multiplies matrices in `dtype`.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if optimizer == "sgd":
        options = {"weight_decay": weight_decay, "nesterov": nesterov, "fused": True}
        return [torch.optim.SGD(parameters, lr, momentum, **options)]
    filters = [p for p in parameters if p.ndim == 4]
    others = [p for p in parameters if p.ndim < 4]  # of batch normalisation and the linear layer
    adam = torch.optim.Adam(others, adam_lr, ADAM_BETAS, fused=True)
    return [Muon(filters, lr, momentum, dtype), adam]


def lr_factor(
    step: int,
    steps_per_epoch: int,
    epochs: int,
    schedule: str,
    warmup_epochs: int,
    restart_epochs: int,
) -> float:
    """The learning rate of a step (from 0, over all epochs), as a fraction of that at the start.

    `linear` falls by the step; `cosine` and `cosine_restarts` by whole epochs, as SGDR has it
    (Loshchilov & Hutter, arXiv:1608.03983). Before, it rises to 1 in `warmup_epochs`.
    """
    epoch = step / steps_per_epoch - warmup_epochs
    if epoch < 0:
        return (step + 1) / (warmup_epochs * steps_per_epoch)
    annealed_epochs = epochs - warmup_epochs
    if schedule == "linear":
        return 1 - epoch / annealed_epochs
    period = annealed_epochs if schedule == "cosine" else restart_epochs
    return (1 + math.cos(math.pi * (int(epoch) % period) / period)) / 2


def make_average(model: nn.Module, decay: float) -> AveragedModel:
    """The exponential moving average of a network's weights and BN statistics.

    With each step it keeps `decay` of itself and takes the rest from the network.
    """
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


class Muon(torch.optim.Optimizer):
    """Momentum on convolution filters, with every update made orthogonal.

    A layer's (O, I, K, K) weights are one matrix of O rows. Its update, with Nesterov momentum, is
    replaced by the nearest matrix whose singular values are all about 1, so that every direction
    learns at one pace (Jordan et al., kellerjordan.github.io/posts/muon, 2024). The weights are
    kept at the norm sqrt(O): batch normalisation makes the loss blind to their scale, so `lr` is
    how far they turn in a step, and weight decay would only be another learning rate.

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
            same_shape = defaultdict(list)  # of a deep network's layers many are: a GPU likes it
            for weight in group["params"]:
                if weight.grad is None:  # it is frozen
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
                    weight.add_(update.view_as(weight), alpha=-group["lr"])


def orthogonalize(matrices: Tensor) -> Tensor:
    """(N, R, C) matrices with the same singular vectors, their singular values moved to about 1.

    Three Newton-Schulz steps of a quintic in the matrix; its coefficients, of Jordan's, climb fast
    from 0 and leave the values between 0.5 and 1.5, which is enough.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalize(matrices.mT).mT  # the smaller of the two Gram matrices
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(3):
        gram = x @ x.mT
        quadratic = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, quadratic, x, beta=3.4445)
    return x
