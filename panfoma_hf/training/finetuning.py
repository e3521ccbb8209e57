"""Fine-tuning: a recipe over `transformers.Trainer`, judged beside simple methods on the same cells."""

import copy
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import anndata as ad
import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from scipy.special import softmax
from transformers import AutoModelForSequenceClassification, EvalPrediction, TrainingArguments
from transformers.utils import logging

from ..data.cells import MIN_COVERAGE
from ..data.collator import DataCollatorForCells
from ..data.forward import forward_cells
from ..evaluation.baselines import CLASSIFIERS
from ..evaluation.calibration import energy, expected_calibration_error, fit_temperature, unassigned_threshold
from ..evaluation.metrics import bootstrap_interval, classification_metrics
from ..evaluation.probes import embed_dataset
from ..hub import CARD, check_replaceable
from ..modeling import PanFoMaConfig, PanFoMaForCellClassification
from ..modeling.configuration_panfoma import SIZES
from ..shipped import checkpoint
from ..tokenization import check_tokenizer
from .checkpoints import save_checkpoint
from .heads import (
    EMBEDDING_STRENGTH,
    EMBEDDING_STRENGTHS,
    GENE_STRENGTH,
    GENE_STRENGTHS,
    add_gene_logits,
    bins_matrix,
    cross_entropy,
    draw_cells,
    pool,
    solve,
    standardised,
    write_classifier,
)
from .report import finetuning_card, quiet, report_file, score_table
from .study import Study, is_share, read_study
from .trainer import KeepBest, PanFoMaTrainer


logger = logging.get_logger(__name__)

# How each was settled is in docs/log.md.
DEFAULT_ARGUMENTS = {
    "num_train_epochs": 5,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "warmup_steps": 0.1,  # of all steps
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "train_sampling_strategy": "group_by_length",
    "logging_strategy": "epoch",
    "save_strategy": "no",
    "report_to": "none",
}
MODES = ("full", "lora", "probe")
# Random weights take large steps; pretrained ones with a classifier that is solved are spoiled by them.
FRESH_LEARNING_RATE = 1e-3
LEARNING_RATES = {"full": 1e-4, "lora": 3e-4, "probe": 1e-4}
# Rank and scale of the adapters, and the layers that have one: all that multiply by a matrix.
LORA_RANK, LORA_SCALE = 8, 16
LORA_LAYERS = ["qkv_proj", "out_proj", "mlp_up_proj", "mlp_down_proj", "in_proj", "x_proj", "gate_proj"]
# Power of a class' number of cells by which it weighs in the loss.
CLASS_WEIGHT_POWER = 0.5
BASELINES = ("majority", "hvg_logistic_regression")
# Points of the validation cells' energies that are kept.
ENERGY_POINTS = 101
# Of `gene_logits`: without the network's.
ALONE = "alone"


