"""What the scripts share: errors, files, seeds, processes, evaluation and Weights & Biases."""

import contextlib
import csv
import ctypes
import functools
import gc
import hashlib
import importlib.metadata
import inspect
import io
import itertools
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import filelock
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

IMAGE_SIZE = 32  # pixels, both sides
TEMPORARY = ".tmp-"  # how the name of what is being written begins
PREVIOUS = "previous.pt"  # the training state that was saved before the last one
EVAL_BATCH = 500  # images; one size everywhere, so that every script gets the same last digit


# ---------------------------------------------------------------- errors and the command line


class InputError(ValueError):
    """Something the user gave is wrong: one line naming the field, the value and the remedy."""


class DivergenceError(RuntimeError):
    """Training produced a loss or weights that are not finite."""


class StoppedError(Exception):
    """A signal ended the training early; its state is saved."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number  # of the signal


def check_integer(name: str, value: object, low: int, high: int | None = None) -> None:
    """Raise InputError, naming the field, if `value` is no whole number from `low` to `high`."""
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or value < low or (high is not None and value > high):
        span = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise InputError(f"{name}: {value!r} is not a whole number {span}")


def check_number(name: str, value: object, low: float, high: float) -> None:
    """Raise InputError, naming the field, if `value` is no finite number from `low` to `high`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # nan compares false
        raise InputError(f"{name}: {value!r} is not a number from {low} to {high}")


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def from_environment(name: str, default: str = "") -> int:
    """A number that torchrun sets.

    Raises:
        InputError: it is none, or is missing and has no default.
    """
    text = os.environ.get(name, default)
    if not text.isdecimal():
        raise InputError(
            f"{name}: {text!r} in the environment is no number; unset what torchrun sets (RANK,"
            " LOCAL_RANK, WORLD_SIZE), or start several processes with it"
        )
    return int(text)


def local_rank() -> int:
    """Number of this process on its machine, as torchrun counts; 0 without torchrun."""
    return from_environment("LOCAL_RANK", "0")


def complain(message: str) -> None:
    """Print one line on stderr, once per machine and not once per process."""
    with contextlib.suppress(InputError):  # a LOCAL_RANK that is no number is told by all
        if local_rank() > 0:
            return
    print(message, file=sys.stderr)


def warn(message: str) -> None:
    """Print a one-line warning, once per machine."""
    complain(f"warning: {message}")


def run_script(main: Callable[[list[str]], None]) -> None:
    """Run a script's `main(arguments)`; what a user can cause ends in one line and a status.

    Exit status 2 for bad input, 1 for a diverged training, 128 and the signal's number (130 for
    Ctrl-C) for one that a signal stopped.
    """
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except (InputError, DivergenceError) as error:
        complain(f"error: {error}")
        sys.exit(2 if isinstance(error, InputError) else 1)
    except StoppedError as stop:
        complain(str(stop))
        sys.exit(128 + stop.number)
    except KeyboardInterrupt:
        print("interrupted; a training goes on with --resume", file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # often of what is printed: its disk is full, or `head` has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python tries again
        if isinstance(error, BrokenPipeError):
            sys.exit(128 + 13)  # SIGPIPE
        complain(f"error: {error}")
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def parse_command_line(target: Callable, args: list[str], **options: object) -> object:
    """tyro.cli(target), with a mistake reported as an InputError instead of a box of text.

    For a function it returns the call, ready to be made, so that only the parsing runs here.
    """
    try:
        import tyro  # here, so that train(config) can be called where it is not installed
    except ModuleNotFoundError:
        raise InputError("tyro: not installed; run `pip install -r requirements.txt`") from None

    if inspect.isfunction(target):
        function = target
        target = functools.wraps(function)(lambda *a, **kw: functools.partial(function, *a, **kw))
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(target, args=args, **options)
    except SystemExit as stop:
        if not stop.code:  # -h
            raise
    # A box (of ASCII where the terminal has no UTF-8): a title, rules, and paragraphs, of which
    # the first says what is wrong.
    lines = [line.strip("│╭╮╰╯ ") for line in printed.getvalue().splitlines()[1:]]
    paragraphs = itertools.groupby(lines, key=lambda line: line.strip("─-") != "")
    message = next(" ".join(lines) for is_text, lines in paragraphs if is_text)
    raise InputError(f"{message.rstrip('.')}; -h explains every option")


def duration(seconds: float) -> str:
    """A length of time in its natural unit: 4.2 s, 12.3 min, 3.4 h, 5.6 days."""
    for unit, size in (("s", 1), ("min", 60), ("h", 3600)):
        if seconds < 100 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 86400:.1f} days"


