"""Counts to tokens: bins, genes, padding, saving, bad input."""

import gzip
import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from transformers import AutoTokenizer, BatchEncoding

from panfoma_hf import PanFoMaConfig, PanFoMaTokenizer
from panfoma_hf.tokenization.expression import draw_order, quantile_bins
from tests.conftest import ROOT


GENES = ["CD3E", "CD8A", "MS4A1", "LYZ", "GNLY", "MT-CO1", "TRAC", "IGKC", "MALAT1"]


def tokens_of(encoding, row=0):
    """Bins of each gene of one cell, by symbol."""
    keep = np.asarray(encoding["attention_mask"][row], dtype=bool)
    ids, bins = np.asarray(encoding["input_ids"][row])[keep], np.asarray(encoding["expression_bins"][row])[keep]
    return dict(zip(ids.tolist(), bins.tolist(), strict=True))


# -- bins ----------------------------------------------------------------------------------------------------------


def naive_bins(values, num_bins):
    """Middle rank of each value among its cell's values, as a quantile, in whole numbers."""
    bins = []
    for value in values:
        low, high = sum(other < value for other in values), sum(other <= value for other in values)
        bins.append(1 + num_bins * (low + high) // (2 * len(values)))
    return bins


@pytest.mark.parametrize("num_bins", [1, 5, 50])
def test_bins_are_middle_ranks_within_each_cell(num_bins):
    rng = np.random.default_rng(0)
    cells = [rng.poisson(2, size).astype(float) + 1 for size in (1, 2, 7, 200)]
    values, owners = np.concatenate(cells), np.repeat([3, 0, 9, 4], [1, 2, 7, 200])
    shuffle = rng.permutation(len(values))
    bins = np.empty(len(values), dtype=int)
    bins[shuffle] = quantile_bins(values[shuffle], owners[shuffle], num_bins)
    expected = [bin_id for cell in cells for bin_id in naive_bins(cell.tolist(), num_bins)]
    assert bins.tolist() == expected
    assert 1 <= bins.min() <= bins.max() <= num_bins


def test_distinct_values_fill_the_bins_evenly():
    bins = quantile_bins(np.random.default_rng(0).permutation(1000) + 1.0, np.zeros(1000, dtype=int), 50)
    assert np.bincount(bins).tolist() == [0] + [20] * 50


def test_bins_of_no_values_are_no_bins():
    assert quantile_bins(np.array([]), np.array([], dtype=int), 50).shape == (0,)


def test_rescaling_a_real_cells_counts_changes_no_token(tokenizer, baron):
    """Columns of one gene among them: what they add up to must not depend on the scale that they come in."""
    counts = baron.X.toarray().astype(np.float64)
    cpm = counts / counts.sum(1, keepdims=True) * 1e6
    scales = {
        "cpm": cpm,
        "float32 cpm": cpm.astype(np.float32),
        "log1p(cpm)": np.log1p(cpm),
        "float32 log1p": np.log1p(cpm.astype(np.float32)),
        "log2(1 + cpm)": np.log2(1 + cpm),
    }
    assert len(tokenizer.resolve_genes(baron.var_names).duplicates) >= 20
    expected = tokenizer.tokenize_cells(counts, baron.var_names)
    assert expected.lengths.min() > 500
    for name, matrix in scales.items():
        got = tokenizer.tokenize_cells(matrix, baron.var_names)
        assert np.array_equal(got.input_ids, expected.input_ids), name
        assert np.array_equal(got.expression_bins, expected.expression_bins), name


def test_a_cells_tokens_do_not_depend_on_the_cells_beside_it_where_logarithms_are_added_up(tokenizer, baron):
    counts = baron.X[:12].toarray().astype(np.float64)
    mixed = np.vstack([np.log1p(counts[:4] / 3), counts[4:8], np.log2(1 + counts[8:] * 1.7)])
    together = tokenizer.tokenize_cells(mixed, baron.var_names)
    plain = tokenizer.tokenize_cells(counts, baron.var_names)
    for index in range(12):
        alone = tokenizer.tokenize_cells(mixed[index], baron.var_names)
        assert np.array_equal(alone.expression_bins, together.cell(index)["expression_bins"])
        assert np.array_equal(alone.expression_bins, plain.cell(index)["expression_bins"])


def test_any_monotone_scale_of_one_column_a_gene_changes_no_token(tokenizer, baron):
    resolution = tokenizer.resolve_genes(baron.var_names)
    alone = ~np.isin(resolution.symbols, list(resolution.duplicates))
    counts, names = baron.X.toarray()[:, alone].astype(np.float64), baron.var_names[alone]
    expected = tokenizer.tokenize_cells(counts, names)
    for scale in (np.sqrt, np.arcsinh, lambda x: x**3):
        assert np.array_equal(tokenizer.tokenize_cells(scale(counts), names).expression_bins, expected.expression_bins)


# -- genes ---------------------------------------------------------------------------------------------------------


def test_the_table_holds_the_promised_loci_once_each(tokenizer):
    lines = gzip.decompress((ROOT / "panfoma_hf/tokenization/genes.tsv.gz").read_bytes()).decode().splitlines()
    table = pd.DataFrame([line.split("\t") for line in lines[2:]], columns=lines[1].split("\t"))
    assert "2024-10-18" in lines[0]
    assert table["symbol"].is_unique
    assert table["hgnc_id"].is_unique
    outside = table[table["token_id"] == ""]
    assert outside["locus_group"].value_counts()["pseudogene"] > 14_000
    assert set(outside["locus_group"]) == {"pseudogene", "small RNA", "other locus"}
    table = table[table["token_id"] != ""]
    assert table["token_id"].tolist() == [str(token_id) for token_id in range(1, len(tokenizer))]
    sizes = table["locus_group"].value_counts()
    assert sizes["protein-coding"] > 19_000
    assert sizes["lncRNA"] > 5_000
    assert (sizes["immunoglobulin"], sizes["T-cell receptor"]) == (230, 205)
    # 13 protein-coding genes, 22 transfer RNAs and 2 ribosomal RNAs make a mitochondrial genome.
    mitochondrial = table[table["symbol"].str.startswith("MT-")]["locus_group"].value_counts()
    assert (mitochondrial["protein-coding"], mitochondrial["mitochondrial RNA"]) == (13, 24)
    assert (table["ensembl_id"].str.fullmatch(r"ENSG\d{11}") | (table["ensembl_id"] == "")).all()
    gene = table[table["symbol"] == "SEPTIN4"].iloc[0]
    assert "SEPT4" in gene["previous_symbols"].split("|")


def test_vocabulary_and_ids_belong_together(tokenizer):
    vocabulary = tokenizer.get_vocab()
    assert len(tokenizer) == len(vocabulary) == PanFoMaConfig().vocab_size
    assert sorted(vocabulary.values()) == list(range(len(tokenizer)))
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("[PAD]", 0)
    ids = tokenizer.convert_tokens_to_ids(GENES)
    assert tokenizer.convert_ids_to_tokens(ids) == GENES
    assert tokenizer.decode([*ids, 0], skip_special_tokens=True) == " ".join(GENES)
    assert (tokenizer.mask_bin_id, tokenizer.pad_bin_id) == (PanFoMaConfig().mask_bin_id, PanFoMaConfig().pad_bin_id)


def test_columns_of_one_gene_are_added_up(tokenizer):
    split = tokenizer([[1, 2, 4, 2]], gene_names=["CD8A", "LYZ", "ENSG00000153563.15", "GNLY"])
    whole = tokenizer([[5, 2, 2]], gene_names=["CD8A", "LYZ", "GNLY"])
    assert tokens_of(split) == tokens_of(whole)
    assert len(split["input_ids"][0]) == 3


def test_tokens_do_not_depend_on_what_else_is_in_the_file(tokenizer, baron):
    """Neither on unknown genes, nor on the order of genes, nor on other cells, nor on genes outside the gene set."""
    counts, names = baron.X.toarray(), np.array(baron.var_names)
    order = np.random.default_rng(0).permutation(len(names))
    shuffled = sp.csc_matrix(np.hstack([counts[:, order], np.full((len(counts), 1), 99)]))
    expected = tokenizer.tokenize_cells(counts, names)
    got = tokenizer.tokenize_cells(shuffled[3:5], [*names[order], "not a gene"])
    for index in (0, 1):
        for key, values in got.cell(index).items():
            assert np.array_equal(values, expected.cell(3 + index)[key])

    panel = PanFoMaTokenizer(gene_set=["INS", "GCG", "SST", "PPY", "GHRL", "PRSS1", "KRT19", "VWF"])
    columns = np.isin(names, panel.gene_set)
    narrow, wide = panel.tokenize_cells(counts[:, columns], names[columns]), panel.tokenize_cells(counts, names)
    assert np.array_equal(narrow.input_ids, wide.input_ids)
    assert np.array_equal(narrow.expression_bins, wide.expression_bins)


def test_only_expressed_genes_become_tokens_and_stored_zeros_do_not(tokenizer):
    stored = sp.csr_matrix((np.array([3.0, 0.0, 1.0]), np.array([0, 1, 2]), np.array([0, 3])), shape=(1, 3))
    assert stored.nnz == 3
    encoding = tokenizer(stored, gene_names=GENES[:3])
    assert sorted(tokenizer.convert_ids_to_tokens(encoding["input_ids"][0])) == ["CD3E", "MS4A1"]


# -- large cells -----------------------------------------------------------------------------------------------------


def test_large_cells_keep_a_draw_of_genes_that_ignores_expression(tokenizer, baron):
    whole = tokenizer.tokenize_cells(baron)
    kept = tokenizer.tokenize_cells(baron, max_length=500)
    assert (kept.lengths == 500).all()
    shares = []
    for index in range(len(whole)):
        first, rest = np.split(whole.cell(index)["input_ids"], [500])
        assert np.array_equal(kept.cell(index)["input_ids"], first)
        bins = whole.cell(index)["expression_bins"]
        shares.append(bins[:500].mean() / bins[500:].mean() if len(rest) else 1)
    # Neither the highest nor the lowest genes: the same mean bin, on average over cells.
    assert np.mean(shares) == pytest.approx(1, abs=0.03)


def test_the_draw_order_is_a_permutation_that_never_changes():
    order = draw_order(25_533)
    assert np.array_equal(np.sort(order), np.arange(25_533))
    # SplitMix64 in whole numbers. A change here would give every saved model other chunks.
    mixed = []
    for token_id in range(25_533):
        z = (token_id + 1) * 0x9E3779B97F4A7C15 % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        mixed.append(z ^ z >> 31)
    assert np.argsort(order).tolist() == sorted(range(25_533), key=mixed.__getitem__)
    neighbours = np.abs(np.diff(order)).mean()
    assert neighbours == pytest.approx(25_533 / 3, rel=0.02)  # as for a random permutation


def test_truncation_is_on_unless_switched_off(baron):
    tokenizer = PanFoMaTokenizer(model_max_length=100)
    assert len(tokenizer(baron[:1])["input_ids"][0]) == 100
    assert len(tokenizer(baron[:1], truncation=False)["input_ids"][0]) > 500
    assert len(tokenizer(baron[:1], max_length=7)["input_ids"][0]) == 7


# -- inputs and outputs ----------------------------------------------------------------------------------------------


MATRIX = np.array([[5, 0, 2, 1, 0, 0, 0, 0, 9], [0, 0, 0, 3, 3, 0, 0, 0, 0]], dtype=np.float32)


@pytest.mark.parametrize(
    "cells",
    [
        pytest.param(MATRIX, id="dense"),
        pytest.param(MATRIX.astype(np.int32).tolist(), id="lists"),
        pytest.param(sp.csr_matrix(MATRIX), id="csr"),
        pytest.param(sp.csc_matrix(MATRIX), id="csc"),
        pytest.param(sp.csr_array(MATRIX), id="csr_array"),
        pytest.param(torch.tensor(MATRIX, dtype=torch.bfloat16, requires_grad=True), id="torch"),
        pytest.param(MATRIX.astype(np.uint8), id="bytes"),
        pytest.param(np.asfortranarray(MATRIX, dtype=np.float16), id="fortran_half"),
    ],
)
def test_every_kind_of_matrix_gives_the_same_tokens(cells, tokenizer):
    encoding = tokenizer(cells, gene_names=GENES)
    assert isinstance(encoding, BatchEncoding)
    assert set(encoding) == {"input_ids", "expression_bins", "attention_mask"}
    assert encoding["attention_mask"] == [[1] * 4, [1] * 2]
    genes = tokenizer.convert_tokens_to_ids(["CD3E", "MS4A1", "LYZ", "MALAT1"])
    assert tokens_of(encoding) == dict(zip(genes, [32, 19, 7, 44], strict=True))
    assert set(tokens_of(encoding, 1).values()) == {26}


def test_an_anndata_and_a_data_frame_bring_their_own_names(tokenizer):
    expected = tokenizer(MATRIX, gene_names=GENES)
    frame = pd.DataFrame(MATRIX, columns=GENES)
    assert tokenizer(frame) == expected
    assert tokenizer(frame.astype("Int64")) == expected
    adata = ad.AnnData(-MATRIX, var=pd.DataFrame({"id": GENES}, index=[f"gene{i}" for i in range(9)]))
    adata.layers["counts"] = sp.csr_matrix(MATRIX)
    assert tokenizer(adata, gene_column="id") == expected
    with pytest.raises(ValueError, match="negative values in X"):
        tokenizer(adata, gene_column="id", layer="X")


def test_an_anndatas_counts_are_looked_for_in_layers_then_raw_then_x(tokenizer):
    adata = ad.AnnData(MATRIX + 1, var=pd.DataFrame(index=GENES))
    assert len(tokenizer(adata)["input_ids"][0]) == 9
    adata.raw = ad.AnnData(sp.csr_matrix(MATRIX), var=pd.DataFrame(index=GENES))
    assert len(tokenizer(adata)["input_ids"][0]) == 4
    adata.layers["counts"] = (MATRIX > 4).astype(float)
    assert len(tokenizer(adata)["input_ids"][0]) == 2
    assert len(tokenizer(adata, layer="raw")["input_ids"][0]) == 4
    assert len(tokenizer(adata, layer="X")["input_ids"][0]) == 9


def test_an_anndata_on_disk_is_read(tokenizer, tmp_path):
    ad.AnnData(sp.csr_matrix(MATRIX), var=pd.DataFrame(index=GENES)).write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    assert tokenizer(backed) == tokenizer(MATRIX, gene_names=GENES)
    backed.file.close()


def test_one_cell_gives_flat_lists_and_tensors_with_a_batch_of_one(tokenizer):
    one = tokenizer(MATRIX[0], gene_names=GENES)
    assert one["input_ids"] == tokenizer(MATRIX, gene_names=GENES)["input_ids"][0]
    assert tokenizer(MATRIX[0], gene_names=GENES, return_tensors="pt")["input_ids"].shape == (1, 4)
    assert tokenizer(MATRIX[0].tolist(), gene_names=GENES, padding="max_length", max_length=6)["attention_mask"] == [
        *[1] * 4,
        *[0] * 2,
    ]


@pytest.mark.parametrize(
    ("arguments", "length"),
    [
        ({"padding": True}, 4),
        ({"padding": "longest", "pad_to_multiple_of": 8}, 8),
        ({"padding": "max_length", "max_length": 6}, 6),
    ],
)
@pytest.mark.parametrize("return_tensors", ["pt", "np", None])
def test_padding(arguments, length, return_tensors, tokenizer):
    encoding = tokenizer(MATRIX, gene_names=GENES, return_tensors=return_tensors, **arguments)
    kinds = {"pt": torch.Tensor, "np": np.ndarray, None: list}
    for key, filler in {"input_ids": 0, "expression_bins": 52, "attention_mask": 0}.items():
        values = encoding[key]
        assert isinstance(values, kinds[return_tensors])
        assert np.shape(values) == (2, length)
        assert (np.asarray(values)[1, 2:] == filler).all()


def test_pad_takes_what_a_data_loader_gives(tokenizer):
    cells = [tokenizer(row, gene_names=GENES) for row in MATRIX]
    expected = tokenizer(MATRIX, gene_names=GENES, padding=True, return_tensors="pt")
    for batch in (cells, {key: [cell[key] for cell in cells] for key in cells[0]}):
        padded = tokenizer.pad(batch, return_tensors="pt")
        assert all(torch.equal(padded[key], expected[key]) for key in expected)
    arrays = [{"input_ids": np.array(c["input_ids"]), "expression_bins": np.array(c["expression_bins"])} for c in cells]
    padded = tokenizer.pad([{**cell, "labels": index} for index, cell in enumerate(arrays)], return_tensors="pt")
    assert torch.equal(padded["attention_mask"], expected["attention_mask"])
    assert padded["labels"].tolist() == [0, 1]


def test_ragged_cells_without_padding_cannot_be_tensors(tokenizer):
    with pytest.raises(ValueError, match="padding"):
        tokenizer(MATRIX, gene_names=GENES, return_tensors="pt")


def test_an_empty_cell_is_flagged_and_all_padding(tokenizer, caplog):
    empty = np.vstack([MATRIX, np.zeros(9)])
    encoding = tokenizer(empty, gene_names=GENES, padding=True, return_tensors="pt")
    assert encoding["attention_mask"].sum(1).tolist() == [4, 2, 0]
    assert "1 of 3 cells have no expressed gene of the vocabulary (2)" in caplog.text
    alone = tokenizer(np.zeros((1, 9)), gene_names=GENES, padding=True, return_tensors="pt")
    assert alone["input_ids"].tolist() == [[0]]


# -- saving ----------------------------------------------------------------------------------------------------------


def test_save_and_load_keep_genes_set_and_lengths(tmp_path):
    tokenizer = PanFoMaTokenizer(gene_set=["ENSG00000153563.15", "LYZ", "LYZ"], model_max_length=64)
    tokenizer.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "expression.py",
        "gene_names.py",
        "genes.tsv.gz",
        "token_kernels.py",
        "tokenization_panfoma.py",
        "tokenizer_config.json",
        "value_scale.py",
    }
    for loaded in (PanFoMaTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert type(loaded) is PanFoMaTokenizer
        assert loaded.gene_set == ["CD8A", "LYZ"]
        assert loaded.model_max_length == 64
        assert loaded.get_vocab() == tokenizer.get_vocab()
        assert loaded(np.ones((1, 9)), gene_names=GENES) == tokenizer(np.ones((1, 9)), gene_names=GENES)
    unrestricted = AutoTokenizer.from_pretrained(tmp_path, gene_set=None)
    assert unrestricted.gene_set is None


def test_the_gene_set_can_be_changed_and_is_saved_as_it_stands(tmp_path):
    tokenizer = PanFoMaTokenizer()
    tokenizer.gene_set = ["LYZ"]
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).gene_set == ["LYZ"]


