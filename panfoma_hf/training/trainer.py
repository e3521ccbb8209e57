"""A `transformers.Trainer` for PanFoMa."""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from ..data.collator import DataCollatorForCells
from ..modeling.modeling_panfoma import multi_task_cross_entropy


class PanFoMaTrainer(Trainer):
    """Trainer that keeps Mamba's A and D from weight decay, weighs classes, and evaluates with fixed draws.

    Parameters
    ----------
    class_weights
        (labels,), weights of the classes in the loss, or None for equal ones.
    tasks
        Names of the labels by task, ``config.label_tasks``, where the model has several; None for one.
    """

    def __init__(
        self,
        *args,
        class_weights: torch.Tensor | None = None,
        tasks: dict[str, list[str]] | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        # Trainer's own label smoothing knows one task only.
        if class_weights is not None or tasks is not None:
            self.compute_loss_func = WeightedCrossEntropy(class_weights, self.args.label_smoothing_factor, tasks)

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
        (labels,), of mean 1 over the training cells so that the learning rate keeps its meaning; None for equal ones.
    label_smoothing
        Share of the target that is spread over all classes.
    tasks
        Names of the labels by task, whose logits lie side by side; None for one task.
    """

    def __init__(
        self,
        class_weights: torch.Tensor | None,
        label_smoothing: float = 0.0,
        tasks: dict[str, list[str]] | None = None,
    ):
        self.class_weights = class_weights
        self.label_smoothing = label_smoothing
        self.tasks = tasks

    def __call__(self, outputs, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None):
        """Loss of logits (batch, labels) and class ids (batch,) or (batch, tasks), a scalar."""
        logits = outputs["logits"].float()
        weights = None if self.class_weights is None else self.class_weights.to(logits.device)
        if self.tasks is not None:
            total = multi_task_cross_entropy(logits, labels, self.tasks, 1, weights, self.label_smoothing)
            if num_items_in_batch is None:
                num_items_in_batch = (labels != -100).sum().clamp(min=1)
        else:
            total = F.cross_entropy(logits, labels, weights, reduction="sum", label_smoothing=self.label_smoothing)
        if num_items_in_batch is None:
            num_items_in_batch = len(labels)
        elif torch.is_tensor(num_items_in_batch):
            # With several GPUs in one process Trainer repeats the number for each, and multiplies the loss by them.
            num_items_in_batch = num_items_in_batch.sum().to(logits.device)
        return total / num_items_in_batch


class KeepBest(TrainerCallback):
    """Keep the trained weights that scored best on the validation cells, and stop when they no longer improve.

    Weights are kept in memory, those before the first step among them, so that training never ends with worse ones
    than it began with. Not for weights that are sharded over processes.

    Parameters
    ----------
    metric
        What to compare, the higher the better; ties go to the lower ``eval_loss``.
    patience
        Evaluations without a better one after which training stops; None never stops.
    """

    def __init__(self, metric: str, patience: int | None = None):
        self.metric, self.patience = metric, patience
        self.best: tuple[float, float] | None = None
        self.weights: dict[str, torch.Tensor] = {}
        self.waited = 0

    def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
        """Compare; see `transformers.TrainerCallback`."""
        score = (metrics[self.metric], -metrics["eval_loss"])
        if self.best is None or score > self.best:
            self.best, self.waited = score, 0
            self.weights = {
                name: weight.detach().to("cpu", copy=True)
                for name, weight in model.named_parameters()
                if weight.requires_grad
            }
        else:
            self.waited += 1
            if self.patience is not None and self.waited >= self.patience:
                control.should_training_stop = True

    def on_step_end(self, args, state, control, **kwargs):
        """Have the last weights judged too, whatever the interval; see `transformers.TrainerCallback`."""
        if state.global_step >= state.max_steps and args.eval_strategy == IntervalStrategy.STEPS:
            control.should_evaluate = True

    def on_train_end(self, args, state, control, model=None, **kwargs):
        """Put the best weights back; see `transformers.TrainerCallback`."""
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name in self.weights:
                    weight.copy_(self.weights[name])
