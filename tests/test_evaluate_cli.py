"""`panfoma finetune` and `panfoma evaluate`, the pictures of a results page, and the script that writes it."""

import importlib
import json
import re

import anndata as ad
import numpy as np
import pytest
import torch
from transformers import AutoConfig
from transformers.utils import logging
from typer.testing import CliRunner

import panfoma_hf
from panfoma_cli import app
from panfoma_hf import PanFoMaConfig, PanFoMaModel, Task
from panfoma_hf.evaluation.tasks import INTEGRATION
from panfoma_hf.plotting import save_budget_curves, save_calibration_curve
from tests.conftest import ROOT, spread_out


PNG = b"\x89PNG"


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def run_and_fail(*arguments):
    """What a command that fails says of it: on stderr, as one message, with exit code 1."""
    result = run(*arguments)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.count("error: ") == 1
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def start(tokenizer, tmp_path_factory):
    """A tiny checkpoint of random weights, large enough to tell cells apart."""
    folder = tmp_path_factory.mktemp("cli") / "start"
    torch.manual_seed(0)
    spread_out(PanFoMaModel(PanFoMaConfig.from_size("tiny", vocab_size=len(tokenizer)))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def cells(adata) -> ad.AnnData:
    """The small cells, of six donors and two batches, with a second label and embeddings of their own."""
    place = np.arange(48)
    adata.obs["donor"] = np.array(list("uvwxyz"))[place // 8]
    adata.obs["batch"] = np.array(["one", "two"])[place // 3 % 2]
    adata.obs["state"] = np.where(adata.obs["cell_type"] == "mast", "rare", "common")
    adata.obsm["X_own"] = np.random.default_rng(1).normal(size=(48, 3)) + 5 * np.eye(3)[place % 3]
    return adata


@pytest.fixture
def file(cells, tmp_path):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


# -- finetune --------------------------------------------------------------------------------------------------------


def test_finetune_writes_a_checkpoint_and_says_where(file, start, cells, tmp_path):
    out = tmp_path / "model"
    result = run("finetune", file, out, "--label", "cell_type", "--model", start, "--mode", "probe")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == (
        f"The model is in {out}. Name cells with it: panfoma annotate CELLS {out} --out ANNOTATED.h5ad"
    )
    assert "MISSING" not in result.stderr  # of the last layer, which is what is learned
    assert json.loads((out / "finetuning.json").read_text())["split"]["groups"] == "donor"
    panfoma_hf.annotate(cells, out, min_score=0, progress=False)
    assert (cells.obs["panfoma_cell_type"].astype(str) == cells.obs["cell_type"].astype(str)).mean() > 0.9


def test_finetune_prints_nothing_but_the_report_as_json(file, start, tmp_path):
    out = tmp_path / "model"
    options = ("--label", "cell_type", "--model", start, "--validation", 0.3, "--groups", "none", "--json")
    # An option that is also named by --set takes that value; Trainer prints its log where it draws no bar.
    result = run(
        "finetune", file, out, *options, "--mode", "probe", "--set", "mode=full", "--set", "num_train_epochs=1"
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["mode"] == "full"
    assert report["split"]["groups"] is None
    assert report["validation_cells"] == 14
    assert set(report["tasks"]["cell_type"]["scores"]) == {"panfoma", "majority", "hvg_logistic_regression"}
    written = json.loads((out / "finetuning.json").read_text())
    assert written.pop("panfoma_hf_version") == panfoma_hf.__version__
    assert written == report


@pytest.mark.parametrize(
    "labels",
    [
        ("cell_type", "state"),
        ("state", "cell_type"),
    ],
)
def test_finetune_learns_several_labels_in_any_order(labels, file, start, cells, tmp_path):
    out = tmp_path / "model"
    options = [part for label in labels for part in ("--label", label)]
    options += ["--model", start, "--mode", "probe", "--seed", 0, "--seed", 1, "--set", "baselines=false", "--json"]
    result = run("finetune", file, out, *options)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert set(report["tasks"]) == set(labels)
    assert set(report["seeds"]) == {"0", "1"}
    assert set(AutoConfig.from_pretrained(out).tasks) == set(labels)
    panfoma_hf.annotate(cells, out, min_score=0, progress=False)
    for label in labels:
        assert (cells.obs[f"panfoma_{label}"].astype(str) == cells.obs[label].astype(str)).mean() > 0.9, label


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--label", "kind"), "`label` must be a column of obs, got 'kind'"),
        (("--label", "cell_type", "--mode", "half"), "`mode` is one of full, lora, probe, got 'half'"),
        (("--label", "cell_type", "--groups", "hospital"), "`groups` must be a column of obs, got 'hospital'"),
        (("--label", "cell_type", "--validation", "2"), "between 0 and 1, got 2.0"),
        (("--label", "cell_type", "--validation", "nowhere.h5ad"), "nowhere.h5ad"),
        (("--label", "cell_type", "--max-error", "1"), "`max_error` is a share"),
        (("--label", "cell_type", "--set", "epochs=2"), "got 'epochs'"),
    ],
)
def test_finetune_says_what_is_wrong(options, message, file, start, tmp_path):
    assert message in run_and_fail("finetune", file, tmp_path / "model", "--model", start, *options)
    assert not (tmp_path / "model").exists()


# -- evaluate --------------------------------------------------------------------------------------------------------


def test_evaluate_scores_methods_side_by_side(file):
    options = ("--label", "cell_type", "--groups", "donor", "--method", "majority", "--method", "obsm:X_own")
    result = run("evaluate", file, *options, "--seed", 0, "--seed", 1)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "cells.h5ad: 48 cells, 3 labels"
    assert lines[1].split() == ["accuracy", "macro_f1"]
    assert [line.split()[0] for line in lines[2:]] == ["majority", "obsm:X_own"]
    assert lines[3].split()[1:] == ["1.000", "(1.000-1.000)"] * 2
    as_json = json.loads(run("evaluate", file, *options, "--seed", 0, "--seed", 1, "--json").stdout)
    assert list(as_json) == ["majority", "obsm:X_own"]
    assert as_json["obsm:X_own"]["donor_accuracy"] <= 1
    assert as_json["majority"]["macro_f1"] < 0.3


def test_evaluate_says_what_both_sides_share_beside_the_scores(file):
    options = ("--label", "cell_type", "--groups", "none", "--method", "majority", "--seed", 0, "--json")
    result = run("evaluate", file, *options)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)
    assert "6 of 'donor'" in result.stderr


def test_evaluate_prints_nothing_of_the_training_inside(file, start):
    before = logging.get_verbosity()
    options = ("--label", "cell_type", "--method", f"panfoma:probe:{start}", "--budget", 0.5, "--seed", 0, "--json")
    result = run("evaluate", file, *options)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)[f"panfoma:probe:{start}"]["accuracy"] > 0.5
    assert "validation cells" not in result.stderr
    assert logging.get_verbosity() == before