def test_added_genes_are_tokens_and_survive_saving(tmp_path):
    tokenizer = PanFoMaTokenizer()
    tokenizer.add_tokens(["CAR-construct"])
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == len(PanFoMaTokenizer()) + 1
    encoding = loaded([[3, 1]], gene_names=["CAR-construct", "LYZ"])
    assert sorted(loaded.convert_ids_to_tokens(encoding["input_ids"][0])) == ["CAR-construct", "LYZ"]
    assert loaded.resolve_genes(["CAR-construct"]).rule.tolist() == ["added token"]


def test_a_checkpoint_without_its_gene_table_is_an_error(tmp_path):
    PanFoMaTokenizer().save_pretrained(tmp_path)
    (tmp_path / "genes.tsv.gz").unlink()
    with pytest.raises(ValueError, match=r"needs its gene table genes\.tsv\.gz"):
        AutoTokenizer.from_pretrained(tmp_path)


def test_a_checkpoint_with_another_gene_table_is_an_error(tmp_path):
    PanFoMaTokenizer().save_pretrained(tmp_path)
    lines = gzip.decompress((tmp_path / "genes.tsv.gz").read_bytes()).splitlines(keepends=True)
    (tmp_path / "genes.tsv.gz").write_bytes(gzip.compress(b"".join(lines[:-1])))
    with pytest.raises(ValueError, match="another or a damaged one"):
        AutoTokenizer.from_pretrained(tmp_path)


