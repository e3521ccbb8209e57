"""What a checkpoint folder holds: whether it is complete and safe, and how one takes another's place."""

import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_imports
from transformers.utils import logging


logger = logging.get_logger(__name__)

CONFIG, ADAPTER_CONFIG, TOKENIZER_CONFIG = "config.json", "adapter_config.json", "tokenizer_config.json"
SETTINGS_FILES = (CONFIG, ADAPTER_CONFIG, TOKENIZER_CONFIG)
WEIGHTS, WEIGHTS_INDEX, ADAPTER_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
)
GENES, CARD = "genes.tsv.gz", "README.md"

# What a checkpoint is made of: all that is published, and that may be replaced.
CHECKPOINT_FILES = re.compile(
    r"[^/]+\.safetensors|model\.safetensors\.index\.json|config\.json|tokenizer_config\.json|added_tokens\.json|"
    r"genes\.tsv\.gz|adapter_config\.json|"
    r"(configuration|modeling|tokenization)_panfoma\.py|selective_scan\.py|(reference|numba|triton)_kernels\.py|"
    r"expression\.py|gene_names\.py|value_scale\.py|token_kernels\.py|README\.md|finetuning\.json"
)
# Suffixes of formats that are pickles, which run code when they are read.
PICKLES = frozenset({".bin", ".ckpt", ".dill", ".joblib", ".pickle", ".pkl", ".pt", ".pth"})
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class HubError(RuntimeError):
    """A checkpoint cannot be published or fetched."""


def read_settings(folder: Path) -> dict[str, dict[str, Any]]:
    """Content of those of `SETTINGS_FILES` that are there, by name; of one that is no JSON object, nothing."""
    found = {}
    for name in SETTINGS_FILES:
        if (folder / name).is_file():
            try:
                content = json.loads((folder / name).read_text(encoding="utf-8"))
            except ValueError:
                content = None
            found[name] = content if isinstance(content, dict) else {}
    return found


def is_panfoma(settings: Mapping[str, dict[str, Any]]) -> bool:
    """Whether these settings are of a PanFoMa model, adapter or tokenizer, all of them."""
    says = []
    if CONFIG in settings:
        says.append(settings[CONFIG].get("model_type") == "panfoma")
    if TOKENIZER_CONFIG in settings:
        says.append(settings[TOKENIZER_CONFIG].get("tokenizer_class") == "PanFoMaTokenizer")
    if base_class := (settings.get(ADAPTER_CONFIG, {}).get("auto_mapping") or {}).get("base_model_class"):
        says.append(base_class.startswith("PanFoMa"))
    return bool(says) and all(says)


def refuse_pickles(names: Iterable[str], where: str | Path) -> None:
    """Raise HubError if files with these names are pickles, by their suffixes."""
    if found := sorted(name for name in names if PurePosixPath(name).suffix.lower() in PICKLES):
        raise HubError(
            f"A checkpoint is safetensors, JSON, text and code, as pickles run whatever they hold, got "
            f"{', '.join(found[:5])} in {where}. Remove them: `save_pretrained` writes safetensors, and what a Trainer "
            "needs to go on is not published."
        )


def checkpoint_files(folder: str | Path) -> list[Path]:
    """Files to publish of a checkpoint that is complete by itself: weights, configuration, genes, code.

    A PEFT adapter is complete with its own weights and the tokenizer; its base model is named by its name on the Hub.

    Parameters
    ----------
    folder
        Of a checkpoint, or of an adapter.

    Raises
    ------
    HubError
        If it is none of PanFoMa, lacks a file, has a damaged one or a pickle, or an adapter's base model is a folder
        that nobody else has.
    """
    files, code = check_complete(Path(folder))
    published = {name for name in files if name in code or CHECKPOINT_FILES.fullmatch(name)}
    if left_out := sorted(set(files) - published):
        logger.warning(f"Not part of a checkpoint, and left out: {', '.join(left_out)}.")
    return [files[name] for name in sorted(published)]


