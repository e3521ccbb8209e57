"""A run that was cut off goes on as if nothing had happened, from the last checkpoint that is whole."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from panfoma_hf.training import (
    PretrainingError,
    PretrainingTrainer,
    last_good_checkpoint,
    pretraining_trainer,
    safety,
    throughput,
)
from panfoma_hf.training.safety import checkpoints_of, problem_of
from tests.conftest import ROOT
from tests.training.conftest import ARGUMENTS, Killed, before_step, damage, kill, lines, losses, run, tiny_model


# Dropout follows torch's generator, which has to be where it was.
SETTINGS = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "dropout": 0.1}
WAYS = {
    "with evaluation, accumulating, in bfloat16": {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "gradient_accumulation_steps": 2,
        "bf16": True,
    },
    "from a stream": {"streaming": True},
}


@pytest.fixture(scope="module")
def straight(_corpus_once, tokenizer, tmp_path_factory):
    """A run that nothing happens to; tests must not change it."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    return run(_corpus_once, folder, tokenizer, **SETTINGS), folder


@pytest.fixture(scope="module")
def _cut_off_once(_corpus_once, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut-off") / "run"
    cut_off_run(_corpus_once, folder, tokenizer, SETTINGS)
    return folder


@pytest.fixture
def cut_off(_cut_off_once, tmp_path):
    """A run that ended before its sixth step, with checkpoints of two and four; a test may change it."""
    return shutil.copytree(_cut_off_once, tmp_path / "run")


def cut_off_run(corpus, folder, tokenizer, settings, step=5) -> None:
    with pytest.MonkeyPatch.context() as patch:
        before_step(patch, step, kill)
        with pytest.raises(Killed):
            run(corpus, folder, tokenizer, **settings)


def same_run(trainer, folder, expected, expected_folder) -> None:
    """Losses, counts and weights are those of a run that nothing happened to."""
    assert losses(trainer) == pytest.approx(losses(expected), abs=1e-6)
    for key in ("step", "cells_seen", "epoch", "learning_rate", "padding", "gene_accuracy"):
        assert [line[key] for line in lines(trainer)] == pytest.approx([line[key] for line in lines(expected)])
    weights, others = (load_file(path / "model" / "model.safetensors") for path in (folder, expected_folder))
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, others[name], rtol=0, atol=1e-6, msg=name)


@pytest.fixture
def steps_done(monkeypatch):
    """Steps that are begun, each as the number of those that are done."""
    seen = []
    training_step = PretrainingTrainer.training_step

    def noted(self, *args, **kwargs):
        seen.append(self.state.global_step)
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(PretrainingTrainer, "training_step", noted)
    return seen


def test_a_run_that_was_cut_off_goes_on_as_a_straight_one(
    cut_off, straight, corpus, tokenizer, steps_done, monkeypatch
):
    # Each process measures the machine anew, which no draw of training may depend on.
    monkeypatch.setattr(pretraining_trainer, "peak_flops", throughput.peak_flops)
    assert [path.name for path in checkpoints_of(cut_off)] == ["checkpoint-4", "checkpoint-2"]
    trainer = run(corpus, cut_off, tokenizer, resume=True, **SETTINGS)
    assert steps_done == [4, 5, 6, 7]
    same_run(trainer, cut_off, *straight)
    assert [path.name for path in checkpoints_of(cut_off)] == ["checkpoint-8", "checkpoint-6"]
    assert [problem_of(path) for path in checkpoints_of(cut_off)] == [None, None]


@pytest.mark.parametrize("way", WAYS)
def test_it_does_so_whatever_the_batches_come_from(way, corpus, tokenizer, tmp_path):
    settings = {**SETTINGS, **WAYS[way]}
    expected = run(corpus, tmp_path / "straight", tokenizer, **settings)
    cut_off_run(corpus, tmp_path / "run", tokenizer, settings)
    trainer = run(corpus, tmp_path / "run", tokenizer, resume=True, **settings)
    same_run(trainer, tmp_path / "run", expected, tmp_path / "straight")


def test_it_goes_on_between_two_lines_of_the_log(corpus, tokenizer, tmp_path):
    """What was counted since the last line is not lost: a checkpoint comes with a line of its own."""
    settings = {**SETTINGS, "logging_steps": 3, "max_steps": 9, "save_steps": 4}
    expected = run(corpus, tmp_path / "straight", tokenizer, **settings)
    cut_off_run(corpus, tmp_path / "run", tokenizer, settings)
    trainer = run(corpus, tmp_path / "run", tokenizer, resume=True, **settings)
    assert [line["step"] for line in lines(trainer)] == [3, 4, 6, 8, 9]
    same_run(trainer, tmp_path / "run", expected, tmp_path / "straight")


