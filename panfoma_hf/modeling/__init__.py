"""The PanFoMa model. Its files travel with every checkpoint: they import torch and transformers only."""

from .configuration_panfoma import PanFoMaConfig
from .modeling_panfoma import (
    PanFoMaForCellClassification,
    PanFoMaForMaskedExpression,
    PanFoMaModel,
    PanFoMaPreTrainedModel,
)
from .selective_scan import selective_scan_fn


__all__ = [
    "PanFoMaConfig",
    "PanFoMaForCellClassification",
    "PanFoMaForMaskedExpression",
    "PanFoMaModel",
    "PanFoMaPreTrainedModel",
    "selective_scan_fn",
]
