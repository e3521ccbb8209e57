"""Verbs over a file of cells: check, annotate, embed, demo."""

import re
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from .outcome import say, say_json, say_table, told


app = typer.Typer(rich_markup_mode="markdown")

# Arguments and options that several verbs share.
Cells = Annotated[Path, typer.Argument(help="Cells, of any format that `panfoma check` reads.")]
Out = Annotated[Path, typer.Option("--out", help="The .h5ad or .zarr to write: a copy of the cells with the results.")]
Layer = Annotated[str | None, typer.Option(help="The matrix to read: a layer's name, X or raw.")]
GeneColumn = Annotated[str | None, typer.Option(help="The column of var with gene names.")]
MinCoverage = Annotated[
    float | None, typer.Option(min=0, max=1, help="Share of the counts that must fall on known genes.")
]
Memory = Annotated[
    str | None, typer.Option(help="What a batch may take, such as 4GB; 1GiB on a CPU, half of what is free on a GPU.")
]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Cells of a batch, in place of --memory.")]
Dtype = Annotated[str, typer.Option(help="float32, or bfloat16: faster on a GPU, right to two or three digits.")]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda:1; a GPU where there is one.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of the model on a CPU.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an older output when the new one is whole.")]
Restart = Annotated[bool, typer.Option("--restart", help="Begin anew instead of going on with a run that was cut off.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print what was done as JSON, and draw no progress bar.")]


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="Cells: .h5ad, .zarr, .loom, 10x .h5 or .mtx, .csv or .tsv.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    model: Annotated[str | None, typer.Option(help="A checkpoint, to look for its genes and measure its time.")] = None,
    layer: Layer = None,
    gene_column: GeneColumn = None,
    min_coverage: MinCoverage = None,
) -> None:
    """Say what is in a file of cells, and whether PanFoMa can read it: exit code 0 if so, 1 if something is to be done.

    Example: panfoma check cells.h5ad --model my-checkpoint
    """
    with told():
        from panfoma_hf.doctor import check

        options = {} if min_coverage is None else {"min_coverage": min_coverage}
        report = check(file, model, layer=layer, gene_column=gene_column, **options)
    if as_json:
        say_json(report.to_dict())
    else:
        for line in str(report).splitlines():
            say(line, _style_of(line))
    raise typer.Exit(0 if report.is_ready else 1)


def _style_of(line: str) -> str:
    """How a line of a report of `check` looks where there are colours."""
    if line == "ready":
        return "bold green"
    if line == "not ready:" or re.match(r"\d+\. ", line):
        return "red"
    return "yellow" if line.startswith("note: ") else ""


@app.command()
def annotate(
    cells: Cells,
    model: Annotated[str, typer.Argument(help="A fine-tuned checkpoint: a folder, or a name on the Hub.")],
    out: Out,
    embedding_key: Annotated[str | None, typer.Option(help="Key of obsm to write embeddings to, too.")] = None,
    min_score: Annotated[
        float | None, typer.Option(min=0, max=1, help="Cells of a lower score are Unassigned; the checkpoint's own.")
    ] = None,
    layer: Layer = None,
    gene_column: GeneColumn = None,
    min_coverage: MinCoverage = None,
    memory: Memory = None,
    batch_size: BatchSize = None,
    dtype: Dtype = "float32",
    device: Device = None,
    threads: Threads = None,
    overwrite: Overwrite = False,
    restart: Restart = False,
    as_json: AsJson = False,
) -> None:
    """Name each cell of a file, of any size, by a fine-tuned checkpoint.

    Exit code 1 if something is wrong with the cells, the checkpoint or an option; 130 if it was stopped: the same
    command then goes on where it was. On several GPUs: `accelerate launch -m panfoma_hf annotate ...`

    Example: panfoma annotate cells.h5ad my-checkpoint --out annotated.h5ad
    """
    _to_file(
        "annotate",
        cells,
        model,
        out,
        as_json,
        embedding_key=embedding_key,
        min_score=min_score,
        layer=layer,
        gene_column=gene_column,
        min_coverage=min_coverage,
        memory=memory,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        num_threads=threads,
        overwrite=overwrite,
        resume=not restart,
    )


