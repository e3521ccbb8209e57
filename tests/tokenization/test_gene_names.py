"""Names of genes as files have them, each with the fact of HGNC (2024-10-18) that decides it."""

import gzip
import json
import pickle

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from panfoma_hf import PanFoMaTokenizer
from panfoma_hf.tokenization.gene_names import RULES


# name, symbol or None, rule, and why.
NAMES = [
    ("CD8A", "CD8A", "approved symbol", "HGNC:1706"),
    (" CD8A\t", "CD8A", "approved symbol", "white space"),
    ('"CD8A"', "CD8A", "approved symbol", "quotes of a csv"),
    ("cd8a", "CD8A", "other spelling", "case"),
    ("C9ORF72", "C9orf72", "other spelling", "HGNC writes orf in lower case"),
    ("c11orf31", "SELENOH", "other spelling", "C11orf31 is a previous symbol of SELENOH"),
    ("HLA.A", "HLA-A", "other spelling", "R's make.names turns a hyphen into a dot"),
    ("NKX2.1", "NKX2-1", "other spelling", "not NKX2 made unique: NKX2-1 is a gene"),
    ("NKX2-1", "NKX2-1", "approved symbol", "a real name that looks like a suffix"),
    ("IGHV3-30-3", "IGHV3-30-3", "approved symbol", "IGHV3-30 is a gene too"),
    ("HNRNPA2B1", "HNRNPA2B1", "approved symbol", ""),
    ("ENSG00000153563", "CD8A", "Ensembl id", "without version"),
    ("ENSG00000153563.15", "CD8A", "Ensembl id", "with version"),
    ("ensg00000153563.15_PAR_Y", "CD8A", "Ensembl id", "GENCODE's suffix, lower case"),
    ("CD8A_ENSG00000153563", "CD8A", "Ensembl id", "CELLxGENE's names of duplicated symbols"),
    ("ENSG00000153563|CD8A", "CD8A", "Ensembl id", "GEO's composite names"),
    ("SOD2_ENSG00000112096", "SOD2", "approved symbol", "the id was retired, the symbol holds"),
    ("ENSG00000112096", None, "unknown Ensembl id", "SOD2's retired id by itself"),
    ("ENSG00000230417", None, "ambiguous", "LINC00595 and LINC00856 share it"),
    ("ENSG00000269028", None, "outside the vocabulary", "MTRNR2L12, a pseudogene"),
    ("HGNC:1706", "CD8A", "HGNC id", ""),
    ("HGNC:99999999", None, "unknown", "no such number"),
    ("GeneID:925", "CD8A", "NCBI Gene id", ""),
    ("925", "CD8A", "NCBI Gene id", ""),
    ("GNB2L1", "RACK1", "previous symbol", ""),
    ("H3F3B", "H3-3B", "previous symbol", ""),
    ("MARCH3", "MARCHF3", "previous symbol", ""),
    ("MLL2", "KMT2D", "previous symbol", "an alias of KMT2B, but KMT2D was approved as MLL2"),
    ("MTND1", "MT-ND1", "previous symbol", ""),
    ("MT.ND1", "MT-ND1", "other spelling", ""),
    ("mt-nd1", "MT-ND1", "other spelling", ""),
    ("MT_CO1", "MT-CO1", "other spelling", ""),
    ("CYTB", "MT-CYB", "alias symbol", ""),
    ("CD20", "MS4A1", "previous symbol", "an alias of KRT20, but MS4A1 was approved as CD20"),
    ("p53", "TP53", "alias symbol", ""),
    ("MLL4", None, "ambiguous", "KMT2B and KMT2D"),
    ("COX1", None, "ambiguous", "MT-CO1 and PTGS1"),
    ("3-Mar", "MARCHF3", "spreadsheet date", "MARCH3; there is no MARC3"),
    ("1-Mar", None, "ambiguous", "MARCH1 and MARC1"),
    ("2021-03-01 00:00:00", None, "ambiguous", "MARCH1 and MARC1"),
    ("2021-09-09 00:00:00", "SEPTIN9", "spreadsheet date", "SEPT9"),
    ("Sep-09", "SEPTIN9", "spreadsheet date", "SEPT9"),
    ("9. Sep", "SEPTIN9", "spreadsheet date", "SEPT9, in German"),
    ("9/7/2020", "SEPTIN7", "spreadsheet date", "SEPT7; there is no JUL9"),
    ("15-Sep", "SELENOF", "spreadsheet date", "SEP15 is an alias of SELENOF; there is no SEPT15"),
    ("1-Dec", "DELEC1", "spreadsheet date", "DEC1 was approved for DELEC1, and is but an alias of BHLHE40"),
    ("31-Mar", None, "unknown", "no such gene"),
    ("40-Foo", None, "unknown", "no date"),
    ("ENSA-1", "ENSA", "made-unique suffix", "10x and scanpy"),
    ("ENSA.1", "ENSA", "made-unique suffix", "Seurat"),
    ("ENSG00000153563-1", "CD8A", "Ensembl id", ""),
    ("HLA.DRA.1", "HLA-DRA", "made-unique suffix", "only where HLA.DRA is there too"),
    ("HLA.DRA", "HLA-DRA", "other spelling", ""),
    ("MTRNR2L12", None, "outside the vocabulary", "a pseudogene"),
    ("GRCh38_CD8A", "CD8A", "approved symbol", "10x's prefix of two genomes"),
    ("GRCh38______CD8A", "CD8A", "approved symbol", "10x's older prefix"),
    ("hg19-CD8A", "CD8A", "approved symbol", ""),
    ("mm10___Cd8a", None, "other species", ""),
    ("ENSMUSG00000053977", None, "other species", "mouse Cd8a"),
    ("FBgn0000014", None, "other species", "a fly's"),
    ("ERCC-00046", None, "not a gene", "spike-in"),
    ("CD8_TotalSeqB", None, "not a gene", "antibody"),
    ("N_unmapped", None, "not a gene", "STAR's summary"),
    ("__no_feature", None, "not a gene", "HTSeq's summary"),
    ("ENST00000283635.7", None, "not a gene", "a transcript"),
    ("RP11-34P13.7", None, "clone name", "no gene of HGNC"),
    ("AC020656.1", None, "clone name", "no gene of HGNC"),
    ("eGFP", None, "unknown", ""),
    ("", None, "unknown", ""),
    ("NA", None, "unknown", "R's missing name; a previous symbol of XK"),
    ("nan", None, "unknown", "pandas' missing name"),
    ("ACE-2", None, "ambiguous", "the second ACE, or ACE2"),
]


