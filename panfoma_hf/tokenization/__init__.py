"""The PanFoMa tokenizer. Its files travel with every checkpoint: they import numpy and transformers only."""

from .expression import choose_layer, choose_matrix
from .tokenization_panfoma import CellTokens, GeneResolution, PanFoMaTokenizer, check_tokenizer, warn_of_empty_cells


__all__ = [
    "CellTokens",
    "GeneResolution",
    "PanFoMaTokenizer",
    "check_tokenizer",
    "choose_layer",
    "choose_matrix",
    "warn_of_empty_cells",
]
