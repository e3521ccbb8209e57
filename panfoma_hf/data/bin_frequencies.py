"""How often each gene has each expression bin: what a prediction that sees no cell can know."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from . import schema


@dataclass
class BinFrequencies:
    """Counts of bins of each gene over many cells, and two simple predictors made of them.

    Parameters
    ----------
    counts
        (vocab, bins + 1) int64, cells in which a gene has a bin; column 0, "not expressed", is empty for
        corpora of expressed genes.
    num_cells
        Cells that were counted.
    """

    counts: np.ndarray
    num_cells: int

    @classmethod
    def of(cls, dataset: Dataset, vocab_size: int, num_expression_bins: int) -> "BinFrequencies":
        """Count over all cells of a data set."""
        size = num_expression_bins + 1
        counts = np.zeros(vocab_size * size, dtype=np.int64)
        for genes, bins, _ in token_batches(dataset):
            counts += np.bincount(genes.astype(np.int64) * size + bins, minlength=len(counts))
        return cls(counts.reshape(vocab_size, size), len(dataset))

    def majority_bins(self) -> np.ndarray:
        """(vocab,) int64, each gene's commonest bin, the lowest of equals; that of all genes where a gene is unseen."""
        overall = self.counts.sum(0).argmax()
        return np.where(self.counts.any(1), self.counts.argmax(1), overall)

    def bin_frequencies(self) -> np.ndarray:
        """(bins + 1,) float32, share of each bin over all genes, none of them 0."""
        counts = self.counts.sum(0) + 1.0 / self.counts.shape[1]
        return (counts / counts.sum()).astype(np.float32)

    def log_probabilities(self, prior_cells: float = 10.0) -> np.ndarray:
        """(vocab, bins + 1) float32, logarithm of each bin's probability given the gene.

        The frequencies of all genes count as ``prior_cells`` cells of each gene (a Dirichlet prior), so that genes that
        were seen rarely or never get a probability too.
        """
        smoothed = self.counts + prior_cells * self.bin_frequencies()
        return np.log(smoothed / smoothed.sum(1, keepdims=True)).astype(np.float32)

    def presence_log_odds(self) -> np.ndarray:
        """(vocab,) float32, log odds that a cell expresses each gene, half a cell added on either side."""
        expressed = self.counts[:, 1:].sum(1)
        return (np.log(expressed + 0.5) - np.log(self.num_cells - expressed + 0.5)).astype(np.float32)


def token_batches(dataset: Dataset, cells: int = 4096) -> Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Genes and bins of some thousand cells at a time, flat, and each cell's number of them."""
    columns = dataset.select_columns([schema.INPUT_IDS, schema.EXPRESSION_BINS]).with_format("arrow")
    for table in columns.iter(cells):
        genes, bins = (
            np.concatenate([chunk.flatten().to_numpy() for chunk in table[name].chunks])
            for name in (schema.INPUT_IDS, schema.EXPRESSION_BINS)
        )
        yield genes, bins, pc.list_value_length(table[schema.INPUT_IDS]).to_numpy()
