"""One pass of a model over a tokenized data set."""

from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..tokenization import PanFoMaTokenizer
from . import schema
from .collator import DataCollatorForCells


def forward_cells(
    model: torch.nn.Module,
    dataset: Dataset,
    tokenizer: PanFoMaTokenizer,
    *,
    outputs: Sequence[str] = ("pooler_output",),
    batch_size: int = 16,
    progress: bool = False,
) -> dict[str, np.ndarray]:
    """Run a model over cells without a draw and without gradients.

    Parameters
    ----------
    model
        In evaluation for the pass, on the device where it is.
    dataset
        As `cell_dataset` makes it.
    tokenizer
        Pads.
    outputs
        Names of the model's outputs to keep, one row a cell each.
    batch_size
        Cells at a time; cells of like length share a batch, the longest come first, to fail early on memory.
    progress
        Whether to show a progress bar.

    Returns
    -------
    (cells, ...) float32 arrays by output, in the order of the data set.
    """
    lengths = np.asarray(dataset.select_columns([schema.LENGTH])[:][schema.LENGTH])
    order = np.argsort(-lengths, kind="stable")
    columns = dataset.select_columns([schema.INPUT_IDS, schema.EXPRESSION_BINS]).select(order)
    loader = DataLoader(columns, batch_size=batch_size, collate_fn=DataCollatorForCells(tokenizer, random=False))
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in outputs}
    was_training = model.training
    model.eval()
    try:
        # Not inference mode: it would mark weights that a sharded model gathers as unfit for training.
        with torch.no_grad():
            for batch in tqdm(loader, desc="PanFoMa", unit="batch", disable=not progress):
                found = model(**{key: tensor.to(model.device) for key, tensor in batch.items()})
                for name in outputs:
                    parts[name].append(found[name].float().cpu())
    finally:
        model.train(was_training)
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return {name: torch.cat(tensors).numpy()[back] for name, tensors in parts.items()}