# ---------------------------------------------------------------- files


@contextlib.contextmanager
def atomic_path(path: str | Path, keep: Path | None = None) -> Iterator[Path]:
    """A temporary path beside `path`; when the block ends well, on the disk and renamed to it.

    Whatever happens, `path` holds all of its old content or all of its new.

    Args:
        keep: where the old content goes instead of being lost; for a moment it is only there.

    Raises:
        InputError: the folder cannot be written, or is full.
    """
    path, folder = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix=TEMPORARY, dir=path.parent)
        temporary = Path(folder, path.name)
        yield temporary
        flush_to_disk(temporary)
        if keep and path.exists():
            path.replace(keep)
        temporary.replace(path)
        with contextlib.suppress(OSError):  # some network file systems refuse it
            flush_to_disk(path.parent)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or first_line(error)}); what was there"
            " before is intact"
        ) from None
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def flush_to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's names, would outlive a power cut."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporaries(folder: Path) -> None:
    """Remove what a killed process was writing in `folder`."""
    for path in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Have `folder`, made if need be, to ourselves. A lock ends with its process, however it ends.

    Raises:
        InputError: another process has it, or it cannot be written.
    """
    problem, lock = None, filelock.FileLock(folder / "run.lock", blocking=False)
    if is_main():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            remove_temporaries(folder)
        except filelock.Timeout:
            problem = f"name: another process is training in {folder}; give another --name"
        except OSError as error:
            problem = f"name: {folder} cannot be written ({error.strerror})"
    if problem := from_main(problem):
        raise InputError(problem)
    try:
        yield
    finally:
        lock.release()


def write_json(path: Path, value: object) -> None:
    """Write one JSON file, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_csv(path: Path, rows: list[dict[str, object]]) -> None:
    """Write `rows`, which share their keys, as one CSV file with a header, whole or not at all."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: str | Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a header."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_numbers(path: str | Path) -> list[dict[str, int | float | str | None]]:
    """The rows of a CSV file with a header: numbers where a cell holds one, None where nothing."""

    def value(text: str) -> int | float | str | None:
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(text)
        return text or None

    return [{name: value(text) for name, text in row.items()} for row in read_csv(path)]


def save_state(path: Path, state: dict[str, object]) -> None:
    """Write a training state of tensors and plain values, then its SHA-256, whole or not at all.

    The state that was there becomes `previous.pt`.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()  # not getbuffer: a failed write crashed Python 3.12.1 later
    with (
        atomic_path(path, keep=path.with_name(PREVIOUS)) as temporary,
        temporary.open("wb") as file,
    ):
        file.write(content)
        file.write(hashlib.sha256(content).digest())


def load_state(path: Path) -> dict[str, object]:
    """Read what `save_state` wrote, on the CPU; if it is damaged, the state before, with a warning.

    Nothing in the file is executed.

    Raises:
        InputError: both are missing, damaged, or hold more than tensors and plain values.
    """
    previous = path.with_name(PREVIOUS)
    if not path.exists() and not previous.exists():
        raise InputError(f"resume: {path} does not exist; train without --resume first")
    with contextlib.suppress(ValueError):
        return read_state(path)
    problem = "is damaged" if path.exists() else "is missing"
    try:
        state = read_state(previous)
    except ValueError:
        raise InputError(
            f"resume: {path} {problem} or was not written by train.py, and there is no sound"
            f" {PREVIOUS}; restore a copy of it, train under another --name, or --overwrite it"
        ) from None
    warn(f"{path} {problem}; going on from {PREVIOUS}, the state that was saved before it")
    return state