def finetune(
    cells: ad.AnnData | str | Path,
    label: str | Sequence[str],
    output_dir: str | Path,
    *,
    model: str | Path | PanFoMaConfig | None = None,
    mode: str = "full",
    validation: ad.AnnData | str | Path | float | None = 0.15,
    groups: str | None = "auto",
    gene_set: int | Sequence[str] | str | None = "auto",
    gene_logits: bool | str = True,
    class_weights: bool = True,
    early_stopping: int | None = 3,
    max_error: float = 0.05,
    baselines: bool = True,
    refit: bool = True,
    seeds: Sequence[int] | None = None,
    layer: str | None = None,
    gene_column: str | None = None,
    min_coverage: float = MIN_COVERAGE,
    **training_arguments,
) -> PanFoMaTrainer:
    """Fine-tune PanFoMa to name cells, compare it with simple methods on the same cells, and save the checkpoint.

    The classifier starts as logistic regression on the embeddings, and the rest of the model is trained from there, as
    Kumar et al. (ICLR 2022) advise. The weights that were best on the validation cells are kept. Then logistic
    regression on the bins of genes joins it (``config.use_gene_logits``), each weighed as the validation cells ask for.
    On these, too, probabilities are calibrated and the score is found below which `panfoma_hf.annotate` leaves cells
    "Unassigned".

    Parameters
    ----------
    cells
        Training cells: an AnnData, or a file of any format that `panfoma_hf.open_cells` reads.
    label
        Column of ``obs`` with the names to learn, such as "cell_type"; or several columns, which one model learns
        together. Of several, a cell may lack some.
    output_dir
        Where the checkpoint goes: model, tokenizer, code, ``README.md`` with the scores as card data, and
        ``finetuning.json`` with all that was measured.
    model
        A checkpoint (folder or Hub name) to start from; None takes the one that comes with the package,
        `panfoma_hf.checkpoint`. Or "small", "base" or "tiny", or a configuration, to start from random weights.
    mode
        "full" trains every weight; "lora" trains low-rank adapters by PEFT, which are merged into the weights that are
        saved; "probe" trains nothing but the classifier, which takes one pass over the cells.
    validation
        Cells to choose and to calibrate on, never trained on; or the share of ``cells`` to hold out for that; or None,
        which does without. Scores on them are a little optimistic where the weights were chosen by them.
    groups
        Column of ``obs`` whose values are not divided by the split, such as donors. "auto" takes the first of
        `panfoma_hf.data.splits.GROUP_COLUMNS` that can be split by; None splits by cell.
    gene_set
        Genes to restrict cells to: a number of variable genes, found on the training cells, which must be counts then;
        or their names. Saved with the checkpoint and applied at inference. None reads every gene of the vocabulary, or
        the set that the starting checkpoint has. "auto" finds 1,000 variable genes where the cells are counts and have
        more, and the starting checkpoint has no set.
    gene_logits
        Whether logistic regression on the bins joins the network. "alone" leaves the network out, in mode "probe": what
        it adds is the difference.
    class_weights
        Whether rare classes weigh more in the loss, by the inverse square root of their number of cells.
    early_stopping
        Evaluations (epochs, unless ``eval_strategy`` says otherwise) without a better macro-F1 after which training
        stops; None trains to the end. The best weights are kept in either case; ``eval_strategy="no"`` keeps the last.
    max_error
        Share of the named cells that may be wrong at the threshold of "Unassigned". It holds for cells like the
        validation cells, which also chose the model: other donors may have more errors.
    baselines
        Whether the majority class and logistic regression on variable genes are scored on the same split.
    refit
        Whether cells that were held out of ``cells`` are learned from, too, once they have decided and scored: what is
        solved (the genes' logits; the classifier in mode "probe") is solved once more on all cells, with the strengths
        and weights that were chosen. The reported scores are of the model before. Cells that were passed as
        ``validation`` are never learned from.
    seeds
        Several seeds to train with; the model that is best on the validation cells is saved, the scores of all are
        reported. None trains once, with ``seed``. The split is the same for all.
    layer, gene_column, min_coverage
        Where expression and gene names are, and the share of counts that must be known; see `panfoma_hf.annotate`.
    training_arguments
        Anything that `transformers.TrainingArguments` takes, over the defaults in `DEFAULT_ARGUMENTS`, such as
        ``label_smoothing_factor``. What Trainer saves on the way (`save_strategy`) goes to ``<output_dir>-trainer``.

    Returns
    -------
    The trainer, whose ``model`` is trained, whose ``evaluate()`` gives accuracy and macro-F1 (after ``refit``, of cells
    that were learned from), and whose ``report`` holds what ``finetuning.json`` does.

    Raises
    ------
    ValueError
        If labels are missing or fewer than two, validation cells have other labels, expression is not usable, or an
        argument is none of those above.
    FileExistsError
        If ``output_dir`` holds something other than a checkpoint.
    ImportError
        If mode "lora" is asked for without PEFT.
    """
    check_replaceable(output_dir)
    seeds = None if seeds is None else [int(seed) for seed in seeds]
    _check_arguments(mode, gene_logits, validation, max_error, seeds)
    model = checkpoint() if model is None else model
    labels = [label] if isinstance(label, str) else list(label)
    seed = training_arguments.pop("seed", 42)
    seeds = seeds or [seed]
    study = read_study(
        cells,
        labels,
        validation,
        groups,
        model,
        gene_set,
        seeds[0],
        layer=layer,
        gene_column=gene_column,
        min_coverage=min_coverage,
    )
    power = CLASS_WEIGHT_POWER if class_weights else 0.0
    best, scores = None, {}
    for seed in seeds:
        run = _Run(study, model, mode, power, early_stopping, gene_logits, seed, output_dir, training_arguments)
        run.train()
        scores[str(seed)] = run.scores
        if best is None or run.rank() > best.rank():
            best = run  # the others' weights are let go
    report = study.report | {"mode": mode, "started_from": _name_of_model(model), "seed": best.seed}
    report["seeds"] = scores
    report["tasks"] = {
        name: {
            **copy.deepcopy(best.scores.get(name, {})),
            **best.intervals(name),
            "calibration": best.calibrate(name, max_error),
        }
        for name in study.names
    }
    if baselines and study.validation is not None:
        _add_baselines(report, study, layer, best.seed)
    _add_warnings(report)
    report["refitted"] = refit and is_share(validation) and best.refit()

    trainer = best.trainer
    classifier = trainer.model
    calibration = {name: task["calibration"] for name, task in report["tasks"].items() if task["calibration"]}
    classifier.config.calibration = calibration or None
    trainer.report = report
    if trainer.is_world_process_zero():
        logger.warning(score_table(report))
        texts = {CARD: finetuning_card(report, study.tokenizer), "finetuning.json": report_file(report)}
        save_checkpoint(output_dir, classifier, study.tokenizer, texts)
    trainer.accelerator.wait_for_everyone()
    classifier.name_or_path = str(output_dir)  # not where it started from
    return trainer


