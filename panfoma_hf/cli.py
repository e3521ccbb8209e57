"""The command `panfoma`: thin subcommands over the package's functions."""

import json
from pathlib import Path
from typing import Annotated

import typer


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="PanFoMa for single-cell RNA sequencing.",
)


@app.callback()
def _panfoma() -> None:
    """PanFoMa for single-cell RNA sequencing."""


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="Cells: .h5ad, .zarr, .loom, 10x .h5 or .mtx, .csv or .tsv.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    model: Annotated[str | None, typer.Option(help="A checkpoint, to look for its genes and measure its time.")] = None,
    layer: Annotated[str | None, typer.Option(help="The matrix to read: a layer's name, X or raw.")] = None,
    gene_column: Annotated[str | None, typer.Option(help="The column of var with gene names.")] = None,
    min_coverage: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of the counts that must fall on known genes.")
    ] = None,
) -> None:
    """Say what is in a file of cells, and whether PanFoMa can read it: exit code 0 if so, 1 if something is to be done.

    Example: panfoma check cells.h5ad --model my-checkpoint
    """
    from .data.cells import MIN_COVERAGE
    from .doctor import check

    report = check(
        file,
        model,
        layer=layer,
        gene_column=gene_column,
        min_coverage=MIN_COVERAGE if min_coverage is None else min_coverage,
    )
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else str(report))
    raise typer.Exit(0 if report.is_ready else 1)
