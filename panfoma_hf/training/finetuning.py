"""Fine-tuning: a thin recipe over `transformers.Trainer`."""

import tempfile
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path

import anndata as ad
import numpy as np
import torch
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer, EvalPrediction, TrainingArguments
from transformers.utils import logging

from ..data.cells import MIN_COVERAGE, anndata_cells, name_of, read_cells, read_expression, tokenize
from ..data.collator import DataCollatorForCells
from ..data.dataset import cell_dataset
from ..data.variable_genes import variable_genes
from ..modeling import PanFoMaConfig, PanFoMaForCellClassification
from ..modeling.configuration_panfoma import SIZES
from ..shipped import checkpoint
from ..tokenization import PanFoMaTokenizer, check_tokenizer, warn_of_empty_cells
from .checkpoints import check_replaceable, save_checkpoint
from .trainer import PanFoMaTrainer


logger = logging.get_logger(__name__)

# A fresh model learns with these: 1e-3 needs the small initialisation of the embeddings. See docs/log.md.
DEFAULT_ARGUMENTS = {
    "num_train_epochs": 5,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "learning_rate": 1e-3,
    "warmup_steps": 0.1,  # of all steps
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "train_sampling_strategy": "group_by_length",
    "logging_strategy": "epoch",
    "save_strategy": "no",
    "report_to": "none",
}


def balanced_class_weights(labels: np.ndarray, num_labels: int, power: float) -> torch.Tensor:
    """Weights of classes of ``count ** -power``, scaled to a mean of 1 over the cells.

    Parameters
    ----------
    labels
        (cells,), class ids; every class occurs.
    num_labels
        Number of classes.
    power
        0 for equal weights, 1 for weights that give every class the same say.
    """
    counts = np.bincount(labels, minlength=num_labels).astype(np.float64)
    weights = counts**-power
    return torch.tensor(weights * counts.sum() / (weights * counts).sum(), dtype=torch.float32)


def finetune(
    cells: ad.AnnData | str | Path,
    label: str,
    output_dir: str | Path,
    *,
    model: str | Path | PanFoMaConfig | None = None,
    validation: ad.AnnData | str | Path | None = None,
    gene_set: int | Sequence[str] | None = None,
    class_weights: bool = True,
    layer: str | None = None,
    gene_column: str | None = None,
    min_coverage: float = MIN_COVERAGE,
    **training_arguments,
) -> PanFoMaTrainer:
    """Fine-tune PanFoMa to name cells, and save the checkpoint.

    Parameters
    ----------
    cells
        Training cells: an AnnData, or a file of any format that `panfoma_hf.open_cells` reads.
    label
        Column of ``obs`` with the names to learn, such as "cell_type".
    output_dir
        Where the checkpoint goes: model, tokenizer and code.
    model
        A checkpoint (folder or Hub name) to start from; None takes the one that comes with the package,
        `panfoma_hf.checkpoint`. Or "small", "base" or "tiny", or a configuration, to start from random weights.
    validation
        Cells that are scored after each epoch; never trained on.
    gene_set
        Genes to restrict cells to: a number of variable genes, found on the training cells, which must be counts then;
        or their names. Saved with the checkpoint and applied at inference. None reads every gene of the vocabulary, or
        the set that the starting checkpoint has.
    class_weights
        Whether rare classes weigh more in the loss, by the inverse square root of their number of cells.
    layer, gene_column, min_coverage
        Where expression and gene names are, and the share of counts that must be known; see `panfoma_hf.annotate`.
    training_arguments
        Anything that `transformers.TrainingArguments` takes, over the defaults in `DEFAULT_ARGUMENTS`. What Trainer
        saves on the way (`save_strategy`) goes to ``<output_dir>-trainer``.

    Returns
    -------
    The trainer, whose ``model`` is trained and whose ``evaluate()`` gives accuracy and macro-F1.

    Raises
    ------
    ValueError
        If labels are missing or fewer than two, validation cells have other labels, or expression is not usable.
    FileExistsError
        If ``output_dir`` holds something other than a checkpoint.
    """
    check_replaceable(output_dir)
    model = checkpoint() if model is None else model
    name, validation_name = name_of(cells), name_of(validation)
    cells = read_cells(cells)
    names = sorted(set(_labels(cells, label)))
    if len(names) < 2:
        raise ValueError(
            f"At least two labels are needed to learn a difference, got {names} in obs[{label!r}]. "
            "Add cells of another label, or name another column."
        )
    validation = None if validation is None else read_cells(validation)

    tokenizer = _starting_tokenizer(model)
    reading = {"gene_column": gene_column, "min_coverage": min_coverage}
    if isinstance(gene_set, Integral):
        expression = read_expression(anndata_cells(cells, name), tokenizer, layer=layer, **reading)
        gene_set = variable_genes(cells, gene_set, tokenizer, layer=expression.layer, gene_column=gene_column)
    if gene_set is not None:
        tokenizer.gene_set = gene_set
    train_dataset = _labelled_dataset(cells, label, names, tokenizer, layer=layer, name=name, **reading)
    eval_dataset = None
    if validation is not None:
        eval_dataset = _labelled_dataset(
            validation, label, names, tokenizer, layer=layer, name=validation_name, **reading
        )

    train_labels = np.asarray(train_dataset["labels"])
    arguments = {
        **DEFAULT_ARGUMENTS,
        "eval_strategy": "no" if eval_dataset is None else "epoch",
        "dataloader_pin_memory": torch.cuda.is_available(),  # of no use elsewhere, and torch warns
        **training_arguments,
        "remove_unused_columns": False,  # batches are grouped by the column of lengths
    }
    with tempfile.TemporaryDirectory() as scratch:
        # Trainer makes its folder even when it saves nothing there.
        arguments["output_dir"] = scratch if arguments["save_strategy"] == "no" else f"{output_dir}-trainer"
        arguments = TrainingArguments(**arguments)
        torch.manual_seed(arguments.seed)  # a fresh model's weights follow the seed too
        classifier = _starting_model(model, names, label, tokenizer)
        check_tokenizer(tokenizer, classifier.config)
        trainer = PanFoMaTrainer(
            model=classifier,
            args=arguments,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=DataCollatorForCells(tokenizer),
            processing_class=tokenizer,  # saved with every checkpoint that Trainer writes on the way
            compute_metrics=_compute_metrics,
            class_weights=balanced_class_weights(train_labels, len(names), power=0.5) if class_weights else None,
        )
        trainer.train()
    classifier = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.is_world_process_zero():
        save_checkpoint(output_dir, classifier, tokenizer)
    trainer.accelerator.wait_for_everyone()
    classifier.name_or_path = str(output_dir)  # not where it started from
    return trainer


