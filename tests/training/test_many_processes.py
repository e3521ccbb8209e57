"""Pretraining by several processes is the same run as by one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForPreTraining, AutoTokenizer

from panfoma_hf import pretrain
from tests.conftest import ROOT
from tests.training.conftest import ARGUMENTS, losses


STEPS = 20
SETTINGS = {**ARGUMENTS, "model": "tiny", "max_steps": STEPS, "save_strategy": "steps", "save_steps": 10, "seed": 3}


# scripts/pretrain.py where the second process is late, as happens; and each says what share of the weights it holds.
SCRIPT = """
import json, os, runpy, sys, time
from pathlib import Path
from panfoma_hf.training import pretraining
begin, finish = pretraining._begin, pretraining._finish
rank = int(os.environ["RANK"])
def late(*arguments):
    time.sleep(rank)
    return begin(*arguments)
def noted(trainer, folder, *arguments):
    parameters = list(trainer.model_wrapped.parameters())
    held = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in parameters)
    share = held / sum(p.numel() for p in parameters)
    Path(f"{folder}-{rank}.json").write_text(json.dumps([type(trainer.model_wrapped).__name__, share]))
    finish(trainer, folder, *arguments)
pretraining._begin, pretraining._finish = late, noted
sys.argv[0] = sys.argv.pop(1)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def launch(config: str, corpus, out: Path, *options: str, **changes) -> list[dict]:
    """Pretrain as a user would, by `accelerate launch`, and read the log."""
    recipe, script = out.with_suffix(".yaml"), out.with_suffix(".py")
    script.write_text(SCRIPT, encoding="utf-8")
    recipe.write_text(json.dumps({**SETTINGS, **changes}), encoding="utf-8")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(free_port())]
    command += ["--config_file", ROOT / "scripts" / "accelerate" / config, script, ROOT / "scripts" / "pretrain.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, corpus.folder, out, "--recipe", recipe, *options],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads((out / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]


@pytest.fixture(scope="module")
def by_one(_corpus_once, tmp_path_factory):
    """One process that accumulates two batches."""
    folder = tmp_path_factory.mktemp("one") / "run"
    return pretrain(_corpus_once, folder, **SETTINGS, gradient_accumulation_steps=2), folder


def wrapped(out: Path) -> list:
    """The class around the model, and the share of the weights that it holds, for each process."""
    return [json.loads(Path(f"{out}-{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


def same_as_by_one(log, by_one) -> None:
    lines = [line for line in log if "gene_loss" in line]
    expected = [line for line in by_one[0].state.log_history if "gene_loss" in line]
    assert len(lines) == STEPS
    for key in ("loss", "gene_loss", "cell_loss", "presence_loss"):
        assert [line[key] for line in lines] == pytest.approx([line[key] for line in expected], rel=2e-5)
    for key in ("majority_accuracy", "cells_seen", "padding"):
        assert [line[key] for line in lines] == pytest.approx([line[key] for line in expected], abs=1e-3)
    # Of some 130 predictions of a step one may lie so near between two bins that sums in another order turn it.
    accuracies = [[line["gene_accuracy"] for line in of_run] for of_run in (lines, expected)]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.01)
    assert sum(abs(one - other) > 1e-3 for one, other in zip(*accuracies, strict=True)) <= 1


def gives_the_same_logits(folder: Path, expected: Path, corpus) -> None:
    cells = [
        {key: row[key] for key in ("input_ids", "expression_bins")}
        for row in corpus.dataset().select(range(4)).to_list()
    ]
    batch = AutoTokenizer.from_pretrained(folder).pad(cells, return_tensors="pt")
    model, report = AutoModelForPreTraining.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        logits = model.eval()(**batch).logits
        torch.testing.assert_close(
            logits, AutoModelForPreTraining.from_pretrained(expected).eval()(**batch).logits, rtol=1e-3, atol=1e-3
        )
        assert AutoModel.from_pretrained(folder)(**batch).pooler_output.isfinite().all()


def test_two_processes_lose_what_one_does_with_the_same_global_batch(corpus, by_one, tmp_path):
    log = launch("ddp_cpu.yaml", corpus, tmp_path / "run")
    assert wrapped(tmp_path / "run") == [["DistributedDataParallel", 1.0]] * 2
    same_as_by_one(log, by_one)
    gives_the_same_logits(tmp_path / "run" / "model", by_one[1] / "model", corpus)


@pytest.mark.slow
def test_sharded_weights_give_the_same_run_and_checkpoints_for_plain_from_pretrained(corpus, by_one, tmp_path):
    log = launch("fsdp2_cpu.yaml", corpus, tmp_path / "run")
    for name, share in wrapped(tmp_path / "run"):
        assert name.startswith("FSDP")
        assert share == pytest.approx(0.5, abs=0.01)
    same_as_by_one(log, by_one)
    for folder in ("model", "checkpoint-10", "checkpoint-20"):
        gives_the_same_logits(tmp_path / "run" / folder, by_one[1] / folder, corpus)
    losses_before = [line["loss"] for line in log if "loss" in line]
    # Its last checkpoint is lost, and the run goes on from the one before.
    (tmp_path / "run" / "checkpoint-20" / "complete.json").unlink()
    resumed = launch("fsdp2_cpu.yaml", corpus, tmp_path / "run", "--resume")
    assert [line["loss"] for line in resumed if "loss" in line] == pytest.approx(losses_before, abs=1e-6)


def test_losses_are_worth_comparing(by_one):
    found = losses(by_one[0])
    assert len(set(found)) == STEPS
    assert found[-1] < found[0]
