"""A corpus of made-up cells, small enough to pretrain on within a second or two."""

import shutil

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from panfoma_hf import Corpus, PanFoMaConfig, build_corpus, pretrain
from panfoma_hf.data.corpus import SourceList
from panfoma_hf.training import PretrainingTrainer, pretraining_trainer
from tests.conftest import cells_of_counts


NUM_GENES = 60
STUDIES = {"blood": ("normal", 4), "marrow": ("leukemia", 4), "skin": ("melanoma", 2), "judged": ("normal", 2)}


PEAK_FLOPS = 1e9


@pytest.fixture(scope="module", autouse=True)
def _cheap():
    """One thread, as models this small have no work for two; and no measuring of the machine in every run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretraining_trainer, "peak_flops", lambda device, dtype: (PEAK_FLOPS, "made up"))
        yield
    torch.set_num_threads(threads)


def made_up_cells(tokenizer, cancer_type: str, num_donors: int, seed: int) -> ad.AnnData:
    """Cells of two types, each with its own half of the genes high; of each cell, some genes are not seen."""
    generator = np.random.default_rng(seed)
    num_cells = 12 * num_donors
    types = np.arange(num_cells) % 2
    is_high = (np.arange(NUM_GENES) % 2)[None] == types[:, None]
    is_high ^= generator.random(is_high.shape) < 0.05
    counts = np.where(is_high, 9, 1) * (generator.random(is_high.shape) < generator.uniform(0.6, 1, (num_cells, 1)))
    cells = cells_of_counts(tokenizer, counts, f"{cancer_type}-{seed}")
    cells.obs["donor"] = [f"donor{index // 12}" for index in range(num_cells)]
    cells.obs["type"] = pd.Categorical(np.where(types, "odd", "even"))
    return cells


@pytest.fixture(scope="session")
def _corpus_once(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretraining")
    studies = {}
    for seed, (name, (cancer_type, num_donors)) in enumerate(STUDIES.items()):
        made_up_cells(tokenizer, cancer_type, num_donors, seed).write_h5ad(folder / f"{name}.h5ad")
        studies[name] = {
            "files": [f"{name}.h5ad"],
            "licence": "CC0",
            "citation": "Made up",
            "columns": {"donor_id": "donor", "cell_type": "type"},
            "values": {"cancer_type": cancer_type},
        }
    settings = {
        "name": "made-up",
        "description": "Made-up cells.",
        "licence": "cc0-1.0",
        "quality": {"min_genes": 5, "max_genes_mads": None, "max_counts_mads": None, "min_cells_per_gene": 1},
        "studies": studies,
    }
    return build_corpus(SourceList.model_validate(settings), folder / "corpus", root=folder)


@pytest.fixture
def corpus(_corpus_once) -> Corpus:
    """Four studies: one is to be held out, one has a cancer type to hold out."""
    return _corpus_once


@pytest.fixture
def changeable(_corpus_once, tmp_path) -> Corpus:
    """A copy that a test may damage."""
    shutil.copytree(_corpus_once.folder, tmp_path / "corpus")
    return Corpus.open(tmp_path / "corpus")


def tiny_model(tokenizer, **changes) -> PanFoMaConfig:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "chunk_size": 32, "state_size": 4}
    return PanFoMaConfig.from_size("tiny", vocab_size=len(tokenizer), **{**sizes, **changes})


ARGUMENTS = {
    "min_genes_measured": 10,
    "held_out_studies": ["judged"],
    "held_out_cancer_types": ["melanoma"],
    "tokens_per_batch": 256,
    "logging_steps": 1,
    "eval_strategy": "no",
    "save_strategy": "no",
    "disable_tqdm": True,
}


def run(corpus, folder, tokenizer, **changes):
    """Pretrain a tiny model for some steps."""
    return pretrain(corpus, folder, **{"model": tiny_model(tokenizer), **ARGUMENTS, "max_steps": 4, **changes})


def losses(trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def lines(trainer) -> list[dict]:
    """What was logged about training steps."""
    return [line for line in trainer.state.log_history if "gene_loss" in line]


class Killed(Exception):
    """What stops a run in a test."""


def before_step(patch: pytest.MonkeyPatch, step: int, action) -> None:
    """Have ``action(trainer)`` called when so many steps are done, before the next one."""
    training_step = PretrainingTrainer.training_step

    def patched(self, *args, **kwargs):
        if self.state.global_step == step:
            action(self)
        return training_step(self, *args, **kwargs)

    patch.setattr(PretrainingTrainer, "training_step", patched)


def kill(trainer):
    raise Killed


def damage(path) -> None:
    """Flip a bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