def test_evaluate_holds_out_the_donors_that_are_named(file):
    options = ("--label", "cell_type", "--groups", "donor", "--held-out", "u", "--held-out", "v", "--method", "pca_knn")
    assert run("evaluate", file, *options, "--seed", 0).exit_code == 0
    assert "Name other values" in run("evaluate", file, *options[:4], "--held-out", "q", *options[-2:]).stderr


def test_evaluate_scores_the_integration_of_batches(file):
    options = ("--label", "cell_type", "--batch", "batch", "--method", "obsm:X_own", "--seed", 0)
    result = run("evaluate", file, *options)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[1].split() == ["unseen/avg_bio", "unseen/avg_batch", "seen/avg_bio", "seen/avg_batch"]
    assert lines[2].split()[0] == "obsm:X_own"
    assert float(lines[2].split()[5]) > 0.8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--label", "cell_type", "--method", "majority", "--method", "guess"), "A method is one of majority"),
        (("--label", "cell_type", "--batch", "batch", "--method", "majority"), "A way to embed is one of pca"),
        (("--label", "kind", "--method", "majority"), "A task's columns are in obs, got 'kind'"),
        (("--label", "cell_type", "--budget", "0", "--method", "majority", "--json"), "`budget` is a share"),
        (("--label", "cell_type", "--method", "obsm:X_other", "--json"), "got 'X_other'"),
        (("--label", "cell_type", "--batch", "batch", "--groups", "donor"), "Leave these out"),
        (("--label", "cell_type", "--held-out", "u"), "Name the column with `groups`"),
    ],
)
def test_evaluate_says_what_is_wrong(options, message, file):
    assert message in run_and_fail("evaluate", file, *options)


