"""How a script starts and ends: what a user can cause is one line and a status, no traceback.

It is the first import of every script, and loads nothing itself: while the libraries load, which
takes seconds, Ctrl-C and a missing library are one line too, and a closed stream (`>&-`) is open.
"""

import contextlib
import functools
import inspect
import io
import itertools
import os
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


def explain(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Python's last word on an exception, but a line for those that come while libraries load."""
    missing = (getattr(error, "name", None) or "").split(".")[0]
    ours = Path(__file__).with_name(f"{missing}.py").exists()
    if issubclass(kind, ModuleNotFoundError) and missing and not ours:
        print(
            f"error: {missing}: not installed; run `pip install -r requirements.txt`",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)
    if issubclass(kind, KeyboardInterrupt):  # after which Python ends by the signal: status 130
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


open_closed_streams()
sys.excepthook = explain


def run_script(main: Callable[[list[str]], None]) -> None:
    """Run a script's `main(arguments)`; an error a user can cause ends in one line and a status.

    Exit status 2 for bad input, 1 for a diverged training, 128 and the signal's number (130 for
    Ctrl-C) for one that a signal stopped.
    """
    import torch

    from utils import DivergenceError, InputError, StoppedError, print_error

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a ± where only ASCII may be printed
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except (InputError, DivergenceError) as error:
        print_error(f"error: {error}")
        sys.exit(2 if isinstance(error, InputError) else 1)
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
