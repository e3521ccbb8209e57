"""Small studies made of real cells, and the corpora that are built of them."""

import copy
import gzip
import shutil
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp

from panfoma_hf import Corpus, build_corpus
from panfoma_hf.data.corpus import SourceList


# Every way in which what the list says of a study can differ: columns, values and neither; counts and logarithms; other
# thresholds; cells to leave out; words to rename and to drop. One study's name starts another's, which makes the order
# of rows differ with the way in which paths are compared.
SOURCES = {
    "name": "tiny",
    "description": "Pancreas cells of invented patients.",
    "licence": "cc-by-4.0",
    "quality": {"min_genes": 1000, "max_mitochondrial": 0.2, "max_genes_mads": 1.5, "min_sample_cells": 10},
    "vocabularies": {"cancer_type": ["normal", "insulinoma", "pancreatic ductal adenocarcinoma"]},
    "studies": {
        "islets": {
            "files": ["islets/*.h5ad"],
            "licence": "CC BY 4.0",
            "citation": "Baron et al. | Cell Systems 2016",
            "url": "https://doi.org/10.1016/j.cels.2016.08.011",
            "columns": {
                "donor_id": "patient",
                "cell_type": "cell_type",
                "cancer_type": "diagnosis",
                "is_malignant": "malignant",
            },
            "values": {"tissue": "pancreas"},
            "labels": {
                "cell_type": {
                    "gamma": "PP cell",
                    "quiescent_stellate": "stellate cell",
                    "acinar": None,
                    "t_cell": None,
                },
                "cancer_type": {"PDAC": "pancreatic ductal adenocarcinoma", "?": None},
                "is_malignant": {"yes": True, "no": False, "unclear": None},
            },
            "exclude": {"state": ["dying"]},
        },
        "islets-2": {
            "files": ["more.csv"],
            "licence": "MIT",
            "citation": "Unpublished",
            "values": {"cancer_type": "normal", "is_malignant": False},
            "quality": {"min_genes": 850, "min_cells_per_gene": 2},
        },
        "tumour": {
            "files": ["tumour"],
            "licence": "CC0",
            "citation": "Unpublished",
            "values": {"donor_id": "p1", "cancer_type": "pancreatic ductal adenocarcinoma", "assay": "10x 3' v2"},
        },
    },
}


def sources(**changes: Any) -> dict[str, Any]:
    """`SOURCES`, for a test to change."""
    return {**copy.deepcopy(SOURCES), **changes}


def build(settings: dict[str, Any], root: Path, out: Path, **options: Any) -> Corpus:
    return build_corpus(SourceList.model_validate(settings), out, root=root, progress=False, **options)


def public_files(folder: Path) -> dict[str, bytes]:
    """What is in a corpus' folder but this machine's own notes, by path."""
    paths = [path.relative_to(folder) for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path): (folder / path).read_bytes() for path in paths if not path.parts[0].startswith(".")}


@pytest.fixture(scope="session")
def raw_cells(baron) -> dict[str, ad.AnnData]:
    """The cells of every file of `SOURCES`, by path, with what is written of them."""
    cells = {
        "islets/one.h5ad": baron[:30].copy(),
        "islets/two.h5ad": baron[30:55].copy(),
        "more.csv": baron[55:72].copy(),
        "tumour": baron[72:].copy(),
    }
    one, two = cells["islets/one.h5ad"], cells["islets/two.h5ad"]
    one.obs["patient"] = ["d1"] * 15 + ["d2"] * 15
    one.obs["diagnosis"] = ["PDAC"] * 15 + ["insulinoma"] * 12 + ["?"] * 3
    one.obs["malignant"] = ["yes", "no", "unclear"] * 10
    one.obs["state"] = ["dying"] * 2 + ["fine"] * 28
    two.obs["patient"] = ["d2"] * 10 + ["d3"] * 15
    two.obs["diagnosis"] = "insulinoma"
    two.obs["malignant"] = pd.Categorical(["no"] * 20 + [None] * 5)
    two.obs["state"] = "fine"
    # Counts of 10,000 and their logarithm, as many a published file holds.
    scaled = sp.diags(1e4 / two.X.sum(1).A1) @ two.X
    two.X = scaled.astype("float32").log1p().tocsr()
    # Baron's file has no mitochondrial genes: one stands in for them, high in two cells.
    tumour = cells["tumour"]
    counts = tumour.X.tolil()
    counts[:, 0] = 50
    counts[[3, 4], 0] = 9000
    tumour.X = counts.tocsr().astype("float32")
    tumour.var_names = ["MT-CO1", *tumour.var_names[1:]]
    return cells


