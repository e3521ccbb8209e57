"""The command and its options; verbs are in the modules beside this one."""

from typing import Annotated

import typer

from . import cells, checkpoints, corpora, models
from .outcome import debug


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="PanFoMa for single-cell RNA sequencing.",
    epilog="Exit codes: 0 done; 1 something must be mended, and it says what; 2 a wrong option; 130 stopped by Ctrl-C.",
)


@app.callback()
def _panfoma(
    with_traceback: Annotated[bool, typer.Option("--debug", help="Show errors with their traceback.")] = False,
) -> None:
    """PanFoMa for single-cell RNA sequencing."""
    debug(with_traceback)


for verbs in (cells, models, checkpoints):
    app.add_typer(verbs.app)
app.add_typer(corpora.app, name="corpus")


def main() -> None:
    """What the command `panfoma` and ``python -m panfoma_hf`` run."""
    app(prog_name="panfoma")