@pytest.fixture(scope="module")
def resolution(tokenizer):
    return tokenizer.resolve_genes([name for name, *_ in NAMES])


@pytest.mark.parametrize("row", range(len(NAMES)), ids=[f"{name or 'empty'}: {why}" for name, _, _, why in NAMES])
def test_a_name_is_taken_for_what_hgnc_says(row, resolution, tokenizer):
    _, symbol, rule, _ = NAMES[row]
    assert resolution.rule[row] == rule
    assert rule in RULES
    token_id = tokenizer.convert_tokens_to_ids(symbol) if symbol else -1
    assert resolution.token_ids[row] == token_id
    if symbol:
        assert resolution.symbols[row] == symbol


def test_every_approved_symbol_is_itself(tokenizer):
    """Also where the same string is another gene's alias."""
    symbols = tokenizer.convert_ids_to_tokens(list(range(1, len(tokenizer))))
    resolution = tokenizer.resolve_genes(symbols)
    assert np.array_equal(resolution.token_ids, np.arange(1, len(tokenizer)))
    assert set(resolution.rule) == {"approved symbol"}
    for changed in (str.upper, str.lower, lambda symbol: symbol.replace("-", ".")):
        resolution = tokenizer.resolve_genes([changed(symbol) for symbol in symbols])
        # An alias or a previous symbol that is written just so comes first: 40 of them at most.
        assert np.mean(resolution.token_ids == np.arange(1, len(tokenizer))) > 0.998


def test_the_symbol_of_a_pseudogene_is_not_another_genes_alias(tokenizer):
    table = tokenizer._genes
    outside = [symbol for symbol, token in zip(table.all_symbols, table.token_of_row, strict=True) if token < 0]
    assert (tokenizer.resolve_genes(outside).token_ids == -1).all()


def test_a_suffix_of_an_uncertain_name_is_taken_off_only_beside_that_name(tokenizer):
    assert tokenizer.resolve_genes(["GNB2L1-1"]).rule.tolist() == ["unknown"]
    beside = tokenizer.resolve_genes(["GNB2L1", "GNB2L1-1", "GNB2L1-2"])
    assert beside.symbols.tolist() == ["RACK1"] * 3


