"""Checkpoints written whole or not at all."""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from transformers import AutoModelForPreTraining, AutoTokenizer

from ..modeling import PanFoMaPreTrainedModel
from ..shipped import checkpoint
from ..tokenization import PanFoMaTokenizer


# What `save_checkpoint` writes, and so may replace.
CHECKPOINT_FILES = re.compile(
    r".+\.safetensors|model\.safetensors\.index\.json|config\.json|tokenizer_config\.json|added_tokens\.json|genes\.tsv\.gz|"
    r"(configuration|modeling|tokenization)_panfoma\.py|selective_scan\.py|(reference|numba|triton)_kernels\.py|expression\.py|"
    r"gene_names\.py|value_scale\.py|token_kernels\.py|README\.md|finetuning\.json"
)


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
    check_replaceable(folder)
    folder = Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        for name, text in (texts or {}).items():
            (new / name).write_text(text, encoding="utf-8")
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
    return folder


def export_checkpoint(name: str, folder: str | Path) -> Path:
    """Write a checkpoint that comes with the package, complete with the code that loads it without the package.

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
    return save_checkpoint(folder, model, AutoTokenizer.from_pretrained(source))


def check_replaceable(folder: str | Path) -> None:
    """Raise FileExistsError unless a folder is missing, empty, or nothing but a saved PanFoMa model."""
    folder = Path(folder).resolve()
    if not folder.exists():
        return
    others = ["a file of that name"]
    if folder.is_dir():
        others = sorted(path.name for path in folder.iterdir() if not CHECKPOINT_FILES.fullmatch(path.name))
        config = folder / "config.json"
        if not config.exists():  # any folder may have a README.md
            others += [name for name in ("README.md", "finetuning.json") if (folder / name).exists()]
        elif not others and '"model_type": "panfoma"' not in config.read_text(encoding="utf-8"):
            others = ["the config.json of another model"]
    if others:
        raise FileExistsError(
            f"A checkpoint is saved to a new or empty folder, or over an older PanFoMa checkpoint, got {folder} with "
            f"something else in it: {', '.join(others[:3])}. Choose another folder, or remove this one."
        )
