"""Output and exit codes of the command line: results on stdout, everything else on stderr, no tracebacks.

Exit codes: 0 done, or saved because a scheduler wants the machine, 2 something the user gave cannot be used, 130
stopped by Ctrl-C, 1 a fault of ours.
"""

from __future__ import annotations

import errno
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from saekit.config.elsewhere import answer, options_in
from saekit.errors import SILENCE, Interrupted, UserError
from saekit.text import command, for_screen

EXIT_FAULT, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
LAUNCHED = "SAEKIT_LAUNCHED"
"""In the environment of processes that `--launch` started: its options."""

TyperUsageError: Any = typer.BadParameter.__bases__[0]
"""The class that Typer raises for an unknown option, for example: click's, of which newer Typers have a copy."""


def results() -> Console:
    """Return where results go."""
    return Console()


def messages() -> Console:
    """Return where progress, hints and errors go."""
    # FORCE_COLOR, which Jupyter sets, would let rich draw its spinner into a pipe.
    return Console(stderr=True, force_terminal=None if sys.stderr.isatty() else False)


def run(app: Callable[..., Any]) -> None:
    """Run the app; whatever goes wrong becomes one line and an exit code, unless `--debug` is among the arguments."""
    debug = "--debug" in sys.argv
    try:
        # Standalone, Typer would end by itself: with a box around the line, and with its own code after Ctrl-C.
        code = app(None if sys.argv[1:] else ["--help"], prog_name="saekit", standalone_mode=False)
    except TyperUsageError as error:
        if debug:
            raise
        command = error.ctx.command_path if error.ctx else "saekit"
        fail(f"{_usage_problem(error).rstrip('.')}; see {command} --help", EXIT_USAGE)
    except UserError as error:
        if debug:
            raise
        fail(str(error), EXIT_USAGE)
    except (KeyboardInterrupt, typer.Abort):
        leave(EXIT_INTERRUPTED)
    except BrokenPipeError:
        leave(EXIT_FAULT)  # `saekit inspect ... | head` has read enough
    except Exception as error:
        if debug:
            raise
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # whichever option it was
            fail(f"{error.filename}: the name is too long for a file", EXIT_USAGE)
        text = (str(error).strip() or "no message").splitlines()[0]
        fail(
            f"{type(error).__name__}: {text} (this is not expected: run it again with --debug for details)", EXIT_FAULT
        )
    if code:
        leave(code)


def _usage_problem(error: Any) -> str:
    """Say what Typer refused; of an option that another tool has, what to use instead in this command."""
    name = getattr(error, "option_name", None)
    if isinstance(name, str) and error.ctx is not None:
        here = {option for parameter in error.ctx.command.params for option in parameter.opts}
        instead = answer(name)
        if name not in here and instead is not None and options_in(instead) <= here:
            return f"there is no option {name}: {instead}"
    return str(error.format_message())


def fail(message: str, code: int) -> NoReturn:
    """Print one line that starts with `Error:` and leave.

    Before the ranks of a run have met, each of them fails by itself and for the same reason: rank 0 says it.
    """
    if int(os.environ.get("RANK", "0")) > 0 and not _have_met():
        time.sleep(SILENCE)
        leave(code)
    # A name may hold a line break, or what moves a terminal's cursor.
    shown = "".join(each if each.isprintable() else repr(each)[1:-1] for each in message)
    console = messages()
    line = Text(for_screen(f"Error: {shown}", console), style="default")
    line.stylize("bold red", 0, len("Error:"))
    console.print(line, soft_wrap=True)
    leave(code)


def _have_met() -> bool:
    torch = sys.modules.get("torch")  # importing it takes seconds, and it is imported before ranks can meet
    return torch is not None and torch.distributed.is_initialized()


def leave(code: int) -> NoReturn:
    """Exit with a code, also when stdout is a closed pipe."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if code and _have_met():  # taking connections down can mean to wait for a rank that will not answer
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)


@contextmanager
def resumable() -> Iterator[None]:
    """Training inside: when it was stopped and has saved, say how to go on."""
    try:
        yield
    except Interrupted as interruption:
        # Caught here and not in `run`: Typer would take it for an ordinary Ctrl-C.
        launch = shlex.split(os.environ.get(LAUNCHED, ""))
        console = messages()
        shown = command(["saekit", "train", *launch, "--resume", str(interruption.run_dir)], console, "  ")
        if "RANK" in os.environ and not launch:  # somebody else's launcher has to start the next one as well
            shown = f"  your launcher, and {shown.lstrip()}"
        if os.environ.get("RANK", "0") == "0":
            console.print(Text(f"Stopped after step {interruption.step}. Continue with:\n{shown}"), soft_wrap=True)
        leave(EXIT_INTERRUPTED if interruption.by_user else 0)


def say_next(run_dir: Path) -> None:
    """After a run, say how to look at it."""
    if os.environ.get("RANK", "0") == "0":
        console = messages()
        near = os.path.relpath(run_dir)
        shown = str(run_dir) if near.startswith(os.pardir) else near
        lines = [command(["saekit", verb, shown], console, "  ") for verb in ("inspect", "eval", "report")]
        console.print(Text("\n".join(["Look at it with:", *lines])), soft_wrap=True)


class Bar:
    """A line of text with a bar, on a terminal; the text alone where stderr is a file."""

    def __init__(self, shown: bool) -> None:
        # Imported here, as what it costs would be paid by every command's start.
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

        self.console = Console(stderr=True, quiet=not shown)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self._task = self.bar.add_task("", total=None)

    def status(self, text: str) -> None:
        """Show what is going on now."""
        self.bar.update(self._task, description=text)
        if not self.console.is_terminal:
            self.console.print(text, soft_wrap=True, highlight=False)

    def update(self, done: int, of: int) -> None:
        """Show how far it is."""
        self.bar.update(self._task, completed=done, total=of)


@contextmanager
def progress(shown: bool = True) -> Iterator[Bar]:
    """A bar on stderr for as long as the work inside takes, gone afterwards; nothing unless it is to be shown."""
    bar = Bar(shown)
    with bar.bar:
        yield bar
