"""A checkpoint that was published once loads and gives the same numbers: tests/golden/README.md."""

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

import panfoma_hf


GOLDEN = Path(__file__).parent / "golden"
CHECKPOINT = GOLDEN / "checkpoint"
DEVICES = [
    pytest.param("cpu", 1e-5, id="cpu"),
    pytest.param(
        "cuda", 1e-4, id="cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
    ),
]


@pytest.fixture
def cells() -> ad.AnnData:
    return ad.read_h5ad(GOLDEN / "cells.h5ad")


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "expected.safetensors")


def test_tokens_are_the_same(cells, expected):
    batch = AutoTokenizer.from_pretrained(CHECKPOINT)(cells, padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "expression_bins", "attention_mask"}
    for name, tensor in batch.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(("device", "tolerance"), DEVICES)
@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForSequenceClassification])
def test_outputs_are_the_same(auto_class, device, tolerance, expected):
    model, report = auto_class.from_pretrained(CHECKPOINT, output_loading_info=True)
    assert not report["missing_keys"]
    batch = {name: expected[name].to(device) for name in ("input_ids", "expression_bins", "attention_mask")}
    with torch.no_grad():
        output = model.eval().to(device)(**batch)
    names = ["logits"] if auto_class is AutoModelForSequenceClassification else ["pooler_output", "gene_scores"]
    for name in names:
        spread = expected[name][torch.isfinite(expected[name])].std()
        assert spread > 0.05  # so that the tolerance means something
        torch.testing.assert_close(output[name].cpu(), expected[name], rtol=tolerance, atol=tolerance)
    if auto_class is AutoModel:
        is_gene = expected["attention_mask"].bool()
        found, before = output.last_hidden_state.cpu()[is_gene], expected["last_hidden_state"][is_gene]
        torch.testing.assert_close(found, before, rtol=tolerance, atol=tolerance)


def test_names_are_the_same(cells):
    expected = json.loads((GOLDEN / "expected.json").read_text())
    panfoma_hf.annotate(cells, CHECKPOINT, progress=False)
    assert cells.obs["panfoma_cell_type"].astype(str).tolist() == expected["names"]
    np.testing.assert_allclose(cells.obs["panfoma_cell_type_score"], expected["scores"], atol=1e-5)
    assert len(set(expected["names"])) > 2