def _check_arguments(mode: str, gene_logits, validation, max_error: float, seeds: list[int] | None) -> None:
    """Whatever is wrong with the arguments is said before a file is read."""
    if mode not in MODES:
        raise ValueError(f"`mode` is one of {', '.join(MODES)}, got {mode!r}. Use one of these.")
    if gene_logits not in (True, False, ALONE) or (gene_logits == ALONE and mode != "probe"):
        raise ValueError(
            f"`gene_logits` is True, False, or {ALONE!r} with mode 'probe', got {gene_logits!r} with mode {mode!r}. "
            "Use one of these."
        )
    if mode == "lora":
        _peft()
    if is_share(validation) and not 0 < validation < 1:
        raise ValueError(
            f"`validation` as a share of the cells is between 0 and 1, got {validation}. Pass 0.15, or cells; None "
            "does without."
        )
    if not 0 <= max_error < 1:
        raise ValueError(f"`max_error` is a share from 0 up to, not including, 1, got {max_error}. Such as 0.05.")
    if seeds is not None and (not seeds or validation is None):
        raise ValueError(
            f"Several seeds are compared on validation cells, got seeds {seeds} and validation {validation!r}. "
            "Give at least one seed, and validation cells or a share to hold out."
        )


@dataclass
class _Run:
    """One seed's training.

    ``logits`` (cells, labels) and ``scores`` are of the validation cells that have a task's label, by task;
    ``gene_shares`` are what genes' logits weigh beside the network's.
    """

    study: Study
    start: str | Path | PanFoMaConfig
    mode: str
    class_weight_power: float
    early_stopping: int | None
    gene_logits: bool | str
    seed: int
    output_dir: str | Path
    training_arguments: dict
    logits: dict[str, np.ndarray] = field(default_factory=dict)
    scores: dict[str, dict] = field(default_factory=dict)
    gene_shares: list[float] = field(default_factory=list)

    def __post_init__(self):
        # What `train` solves, for `refit`.
        self.network_head = self.embedded = self.network_layer = self.gene_head = self.weights = None
        self.class_weights = self.study.class_weights(self.class_weight_power)

    def train(self) -> None:
        """Train, add the genes' logits, and score on the validation cells."""
        study = self.study
        has_validation = study.validation is not None
        is_judged = has_validation and self.training_arguments.get("eval_strategy") != "no"
        arguments = {
            **DEFAULT_ARGUMENTS,
            "learning_rate": LEARNING_RATES[self.mode] if self._is_pretrained else FRESH_LEARNING_RATE,
            "eval_strategy": "epoch" if is_judged else "no",
            "eval_on_start": is_judged,
            "dataloader_pin_memory": torch.cuda.is_available(),  # of no use elsewhere, and torch warns
            **self.training_arguments,
            "seed": self.seed,
            "remove_unused_columns": False,  # batches are grouped by the column of lengths
        }
        with tempfile.TemporaryDirectory() as scratch:
            # Trainer makes its folder even when it saves nothing there.
            arguments["output_dir"] = scratch if arguments["save_strategy"] == "no" else f"{self.output_dir}-trainer"
            arguments = TrainingArguments(**arguments)
            torch.manual_seed(arguments.seed)  # a fresh model's weights follow the seed too
            classifier = _starting_model(self.start, study.names, study.tokenizer)
            check_tokenizer(study.tokenizer, classifier.config)
            classifier.to(arguments.device)
            if (self._is_pretrained or self.mode == "probe") and self.gene_logits != ALONE:
                self._solve_classifier(classifier)
            trained = _with_adapters(classifier) if self.mode == "lora" else classifier
            self.trainer = PanFoMaTrainer(
                model=trained,
                args=arguments,
                train_dataset=study.train_dataset,
                eval_dataset=study.validation_dataset,
                data_collator=DataCollatorForCells(study.tokenizer),
                processing_class=study.tokenizer,  # saved with every checkpoint that Trainer writes on the way
                compute_metrics=partial(_compute_metrics, names=study.names),
                class_weights=self.class_weights,
                tasks=classifier.config.label_tasks,
            )
            if is_judged and not self.trainer.is_fsdp_enabled:
                self.trainer.add_callback(KeepBest("eval_macro_f1", self.early_stopping))
            if self.mode != "probe":
                self.trainer.train()
        classifier = self.trainer.accelerator.unwrap_model(self.trainer.model)
        if self.mode == "lora":
            classifier = classifier.merge_and_unload().requires_grad_(True)  # PEFT had frozen it
        self.trainer.model = self.trainer.model_wrapped = classifier
        network = self._logits() if has_validation and self.gene_logits != ALONE else None
        if self.gene_logits:
            self._add_gene_logits(classifier, network)
        if has_validation:
            self._score(self._logits() if self.gene_logits else network)

    @property
    def _is_pretrained(self) -> bool:
        return not isinstance(self.start, PanFoMaConfig) and str(self.start) not in SIZES

    def _solve_classifier(self, classifier: PanFoMaForCellClassification) -> None:
        """Put logistic regression on the embeddings into the model."""
        study = self.study
        train, labels = self._drawn(study.train_dataset, study.train_labels)  # so that the others are not embedded
        embeddings = embed_dataset(classifier.panfoma, train, study.tokenizer)
        held_out = None
        if study.validation_dataset is not None:
            held_out = embed_dataset(classifier.panfoma, study.validation_dataset, study.tokenizer)

        def solver(features, held_out):
            told = None if held_out is None else (held_out, study.validation_labels)
            strengths = EMBEDDING_STRENGTHS, EMBEDDING_STRENGTH
            return solve(features, labels, study.sizes, self.class_weights.numpy(), told, *strengths, self.seed)

        self.network_head = standardised(solver, embeddings, held_out)
        write_classifier(classifier, self.network_head)
        if self.mode == "probe" and held_out is not None:  # for `refit`
            self.embedded = np.concatenate([embeddings, held_out]), np.concatenate([labels, study.validation_labels])

    def _drawn(self, dataset: Dataset, labels: np.ndarray) -> tuple[Dataset, np.ndarray]:
        """As many of the cells as a regression is solved on."""
        drawn = draw_cells(labels, self.seed)
        return (dataset, labels) if len(drawn) == len(labels) else (dataset.select(drawn), labels[drawn])

    def _add_gene_logits(self, classifier: PanFoMaForCellClassification, network: np.ndarray | None) -> None:
        """Solve logistic regression on bins, and weigh it and the network by the validation cells."""
        study = self.study
        max_genes = study.tokenizer.model_max_length
        told = None
        if study.validation_dataset is not None:
            told = bins_matrix(study.validation_dataset, classifier.config, max_genes), study.validation_labels
        train, labels = self._drawn(study.train_dataset, study.train_labels)
        genes = solve(
            bins_matrix(train, classifier.config, max_genes),
            labels,
            study.sizes,
            self.class_weights.numpy(),
            told,
            GENE_STRENGTHS,
            GENE_STRENGTH,
            self.seed,
        )
        weights = np.tile([0.0, 1.0] if self.gene_logits == ALONE else [0.5, 0.5], (len(study.sizes), 1))
        if told is not None and self.gene_logits != ALONE:
            weights = pool(network, genes(told[0]), told[1], study.sizes)
        self.network_layer = copy.deepcopy(classifier.classifier.state_dict())  # for `refit`: what is added scales it
        add_gene_logits(classifier, genes, weights)
        self.gene_head, self.weights = genes, weights
        self.gene_shares = (weights[:, 1] / weights.sum(1)).tolist()

    def refit(self) -> bool:
        """Solve what is solved on the validation cells, too; whether there was anything."""
        study, classifier = self.study, self.trainer.model
        settings = study.sizes, self.class_weights.numpy(), None, ()
        if self.embedded is not None:
            embeddings, labels = self.embedded

            def solver(features, _):
                return solve(features, labels, *settings, self.network_head.strengths, self.seed)

            write_classifier(classifier, standardised(solver, embeddings, None))
        elif self.gene_logits:
            classifier.classifier.load_state_dict(self.network_layer)
        if self.gene_logits:
            cells, labels = self._drawn(
                concatenate_datasets([study.train_dataset, study.validation_dataset]),
                np.concatenate([study.train_labels, study.validation_labels]),
            )
            bins = bins_matrix(cells, classifier.config, study.tokenizer.model_max_length)
            genes = solve(bins, labels, *settings, self.gene_head.strengths, self.seed)
            add_gene_logits(classifier, genes, self.weights)
        return self.mode == "probe" or bool(self.gene_logits)

    def _logits(self) -> np.ndarray:
        """(validation cells, labels), of the model as it is."""
        # Not Trainer's `predict`: grouped by length, it gives cells in another order.
        study = self.study
        found = forward_cells(self.trainer.model, study.validation_dataset, study.tokenizer, outputs=["logits"])
        return found["logits"].astype(np.float64)

    def _score(self, logits: np.ndarray) -> None:
        """Score every task on the validation cells that have its label."""
        bounds = list(pairwise(np.cumsum([0, *self.study.sizes])))
        for task, (name, of_task) in enumerate(self.study.names.items()):
            rows = np.flatnonzero(self.study.validation_labels[:, task] >= 0)
            if not len(rows):
                continue
            true = self.study.validation_labels[rows, task]
            self.logits[name] = logits[rows, slice(*bounds[task])]
            predicted = self.logits[name].argmax(1)
            scores = classification_metrics(true, predicted)
            scores["log_loss"] = cross_entropy(self.logits[name], true)
            names = np.array(of_task, dtype=object)
            self.scores[name] = {"validation_cells": len(rows), "scores": {"panfoma": scores}}
            self.scores[name]["labels_predicted"] = sorted(set(names[predicted].tolist()))
            if self.gene_logits:
                self.scores[name]["share_of_gene_logits"] = round(self.gene_shares[task], 3)

    def intervals(self, name: str) -> dict:
        """95 % intervals of a task's scores, and the column of ``obs`` whose values were drawn for them, if any."""
        if name not in self.logits:
            return {}
        true, groups, column = _validation_cells(self.study, name)
        predicted = np.array(self.study.names[name], dtype=object)[self.logits[name].argmax(1)]
        return {"intervals": {"panfoma": _intervals(true, predicted, groups)}, "intervals_over": column}

    def rank(self) -> tuple[float, float]:
        """Mean macro-F1 over the tasks, then the loss: the higher the better."""
        panfoma = [task["scores"]["panfoma"] for task in self.scores.values()]
        if not panfoma:
            return 0.0, 0.0
        return tuple(
            float(np.mean([sign * scores[key] for scores in panfoma]))
            for key, sign in (("macro_f1", 1), ("log_loss", -1))
        )

    def calibrate(self, name: str, max_error: float) -> dict:
        """Temperature, threshold of "Unassigned" and energies of a task, as the configuration keeps them."""
        if name not in self.logits:
            return {}
        logits, task = self.logits[name], list(self.study.names).index(name)
        true = self.study.validation_labels[:, task]
        true = true[true >= 0]
        temperature = fit_temperature(logits, true)
        probabilities = softmax(logits / temperature, axis=1)
        threshold = unassigned_threshold(probabilities, true, max_error)
        return {
            "temperature": temperature,
            "calibration_error": expected_calibration_error(probabilities, true),
            "calibration_error_before": expected_calibration_error(softmax(logits, axis=1), true),
            "unassigned_threshold": threshold.value,
            "unassigned_max_error": max_error,
            "unassigned_error": threshold.error,
            "assigned_share": threshold.coverage,
            "is_certified": threshold.is_certified,
            "energies": np.quantile(energy(logits, temperature), np.linspace(0, 1, ENERGY_POINTS)).round(4).tolist(),
        }


