"""The PanFoMa tokenizer. Its files travel with every checkpoint: they import numpy and transformers only."""

from .tokenization_panfoma import CellTokens, GeneResolution, PanFoMaTokenizer


__all__ = ["CellTokens", "GeneResolution", "PanFoMaTokenizer"]
