"""PanFoMa behind the interface of `baselines`: pretrained, fine-tuned, from random weights; and methods by name."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForPreTraining, AutoTokenizer, TrainingArguments

from ..data.cells import tokenize
from ..data.collator import DataCollatorForMaskedExpression
from ..data.dataset import cell_dataset
from ..inference import annotate, embed
from ..modeling import PanFoMaModel
from ..shipped import checkpoint
from ..training import PanFoMaTrainer, finetune
from .baselines import CLASSIFIERS, EMBEDDERS, Classifier, Embedder, Predictions, embedding_classifier, of_obsm


# Files of small panels hold few of the genes' counts; what is scored says so itself.
MIN_COVERAGE = 0.3
KEY = "X_panfoma"
# Passes over the cells when a model is adapted to them without labels.
ADAPTING_EPOCHS = 1


def finetuned(mode: str = "full", model: str | Path | None = None, **arguments) -> Classifier:
    """PanFoMa fine-tuned on the training cells, a part of which is held out to choose and calibrate on.

    Parameters
    ----------
    mode, model
        As in `panfoma_hf.finetune`; "small" as model starts from random weights.
    arguments
        Further ones of `panfoma_hf.finetune`.
    """

    def classify(train, test, label, *, seed: int = 0, layer: str | None = None) -> Predictions:
        with tempfile.TemporaryDirectory() as folder:
            trained = _finetuned(train, label, folder, mode, model, seed, layer, arguments)
            return _predictions(test, trained, label, layer)

    return classify


def trained_checkpoint(model: str | Path) -> Classifier:
    """A fine-tuned checkpoint as it is; the training cells are not read."""

    def classify(train, test, label, *, seed: int = 0, layer: str | None = None) -> Predictions:
        return _predictions(test, model, label, layer)

    return classify


def pretrained(model: str | Path | PanFoMaModel | None = None, method: str = "knn") -> Classifier:
    """Neighbours, or logistic regression, among embeddings of a model that was not fine-tuned.

    Parameters
    ----------
    model
        A checkpoint; None takes the one that comes with the package. "random" is its shape with random weights.
    method
        As in `baselines.embedding_classifier`.
    """
    classifier = embedding_classifier(KEY, method)

    def classify(train, test, label, *, seed: int = 0, layer: str | None = None) -> Predictions:
        sides = []
        for cells in (train, test):
            side = ad.AnnData(obs=cells.obs)
            side.obsm[KEY] = embeddings(cells, model, seed=seed, layer=layer)
            sides.append(side)
        return classifier(*sides, label, seed=seed)

    return classify


def embeddings(
    cells: ad.AnnData, model: str | Path | PanFoMaModel | None = None, *, seed: int = 0, layer: str | None = None
) -> np.ndarray:
    """(cells, hidden), embeddings of cells, which are left as they are; None and "random" as in `pretrained`."""
    tokenizer = None
    if model is None:
        model = checkpoint()
    elif model == "random":
        tokenizer = AutoTokenizer.from_pretrained(checkpoint())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = PanFoMaModel(AutoConfig.from_pretrained(checkpoint()))
    written = embed(
        _expression(cells), model, tokenizer=tokenizer, layer=layer, min_coverage=MIN_COVERAGE, progress=False
    )
    return written.obsm["X_panfoma"]


def _expression(cells: ad.AnnData) -> ad.AnnData:
    """The matrices and genes alone, for results to be written to."""
    bare = ad.AnnData(cells.X, obs=cells.obs[[]].copy(), var=cells.var, layers=dict(cells.layers))
    if cells.raw is not None:
        bare.raw = cells.raw.to_adata()
    return bare


def _finetuned(train, label, folder, mode, model, seed, layer, arguments) -> Path:
    """Fine-tune into a folder; return the checkpoint."""
    arguments = {"disable_tqdm": True, "baselines": False, "min_coverage": MIN_COVERAGE, **arguments}
    out = Path(folder, "model")
    finetune(train, label, out, mode=mode, model=model, seed=seed, layer=layer, **arguments)
    return out


def _predictions(test: ad.AnnData, model: str | Path, label: str, layer: str | None) -> Predictions:
    cells = annotate(_expression(test), model, layer=layer, min_coverage=MIN_COVERAGE, min_score=0, progress=False)
    key, written = f"panfoma_{label}", cells.uns["panfoma"]
    if key not in written:
        raise ValueError(
            f"A checkpoint is scored on the label that it names, got {label!r} for {model}, which names "
            f"{', '.join(name.removeprefix('panfoma_') for name in written)}. Pass that one, or rename the column."
        )
    return Predictions(written[key]["labels"], cells.obsm[f"{key}_proba"])


def supervised_embedder(
    mode: str, model: str | Path | None = None, *, output: str = "embedding", **arguments
) -> Callable[..., np.ndarray]:
    """Embeddings after fine-tuning on labels: a function of training cells, cells to embed, and the label.

    Parameters
    ----------
    mode, model, arguments
        As in `finetuned`.
    output
        "embedding", the network's (cells, hidden); or "logits", logarithms of the probabilities (cells, labels).

    Raises
    ------
    ValueError
        If there is no such output.
    """
    if output not in ("embedding", "logits"):
        raise ValueError(f"`output` is 'embedding' or 'logits', got {output!r}. Use one of these.")

    def run(train, cells, label, *, seed: int = 0, layer: str | None = None) -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder:
            trained = _finetuned(train, label, folder, mode, model, seed, layer, arguments)
            if output == "logits":
                return np.log(np.maximum(_predictions(cells, trained, label, layer).probabilities, 1e-6))
            return embeddings(cells, trained, layer=layer)

    return run


def adapted_embedder(model: str | Path | None = None, *, epochs: float = ADAPTING_EPOCHS) -> Callable[..., np.ndarray]:
    """Embeddings after pretraining goes on with the cells at hand, without their labels.

    Parameters
    ----------
    model
        A pretrained checkpoint; None takes the one that comes with the package.
    epochs
        Passes over the training cells.
    """

    def run(train, cells, label, *, seed: int = 0, layer: str | None = None) -> np.ndarray:
        start = checkpoint() if model is None else model
        tokenizer = AutoTokenizer.from_pretrained(start)
        tokens, _ = tokenize(train, tokenizer, layer=layer, min_coverage=MIN_COVERAGE)
        body = AutoModelForPreTraining.from_pretrained(start, dtype=torch.float32)
        collator = DataCollatorForMaskedExpression(tokenizer, mask_ratio=(0.15, 0.4), max_genes=512, seed=seed)
        with tempfile.TemporaryDirectory() as scratch:
            arguments = TrainingArguments(
                scratch,
                num_train_epochs=epochs,
                per_device_train_batch_size=16,
                learning_rate=2e-4,
                warmup_steps=0.1,
                seed=seed,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                remove_unused_columns=False,
                dataloader_pin_memory=torch.cuda.is_available(),
            )
            PanFoMaTrainer(
                model=body, args=arguments, train_dataset=cell_dataset(tokens), data_collator=collator
            ).train()
            body.save_pretrained(Path(scratch, "model"))
            tokenizer.save_pretrained(Path(scratch, "model"))
            return embeddings(cells, Path(scratch, "model"), layer=layer)

    return run


def classifier_of(name: str | Callable) -> Classifier:
    """A way to name cells, by its name.

    Parameters
    ----------
    name
        A key of `baselines.CLASSIFIERS`; "panfoma:full", "panfoma:lora" or "panfoma:probe" for `finetuned`, with
        ":CHECKPOINT" behind it from another one than that of the package; "panfoma:network", a probe of the network
        alone, without logistic regression on the bins beside it, and "panfoma:bins", that alone; "panfoma:knn" or
        "panfoma:logistic_regression" for `pretrained`, likewise; "random:" in place of "panfoma:" for random weights;
        "checkpoint:FOLDER" for `trained_checkpoint`; "obsm:KEY" or "obsm:KEY:logistic_regression" for embeddings that
        the cells bring; a function is passed through.

    Raises
    ------
    ValueError
        If there is no such method.
    """
    if callable(name):
        return name
    if name in CLASSIFIERS:
        return CLASSIFIERS[name]
    kind, _, rest = name.partition(":")
    method, _, model = rest.partition(":")
    if kind == "checkpoint" and rest:
        return trained_checkpoint(rest)
    if kind == "obsm" and method:
        return embedding_classifier(method, model or "knn")
    if kind == "panfoma" or (kind == "random" and not model):  # random weights come from no checkpoint
        if method in ("full", "lora", "probe"):
            return finetuned(method, "small" if kind == "random" else model or None)
        if method == "network":
            return finetuned("probe", "small" if kind == "random" else model or None, gene_logits=False)
        if kind == "panfoma" and method == "bins":
            return finetuned("probe", model or None, gene_logits="alone")
        if method in ("knn", "logistic_regression"):
            return pretrained("random" if kind == "random" else model or None, method)
    raise ValueError(
        f"A method is one of {', '.join(CLASSIFIERS)}, panfoma:full, panfoma:lora, panfoma:probe, "
        "panfoma:network, panfoma:knn, panfoma:logistic_regression, the same of random, panfoma:bins, "
        "checkpoint:FOLDER or obsm:KEY, "
        f"got {name!r}. Use one of these, or pass a function."
    )


def embedder_of(name: str | Callable) -> tuple[Embedder | None, Callable | None]:
    """A way to embed cells, by its name: one that learns nothing of their labels, or else one that is trained.

    Parameters
    ----------
    name
        A key of `baselines.EMBEDDERS`; "panfoma" or "random", as they are; "checkpoint:FOLDER", one of your own as it
        is; "panfoma:adapted" by `adapted_embedder`; "panfoma:full" and "panfoma:lora" by `supervised_embedder`, and
        "panfoma:logits", the logits of a probe, each with ":CHECKPOINT" behind it from another one than that of the
        package; "random:full" and "random:lora"; "obsm:KEY"; a function is taken as an embedder.

    Raises
    ------
    ValueError
        If there is no such method.
    """
    if callable(name):
        return name, None
    if name in EMBEDDERS:
        return EMBEDDERS[name], None
    kind, _, rest = name.partition(":")
    if kind == "obsm" and rest:
        return of_obsm(rest), None
    if kind == "checkpoint" and rest:
        return _embedder(rest), None
    if kind in ("panfoma", "random") and not rest:
        return _embedder("random" if kind == "random" else None), None
    method, _, model = rest.partition(":")
    if kind == "random" and not model and method in ("full", "lora"):
        return None, supervised_embedder(method, "small")
    if kind == "panfoma" and method == "adapted":
        return None, adapted_embedder(model or None)
    if kind == "panfoma" and method in ("full", "lora"):
        return None, supervised_embedder(method, model or None)
    if kind == "panfoma" and method == "logits":
        return None, supervised_embedder("probe", model or None, output="logits")
    raise ValueError(
        f"A way to embed is one of {', '.join(EMBEDDERS)}, panfoma, random, checkpoint:FOLDER, panfoma:adapted, "
        "panfoma:full, panfoma:lora, panfoma:logits, random:full, random:lora or obsm:KEY, got "
        f"{name!r}. Use one of these, or pass a function."
    )


def _embedder(model: str | None) -> Embedder:
    """`embeddings` behind the interface of `baselines.EMBEDDERS`; batches are not read."""

    def run(cells, *, batch: str | None = None, seed: int = 0, layer: str | None = None) -> np.ndarray:
        return embeddings(cells, model, seed=seed, layer=layer)

    return run
