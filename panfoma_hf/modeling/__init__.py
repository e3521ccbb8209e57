"""The PanFoMa model. Its files travel with every checkpoint: they import torch and transformers only."""

from .configuration_panfoma import PanFoMaConfig
from .modeling_panfoma import (
    PanFoMaForCellClassification,
    PanFoMaForMaskedExpression,
    PanFoMaModel,
    PanFoMaPreTrainedModel,
)
from .selective_scan import causal_conv1d_fn, selective_scan_fn


__all__ = [
    "PanFoMaConfig",
    "PanFoMaForCellClassification",
    "PanFoMaForMaskedExpression",
    "PanFoMaModel",
    "PanFoMaPreTrainedModel",
    "causal_conv1d_fn",
    "selective_scan_fn",
]
