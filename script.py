"""How a script starts and ends: what a user can cause is one line and a status, no traceback.

It is the first import of every script, and loads nothing itself: while the libraries load, which
takes seconds, Ctrl-C ends the process and a missing library is one line. A standard stream that is
closed (`>&-`) is opened.
"""

import atexit
import contextlib
import functools
import gc
import inspect
import io
import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType


def open_closed_streams() -> None:
    """Send what goes to a closed standard stream to nowhere, not into the next file opened."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            stream = os.open(os.devnull, os.O_RDWR)
            if stream != number:
                os.dup2(stream, number, inheritable=True)
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))


def let_ctrl_c_end_it() -> None:
    """Have SIGINT end the process, if it is one of our scripts, until `run_script`.

    Not every library survives a KeyboardInterrupt while it loads with dignity.
    """
    main_file = getattr(sys.modules["__main__"], "__file__", None)
    ours = main_file and Path(__file__).resolve().parent in Path(main_file).resolve().parents
    if ours and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def explain_missing(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Tell of a library that is not installed in a line, of any other exception as Python does."""
    missing = (getattr(error, "name", None) or "").split(".")[0]
    ours = Path(__file__).with_name(f"{missing}.py").exists()
    if not issubclass(kind, ModuleNotFoundError) or ours:
        sys.__excepthook__(kind, error, traceback)
        return
    remedy = "run `pip install -r requirements.txt`"
    print(f"error: {missing}: not installed; {remedy}", file=sys.stderr, flush=True)
    os._exit(2)


open_closed_streams()
let_ctrl_c_end_it()
sys.excepthook = explain_missing
atexit.register(gc.freeze)  # to look for garbage in all that was loaded would take a second


def run_script(main: Callable[[list[str]], None]) -> None:
    """Run a script's `main(arguments)`; an error a user can cause ends in one line and a status.

    Exit status 2 for bad input, 1 for a training that diverged or a search that failed, 128 and the
    signal's number (130 for Ctrl-C) for what a signal stopped.
    """
    import torch

    from utils import (
        DivergenceError,
        InputError,
        SearchError,
        StoppedError,
        first_line,
        print_error,
    )

    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a ± where only ASCII may be printed
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except (InputError, DivergenceError, SearchError) as error:
        print_error(f"error: {error}")
        sys.exit(2 if isinstance(error, InputError) else 1)
    except torch.OutOfMemoryError as error:  # of a GPU
        print_error(f"error: batch_size: {first_line(error)}; use a smaller one, or a free GPU")
        sys.exit(2)
    except StoppedError as stop:
        print_error(str(stop))
        sys.exit(128 + stop.number)
    except KeyboardInterrupt as error:
        print_error(str(error) or "interrupted")
        sys.exit(130)
    except OSError as error:  # often of what is printed: its disk is full, or `head` has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python tries again
        if isinstance(error, BrokenPipeError):
            sys.exit(128 + 13)  # SIGPIPE
        print_error(f"error: {error}")
        sys.exit(2)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def parse_command_line(target: Callable, args: list[str], **options: object) -> object:
    """tyro.cli(target), with a mistake reported as an InputError instead of a box of text.

    For a function it returns the call, ready to be made, so that only the parsing runs here.
    """
    from utils import InputError

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
    # A box: a title, rules, and paragraphs, of which the first says what is wrong.
    lines = [line.strip("│╭╮╰╯ ") for line in printed.getvalue().splitlines()[1:]]
    paragraphs = itertools.groupby(lines, key=lambda line: line.strip("─-") != "")
    message = next(" ".join(lines) for is_text, lines in paragraphs if is_text)
    raise InputError(f"{message.rstrip('.')}; -h explains every option")