@pytest.fixture(scope="session")
def _raw_once(raw_cells, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("raw")
    for path, cells in raw_cells.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith(".h5ad"):
            cells.write_h5ad(root / path)
        elif path.endswith(".csv"):
            cells.to_df().astype(int).to_csv(root / path)
        else:
            write_10x(cells, root / path)
    return root


def write_10x(cells: ad.AnnData, folder: Path) -> None:
    folder.mkdir(parents=True)
    with gzip.open(folder / "matrix.mtx.gz", "wb", compresslevel=1) as file:
        scipy.io.mmwrite(file, cells.X.T.astype(int))
    pd.DataFrame(cells.obs_names).to_csv(folder / "barcodes.tsv.gz", sep="\t", header=False, index=False)
    features = pd.DataFrame({"id": cells.var_names, "name": cells.var_names, "type": "Gene Expression"})
    features.to_csv(folder / "features.tsv.gz", sep="\t", header=False, index=False)


@pytest.fixture(scope="session")
def _built_once(_raw_once, tmp_path_factory) -> Corpus:
    return build(sources(), _raw_once, tmp_path_factory.mktemp("built") / "corpus")


@pytest.fixture(scope="session")
def corpus(_built_once) -> Corpus:
    """The corpus of `SOURCES`; tests must not change its folder."""
    return Corpus.open(_built_once.folder)


@pytest.fixture
def raw(_raw_once, tmp_path) -> Path:
    """The files of `SOURCES`, for a test to change."""
    return shutil.copytree(_raw_once, tmp_path / "raw")


@pytest.fixture
def changeable(_built_once, tmp_path) -> Corpus:
    """A copy of `corpus` that a test may change or build again."""
    return Corpus.open(shutil.copytree(_built_once.folder, tmp_path / "corpus"))


# -- many small files ------------------------------------------------------------------------------------------------

NUM_PARTS = 5


def part_sources(num_files: int = NUM_PARTS, **changes: Any) -> dict[str, Any]:
    """A source list of files of a few cells, each a study with two donors; one cell is to be left out."""
    study = {
        "licence": "CC0",
        "citation": "Unpublished",
        "columns": {"donor_id": "donor", "cell_type": "cell_type"},
    }
    studies = {f"s{number}": {**study, "files": [f"{number}.h5ad"]} for number in range(num_files)}
    studies["s0"]["exclude"] = {"state": ["dying"]}
    return {
        "name": "parts",
        "quality": {"min_genes": 10, "min_cells_per_gene": 2},
        "studies": studies,
        "splits": {"donor": {"by": "donor", "test": 0.3, "validation": 0.0}},
        **changes,
    }


@pytest.fixture(scope="session")
def part_cells(baron) -> list[ad.AnnData]:
    """(files,), eight real cells each with the 2,000 genes that most cells express."""
    most = np.sort(np.argsort(-(baron.X > 0).sum(0).A1, kind="stable")[:2000])
    parts = []
    for number in range(NUM_PARTS):
        part = baron[8 * number : 8 * number + 8, most].copy()
        part.obs["donor"] = ["a", "b"] * 4
        part.obs["state"] = ["fine"] * 7 + ["dying" if number == 0 else "fine"]
        parts.append(part)
    return parts


@pytest.fixture(scope="session")
def _parts_once(part_cells, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("parts")
    for number, cells in enumerate(part_cells):
        cells.write_h5ad(root / f"{number}.h5ad")
    return root


@pytest.fixture
def parts(_parts_once, tmp_path) -> Path:
    """The files of `part_sources`, for a test to change."""
    return shutil.copytree(_parts_once, tmp_path / "parts")


@pytest.fixture(scope="session")
def undisturbed(_parts_once, tmp_path_factory) -> dict[str, bytes]:
    """Every public file of the corpus of `part_sources` as one process builds it, by path."""
    out = tmp_path_factory.mktemp("undisturbed") / "corpus"
    build(part_sources(), _parts_once, out)
    return public_files(out)
