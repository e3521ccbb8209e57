"""The command `panfoma`: thin subcommands over the package's functions."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="PanFoMa for single-cell RNA sequencing.",
)
corpus = typer.Typer(no_args_is_help=True, help="Build, inspect and publish a corpus of tokenized cells.")
app.add_typer(corpus, name="corpus")


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


# Arguments and options that `annotate` and `embed` share.
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
    command then goes on where it was. On several GPUs: accelerate launch -m panfoma_hf annotate ...
    Example: panfoma annotate cells.h5ad my-checkpoint --out annotated.h5ad
    """
    from .inference import annotate

    _to_file(
        annotate,
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
    from .inference import embed

    _to_file(
        embed,
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


def _to_file(verb: Callable, cells: Path, model: str, out: Path, as_json: bool, **options) -> None:
    """Run `annotate` or `embed` from file to file, and say what was done."""
    from .inference import parts_folder

    if options["min_coverage"] is None:
        del options["min_coverage"]
    with _told(MemoryError):
        try:
            report = verb(cells, model, output=out, progress=not as_json, **options)
        except KeyboardInterrupt:
            parts = parts_folder(out)
            kept = f"what is finished is kept in {parts}. " if parts.exists() else "nothing was finished. "
            again = "The same command goes on from there; --restart begins anew." if parts.exists() else ""
            typer.echo(f"stopped: {kept}{again}".strip(), err=True)
            raise typer.Exit(130) from None
    if report.is_written:  # of several processes one tells
        typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else str(report))


@app.command()
def finetune(
    cells: Annotated[Path, typer.Argument(help="Labelled cells, of any format that `panfoma check` reads.")],
    out: Annotated[Path, typer.Argument(help="Folder of the checkpoint: new, or an older one to replace.")],
    labels: Annotated[
        list[str], typer.Option("--label", help="Column of obs to learn; given several times, one model learns all.")
    ],
    model: Annotated[str | None, typer.Option(help="A checkpoint to start from; the one that comes along.")] = None,
    mode: Annotated[str, typer.Option(help="full, lora or probe.")] = "full",
    validation: Annotated[
        str, typer.Option(help="A file of cells to validate on, the share to hold out, or none.")
    ] = "0.15",
    groups: Annotated[
        str, typer.Option(help="Column of obs that the split does not divide, such as donor; auto, or none.")
    ] = "auto",
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="Given several times, the best is kept.")] = None,
    max_error: Annotated[
        float, typer.Option(min=0, max=1, help="Error of named cells that Unassigned is to keep to.")
    ] = 0.05,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="NAME=VALUE: any argument of finetune() or Trainer, over the options here."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Learn to name cells from labelled ones; scores stand beside logistic regression on the same held-out cells.

    The folder gets the checkpoint, README.md with the scores, and finetuning.json with all figures. Exit code 1 if
    something is wrong with the cells, their labels or an option; nothing is written then.
    Example: panfoma finetune cells.h5ad my-model --label cell_type --mode probe
    """
    from .training import finetune, read_recipe

    arguments = {
        "model": model,
        "mode": mode,
        "validation": _share_or_file(validation),
        "groups": None if groups == "none" else groups,
        "max_error": max_error,
        "disable_tqdm": as_json,
        **({"seed": seeds[0]} if seeds and len(seeds) == 1 else {"seeds": seeds}),
    }
    # Trainer prints its log where it draws no bar, which is not to be read as the report.
    with _told(ImportError), redirect_stdout(sys.stderr):
        arguments |= read_recipe(finetune, None, changes or ())
        trainer = finetune(cells, labels[0] if len(labels) == 1 else labels, out, **arguments)
    if as_json:
        typer.echo(json.dumps(trainer.report, indent=2))
    else:
        typer.echo(f"The model is in {out}. Name cells with it: panfoma_hf.annotate(cells, {str(out)!r})")


def _share_or_file(text: str) -> float | str | None:
    if text == "none":
        return None
    try:
        return float(text)
    except ValueError:
        return text


@app.command()
def evaluate(
    cells: Annotated[Path, typer.Argument(help="Labelled cells, of any format that `panfoma check` reads.")],
    label: Annotated[str, typer.Option(help="Column of obs with the names to find.")],
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            help="What to score: majority, hvg_logistic_regression, pca_knn, pca_logistic_regression, celltypist, "
            "scanvi, panfoma:probe, panfoma:lora, panfoma:full, panfoma:knn, random:full, checkpoint:FOLDER, obsm:KEY; "
            "with --batch pca, pca_harmony, scvi, panfoma, panfoma:adapted, panfoma:full, panfoma:logits, obsm:KEY.",
        ),
    ] = None,
    batch: Annotated[
        str | None, typer.Option(help="Column of obs with batches: how well embeddings integrate them is scored.")
    ] = None,
    groups: Annotated[
        str, typer.Option(help="Column of obs that a split does not divide, such as donor; auto, or none.")
    ] = "auto",
    held_out: Annotated[
        list[str] | None, typer.Option(help="Values of --groups to test on, in place of drawn ones.")
    ] = None,
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="Of splits and methods; 0, 1 and 2.")] = None,
    budget: Annotated[float, typer.Option(min=0, max=1, help="Share of the training labels to learn from.")] = 1.0,
    most_cells: Annotated[int | None, typer.Option(min=10, help="Cells to draw where there are more.")] = None,
    layer: Annotated[str | None, typer.Option(help="The matrix to read: a layer's name, X or raw.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all scores as JSON.")] = False,
) -> None:
    """Score ways to name cells, or to embed them, on splits of a labelled file, side by side.

    What training and test cells have in common, such as donors, is said on stderr. Exit code 1 if something is wrong
    with the cells or an option, or a method cannot be run.
    Example: panfoma evaluate cells.h5ad --label cell_type --groups donor --method pca_knn --method panfoma:probe
    """
    from .evaluation.methods import classifier_of, embedder_of
    from .evaluation.tasks import ANNOTATION, INTEGRATION, SEEDS, Task, evaluate_task

    if batch is None:
        shown = ["accuracy", "macro_f1"]
        methods = methods or ["majority", "hvg_logistic_regression", "panfoma:probe"]
    else:
        shown = ["unseen/avg_bio", "unseen/avg_batch", "seen/avg_bio", "seen/avg_batch"]
        methods = methods or ["pca", "pca_harmony", "panfoma"]
    with _told(ImportError):
        if batch is not None and (groups != "auto" or held_out):
            raise ValueError("`--batch` splits cells in halves, got `--groups` or `--held-out`, too. Leave these out.")
        for method in methods:  # a name that is wrong is said before minutes are spent on the others
            (classifier_of if batch is None else embedder_of)(method)
        task = Task(
            cells.name,
            cells.resolve(),
            label,
            kind=ANNOTATION if batch is None else INTEGRATION,
            groups=None if groups == "none" or batch is not None else groups,
            held_out=tuple(held_out or ()),
            batch=batch,
            most_cells=most_cells,
        )
        loaded = task.load()
        if not as_json:
            typer.echo(f"{task.name}: {loaded.n_obs:,} cells, {loaded.obs[label].nunique()} labels")
            typer.echo(f"{'':<34}" + "".join(f"{name:>26}" for name in shown))
        results = {}
        for method in methods:
            with _quiet(), redirect_stdout(sys.stderr):
                result = evaluate_task(task, method, cells=loaded, seeds=seeds or SEEDS, budget=budget, layer=layer)
            if result.leakage is not None and not results:
                for message in result.leakage.messages():
                    typer.echo(message, err=True)
            results[method] = result.scores
            if not as_json:
                typer.echo(f"{method:<34}" + "".join(f"{_interval(result.scores, name):>26}" for name in shown))
        if as_json:
            typer.echo(json.dumps(results, indent=2))


def _interval(scores: dict[str, float], name: str) -> str:
    low, high = (scores.get(f"{name}_{bound}", scores[name]) for bound in ("low", "high"))
    return f"{scores[name]:.3f} ({low:.3f}-{high:.3f})"


@app.command()
def pretrain(
    corpus: Annotated[str, typer.Argument(help="A corpus' folder, or its name on the Hub.")],
    out: Annotated[Path, typer.Argument(help="Folder of the run: new, or one to resume.")],
    recipe: Annotated[
        Path | None, typer.Option(help="YAML file with arguments, such as scripts/recipes/small.yaml.")
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="NAME=VALUE, over the recipe: any argument of pretrain() or Trainer."),
    ] = None,
    probes: Annotated[
        list[str] | None,
        typer.Option(
            "--probe", help="Labelled cells to score after each evaluation: a study of the corpus, or a file."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last good checkpoint, if there is one.")
    ] = False,
) -> None:
    """Pretrain on a corpus; OUT/model is the result. On several GPUs: accelerate launch scripts/pretrain.py.

    Exit code 1 if the corpus is not whole, a loss is not finite, or the folder vanished; the last checkpoint stays.
    Example: panfoma pretrain corpus runs/small --recipe scripts/recipes/small.yaml --set max_steps=1000
    """
    from .data.corpus import Corpus
    from .evaluation.probes import LinearProbe
    from .training import PretrainingError, pretrain, read_recipe

    with _told(PretrainingError):
        arguments = read_recipe(pretrain, recipe, changes or (), also=["probe"])
        in_recipe = arguments.pop("probe", ())
        probed = [*([in_recipe] if isinstance(in_recipe, str) else in_recipe), *(probes or ())]
        opened = Corpus.open(corpus, streaming=bool(arguments.get("streaming")))
        if resume:
            arguments["resume"] = True
        arguments["probes"] = {}
        for name in probed:
            is_file = Path(name).exists()
            key = Path(name).stem if is_file else name
            if key in arguments["probes"]:
                raise ValueError(f"Each probe needs a name of its own, got {key!r} twice. Rename a file.")
            arguments["probes"][key] = (
                LinearProbe.of_cells(name, opened.tokenizer) if is_file else LinearProbe.of_study(opened, name)
            )
        trainer = pretrain(opened, out, **arguments)
        if trainer.is_world_process_zero():
            typer.echo(f"{out / 'model'} after {trainer.state.global_step:,} steps")


@app.command()
def export(
    out: Annotated[Path, typer.Argument(help="Folder to write: new, empty, or an older PanFoMa checkpoint.")],
    name: Annotated[str, typer.Option(help="Which of the checkpoints that come with the package.")] = "small",
) -> None:
    """Write a checkpoint that comes with the package, complete with code and tokenizer, for any from_pretrained.

    Example: panfoma export panfoma, after which AutoModel.from_pretrained("panfoma") works in that folder.
    """
    from .training import export_checkpoint

    with _told():
        typer.echo(export_checkpoint(name, out))


@app.command("push")
def push_checkpoint(
    folder: Annotated[Path, typer.Argument(help="Folder of a checkpoint, or of a PEFT adapter.")],
    repo_id: Annotated[str, typer.Argument(help="Name on the Hub, such as lab/panfoma-pancreas.")],
    private: Annotated[bool, typer.Option("--private", help="Hide a new one from others.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to publish to, made if it is not there.")] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print address and hash of the commit as JSON.")] = False,
) -> None:
    """Publish a checkpoint on the Hugging Face Hub, in one commit, and print its address.

    Exit code 1 if it is not complete or holds a pickle, or the Hub does not take it; nothing is published then.
    Example: panfoma push my-model lab/panfoma-pancreas --private
    """
    from .hub import HubError, push_to_hub

    with _told(HubError):
        commit = push_to_hub(folder, repo_id, private=private or None, revision=revision, message=message)
    address = {"commit": commit.oid, "url": commit.commit_url}
    typer.echo(json.dumps(address, indent=2) if as_json else commit.commit_url)


@app.command("pull")
def pull_checkpoint(
    repo_id: Annotated[str, typer.Argument(help="Name on the Hub, such as lab/panfoma-pancreas.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write: new, empty, or an older PanFoMa checkpoint.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or hash of a commit; the newest.")] = None,
) -> None:
    """Fetch a checkpoint from the Hugging Face Hub, whole or not at all, and print the folder that it is in.

    Exit code 1 if it is not there, is none of PanFoMa or holds a pickle; the folder is as it was then.
    Example: panfoma pull lab/panfoma-pancreas my-model --revision v1
    """
    from .hub import HubError, pull

    with _told(HubError):
        typer.echo(pull(repo_id, folder, revision=revision))


@corpus.command()
def build(
    sources: Annotated[Path, typer.Argument(help="Source list in YAML: studies, files, columns, labels.")],
    out: Annotated[Path, typer.Argument(help="Folder of the corpus: new, or one to bring up to date.")],
    root: Annotated[
        Path | None, typer.Option(help="Folder that the list's paths start from; its own if left out.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; as many as cores if left out.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="Address of a Dask scheduler to run on instead.")] = None,
    model: Annotated[str | None, typer.Option(help="A checkpoint whose tokenizer to use.")] = None,
) -> None:
    """Build a corpus from raw files, or bring it up to date: files that are finished and unchanged are not read again.

    Exit code 1 if a file cannot be read, the disk is full, or a donor or equal cells are on both sides of a split; what
    is finished stays. Example: panfoma corpus build sources.yaml corpus --root /data --workers 8
    """
    from transformers import AutoTokenizer

    from .data.corpus import build_corpus

    with _told():
        built = build_corpus(
            sources,
            out,
            root=root,
            workers=workers or os.cpu_count() or 1,
            scheduler=scheduler,
            tokenizer=None if model is None else AutoTokenizer.from_pretrained(model),
        )
        typer.echo(str(built))
        typer.echo(f"\n{out / 'README.md'} is its data card")


@corpus.command()
def info(
    out: Annotated[str, typer.Argument(help="A corpus' folder, or its name on the Hub.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole manifest.")] = False,
    verify: Annotated[bool, typer.Option(help="Compare every shard with its checksum.")] = False,
) -> None:
    """Say what is in a corpus: studies, cancer types, donors, what was left out, splits."""
    from .data.corpus import Corpus

    with _told():
        opened = Corpus.open(out)
        if verify:
            opened.verify()
        typer.echo(json.dumps(opened.manifest, indent=1, ensure_ascii=False) if as_json else str(opened))
        if verify and not as_json:
            typer.echo("\nall shards and splits are as they were written")


@corpus.command()
def push(
    out: Annotated[Path, typer.Argument(help="A corpus' folder.")],
    repo_id: Annotated[str, typer.Argument(help="Name on the Hub, such as lab/panfoma-bench.")],
    private: Annotated[bool, typer.Option(help="Whether a new one is hidden from others.")] = False,
) -> None:
    """Publish a corpus with its data card on the Hugging Face Hub."""
    from .data.corpus import Corpus

    with _told():
        typer.echo(Corpus.open(out.resolve()).push_to_hub(repo_id, private=private))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what each fine-tune says of its own validation cells."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def _told(*errors: type[Exception]) -> Iterator[None]:
    """Print what went wrong without a traceback, these errors too, and end with exit code 1."""
    from .data.corpus import CorpusError

    try:
        yield
    except (CorpusError, OSError, ValueError, *errors) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
