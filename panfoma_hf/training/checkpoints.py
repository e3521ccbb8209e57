"""Checkpoints written whole or not at all."""

from collections.abc import Mapping
from pathlib import Path

from transformers import AutoModelForPreTraining, AutoTokenizer

from ..hub import CARD, written_whole
from ..modeling import PanFoMaPreTrainedModel
from ..shipped import checkpoint
from ..tokenization import PanFoMaTokenizer


def save_checkpoint(
    folder: str | Path,
    model: PanFoMaPreTrainedModel,
    tokenizer: PanFoMaTokenizer,
    texts: Mapping[str, str] | None = None,
) -> Path:
    """Save a model with its tokenizer and the code that loads them without this package, whole or not at all.

    The folder appears when everything is written. An older checkpoint in its place is kept until then.

    Parameters
    ----------
    folder
        Where to save; new, empty, or an older PanFoMa checkpoint to replace.
    model, tokenizer
        What belongs together.
    texts
        Further files by name, such as ``README.md``, as text.

    Returns
    -------
    The folder.

    Raises
    ------
    FileExistsError
        If the folder holds something else.
    """
    with written_whole(folder) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        for name, text in (texts or {}).items():
            (new / name).write_text(text, encoding="utf-8")
    return Path(folder).resolve()


def export_checkpoint(name: str, folder: str | Path) -> Path:
    """Write a checkpoint that comes with the package, complete with its card and the code that loads it.

    Parameters
    ----------
    name
        As in `panfoma_hf.checkpoint`.
    folder
        As in `save_checkpoint`.

    Returns
    -------
    The folder.
    """
    source = checkpoint(name)
    model = AutoModelForPreTraining.from_pretrained(source)
    texts = {CARD: (source / CARD).read_text(encoding="utf-8")}
    return save_checkpoint(folder, model, AutoTokenizer.from_pretrained(source), texts)
