"""A `transformers.Trainer` for PanFoMa."""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from transformers import Trainer

from ..data.collator import DataCollatorForCells


class PanFoMaTrainer(Trainer):
    """Trainer that keeps Mamba's A and D from weight decay, weighs classes, and evaluates with fixed draws.

    Parameters
    ----------
    class_weights
        (labels,), weights of the classes in the loss, or None for equal ones.
    """

    def __init__(self, *args, class_weights: torch.Tensor | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        if class_weights is not None:
            self.compute_loss_func = WeightedCrossEntropy(class_weights, self.args.label_smoothing_factor)

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Names of the parameters that are decayed: no norms, no biases, not Mamba's A_log and D, no genes' priors."""
        names = super().get_decay_parameter_names(model)
        return [name for name in names if not name.endswith(("A_log", ".D", "_priors.weight"))]

    def get_eval_dataloader(self, *args, **kwargs):
        """As in Trainer, with the collator's random draws off."""
        with self._fixed_draws():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args, **kwargs):
        """As in Trainer, with the collator's random draws off."""
        with self._fixed_draws():
            return super().get_test_dataloader(*args, **kwargs)

    @contextlib.contextmanager
    def _fixed_draws(self) -> Iterator[None]:
        training_collator = self.data_collator
        if isinstance(training_collator, DataCollatorForCells):
            self.data_collator = DataCollatorForCells(
                training_collator.tokenizer,
                max_genes=training_collator.max_genes,
                random=False,
                pad_to_multiple_of=training_collator.pad_to_multiple_of,
            )
        try:
            yield
        finally:
            self.data_collator = training_collator


class WeightedCrossEntropy:
    """Cross-entropy with class weights, averaged over cells; for Trainer's ``compute_loss_func``.

    Parameters
    ----------
    class_weights
        (labels,), of mean 1 over the training cells so that the learning rate keeps its meaning.
    label_smoothing
        Share of the target that is spread over all classes.
    """

    def __init__(self, class_weights: torch.Tensor, label_smoothing: float = 0.0):
        self.class_weights = class_weights
        self.label_smoothing = label_smoothing

    def __call__(self, outputs, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None):
        """Loss of logits (batch, labels) and class ids (batch,), a scalar."""
        logits = outputs["logits"].float()
        weights = self.class_weights.to(logits.device)
        total = F.cross_entropy(logits, labels, weights, reduction="sum", label_smoothing=self.label_smoothing)
        if num_items_in_batch is None:
            num_items_in_batch = len(labels)
        elif torch.is_tensor(num_items_in_batch):
            # With several GPUs in one process Trainer repeats the number for each, and multiplies the loss by them.
            num_items_in_batch = num_items_in_batch.sum().to(logits.device)
        return total / num_items_in_batch
