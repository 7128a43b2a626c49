"""Convolution and batch normalization that train faster on some CPUs.

A network is made of PyTorch's own layers. While `FasterLayers` is entered, as the Learner does for
its forward pass, the two functions below stand in for `F.conv2d` and `F.batch_norm` on the shapes
for which they were measured to be faster (studies/small_maps.py). The layers stay what they are.
"""

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

FOLD = 4  # pixels that FoldedBatchNorm treats as one
FOLDED_CHANNELS = (24,)  # numbers of channels at which it was measured to be faster
HAS_AMX = bool(torch.cpu.get_capabilities().get("amx_bf16"))  # the CPU has bfloat16 tiles


class FasterLayers(TorchFunctionMode):
    """Within the block, train convolutions and batch normalization by the faster functions.

    For all else PyTorch's own are called. The gradients have no derivatives of their own: a second
    backward pass through them raises RuntimeError.
    """

    def __torch_function__(
        self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        """Call the faster function where it is suited, else `function` itself."""
        kwargs = kwargs or {}
        if function is F.conv2d and not kwargs and MatmulConv.is_suited(*args):
            x, weight, *_ = args
            return MatmulConv.apply(x, weight.to(x.dtype))
        if function is F.batch_norm and FoldedBatchNorm.is_suited(*args, **kwargs):
            return folded_batch_norm(*args, **kwargs)
        return function(*args, **kwargs)


class MatmulConv(torch.autograd.Function):
    """A convolution of small maps of many channels by matrix products.

    oneDNN is slow at them on CPUs with AMX, most of all at the gradient of the weights: a 3x3
    convolution of 3x3 pixels and 384 channels takes three times as long in all.
    """

    @staticmethod
    def is_suited(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
    ) -> bool:
        """True where this is faster than PyTorch, for the arguments of F.conv2d."""
        kernel, is_square = weight.shape[-1], weight.shape[-1] == weight.shape[-2]
        # The patches of kernels over 3x3 would take too much memory.
        keeps_size = kernel in (1, 3) and padding == (kernel // 2,) * 2 and stride == (1, 1)
        is_plain = is_square and keeps_size and bias is None and dilation == (1, 1) and groups == 1
        is_small = x.shape[1] >= 96 and x.shape[-1] <= 7
        on_amx = HAS_AMX and x.dtype == torch.bfloat16 and x.device.type == "cpu"
        return on_amx and is_plain and is_small and x.shape[-1] == x.shape[-2]

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:
        """(N, I, S, S) and (O, I, K, K) to (N, O, S, S)."""
        ctx.save_for_backward(x, weight)
        return convolve(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of `x` and `weight`, from that of the output."""
        x, weight = ctx.saved_tensors
        rows = grad.permute(0, 2, 3, 1).flatten(0, 2)  # (N * S * S, O)
        products = [rows.T @ view.flatten(0, 2) for view in shifted(x, weight.shape[-1])]
        grad_weight = torch.stack(products, dim=-1).view_as(weight)
        return convolve(grad, weight.transpose(0, 1).flip(2, 3)), grad_weight


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """F.conv2d with padding that keeps the size, as one matrix product where that is faster."""
    kernel, size = weight.shape[-1], x.shape[-1]
    if x.shape[1] < 256 or size > 5:
        return F.conv2d(x, weight, padding=kernel // 2)
    patches = torch.cat(list(shifted(x, kernel)), dim=-1).flatten(0, 2)
    product = patches @ weight.permute(2, 3, 1, 0).flatten(0, 2)
    return product.view(len(x), size, size, -1).permute(0, 3, 1, 2)


def shifted(x: Tensor, kernel: int) -> Iterator[Tensor]:
    """The padded (N, I, S, S), shifted to each of the kernel**2 taps of a filter: (N, S, S, I)."""
    size = x.shape[-1]
    padded = F.pad(x, (kernel // 2,) * 4).permute(0, 2, 3, 1)
    for i, j in itertools.product(range(kernel), repeat=2):
        yield padded[:, i : i + size, j : j + size]


def folded_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """F.batch_norm in training mode, by FoldedBatchNorm; updates the running statistics."""
    y, mean, var = FoldedBatchNorm.apply(x, weight, bias, eps)
    if running_mean is not None:
        pixels = x.numel() // len(mean)
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * (pixels / (pixels - 1)), momentum)
    return y


class FoldedBatchNorm(torch.autograd.Function):
    """Batch normalization of few channels, four pixels at a time as one of four times as many.

    PyTorch's takes twice as long on CPUs at 24 channels that come last in memory; at 16 channels
    PyTorch's is the faster one.
    """

    @staticmethod
    def is_suited(
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> bool:
        """True where this is faster than PyTorch, for the arguments of F.batch_norm."""
        if not training or weight is None or bias is None or x.ndim != 4:
            return False
        on_cpu = x.dtype == torch.bfloat16 and x.device.type == "cpu"
        is_foldable = x.shape[1] in FOLDED_CHANNELS and x.numel() % (FOLD * x.shape[1]) == 0
        return on_cpu and is_foldable and x.is_contiguous(memory_format=torch.channels_last)

    # With n values of a channel, mean m, variance v (biased) and s = (v + eps)^(-1/2):
    #     y = weight * (x - m) * s + bias
    # The folded channels are FOLD interleaved parts of each channel. Of the parts' means m_i and
    # variances v_i:  m = mean(m_i),  v = mean(v_i) + var(m_i).
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(N, C, S, S) to the same shape; and the mean and biased variance, (C,) each."""
        folded = fold(x)
        # Running statistics that are not used (momentum 0), given for their type alone: without
        # them PyTorch computes the statistics in bfloat16.
        unused = weight.new_zeros(2, FOLD * len(weight))
        means, variances = torch.batch_norm_update_stats(folded, *unused, momentum=0)
        means, variances = means.view(FOLD, -1), variances.view(FOLD, -1)
        mean, var = means.mean(0), variances.mean(0) + means.var(0, correction=0)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        y = torch.empty_like(x)  # written to, since a view could not go into an in-place ReLU
        torch.ops.aten.native_batch_norm.out(
            folded, *(v.repeat(FOLD) for v in (weight, bias, mean, var)), False, 0, eps,
            out=fold(y), save_mean=unused[0, :0], save_invstd=unused[1, :0],
        )  # fmt: skip
        return y, mean, var

    # With g = dL/dy, sums over the n values of a channel, and m and v depending on x:
    #     dL/dbias = sum(g),   dL/dweight = sum(g * (x - m)) * s
    #     dL/dx = weight * s * g  -  weight * s / n * (dL/dbias + (x - m) * s * dL/dweight)
    # The first term is the gradient at fixed statistics; the second is an affine function of x,
    # which F.batch_norm computes with -weight * s / n * (dL/dweight, dL/dbias) for weight and bias.
    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of `x`, `weight` and `bias`, from that of the output."""
        x, weight, mean, var = ctx.saved_tensors
        folded, repeated = fold(x), [v.repeat(FOLD) for v in (mean, var)]
        grad_x, *sums = torch.ops.aten.native_batch_norm_backward(
            fold(grad), folded, weight.repeat(FOLD), *repeated, None, None,
            False, ctx.eps, (ctx.needs_input_grad[0], True, True),
        )  # fmt: skip
        grad_weight, grad_bias = (v.view(FOLD, -1).sum(0) for v in sums)
        if ctx.needs_input_grad[0]:
            scale = -weight / (var + ctx.eps).sqrt() / (x.numel() // len(mean))
            parts = (v.repeat(FOLD) for v in (scale * grad_weight, scale * grad_bias))
            grad_x = unfold(grad_x.add_(F.batch_norm(folded, *repeated, *parts, eps=ctx.eps)), x)
        return grad_x, grad_weight, grad_bias, None


def fold(x: Tensor) -> Tensor:
    """(N, C, S, S) to (N * S * S / FOLD, FOLD * C), without a copy if the channels are last."""
    return x.permute(0, 2, 3, 1).reshape(-1, FOLD * x.shape[1])


def unfold(folded: Tensor, like: Tensor) -> Tensor:
    """The inverse of `fold`, to the shape of `like`."""
    return folded.view(like.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