def drop_damaged_state(path: Path) -> None:
    """If the state in `path` is damaged or missing, put the previous one there.

    Else the next save would make the damaged one the previous one.
    """
    try:
        read_state(path)
    except ValueError:
        path.with_name(PREVIOUS).replace(path)


def all_finite(state: object) -> bool:
    """Whether every tensor in these nested dictionaries and lists is finite."""
    if isinstance(state, Tensor):
        return bool(state.isfinite().all())
    values = state.values() if isinstance(state, dict) else state
    return not isinstance(state, dict | list) or all(map(all_finite, values))


def read_state(path: Path) -> dict[str, object]:
    """The state in one file.

    Raises:
        ValueError: it is missing, damaged, or holds more than tensors and plain values.
    """
    try:
        content = path.read_bytes()
        content, digest = content[:-32], content[-32:]
        if hashlib.sha256(content).digest() != digest:
            raise ValueError("its SHA-256 is another")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about foreign pickles: they are refused
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise TypeError("it holds no dictionary")
        return state
    except Exception as error:  # whatever a foreign file can raise
        raise ValueError(f"{path}: {first_line(error)}") from None


# ---------------------------------------------------------------- seeds and provenance


def derive_seed(*key: object) -> int:
    """A seed that is a pure function of `key`, such as ("augmentation", seed, epoch, step)."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "little")


def generator(*key: object) -> torch.Generator:
    """A CPU random generator that is a pure function of `key`."""
    return torch.Generator().manual_seed(derive_seed(*key))


@functools.cache
def git_commit() -> str:
    """The commit of these scripts, with `-dirty` after it if they were edited; or `unknown`."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        here = Path(__file__).resolve().parent
        result = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide a result."""
    others = {name: importlib.metadata.version(name) for name in ("torchvision", "numpy")}
    return {"python": platform.python_version(), "torch": torch.__version__} | others


# ---------------------------------------------------------------- processes and devices


def init_processes(deterministic: bool = False) -> tuple[torch.device, int, int]:
    """Device, rank and number of processes: one process, or those that torchrun started.

    CUDA, then MPS, then the CPU, whichever is there; NCCL between CUDA devices, else Gloo. Float32
    matrix products may use TF32, and cuDNN times its algorithms, since every batch has the same
    shape; unless they are to be `deterministic` (pytorch.org/docs/stable/notes/randomness.html).
    """
    keep_freed_memory()
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = not deterministic
    rank, world_size = from_environment("RANK", "0"), from_environment("WORLD_SIZE", "1")
    here = local_rank()
    if world_size > 1:
        from_environment("MASTER_PORT")
    if torch.cuda.is_available():
        device = torch.device("cuda", here)
        torch.cuda.set_device(device)
    elif torch.backends.mps.is_available() and world_size == 1:
        device = torch.device("mps")
    else:
        device = torch.device("cpu")
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, rank, world_size


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


@contextlib.contextmanager
def first_on_each_machine() -> Iterator[None]:
    """One process of each machine runs the block first (a download, say), then the others."""
    if dist.is_initialized() and local_rank() != 0:
        dist.barrier()
    yield
    if dist.is_initialized() and local_rank() == 0:
        dist.barrier()


def num_processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that prints and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def sum_over_processes(tensor: Tensor) -> Tensor:
    """`tensor`, summed in place over all processes; itself where there is one."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def from_main(value: object) -> object:
    """What rank 0 passes, on every process."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def largest(*values: int) -> list[int]:
    """Of each value the largest that any process has, on every process."""
    if not dist.is_initialized():
        return list(values)
    on_gpu = dist.get_backend() == "nccl"
    tensor = torch.tensor(values, device="cuda" if on_gpu else "cpu")
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def share_buffers(model: nn.Module) -> None:
    """Give every process rank 0's BN statistics, so that all test the network that is saved."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


