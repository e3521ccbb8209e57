"""The PanFoMa tokenizer. Its files travel with every checkpoint: they import numpy and transformers only."""

from .expression import choose_layer, choose_matrix
from .gene_names import GeneResolution
from .tokenization_panfoma import CellTokens, PanFoMaTokenizer, check_tokenizer, warn_of_empty_cells
from .value_scale import ValueScale, value_scale


__all__ = [
    "CellTokens",
    "GeneResolution",
    "PanFoMaTokenizer",
    "ValueScale",
    "check_tokenizer",
    "choose_layer",
    "choose_matrix",
    "value_scale",
    "warn_of_empty_cells",
]
