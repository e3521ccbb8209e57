"""PanFoMa for single-cell RNA sequencing, in the Auto classes of Transformers.

Importing this package registers PanFoMa, so that ``AutoModel``, ``AutoTokenizer`` and the others load its checkpoints
without ``trust_remote_code``, and ``pipeline`` knows "cell-type-annotation" and "cell-embedding". The import is light:
what reads AnnData is loaded when it is first used.
"""

from importlib import import_module

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from .modeling import PanFoMaConfig, PanFoMaForCellClassification, PanFoMaForMaskedExpression, PanFoMaModel
from .pipelines import CellEmbeddingPipeline, CellTypeAnnotationPipeline, register_pipelines
from .shipped import checkpoint
from .tokenization import PanFoMaTokenizer
from .version import __version__


AutoConfig.register(PanFoMaConfig.model_type, PanFoMaConfig)
AutoModel.register(PanFoMaConfig, PanFoMaModel)
AutoModelForSequenceClassification.register(PanFoMaConfig, PanFoMaForCellClassification)
AutoModelForMaskedLM.register(PanFoMaConfig, PanFoMaForMaskedExpression)
AutoModelForPreTraining.register(PanFoMaConfig, PanFoMaForMaskedExpression)
AutoTokenizer.register(PanFoMaConfig, tokenizer_class=PanFoMaTokenizer)
register_pipelines()

# Public names that need AnnData or datasets, and the modules that they live in.
_LAZY = {
    "Corpus": ".data.corpus",
    "DataCollatorForCells": ".data.collator",
    "DataCollatorForMaskedExpression": ".data.collator",
    "LinearProbe": ".evaluation.probes",
    "PanFoMaTrainer": ".training",
    "Task": ".evaluation.tasks",
    "annotate": ".inference",
    "build_corpus": ".data.corpus",
    "cell_dataset": ".data.dataset",
    "check": ".doctor",
    "embed": ".inference",
    "export_checkpoint": ".training",
    "finetune": ".training",
    "gene_embeddings": ".inference",
    "gene_scores": ".inference",
    "open_cells": ".data.readers",
    "pretrain": ".training",
    "pull": ".hub",
    "push_to_hub": ".hub",
    "read_expression": ".data.cells",
    "run_task": ".evaluation.tasks",
    "save_checkpoint": ".training",
}

__all__ = [
    "CellEmbeddingPipeline",
    "CellTypeAnnotationPipeline",
    "Corpus",
    "DataCollatorForCells",
    "DataCollatorForMaskedExpression",
    "LinearProbe",
    "PanFoMaConfig",
    "PanFoMaForCellClassification",
    "PanFoMaForMaskedExpression",
    "PanFoMaModel",
    "PanFoMaTokenizer",
    "PanFoMaTrainer",
    "Task",
    "__version__",
    "annotate",
    "build_corpus",
    "cell_dataset",
    "check",
    "checkpoint",
    "embed",
    "export_checkpoint",
    "finetune",
    "gene_embeddings",
    "gene_scores",
    "open_cells",
    "pretrain",
    "pull",
    "push_to_hub",
    "read_expression",
    "run_task",
    "save_checkpoint",
]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