@app.command()
def embed(
    cells: Cells,
    model: Annotated[str, typer.Argument(help="A checkpoint: a folder, or a name on the Hub.")],
    out: Out,
    key: Annotated[str, typer.Option(help="Key of obsm.")] = "X_panfoma",
    layer: Layer = None,
    gene_column: GeneColumn = None,
    min_coverage: MinCoverage = None,
    memory: Memory = None,
    batch_size: BatchSize = None,
    dtype: Dtype = "float32",
    device: Device = None,
    threads: Threads = None,
    overwrite: Overwrite = False,
    restart: Restart = False,
    as_json: AsJson = False,
) -> None:
    """Embed each cell of a file, of any size.

    Exit codes and several GPUs as with `panfoma annotate`.

    Example: panfoma embed cells.h5ad my-checkpoint --out embedded.h5ad
    """
    _to_file(
        "embed",
        cells,
        model,
        out,
        as_json,
        key_added=key,
        layer=layer,
        gene_column=gene_column,
        min_coverage=min_coverage,
        memory=memory,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        num_threads=threads,
        overwrite=overwrite,
        resume=not restart,
    )


def _to_file(verb: str, cells: Path, model: str, out: Path, as_json: bool, **options) -> None:
    """Run `annotate` or `embed` from file to file, and say what was done."""
    if options["min_coverage"] is None:
        del options["min_coverage"]
    with told(lambda: _finished_of(out, options["resume"])):
        from panfoma_hf import inference

        report = getattr(inference, verb)(cells, model, output=out, progress=not as_json, **options)
    if not report.is_written:  # of several processes one tells
        return
    if as_json:
        say_json(report.to_dict())
        return
    say(report.summary)
    for key, counts in report.names.items():
        table = Table(box=None, pad_edge=False)
        table.add_column(key)
        table.add_column("cells", justify="right")
        table.add_column("share", justify="right")
        for name, count in sorted(counts.items(), key=lambda item: -item[1]):
            table.add_row(Text(name), f"{count:,}", f"{count / report.cells:.1%}")
        say_table(table)
    say(report.written)


def _finished_of(out: Path, resume: bool) -> str:
    """What is kept of a run that was stopped."""
    parts = Path(f"{out}.parts")  # of `parts_folder`, which may be what was being imported
    if not parts.exists():
        return "nothing was finished."
    again = "The same command" if resume else "The same command without --restart"
    return f"what is finished is kept in {parts}. {again} goes on from there{'; --restart begins anew' * resume}."


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")] = Path("runs/demo"),
    mode: Annotated[str, typer.Option(help="probe, lora or full; the latter two take minutes.")] = "probe",
    num_cells: Annotated[
        int | None, typer.Option("--cells", min=100, help="Use only so many, for a quick look.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the split and of the fine-tune.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print scores and times as JSON.")] = False,
) -> None:
    """Fine-tune on real pancreas cells and name unseen ones, beside simple methods; needs panfoma-hf[demo].

    The folder gets the checkpoint, the named cells, a UMAP, a confusion matrix and metrics.json. Exit code 1 if a fresh
    process that loads the checkpoint names a cell otherwise.

    Example: panfoma demo --out demo
    """
    with told(f"what was written stays in {out}."), redirect_stdout(sys.stderr):
        from panfoma_hf.demo import WRITTEN, run_demo

        report = run_demo(out, mode=mode, num_cells=num_cells, seed=seed)
    if as_json:
        say_json(report.to_dict())
    else:
        table = Table(box=None, pad_edge=False)
        table.add_column(f"{report.cells:,} held-out cells", min_width=40)
        table.add_column("accuracy", justify="right")
        table.add_column("macro-F1", justify="right")
        for name, scores in report.scores.items():
            table.add_row(name, f"{scores['accuracy']:.3f}", f"{scores['macro_f1']:.3f}")
        say_table(table)
        say(f"Written to {out}/: {', '.join(WRITTEN)}")
        say(
            f"A fresh process gave {report.same_names:,} of {report.cells:,} held-out cells the same name.",
            "" if report.is_same else "red",
        )
    raise typer.Exit(0 if report.is_same else 1)
