"""From tokenized cells to a batch: sample, pad. All randomness of training lives here."""

from dataclasses import dataclass
from typing import Any

import torch

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
        missing = {schema.INPUT_IDS, schema.EXPRESSION_BINS} - set(cells[0])
        if missing:
            raise ValueError(
                f"Cells need 'input_ids' and 'expression_bins', got {sorted(cells[0])}. Tokenize them with "
                "PanFoMaTokenizer, and keep Trainer from dropping columns with `remove_unused_columns=False`."
            )
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
