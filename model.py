"""TPSNet: residual networks of at most 5 million parameters for 32x32 images.

`ResNet` has the six choices that the paper leaves free, in its numbering:

1. the number of residual layers, here called stages: how many values `num_blocks` has
2. the number of blocks in layer i: `num_blocks`
3. the number of channels in layer i: `channels`, or by `c1` and `width`
4. the kernel size of the convolutions in layer i: `conv_kernel`
5. the kernel size of the skip connections in layer i: `skip_kernel`
6. the kernel size of the average pooling: `pool_kernel`

The networks of `python train.py NAME`, for CIFAR-10:

| name   | num_blocks   | c1 | parameters |
|--------|--------------|----|------------|
| tpsnet | (13, 13, 13) | 16 |  4,959,770 |
| model1 | (3, 3, 3)    | 34 |  4,865,580 |
| model2 | (7, 7, 7)    | 22 |  4,971,680 |
| fast   | (1, 1, 1)    | 24 |  4,342,042 |
| small  | (1, 1, 1)    | 24 |  1,092,922 |
| best   | (3, 3, 3)    | 64 |  4,327,754 |
| tiny   | (3, 3, 3)    | 16 |    272,474 |

The first stage is twice as wide as C1; in `fast` four times as wide, in `best` and `tiny` as wide.
The stem of `fast` and `small` is a frozen whitening convolution, and their stages begin with
pooling.

`Architecture` documents each choice. `model_cost` computes parameters, multiply-accumulates and
activation memory of any architecture without allocating it.
"""

import bisect
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils import IMAGE_SIZE, InputError, Range, check_fields, part_of

MAX_PARAMS = 5_000_000  # the project's budget
WHITENING_C1 = 24  # filters of a whitening stem: 12 for patches of 2x2 pixels, and their negatives


@dataclass(frozen=True)
class Architecture:
    """The choices that define a network: the paper's six, and five more.

    The defaults are TPSNet.
    """

    num_blocks: Annotated[tuple[int, ...], Range(1, 500)] = (13, 13, 13)
    """Residual blocks in each of the 1 to 4 stages."""
    c1: Annotated[int, Range(1, 4096)] = 16
    """Channels after the stem (C1)."""
    width: Annotated[int, Range(1, 64)] = 2
    """Channels of the first stage, as a multiple of C1; each further stage doubles them."""
    channels: Annotated[tuple[int, ...], Range(1, 4096)] = ()
    """Channels of each stage, one number per stage, instead of what C1 and width give."""
    conv_kernel: Annotated[int | tuple[int, ...], Range(1, 31)] = 3
    """Kernel size of the blocks' convolutions, odd; one for all stages or one per stage."""
    skip_kernel: Annotated[int | tuple[int, ...], Range(1, 31)] = 1
    """Odd kernel size of the projection shortcuts, one or one per stage; `pool` has none."""
    pool_kernel: Annotated[int, Range(1)] = 8
    """Window of the average pooling, in pixels of the last feature map (8x8 for 3 stages)."""
    dropout: Annotated[float, Range(0, 0.99)] = 0.0
    """Probability of dropping an activation between the two convolutions of a block."""
    classifier_dropout: Annotated[float, Range(0, 0.99)] = 0.0
    """Probability of dropping a feature before the classifier, the last layer."""
    stem: Literal["conv", "whitening"] = "conv"
    """The first layer: a trained 3x3 convolution, or a frozen 2x2 whitening one (C1 = 24)."""
    downsample: Literal["stride", "pool"] = "stride"
    """Halve the resolution by a stride, or begin every stage with a convolution and max pooling."""
    num_classes: Annotated[int, Range(2, 100_000)] = 10
    """Classes: those of the data; train.py refuses this option."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, list):  # of a notebook or of JSON: the same as a tuple
                object.__setattr__(self, name, tuple(value))


class BasicBlock(nn.Module):
    """conv-BN-ReLU-dropout-conv-BN, plus the shortcut, then ReLU (He et al., arXiv:1512.03385).

    The shortcut is the identity, or a convolution with BN where the shape changes.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        conv_kernel: int,
        skip_kernel: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, channels, conv_kernel, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv(channels, channels, conv_kernel)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU(inplace=True)
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                conv(in_channels, channels, skip_kernel, stride), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, S, S) to (N, channels, S / stride, S / stride)."""
        out = self.dropout(self.relu1(self.bn1(self.conv1(x))))
        out = self.bn2(self.conv2(out))
        return self.relu2(out + self.shortcut(x))


class ResNet(nn.Module):
    """A stem to `c1` channels, one stage per entry of `num_blocks`, pooling, one linear layer.

    A stage has its number of `channels`, or without them `width * c1 * 2**i`, i from 0. A whitening
    stem is a frozen 2x2 convolution, filled by `set_whitening`, that removes the correlations of
    neighboring pixels. With `downsample="pool"` no block works at full resolution.

    Raises:
        InputError: the architecture cannot be built; the message names the field.
    """

    def __init__(self, architecture: Architecture = Architecture()) -> None:
        super().__init__()
        check_architecture(architecture)
        # Kept, because a saved model records its architecture.
        self.architecture = a = part_of(architecture, Architecture)
        conv_kernels = per_stage(a.conv_kernel, len(a.num_blocks))
        skip_kernels = per_stage(a.skip_kernel, len(a.num_blocks))

        if a.stem == "whitening":
            self.conv1 = nn.Conv2d(3, a.c1, kernel_size=2, bias=False).requires_grad_(False)
        else:
            self.conv1 = conv(3, a.c1, kernel_size=3)
        self.bn1 = nn.BatchNorm2d(a.c1)
        self.relu = nn.ReLU(inplace=True)
        stages, in_channels = [], a.c1
        for i, channels in enumerate(stage_channels(a)):
            blocks, conv_kernel, skip_kernel = [], conv_kernels[i], skip_kernels[i]
            if a.downsample == "pool":
                blocks.append(PooledConv(in_channels, channels, conv_kernel))
                in_channels = channels
            for j in range(a.num_blocks[i]):
                stride = 2 if a.downsample == "stride" and i > 0 and j == 0 else 1
                blocks.append(
                    BasicBlock(in_channels, channels, stride, conv_kernel, skip_kernel, a.dropout)
                )
                in_channels = channels
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.dropout = nn.Dropout(a.classifier_dropout)
        self.linear = nn.Linear(in_channels * pooled_size(a) ** 2, a.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 32, 32) normalized images, or smaller ones, to (N, num_classes) logits."""
        window = pool_window(x, self.architecture)
        x = self.relu(self.bn1(self.conv1(x)))  # (N, c1, 32, 32); 31x31 after a whitening stem
        x = self.stages(x)  # (N, C, S, S)
        x = F.avg_pool2d(x, window).flatten(1)
        return self.linear(self.dropout(x))  # (N, num_classes)

    @torch.no_grad()
    def set_whitening(self, images: Tensor) -> None:
        """Fill the frozen stem with the principal components of the images' 2x2 patches.

        12 filters, scaled so that their outputs have unit variance and no correlation, and their
        negatives, since the ReLU keeps only one sign (Page, "How to train your ResNet", 2019;
        Jordan, arXiv:2404.00498).

        Args:
            images: (N, 3, 32, 32) normalized; some thousands are enough.
        """
        patches = F.unfold(images, 2).transpose(1, 2).reshape(-1, 12)
        covariance = patches.T @ patches / len(patches)
        # On the CPU: the same components everywhere, and Apple's GPUs have no eigh.
        variances, components = torch.linalg.eigh(covariance.cpu())
        # The addend (Jordan) keeps the faintest components from being amplified to noise.
        filters = (components / (variances + 5e-4).sqrt()).T.view(12, 3, 2, 2)
        self.conv1.weight.copy_(torch.cat([filters, -filters]))