class StopSignals:
    """In its block, a signal that asks the process to end is only noted, in `received`.

    SIGINT (Ctrl-C), SIGTERM, and SIGUSR1, which SLURM sends when a job's time runs out. A second
    Ctrl-C has its usual effect; under torchrun, which repeats every signal, none has.
    """

    NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")  # Windows has no SIGUSR1

    def __init__(self) -> None:
        self.received = 0  # number of the first signal
        self._before = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # else they reach another
            for name in self.NAMES:
                if number := getattr(signal, name, None):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT and self.received and num_processes() == 1:
            raise KeyboardInterrupt
        self.received = self.received or number


# ---------------------------------------------------------------- optimisation


class Muon(torch.optim.Optimizer):
    """Momentum on convolution filters, with every update made orthogonal.

    A layer's (O, I, K, K) weights are one matrix of O rows. Its update, with Nesterov momentum, is
    replaced by the nearest matrix whose singular values are all about 1, so that every direction
    learns at one pace (Jordan et al., kellerjordan.github.io/posts/muon, 2024). The weights are
    kept at the norm sqrt(O): batch normalisation makes the loss blind to their scale, so `lr` is
    how far they turn in a step, and weight decay would only be another learning rate.

    torch.optim.Muon takes matrices alone and does not hold the norm.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """Update all filters from their gradients."""
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                velocity = state["momentum_buffer"].mul_(group["momentum"]).add_(weight.grad)
                update = weight.grad.add(velocity, alpha=group["momentum"])
                weight.mul_(len(weight) ** 0.5 / weight.norm())
                weight.add_(orthogonalize(update.flatten(1)).view_as(weight), alpha=-group["lr"])


def orthogonalize(matrix: Tensor) -> Tensor:
    """The matrix with the same singular vectors, its singular values all moved to about 1.

    Three Newton-Schulz steps of a quintic in the matrix; its coefficients, of Jordan's, climb fast
    from 0 and leave the values between 0.5 and 1.5, which is enough.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalize(matrix.T).T  # the smaller of the two Gram matrices
    x = matrix / (matrix.norm() + 1e-7)
    if has_bfloat16(x.device):
        x = x.bfloat16()
    for _ in range(3):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.to(matrix.dtype)


@contextlib.contextmanager
def uphill(model: nn.Module, radius: float) -> Iterator[None]:
    """Inside, the weights stand where the loss is about the largest near by, and BN learns nothing.

    A gradient taken there and applied back here finds flat minima: sharpness-aware minimisation
    (Foret et al., arXiv:2010.01412), in its adaptive form (Kwon et al., arXiv:2102.11600), whose
    neighbourhood grows with each weight, since batch normalisation makes the loss blind to scale.

    Args:
        model: it holds the gradients of the loss here.
        radius: how far w + e may be: |e / w| is at most this.
    """
    weights = [p for p in model.parameters() if p.grad is not None]
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    here, momentum = [w.detach().clone() for w in weights], [layer.momentum for layer in norms]
    with torch.no_grad():
        sizes = torch._foreach_abs(weights)
        slopes = torch._foreach_mul(sizes, [w.grad for w in weights])
        steepness = torch.stack(torch._foreach_norm(slopes)).norm() + 1e-12
        torch._foreach_addcmul_(weights, sizes, torch._foreach_mul(slopes, radius / steepness))
    for layer in norms:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, value in zip(norms, momentum, strict=True):
            layer.momentum = value
        with torch.no_grad():
            torch._foreach_copy_(weights, here)


