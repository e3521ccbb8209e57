"""`panfoma check`: what it says of good and of bad files, to people and to programs."""

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from typer.testing import CliRunner

import panfoma_hf
from panfoma_cli import app
from panfoma_hf import doctor
from tests.conftest import run_python


@pytest.fixture
def real_file(baron, tmp_path):
    """97 real pancreas cells with a donor, a batch and a label that misses one cell."""
    cells = baron.copy()
    cells.obs["donor_id"] = pd.Categorical(np.where(np.arange(97) < 40, "one", "two"))
    cells.obs["Sample"] = "s1"
    cells.obs["cell_type"] = cells.obs["cell_type"].cat.set_categories(cells.obs["cell_type"].cat.categories)
    cells.obs.iloc[0, cells.obs.columns.get_loc("cell_type")] = np.nan
    cells.obs["n_counts"] = 1.0
    cells.write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


def run(*arguments):
    return CliRunner().invoke(app, ["check", *map(str, arguments)])


def test_a_good_file_is_described_and_ready(real_file, baron):
    before = real_file.read_bytes()
    result = run(real_file)
    assert result.exit_code == 0
    assert result.output.splitlines()[-1] == "ready"
    for line in (
        "cells       97",
        "genes       20,125",
        "expression  X, counts (whole numbers)",
        "looked at   all cells",
        "species     human",
        "donor       donor id (2: two, one)",
        "batch       Sample (1: s1)",
    ):
        assert line in result.output
    assert "1 missing" in result.output
    assert "n_counts" not in result.output
    assert "other spelling" in result.output
    assert real_file.read_bytes() == before
    assert [path.name for path in real_file.parent.iterdir()] == ["cells.h5ad"]


def test_the_report_as_json_holds_the_same(real_file, tokenizer, baron):
    result = run(real_file, "--json")
    facts = json.loads(result.stdout)
    assert facts["ready"] is True
    assert facts["problems"] == []
    assert facts["cells"] == 97
    assert facts["gene_names"]["resolved"] == tokenizer.resolve_genes(baron.var_names).num_resolved
    assert facts["gene_names"]["coverage"] > 0.98
    lengths = tokenizer.tokenize_cells(baron, max_length=3072).lengths
    assert facts["length"]["median"] == int(np.median(lengths))
    assert facts["length"]["longest"] == lengths.max()
    genes = np.diff(baron.X.indptr)
    assert facts["quality"]["median_genes"] == int(np.median(genes))
    assert facts["quality"]["below_200_genes"] == (genes < 200).sum()


def test_large_files_are_sampled_and_it_is_said(baron, tmp_path, monkeypatch):
    monkeypatch.setattr("panfoma_hf.data.cells.SAMPLE_CELLS", 48)
    baron.write_h5ad(tmp_path / "cells.h5ad")
    report = panfoma_hf.check(tmp_path / "cells.h5ad")
    assert report.facts["looked at"] == "48 cells, evenly spaced"
    assert report.facts["cells"] == 97
    assert report.is_ready


def test_mitochondrial_cells_and_cells_without_genes_are_counted(tokenizer, tmp_path):
    names = ["MT-CO1", *tokenizer.convert_ids_to_tokens(list(range(1, 300))), "eGFP"]
    counts = np.random.default_rng(0).integers(1, 5, (10, len(names)))
    counts[:3, 0] = 5_000
    counts[4, :-1] = 0
    counts[5, 20:] = 0
    ad.AnnData(sp.csr_matrix(counts), var=pd.DataFrame(index=names)).write_h5ad(tmp_path / "cells.h5ad")
    report = panfoma_hf.check(tmp_path / "cells.h5ad")
    quality = report.facts["quality"]
    assert quality["above_20%_mitochondrial"] == 3
    assert quality["below_200_genes"] == 2
    assert quality["without_a_known_gene"] == 1
    assert "cells without a known gene will be called Unassigned" in report.notes
    assert report.is_ready


def test_a_matrix_of_all_droplets_is_not_ready(tokenizer, tmp_path):
    names = tokenizer.convert_ids_to_tokens(list(range(1, 300)))
    counts = np.random.default_rng(0).integers(1, 5, (100, 299)) * (np.arange(100)[:, None] < 20)
    ad.AnnData(sp.csr_matrix(counts), var=pd.DataFrame(index=names)).write_h5ad(tmp_path / "raw.h5ad")
    result = run(tmp_path / "raw.h5ad")
    assert result.exit_code == 1
    assert "matrix of all droplets" in result.output


