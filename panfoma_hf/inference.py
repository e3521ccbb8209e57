"""Embed and annotate cells: AnnData in, AnnData out."""

from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from scipy.special import softmax
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from .data.cells import MIN_COVERAGE, Expression, name_of, tokenize, writable_cells
from .data.dataset import cell_dataset
from .data.forward import forward_cells
from .evaluation.calibration import energy
from .modeling import PanFoMaForCellClassification, PanFoMaPreTrainedModel
from .tokenization import CellTokens, PanFoMaTokenizer, check_tokenizer, warn_of_empty_cells
from .version import __version__


logger = logging.get_logger(__name__)

# What a cell is called whose score is too low, or that has no expressed gene of the vocabulary.
UNASSIGNED = "Unassigned"


def embed(
    cells: ad.AnnData | str | Path,
    model: str | Path | PanFoMaPreTrainedModel,
    *,
    tokenizer: PanFoMaTokenizer | None = None,
    key_added: str = "X_panfoma",
    layer: str | None = None,
    gene_column: str | None = None,
    min_coverage: float = MIN_COVERAGE,
    batch_size: int = 32,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> ad.AnnData:
    """Write each cell's embedding to ``obsm[key_added]`` (cells, hidden), and where it came from to ``uns["panfoma"]``.

    Parameters
    ----------
    cells
        An AnnData, which is written to in place; or a file of any format that `panfoma_hf.open_cells` reads, which is
        left as it is.
    model
        A checkpoint (folder or Hub name), or a model.
    tokenizer
        The model's tokenizer; None loads it from the model's checkpoint.
    key_added
        Key of ``obsm``.
    layer
        The matrix to read: a layer's name, "X" or "raw". None looks for the counts, and says what it found.
    gene_column
        Column of ``var`` with gene names. None takes ``var_names``, with ids in other columns to help out.
    min_coverage
        Share of the counts that must fall on genes that the model knows.
    batch_size
        Cells at a time.
    device
        None takes a GPU where there is one; a model that is passed stays where it is.
    progress
        Whether to show a progress bar.

    Returns
    -------
    The AnnData. On an error nothing is written to it.

    Raises
    ------
    ValueError
        If expression is not usable, too few genes are known, or model and tokenizer do not belong together.
    """
    adata = writable_cells(cells)
    tokenizer = _load_tokenizer(model, tokenizer)
    # Whatever is wrong with the cells is said before a model is loaded.
    tokens, expression = tokenize(
        adata,
        tokenizer,
        layer=layer,
        gene_column=gene_column,
        min_coverage=min_coverage,
        name=name_of(cells),
    )
    model = _load_model(AutoModel, model, tokenizer, device)
    result = _run(tokens, expression, model, tokenizer, batch_size, progress)
    adata.obsm[key_added] = result.embeddings
    _write_provenance(adata, {key_added: result.provenance})
    return adata


def annotate(
    cells: ad.AnnData | str | Path,
    model: str | Path | PanFoMaForCellClassification,
    *,
    tokenizer: PanFoMaTokenizer | None = None,
    embedding_key: str | None = None,
    min_score: float | None = None,
    layer: str | None = None,
    gene_column: str | None = None,
    min_coverage: float = MIN_COVERAGE,
    batch_size: int = 32,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> ad.AnnData:
    """Name each cell with a fine-tuned classifier.

    With ``<label>`` the name that the model was fine-tuned for, such as "cell_type", it writes
    ``obs["panfoma_<label>"]`` (categorical), ``obs["panfoma_<label>_score"]`` (the probability of that name),
    ``obsm["panfoma_<label>_proba"]`` (cells, labels) and where they came from to ``uns["panfoma"]``, with the names of
    the columns of probabilities. A model of several tasks writes these for each of them.

    Where the model was calibrated (`panfoma_hf.finetune` does that on its validation cells), scores are calibrated
    probabilities, cells below the score that keeps to the stated error are called "Unassigned" (if enough validation
    cells vouch for it), and ``obs["panfoma_<label>_unfamiliarity"]`` is the share of the validation cells that look
    more like the training cells than this one does, by the energy of the logits (Liu et al., NeurIPS 2020): near 1 for
    a cell of another kind.
    A cell without an expressed gene is called "Unassigned", with a score of 0.

    Parameters
    ----------
    cells, tokenizer, layer, gene_column, min_coverage, batch_size, device, progress
        As in `embed`.
    model
        A checkpoint (folder or Hub name) with a classifier, or such a model.
    embedding_key
        Key of ``obsm`` to write the embeddings of the same pass to, as `embed` does.
    min_score
        Score below which a cell is called "Unassigned"; None takes the checkpoint's own, 0 names every cell.

    Returns
    -------
    The AnnData. On an error nothing is written to it.

    Raises
    ------
    ValueError
        As in `embed`, and if the model has no trained classifier or names no single class, or ``min_score`` is not a
        probability.
    """
    if min_score is not None and not 0 <= min_score <= 1:
        raise ValueError(
            f"`min_score` is a probability from 0 to 1, got {min_score}. Pass 0 to name every cell, None for the "
            "checkpoint's own."
        )
    adata = writable_cells(cells)
    tokenizer = _load_tokenizer(model, tokenizer)
    tokens, expression = tokenize(
        adata,
        tokenizer,
        layer=layer,
        gene_column=gene_column,
        min_coverage=min_coverage,
        name=name_of(cells),
    )
    model = _load_model(AutoModelForSequenceClassification, model, tokenizer, device)
    config = model.config
    if not hasattr(model, "classifier"):
        raise ValueError(
            f"Cells are named by a model with a classifier, got {type(model).__name__}. Load the checkpoint with "
            "AutoModelForSequenceClassification, or use `panfoma_hf.embed`."
        )
    is_named = config.label_tasks is not None or config.problem_type in (None, "single_label_classification")
    if not is_named or config.num_labels < 2:
        raise ValueError(
            f"Cells are named by a single-label classifier, got problem_type {config.problem_type!r} with "
            f"{config.num_labels} labels. Call the model itself and read its logits, or use `embed`."
        )
    result = _run(tokens, expression, model, tokenizer, batch_size, progress)

    written, bounds = {}, np.cumsum([0, *(len(names) for names in config.tasks.values())])
    for task, (label, names) in enumerate(config.tasks.items()):
        key = f"panfoma_{label}"
        calibration = (config.calibration or {}).get(label, {})
        logits = result.logits[:, bounds[task] : bounds[task + 1]]
        _write_names(adata, key, names, logits, result.lengths == 0, calibration, min_score)
        written[key] = {**result.provenance, "labels": names, "min_score": _min_score(calibration, min_score)}
    if embedding_key is not None:
        adata.obsm[embedding_key] = result.embeddings
        written[embedding_key] = result.provenance
    _write_provenance(adata, written)
    return adata


def _min_score(calibration: dict, min_score: float | None) -> float:
    """The score below which cells are left unassigned; 0 where nothing asks for one, or too few cells vouch for it."""
    if min_score is not None:
        return float(min_score)
    return float(calibration["unassigned_threshold"]) if calibration.get("is_certified") else 0.0


def _write_names(
    adata: ad.AnnData,
    key: str,
    names: list[str],
    logits: np.ndarray,
    is_empty: np.ndarray,
    calibration: dict,
    min_score: float | None,
) -> None:
    """Write one task's names, scores and probabilities; and how unfamiliar cells are, where that was calibrated."""
    temperature = calibration.get("temperature", 1.0)
    probabilities = softmax(logits / temperature, axis=1)
    scores = np.where(is_empty, 0, probabilities.max(1))
    is_unassigned = is_empty | (scores < _min_score(calibration, min_score))
    called = np.where(is_unassigned, UNASSIGNED, np.array(names, dtype=object)[probabilities.argmax(1)])
    categories = [*names, UNASSIGNED] if is_unassigned.any() and UNASSIGNED not in names else names
    adata.obs[key] = pd.Categorical(called, categories=categories)
    adata.obs[f"{key}_score"] = scores.astype(np.float32)
    adata.obsm[f"{key}_proba"] = probabilities.astype(np.float32)
    if energies := calibration.get("energies"):
        unfamiliar = np.interp(energy(logits, temperature), energies, np.linspace(0, 1, len(energies)))
        adata.obs[f"{key}_unfamiliarity"] = np.where(is_empty, 1, unfamiliar).astype(np.float32)


@dataclass
class _Result:
    """Embeddings (cells, hidden), logits (cells, labels) or None, genes read of each cell, and provenance."""

    embeddings: np.ndarray
    logits: np.ndarray | None
    lengths: np.ndarray
    provenance: dict


def _load_tokenizer(model, tokenizer: PanFoMaTokenizer | None) -> PanFoMaTokenizer:
    """The tokenizer that belongs to a checkpoint or a model."""
    if tokenizer is not None:
        return tokenizer
    checkpoint = model if isinstance(model, (str, Path)) else model.name_or_path
    if not checkpoint:
        raise ValueError(
            "A model needs its tokenizer, got a model that was not loaded from a checkpoint. Pass `tokenizer`."
        )
    return AutoTokenizer.from_pretrained(checkpoint)


def _load_model(auto_class, model, tokenizer: PanFoMaTokenizer, device) -> PanFoMaPreTrainedModel:
    """The model on its device, with every weight, and made for this tokenizer."""
    if isinstance(model, (str, Path)):
        loaded, report = auto_class.from_pretrained(model, output_loading_info=True)
        if report["missing_keys"]:
            raise ValueError(
                f"A checkpoint must hold every weight of {type(loaded).__name__}, got {model} without "
                f"{', '.join(sorted(report['missing_keys'])[:3])}. Fine-tune it first with `panfoma_hf.finetune`, or "
                "use `panfoma_hf.embed`, which needs no classifier."
            )
        model = loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    elif device is not None:
        model = model.to(device)
    check_tokenizer(tokenizer, model.config)
    return model


def _run(
    tokens: CellTokens,
    expression: Expression,
    model: PanFoMaPreTrainedModel,
    tokenizer: PanFoMaTokenizer,
    batch_size: int,
    progress: bool,
) -> _Result:
    warn_of_empty_cells(tokens.lengths)
    is_classifier = hasattr(model, "classifier")
    found = forward_cells(
        model if is_classifier else model.base_model,
        cell_dataset(tokens),
        tokenizer,
        outputs=["pooler_output", *(["logits"] if is_classifier else [])],
        batch_size=batch_size,
        progress=progress,
    )
    return _Result(
        embeddings=found["pooler_output"],
        logits=found.get("logits"),
        lengths=tokens.lengths,
        provenance={
            "checkpoint": str(model.name_or_path),
            "revision": _revision(model.name_or_path),
            "panfoma_hf_version": __version__,
            "expression": expression.source,
            "values": str(expression.scale),
            "genes": expression.resolution.provenance(),
            "gene_table": tokenizer.gene_table_source,
            "genes_used": len(np.unique(tokens.input_ids)),
            "gene_set_size": len(tokenizer.gene_set or []),
            "empty_cells": int(np.count_nonzero(tokens.lengths == 0)),
        },
    )


def _revision(name_or_path: str) -> str:
    """Commit of a checkpoint of the Hub, as its files lie in the cache; empty for a folder or a fresh model."""
    if not name_or_path or Path(name_or_path).is_dir():
        return ""
    try:
        config = try_to_load_from_cache(name_or_path, "config.json")
    except HFValidationError:  # no name of the Hub: a folder that has been moved since
        return ""
    return Path(config).parent.name if isinstance(config, str) else ""


def _write_provenance(adata: ad.AnnData, written: dict[str, dict]) -> None:
    """Add to ``uns["panfoma"]``, one entry for each key written, so that another checkpoint's entries stay."""
    adata.uns["panfoma"] = {**adata.uns.get("panfoma", {}), **written}
