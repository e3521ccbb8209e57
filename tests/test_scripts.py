"""Every script runs on something small."""

import gzip
import subprocess
import sys

import pytest

import panfoma_hf
from tests.conftest import ROOT


def run_script(name, *arguments):
    result = subprocess.run(
        [sys.executable, ROOT / "scripts" / name, *map(str, arguments)], capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


HGNC = """hgnc_id\tsymbol\tlocus_type\tstatus\tlocation\tensembl_gene_id\tentrez_id\tprev_symbol\talias_symbol
HGNC:30\tGENE2\tRNA, long non-coding\tApproved\t1p\tENSG00000000002\t2\t"OLD2|OLDER2"\t
HGNC:4\tGENE1\tgene with protein product\tApproved\t1p\tENSG00000000001\t1\t\tG1
HGNC:5\tPSEUDO\tpseudogene\tApproved\t1p\t\t\t\t
HGNC:6\tMT-TX\tRNA, transfer\tApproved\tmitochondria\tENSG00000000003\t3\t\t
HGNC:7\tTX\tRNA, transfer\tApproved\t1p\tENSG00000000004\t4\t\t
HGNC:8\tGONE\tgene with protein product\tEntry Withdrawn\t1p\t\t\t\t
"""


@pytest.mark.parametrize("name", ["complete.txt", "complete.txt.gz"])
def test_the_gene_table_is_built_in_hgnc_order_and_the_same_each_time(name, tmp_path):
    source = tmp_path / name
    source.write_bytes(gzip.compress(HGNC.encode()) if name.endswith(".gz") else HGNC.encode())
    outputs = [tmp_path / "first.tsv.gz", tmp_path / "second.tsv.gz"]
    for output in outputs:
        run_script("build_gene_table.py", source, "--date", "2024-10-18", "--output", output)
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    lines = gzip.decompress(outputs[0].read_bytes()).decode().splitlines()
    assert "2024-10-18" in lines[0]
    assert [line.split("\t") for line in lines[2:]] == [
        ["1", "HGNC:4", "GENE1", "ENSG00000000001", "1", "protein-coding", "", "G1"],
        ["", "HGNC:5", "PSEUDO", "", "", "pseudogene", "", ""],
        ["2", "HGNC:6", "MT-TX", "ENSG00000000003", "3", "mitochondrial RNA", "", ""],
        ["", "HGNC:7", "TX", "ENSG00000000004", "4", "small RNA", "", ""],
        ["3", "HGNC:30", "GENE2", "ENSG00000000002", "2", "lncRNA", "OLD2|OLDER2", ""],
    ]


def test_the_report_of_gene_names_explains_what_is_not_covered(adata, tmp_path):
    adata.write_h5ad(tmp_path / "good.h5ad")
    adata.var_names = [*adata.var_names[:30], "MTRNR2L12", *(f"AC020656.{index}" for index in range(9))]
    adata.write_h5ad(tmp_path / "worse.h5ad")
    run_script("report_gene_names.py", tmp_path, "--report", tmp_path / "names.md")
    written = (tmp_path / "names.md").read_text()
    assert "| good | 40 of 40 | **100.00%** | 100.00% |" in written
    assert "1 of 2 files reach 97 %" in written
    assert "outside the vocabulary (1 names: MTRNR2L12)" in written
    assert "clone name (9 names: AC020656." in written


@pytest.mark.slow
def test_the_benchmark_prints_and_writes_its_tables(tmp_path):
    lengths = [
        argument
        for part in ("scan", "model", "floor", "growth", "training")
        for argument in (f"--{part}-lengths", "16", *(["32"] if part == "growth" else []))
    ]
    report = tmp_path / "performance.md"
    small = (
        "--sizes",
        "tiny",
        "--channels",
        "32",
        "--repeats",
        "1",
        "--tokens-per-batch",
        "32",
        "--no-peers",
        "--layer-genes",
        "16",
        "--token-cells",
        "50",
    )
    printed = run_script("benchmark_speed.py", *small, *lengths, "--device", "cpu", "--report", report)
    written = report.read_text()
    for heading in (
        "Counts to tokens",
        "The scan",
        "A bidirectional layer",
        "Whole models",
        "The model and its floor",
        "Growth with length",
        "Training",
    ):
        assert f"## {heading}" in written
        assert f"## {heading}" in printed
    assert "Transformers' fallback" in written
    assert "numba, channels last" in written
    assert (tmp_path / "growth.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_benchmark_of_inference_compares_with_memory(adata, tokenizer, tmp_path):
    config = panfoma_hf.PanFoMaConfig.from_size("tiny", vocab_size=len(tokenizer))
    options = {"model": config, "mode": "probe", "baselines": False, "disable_tqdm": True}
    panfoma_hf.finetune(adata, "cell_type", tmp_path / "model", **options)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    arguments = (tmp_path / "cells.h5ad", tmp_path / "model", "--cells", 100, "--out", tmp_path / "many")
    printed = run_script("benchmark_inference.py", *arguments)
    assert "| cells | 100 |" in printed
    assert "| same name as in memory | 100.0000% |" in printed
