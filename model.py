"""TPSNet: residual networks of at most 5 million parameters for 32x32 images.

One class, `ResNet`, with the paper's six free choices (blocks per stage, first width C1,
channel multiplier, convolution, skip and pooling kernels). The named networks, as
`python train.py NAME` builds them for CIFAR-10:

| name   | num_blocks   | c1 | parameters |
|--------|--------------|----|------------|
| tpsnet | (13, 13, 13) | 16 |  4,959,770 |
| model1 | (3, 3, 3)    | 34 |  4,865,580 |
| model2 | (7, 7, 7)    | 22 |  4,971,680 |
| fast   | (1, 1, 1)    | 24 |  4,342,042 |

`fast` differs in more than size: its stem is a frozen whitening convolution, and its stages begin
with pooling instead of a stride.

`model_cost` computes parameters, multiply-accumulates and activation memory of any
configuration without allocating it. `save_model` and `load_model` write and read one
`.safetensors` file that explains itself.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from utils import IMAGE_SIZE, InputError, atomic_path, check_integer, check_number, first_line

MAX_PARAMS = 5_000_000  # the project's budget
STEMS = ("conv", "whitening")
DOWNSAMPLES = ("stride", "pool")
FILE_FORMAT = "tpsnet-2"  # marks our .safetensors files, with the version of their metadata


class BasicBlock(nn.Module):
    """conv-BN-ReLU-dropout-conv-BN, plus the shortcut, then ReLU (He et al., arXiv:1512.03385).

    The shortcut is the identity, or a strided convolution with BN where the shape changes.
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
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv(channels, channels, conv_kernel)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                conv(in_channels, channels, skip_kernel, stride), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, S, S) to (N, channels, S / stride, S / stride)."""
        out = self.dropout(self.relu(self.bn1(self.conv1(x))))
        out = self.bn2(self.conv2(out))
        return self.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """A stem to `c1` channels, one stage per entry of `num_blocks`, pooling, one linear layer.

    Stage i (from 0) has `width * c1 * 2**i` channels. Maps (N, 3, 32, 32) float images to
    (N, num_classes) logits.

    Args:
        num_blocks: residual blocks in each of 1 to 4 stages.
        c1: channels after the stem.
        width: channels of the first stage, as a multiple of c1.
        conv_kernel: kernel size of the blocks' convolutions, odd; one for all stages or one each.
        skip_kernel: the same for the projection shortcuts.
        pool_kernel: window (and stride) of the average pooling, in pixels of the last feature map.
        dropout: probability of zeroing an activation between a block's two convolutions.
        classifier_dropout: probability of zeroing one of the pooled features.
        num_classes: length of the logits.
        stem: `conv`, a 3x3 convolution; or `whitening`, a frozen 2x2 convolution to 24 channels
            that `set_whitening` fills, so that training need not find out how pixels correlate.
        downsample: `stride`, the first block of every stage after the first has stride 2; or
            `pool`, every stage begins with a convolution and 2x2 max pooling, so that no block
            works at full resolution.

    Raises:
        InputError: an argument cannot be built; the message names it.
    """

    def __init__(
        self,
        num_blocks: tuple[int, ...] = (13, 13, 13),
        c1: int = 16,
        width: int = 2,
        conv_kernel: int | tuple[int, ...] = 3,
        skip_kernel: int | tuple[int, ...] = 1,
        pool_kernel: int = 8,
        dropout: float = 0.0,
        num_classes: int = 10,
        stem: str = "conv",
        downsample: str = "stride",
        classifier_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        # What the network was built from, kept so that a saved model can explain itself.
        self.architecture = {
            "num_blocks": num_blocks,
            "c1": c1,
            "width": width,
            "conv_kernel": conv_kernel,
            "skip_kernel": skip_kernel,
            "pool_kernel": pool_kernel,
            "dropout": dropout,
            "num_classes": num_classes,
            "stem": stem,
            "downsample": downsample,
            "classifier_dropout": classifier_dropout,
        }
        check_architecture(**self.architecture)
        conv_kernels = per_stage(conv_kernel, len(num_blocks))
        skip_kernels = per_stage(skip_kernel, len(num_blocks))

        if stem == "whitening":
            self.conv1 = nn.Conv2d(3, c1, kernel_size=2, bias=False).requires_grad_(False)
        else:
            self.conv1 = conv(3, c1, kernel_size=3)
        self.bn1 = nn.BatchNorm2d(c1)
        self.relu = nn.ReLU(inplace=True)
        stages, in_channels = [], c1
        for i, depth in enumerate(num_blocks):
            channels = width * c1 * 2**i
            blocks = []
            if downsample == "pool":
                blocks.append(PooledConv(in_channels, channels, conv_kernels[i]))
                in_channels = channels
            for j in range(depth):
                stride = 2 if downsample == "stride" and i > 0 and j == 0 else 1
                blocks.append(
                    BasicBlock(
                        in_channels, channels, stride, conv_kernels[i], skip_kernels[i], dropout
                    )
                )
                in_channels = channels
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AvgPool2d(pool_kernel)
        self.dropout = nn.Dropout(classifier_dropout)
        pooled_size = feature_size(len(num_blocks), stem, downsample) // pool_kernel
        self.linear = nn.Linear(in_channels * pooled_size**2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 32, 32) normalised images to (N, num_classes) logits."""
        x = self.relu(self.bn1(self.conv1(x)))  # (N, c1, 32, 32), of a whitening stem 31x31
        x = self.stages(x)  # (N, width * c1 * 2**(stages - 1), S, S)
        x = self.pool(x).flatten(1)
        return self.linear(self.dropout(x))  # (N, num_classes)

    @torch.no_grad()
    def set_whitening(self, images: Tensor) -> None:
        """Fill the frozen stem with the principal components of the images' 2x2 patches.

        12 filters, scaled so that their outputs have unit variance and no correlation, and their
        negatives, since the ReLU keeps only one sign (Page, "How to train your ResNet", 2019;
        Jordan, arXiv:2404.00498).

        Args:
            images: (N, 3, 32, 32) normalised; some thousands are enough.
        """
        patches = F.unfold(images, 2).transpose(1, 2).reshape(-1, 12)
        variances, components = torch.linalg.eigh(patches.T @ patches / len(patches))
        # The addend, of Jordan's, keeps the faintest components from being blown up to noise.
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
    """A convolution that keeps the resolution (or divides it by `stride`); BN supplies the bias."""
    return nn.Conv2d(in_channels, channels, kernel_size, stride, kernel_size // 2, bias=False)


def per_stage(kernel: int | tuple[int, ...], num_stages: int) -> tuple[int, ...]:
    """One kernel size for every stage, from one for all or one each."""
    return (kernel,) * num_stages if isinstance(kernel, int) else tuple(kernel)


def feature_size(num_stages: int, stem: str, downsample: str, image_size: int = IMAGE_SIZE) -> int:
    """Side of the last stage's feature map, in pixels."""
    halvings = num_stages if downsample == "pool" else num_stages - 1
    size = image_size - 1 if stem == "whitening" else image_size
    # A stride rounds odd sizes up and pooling rounds them down.
    return size // 2**halvings if downsample == "pool" else -(-size // 2**halvings)


def check_architecture(
    num_blocks: tuple[int, ...],
    c1: int,
    width: int,
    conv_kernel: int | tuple[int, ...],
    skip_kernel: int | tuple[int, ...],
    pool_kernel: int,
    dropout: float,
    num_classes: int,
    stem: str,
    downsample: str,
    classifier_dropout: float,
) -> None:
    """Raise InputError, naming the argument, if `ResNet` cannot be built from these."""
    if not isinstance(num_blocks, tuple | list) or not 1 <= len(num_blocks) <= 4:
        raise InputError(f"num_blocks: {num_blocks!r} is not 1 to 4 stages; try 3 3 3")
    for depth in num_blocks:
        check_integer("num_blocks", depth, 1, 500)
    check_integer("c1", c1, 1, 4096)
    check_integer("width", width, 1, 64)
    check_integer("num_classes", num_classes, 2, 100_000)
    for name, kernel in (("conv_kernel", conv_kernel), ("skip_kernel", skip_kernel)):
        if isinstance(kernel, tuple | list) and len(kernel) != len(num_blocks):
            raise InputError(
                f"{name}: {len(kernel)} sizes given for {len(num_blocks)} stages;"
                " give one, or one per stage"
            )
        for size in kernel if isinstance(kernel, tuple | list) else (kernel,):
            check_integer(name, size, 1, 31)
            if size % 2 == 0:
                raise InputError(f"{name}: {size} is even; use an odd size such as {size - 1}")
    for name, value, options in (("stem", stem, STEMS), ("downsample", downsample, DOWNSAMPLES)):
        if value not in options:
            raise InputError(f"{name}: {value!r} is not one of {', '.join(options)}")
    if stem == "whitening" and c1 != 24:
        raise InputError(f"c1: {c1} with a whitening stem, which has 24 filters; use 24")
    size = feature_size(len(num_blocks), stem, downsample)
    check_integer("pool_kernel", pool_kernel, 1)
    if pool_kernel > size:
        raise InputError(
            f"pool_kernel: {pool_kernel} is larger than the {size}x{size} feature map"
            f" of {len(num_blocks)} stages; use 1 to {size}"
        )
    check_number("dropout", dropout, 0, 0.99)
    check_number("classifier_dropout", classifier_dropout, 0, 0.99)


@dataclass(frozen=True)
class ModelCost:
    """What one configuration costs."""

    num_params: int
    macs: int  # multiply-accumulates of one image's forward pass (convolutions and linear)
    activation_bytes: int  # float32 tensors a training step keeps for backward, per image


def model_cost(**architecture: object) -> ModelCost:
    """Cost of `ResNet(**architecture)`, computed on the meta device: nothing is allocated.

    Raises:
        InputError: an argument cannot be built; the message names it.
    """
    with torch.device("meta"):
        model = ResNet(**architecture)
        image = torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(image)
    return ModelCost(
        num_params=count_parameters(model),
        macs=counter.get_total_flops() // 2,
        # A batch of two less a batch of one: what does not grow with the batch cancels out.
        activation_bytes=saved_bytes(model, 2) - saved_bytes(model, 1),
    )


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, those of a frozen stem included."""
    return sum(p.numel() for p in model.parameters())


def saved_bytes(model: nn.Module, batch_size: int) -> int:
    """Bytes of the distinct tensors that autograd saves for backward in one training step."""
    saved = {}  # keeps the storages alive, so that no address is counted twice or missed

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        return tensor

    images = torch.empty(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(images)
    return sum(storage.nbytes() for storage in saved.values())


def check_budget(max_params: int, **architecture: object) -> int:
    """The parameter count of `ResNet(**architecture)`, if it is at most `max_params`.

    Raises:
        InputError: it is more, or an argument cannot be built.
    """
    with torch.device("meta"):
        num_params = count_parameters(ResNet(**architecture))
    if num_params > max_params:
        raise InputError(
            f"max_params: this network has {num_params:,} parameters, over the limit of"
            f" {max_params:,}; use fewer blocks or channels, or raise --max-params"
        )
    return num_params


def save_model(path: str | Path, model: nn.Module, metadata: dict[str, object]) -> None:
    """Write weights and `metadata` to one `.safetensors` file, whole or not at all.

    `metadata` holds JSON values, at least the `mean` and `std` that images are normalised with,
    the `class_names` of the logits, and the `dataset` that the model is tested on.

    The wrappers of DDP and torch.compile are taken off first, so names never carry their prefixes.
    """
    while (inner := getattr(model, "module", getattr(model, "_orig_mod", None))) is not None:
        model = inner
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    described = {"architecture": model.architecture, **metadata}
    check_metadata(described)
    texts = {key: json.dumps(value) for key, value in described.items()}
    marks = {"file_format": FILE_FORMAT, "sha256": checksum(tensors, texts)}
    with atomic_path(path) as temporary:
        # Not save_file: it makes files that only their owner can read.
        temporary.write_bytes(safetensors.torch.save(tensors, marks | texts))


def checksum(tensors: dict[str, Tensor], texts: dict[str, str]) -> str:
    """SHA-256 of all that a model file says: names, types, shapes and values, and the metadata."""
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def check_metadata(metadata: dict[str, object]) -> None:
    """Raise InputError, KeyError or TypeError if a model cannot be used with this metadata."""
    if len(metadata["class_names"]) != metadata["architecture"]["num_classes"]:
        raise InputError("as many class_names as num_classes are needed")
    for name in ("mean", "std"):
        red, green, blue = metadata[name]
        for value in (red, green, blue):
            check_number(name, value, 0, 255)


def load_model(path: str | Path) -> tuple[ResNet, dict[str, object]]:
    """The network in `path`, on the CPU in eval mode, and the metadata it was saved with.

    Images must be scaled to [0, 1], then normalised with `metadata["mean"]` and `["std"]`.
    Nothing in the file is executed, and no memory is taken on its word.

    Raises:
        InputError: the file is missing, damaged, or not one of ours.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            texts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise InputError(
            f"checkpoint: {path} does not exist; train one (`python train.py demo` takes a"
            " minute), or name another"
        ) from None
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"checkpoint: {path} is damaged or no .safetensors file ({first_line(error)});"
            " name a model.safetensors that train.py wrote"
        ) from None
    try:
        if texts.pop("file_format", None) != FILE_FORMAT:
            raise ValueError(f"its metadata lacks file_format {FILE_FORMAT}")
        if texts.pop("sha256", None) != checksum(tensors, texts):
            raise ValueError("its SHA-256 is another: it is damaged")
        metadata = {key: json.loads(text) for key, text in texts.items()}
        check_metadata(metadata)
        # Built without memory and filled from the file: a lying architecture costs nothing.
        with torch.device("meta"):
            model = ResNet(**metadata["architecture"])
        model.load_state_dict(tensors, assign=True)
    except (InputError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"checkpoint: {path} is not one of ours ({first_line(error)});"
            " name a model.safetensors that train.py wrote"
        ) from None
    return model.float().eval(), metadata
