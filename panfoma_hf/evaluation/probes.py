"""How much a linear classifier reads from embeddings that are left as they are."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import torch
from datasets import Dataset
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupShuffleSplit, StratifiedShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ..data import schema
from ..data.cells import MIN_COVERAGE, name_of, read_cells, tokenize
from ..data.corpus import Corpus
from ..data.dataset import cell_dataset
from ..data.forward import forward_cells
from ..modeling import PanFoMaModel
from ..tokenization import PanFoMaTokenizer
from .baselines import principal_components
from .metrics import classification_metrics


# Labels of fewer cells are left out: both sides of a split need some.
FEWEST_CELLS_OF_A_LABEL = 5


@dataclass
class ProbeScores:
    """Scores of a linear probe on several splits of the same cells.

    Parameters
    ----------
    accuracy, macro_f1
        (splits,), on the held-out cells of each split.
    test_share
        Held-out cells for each cell that was learned from.
    """

    accuracy: np.ndarray
    macro_f1: np.ndarray
    test_share: float

    def interval(self, metric: str = "accuracy") -> tuple[float, float]:
        """Mean and half width of the 95 % interval; see `resampled_interval`."""
        return resampled_interval(getattr(self, metric), self.test_share)

    def interval_of_difference(self, other: "ProbeScores", metric: str = "accuracy") -> tuple[float, float]:
        """Mean and half width of the 95 % interval of this score minus another one on the same splits."""
        return resampled_interval(getattr(self, metric) - getattr(other, metric), self.test_share)


def resampled_interval(values: np.ndarray, test_share: float) -> tuple[float, float]:
    """Mean and half width of the 95 % interval over random splits of the same cells.

    Splits share cells, so scores depend on each other; the variance is corrected as by Nadeau and Bengio (Machine
    Learning 2003): ``(1 / splits + test / train) * variance``.

    Parameters
    ----------
    values
        (splits,), at least two.
    test_share
        Held-out cells for each cell that was learned from.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        raise ValueError(f"An interval needs at least two splits, got {len(values)}. Draw more.")
    error = np.sqrt((1 / len(values) + test_share) * values.var(ddof=1))
    return float(values.mean()), float(stats.t.ppf(0.975, len(values) - 1) * error)


def linear_probe(
    embeddings: np.ndarray | Callable[[np.ndarray], np.ndarray],
    labels: Sequence[str],
    *,
    groups: Sequence[str] | None = None,
    asked: np.ndarray | None = None,
    num_splits: int = 5,
    test_size: float = 0.3,
    seed: int = 0,
) -> ProbeScores:
    """Score logistic regression on standardised embeddings, on several random splits.

    Parameters
    ----------
    embeddings
        (cells, hidden); or a function that gives them for the positions of the training cells, for embeddings that
        are fitted, such as principal components.
    labels
        (cells,), names to learn.
    groups
        (cells,), such as donors, which are not divided between the sides; None splits within each label.
    asked
        (cells, hidden), embeddings of held-out cells in place of ``embeddings``, such as of cells read in part.
    num_splits, test_size, seed
        Number of splits, share of cells (or groups) held out, and seed of the splits; compare on the same ones only.

    Raises
    ------
    ValueError
        If fewer than two labels have five cells.
    """
    labels = np.asarray(labels).astype(str)
    rows = _rows_of_common_labels(labels)
    splitter = (StratifiedShuffleSplit if groups is None else GroupShuffleSplit)(
        num_splits, test_size=test_size, random_state=seed
    )
    scores = []
    for train, test in splitter.split(rows, labels[rows], None if groups is None else np.asarray(groups)[rows]):
        train, test = rows[train], rows[test]
        features = embeddings(train) if callable(embeddings) else embeddings
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        predicted = probe.fit(features[train], labels[train]).predict((features if asked is None else asked)[test])
        metrics = classification_metrics(labels[test], predicted)
        scores.append((metrics["accuracy"], metrics["macro_f1"], len(test) / len(train)))
    accuracy, macro_f1, shares = np.array(scores).T
    return ProbeScores(accuracy, macro_f1, float(shares.mean()))


def _rows_of_common_labels(labels: np.ndarray) -> np.ndarray:
    """Positions of cells whose label enough cells have; an error where that leaves fewer than two labels."""
    names, counts = np.unique(labels, return_counts=True)
    kept = np.isin(labels, names[counts >= FEWEST_CELLS_OF_A_LABEL])
    if len(set(labels[kept])) < 2:
        raise ValueError(
            f"A probe needs two labels of at least {FEWEST_CELLS_OF_A_LABEL} cells, got "
            f"{dict(zip(names.tolist(), counts.tolist(), strict=True))}. Add cells, or take another column."
        )
    return np.flatnonzero(kept)


def embed_dataset(
    model: PanFoMaModel, dataset: Dataset, tokenizer: PanFoMaTokenizer, batch_size: int = 16
) -> np.ndarray:
    """(cells, hidden) float32, cell embeddings of a tokenized data set, in its order."""
    return forward_cells(model, dataset, tokenizer, batch_size=batch_size)["pooler_output"]


