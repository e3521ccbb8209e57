"""The demo writes what it promises."""

import json

import anndata as ad
import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from panfoma_cli import app


@pytest.mark.slow  # `make demo` shows the same
def test_the_demo_writes_what_it_promises(tmp_path):
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path), "--cells", "200"])
    assert result.exit_code == 0, result.stderr
    assert "A fresh process gave 40 of 40 held-out cells the same name." in result.stdout
    assert {path.name for path in tmp_path.iterdir()} == {
        "annotated.h5ad",
        "checkpoint",
        "confusion_matrix.png",
        "metrics.json",
        "umap.png",
    }
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert set(metrics) == {"panfoma", "baselines", "cells", "same_names_in_a_fresh_process", "seconds"}
    assert set(metrics["panfoma"]) == {"accuracy", "macro_f1"}
    assert set(metrics["baselines"]) == {"majority class", "logistic regression, variable genes"}
    assert f"{metrics['panfoma']['macro_f1']:.3f}" in result.stdout
    cells = ad.read_h5ad(tmp_path / "annotated.h5ad")
    assert cells.n_obs == 40
    assert {"panfoma_cell_type", "panfoma_cell_type_score"} <= set(cells.obs)
    assert cells.obsm["X_panfoma"].shape == (40, 128)  # of the checkpoint that comes with the package
    assert cells.uns["panfoma"]["panfoma_cell_type"]["checkpoint"] == str(tmp_path / "checkpoint")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "checkpoint").gene_set) == 1000
    for picture in ("umap.png", "confusion_matrix.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