def check_complete(folder: Path) -> tuple[dict[str, Path], set[str]]:
    """Files of a checkpoint that is complete, by name, and the names of its code; raise HubError for any other."""
    settings = read_settings(folder) if folder.is_dir() else {}
    if not is_panfoma(settings):
        got = ", ".join(f"{name} of something else" for name in settings) or "none of these"
        raise HubError(
            f"A PanFoMa checkpoint is a folder with {CONFIG} or {ADAPTER_CONFIG}, and {TOKENIZER_CONFIG}, got {got} in "
            f"{folder}. Name a folder that `finetune`, `save_checkpoint` or `panfoma export` wrote."
        )
    files = {path.name: path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")}
    refuse_pickles(files, folder)
    base_model(settings)  # which everybody must be able to find
    code = code_files(folder, settings)
    needed = {CONFIG if ADAPTER_CONFIG not in settings else ADAPTER_CONFIG, TOKENIZER_CONFIG, GENES}
    missing = sorted({*needed, *_weights(folder, settings), *code} - set(files))
    for name in settings:
        if name != ADAPTER_CONFIG and "auto_map" not in settings[name]:
            missing.append(f"`auto_map` in {name}")
    if missing:
        raise HubError(
            f"A checkpoint is complete by itself, got {folder} without {', '.join(missing)}. Save model and tokenizer "
            "there with `panfoma_hf.save_checkpoint`; for one that comes with the package: `panfoma export`."
        )
    if damaged := _damaged(files, settings):
        raise HubError(
            f"A checkpoint's files are whole, got damaged ones in {folder}: {', '.join(damaged)}. Save it again."
        )
    return files, code


def base_model(settings: Mapping[str, dict[str, Any]]) -> str | None:
    """Name on the Hub of an adapter's base model; None for what is no adapter.

    Raises
    ------
    HubError
        If it is a folder, or nothing.
    """
    if ADAPTER_CONFIG not in settings:
        return None
    base = settings[ADAPTER_CONFIG].get("base_model_name_or_path")
    if not isinstance(base, str) or not HUB_NAME.fullmatch(base) or Path(base).exists():
        raise HubError(
            f"An adapter names its base model as everybody finds it, got `base_model_name_or_path` {base!r}. Push that "
            "model, load it by its name on the Hub and save the adapter again; or publish the model with the adapter "
            "in it: `model.merge_and_unload()`."
        )
    return base


def code_files(folder: Path, settings: Mapping[str, dict[str, Any]]) -> set[str]:
    """Names of the files of code that ``auto_map`` asks for and that these import, there or not."""
    waiting, found = [], set()
    for content in settings.values():
        for reference in content.get("auto_map", {}).values():
            for name in [reference] if isinstance(reference, str) else reference:
                if name is not None:
                    waiting.append(name.split(".")[0] + ".py")
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            if (folder / name).is_file():
                waiting += [f"{module}.py" for module in get_relative_imports(folder / name)]
    return found


def _weights(folder: Path, settings: Mapping[str, dict[str, Any]]) -> set[str]:
    """Names of the files of weights that there must be."""
    if ADAPTER_CONFIG in settings:
        return {ADAPTER_WEIGHTS}
    try:
        shards = json.loads((folder / WEIGHTS_INDEX).read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError):  # all weights are in one file, as of most models
        return {WEIGHTS}
    return set(shards.values())


def _damaged(files: Mapping[str, Path], settings: Mapping[str, dict[str, Any]]) -> list[str]:
    """Names of weights that are cut off or no safetensors, and of genes that the tokenizer was not made with."""
    found = []
    for name, path in files.items():
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="numpy"):  # compares the length with what its head says
                    pass
            except SafetensorError:
                found.append(name)
    expected = settings[TOKENIZER_CONFIG].get("genes_sha256")
    if hashlib.sha256(files[GENES].read_bytes()).hexdigest() != expected:
        found.append(GENES)
    return found


def check_replaceable(folder: str | Path) -> None:
    """Raise FileExistsError unless a folder is missing, empty, or nothing but a saved PanFoMa model."""
    folder = Path(folder).resolve()
    if not folder.exists():
        return
    others = ["a file of that name"]
    if folder.is_dir():
        others = sorted(path.name for path in folder.iterdir() if not CHECKPOINT_FILES.fullmatch(path.name))
        settings = read_settings(folder)
        if not {CONFIG, ADAPTER_CONFIG} & set(settings):  # any folder may have a README.md
            others += [name for name in (CARD, "finetuning.json") if (folder / name).exists()]
        elif not others and not is_panfoma(settings):
            others = [f"the {CONFIG if CONFIG in settings else ADAPTER_CONFIG} of another model"]
    if others:
        raise FileExistsError(
            f"A checkpoint is saved to a new or empty folder, or over an older PanFoMa checkpoint, got {folder} with "
            f"something else in it: {', '.join(others[:3])}. Choose another folder, or remove this one."
        )


@contextmanager
def written_whole(folder: str | Path) -> Iterator[Path]:
    """A folder to write a checkpoint to, which takes its place when all is written; until then an older one is kept.

    Parameters
    ----------
    folder
        Where the checkpoint goes: new, empty, or an older PanFoMa checkpoint to replace.

    Raises
    ------
    FileExistsError
        If it holds something else.
    """
    check_replaceable(folder)
    folder = Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        yield new
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:  # Ctrl-C among them
            if old.exists():
                old.rename(folder)
            raise
