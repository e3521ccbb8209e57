"""Fine-tuning and pretraining on `transformers.Trainer`."""

from .checkpoints import export_checkpoint, save_checkpoint
from .finetuning import finetune
from .pretraining import pretrain
from .pretraining_trainer import PretrainingTrainer
from .recipes import read_recipe
from .report import quiet
from .safety import PretrainingError, last_good_checkpoint
from .study import balanced_class_weights
from .trainer import PanFoMaTrainer, WeightedCrossEntropy


__all__ = [
    "PanFoMaTrainer",
    "PretrainingError",
    "PretrainingTrainer",
    "WeightedCrossEntropy",
    "balanced_class_weights",
    "export_checkpoint",
    "finetune",
    "last_good_checkpoint",
    "pretrain",
    "quiet",
    "read_recipe",
    "save_checkpoint",
]