def _peft() -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            "Mode 'lora' needs PEFT, which is not installed. Run `pip install panfoma-hf[lora]`, or use mode 'full'."
        ) from error
    return peft


def _with_adapters(classifier: PanFoMaForCellClassification):
    """The model with low-rank adapters, which alone are trained, with the classifier."""
    peft = _peft()
    adapters = peft.LoraConfig(
        r=LORA_RANK, lora_alpha=LORA_SCALE, target_modules=LORA_LAYERS, modules_to_save=["classifier"]
    )
    with warnings.catch_warnings():
        # PEFT asks for a property that Transformers has renamed since.
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(classifier, adapters)


def _add_baselines(report: dict, study: Study, layer: str | None, seed: int) -> None:
    """Score simple methods on the very same cells; what cannot be run is noted."""
    for task, name in enumerate(study.names):
        of_task = report["tasks"][name]
        if "scores" not in of_task:
            continue
        ids = study.train_labels[:, task : task + 1]
        rows = np.flatnonzero(ids[:, 0] >= 0)
        drawn = draw_cells(ids[rows], seed)
        if len(drawn) < len(rows):
            of_task["baseline_train_cells"] = len(drawn)
        train = _cells_at(study.train, rows[drawn])
        validation = _cells_at(study.validation, np.flatnonzero(study.validation_labels[:, task] >= 0))
        for baseline in BASELINES:
            try:
                predicted = CLASSIFIERS[baseline](train, validation, name, seed=seed, layer=layer)
            # Whatever is wrong with it, the trained model is not to be lost for it.
            except Exception as error:
                of_task.setdefault("not_scored", {})[baseline] = str(error) or type(error).__name__
                continue
            true, groups, _ = _validation_cells(study, name)
            of_task["scores"][baseline] = classification_metrics(true, predicted.labels)
            of_task["intervals"][baseline] = _intervals(true, predicted.labels, groups)


