"""Verbs that train and judge: finetune, evaluate, pretrain."""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from .outcome import complain, say, say_json, told


app = typer.Typer(rich_markup_mode="markdown")


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
    with told("no checkpoint was written; an older one is as it was."), redirect_stdout(sys.stderr):
        from panfoma_hf.training import finetune, read_recipe

        arguments |= read_recipe(finetune, None, changes or ())
        trainer = finetune(cells, labels[0] if len(labels) == 1 else labels, out, **arguments)
    if as_json:
        say_json(trainer.report)
    else:
        say(f"The model is in {out}. Name cells with it: panfoma annotate CELLS {out} --out ANNOTATED.h5ad")


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
            "scanvi, panfoma:probe|lora|full|network|bins|knn|logistic_regression, random:probe|full|..., "
            "checkpoint:FOLDER, obsm:KEY; with --batch pca, pca_harmony, scvi, panfoma, random, "
            "panfoma:adapted|lora|full|logits, random:lora|full, checkpoint:FOLDER, obsm:KEY.",
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
    if batch is None:
        shown = ["accuracy", "macro_f1"]
        methods = methods or ["majority", "hvg_logistic_regression", "panfoma:probe"]
    else:
        shown = ["unseen/avg_bio", "unseen/avg_batch", "seen/avg_bio", "seen/avg_batch"]
        methods = methods or ["pca", "pca_harmony", "panfoma"]
    with told("what is above was scored."):
        from panfoma_hf.evaluation.methods import classifier_of, embedder_of
        from panfoma_hf.evaluation.tasks import ANNOTATION, INTEGRATION, SEEDS, Task, evaluate_task
        from panfoma_hf.training import quiet

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
            say(f"{task.name}: {loaded.n_obs:,} cells, {loaded.obs[label].nunique()} labels")
            say(f"{'':<34}" + "".join(f"{name:>26}" for name in shown))
        results = {}
        for method in methods:
            with quiet(), redirect_stdout(sys.stderr):
                result = evaluate_task(task, method, cells=loaded, seeds=seeds or SEEDS, budget=budget, layer=layer)
            if result.leakage is not None and not results:
                for message in result.leakage.messages():
                    complain(message, "yellow")
            results[method] = result.scores
            if not as_json:
                say(f"{method:<34}" + "".join(f"{_interval(result.scores, name):>26}" for name in shown))
        if as_json:
            say_json(results)


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
    with told(f"checkpoints stay in {out}; the same command with --resume goes on from the last."):
        from panfoma_hf.data.corpus import Corpus
        from panfoma_hf.evaluation.probes import LinearProbe
        from panfoma_hf.training import pretrain, read_recipe

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
            say(f"{out / 'model'} after {trainer.state.global_step:,} steps")