def test_a_suffix_is_a_suffix_where_the_symbol_that_it_might_be_is_there_too(tokenizer):
    assert tokenizer.resolve_genes(["ACE", "ACE2", "ACE-2"]).symbols.tolist() == ["ACE", "ACE2", "ACE"]


def test_row_numbers_are_not_taken_for_ncbi_ids(tokenizer):
    assert tokenizer.resolve_genes([str(number) for number in range(1000)]).num_resolved == 0
    assert tokenizer.resolve_genes(np.arange(5, 800)).num_resolved == 0
    some = np.sort(np.random.default_rng(0).choice(36_000, 1000, replace=False))
    assert tokenizer.resolve_genes(some).num_resolved == 0
    ids = ["925", "926", "914", "100287102", "7157"]
    assert tokenizer.resolve_genes(ids).symbols[[0, 4]].tolist() == ["CD8A", "TP53"]


def test_an_added_token_comes_before_the_gene_of_that_name_outside_the_vocabulary():
    tokenizer = PanFoMaTokenizer()
    tokenizer.add_tokens(["MTRNR2L12"])
    resolution = tokenizer.resolve_genes(["MTRNR2L12", "CD8A"])
    assert resolution.rule.tolist() == ["added token", "approved symbol"]
    assert resolution.token_ids[0] == len(tokenizer) - 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        pytest.param("hgnc_id\tsymbol\nHGNC:5\tA1BG", "has a column token_id, got hgnc_id, symbol", id="no_token_ids"),
        pytest.param("{columns}\n2\tHGNC:5\tA1BG\t\t\tprotein-coding\t\t", "must be 1, 2, 3", id="gap"),
    ],
)
def test_a_gene_table_of_another_kind_is_an_error(rows, message, tmp_path):
    columns = "\t".join(
        [
            "token_id",
            "hgnc_id",
            "symbol",
            "ensembl_id",
            "ncbi_gene_id",
            "locus_group",
            "previous_symbols",
            "alias_symbols",
        ]
    )
    (tmp_path / "genes.tsv.gz").write_bytes(gzip.compress(f"# source\n{rows.format(columns=columns)}\n".encode()))
    with pytest.raises(ValueError, match=message):
        PanFoMaTokenizer(tmp_path / "genes.tsv.gz")


# -- report --------------------------------------------------------------------------------------------------------


def test_the_report_counts_names_by_rule_and_weighs_them(tokenizer):
    names = ["TP53", "p53", "GNB2L1", "COX1", "MTRNR2L12", "CD8_TotalSeqB", "eGFP"]
    resolution = tokenizer.resolve_genes(names, counts=np.array([50, 10, 20, 5, 10, 900, 5]))
    assert len(resolution) == 7
    assert resolution.num_resolved == 3
    assert resolution.coverage == 0.8  # antibodies are no expression
    assert resolution.duplicates == {"TP53": ["TP53", "p53"]}
    assert resolution.ambiguous == {"COX1": ("MT-CO1", "PTGS1")}
    printed = str(resolution)
    assert "resolved                       3    80.00%  of 7" in printed
    assert "counts added up for 1 genes of several columns: TP53 from TP53, p53" in printed
    assert "ambiguous: COX1 may be MT-CO1 or PTGS1" in printed
    assert "outside the vocabulary: pseudogene 1" in printed
    facts = json.loads(json.dumps(resolution.to_dict()))
    assert facts["rules"]["previous symbol"] == {"names": 1, "examples": ["GNB2L1"], "share_of_counts": 0.02}
    assert sum(row["names"] for row in facts["rules"].values()) == 7
    assert resolution.provenance()["coverage"] == 0.8
    assert "3 of 7 gene names resolved, 80.0% of the counts" in resolution.summary()
    with pytest.raises(ValueError, match="one number for each of the 7 names"):
        resolution.with_counts(np.ones(3))


def test_the_report_can_be_kept_in_an_h5ad(tokenizer, resolution, tmp_path):
    adata = ad.AnnData(np.ones((2, 2), dtype=np.float32), uns={"panfoma": resolution.provenance()})
    adata.write_h5ad(tmp_path / "cells.h5ad")
    assert ad.read_h5ad(tmp_path / "cells.h5ad").uns["panfoma"]["by_rule"]["ambiguous"] > 3