def _validation_cells(study: Study, name: str) -> tuple[np.ndarray, np.ndarray | None, str | None]:
    """Labels of the validation cells that have a task's label, and their groups with the column that these are of.

    Donors are drawn for an interval where cells were split by them and two are left, else cells.
    """
    rows = study.validation_labels[:, list(study.names).index(name)] >= 0
    obs, column = study.validation.obs[rows], study.report["split"]["groups"]
    true = obs[name].astype(str).to_numpy()
    if column is None or obs[column].nunique() < 2:
        return true, None, None
    return true, obs[column].to_numpy(), column


def _intervals(true: np.ndarray, predicted: np.ndarray, groups: np.ndarray | None) -> dict[str, list[float]]:
    """Bounds of each metric; none where a single cell was scored."""
    if len(true) < 2:
        return {}
    return {name: list(bootstrap_interval(true, predicted, groups, name)) for name in ("accuracy", "macro_f1")}


def _cells_at(cells: ad.AnnData, rows: np.ndarray) -> ad.AnnData:
    """The cells of ascending rows; as they are, without a copy, where that is all."""
    return cells if len(rows) == cells.n_obs else cells[rows].copy()


def _add_warnings(report: dict) -> None:
    """Say where the model predicts one class, or is behind a simple method."""
    for name, task in report["tasks"].items():
        task["warnings"] = []
        scores = task.get("scores", {})
        if len(task.get("labels_predicted", ())) == 1:
            task["warnings"].append(
                f"The model calls every validation cell {task['labels_predicted'][0]!r}: train longer, or lower the "
                "learning rate."
            )
        for baseline in BASELINES:
            if baseline in scores and scores[baseline]["macro_f1"] > scores["panfoma"]["macro_f1"]:
                task["warnings"].append(
                    f"The model is behind {baseline.replace('_', ' ')}, macro-F1 {scores['panfoma']['macro_f1']:.3f} "
                    f"against {scores[baseline]['macro_f1']:.3f}: use that one, add cells, or train longer."
                )
        for warning in task["warnings"]:
            logger.warning(f"{name}: {warning}")


