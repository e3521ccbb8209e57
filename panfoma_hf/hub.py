"""Checkpoint folders: weights, configuration, tokenizer, and the code that loads them without this package."""

import json
import tempfile
from pathlib import Path

from .modeling import PanFoMaPreTrainedModel
from .tokenization import PanFoMaTokenizer


def save_checkpoint(folder: str | Path, model: PanFoMaPreTrainedModel, tokenizer: PanFoMaTokenizer) -> Path:
    """Save a model with its tokenizer, whole or not at all.

    The folder appears when everything is written. An older checkpoint in its place is kept until then.

    Parameters
    ----------
    folder
        Where to save; new, empty, or an older PanFoMa checkpoint to replace.
    model, tokenizer
        What belongs together.

    Returns
    -------
    The folder.

    Raises
    ------
    FileExistsError
        If the folder holds something else.
    """
    folder = Path(folder)
    check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    return folder


def check_replaceable(folder: str | Path) -> None:
    """Raise FileExistsError unless a checkpoint may be written at ``folder``."""
    folder = Path(folder)
    if not folder.exists():
        return
    if folder.is_dir():
        if not any(folder.iterdir()):
            return
        config = folder / "config.json"
        if config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("model_type") == "panfoma":
            return
    raise FileExistsError(
        f"A checkpoint is saved to a new or empty folder, or over an older PanFoMa checkpoint, got {folder} with "
        "something else in it. Choose another folder, or remove this one."
    )
