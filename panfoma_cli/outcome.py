"""How a verb ends: what it prints for people and for machines, and its exit code."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text


# Of a command that was stopped by Ctrl-C, as of a shell's.
STOPPED = 130

_screen = Console(highlight=False, soft_wrap=True)
_errors = Console(highlight=False, soft_wrap=True, stderr=True)


_is_debugging = False


def debug(is_on: bool) -> None:
    """Whether errors are shown with their traceback."""
    global _is_debugging
    _is_debugging = is_on


def say(text: object, style: str = "") -> None:
    """Print for people, in colour where that is a terminal; markup in the text is left as it is."""
    _screen.print(Text(str(text), style=style))


def say_table(table: Table) -> None:
    """Print a table."""
    _screen.print(table)


def say_json(content: object) -> None:
    """Print for machines."""
    typer.echo(json.dumps(content, indent=2))


def complain(text: str, style: str = "red") -> None:
    """Print to stderr."""
    _errors.print(Text(text, style=style))


def _is_foreseen(error: Exception) -> bool:
    """Whether an error is about the cells, a file, an option or the surroundings, and its text says what to do."""
    if isinstance(error, (ImportError, MemoryError, OSError, ValueError)):  # also where the package cannot be imported
        return True
    from panfoma_hf.data.corpus import CorpusError
    from panfoma_hf.hub import HubError
    from panfoma_hf.training import PretrainingError

    return isinstance(error, (CorpusError, HubError, PretrainingError))


@contextmanager
def told(kept: str | Callable[[], str] = "nothing was written.") -> Iterator[None]:
    """Say what went wrong without a traceback, and end with exit code 1, or 130 if it was stopped.

    Parameters
    ----------
    kept
        What is there after Ctrl-C, and how to go on; or a function that looks for it.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # one for each file of weights that is read, not those of cells
    try:
        yield
    except KeyboardInterrupt:
        complain(f"stopped: {kept if isinstance(kept, str) else kept()}", "yellow")
        raise typer.Exit(STOPPED) from None
    except typer.Exit:
        raise
    except Exception as error:
        if _is_debugging:
            raise
        if _is_foreseen(error):
            complain(f"error: {error}")
        else:
            again = " ".join(["panfoma --debug", *sys.argv[1:]])
            complain(
                f"error: {type(error).__name__}: {error}\nThis is a fault of panfoma, not yours: please report it with "
                f"what `{again}` shows."
            )
        raise typer.Exit(1) from None