KILLED_WHILE_SAVING = """
import json, os, signal, sys
from panfoma_hf import PanFoMaConfig, pretrain
from panfoma_hf.training import safety
seal = safety.seal
def killed(checkpoint):
    if checkpoint.name == "checkpoint-4":
        os.kill(os.getpid(), signal.SIGKILL)
    seal(checkpoint)
safety.seal = killed
corpus, folder, model, settings = sys.argv[1:]
pretrain(corpus, folder, model=PanFoMaConfig.from_dict(json.loads(model)), **json.loads(settings))
"""


def test_a_process_that_is_killed_while_it_saves_leaves_the_checkpoint_before(corpus, straight, tokenizer, tmp_path):
    expected, expected_folder = straight
    folder = tmp_path / "run"
    model = json.dumps(tiny_model(tokenizer).to_dict())
    killed = subprocess.run(
        [
            sys.executable,
            "-c",
            KILLED_WHILE_SAVING,
            corpus.folder,
            folder,
            model,
            json.dumps({**ARGUMENTS, **SETTINGS}),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in checkpoints_of(folder)] == ["checkpoint-4", "checkpoint-2"]
    assert problem_of(folder / "checkpoint-4") == "it was not finished"
    assert last_good_checkpoint(folder).name == "checkpoint-2"
    trainer = run(corpus, folder, tokenizer, resume=True, **SETTINGS)
    same_run(trainer, folder, expected, expected_folder)


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


HARM = {
    "was not finished": (lambda path: (path / "complete.json").unlink(), "it was not finished"),
    "has a changed file": (lambda path: damage(path / "model.safetensors"), "model.safetensors has changed"),
    "has a file that is cut short": (lambda path: cut(path / "optimizer.pt"), "optimizer.pt has changed"),
    "lacks a file": (lambda path: (path / "trainer_state.json").unlink(), "trainer_state.json is missing"),
    "has a damaged seal": (lambda path: cut(path / "complete.json"), "complete.json is damaged"),
}


@pytest.mark.parametrize("name", HARM)
def test_a_checkpoint_that_is_not_whole_is_passed_over_for_the_one_before(
    name, cut_off, straight, corpus, tokenizer, steps_done
):
    harm, problem = HARM[name]
    harm(cut_off / "checkpoint-4")
    assert problem_of(cut_off / "checkpoint-4") == problem
    assert last_good_checkpoint(cut_off) == cut_off / "checkpoint-2"
    trainer = run(corpus, cut_off, tokenizer, resume=True, **SETTINGS)
    assert steps_done == [2, 3, 4, 5, 6, 7]
    same_run(trainer, cut_off, *straight)
    assert [problem_of(path) for path in checkpoints_of(cut_off)] == [None, None]


def test_what_is_passed_over_is_said(cut_off):
    damage(cut_off / "checkpoint-4" / "model.safetensors")
    (cut_off / "checkpoint-2" / "complete.json").unlink()
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safety.logger, "warning", said.append)
        assert last_good_checkpoint(cut_off) is None
    assert said == [
        f"{cut_off / 'checkpoint-4'} is passed over: model.safetensors has changed.",
        f"{cut_off / 'checkpoint-2'} is passed over: it was not finished.",
    ]


@pytest.mark.parametrize("name", ["was not finished", "has a changed file"])
def test_where_no_checkpoint_is_whole_the_run_starts_anew(name, cut_off, straight, corpus, tokenizer, steps_done):
    for path in checkpoints_of(cut_off):
        HARM[name][0](path)
    trainer = run(corpus, cut_off, tokenizer, resume=True, **SETTINGS)
    assert steps_done == list(range(8))
    same_run(trainer, cut_off, *straight)
    assert [path.name for path in checkpoints_of(cut_off)] == ["checkpoint-8", "checkpoint-6"]
    assert [problem_of(path) for path in checkpoints_of(cut_off)] == [None, None]


def test_while_a_run_goes_on_there_is_a_whole_checkpoint_at_every_time(cut_off, corpus, tokenizer, monkeypatch):
    """Of two that are damaged, rotation does not keep one in place of one that is good."""
    for path in checkpoints_of(cut_off):
        damage(path / "model.safetensors")
    good = []
    for step in (3, 5, 7):
        before_step(monkeypatch, step, lambda trainer: good.append(last_good_checkpoint(cut_off)))
    run(corpus, cut_off, tokenizer, resume=True, **SETTINGS)
    assert [path and path.name for path in good] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_resume_begins_a_run_where_there_is_none(corpus, straight, tokenizer, tmp_path, steps_done):
    trainer = run(corpus, tmp_path / "run", tokenizer, resume=True, **SETTINGS)
    assert steps_done == list(range(8))
    same_run(trainer, tmp_path / "run", *straight)


