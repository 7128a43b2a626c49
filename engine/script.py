"""How a script starts, is stopped and ends.

Errors that a user can cause end in one line and an exit status, without a traceback. Importing this
file changes nothing, needs the standard library alone, and works on older Pythons too, so that it
can say which one is needed.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import inspect
import io
import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, get_args, get_origin, get_type_hints

OLDEST_PYTHON = (3, 11)
# In the messages of a CPU, GPUs of NVIDIA and Apple, cuBLAS and C++. Only CUDA has a class for it.
OUT_OF_MEMORY = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED", "bad_alloc")


def run_script(script: str | Callable[[list[str]], None]) -> None:
    """Call `main(arguments)` of the module `script`, or that function itself, and exit.

    Exit status 2 for bad input, too little memory, a full disk, a missing library or an old Python;
    1 for a training that diverged or a search that failed; 128 plus the number of the signal for a
    stop (130 for Ctrl-C, 141 for a closed pipe).
    """
    if sys.version_info < OLDEST_PYTHON:
        this, needed = (".".join(map(str, v)) for v in (sys.version_info[:2], OLDEST_PYTHON))
        print(f"error: python: this is {this}; use {needed} or newer", file=sys.stderr)
        sys.exit(2)
    try:
        Path.home()
    except RuntimeError:  # no HOME, and a user that the system does not know
        os.environ["HOME"] = "/"  # as in Docker; Ray and W&B do not load without one
    os.environ["MPLBACKEND"] = "agg"  # that of a notebook may be missing here; no window is opened
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # silent where it cannot write a cache
    # While libraries load, Ctrl-C ends the process at once: some print tracebacks when interrupted.
    handler = signal.getsignal(signal.SIGINT)
    if handler == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        main = script if callable(script) else importlib.import_module(script).main
        utils = importlib.import_module("utils")
        torch = importlib.import_module("torch")
    except ModuleNotFoundError as error:
        sys.exit(report_missing(error))
    signal.signal(signal.SIGINT, handler)

    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell, `>&-`, or of a program without a terminal
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 (until the process ends)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # print ? for a ± where only ASCII is possible
    all_end = False  # of the processes that torchrun started
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
        all_end = True
        sys.exit(0)
    except ModuleNotFoundError as error:
        sys.exit(report_missing(error))
    except (utils.InputError, utils.DivergenceError, utils.SearchError) as error:
        utils.print_error(f"error: {error}")
        sys.exit(2 if isinstance(error, utils.InputError) else 1)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(s in str(error) for s in OUT_OF_MEMORY):
            raise
        problem = utils.first_line(error).rpartition("DefaultCPUAllocator: ")[2]
        utils.print_error(
            f"error: memory: {problem}; free some, or give train.py or predict.py a smaller"
            " --batch-size",
            own=True,
        )
        sys.exit(2)
    except utils.StoppedError as stop:
        utils.print_error(str(stop))
        all_end = True
        sys.exit(128 + stop.number)
    except KeyboardInterrupt as error:
        utils.print_error(str(error) or "interrupted")
        sys.exit(130)
    except OSError as error:  # of stdout: a full disk, or `head` that has ended; seldom another
        # Otherwise Python tries to write the rest again when it exits.
        if not error.filename:
            with contextlib.suppress(OSError):  # a notebook's stdout may have no number
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            sys.exit(128 + 13)  # SIGPIPE
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and not error.filename:
            remedy = "make room, or redirect it to another disk"
            error = f"stdout: cannot be written ({error.strerror}); {remedy}"
        utils.print_error(f"error: {error}", own=True)
        sys.exit(2)
    finally:
        if torch.distributed.is_initialized():
            if not all_end and torch.distributed.get_backend() == "nccl":
                end_alone(sys.exception())
            torch.distributed.destroy_process_group()


def end_alone(error: BaseException) -> NoReturn:
    """End this process at once, by an error that the others may not have.

    They may be waiting for it, and NCCL would wait for them before it lets this one go. So torchrun
    must see it end, and end them.
    """
    status = error.code if isinstance(error, SystemExit) else 1
    if not isinstance(error, SystemExit):
        traceback.print_exception(error)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def report_missing(error: ModuleNotFoundError) -> int:
    """Print which library is missing and how to install it; returns the exit status.

    Raises:
        ModuleNotFoundError: it is one of our own modules.
    """
    missing = (error.name or "").partition(".")[0]
    root = Path(__file__).resolve().parents[1]
    if not missing or (root / missing).is_dir() or (root / f"{missing}.py").exists():
        raise error
    remedy = "run `pip install -r requirements.txt`"
    if missing in ("ray", "optuna"):
        remedy = "run `pip install -r requirements-dev.txt`"
    print(f"error: {missing}: not installed; {remedy}", file=sys.stderr)
    return 2


def named_options(args: list[str]) -> set[str]:
    """The options of a command line, as the fields that they set, `data_dir` of `--data-dir=x`."""
    options = (arg.partition("=")[0] for arg in args if arg.startswith("--"))
    return {option.removeprefix("--").replace("-", "_") for option in options}


def plain_arguments(args: list[str], options: type | Callable) -> list[str]:
    """Rewrite the forms in which other scripts take their arguments as those of tyro.

    `--num-blocks [2,2,2]`, even if a shell has split it, becomes `--num-blocks 2 2 2`;
    `--compile True` becomes `--compile`, and `--compile=False` becomes `--no-compile`. Where the
    first argument is the checkpoint, `--checkpoint X` becomes it. The rank that `python -m
    torch.distributed.launch` adds is left out: it is in the environment too.

    Args:
        options: the dataclass or function that has the options as its fields or parameters.
    """
    hints = {f"--{k.replace('_', '-')}": hint for k, hint in get_type_hints(options).items()}
    flags = {o for o, hint in hints.items() if hint is bool}
    lists = {o for o, hint in hints.items() if tuple in map(get_origin, (hint, *get_args(hint)))}
    parameters = inspect.signature(options).parameters.values()
    first = {f"--{p.name}" for p in parameters if p.kind is p.POSITIONAL_ONLY} - lists
    words = []
    for arg in args:
        option, equals, value = arg.partition("=")
        if equals and option.replace("_", "-") in flags | lists | first:
            words += [option, value]
        elif not re.fullmatch(r"--local[-_]rank=\d+", arg):
            words.append(arg)
    begin, plain, option = [], [], ""
    for word in words:
        if word.startswith("--"):
            option = word.replace("_", "-")
            plain.append(word)
            continue
        if option in lists:
            plain += re.findall(r"[^\s,()\[\]]+", word)
            continue
        if option in flags and word.lower() in ("true", "false"):
            plain[-1] = option if word.lower() == "true" else option.replace("--", "--no-", 1)
        elif option in first:
            plain.pop()
            begin.append(word)
        else:
            plain.append(word)
        option = ""
    return begin + plain


class StopSignals:
    """Within the block, the first stop signal is stored, and acknowledged on stderr.

    These are SIGINT (Ctrl-C), SIGTERM, SIGUSR1, which SLURM sends when a job's time is running out,
    and SIGHUP, when the terminal closes, unless it is ignored as under nohup. A second Ctrl-C
    interrupts at once, except under torchrun, which sends every signal twice. Blocks may be nested;
    each installs the handlers anew, and the outermost resets `received`.
    """

    NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")  # Windows lacks the last two

    def __init__(self) -> None:
        self._received = 0  # number of the first signal, or 0
        under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        self._launcher = os.getppid() if under_torchrun else None
        self._replaced: list[dict[int, object]] = []  # handlers, by block
        self._terminals: list[int] = []  # those of stdout and stderr that are one

    @property
    def received(self) -> int:
        """Number of the first signal, or 0. The end of torchrun counts as SIGHUP."""
        return self._received or (signal.SIGHUP if self.orphaned else 0)

    @property
    def orphaned(self) -> bool:
        """True if torchrun has ended and left this process behind."""
        return self._launcher not in (None, os.getppid())

    def __enter__(self) -> StopSignals:
        if not self._replaced:
            self._received = 0
            self._terminals = [number for number in (1, 2) if os.isatty(number)]
        handlers = {}
        self._replaced.append(handlers)
        if threading.current_thread() is not threading.main_thread():
            return self  # Python delivers signals to the main thread alone
        for name in (name for name in self.NAMES if hasattr(signal, name)):
            number = getattr(signal, name)
            if name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN:
                continue
            handlers[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._replaced.pop().items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: object) -> None:
        name, alone = signal.Signals(number).name, os.environ.get("WORLD_SIZE", "1") == "1"
        if name == "SIGINT" and self._received and alone:
            raise KeyboardInterrupt("interrupted; --resume goes on from what was saved")
        if name == "SIGHUP":  # the terminal has closed, and writing to it would be an error
            for terminal in self._terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), terminal)
        if not self._received and os.environ.get("LOCAL_RANK", "0") == "0":
            again = "; again to stop at once" if name == "SIGINT" and alone else ""
            clear = "\r\x1b[K" if os.isatty(2) else ""  # of a progress bar
            with contextlib.suppress(OSError):
                # Not print, which may be interrupted in the middle of a line by the signal.
                os.write(2, f"{clear}{name}: stopping after this step{again}\n".encode())
        self._received = self._received or number


stop_signals = StopSignals()  # of this process
