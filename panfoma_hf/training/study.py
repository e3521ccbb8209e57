"""What a fine-tune learns from: cells that are read, split without leaks, and tokenized."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path

import anndata as ad
import numpy as np
import torch
from datasets import Dataset
from transformers import AutoTokenizer
from transformers.utils import logging

from ..data.cells import anndata_cells, name_of, read_cells, read_expression, tokenize
from ..data.dataset import cell_dataset
from ..data.splits import find_groups, find_leakage, split_cells
from ..data.variable_genes import variable_genes
from ..modeling import PanFoMaConfig
from ..modeling.configuration_panfoma import SIZES
from ..tokenization import PanFoMaTokenizer, warn_of_empty_cells
from ..tokenization.value_scale import COUNTS


logger = logging.get_logger(__name__)

# Variable genes that are read unless another set is asked for.
NUM_GENES = 1000


def balanced_class_weights(labels: np.ndarray, num_labels: int, power: float) -> torch.Tensor:
    """Weights of classes of ``count ** -power``, scaled to a mean of 1 over the cells.

    Parameters
    ----------
    labels
        (cells,), class ids; negative ones do not count.
    num_labels
        Number of classes.
    power
        0 for equal weights, 1 for weights that give every class the same say.
    """
    labels = np.asarray(labels)
    counts = np.bincount(labels[labels >= 0], minlength=num_labels).astype(np.float64)
    weights = np.maximum(counts, 1) ** -power
    return torch.tensor(weights * counts.sum() / (weights * counts).sum(), dtype=torch.float32)


def is_share(validation) -> bool:
    """Whether ``validation`` is a share of the cells to hold out, not cells."""
    return isinstance(validation, Real)


@dataclass
class Study:
    """What all seeds share: cells, tokens, names and labels of each task, and what is known of the split.

    ``names`` are the tasks' labels; ``train_labels`` and ``validation_labels`` are (cells, tasks) ids, -100 where one
    is not known.
    """

    names: dict[str, list[str]]
    train: ad.AnnData
    validation: ad.AnnData | None
    tokenizer: PanFoMaTokenizer
    train_labels: np.ndarray
    validation_labels: np.ndarray | None
    train_dataset: Dataset
    validation_dataset: Dataset | None
    report: dict = field(default_factory=dict)

    @property
    def sizes(self) -> list[int]:
        """Number of labels of each task."""
        return [len(names) for names in self.names.values()]

    def class_weights(self, power: float) -> torch.Tensor:
        """(labels,), weights in the loss of the labels of all tasks."""
        tasks = zip(self.train_labels.T, self.sizes, strict=True)
        return torch.cat([balanced_class_weights(ids, size, power) for ids, size in tasks])


def read_study(cells, labels, validation, groups, model, gene_set, seed, *, layer, **reading) -> Study:
    """Read and split the cells, choose the genes, and tokenize."""
    name, validation_name = name_of(cells), "the validation cells"
    cells = read_cells(cells)
    # Tasks lie in the order of the alphabet, as in the configuration; the first that was named decides the split.
    first, labels = labels[0], sorted(labels)
    known, validation_known = _all_labels(cells, labels), None
    split = {"groups": None, "held_out": [], "leakage": []}
    if is_share(validation):
        column = find_groups(cells.obs, first) if groups == "auto" else groups
        train, held_out, split = _split(cells, known, first, column, validation, seed)
        validation, cells = cells[held_out].copy(), cells[train].copy()
        known, validation_known = (
            {label: of_label[rows] for label, of_label in known.items()} for rows in (train, held_out)
        )
    elif validation is not None:
        if not isinstance(validation, ad.AnnData):
            validation_name = name_of(validation)
        validation = read_cells(validation)
        validation_known = _all_labels(validation, labels)
        split["held_out"] = [Path(validation_name).name]
    names = {label: sorted(set(_known(of_label))) for label, of_label in known.items()}
    for label, of_label in names.items():
        if len(of_label) < 2:
            raise ValueError(
                f"At least two labels are needed to learn a difference, got {of_label} in obs[{label!r}]. "
                "Add cells of another label, or name another column."
            )
    train_ids, validation_ids = _label_ids(known, names), None
    if validation is not None:
        validation_ids = _label_ids(validation_known, names)
        leakage = find_leakage(cells, validation, first)
        split["leakage"] = leakage.messages()
        if leakage.is_leak or leakage.telling_columns:
            logger.warning("The split leaks, or may: " + " ".join(leakage.messages()))

    tokenizer = _starting_tokenizer(model)
    chosen = _gene_set(gene_set, cells, name, tokenizer, layer, reading)
    if chosen is not None:
        tokenizer.gene_set = chosen
    train_dataset = _labelled_dataset(cells, train_ids, tokenizer, layer=layer, name=name, **reading)
    validation_dataset = None
    if validation is not None:
        validation_dataset = _labelled_dataset(
            validation, validation_ids, tokenizer, layer=layer, name=validation_name, **reading
        )
    report = {
        # By its name: the report is published with the checkpoint, and folders are nobody's business.
        "cells": Path(name).name,
        "labels": {label: len(of_label) for label, of_label in names.items()},
        "train_cells": cells.n_obs,
        "validation_cells": 0 if validation is None else validation.n_obs,
        "train_counts": {
            label: dict(zip(of_label, np.bincount(ids[ids >= 0], minlength=len(of_label)).tolist(), strict=True))
            for (label, of_label), ids in zip(names.items(), train_ids.T, strict=True)
        },
        "train_groups": cells.obs[split["groups"]].nunique() if split["groups"] else None,
        "split": split,
        "gene_set_size": len(tokenizer.gene_set or []),
    }
    return Study(
        names, cells, validation, tokenizer, train_ids, validation_ids, train_dataset, validation_dataset, report
    )


def _split(
    cells: ad.AnnData, known: dict[str, np.ndarray], first: str, column: str | None, share: float, seed: int
) -> tuple[np.ndarray, np.ndarray, dict]:
    """Positions to train on and to hold out, by the labels of the task ``first``, and what to report of that.

    Groups that alone have one of its labels are trained on, as whoever fine-tunes wants these names learned. A label of
    another task that only held-out cells have is struck from ``known``.
    """
    if column is not None and column not in cells.obs:
        raise ValueError(
            f"`groups` must be a column of obs, got {column!r}; the columns are {sorted(cells.obs)}. Name one of "
            "these, or pass None to split by cell."
        )
    is_labelled = np.array([label is not None for label in known[first]])
    labelled = np.flatnonzero(is_labelled)
    groups = None if column is None else cells.obs[column].iloc[labelled]
    split = split_cells(known[first][labelled], groups=groups, test_size=share, seed=seed)
    is_held_out = np.zeros(cells.n_obs, dtype=bool)
    is_held_out[labelled[split.test]] = True
    names_of_groups = set(split.held_out)
    if split.only_in_test:
        group_of = cells.obs[column].astype(str).to_numpy()
        needed = set(group_of[is_held_out & np.isin(known[first].astype(str), split.only_in_test)])
        names_of_groups -= needed
        is_held_out &= ~np.isin(group_of, list(needed))
        logger.warning(
            f"Labels should be in several groups of {column!r} to be both learned and scored, got "
            f"{_listed(set(split.only_in_test))} of {first!r} in held-out ones only. These groups are trained on."
        )
        if not names_of_groups:
            logger.warning(f"No other group of {column!r} was held out: cells are split by themselves, across groups.")
            return _split(cells, known, first, None, share, seed)
    is_train = ~is_held_out
    if column is not None:  # cells of the same groups without this task's label would leak
        is_train &= is_labelled | ~cells.obs[column].astype(str).isin(names_of_groups).to_numpy()
    for label, of_label in known.items():
        if lost := set(_known(of_label[is_held_out])) - set(_known(of_label[is_train])):
            rows = np.flatnonzero(is_held_out & np.array([name in lost for name in of_label]))
            if column is None:  # nothing speaks against training on these cells
                is_held_out[rows], is_train[rows] = False, True
            else:
                of_label[rows] = None
                logger.warning(f"Only held-out groups have the {label!r} {_listed(lost)}: not learned.")
        if not_scored := set(_known(of_label[is_train])) - set(_known(of_label[is_held_out])):
            logger.warning(f"No validation cell has the {label!r} {_listed(not_scored)}: not scored.")
    report = {"groups": column, "held_out": sorted(names_of_groups), "leakage": []}
    return np.flatnonzero(is_train), np.flatnonzero(is_held_out), report


def _listed(names: set[str], most: int = 5) -> str:
    return ", ".join(sorted(names)[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def _gene_set(gene_set, cells, name, tokenizer, layer, reading) -> Sequence[str] | None:
    """Names of the genes to read, None for those that the tokenizer has."""
    is_auto = isinstance(gene_set, str) and gene_set == "auto"
    if is_auto and (tokenizer.gene_set is not None or cells.n_vars <= NUM_GENES):
        return None
    if is_auto or isinstance(gene_set, Integral):
        expression = read_expression(anndata_cells(cells, name), tokenizer, layer=layer, **reading)
        if is_auto and expression.scale.kind != COUNTS:
            return None
        number = NUM_GENES if is_auto else gene_set
        try:
            return variable_genes(cells, number, tokenizer, layer=expression.layer, gene_column=reading["gene_column"])
        except ImportError:
            if not is_auto:
                raise
            logger.warning("Every gene is read: `pip install panfoma-hf[analysis]` finds the variable ones.")
            return None
    return gene_set


def _all_labels(cells: ad.AnnData, labels: list[str]) -> dict[str, np.ndarray]:
    """(cells,) names by column of ``obs``; None where one is missing, which is an error if it is the only one."""
    known = {}
    for label in labels:
        if label not in cells.obs:
            raise ValueError(
                f"`label` must be a column of obs, got {label!r}; the columns are {sorted(cells.obs)}. Name one of "
                "these."
            )
        names = cells.obs[label].astype(str).to_numpy(dtype=object)
        names[cells.obs[label].isna().to_numpy()] = None
        known[label] = names
    num_missing = sum(all(name is None for name in names) for names in zip(*known.values(), strict=True))
    if num_missing:
        one = len(labels) == 1
        raise ValueError(
            f"Every cell needs a label, got {num_missing:,} of {cells.n_obs:,} without one in "
            + (f"obs[{labels[0]!r}]. " if one else f"any of {', '.join(map(repr, labels))}. ")
            + f"Leave them out: adata[adata.obs[{labels[0] if one else labels!r}].notna()"
            + ("]." if one else ".any(axis=1)].")
        )
    return known


def _known(labels: np.ndarray) -> list[str]:
    return [label for label in labels if label is not None]


def _label_ids(known: dict[str, np.ndarray], names: dict[str, list[str]]) -> np.ndarray:
    """(cells, tasks) ids of the labels, -100 where one is not known."""
    columns = []
    for label, of_label in known.items():
        if unknown := set(_known(of_label)) - set(names[label]):
            raise ValueError(
                f"Validation cells must have labels of the training cells, got {sorted(unknown)} besides in "
                f"obs[{label!r}]. Leave these cells out, or put some of them into the training cells."
            )
        ids = {None: -100} | {name: index for index, name in enumerate(names[label])}
        columns.append([ids[name] for name in of_label])
    return np.array(columns, dtype=np.int64).T


def _labelled_dataset(cells: ad.AnnData, ids: np.ndarray, tokenizer: PanFoMaTokenizer, **reading) -> Dataset:
    tokens, _ = tokenize(cells, tokenizer, **reading)
    warn_of_empty_cells(tokens.lengths)
    has_tasks = ids.shape[1] > 1
    return cell_dataset(tokens, ids if has_tasks else ids[:, 0], has_tasks=has_tasks)


def _starting_tokenizer(model) -> PanFoMaTokenizer:
    if isinstance(model, PanFoMaConfig):
        return PanFoMaTokenizer(num_expression_bins=model.num_expression_bins)
    return PanFoMaTokenizer() if str(model) in SIZES else AutoTokenizer.from_pretrained(model)
