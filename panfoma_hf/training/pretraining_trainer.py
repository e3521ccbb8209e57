"""A Trainer for masked-expression pretraining: its batches, and what it measures."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import EvalPrediction
from transformers.utils import logging

from ..data import schema
from ..data.batches import BatchSchedule
from ..data.bin_frequencies import BinFrequencies
from ..data.collator import IGNORED, DataCollatorForMaskedExpression
from ..modeling import PanFoMaForMaskedExpression, PanFoMaModel
from ..modeling.modeling_panfoma import bin_context, expressed_genes, presence_context, presence_cross_entropy
from .safety import SafeCheckpoints, require_finite
from .throughput import peak_flops, pretraining_flops
from .trainer import PanFoMaTrainer


logger = logging.get_logger(__name__)

# What is summed over the masked genes of each cell in evaluation.
_EVALUATED = (
    "gene_loss",
    "cell_loss",
    "frequency_loss",
    "context_frequency_loss",
    "presence_loss",
    "presence_frequency_loss",
    "gene_accuracy",
    "cell_accuracy",
    "majority_accuracy",
    "context_frequency_accuracy",
)
# What is summed between two lines of the log, over all processes.
_COUNTED = (
    "gene_loss",
    "cell_loss",
    "presence_loss",
    "gene_correct",
    "cell_correct",
    "majority_correct",
    "masked",
    "cells",
    "tokens",
    "positions",
    "flops",
)


class PretrainingTrainer(PanFoMaTrainer):
    """Trainer for `PanFoMaForMaskedExpression` on a schedule of batches.

    Beside what Trainer logs: ``gene_loss``, ``cell_loss`` and ``presence_loss``; ``gene_accuracy`` and
    ``cell_accuracy``, the shares of masked bins that either prediction names, and ``majority_accuracy``, that of naming
    each gene's commonest bin; ``cells_per_second`` and ``tokens_per_second`` of all processes together, ``padding``,
    the share of positions that hold no gene, and ``flop_utilisation`` (see `throughput`). ``epoch`` counts passes over
    the corpus.

    Evaluation gives losses and accuracies too, and what predictors without a model reach on the same masked genes:
    ``majority_accuracy`` and ``frequency_loss`` by gene alone, ``context_frequency_loss`` and
    ``context_frequency_accuracy`` by gene and by how often each bin occurs among the genes of the cell that are not
    masked. The last is the one to beat: ties give many genes of a cell the same bin, which the others show.
    ``presence_frequency_loss``, beside ``presence_loss``, is that of how often each gene is expressed and of how many
    the cell expresses.

    Parameters
    ----------
    frequencies
        Of bins, over the training cells.
    schedule
        Batches of this process, whose keys ``train_dataset`` understands; None where it gives batches itself.
    eval_data_collator
        Of evaluation.
    probes
        By name: what is measured on the model after each evaluation, such as `evaluation.probes.LinearProbe`.
    """

    def __init__(
        self,
        *args,
        frequencies: BinFrequencies,
        schedule: BatchSchedule | None = None,
        eval_data_collator: DataCollatorForMaskedExpression | None = None,
        probes: Mapping[str, Callable[[PanFoMaModel], dict[str, float]]] | None = None,
        **kwargs,
    ):
        super().__init__(*args, compute_metrics=self._evaluation_metrics, **kwargs)
        self.schedule = schedule
        self.eval_data_collator = eval_data_collator
        self.probes = dict(probes or {})
        self._majority = torch.from_numpy(frequencies.majority_bins()).to(self.args.device)
        self._log_frequencies = torch.from_numpy(frequencies.log_probabilities()).to(self.args.device)
        self._log_bin_frequencies = torch.from_numpy(frequencies.bin_frequencies()).log().to(self.args.device)
        self._presence_log_odds = torch.from_numpy(frequencies.presence_log_odds()).to(self.args.device)
        self._config = self.model.config  # once the model is wrapped, it is out of reach
        self._counts = self._no_counts()
        self._steps, self._seconds, self._step_started = 0, 0.0, 0.0
        self._last_loss: torch.Tensor | None = None
        self._peak: float | None = None
        # Asked after Trainer's own callback, which decides when to save.
        self.add_callback(SafeCheckpoints(self))

    def create_accelerator_and_postprocess(self) -> None:
        """As in Trainer; shards over CPU processes too where `accelerate launch` was asked for FSDP.

        Accelerate itself shards on accelerators only, and falls back to whole copies elsewhere without a word.
        """
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        if asked and state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin()
            self.is_fsdp_enabled = True

    # -- saving --------------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in Trainer; of sharded weights, a checkpoint that is whole and loads with plain ``from_pretrained``."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        model = self.whole_model()
        if self.args.should_save:
            output_dir = output_dir or self.args.output_dir
            model.save_pretrained(output_dir)
            self.processing_class.save_pretrained(output_dir)
        self.accelerator.wait_for_everyone()

    def whole_model(self) -> PanFoMaForMaskedExpression:
        """The model on its own, its weights gathered from all processes, which must all ask for it."""
        if not self.is_fsdp_enabled:
            return self.accelerator.unwrap_model(self.model)
        weights = {}
        for name, tensor in self.model.state_dict().items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            weights[name] = (whole.wait() if isinstance(whole, AsyncCollectiveTensor) else whole).cpu()
        # Sharding makes a class of its own of the model's, which no other program knows.
        model = PanFoMaForMaskedExpression(self._config)
        model.load_state_dict(weights)
        return model

    # -- batches -------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Batches of this process, for all steps of the run."""
        args = self.args
        options = {
            "collate_fn": self.data_collator,
            "num_workers": args.dataloader_num_workers,
            "pin_memory": args.dataloader_pin_memory,
            "prefetch_factor": args.dataloader_prefetch_factor,
            # Of its own, so that a run that is resumed finds torch's where a straight one has it.
            "generator": torch.Generator().manual_seed(args.seed),
        }
        if self.schedule is None:
            return DataLoader(self.train_dataset, batch_size=None, **options)
        return DataLoader(self.train_dataset, batch_sampler=self.schedule, **options)

    @contextlib.contextmanager
    def _fixed_draws(self) -> Iterator[None]:
        training_collator, self.data_collator = self.data_collator, self.eval_data_collator
        try:
            yield
        finally:
            self.data_collator = training_collator

    # -- training ------------------------------------------------------------------------------------------------------

    def get_batch_samples(self, *args, **kwargs):
        """As in Trainer; a step's time runs from here to `step_ended`, and so leaves out evaluation and saving."""
        self._step_started = time.perf_counter()
        return super().get_batch_samples(*args, **kwargs)

    def step_ended(self) -> None:
        """Stop a step's clock."""
        self._steps += 1
        self._seconds += time.perf_counter() - self._step_started

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As in Trainer, and sum what the log will say."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            self._count(inputs, outputs)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        """As in Trainer; an error where the loss is not finite.

        Raises
        ------
        PretrainingError
            If a loss is not finite. On a GPU, which runs ahead, it is the step before whose loss is looked at.
        """
        loss = super().training_step(*args, **kwargs)
        looked_at = self._last_loss if loss.device.type == "cuda" else loss
        self._last_loss = loss
        if looked_at is not None:
            require_finite(self, looked_at)
        return loss

    @torch.no_grad()
    def _count(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, Any]) -> None:
        labels, mask = inputs[schema.LABELS], inputs["attention_mask"]
        masked = labels != IGNORED
        true = labels[masked]
        cells, seq = labels.shape
        values = [
            outputs["gene_loss"],
            outputs["cell_loss"],
            outputs["presence_loss"],
            (outputs["logits"][masked].argmax(-1) == true).sum(),
            (outputs["cell_logits"][masked].argmax(-1) == true).sum(),
            (self._majority[inputs[schema.INPUT_IDS][masked]] == true).sum(),
            masked.sum(),
        ]
        numbers = [cells, mask.sum(), cells * seq, pretraining_flops(self._config, cells, seq)]
        self._counts += torch.stack([torch.as_tensor(value).to(self._counts) for value in values + numbers])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in Trainer, with what was counted since the last line about training."""
        if "loss" in logs and "learning_rate" in logs:
            logs.update(self._drain())
        # Trainer knows one epoch, the whole run; people count passes over the corpus.
        share_of_run, self.state.epoch = self.state.epoch, self._cells_seen(logs) / self.train_dataset.num_cells
        try:
            super().log(logs, start_time)
        finally:
            self.state.epoch = share_of_run

    def _cells_seen(self, *logs: Mapping[str, float]) -> int:
        """Cells that all processes trained on, by the last line that says so: it outlives a run that is cut off."""
        lines = (line["cells_seen"] for line in (*logs, *reversed(self.state.log_history)) if "cells_seen" in line)
        return next(lines, 0)

    def _no_counts(self) -> torch.Tensor:
        # No float64 on Apple's GPUs.
        dtype = torch.float32 if self.args.device.type == "mps" else torch.float64
        return torch.zeros(len(_COUNTED), dtype=dtype, device=self.args.device)

    def _drain(self) -> dict[str, float]:
        sums = self.accelerator.reduce(self._counts, "sum").tolist()
        counted = dict(zip(_COUNTED, sums, strict=True))
        steps = max(1, self._steps)
        seconds = max(self._seconds, 1e-9)
        self._counts = self._no_counts()
        self._steps, self._seconds = 0, 0.0
        masked = max(counted["masked"], 1.0)
        if self._peak is None:
            dtype = torch.float32 if self.args.mixed_precision == "no" else torch.bfloat16
            self._peak, source = peak_flops(self.args.device, dtype)
            logger.info(f"flop_utilisation is of {self._peak:.3g} FLOP/s ({source}) on each device")
        return {
            "gene_loss": counted["gene_loss"] / steps,
            "cell_loss": counted["cell_loss"] / steps,
            "presence_loss": counted["presence_loss"] / steps,
            "gene_accuracy": counted["gene_correct"] / masked,
            "cell_accuracy": counted["cell_correct"] / masked,
            "majority_accuracy": counted["majority_correct"] / masked,
            "cells_seen": self._cells_seen() + round(counted["cells"]),
            "cells_per_second": counted["cells"] / seconds,
            "tokens_per_second": counted["tokens"] / seconds,
            "padding": 1 - counted["tokens"] / counted["positions"],
            "flop_utilisation": counted["flops"] / seconds / (self._peak * self.args.world_size),
        }

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """As in Trainer, for each set of held-out cells; then the probes, once."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if metric_key_prefix != "eval":  # Trainer comes back here for each of several sets
            return metrics
        for name, probe in self.probes.items():
            model = self.accelerator.unwrap_model(self.model)
            scores = {f"eval_{name}_{key}": value for key, value in probe(model.base_model).items()}
            self.log(scores)
            metrics.update(scores)
        return metrics

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Sums over the masked genes of each cell, (cells, 10), in place of the logits, which would fill the memory."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        labels = inputs[schema.LABELS]
        masked = labels != IGNORED
        true, genes = labels[masked], inputs[schema.INPUT_IDS][masked]
        cells = masked.nonzero()[:, 0]
        logits, cell_logits = outputs["logits"][masked].float(), outputs["cell_logits"][masked].float()
        by_gene = self._log_frequencies[genes]
        context = bin_context(inputs[schema.EXPRESSION_BINS], inputs["attention_mask"], self._log_bin_frequencies)
        by_context = by_gene + context[cells]
        values = torch.stack(
            [
                F.cross_entropy(logits, true, reduction="none"),
                F.cross_entropy(cell_logits, true, reduction="none"),
                F.cross_entropy(by_gene, true, reduction="none"),
                F.cross_entropy(by_context, true, reduction="none"),
                torch.zeros_like(true, dtype=torch.float32),  # these two are of a whole cell
                torch.zeros_like(true, dtype=torch.float32),
                (logits.argmax(-1) == true).float(),
                (cell_logits.argmax(-1) == true).float(),
                (self._majority[genes] == true).float(),
                (by_context.argmax(-1) == true).float(),
            ],
            dim=1,
        )
        sums = values.new_zeros(len(labels), len(_EVALUATED)).index_add_(0, cells, values)
        expressed = expressed_genes(
            inputs[schema.INPUT_IDS],
            inputs["attention_mask"],
            inputs.get(schema.WITHHELD_IDS),
            len(self._presence_log_odds),
            self._config.pad_token_id,
        )
        by_frequency = self._presence_log_odds + presence_context(self._presence_log_odds, expressed.sum(1))[:, None]
        for name, logits in (("presence_loss", outputs["presence_logits"]), ("presence_frequency_loss", by_frequency)):
            sums[:, _EVALUATED.index(name)] = presence_cross_entropy(logits, expressed)
        return None, sums, masked.sum(1)

    def _evaluation_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        masked = max(int(prediction.label_ids.sum()), 1)
        means = prediction.predictions.astype(np.float64).sum(0) / masked
        metrics = dict(zip(_EVALUATED, means.tolist(), strict=True))
        parts = ("gene_loss", "cell_loss", "presence_loss")
        return {"loss": sum(getattr(self._config, f"{part}_weight") * metrics[part] for part in parts), **metrics}