def test_evaluate_needs_a_file(tmp_path):
    run_and_fail("evaluate", tmp_path / "nowhere.h5ad", "--label", "cell_type")


# -- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("finetune", ("CELLS", "OUT", "--label", "--mode", "--set", "Exit code 1", "Example: panfoma finetune")),
        ("evaluate", ("--method", "--batch", "--held-out", "--budget", "Exit code 1", "Example: panfoma evaluate")),
    ],
)
def test_the_commands_say_what_they_take(command, words):
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0
    text = " ".join(result.output.split()).lower()
    assert [word for word in words if word.lower() not in text] == []


# -- pictures and the results page -----------------------------------------------------------------------------------


def test_calibration_is_drawn_though_bins_are_empty(tmp_path):
    curve = np.array([0.2, np.nan, 0.9]), np.array([0.3, np.nan, 0.8]), np.array([10, 0, 90])
    save_calibration_curve({"one": curve, "another": curve}, tmp_path / "calibration.png")
    assert (tmp_path / "calibration.png").read_bytes().startswith(PNG)


def test_budgets_are_drawn(tmp_path):
    curves = {"one": ([0.1, 0.25, 1.0], [0.5, 0.6, 0.7]), "another": ([1.0], [0.8])}
    save_budget_curves(curves, tmp_path / "budgets.png", metric="accuracy")
    assert (tmp_path / "budgets.png").read_bytes().startswith(PNG)


@pytest.fixture
def script(cells, monkeypatch):
    """`scripts/evaluate_tasks.py` with two small tasks, as a function of its arguments."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    module = importlib.import_module("evaluate_tasks")
    tasks = [
        Task("pdac_card", cells, "cell_type", groups="donor", note="Made up."),
        Task("mixing", cells, "cell_type", kind=INTEGRATION, batch="batch"),
    ]
    monkeypatch.setattr(module, "TASKS", {task.name: task for task in tasks})
    for name in ("set_verbosity_error", "disable_progress_bar"):
        monkeypatch.setattr(module.logging, name, lambda: None)

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["evaluate_tasks.py", *map(str, arguments)])
        module.main()

    return call


def test_the_script_runs_what_is_missing_and_writes_the_page(script, tmp_path, capsys):
    out, page = tmp_path / "results", tmp_path / "docs" / "results.md"
    page.parent.mkdir()
    page.write_text("Before.\n\n<!-- measured: start -->\nold\n<!-- measured: end -->\n\nAfter.\n")
    methods = ("majority", "hvg_logistic_regression", "pca")
    script("--out", out, "--methods", *methods, "--seeds", 0)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in printed] == [
        ["pdac_card", "majority", "1.00"],
        ["pdac_card", "hvg_logistic_regression", "1.00"],
        ["mixing", "pca", "1.00"],
        *(["pdac_card", "hvg_logistic_regression", budget] for budget in ("0.10", "0.25", "0.50")),
    ]
    assert len(list(out.glob("*.json"))) == 6
    assert not list(out.glob("*.partial"))
    assert json.loads((out / "pdac_card__majority.json").read_text())["seeds"] == [0]

    (out / "pdac_card__majority.json").unlink()
    script("--out", out, "--methods", *methods, "--seeds", 0)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["majority"]
    # Those of other seeds or of another checkpoint are run again.
    script("--out", out, "--methods", "majority", "--seeds", 0, 1)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["majority"]
    record = json.loads((out / "mixing__pca.json").read_text())
    (out / "mixing__pca.json").write_text(json.dumps(record | {"checkpoint": "another"}))
    script("--out", out, "--methods", "pca", "--seeds", 0)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["pca"]

    script("--out", out, "--report", page)
    written = page.read_text()
    assert written.startswith("Before.\n")
    assert written.endswith("After.\n")
    assert "old" not in written
    assert re.search(r"\| `pdac_card` \| 48 \| 3 \| by donor \| \d \| Made up. \|", written)
    assert "| majority class | " in written
    for picture in ("label_budget.png", "calibration.png"):
        assert f"](results/{picture})" in written
        assert (page.parent / "results" / picture).read_bytes().startswith(PNG)
    script("--out", out, "--report", page)
    assert page.read_text() == written
