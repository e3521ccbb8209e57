"""From what a model puts out to what is written of the cells: names, scores, embeddings and where they came from."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from scipy.special import softmax
from transformers.utils import logging

from ..data.cells import Expression
from ..evaluation.calibration import energy
from ..modeling import PanFoMaConfig, PanFoMaPreTrainedModel
from ..tokenization import PanFoMaTokenizer, warn_of_empty_cells
from ..version import __version__
from .loading import load_model, revision_of
from .running import Options, Runner


logger = logging.get_logger(__name__)

# What a cell is called whose score is too low, or that has no expressed gene of the vocabulary.
UNASSIGNED = "Unassigned"


@dataclass
class Additions:
    """What is written of cells, in their order.

    Parameters
    ----------
    obs, obsm
        By key.
    uns
        Entries of ``uns["panfoma"]`` by key; those that are there stay, unless they are of the same key.
    """

    obs: dict[str, Any] = field(default_factory=dict)
    obsm: dict[str, np.ndarray] = field(default_factory=dict)
    uns: dict[str, dict] = field(default_factory=dict)

    def write_to(self, adata: ad.AnnData) -> None:
        """Write into an AnnData."""
        for key, values in self.obs.items():
            adata.obs[key] = values
        for key, values in self.obsm.items():
            adata.obsm[key] = values
        adata.uns["panfoma"] = {**adata.uns.get("panfoma", {}), **self.uns}


@dataclass
class Plan:
    """What a run is for.

    Parameters
    ----------
    model
        The part of the model that is run.
    outputs
        Which of its outputs are kept.
    keys
        Under which results will be written.
    additions
        Makes what is written from what was found and where it came from.
    """

    model: PanFoMaPreTrainedModel
    outputs: Sequence[str]
    keys: Sequence[str]
    additions: Callable[[dict[str, np.ndarray], dict], Additions]


@dataclass
class Inference:
    """Cells whose expression is read, with a model that is ready to run over them.

    Parameters
    ----------
    expression
        The cells.
    model
        As it was loaded or passed.
    plan
        What the run is for.
    runner
        Runs the plan's model.
    """

    expression: Expression
    model: PanFoMaPreTrainedModel
    plan: Plan
    runner: Runner

    @classmethod
    def begin(
        cls,
        expression: Expression,
        auto_class,
        model: str | Path | PanFoMaPreTrainedModel,
        tokenizer: PanFoMaTokenizer,
        options: Options,
        plan: Callable[[PanFoMaPreTrainedModel], Plan],
    ) -> "Inference":
        """Say what the cells were taken for, load the model, and ask what it is to do."""
        genes = expression.resolution.summary()
        logger.warning(f"{len(expression):,} cells from {expression.source}, {expression.scale}: {genes}.")
        loaded = load_model(auto_class, model, tokenizer, options.device)
        planned = plan(loaded)
        return cls(expression, loaded, planned, Runner(planned.model, tokenizer, options))

    def results(self, which: Sequence[int] | None = None, done: int = 0) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """As `Runner.results`."""
        return self.runner.results(self.expression, self.plan.outputs, which, done)

    def additions(self, found: dict[str, np.ndarray]) -> Additions:
        """What is to be written of all cells, of what `joined` gave."""
        warn_of_empty_cells(found["lengths"])
        return self.plan.additions(found, self._provenance(found))

    def _provenance(self, found: dict[str, np.ndarray]) -> dict:
        """Where results came from: checkpoint, version, matrix, genes."""
        tokenizer, expression = self.runner.tokenizer, self.expression
        return {
            "checkpoint": str(self.model.name_or_path),
            "revision": revision_of(self.model),
            "panfoma_hf_version": __version__,
            "dtype": self.runner.options.dtype_name,
            "expression": expression.source,
            "values": str(expression.scale),
            "genes": expression.resolution.provenance(),
            "gene_table": tokenizer.gene_table_source,
            "genes_used": len(found["gene_ids"]),
            "gene_set_size": len(tokenizer.gene_set or []),
            "empty_cells": int(np.count_nonzero(found["lengths"] == 0)),
        }


def names_of_cells(
    found: dict[str, np.ndarray],
    provenance: dict,
    config: PanFoMaConfig,
    min_score: float | None,
    embedding_key: str | None,
) -> Additions:
    """Names, scores and probabilities of each task; and how unfamiliar cells are, where that was calibrated."""
    additions, is_empty = Additions(), found["lengths"] == 0
    bounds = np.cumsum([0, *(len(names) for names in config.tasks.values())])
    for task, (label, names) in enumerate(config.tasks.items()):
        key, calibration = f"panfoma_{label}", (config.calibration or {}).get(label, {})
        logits = found["logits"][:, bounds[task] : bounds[task + 1]]
        temperature, lowest = calibration.get("temperature", 1.0), _min_score(calibration, min_score)
        probabilities = softmax(logits / temperature, axis=1)
        scores = np.where(is_empty, 0, probabilities.max(1))
        is_unassigned = is_empty | (scores < lowest)
        called = np.where(is_unassigned, UNASSIGNED, np.array(names, dtype=object)[probabilities.argmax(1)])
        categories = [*names, UNASSIGNED] if is_unassigned.any() and UNASSIGNED not in names else names
        additions.obs[key] = pd.Categorical(called, categories=categories)
        additions.obs[f"{key}_score"] = scores.astype(np.float32)
        additions.obsm[f"{key}_proba"] = probabilities.astype(np.float32)
        if energies := calibration.get("energies"):
            unfamiliar = np.interp(energy(logits, temperature), energies, np.linspace(0, 1, len(energies)))
            additions.obs[f"{key}_unfamiliarity"] = np.where(is_empty, 1, unfamiliar).astype(np.float32)
        additions.uns[key] = {**provenance, "labels": names, "min_score": lowest}
    if embedding_key is not None:
        additions.obsm[embedding_key] = found["pooler_output"]
        additions.uns[embedding_key] = provenance
    return additions


def _min_score(calibration: dict, min_score: float | None) -> float:
    """The score below which cells are left unassigned; 0 where nothing asks for one, or too few cells vouch for it."""
    if min_score is not None:
        return float(min_score)
    return float(calibration["unassigned_threshold"]) if calibration.get("is_certified") else 0.0