def test_saved_files_hold_no_path_of_this_machine(tmp_path):
    PanFoMaTokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert str(ROOT) not in json.dumps(config)
    assert config["auto_map"]["AutoTokenizer"][0] == "tokenization_panfoma.PanFoMaTokenizer"


# -- bad input -------------------------------------------------------------------------------------------------------


def changed(value):
    matrix = MATRIX.copy()
    matrix[0, 0] = value
    return matrix


@pytest.mark.parametrize(
    ("cells", "names", "error", "message"),
    [
        pytest.param(changed(-1), GENES, ValueError, "1 negative values in the matrix, the lowest -1", id="negative"),
        pytest.param(sp.csr_matrix(changed(-2)), GENES, ValueError, "negative", id="negative_sparse"),
        pytest.param(changed(np.nan), GENES, ValueError, "1 NaN or infinite", id="nan"),
        pytest.param(sp.csr_matrix(changed(np.inf)), GENES, ValueError, "1 NaN or infinite", id="infinite_sparse"),
        pytest.param(MATRIX, GENES[:5], ValueError, "got 5 names for 9 columns", id="too_few_names"),
        pytest.param(MATRIX.T, GENES, ValueError, "transpose it", id="genes_in_rows"),
        pytest.param(MATRIX, None, ValueError, "needs `gene_names`", id="no_names"),
        pytest.param(MATRIX, ["x"] * 9, ValueError, r"got none of 9 \(x, x, x, ...\)", id="no_known_gene"),
        pytest.param(MATRIX[None], GENES, ValueError, "3 dimensions", id="three_dimensions"),
        pytest.param(MATRIX.astype(str), GENES, TypeError, "real numbers", id="strings"),
        pytest.param("CD3E CD8A", GENES, TypeError, "not text", id="text"),
        pytest.param(["CD3E", "CD8A"], None, TypeError, "not text", id="list_of_text"),
        pytest.param(MATRIX[:, :3], "LYZ", TypeError, "got the string 'LYZ'", id="one_name"),
    ],
)
def test_bad_cells_are_errors(cells, names, error, message, tokenizer):
    with pytest.raises(error, match=message):
        tokenizer(cells, gene_names=names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": "counts"}, "layer's name, got 'counts'"),
        ({"layer": "raw"}, "needs an AnnData with `raw`"),
        ({"gene_column": "symbol"}, "must be a column of var, got 'symbol'"),
    ],
)
def test_what_an_anndata_does_not_have_is_an_error(arguments, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        tokenizer(ad.AnnData(MATRIX, var=pd.DataFrame(index=GENES)), **arguments)


def test_a_layer_of_a_plain_matrix_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="belong to an AnnData"):
        tokenizer(MATRIX, gene_names=GENES, layer="counts")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_length": 0}, "`max_length` must be at least 1, got 0"),
        ({"truncation": "only_first"}, "`truncation` must be True or False"),
        ({"padding": "shortest"}, "`padding` must be True"),
    ],
)
def test_bad_lengths_and_padding_are_errors(arguments, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        tokenizer(MATRIX, gene_names=GENES, **arguments)


def test_ids_that_are_no_genes_do_not_decode(tokenizer):
    for token_id in (-100, 30_000):
        with pytest.raises(ValueError, match=f"Gene ids are 0 to 25,532, got {token_id}"):
            tokenizer.decode([token_id])


def test_no_bins_and_an_empty_batch_are_errors(tokenizer):
    with pytest.raises(ValueError, match="positive integer, got 0"):
        PanFoMaTokenizer(num_expression_bins=0)
    with pytest.raises(ValueError, match="At least one cell"):
        tokenizer.pad([])


@pytest.mark.parametrize("names", [["LYZ", "nonsense"], []], ids=["unknown", "empty"])
def test_a_gene_set_of_unknown_or_no_names_is_an_error(names):
    with pytest.raises(ValueError, match="A gene set must hold at least one name"):
        PanFoMaTokenizer(gene_set=names)


def test_padding_on_the_left_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="Padding must be on the right"):
        PanFoMaTokenizer(padding_side="left")
    with pytest.raises(ValueError, match="Padding must be on the right"):
        tokenizer.pad([tokenizer(MATRIX[0], gene_names=GENES)], padding_side="left")


def test_cells_too_long_to_pad_are_an_error(tokenizer):
    with pytest.raises(ValueError, match="length to pad to, 3, got one of 4"):
        tokenizer.pad(tokenizer(MATRIX, gene_names=GENES), padding="max_length", max_length=3)
