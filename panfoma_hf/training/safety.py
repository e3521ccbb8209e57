"""Checkpoints of a long run: which of them are whole, and what may not get into one."""

import json
import os
import re
import shutil
from pathlib import Path

import torch
import xxhash
from transformers import Trainer, TrainerCallback
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Written when every file of a checkpoint is: names and checksums of the files.
COMPLETE_FILE = "complete.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class PretrainingError(RuntimeError):
    """Pretraining cannot go on; its last good checkpoint is as it was."""


class SafeCheckpoints(TrainerCallback):
    """Keep anything but whole checkpoints of finite weights from being taken for good ones.

    Before a checkpoint is saved it looks whether the output folder is still the one that the run began with, and
    whether all weights are finite; when it is saved, it seals it with a checksum of every file.

    Parameters
    ----------
    trainer
        A `PretrainingTrainer`.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.folder = Path(trainer.args.output_dir)
        self.identity: tuple[int, int] | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Remember the output folder, which a mount or another program may replace."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.identity = _identity(self.folder)

    def on_step_end(self, args, state, control, **kwargs):
        """Look before a checkpoint is written, and have what was counted logged, so that the log is saved with it."""
        self.trainer.step_ended()
        if not control.should_save:
            return control
        if _identity(self.folder) != self.identity:
            raise PretrainingError(
                f"The output folder must stay where it is, got {self.folder} gone or replaced at step "
                f"{state.global_step:,}. Bring it back with its checkpoints (is its disk still mounted?) and resume, "
                "or start again elsewhere."
            )
        require_finite(self.trainer, *self.trainer.model.parameters())
        control.should_log = True
        return control

    def on_save(self, args, state, control, **kwargs):
        """Seal the checkpoint, when every process has written its part."""
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            seal(self.folder / f"checkpoint-{state.global_step}")


def require_finite(trainer: Trainer, *tensors: torch.Tensor) -> None:
    """Raise PretrainingError where a value of a loss or of weights is infinite or no number."""
    for tensor in tensors:
        values = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # a shard of FSDP
        if torch.isfinite(values).all():
            continue
        last = last_good_checkpoint(trainer.args.output_dir)
        raise PretrainingError(
            f"{'Losses' if values.ndim == 0 else 'Weights'} must be finite, got {_first_bad(values)} after step "
            f"{trainer.state.global_step:,}. "
            + (f"{last} is the last good checkpoint. " if last else "No checkpoint was saved yet. ")
            + "Lower `learning_rate` or `max_grad_norm`, or raise `warmup_steps`, and begin a run from it or anew."
        )


def _first_bad(values: torch.Tensor) -> float:
    return values[~torch.isfinite(values)].flatten()[0].item()


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(folder)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def seal(checkpoint: Path) -> None:
    """Note every file of a checkpoint with its checksum."""
    sums = {
        str(path.relative_to(checkpoint)): _checksum(path)
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != COMPLETE_FILE
    }
    scratch = checkpoint / f".{COMPLETE_FILE}"
    scratch.write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")
    scratch.rename(checkpoint / COMPLETE_FILE)


def problem_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is as it was written."""
    try:
        sums = json.loads((checkpoint / COMPLETE_FILE).read_text(encoding="utf-8"))
    except OSError:
        return "it was not finished"
    except ValueError:
        return f"{COMPLETE_FILE} is damaged"
    for name, expected in sums.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if _checksum(path) != expected:
            return f"{name} has changed"
    return None


def checkpoints_of(folder: str | Path) -> list[Path]:
    """Checkpoints in a run's folder, whole or not, the latest first."""
    folder = Path(folder)
    found = [path for path in folder.iterdir() if _CHECKPOINT.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(_CHECKPOINT.fullmatch(path.name)[1]), reverse=True)


def last_good_checkpoint(folder: str | Path) -> Path | None:
    """The latest checkpoint of a run whose files are all as they were written; says which ones it passes over."""
    for checkpoint in checkpoints_of(folder):
        problem = problem_of(checkpoint)
        if problem is None:
            return checkpoint
        logger.warning(f"{checkpoint} is passed over: {problem}.")
    return None


def remove_unfinished(folder: str | Path) -> None:
    """Remove checkpoints that a run was cut off in, which would count among those that are kept."""
    for checkpoint in checkpoints_of(folder):
        if not (checkpoint / COMPLETE_FILE).exists():
            shutil.rmtree(checkpoint)


def _checksum(path: Path) -> str:
    checksum = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            checksum.update(block)
    return checksum.hexdigest()