class PooledConv(nn.Sequential):
    """conv-max pool-BN-ReLU: (N, in_channels, S, S) to (N, channels, S // 2, S // 2)."""

    def __init__(self, in_channels: int, channels: int, kernel: int) -> None:
        super().__init__(
            conv(in_channels, channels, kernel),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )


def conv(in_channels: int, channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    """A convolution with padding that keeps the resolution (at stride 1), without a bias."""
    return nn.Conv2d(in_channels, channels, kernel_size, stride, kernel_size // 2, bias=False)


@torch.fx.wrap  # torch.fx records the call: it cannot follow a decision that depends on a shape
def pool_window(images: Tensor, architecture: Architecture) -> int:
    """The window of the average pooling for these images.

    The map of a smaller image may be smaller than `pool_kernel`; the window then covers all of it.

    Raises:
        InputError: the network, made for IMAGE_SIZE, cannot classify images of this shape.
    """
    a, size = architecture, images.shape[-1]
    fits = images.ndim == 4 and images.shape[1:] == (3, size, size) and size <= IMAGE_SIZE
    if not fits or pooled_size(a, size) != pooled_size(a):
        raise InputError(
            f"images: {tuple(images.shape)}, not (N, 3, {IMAGE_SIZE}, {IMAGE_SIZE});"
            f" make them RGB of {IMAGE_SIZE}x{IMAGE_SIZE} pixels"
        )
    return min(a.pool_kernel, feature_size(a, size))


def stage_channels(architecture: Architecture) -> tuple[int, ...]:
    """Channels of each stage."""
    a = architecture
    return a.channels or tuple(a.width * a.c1 * 2**i for i in range(len(a.num_blocks)))


def per_stage(kernel: int | tuple[int, ...], num_stages: int) -> tuple[int, ...]:
    """Kernel sizes of all stages, from one for all or one each."""
    return (kernel,) * num_stages if isinstance(kernel, int) else tuple(kernel)


def feature_size(architecture: Architecture, image_size: int = IMAGE_SIZE) -> int:
    """Side of the last stage's feature map, in pixels."""
    num_stages = len(architecture.num_blocks)
    size = image_size - 1 if architecture.stem == "whitening" else image_size
    if architecture.downsample == "pool":  # in every stage; rounds odd sizes down
        return size // 2**num_stages
    return -(-size // 2 ** (num_stages - 1))  # a stride, in all but the first; rounds them up


def pooled_size(architecture: Architecture, image_size: int = IMAGE_SIZE) -> int:
    """Side of the pooled feature map, in pixels; 0 if the images are too small."""
    size = feature_size(architecture, image_size)
    return size // min(architecture.pool_kernel, size) if size else 0


def check_architecture(architecture: Architecture) -> None:
    """Raise InputError, naming the field, if the network cannot be built."""
    check_fields(architecture)
    a, num_stages = architecture, len(architecture.num_blocks)
    if not 1 <= num_stages <= 4:
        raise InputError(f"num_blocks: {a.num_blocks!r} is not 1 to 4 stages; try 3 3 3")
    if a.channels and len(a.channels) != num_stages:
        raise InputError(
            f"channels: {len(a.channels)} numbers given for {num_stages} stages;"
            " give one per stage, or none"
        )
    for name in ("conv_kernel", "skip_kernel"):
        kernel = getattr(a, name)
        if not isinstance(kernel, int) and len(kernel) != num_stages:
            raise InputError(
                f"{name}: {len(kernel)} sizes given for {num_stages} stages;"
                " give one, or one per stage"
            )
        for size in per_stage(kernel, num_stages):
            if size % 2 == 0:
                raise InputError(f"{name}: {size} is even; use an odd size such as {size - 1}")
    if a.stem == "whitening" and a.c1 != WHITENING_C1:
        raise InputError(
            f"c1: {a.c1} with a whitening stem, which has {WHITENING_C1} filters; use"
            f" {WHITENING_C1}"
        )
    size = feature_size(a)
    if a.pool_kernel > size:
        raise InputError(
            f"pool_kernel: {a.pool_kernel} is larger than the {size}x{size} feature map"
            f" of {num_stages} stages; use 1 to {size}"
        )


@dataclass(frozen=True)
class ModelCost:
    """Parameters, computation and memory of an architecture."""

    num_params: int
    macs: int  # multiply-accumulates of one image's forward pass (convolutions and linear)
    activation_bytes: int  # float32 tensors kept for the backward pass, per image


def model_cost(architecture: Architecture) -> ModelCost:
    """Compute the cost of an architecture on the meta device, without allocating it.

    Raises:
        InputError: it cannot be built; the message names the field.
    """
    with torch.device("meta"):
        model = ResNet(architecture)
    return ModelCost(
        num_params=count_parameters(model),
        macs=count_macs(model),
        # The difference cancels what does not grow with the batch. BN needs two images at least
        # where a feature map is one pixel.
        activation_bytes=saved_bytes(model, 3) - saved_bytes(model, 2),
    )


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, including those of a frozen stem."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module) -> int:
    """Multiply-accumulates of one image's forward pass; `model` is on the meta device.

    Not by torch.utils.flop_counter, whose first use takes some seconds.
    """
    macs = []

    def count(layer: nn.Module, _inputs: tuple[Tensor], output: Tensor) -> None:
        macs.append(output.numel() * layer.weight[0].numel())

    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        model.eval()(torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE, device="meta"))
    for handle in handles:
        handle.remove()
    return sum(macs)


def saved_bytes(model: nn.Module, batch_size: int) -> int:
    """Bytes of the distinct tensors that autograd saves for backward in one training step."""
    saved = set()  # of storages, which keeps them alive: none takes the address of another

    def pack(tensor: Tensor) -> Tensor:
        saved.add(tensor.untyped_storage())
        return tensor

    images = torch.empty(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(images)
    return sum(storage.nbytes() for storage in saved)


def num_parameters(architecture: Architecture) -> int:
    """Count the parameters of an architecture.

    Raises:
        InputError: the network cannot be built.
    """
    with torch.device("meta"):
        return count_parameters(ResNet(architecture))


def check_budget(architecture: Architecture, max_params: int = MAX_PARAMS) -> None:
    """Raise InputError if a network has over `max_params` parameters, or cannot be built."""
    num_params = num_parameters(architecture)
    if num_params > max_params:
        raise InputError(
            f"max_params: this network has {num_params:,} parameters, over the limit of"
            f" {max_params:,}; use {smaller(architecture, max_params)}, or raise --max-params"
        )


def smaller(architecture: Architecture, max_params: int) -> str:
    """The options that bring a network into the budget, each with all else as it is."""

    def too_large(name: str, value: int) -> bool:
        try:
            return num_parameters(replace(architecture, **{name: value})) > max_params
        except InputError:  # a whitening stem takes no other c1
            return True

    remedies = []
    for name in () if architecture.channels else ("c1", "width"):
        values = range(1, getattr(architecture, name))
        largest = bisect.bisect_left(values, True, key=partial(too_large, name))
        if largest:
            remedies.append(f"--{name} {largest}{' or less' if largest > 1 else ''}")
    return ", ".join(remedies or ["fewer blocks or channels"])