# ---------------------------------------------------------------- evaluation


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    images: Tensor,
    normalize: Callable[[Tensor], Tensor],
    flip_tta: bool = False,
) -> Tensor:
    """Logits of every image, (N, num_classes) float32, on the images' device.

    Under torchrun each process takes every n-th batch and all get all logits, the same to the
    last bit for any number of processes.

    Args:
        model: a `ResNet`; it is put into eval mode.
        images: (N, 3, 32, 32) uint8.
        normalize: turns uint8 images into what the model takes.
        flip_tta: average the logits with those of the mirrored images (test-time augmentation).
    """
    model.eval()
    rank = dist.get_rank() if dist.is_initialized() else 0
    logits = torch.zeros(len(images), model.linear.out_features, device=images.device)
    batches = list(zip(images.split(EVAL_BATCH), logits.split(EVAL_BATCH), strict=True))
    for batch, out in batches[rank :: num_processes()]:
        x = normalize(batch)
        out.copy_((model(x) + model(x.flip(-1))) / 2 if flip_tta else model(x))
    return sum_over_processes(logits)


@dataclass(frozen=True)
class Score:
    """How a model did on a labelled set."""

    loss: float  # mean cross entropy, nats
    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """Top-1, in percent."""
        return 100 * self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """95% confidence interval of the accuracy, in percent (Wilson's score interval, 1927)."""
        z, n, p = 1.959964, self.total, self.correct / self.total
        center = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        return 100 * (center - half), 100 * (center + half)

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"{self.accuracy:.2f}% ({self.correct:,} of {self.total:,};"
            f" 95% interval {low:.2f} to {high:.2f}), loss {self.loss:.4f}"
        )


def score(logits: Tensor, labels: Tensor) -> Score:
    """Mean cross entropy and top-1 of (N, num_classes) logits against (N,) labels."""
    correct = (logits.argmax(1) == labels).sum().item()
    return Score(F.cross_entropy(logits, labels).item(), correct, len(labels))


# ---------------------------------------------------------------- Weights & Biases


class WandbRun:
    """A Weights & Biases run that can never stop the training.

    The library is imported only if it is used. The first failure, of whatever kind, prints one
    warning and switches it off.

    Args:
        mode: `auto` (online when logged in, else offline; never a prompt), `online`, `offline`
            or `disabled`.
        folder: the run folder; the library's own files go into `folder/wandb`.
        config: what to show as the run's configuration.
        run_id: the id of the run to go on with, or None for a new one.
        group: what the run is one of, if it is.
    """

    def __init__(
        self,
        mode: str,
        folder: Path,
        config: dict,
        run_id: str | None = None,
        group: str | None = None,
    ) -> None:
        self.id = run_id
        self.group = group
        self.run = None
        if mode != "disabled":
            self._attempt(self._start, mode, folder, config)

    def _start(self, mode: str, folder: Path, config: dict) -> None:
        import wandb

        if mode == "auto":
            mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
        self.run = wandb.init(
            project="tpsnet",
            name=folder.name,
            group=self.group,
            id=self.id,
            resume="allow",
            mode=mode,
            dir=folder,
            config=config,
            settings=wandb.Settings(silent=True, console="off", init_timeout=30),
        )
        self.id = self.run.id
        where = self.run.url if mode == "online" else f"offline, in {folder / 'wandb'}"
        print(f"Weights & Biases: run {self.id}, {where}")

    def log(self, row: dict[str, float | None]) -> None:
        """Log one row of log.csv."""
        if self.run:
            metrics = {key: value for key, value in row.items() if value is not None}
            self._attempt(self.run.log, metrics, step=row["epoch"])

    def finish(self, summary: dict[str, float], curves: Path) -> None:
        """Log the final figures and the learning curves, and end the run."""
        if self.run:
            self._attempt(self._finish, summary, curves)

    def _finish(self, summary: dict[str, float], curves: Path) -> None:
        import wandb

        self.run.log({"curves": wandb.Image(str(curves))})
        self.run.summary.update(summary)
        self.run.finish()

    def _attempt(self, action: Callable[..., None], *args: object, **options: object) -> None:
        try:
            action(*args, **options)
        except Exception as error:  # whatever it is, a logger must not cost a training run
            warn(f"wandb: {first_line(error)}; going on without it")
            self.run = None
