"""The PanFoMa model. Its files travel with every checkpoint: they need torch and transformers only."""

from .configuration_panfoma import PanFoMaConfig
from .modeling_panfoma import (
    PanFoMaForCellClassification,
    PanFoMaForMaskedExpression,
    PanFoMaModel,
    PanFoMaPreTrainedModel,
)
from .selective_scan import bidirectional_scan_fn, causal_conv1d_fn, selective_scan_fn, use_scan_backend


__all__ = [
    "PanFoMaConfig",
    "PanFoMaForCellClassification",
    "PanFoMaForMaskedExpression",
    "PanFoMaModel",
    "PanFoMaPreTrainedModel",
    "bidirectional_scan_fn",
    "causal_conv1d_fn",
    "selective_scan_fn",
    "use_scan_backend",
]