def test_names_are_resolved_once_and_what_comes_back_cannot_be_spoiled(tokenizer, baron):
    first = tokenizer.resolve_genes(baron.var_names)
    assert PanFoMaTokenizer().resolve_genes(list(baron.var_names)) is first
    with pytest.raises(ValueError, match="read-only"):
        first.token_ids[0] = 3
    assert pickle.loads(pickle.dumps(tokenizer)).resolve_genes(["CD8A"]).num_resolved == 1


def test_real_names_of_a_file_that_went_through_r_resolve(tokenizer, baron):
    resolution = tokenizer.resolve_genes(baron.var_names, np.asarray(baron.X.sum(0)).ravel())
    assert resolution.coverage > 0.98
    rule = dict(zip(resolution.names, resolution.rule, strict=True))
    assert rule["HLA.A"] == "other spelling"
    assert rule["CTGF"] == "previous symbol"


# -- refusals ------------------------------------------------------------------------------------------------------


MOUSE = ["Cd8a", "Cd3e", "Actb", "mt-Nd1", "Gm12345", "1700001C02Rik", "H2-Ab1", "Trp53"]


@pytest.mark.parametrize(
    ("names", "species"),
    [
        pytest.param(MOUSE, "mouse or rat", id="capitals"),
        pytest.param(["ENSMUSG00000053977", "ENSMUSG00000032093.8", "CD8A"], "mouse", id="mouse_ids"),
        pytest.param(["ENSRNOG00000007178", "ENSRNOG00000016846"], "rat", id="rat_ids"),
        pytest.param(["ENSDARG00000000001", "ENSDARG00000000002"], "zebrafish", id="zebrafish_ids"),
        pytest.param(["mm10_Cd8a", "mm10_Cd3e"], "mouse or rat", id="prefix"),
    ],
)
def test_other_species_are_refused_with_the_remedy(names, species, tokenizer):
    resolution = tokenizer.resolve_genes(names)
    assert resolution.species == species
    assert (resolution.rule == "other species").sum() >= len(names) - 2
    with pytest.raises(ValueError, match=rf"reads human genes, got those of {species}.*orthologues"):
        tokenizer(np.ones((1, len(names))), gene_names=names)


def test_some_names_in_mouse_style_among_human_ones_are_mended(tokenizer):
    resolution = tokenizer.resolve_genes(["CD8A", "CD3E", "ACTB", "Trac"])
    assert resolution.symbols.tolist() == ["CD8A", "CD3E", "ACTB", "TRAC"]
    assert resolution.species is None


def test_too_few_counts_on_known_genes_are_an_error_below_a_threshold(tokenizer):
    names, cells = ["CD8A", "TRAC", "eGFP"], np.array([[1, 1, 8]])
    with pytest.raises(
        ValueError, match=r"At least 50% of the counts .* got 20.0% in the matrix \(2 of 3 names\).* eGFP\. Name"
    ):
        tokenizer(cells, gene_names=names, min_coverage=0.5)
    assert len(tokenizer(cells, gene_names=names, min_coverage=0.2)["input_ids"][0]) == 2
    assert len(tokenizer(cells, gene_names=names)["input_ids"][0]) == 2
    with pytest.raises(ValueError, match="a share from 0 to 1, got 50"):
        tokenizer(cells, gene_names=names, min_coverage=50)
    with pytest.raises(ValueError, match="At least 90% of the gene names"):
        tokenizer.resolve_genes(names).require(0.9)


def test_columns_of_one_gene_are_added_up_by_whatever_name(tokenizer):
    names = ["CD8A", "LYZ", "ENSG00000153563.15", "CD8", "GNLY", "CD8A-1"]
    split = tokenizer.tokenize_cells(sp.csr_matrix([[1, 2, 4, 3, 12, 5]]), names)
    whole = tokenizer.tokenize_cells([[13, 2, 12]], ["CD8A", "LYZ", "GNLY"])
    assert np.array_equal(split.input_ids, whole.input_ids)
    assert np.array_equal(split.expression_bins, whole.expression_bins)


def test_a_data_frames_columns_are_resolved(tokenizer):
    frame = pd.DataFrame([[3, 1]], columns=["GNB2L1", "HLA.A"])
    ids = tokenizer(frame)["input_ids"][0]
    assert sorted(tokenizer.convert_ids_to_tokens(ids)) == ["HLA-A", "RACK1"]