def bad_cells(kind, cells):
    if kind == "scaled":
        cells.X = cells.X.toarray() - 0.5
    elif kind == "mouse":
        cells.var_names = [name.capitalize() for name in cells.var_names]
    elif kind == "unknown":
        cells.var_names = [f"feature{index}" for index in range(cells.n_vars)]
    elif kind == "transposed":
        cells = cells.T.copy()
    return cells


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("scaled", "Expression must not be negative"),
        ("mouse", "PanFoMa reads human genes, got those of mouse or rat"),
        ("unknown", "At least 70% of the counts must be of genes"),
        ("transposed", "Cells must lie in rows"),
    ],
)
def test_a_bad_file_is_not_ready_and_the_remedy_is_said(kind, message, adata, tmp_path):
    bad_cells(kind, adata).write_h5ad(tmp_path / "cells.h5ad")
    result = run(tmp_path / "cells.h5ad")
    assert result.exit_code == 1
    assert "not ready:" in result.output
    assert message in result.output
    facts = json.loads(run(tmp_path / "cells.h5ad", "--json").stdout)
    assert facts["ready"] is False
    assert len(facts["problems"]) == 1
    assert facts["gene_names"]["genes"] == (48 if kind == "transposed" else 40)


def test_several_problems_are_said_at_once(adata, tmp_path):
    bad = bad_cells("mouse", bad_cells("scaled", adata))
    bad.write_h5ad(tmp_path / "cells.h5ad")
    assert len(panfoma_hf.check(tmp_path / "cells.h5ad").problems) == 2


@pytest.mark.parametrize("name", ["none.h5ad", "notes.txt", "empty.h5ad"])
def test_a_file_that_cannot_be_opened_is_not_ready(name, tmp_path):
    if name == "notes.txt":
        (tmp_path / name).write_text("x\n")
    elif name == "empty.h5ad":
        (tmp_path / name).touch()
    result = run(tmp_path / name)
    assert result.exit_code == 1
    assert name in result.output
    assert json.loads(run(tmp_path / name, "--json").stdout)["ready"] is False


def test_low_coverage_can_be_allowed(adata, tmp_path):
    adata.var_names = [*adata.var_names[:20], *(f"feature{index}" for index in range(20))]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    assert run(tmp_path / "cells.h5ad").exit_code == 1
    assert run(tmp_path / "cells.h5ad", "--min-coverage", 0.2).exit_code == 0
    assert run(tmp_path / "cells.h5ad", "--min-coverage", 2).exit_code == 2


def test_a_named_layer_and_column_are_read(adata, tmp_path):
    adata.layers["umi"] = adata.X.copy()
    adata.X = adata.X.toarray() - 1
    adata.var["hgnc"] = adata.var_names
    adata.var_names = [f"feature{index}" for index in range(40)]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    result = run(tmp_path / "cells.h5ad", "--layer", "umi", "--gene-column", "hgnc")
    assert result.exit_code == 0
    assert "layers['umi']" in result.output
    assert "got 'nonsense'" in run(tmp_path / "cells.h5ad", "--layer", "nonsense").output


def test_a_checkpoint_brings_its_genes_and_is_timed(trained, adata, tmp_path):
    folder, _ = trained
    adata.write_h5ad(tmp_path / "cells.h5ad")
    facts = json.loads(run(tmp_path / "cells.h5ad", "--model", folder, "--json").stdout)
    assert facts["ready"] is True
    assert facts["time"]["model_cells_per_s"] > 0
    assert facts["time"]["minutes_for_all_cells"] == pytest.approx(48 / facts["time"]["model_cells_per_s"] / 60)


def test_a_checkpoint_of_other_genes_is_a_problem(trained, adata, tmp_path):
    folder, _ = trained
    tokenizer = panfoma_hf.PanFoMaTokenizer.from_pretrained(folder)
    tokenizer.gene_set = [*adata.var_names[:2], "INS", "GCG", "SST", "PPY"]
    tokenizer.save_pretrained(folder)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    report = panfoma_hf.check(tmp_path / "cells.h5ad", folder)
    assert "At least 50% of the genes" in report.problems[0]
    assert "got 33.3%" in report.problems[0]


def test_the_command_is_there_and_a_mistyped_option_is_a_usage_error(tmp_path):
    assert run("--nonsense").exit_code == 2
    help_text = CliRunner().invoke(app, ["check", "--help"]).output
    assert "--model" in help_text
    assert "--json" in help_text
    printed = run_python(
        f"import sys; sys.argv = ['panfoma', 'check', {str(tmp_path / 'none.h5ad')!r}]\n"
        "import runpy\n"
        "try:\n    runpy.run_module('panfoma_hf', run_name='__main__')\n"
        "except SystemExit as stop:\n    print('exit', stop.code)"
    )
    assert "exit 1" in printed


@pytest.mark.parametrize(
    ("column", "role"),
    [
        ("cell_type", "cell type"),
        ("CellType", "cell type"),
        ("Cell.Ontology.Class", "cell type"),
        ("louvain", "cell type"),
        ("donor_id", "donor"),
        ("PatientID", "donor"),
        ("orig.ident", "batch"),
        ("tumor_site", "disease"),
        ("barcode", None),
    ],
)
def test_columns_are_told_by_their_names(column, role):
    obs = pd.DataFrame({column: list("aabb") * 3})
    assert doctor._columns_by_role(obs) == ({role: {column: "(2: a, b)"}} if role else {})


def test_columns_of_one_name_each_cell_or_of_numbers_are_no_labels():
    obs = pd.DataFrame({"sample_barcode": [str(index) for index in range(12)], "donor_age": np.linspace(20, 70, 12)})
    assert doctor._columns_by_role(obs) == {}
