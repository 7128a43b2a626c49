"""Device, precision and processes: one process, or those that torchrun started."""

import contextlib
import ctypes
import functools
import gc
import math
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path, PurePosixPath

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils import InputError

# How long processes wait for one that downloads the data or reads many pictures; NCCL's own limit
# of 10 minutes may be too short. If one dies, torchrun ends the others at once.
PATIENCE = timedelta(hours=2)

# ---------------------------------------------------------------- device and precision


def init_processes(deterministic: bool = False) -> torch.device:
    """Choose the device of this process, and join the processes that torchrun started.

    CUDA, else MPS, else the CPU, which TPSNET_DEVICE=cpu chooses at once; NCCL between CUDA
    devices, else Gloo. Float32 products and convolutions may use TF32. Unless `deterministic`,
    cuDNN times its algorithms for each shape of a batch
    (pytorch.org/docs/stable/notes/randomness.html).

    Raises:
        InputError: a variable of torchrun is missing or no number, there are more processes than
            GPUs, or TPSNET_DEVICE is another one.
    """
    keep_freed_memory()
    # Only if it changes: the call loads PyTorch's compiler, which takes a second or two.
    if deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product
        # Filling every new tensor takes time, and changes only what is read before it is written.
        torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = not deterministic
    from_environment("RANK", "0")
    local, world_size = local_rank(), from_environment("WORLD_SIZE", "1")
    if world_size > 1:
        from_environment("MASTER_PORT")
        from_environment("RANK")
        if not os.environ.get("MASTER_ADDR"):
            raise InputError(
                "MASTER_ADDR: missing in the environment; start several processes with torchrun"
            )
    if cpu_is_chosen():
        device = torch.device("cpu")
    elif torch.cuda.is_available():
        processes = from_environment("LOCAL_WORLD_SIZE", str(local + 1))
        if processes > (found := torch.cuda.device_count()):
            raise InputError(
                f"LOCAL_WORLD_SIZE: {processes} processes for {found} GPUs; use --nproc-per-node"
                f" {found}"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    elif torch.backends.mps.is_available() and world_size == 1:
        device = torch.device("mps")
    else:
        device = torch.device("cpu")
    if world_size > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
    return device


def from_environment(name: str, default: str = "") -> int:
    """Read a number that torchrun sets.

    Raises:
        InputError: the variable is no number, or is missing and has no default.
    """
    text = os.environ.get(name, default)
    if not text.isdecimal():
        raise InputError(
            f"{name}: {text!r} in the environment must be a number; unset what torchrun sets (RANK,"
            " LOCAL_RANK, WORLD_SIZE), or start several processes with it"
        )
    return int(text)


def cpu_is_chosen() -> bool:
    """True if TPSNET_DEVICE=cpu in the environment asks for the CPU, whatever else there is.

    Raises:
        InputError: the variable has another value.
    """
    wanted = os.environ.get("TPSNET_DEVICE", "")
    if wanted not in ("", "cpu"):
        raise InputError(f"TPSNET_DEVICE: {wanted!r} in the environment; use cpu, or unset it")
    return wanted == "cpu"


def compute_dtype(device: torch.device, bfloat16: bool) -> torch.dtype:
    """Type of convolutions and matrix products; weights are always float32."""
    return torch.bfloat16 if bfloat16 and has_bfloat16(device) else torch.float32


def make_autocast(device: torch.device, bfloat16: bool) -> torch.autocast:
    """A context in which a network computes in `compute_dtype`."""
    dtype = compute_dtype(device, bfloat16)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@functools.cache
def has_bfloat16(device: torch.device) -> bool:
    """True if `device` multiplies bfloat16 matrices faster than float32 ones."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return False


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def usable_cpus(root: Path = Path("/")) -> int:
    """How many CPUs this process may use, which may be fewer than the machine has.

    They are limited by the affinity, the quota of a container or a user, and the SLURM job.
    """
    import joblib  # comes with scikit-learn; torch.hub lacks it

    limits = [joblib.cpu_count(), *cgroup_quotas(root)]
    allocated = os.environ.get("SLURM_CPUS_ON_NODE", "")
    if allocated.isdecimal():
        limits.append(int(allocated))
    return max(1, min(limits))


def cgroup_quotas(root: Path) -> list[int]:
    """The CPU quotas of this process's control group (version 2) and of those above it.

    joblib reads only the outermost one, which is that of a container.
    """
    quotas = []
    with contextlib.suppress(OSError):  # not on Linux
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            hierarchy, _, name = line.split(":", 2)
            if hierarchy != "0":  # of version 1
                continue
            group = PurePosixPath(name)
            for folder in (group, *group.parents):
                path = root / "sys/fs/cgroup" / folder.relative_to("/") / "cpu.max"
                with contextlib.suppress(OSError, ValueError):  # no such file, or no limit: "max"
                    quota, period = map(int, path.read_text().split())
                    quotas.append(math.ceil(quota / period))
    return quotas


def keep_freed_memory() -> None:
    """Make glibc reuse the memory of freed tensors instead of returning it to the system.

    By default it maps every tensor over 32 MB anew and the kernel clears it page by page, which can
    take a good part of a training step on a CPU. Other C libraries are left alone.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mappings
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never trim


def give_back_memory() -> None:
    """Return the memory that `keep_freed_memory` kept, between two networks in one process.

    Pieces in the sizes of the first network may not fit the second one, and would pile up.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


# ---------------------------------------------------------------- processes


def local_rank() -> int:
    """Number of this process on its machine; 0 without torchrun."""
    return from_environment("LOCAL_RANK", "0")


def rank() -> int:
    """Number of this process among all; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def num_processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """True in the process that prints and writes."""
    return rank() == 0


@contextlib.contextmanager
def first_on_each_machine() -> Iterator[None]:
    """Let one process of each machine run the block first, a download for example.

    Where that fails, the others find out by themselves.
    """
    if dist.is_initialized() and local_rank() != 0:
        dist.barrier()
    try:
        yield
    finally:
        if dist.is_initialized() and local_rank() == 0:
            dist.barrier()


def barrier() -> None:
    """Wait until all processes have called this."""
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum `tensor` in place over all processes, and return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(*values: int) -> list[int]:
    """The maximum of each value over all processes."""
    if not dist.is_initialized():
        return list(values)
    on_gpu = dist.get_backend() == "nccl"
    tensor = torch.tensor(values, device="cuda" if on_gpu else "cpu")
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def broadcast_from_main(value: object) -> object:
    """Return the value of the main process in all processes."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def synchronize(model: nn.Module) -> None:
    """Copy the weights and BN statistics of the main process to all."""
    if dist.is_initialized():
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)


def sum_gradients(model: nn.Module) -> None:
    """Sum the gradients of every weight over all processes.

    DistributedDataParallel would send the first ones during the backward pass. But it regroups them
    after the first step of a process, and in a sum over three or more processes the groups decide
    the rounding: a resumed run would differ from an unbroken one.
    """
    if not dist.is_initialized():
        return
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    total = all_reduce_sum(torch.cat([gradient.flatten() for gradient in gradients]))
    sums = total.split([gradient.numel() for gradient in gradients])
    for gradient, summed in zip(gradients, sums, strict=True):
        gradient.copy_(summed.view_as(gradient))
