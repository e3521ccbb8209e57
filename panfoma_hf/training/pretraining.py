"""Pretraining on a corpus by masked expression: a recipe over `transformers.Trainer`."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import broadcast
from datasets import Dataset
from transformers import AutoModelForPreTraining, TrainingArguments
from transformers.utils import logging

from ..data import schema
from ..data.batches import Batching, BatchSchedule, EpochCells
from ..data.bin_frequencies import BinFrequencies
from ..data.collator import DataCollatorForMaskedExpression
from ..data.corpus import Corpus
from ..data.corpus.choice import HELD_OUT_CANCER_TYPES, HELD_OUT_DONORS, TRAIN, CellChoice
from ..data.corpus.streaming import StreamedCells, gather
from ..data.gene_factors import gene_factors as find_gene_factors
from ..modeling import PanFoMaConfig, PanFoMaForMaskedExpression, PanFoMaModel
from ..modeling.configuration_panfoma import SIZES
from ..modeling.modeling_panfoma import PanFoMaAttention, PanFoMaEncoderLayer, PanFoMaMambaMixer
from ..tokenization import check_tokenizer
from .checkpoints import save_checkpoint
from .pretraining_trainer import PretrainingTrainer
from .safety import PretrainingError, checkpoints_of, last_good_checkpoint, remove_unfinished


logger = logging.get_logger(__name__)

# How each was settled is in docs/log.md.
DEFAULT_PRETRAINING_ARGUMENTS = {
    "num_train_epochs": 1,
    "per_device_eval_batch_size": 8,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,  # of all steps
    "weight_decay": 0.01,
    "adam_beta2": 0.98,
    "max_grad_norm": 1.0,
    "optim": "adamw_torch_fused",
    "logging_steps": 50,
    "eval_strategy": "steps",
    "eval_steps": 500,
    "save_strategy": "steps",
    "save_steps": 250,
    "save_total_limit": 2,
    "report_to": "none",
}
# What decides which cells a run reads, and what becomes of them; another value of one is another run.
SETTINGS_FILE = "run.json"
_ARGUMENTS_OF_A_RUN = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "optim",
    "max_grad_norm",
    "mixed_precision",  # of `bf16`, `fp16`, or what `accelerate launch` was told
    "seed",
)
MODEL_FOLDER = "model"
# Whatever is masked in training, so that runs can be compared.
EVALUATION_MASK_RATIO = 0.3
HELD_OUT = {"held_out_donors": HELD_OUT_DONORS, "held_out_cancer_types": HELD_OUT_CANCER_TYPES}
# Cells of a stream that bins are counted of.
FREQUENCY_CELLS = 20_000
# Of a start from gene factors: how far embeddings of genes exceed those of bins, and what layers at first add.
GENES_OVER_BINS = 10.0
LAYERS_OVER_INPUTS = 0.1
# One dimension of embeddings holds the logarithms of weights, scaled by this share of a gene's root mean square: they
# stay small beside the other dimensions, as all are normed together.
WEIGHTS_OVER_GENES = 0.25


def pretrain(
    corpus: str | Path | Corpus,
    output_dir: str | Path,
    *,
    model: str | Path | PanFoMaConfig = "small",
    split: str = "donor",
    min_genes_measured: int = 10_000,
    held_out_studies: Sequence[str] = (),
    held_out_cancer_types: Sequence[str] = (),
    mask_ratio: float | Sequence[float] = 0.3,
    withhold_ratio: float | Sequence[float] = 0.0,
    max_genes: int | None = None,
    dropout: float = 0.0,
    gene_factors: bool = True,
    tokens_per_batch: int | None = 8192,
    max_eval_cells: int = 256,
    probes: Mapping[str, Callable[[PanFoMaModel], dict[str, float]]] | None = None,
    streaming: bool = False,
    resume: bool = False,
    **training_arguments: Any,
) -> PretrainingTrainer:
    """Pretrain PanFoMa on a corpus: predict masked expression bins, and from the cell embedding what is expressed.

    Started by ``accelerate launch``, it runs on many GPUs. The run's folder gets ``checkpoint-<step>/``, from which
    ``resume=True`` goes on as if nothing had happened; ``model/``, the result; and ``run.json``, what was asked for.

    Parameters
    ----------
    corpus
        A corpus, its folder, or its name on the Hub.
    output_dir
        The run's folder.
    model
        "small", "base" or "tiny", or a configuration, for random weights; or a checkpoint (folder or Hub name).
    split, min_genes_measured, held_out_studies, held_out_cancer_types
        Which cells to learn from and to evaluate on; see `CellChoice`.
    mask_ratio, withhold_ratio, max_genes
        Shares of genes whose bins are masked and that are not shown at all, and genes that are kept of a cell; see
        `DataCollatorForMaskedExpression`.
    dropout
        While pretraining: a run that sees each cell a few times has little to gain from it. The configuration keeps its
        own rate, for fine-tuning.
    gene_factors
        Whether a fresh model's gene embeddings start from how genes go together in the corpus's cells; see
        `data.gene_factors`.
    tokens_per_batch
        Most genes of a batch of one process, padding included; None takes ``per_device_train_batch_size`` cells of like
        length.
    max_eval_cells
        Cells of each held-out set that are evaluated, drawn once.
    probes
        By name, what is measured on the model after each evaluation, such as `evaluation.probes.LinearProbe`.
    streaming
        Whether to read shards from end to end, from the Hub where the corpus is named by its name there, in place of
        cells in any order from disk. Needs ``max_steps``. A name's shards are not compared with their checksums.
    resume
        Whether to go on from the last good checkpoint in ``output_dir``, or to begin where there is none.
    training_arguments
        Anything that `transformers.TrainingArguments` takes, over `DEFAULT_PRETRAINING_ARGUMENTS`: ``bf16``,
        ``gradient_checkpointing``, ``gradient_accumulation_steps``, ``torch_compile``, ``report_to`` and others.

    Returns
    -------
    The trainer.

    Raises
    ------
    CorpusError
        If the corpus is not whole.
    FileExistsError
        If ``output_dir`` holds a run, and not to resume it was asked.
    PretrainingError
        If a run to resume was another one; or while training, if a loss is not finite or the folder vanished. The last
        good checkpoint is left as it was.
    ValueError
        If there are no cells to learn from, or an argument breaks a rule.
    """
    arguments = _training_arguments(output_dir, training_arguments)  # first, as they find the other processes
    corpus = corpus if isinstance(corpus, Corpus) else Corpus.open(corpus, streaming=streaming)
    if PartialState().is_main_process and corpus.remote is None:
        corpus.verify()
    tokenizer = corpus.tokenizer
    choice = CellChoice(split, min_genes_measured, _names(held_out_studies), _names(held_out_cancer_types))
    collator = DataCollatorForMaskedExpression(tokenizer, mask_ratio, withhold_ratio, max_genes, seed=arguments.seed)
    read = _read_stream if streaming else _read_disk
    batching = Batching(
        cells_per_batch=arguments.per_device_train_batch_size if tokens_per_batch is None else None,
        tokens_per_batch=tokens_per_batch,
        max_genes=collator.most_genes,
        seed=arguments.seed if arguments.data_seed is None else arguments.data_seed,
        process_index=arguments.process_index,
        num_processes=arguments.world_size,
    )
    cells = read(corpus, choice, arguments, batching, max_eval_cells)

    torch.manual_seed(arguments.seed)  # random weights follow the seed too
    is_fresh = isinstance(model, PanFoMaConfig) or str(model) in SIZES
    start = _starting_model(model, tokenizer)
    check_tokenizer(tokenizer, start.config)
    for module in start.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    settings = {
        "corpus": corpus.fingerprint,
        **asdict(choice),
        "streaming": streaming,
        "mask_ratio": np.atleast_1d(mask_ratio).astype(float).tolist(),
        "withhold_ratio": np.atleast_1d(withhold_ratio).astype(float).tolist(),
        **{name: getattr(batching, name) for name in ("cells_per_batch", "tokens_per_batch", "max_genes")},
        "data_seed": batching.seed,
        # Who reads which shards; from disk, batches do not depend on it.
        **({"readers": [arguments.world_size, max(1, arguments.dataloader_num_workers)]} if streaming else {}),
        "dropout": dropout,
        "gene_factors": gene_factors,
        # Two processes read what one does that accumulates two batches.
        "batches_per_step": arguments.gradient_accumulation_steps * arguments.world_size,
        "max_steps": arguments.max_steps,
        **{name: getattr(arguments, name) for name in _ARGUMENTS_OF_A_RUN},
        "model": {key: value for key, value in start.config.to_diff_dict().items() if key != "transformers_version"},
    }
    last = _begin(Path(output_dir), settings, resume)
    frequencies = BinFrequencies.of(cells.sample, len(tokenizer), tokenizer.num_expression_bins)
    if last is None and not start.bin_priors.weight.any():  # of a fresh model, or of one that had another head
        _start_from_frequencies(start, frequencies)
        if gene_factors and is_fresh:
            _start_from_factors(start, cells.sample, frequencies)
    trainer = PretrainingTrainer(
        model=start,
        args=arguments,
        train_dataset=cells.train,
        eval_dataset=cells.held_out,
        data_collator=collator,
        eval_data_collator=DataCollatorForMaskedExpression(tokenizer, EVALUATION_MASK_RATIO, random=False),
        frequencies=frequencies,
        schedule=cells.schedule,
        probes=probes,
        processing_class=tokenizer,  # saved with every checkpoint
    )
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    _finish(trainer, Path(output_dir), tokenizer)
    return trainer


def _training_arguments(output_dir, given: Mapping[str, Any]) -> TrainingArguments:
    for name, default in DEFAULT_PRETRAINING_ARGUMENTS.items() | {("max_steps", -1)}:
        if name == "save_total_limit" and given.get(name, default) is None:
            continue  # keeps all
        if isinstance(default, (int, float)) and not isinstance(given.get(name, default), (int, float)):
            raise ValueError(f"`{name}` must be a number, got {given[name]!r}. Pass one, such as {default}.")
    arguments = TrainingArguments(
        **{
            **DEFAULT_PRETRAINING_ARGUMENTS,
            "use_cpu": not torch.accelerator.is_available(),  # without it, bf16 is refused on a CPU
            "dataloader_pin_memory": torch.cuda.is_available(),  # of no use elsewhere, and torch warns
            **given,
            "output_dir": str(output_dir),
            "remove_unused_columns": False,
            "logging_nan_inf_filter": False,  # it would hide what `require_finite` looks for
        }
    )
    if arguments.n_gpu > 1:
        raise ValueError(
            f"Each GPU needs a process of its own, got one process that sees {arguments.n_gpu}. Start it by "
            "`accelerate launch` (docs/pretraining.md), or show it one GPU: CUDA_VISIBLE_DEVICES=0."
        )
    if arguments.save_total_limit == 1:
        raise ValueError(
            "`save_total_limit` must be at least 2, got 1: the last good checkpoint would be removed before the next "
            "one is known to be whole. Pass 2, or None to keep all."
        )
    return arguments


@dataclass
class _Cells:
    """To learn from, and in which batches; those of held-out sets, by name; and those to count bins of."""

    train: EpochCells | StreamedCells
    schedule: BatchSchedule | None
    held_out: dict[str, Dataset]
    sample: Dataset


def _read_disk(
    corpus: Corpus, choice: CellChoice, arguments: TrainingArguments, batching: Batching, max_eval_cells: int
) -> _Cells:
    dataset, purposes = corpus.dataset(), choice.of_all(corpus)
    train = EpochCells(dataset.select(np.flatnonzero(purposes == TRAIN)))
    schedule = BatchSchedule(train.lengths, batching)
    batches_per_step = arguments.gradient_accumulation_steps * arguments.world_size
    if arguments.max_steps < 0:
        arguments.max_steps = max(1, round(schedule.batches_of(arguments.num_train_epochs) / batches_per_step))
    schedule.num_batches = arguments.max_steps * arguments.gradient_accumulation_steps
    held_out = {}
    for name, purpose in HELD_OUT.items():
        rows = np.flatnonzero(purposes == purpose)
        if len(rows) > max_eval_cells:
            rows = np.sort(np.random.default_rng(0).choice(rows, max_eval_cells, replace=False))
        held_out[name] = dataset.select(rows)
    return _Cells(train, schedule, _evaluation_sets(held_out), train.dataset)


def _read_stream(
    corpus: Corpus, choice: CellChoice, arguments: TrainingArguments, batching: Batching, max_eval_cells: int
) -> _Cells:
    if arguments.max_steps < 0:
        raise ValueError(
            "A stream has no known end, got no `max_steps`. Pass the number of steps, or read the corpus from disk."
        )
    train = StreamedCells(corpus, choice, batching)
    sample = gather(corpus, choice, TRAIN, FREQUENCY_CELLS)
    if not len(sample):
        raise choice.nothing_left(corpus)
    held_out = {name: gather(corpus, choice, purpose, max_eval_cells) for name, purpose in HELD_OUT.items()}
    return _Cells(train, None, _evaluation_sets(held_out), sample)


def _evaluation_sets(held_out: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """Those that have cells, the longest first, so that batches hold cells of like length."""
    sets = {}
    for name, cells in held_out.items():
        if len(cells):
            order = np.argsort(-np.asarray(cells.select_columns([schema.LENGTH])[:][schema.LENGTH]), kind="stable")
            sets[name] = cells.select(order).select_columns([schema.INPUT_IDS, schema.EXPRESSION_BINS])
    return sets


def _starting_model(model: str | Path | PanFoMaConfig, tokenizer) -> PanFoMaForMaskedExpression:
    if str(model) in SIZES:
        model = PanFoMaConfig.from_size(
            str(model), vocab_size=len(tokenizer), num_expression_bins=tokenizer.num_expression_bins
        )
    if isinstance(model, PanFoMaConfig):
        return AutoModelForPreTraining.from_config(model)
    return AutoModelForPreTraining.from_pretrained(model, dtype=torch.float32)


@torch.no_grad()
def _start_from_frequencies(model: PanFoMaForMaskedExpression, frequencies: BinFrequencies) -> None:
    """Predict how often each gene has each bin and is expressed, before anything is learned."""
    model.bin_priors.weight.copy_(torch.from_numpy(frequencies.log_probabilities()))
    model.presence_priors.weight[:, 0] = torch.from_numpy(frequencies.presence_log_odds())
    model.log_bin_frequencies.copy_(torch.from_numpy(frequencies.bin_frequencies()).log())


@torch.no_grad()
def _start_from_factors(model: PanFoMaForMaskedExpression, sample: Dataset, frequencies: BinFrequencies) -> None:
    """Begin where the cell embedding tells cells apart by the genes they express, so that training refines that.

    From random weights it tells them apart by their bins, which follow the depth of sequencing, and thousands of steps
    do not change that (docs/log.md). So genes have factors for embeddings, layers add little to what they read, and one
    dimension holds by how much a gene counts in the cell embedding: its bin times the logarithm of its rarity.
    """
    size = model.config.initializer_range * GENES_OVER_BINS
    embeddings, pooler = model.get_input_embeddings(), model.panfoma.pooler
    genes, hidden = embeddings.weight.shape
    factors = torch.empty_like(embeddings.weight)
    if PartialState().is_main_process:
        # The first dimension is left for the weights.
        factors = F.pad(torch.from_numpy(find_gene_factors(sample, genes, hidden - 1)), (1, 0))
    # Found once, as a decomposition's last digits are each process's own.
    factors = broadcast(factors.to(PartialState().device)).to(embeddings.weight)
    known = factors.any(1)
    embeddings.weight.mul_(GENES_OVER_BINS)
    embeddings.weight[known] = size * factors[known]

    rarity = -F.logsigmoid(torch.from_numpy(frequencies.presence_log_odds())).to(embeddings.weight)
    embeddings.weight[:, 0] = WEIGHTS_OVER_GENES * size * rarity.log()
    embeddings.weight[embeddings.padding_idx] = 0.0
    bins = model.panfoma.embeddings.bin_embeddings.weight
    num_bins = model.config.num_expression_bins
    shares = torch.arange(num_bins + 1).clamp(min=0.5) / num_bins
    bins[: num_bins + 1, 0] = WEIGHTS_OVER_GENES * size * shares.log().to(bins)
    bins[model.config.mask_bin_id, 0] = WEIGHTS_OVER_GENES * size * math.log(0.5)
    pooler.gene_weight.weight[0, 0] = 1 / WEIGHTS_OVER_GENES
    for module in model.panfoma.modules():
        branches = {PanFoMaAttention: "out_proj", PanFoMaEncoderLayer: "mlp_down_proj", PanFoMaMambaMixer: "out_proj"}
        if type(module) in branches:
            getattr(module, branches[type(module)]).weight.mul_(LAYERS_OVER_INPUTS)
    pooler.gene_scale.mul_(LAYERS_OVER_INPUTS)
    pooler.cell_scale.mul_(LAYERS_OVER_INPUTS)


def _begin(folder: Path, settings: dict[str, Any], resume: bool) -> Path | None:
    """Make the run's folder, or find the checkpoint to go on from.

    Raises
    ------
    FileExistsError
        If there is a run already, and not to resume it was asked.
    PretrainingError
        If that run was another one.
    """
    # As they come back from the file.
    settings = json.loads(json.dumps(settings))
    path = folder / SETTINGS_FILE
    if path.exists() or checkpoints_of(folder):
        if not resume:
            raise FileExistsError(
                f"A run begins in a folder without one, got {folder} with {SETTINGS_FILE} or checkpoints. Go on with "
                "it (`resume=True`, `--resume`), or choose another folder."
            )
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        before.get("model", {}).pop("transformers_version", None)  # another release is not another run
        changed = _differences(before, settings)
        if changed:
            raise PretrainingError(
                f"A run is resumed as it was begun, got other settings than those of {path}: {'; '.join(changed)}. "
                "Give the same ones, or begin a new run from its checkpoint: `model=<checkpoint>`."
            )
    last = last_good_checkpoint(folder)
    PartialState().wait_for_everyone()  # every process has looked before one of them writes
    if PartialState().is_main_process:
        remove_unfinished(folder)
        folder.mkdir(parents=True, exist_ok=True)
        scratch = folder / f".{SETTINGS_FILE}"
        scratch.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        scratch.replace(path)
    PartialState().wait_for_everyone()
    return last


def _names(names: str | Sequence[str]) -> list[str]:
    """Names in order; a single one may stand for itself."""
    return [names] if isinstance(names, str) else sorted(names)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two mappings, those within them included."""
    found = []
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += [f"{key}.{line}" for line in _differences(old, new)]
        elif old != new:
            found.append(f"{key} {old!r} -> {new!r}")
    return found


def _finish(trainer: PretrainingTrainer, folder: Path, tokenizer) -> None:
    """Save the model as a checkpoint that is complete by itself, and the log."""
    model = trainer.whole_model()
    if trainer.is_world_process_zero():
        save_checkpoint(folder / MODEL_FOLDER, model, tokenizer)
        trainer.state.save_to_json(str(folder / "trainer_state.json"))
    trainer.accelerator.wait_for_everyone()
