"""What tests share: the tiny model, the tokenizer, a few cells."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import panfoma_hf
from panfoma_hf import PanFoMaConfig, PanFoMaTokenizer


ROOT = Path(__file__).resolve().parent.parent
VOCAB_SIZE = 120

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def config() -> PanFoMaConfig:
    """The tiny size with few genes, three labels and no dropout."""
    return tiny_config()


def tiny_config(**overrides) -> PanFoMaConfig:
    settings = {"vocab_size": VOCAB_SIZE, "num_labels": 3, "hidden_dropout_prob": 0.0, **overrides}
    return PanFoMaConfig.from_size("tiny", **settings)


def spread_out(model: torch.nn.Module) -> torch.nn.Module:
    """Scale a fresh model's small weights up, so that every part of it moves the output far beyond rounding."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gene_weight.weight"):
                parameter.uniform_(-0.2, 0.2)  # starts at zero
            elif name.endswith(("gene_scale", "cell_scale")):
                parameter.uniform_(0.05, 0.2)  # start at 0.1
            elif "embeddings" in name or name.endswith("cls_token"):
                parameter.mul_(30)
            elif parameter.ndim > 1 and "A_log" not in name and "dt_proj" not in name:
                parameter.mul_(2)
    return model.eval()


def random_cells(lengths: list[int], seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Cells of different genes: ``input_ids`` and ``expression_bins``, (1, length) each."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "input_ids": 1 + torch.randperm(VOCAB_SIZE - 1, generator=generator)[None, :length],
            "expression_bins": torch.randint(1, 51, (1, length), generator=generator),
        }
        for length in lengths
    ]


def pad_batch(cells: list[dict[str, torch.Tensor]], length: int | None = None) -> dict[str, torch.Tensor]:
    """Put cells into one batch, with garbage at the pads: a mask must hide whatever lies there."""
    lengths = [cell["input_ids"].shape[1] for cell in cells]
    length = max(lengths) if length is None else length
    batch = {
        "input_ids": torch.randint(1, VOCAB_SIZE, (len(cells), length)),
        "expression_bins": torch.randint(0, 53, (len(cells), length)),
        "attention_mask": torch.zeros(len(cells), length, dtype=torch.long),
    }
    for row, (cell, size) in enumerate(zip(cells, lengths, strict=True)):
        batch["input_ids"][row, :size] = cell["input_ids"]
        batch["expression_bins"][row, :size] = cell["expression_bins"]
        batch["attention_mask"][row, :size] = 1
    return batch


@pytest.fixture(scope="session")
def tokenizer() -> PanFoMaTokenizer:
    """The packaged tokenizer; tests must not change it."""
    return PanFoMaTokenizer()


def cells_of_counts(tokenizer: PanFoMaTokenizer, counts: np.ndarray, prefix: str) -> ad.AnnData:
    """Cells of these counts (cells, genes), of the first genes of the vocabulary, named ``prefix-0`` and so on."""
    cells = ad.AnnData(sp.csr_matrix(counts.astype("float32")))
    cells.var_names = tokenizer.convert_ids_to_tokens(list(range(1, counts.shape[1] + 1)))
    cells.obs_names = [f"{prefix}-{index}" for index in range(len(counts))]
    return cells


def small_cells(tokenizer: PanFoMaTokenizer) -> ad.AnnData:
    """48 cells x 40 genes of three types that differ in the genes they express."""
    rng = np.random.default_rng(0)
    types = np.arange(48) % 3
    rates = np.full((48, 40), 0.4)
    for kind in range(3):
        rates[types == kind, kind * 10 : kind * 10 + 10] = 6.0
    cells = cells_of_counts(tokenizer, rng.poisson(rates), "cell")
    cells.obs["cell_type"] = pd.Categorical(np.array(["B cell", "T cell", "mast"])[types])
    return cells


@pytest.fixture
def adata(tokenizer) -> ad.AnnData:
    """`small_cells`, for a test to change."""
    return small_cells(tokenizer)


@pytest.fixture(scope="session")
def baron() -> ad.AnnData:
    """Real cells: Baron's human pancreas, every 20th cell of the demo's data set, with all its genes."""
    from panfoma_hf.evaluation.public_tasks import baron_pancreas

    return baron_pancreas()[::20].copy()


def run_python(
    code: str, *arguments: str, without_package: bool = False, without: tuple[str, ...] = (), **environment: str
) -> str:
    """Run code in a fresh process and return what it printed; raise if it failed.

    ``without_package`` hides panfoma_hf and what only it requires, ``without`` other packages, as on a machine where
    they are not installed.
    """
    if without_package:
        without += ("panfoma_hf", "anndata", "datasets", "pandas", "scanpy", "sklearn")
    if without:
        hide = f"""
import sys
class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *arguments):
        return None if name.split(".")[0] in {without} else self.finder.find_spec(name, *arguments)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path = [Hiding(finder) for finder in sys.meta_path]
"""
        code = hide + code
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=ROOT,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="session")
def _trained_once(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "checkpoint"
    config = PanFoMaConfig.from_size("tiny", vocab_size=len(tokenizer))
    trainer = panfoma_hf.finetune(
        small_cells(tokenizer),
        "cell_type",
        folder,
        model=config,
        num_train_epochs=6,
        learning_rate=5e-3,
        disable_tqdm=True,
    )
    return folder, trainer.model


@pytest.fixture
def trained(_trained_once, tmp_path):
    """A checkpoint that was fine-tuned on the small cells, and its model: copies that a test may spoil."""
    folder, model = _trained_once
    shutil.copytree(folder, tmp_path / "checkpoint")
    return tmp_path / "checkpoint", copy.deepcopy(model)