def _name_of_model(model) -> str:
    if isinstance(model, PanFoMaConfig):
        return "random weights"
    if str(model) in SIZES:
        return f"random weights of size {model}"
    if str(model) == str(checkpoint()):
        return "panfoma-small, which comes with the package"
    # A folder by its own name alone: where it lies is nobody's business, and this is published.
    return Path(model).resolve().name if Path(model).exists() else str(model)


def _starting_model(model, names: dict[str, list[str]], tokenizer) -> PanFoMaForCellClassification:
    label, of_label = next(iter(names.items()))
    if len(names) > 1:
        labels = {"label_tasks": names, "label_name": None, "problem_type": None}
    else:
        labels = {
            "id2label": dict(enumerate(of_label)),
            "label2id": {name: index for index, name in enumerate(of_label)},
            "problem_type": "single_label_classification",
            "label_name": label,
            "label_tasks": None,
        }
    # The genes' logits are added at the end, and what an earlier fine-tune calibrated no longer holds.
    labels |= {"use_gene_logits": False, "calibration": None}
    if isinstance(model, PanFoMaConfig):
        config = PanFoMaConfig(**{**model.to_dict(), **labels})
        return AutoModelForSequenceClassification.from_config(config)
    if str(model) in SIZES:
        config = PanFoMaConfig.from_size(str(model), vocab_size=len(tokenizer), **labels)
        return AutoModelForSequenceClassification.from_config(config)
    # A classifier of other labels gives its body; its last layer starts anew.
    config = PanFoMaConfig.from_pretrained(model)
    config = PanFoMaConfig(**{**config.to_dict(), "id2label": None, "label2id": None, **labels})
    with quiet():  # the last layer, which Transformers reports as missing, is to be learned
        loaded, report = AutoModelForSequenceClassification.from_pretrained(
            model, config=config, ignore_mismatched_sizes=True, dtype=torch.float32, output_loading_info=True
        )
    if missing := sorted(name for name in report["missing_keys"] if name.startswith(loaded.base_model_prefix)):
        raise ValueError(
            f"A checkpoint to start from holds every weight of the network, got {model} without "
            f"{', '.join(missing[:3])}. Take another, or pretrain it again with this version."
        )
    return loaded


def _compute_metrics(prediction: EvalPrediction, names: dict[str, list[str]]) -> dict[str, float]:
    """Means over the tasks of accuracy, macro-F1 and the share of the majority class."""
    logits = np.asarray(prediction.predictions)
    ids = np.asarray(prediction.label_ids).reshape(len(logits), -1)
    bounds = np.cumsum([0, *(len(of_task) for of_task in names.values())])
    found = []
    for task, (start, stop) in enumerate(pairwise(bounds)):
        rows = np.flatnonzero(ids[:, task] >= 0)
        if len(rows):
            predicted = logits[rows, start:stop].argmax(1)
            scores = classification_metrics(ids[rows, task], predicted)
            found.append({**scores, "majority_accuracy": float(np.bincount(ids[rows, task]).max() / len(rows))})
    return {key: float(np.mean([scores[key] for scores in found])) for key in found[0]}
