"""From tokenized cells to a batch: sample, pad, mask. All randomness of training lives here."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash

from ..tokenization import PanFoMaTokenizer
from . import schema


@dataclass
class DataCollatorForCells:
    """Put cells into a batch, padded to its longest cell.

    Parameters
    ----------
    tokenizer
        Pads, and says how many genes a cell keeps where ``max_genes`` is None.
    max_genes
        Genes of a cell that are kept; only larger cells are sub-sampled.
    random
        True draws genes at random and puts them in random order, as in training (paper: "3,072 genes randomly
        sampled"); the draws follow torch's seed. False keeps the tokenizer's fixed pseudo-random order, as at
        inference.
    pad_to_multiple_of
        Pad to a multiple of this length.
    """

    tokenizer: PanFoMaTokenizer
    max_genes: int | None = None
    random: bool = True
    pad_to_multiple_of: int | None = None

    def __call__(self, cells: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Turn cells with ``input_ids``, ``expression_bins`` and perhaps ``labels`` into (cells, seq) tensors.

        Raises
        ------
        ValueError
            If a cell lacks gene ids or bins.
        """
        _require_tokens(cells)
        batch = self.tokenizer.pad(
            [self._draw(cell) for cell in cells], pad_to_multiple_of=self.pad_to_multiple_of, return_tensors="pt"
        )
        if schema.LABELS in cells[0]:
            batch[schema.LABELS] = torch.stack([torch.as_tensor(cell[schema.LABELS]) for cell in cells])
        return dict(batch)

    def _draw(self, cell: dict[str, Any]) -> dict[str, Any]:
        max_genes = self.tokenizer.model_max_length if self.max_genes is None else self.max_genes
        genes = torch.as_tensor(cell[schema.INPUT_IDS])
        bins = torch.as_tensor(cell[schema.EXPRESSION_BINS])
        if self.random:
            drawn = torch.randperm(len(genes))[:max_genes]
            genes, bins = genes[drawn], bins[drawn]
        return {schema.INPUT_IDS: genes[:max_genes].numpy(), schema.EXPRESSION_BINS: bins[:max_genes].numpy()}


# Genes whose bins are not to be predicted, as torch's cross-entropy knows them.
IGNORED = -100


@dataclass
class DataCollatorForMaskedExpression:
    """Put cells into a batch for pretraining: draw genes, and mask the bins of some, which are to be predicted.

    Every draw is a function of the seed, the pass over the corpus, and the cell's own tokens: neither the other cells
    of a batch nor the number of processes and workers changes what becomes of a cell, and a run that is resumed draws
    what it would have drawn.

    Parameters
    ----------
    tokenizer
        Pads, gives the [MASK] bin, and says how many genes a cell keeps where ``max_genes`` is None.
    mask_ratio
        Share of a cell's genes that are masked; or the lowest and the highest share, between which each cell draws.
    withhold_ratio
        Share of a cell's genes that are left out, in the same form; the model is only asked whether they are expressed.
    max_genes
        Genes of a cell that are kept; larger cells are sub-sampled, and the others withheld.
    random
        True draws genes at random and puts them in random order. False keeps the tokenizer's fixed pseudo-random order,
        as at inference; masks are drawn all the same.
    seed
        Of all draws.
    pad_to_multiple_of
        Pad to a multiple of this length.

    Raises
    ------
    ValueError
        If a share is out of range.
    """

    tokenizer: PanFoMaTokenizer
    mask_ratio: float | Sequence[float] = 0.3
    withhold_ratio: float | Sequence[float] = 0.0
    max_genes: int | None = None
    random: bool = True
    seed: int = 0
    pad_to_multiple_of: int | None = None

    def __post_init__(self):
        self._mask_range = _range(self.mask_ratio, "`mask_ratio` is a share above 0", 0.3, (0.15, 0.4))
        self._withhold_range = _range(
            self.withhold_ratio, "`withhold_ratio` is a share of at least 0", 0.2, (0.0, 0.5), zero=True
        )

    def __call__(self, cells: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Turn cells with ``input_ids``, ``expression_bins`` and perhaps ``epoch`` into (cells, seq) tensors.

        ``labels`` hold the true bins of masked genes, and -100 elsewhere. At least one gene of each cell is masked.
        Where genes are not shown, ``withheld_ids`` (cells, withheld) holds them, filled up with the pad id.

        Raises
        ------
        ValueError
            If a cell lacks gene ids or bins.
        """
        _require_tokens(cells)
        drawn = [self._draw(cell) for cell in cells]
        batch = self.tokenizer.pad(
            [{schema.INPUT_IDS: genes, schema.EXPRESSION_BINS: bins} for genes, bins, _, _ in drawn],
            pad_to_multiple_of=self.pad_to_multiple_of,
            return_tensors="pt",
        )
        labels = np.full(batch[schema.INPUT_IDS].shape, IGNORED, dtype=np.int64)
        withheld_ids = np.full(
            (len(cells), max(len(withheld) for *_, withheld in drawn)), self.tokenizer.pad_token_id, dtype=np.int64
        )
        for line, withheld_line, (_, bins, masked, withheld) in zip(labels, withheld_ids, drawn, strict=True):
            line[masked] = bins[masked]
            withheld_line[: len(withheld)] = withheld
        batch[schema.LABELS] = torch.from_numpy(labels)
        batch[schema.EXPRESSION_BINS][batch[schema.LABELS] != IGNORED] = self.tokenizer.mask_bin_id
        if withheld_ids.size:
            batch[schema.WITHHELD_IDS] = torch.from_numpy(withheld_ids)
        return dict(batch)

    @property
    def most_genes(self) -> int:
        """Genes that a cell keeps at most."""
        return self.tokenizer.model_max_length if self.max_genes is None else self.max_genes

    def _draw(self, cell: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Genes and bins that are kept of a cell, positions of those that are masked, and genes that are withheld."""
        genes = np.asarray(cell[schema.INPUT_IDS], dtype=np.int32)  # one type, as their bytes decide the draws
        bins = np.asarray(cell[schema.EXPRESSION_BINS], dtype=np.int32)
        content = xxhash.xxh3_64_intdigest(bins.tobytes(), seed=xxhash.xxh3_64_intdigest(genes.tobytes()))
        key = (content, (self.seed << 32) + int(cell.get(schema.EPOCH, 0)))
        generator = np.random.Generator(np.random.Philox(key=key))
        order = generator.permutation(len(genes)) if self.random else np.arange(len(genes))
        order, withheld = order[: self.most_genes], order[self.most_genes :]
        if self._withhold_range[1]:
            num_withheld = min(len(order) - 1, round(generator.uniform(*self._withhold_range) * len(order)))
            # Not the last ones: their order is not random everywhere.
            is_withheld = np.zeros(len(order), dtype=bool)
            is_withheld[generator.permutation(len(order))[: max(0, num_withheld)]] = True
            order, withheld = order[~is_withheld], np.concatenate([order[is_withheld], withheld])
        withheld, genes, bins = genes[withheld], genes[order], bins[order]
        num_masked = min(len(genes), max(1, round(generator.uniform(*self._mask_range) * len(genes))))
        # Positions are drawn apart from the order of genes: the first ones would all be in the first chunk.
        return genes, bins, generator.permutation(len(genes))[:num_masked], withheld


def _range(
    ratio: float | Sequence[float], rule: str, one: float, two: tuple[float, float], zero: bool = False
) -> tuple[float, float]:
    """Lowest and highest share."""
    shares = np.atleast_1d(np.asarray(ratio, dtype=np.float64))
    is_share = (shares < 1) & ((shares >= 0) if zero else (shares > 0))
    if shares.ndim != 1 or len(shares) not in (1, 2) or not is_share.all() or shares[0] > shares[-1]:
        raise ValueError(f"{rule} and below 1, or the lowest and the highest one, got {ratio!r}. Pass {one}, or {two}.")
    return float(shares[0]), float(shares[-1])


def _require_tokens(cells: list[dict[str, Any]]) -> None:
    missing = {schema.INPUT_IDS, schema.EXPRESSION_BINS} - set(cells[0])
    if missing:
        raise ValueError(
            f"Cells need 'input_ids' and 'expression_bins', got {sorted(cells[0])}. Tokenize them with "
            "PanFoMaTokenizer, and keep Trainer from dropping columns with `remove_unused_columns=False`."
        )
