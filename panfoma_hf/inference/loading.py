"""A model and its tokenizer from whatever names them, and what a run needs to know of them."""

import json
import os
from collections.abc import Collection
from pathlib import Path

import torch
import xxhash
from accelerate import PartialState
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from transformers import AutoTokenizer

from ..modeling import PanFoMaPreTrainedModel
from ..tokenization import PanFoMaTokenizer, check_tokenizer


# Entries of a configuration that change nothing of what the model computes.
_NOT_COMPUTED = ("_name_or_path", "architectures", "auto_map", "calibration", "dtype", "transformers_version")


def load_tokenizer(model, tokenizer: PanFoMaTokenizer | None = None) -> PanFoMaTokenizer:
    """The tokenizer that belongs to a checkpoint or a model, unless one is given."""
    if tokenizer is not None:
        return tokenizer
    checkpoint = model if isinstance(model, (str, Path)) else model.name_or_path
    if not checkpoint:
        raise ValueError(
            "A model needs its tokenizer, got a model that was not loaded from a checkpoint. Pass `tokenizer`."
        )
    return AutoTokenizer.from_pretrained(checkpoint)


def load_model(auto_class, model, tokenizer: PanFoMaTokenizer, device=None) -> PanFoMaPreTrainedModel:
    """The model on its device, with every weight, and made for this tokenizer."""
    if isinstance(model, (str, Path)):
        try:
            loaded, report = auto_class.from_pretrained(model, output_loading_info=True)
        except (SafetensorError, RuntimeError) as error:  # cut off, or of other shapes than its configuration says
            raise ValueError(
                f"A checkpoint's weights are whole and fit its configuration, got {model}: {error}. Fetch or save it "
                "again."
            ) from error
        check_weights(loaded, model, report["missing_keys"])
        model = loaded.to(device or default_device())
    elif device is not None:
        model = model.to(device)
    check_tokenizer(tokenizer, model.config)
    return model


def check_weights(model: PanFoMaPreTrainedModel, checkpoint: str | Path, missing_keys: Collection[str]) -> None:
    """Raise ValueError if a model was loaded from a checkpoint that lacks some of its weights."""
    if missing_keys:
        raise ValueError(
            f"A checkpoint must hold every weight of {type(model).__name__}, got {checkpoint} without "
            f"{', '.join(sorted(missing_keys)[:3])}. Fine-tune it first with `panfoma_hf.finetune`, or "
            "use `panfoma_hf.embed`, which needs no classifier."
        )


def default_device() -> torch.device:
    """A GPU where there is one; under `accelerate launch` the one of this process."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return PartialState().device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def revision_of(model: PanFoMaPreTrainedModel) -> str:
    """Commit of a checkpoint of the Hub, as it was loaded or lies in the cache; empty for a folder or a fresh model."""
    if commit := getattr(model.config, "_commit_hash", None):
        return commit
    name_or_path = str(model.name_or_path)
    if not name_or_path or Path(name_or_path).is_dir():
        return ""
    try:
        config = try_to_load_from_cache(name_or_path, "config.json")
    except HFValidationError:  # no name of the Hub: a folder that has been moved since
        return ""
    return Path(config).parent.name if isinstance(config, str) else ""


def model_fingerprint(model: PanFoMaPreTrainedModel) -> str:
    """Checksum of a model's weights and of what of its configuration decides what it computes."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_COMPUTED}
    checksum = xxhash.xxh3_128(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        checksum.update(name.encode())
        checksum.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return checksum.hexdigest()