class LinearProbe:
    """Linear probe on labelled cells while a model is trained, for `pretrain(probes=...)`; see `of_study`, `of_cells`.

    Parameters
    ----------
    dataset
        Tokenized cells.
    labels
        (cells,), their names.
    tokenizer
        Pads them.
    others
        Scores of other embeddings of the same cells, by name; given with each of the model's.
    """

    def __init__(
        self,
        dataset: Dataset,
        labels: np.ndarray,
        tokenizer: PanFoMaTokenizer,
        others: Mapping[str, ProbeScores] | None = None,
    ):
        _rows_of_common_labels(np.asarray(labels).astype(str))  # now, not hours into a run
        self.dataset, self.labels, self.tokenizer = dataset, labels, tokenizer
        self.others = dict(others or {})

    @classmethod
    def of_study(
        cls, corpus: Corpus, study: str, *, label: str = schema.CELL_TYPE, most_cells: int = 500
    ) -> "LinearProbe":
        """Of a corpus' labelled cells.

        Parameters
        ----------
        corpus
            The corpus.
        study
            A study with labels, best one that is held out.
        label
            Column with the names to learn; cells without one are left out.
        most_cells
            Cells that are embedded, drawn once.

        Raises
        ------
        ValueError
            If the study is not there or has no labelled cells.
        """
        if study not in corpus.groups.names["studies"]:
            raise ValueError(
                f"A probe needs a study of the corpus or a file, got {study}. The corpus has "
                f"{', '.join(corpus.groups.names['studies'])}."
            )
        rows = np.flatnonzero(corpus.groups.studies == corpus.groups.names["studies"].index(study))
        dataset = corpus.dataset().select(rows)
        labels = np.array(dataset.select_columns([label])[:][label], dtype=object)
        known = _drawn(np.array([name is not None for name in labels], dtype=bool), most_cells, study, label)
        return cls(dataset.select(known), labels[known], corpus.tokenizer)

    @classmethod
    def of_cells(
        cls,
        cells: ad.AnnData | str | Path,
        tokenizer: PanFoMaTokenizer,
        *,
        label: str = schema.CELL_TYPE,
        most_cells: int = 500,
        min_coverage: float = MIN_COVERAGE,
    ) -> "LinearProbe":
        """Of cells with their counts; principal components of the log-normalised counts are scored beside the model.

        Parameters
        ----------
        cells
            An AnnData, or a file of any format that `panfoma_hf.open_cells` reads.
        tokenizer
            The model's.
        label, most_cells
            As in `of_study`.
        min_coverage
            Share of the counts that must be known; see `panfoma_hf.embed`.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ImportError
            If scanpy is not installed, which normalises counts.
        ValueError
            If there is no such column, no cell has a label, or expression is not usable.
        """
        name = name_of(cells)
        cells = read_cells(cells)
        if label not in cells.obs:
            raise ValueError(
                f"A probe's label is a column of obs, got {label!r} for {name}, which has {', '.join(cells.obs)}. "
                "Name one of these, or rename the column."
            )
        cells = cells[_drawn(cells.obs[label].notna().to_numpy(), most_cells, name, label)].copy()
        labels = cells.obs[label].astype(str).to_numpy()
        tokens, _ = tokenize(cells, tokenizer, min_coverage=min_coverage, name=name)
        components = linear_probe(lambda train: principal_components(cells, train), labels)
        return cls(cell_dataset(tokens), labels, tokenizer, {"components": components})

    def __call__(self, model: PanFoMaModel) -> dict[str, float]:
        """Mean accuracy and macro-F1 over five splits: of the model; of random weights of its shape; of the others."""
        with torch.random.fork_rng(devices=[]):  # training goes on to draw what it would have drawn
            if "random" not in self.others:
                torch.default_generator.manual_seed(0)  # of the CPU alone: those of GPUs go on, too
                self.others["random"] = self._scores(PanFoMaModel(model.config).to(model.device))
            means = {"": self._scores(model)} | {f"{name}_": scores for name, scores in self.others.items()}
        return {
            f"{prefix}{metric}": float(getattr(scores, metric).mean())
            for prefix, scores in means.items()
            for metric in ("accuracy", "macro_f1")
        }

    def _scores(self, model: PanFoMaModel) -> ProbeScores:
        return linear_probe(embed_dataset(model, self.dataset, self.tokenizer), self.labels)


def _drawn(is_labelled: np.ndarray, most_cells: int, name: str, label: str) -> np.ndarray:
    """Positions of labelled cells, drawn where there are too many; the same ones each time."""
    known = np.flatnonzero(is_labelled)
    if not len(known):
        raise ValueError(
            f"A probe needs labelled cells, got {len(is_labelled):,} cells of {name!r} without {label!r}. "
            "Choose one that has it."
        )
    if len(known) > most_cells:
        known = np.sort(np.random.default_rng(0).choice(known, most_cells, replace=False))
    return known