def _labels(cells: ad.AnnData, label: str) -> np.ndarray:
    """(cells,), the names in a column of ``obs``, none of them missing."""
    if label not in cells.obs:
        raise ValueError(
            f"`label` must be a column of obs, got {label!r}; the columns are {sorted(cells.obs)}. Name one of these."
        )
    missing = int(cells.obs[label].isna().sum())
    if missing:
        raise ValueError(
            f"Every cell needs a label, got {missing:,} of {cells.n_obs:,} without one in obs[{label!r}]. "
            f"Leave them out: adata[adata.obs[{label!r}].notna()]."
        )
    return cells.obs[label].astype(str).to_numpy()


def _labelled_dataset(cells, label, names, tokenizer, **reading):
    labels = _labels(cells, label)
    if unknown := set(labels) - set(names):
        raise ValueError(
            f"Validation cells must have labels of the training cells, got {sorted(unknown)} besides. "
            "Leave these cells out, or put some of them into the training cells."
        )
    tokens, _ = tokenize(cells, tokenizer, **reading)
    warn_of_empty_cells(tokens.lengths)
    return cell_dataset(tokens, labels=np.searchsorted(names, labels))


def _starting_tokenizer(model) -> PanFoMaTokenizer:
    if isinstance(model, PanFoMaConfig):
        return PanFoMaTokenizer(num_expression_bins=model.num_expression_bins)
    return PanFoMaTokenizer() if str(model) in SIZES else AutoTokenizer.from_pretrained(model)


def _starting_model(model, names, label, tokenizer) -> PanFoMaForCellClassification:
    labels = {
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
        "problem_type": "single_label_classification",
        "label_name": label,
    }
    if isinstance(model, PanFoMaConfig):
        config = PanFoMaConfig(**{**model.to_dict(), **labels})
        return AutoModelForSequenceClassification.from_config(config)
    if str(model) in SIZES:
        config = PanFoMaConfig.from_size(str(model), vocab_size=len(tokenizer), **labels)
        return AutoModelForSequenceClassification.from_config(config)
    # A classifier of other labels gives its body; its last layer starts anew.
    return AutoModelForSequenceClassification.from_pretrained(model, ignore_mismatched_sizes=True, **labels)


def _compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    predicted = prediction.predictions.argmax(-1)
    majority = np.bincount(prediction.label_ids).max() / len(prediction.label_ids)
    if len(np.unique(predicted)) == 1 and majority < 1:
        logger.warning(
            "The model calls every validation cell the same; train longer, or lower the learning rate. "
            f"Its accuracy is to be read beside the majority class's {majority:.3f}."
        )
    return {
        "accuracy": float(accuracy_score(prediction.label_ids, predicted)),
        "macro_f1": float(f1_score(prediction.label_ids, predicted, average="macro", zero_division=0)),
        "majority_accuracy": float(majority),
    }
