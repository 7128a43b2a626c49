"""Device, precision and processes: one process, or those that torchrun started; and signals."""

import contextlib
import ctypes
import functools
import gc
import os
import signal
import threading
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils import InputError, StoppedError

# ---------------------------------------------------------------- device and precision


def init_processes(deterministic: bool = False) -> torch.device:
    """The device of this process, which joins the others that torchrun started, if it did.

    CUDA, then MPS, then the CPU, whichever is there; NCCL between CUDA devices, else Gloo. Float32
    products and convolutions may use TF32, and cuDNN times its algorithms for each of the few
    shapes of a batch; unless kernels are to be `deterministic`
    (pytorch.org/docs/stable/notes/randomness.html).

    Raises:
        InputError: what torchrun sets in the environment is incomplete or not a number, or it
            started more processes than there are GPUs.
    """
    keep_freed_memory()
    # Else not called, for it loads PyTorch's compiler, which takes a second or two.
    if deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product
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
    if torch.cuda.is_available():
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
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def from_environment(name: str, default: str = "") -> int:
    """A number that torchrun sets.

    Raises:
        InputError: it is not a number, or is missing and has no default.
    """
    text = os.environ.get(name, default)
    if not text.isdecimal():
        raise InputError(
            f"{name}: {text!r} in the environment must be a number; unset what torchrun sets (RANK,"
            " LOCAL_RANK, WORLD_SIZE), or start several processes with it"
        )
    return int(text)


def compute_dtype(device: torch.device, bfloat16: bool) -> torch.dtype:
    """What convolutions and matrix products compute in; weights are always float32."""
    return torch.bfloat16 if bfloat16 and has_bfloat16(device) else torch.float32


def make_autocast(device: torch.device, bfloat16: bool) -> torch.autocast:
    """The context in which a network computes in `compute_dtype`."""
    dtype = compute_dtype(device, bfloat16)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@functools.cache
def has_bfloat16(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 matrices faster than float32 ones."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return False


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def keep_freed_memory() -> None:
    """Let freed tensors' memory serve the next ones instead of going back to the system.

    By default glibc maps every tensor over 32 MB anew, and the kernel clears it page by page,
    which can take a good part of a training step on a CPU. Other C libraries are left alone.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: map nothing
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: give nothing back


def give_back_memory() -> None:
    """Give the system what `keep_freed_memory` keeps, between two networks in one process.

    Pieces of the sizes that the first one needed may not serve the second one, and would pile up.
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
    """Whether this is the process that prints and writes."""
    return rank() == 0


@contextlib.contextmanager
def first_on_each_machine() -> Iterator[None]:
    """One process of each machine runs the block first (a download, say), then the others."""
    if dist.is_initialized() and local_rank() != 0:
        dist.barrier()
    yield
    if dist.is_initialized() and local_rank() == 0:
        dist.barrier()


def barrier() -> None:
    """Wait until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """`tensor`, summed in place over all processes; itself where there is one."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(*values: int) -> list[int]:
    """Of each value the largest that any process has, on every process."""
    if not dist.is_initialized():
        return list(values)
    on_gpu = dist.get_backend() == "nccl"
    tensor = torch.tensor(values, device="cuda" if on_gpu else "cpu")
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def broadcast_from_main(value: object) -> object:
    """What the main process passes, on every process."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def synchronize_buffers(model: nn.Module) -> None:
    """Give every process rank 0's BN statistics, so that all test the network that is saved."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def wrap_ddp(model: nn.Module) -> nn.Module:
    """`model`, under torchrun in the wrapper that averages the gradients of all processes."""
    return DistributedDataParallel(model) if num_processes() > 1 else model


# ---------------------------------------------------------------- signals


class StopSignals:
    """In its block, a signal that asks the process to end is noted, in `received`, and answered.

    SIGINT (Ctrl-C), SIGTERM, SIGUSR1, which SLURM sends when a job's time runs out, and SIGHUP,
    when the terminal has gone, unless it is ignored as under nohup. A second Ctrl-C has its usual
    effect; under torchrun, which repeats every signal, none has. Blocks may be nested: an inner
    one begins with what the outer one has received, and hands on what it has received itself.
    """

    NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")  # Windows lacks the last two

    def __init__(self) -> None:
        self.received = 0  # number of the first signal
        self._before, self._outer = {}, None
        self._terminals = [number for number in (1, 2) if os.isatty(number)]

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is not threading.main_thread():  # signals reach another
            return self
        for number in (getattr(signal, name) for name in self.NAMES if hasattr(signal, name)):
            if number != getattr(signal, "SIGHUP", 0) or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        outer = getattr(self._before[signal.SIGINT], "__self__", None)
        if isinstance(outer, StopSignals):
            self._outer, self.received = outer, outer.received
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._outer:
            self._outer.received = self._outer.received or self.received

    def raise_if_received(self, where: str, number: int | None = None) -> None:
        """Raise StoppedError if a signal was received, by any process; `where` ends its message.

        Args:
            number: of the signal, if the processes have already told each other; 0 for none.
        """
        if number is None:
            (number,) = all_reduce_max(self.received)
        if number:
            raise StoppedError(number, f"stopped by {signal.Signals(number).name} {where}")

    def _note(self, number: int, _frame: object) -> None:
        name, alone = signal.Signals(number).name, num_processes() == 1
        if name == "SIGINT" and self.received and alone:
            raise KeyboardInterrupt("interrupted; --resume goes on from what was saved")
        if name == "SIGHUP":  # what is written to a terminal that has gone is an error
            for terminal in self._terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), terminal)
        if not self.received and os.environ.get("LOCAL_RANK", "0") == "0":
            again = "; again to stop at once" if name == "SIGINT" and alone else ""
            clear = "\r\x1b[K" if os.isatty(2) else ""  # of a progress bar
            with contextlib.suppress(OSError):
                # Not print, which may be at work when the signal comes.
                os.write(2, f"{clear}{name}: stopping after this step{again}\n".encode())
        self.received = self.received or number