def test_a_stream_is_not_resumed_by_other_readers(corpus, tokenizer, tmp_path):
    streamed = {**SETTINGS, "streaming": True, "max_steps": 2, "save_steps": 1}
    run(corpus, tmp_path / "run", tokenizer, **streamed)
    with pytest.raises(PretrainingError, match=r"readers \[1, 1\] -> \[1, 2\]"):
        run(corpus, tmp_path / "run", tokenizer, resume=True, **streamed, dataloader_num_workers=2)


def test_resuming_a_finished_run_does_no_step_and_gives_its_model_again(
    cut_off, straight, corpus, tokenizer, steps_done
):
    run(corpus, cut_off, tokenizer, resume=True, **SETTINGS)
    del steps_done[:]
    trainer = run(corpus, cut_off, tokenizer, resume=True, **SETTINGS)
    assert steps_done == []
    same_run(trainer, cut_off, *straight)


OTHER = {
    "max_steps": (9, "max_steps 8 -> 9"),
    "learning_rate": (0.002, "learning_rate 0.0005 -> 0.002"),
    "seed": (1, "seed"),
    "mask_ratio": (0.2, r"mask_ratio \[0.3\] -> \[0.2\]"),
    "tokens_per_batch": (128, "tokens_per_batch 256 -> 128"),
    "max_genes": (20, "max_genes 3072 -> 20"),
    "dropout": (0.0, "dropout 0.1 -> 0.0"),
    "held_out_studies": ([], r"held_out_studies \['judged'\] -> \[\]"),
    "split": ("random", "split 'donor' -> 'random'"),
    "gradient_accumulation_steps": (2, "batches_per_step 1 -> 2"),
    "streaming": (True, "streaming False -> True"),
    "model": ("tiny", r"model\."),
    "lr_scheduler_type": ("linear", "lr_scheduler_type"),
    "warmup_steps": (3, "warmup_steps"),
    "weight_decay": (0.1, "weight_decay"),
    "max_grad_norm": (0.5, "max_grad_norm"),
}


@pytest.mark.parametrize("name", OTHER)
def test_a_run_is_not_resumed_as_another_one(name, cut_off, corpus, tokenizer):
    value, message = OTHER[name]
    before = {path: path.stat().st_mtime_ns for path in cut_off.rglob("*")}
    with pytest.raises(PretrainingError, match=rf"A run is resumed as it was begun.*run\.json: .*{message}"):
        run(corpus, cut_off, tokenizer, resume=True, **{**SETTINGS, name: value})
    assert {path: path.stat().st_mtime_ns for path in cut_off.rglob("*")} == before


def test_what_does_not_change_a_run_may_be_changed_when_it_is_resumed(cut_off, straight, corpus, tokenizer):
    other = {"save_steps": 4, "save_total_limit": None, "logging_steps": 1, "max_eval_cells": 3}
    trainer = run(corpus, cut_off, tokenizer, resume=True, **{**SETTINGS, **other})
    same_run(trainer, cut_off, *straight)
    assert next(iter(checkpoints_of(cut_off))).name == "checkpoint-8"


def test_a_newer_transformers_is_not_another_run(cut_off, straight, corpus, tokenizer):
    path = cut_off / "run.json"
    settings = json.loads(path.read_text())
    settings["model"]["transformers_version"] = "5.17.0"
    path.write_text(json.dumps(settings))
    same_run(run(corpus, cut_off, tokenizer, resume=True, **SETTINGS), cut_off, *straight)


def test_a_folder_with_a_run_is_not_begun_in_without_resume(cut_off, corpus, tokenizer):
    before = {path: path.stat().st_mtime_ns for path in cut_off.rglob("*")}
    with pytest.raises(FileExistsError, match=r"A run begins in a folder without one.*`resume=True`"):
        run(corpus, cut_off, tokenizer, **SETTINGS)
    assert {path: path.stat().st_mtime_ns for path in cut_off.rglob("*")} == before
    for path in checkpoints_of(cut_off):
        (path / "complete.json").unlink()
    (cut_off / "run.json").unlink()
    with pytest.raises(FileExistsError):
        run(corpus, cut_off, tokenizer, **SETTINGS)
