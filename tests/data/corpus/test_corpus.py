"""What a corpus holds: the tokens and labels of its cells, what its manifest and its card say of them, its splits."""

import json
import shutil
import sys
from collections import Counter

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from datasets import Features, LargeList, Value, load_dataset, load_from_disk
from huggingface_hub import DatasetCard

from panfoma_hf import Corpus, DataCollatorForCells, cell_dataset
from panfoma_hf.data import schema
from panfoma_hf.data.corpus import PARTS, CorpusError, LeakageError, units
from panfoma_hf.data.corpus.card import write_card
from panfoma_hf.tokenization import CellTokens
from tests.data.corpus.conftest import build, part_sources, public_files, sources


TEXTS = ["donor_id", "sample_id", "cell_type", "cancer_type", "tissue", "assay"]


def joined(cells: list[CellTokens]) -> CellTokens:
    lengths = np.concatenate([tokens.lengths for tokens in cells])
    return CellTokens(
        np.concatenate([tokens.input_ids for tokens in cells]),
        np.concatenate([tokens.expression_bins for tokens in cells]),
        np.append(0, np.cumsum(lengths)),
    )


def without_rare(cells: list[dict[str, np.ndarray]], min_cells: int) -> list[tuple[list[int], list[int]]]:
    """Genes and bins of cells, without the genes that fewer of them express."""
    expressed_in = Counter(gene for cell in cells for gene in cell["input_ids"].tolist())
    kept = []
    for cell in cells:
        stays = np.array([expressed_in[gene] >= min_cells for gene in cell["input_ids"].tolist()], dtype=bool)
        kept.append((cell["input_ids"][stays].tolist(), cell["expression_bins"][stays].tolist()))
    return kept


@pytest.fixture(scope="module")
def expected(raw_cells, tokenizer) -> dict[str, dict]:
    """What is left of each file, found out with nothing but the tokenizer, NumPy and pandas."""
    found = {}
    for path, cells in raw_cells.items():
        tokens = tokenizer.tokenize_cells(cells)
        min_genes, min_cells = (850, 2) if path == "more.csv" else (1000, 3)
        share = pd.DataFrame(cells.X.toarray(), columns=cells.var_names).pipe(lambda x: x.div(x.sum(1), axis=0))
        verdicts = pd.Series("kept", index=range(cells.n_obs))
        if "state" in cells.obs:
            verdicts[(cells.obs["state"] == "dying").to_numpy()] = "excluded by the source list"
        verdicts[(verdicts == "kept") & (tokens.lengths < min_genes)] = "few genes"
        if "MT-CO1" in share:
            verdicts[(verdicts == "kept") & (share["MT-CO1"] > 0.2).to_numpy()] = "mitochondrial"
        samples = cells.obs["patient"].to_numpy() if "patient" in cells.obs else np.full(cells.n_obs, "the file")
        for sample in np.unique(samples):
            judged = np.flatnonzero((verdicts == "kept") & (samples == sample))
            logs = np.log1p(tokens.lengths[judged])
            limit = np.median(logs) + 1.5 * np.median(np.abs(logs - np.median(logs)))
            if len(judged) >= 10:
                verdicts[judged[logs > limit]] = "many genes"
        kept = np.flatnonzero(verdicts == "kept")
        whole = [tokens.cell(index) for index in kept]
        found[path] = {
            "kept": kept,
            "names": cells.obs_names[kept].tolist(),
            "dropped": Counter(verdicts[verdicts != "kept"]),
            "whole": whole,
            "tokens": without_rare(whole, min_cells),
        }
    return found


@pytest.fixture(scope="module")
def rows(corpus) -> pd.DataFrame:
    """All rows, with the file of each."""
    table = corpus.dataset().with_format("arrow")[:].to_pandas()
    files = [corpus.manifest["units"][shard["unit"]]["file"] for shard in corpus.manifest["shards"]]
    return table.assign(file=np.repeat(files, [shard["cells"] for shard in corpus.manifest["shards"]]))


# -- rows ------------------------------------------------------------------------------------------------------------


def test_tokens_are_the_tokenizers_without_rare_genes(rows, expected):
    assert sorted(rows["file"].unique()) == sorted(expected)
    for path, of_file in rows.groupby("file"):
        assert of_file["cell_id"].tolist() == expected[path]["names"]
        got = list(zip(of_file["input_ids"].map(list), of_file["expression_bins"].map(list), strict=True))
        assert got == expected[path]["tokens"]
        assert of_file["length"].tolist() == [len(ids) for ids, _ in got]
        # The thresholds bite in every file, so that this compares something.
        assert expected[path]["dropped"]
        assert of_file["length"].sum() < sum(len(cell["input_ids"]) for cell in expected[path]["whole"])


def test_types_are_compact(corpus):
    assert corpus.dataset().features == schema.corpus_features(len(corpus.tokenizer))
    assert corpus.dataset().features == Features(
        {
            "input_ids": LargeList(Value("uint16")),
            "expression_bins": LargeList(Value("uint8")),
            "length": Value("int32"),
            "cell_id": Value("string"),
            "study": Value("string"),
            **{field: Value("string") for field in TEXTS},
            "is_malignant": Value("bool"),
            "content_hash": Value("uint64"),
        }
    )
    assert schema.corpus_features(2**16).arrow_schema.field("input_ids").type.value_type == "uint16"
    assert schema.corpus_features(2**16 + 1).arrow_schema.field("input_ids").type.value_type == "int32"


def test_fields_are_the_source_lists_words_and_null_where_nothing_is_known(rows, raw_cells, expected):
    assert rows.groupby("study")["file"].unique().map(sorted).to_dict() == {
        "islets": ["islets/one.h5ad", "islets/two.h5ad"],
        "islets-2": ["more.csv"],
        "tumour": ["tumour"],
    }
    renamed = {"gamma": "PP cell", "quiescent_stellate": "stellate cell", "acinar": None}
    for path in ("islets/one.h5ad", "islets/two.h5ad"):
        obs = raw_cells[path].obs.iloc[expected[path]["kept"]]
        got = rows[rows["file"] == path]
        assert got["donor_id"].tolist() == obs["patient"].tolist()
        assert got["cell_type"].tolist() == [renamed.get(word, word) for word in obs["cell_type"]]
        diagnosis = {"PDAC": "pancreatic ductal adenocarcinoma", "insulinoma": "insulinoma", "?": None}
        assert got["cancer_type"].tolist() == [diagnosis[word] for word in obs["diagnosis"]]
        malignant = {"yes": True, "no": False}
        assert got["is_malignant"].tolist() == [malignant.get(word) for word in obs["malignant"]]
        assert set(got["tissue"]) == {"pancreas"}
        assert got[["sample_id", "assay"]].isna().all(axis=None)
    for word in ("PP cell", "stellate cell"):
        assert word in set(rows["cell_type"])
    more, tumour = rows[rows["study"] == "islets-2"], rows[rows["study"] == "tumour"]
    assert set(more["cancer_type"]) == {"normal"}
    assert set(more["is_malignant"]) == {False}
    assert more[["donor_id", "sample_id", "cell_type", "tissue", "assay"]].isna().all(axis=None)
    assert set(tumour["donor_id"]) == {"p1"}
    assert set(tumour["assay"]) == {"10x 3' v2"}
    assert tumour[["is_malignant", "cell_type", "tissue"]].isna().all(axis=None)


def test_load_from_disk_and_load_dataset_give_the_same_rows_in_the_same_order(corpus, tmp_path):
    own = corpus.dataset().with_format(None)[:]
    assert load_from_disk(str(corpus.folder / "cells"))[:] == own
    streamed = load_dataset(str(corpus.folder), streaming=True, cache_dir=str(tmp_path))["train"]
    assert streamed.features == corpus.dataset().features
    assert list(streamed) == [dict(zip(own, row, strict=True)) for row in zip(*own.values(), strict=True)]


def test_load_dataset_streams_files_whose_names_start_with_underscores(parts, tmp_path):
    # `datasets` passes over folders that are called so, unless it is asked for them.
    settings = part_sources()
    (parts / "1.h5ad").rename(parts / "__1.h5ad")
    settings["studies"]["s1"]["files"] = ["__1.h5ad"]
    corpus = build(settings, parts, tmp_path / "corpus")
    streamed = load_dataset(str(corpus.folder), streaming=True, cache_dir=str(tmp_path / "cache"))["train"]
    assert [row["cell_id"] for row in streamed] == corpus.dataset()["cell_id"][:].tolist()


def test_a_file_in_several_shards_gives_the_rows_of_one(parts, tmp_path, monkeypatch):
    whole = build(part_sources(), parts, tmp_path / "whole")
    monkeypatch.setattr(units, "SHARD_BYTES", 1)
    monkeypatch.setattr(units, "BATCH_CELLS", 3)
    corpus = build(part_sources(), parts, tmp_path / "corpus")
    assert [shard["cells"] for shard in corpus.manifest["shards"]] == [3, 3, 1] + 4 * [3, 3, 2]
    corpus.verify()
    rows = corpus.dataset().with_format(None)[:]
    assert rows == whole.dataset().with_format(None)[:]
    streamed = load_dataset(str(corpus.folder), streaming=True, cache_dir=str(tmp_path / "cache"))["train"]
    assert [row["cell_id"] for row in streamed] == rows["cell_id"]
    files = [corpus.manifest["units"][shard["unit"]] for shard in whole.manifest["shards"] for _ in range(8)][1:]
    assert [corpus.describe_cell(index) for index in range(len(corpus))] == [
        f"{name} of {unit['study']}: {unit['file']}" for name, unit in zip(rows["cell_id"], files, strict=True)
    ]


@pytest.mark.parametrize("random", [False, True], ids=["fixed", "random"])
def test_the_collator_makes_the_same_batch_of_a_corpus_as_of_a_data_set(random, corpus, tokenizer, rows):
    tokens = [
        CellTokens(row.input_ids.astype(np.int32), row.expression_bins, np.array([0, row.length]))
        for row in rows.itertuples()
    ]
    dataset = cell_dataset(joined(tokens))
    collator = DataCollatorForCells(tokenizer, max_genes=1500, random=random)
    batches = []
    for source in (corpus.dataset(), dataset):
        torch.manual_seed(7)
        batches.append(collator([source[index] for index in range(0, 80, 5)]))
    assert batches[0].keys() == batches[1].keys()
    assert batches[0]["input_ids"].shape == (16, 1500)
    assert {tensor.dtype for tensor in batches[0].values()} == {torch.int64}
    assert all(torch.equal(batches[0][key], batches[1][key]) for key in batches[0])


def test_content_hashes_are_equal_where_tokens_before_the_rare_gene_filter_are(baron, tokenizer, tmp_path):
    counts = baron[:9].copy()
    counts.obs["state"] = ["fine"] * 8 + ["dying"]
    dense = counts.X.toarray()
    never = np.flatnonzero((baron.X > 0).sum(0).A1 == 0)
    vocabulary = tokenizer.get_vocab()
    rare = [gene for gene in baron.var_names[never] if gene in vocabulary][:2]
    # Two cells are one, but for a gene that no other cell expresses, another one in each.
    dense[6], dense[7] = dense[5], dense[5]
    dense[6, baron.var_names.get_loc(rare[0])] = dense[7, baron.var_names.get_loc(rare[1])] = 1
    counts.X = sp.csr_matrix(dense)
    logs, other = counts.copy(), counts.copy()
    logs.X = sp.diags(1e4 / counts.X.sum(1).A1) @ counts.X
    logs.X = logs.X.astype("float32").log1p().tocsr()
    changed = dense.copy()
    changed[np.arange(4), dense.argmax(1)[:4]] = 0
    other.X = sp.csr_matrix(changed)
    written = {"counts": counts, "logs": logs, "other": other}
    for name, cells in written.items():
        cells.write_h5ad(tmp_path / f"{name}.h5ad")
    study = {"licence": "CC0", "citation": "-", "exclude": {"state": ["dying"]}}
    settings = {
        "name": "equal",
        "quality": {"min_cells_per_gene": 3, "max_genes_mads": None},
        "studies": {name: {**study, "files": [f"{name}.h5ad"]} for name in written},
        "splits": {"study": {"by": "study", "duplicates": "allow"}},
    }
    # Fewer genes are rare in one file than in the others, which must not tell in the hashes.
    settings["studies"]["logs"]["quality"] = {"min_cells_per_gene": 0}
    rows = build(settings, tmp_path, tmp_path / "corpus").dataset().with_format(None)[:]
    whole = {}
    for name, cells in written.items():
        tokens = tokenizer.tokenize_cells(cells)
        for index, cell_id in enumerate(cells.obs_names):
            cell = tokens.cell(index)
            whole[name, cell_id] = (cell["input_ids"].tobytes(), cell["expression_bins"].tobytes())
    contents = [whole[key] for key in zip(rows["study"], rows["cell_id"], strict=True)]
    assert len(contents) == 24
    pairs = set(zip(contents, rows["content_hash"], strict=True))
    assert len(pairs) == len(set(contents)) == len(set(rows["content_hash"])) == 12
    hashes = dict(zip(zip(rows["study"], rows["cell_id"], strict=True), rows["content_hash"], strict=True))
    names = counts.obs_names[:8]
    assert [hashes["counts", name] for name in names] == [hashes["logs", name] for name in names]
    assert [hashes["counts", name] == hashes["other", name] for name in names] == [False] * 4 + [True] * 4
    stored = dict(zip(zip(rows["study"], rows["cell_id"], strict=True), rows["input_ids"], strict=True))
    assert stored["counts", names[6]] == stored["counts", names[7]] != stored["logs", names[6]]
    assert hashes["counts", names[6]] != hashes["counts", names[7]]


# -- the manifest ----------------------------------------------------------------------------------------------------


def test_the_manifests_numbers_are_those_of_the_rows(corpus, rows, expected, raw_cells):
    manifest = corpus.manifest
    assert json.loads((corpus.folder / "manifest.json").read_text(encoding="utf-8")) == manifest
    totals = manifest["totals"]
    assert len(corpus) == len(rows) == totals["cells"] == sum(len(facts["kept"]) for facts in expected.values())
    assert totals["cells_read"] == 97
    assert totals["tokens"] == rows["length"].sum()
    assert totals["bytes"] == sum(path.stat().st_size for path in corpus.folder.glob("cells/*/*/*.arrow"))
    assert totals["studies"] == 3
    assert totals["donors"] == 4
    assert totals["cells_without_donor"] == rows["donor_id"].isna().sum() > 0
    assert totals["cancer_types"] == 2
    assert totals["cell_types"] == rows["cell_type"].nunique()
    assert totals["tissues"] == 1
    dropped = sum((facts["dropped"] for facts in expected.values()), Counter())
    assert {reason: count for reason, count in manifest["dropped"].items() if count} == dropped
    assert set(dropped) == {"excluded by the source list", "few genes", "mitochondrial", "many genes"}
    for field in ("cell_type", "cancer_type", "tissue", "assay"):
        assert manifest["counts"][field] == rows[field].value_counts().to_dict()
    assert manifest["counts"]["is_malignant"] == rows["is_malignant"].map(str, "ignore").value_counts().to_dict()
    assert manifest["donors"] == (rows["study"] + "/" + rows["donor_id"]).value_counts().to_dict()
    donors = (rows["study"] + "/" + rows["donor_id"]).groupby(rows["cancer_type"]).nunique()
    assert manifest["donors_by_cancer_type"] == donors.to_dict()


def test_the_manifests_numbers_of_each_study_and_file_are_those_of_the_rows(corpus, rows, expected, raw_cells):
    files = {"islets": ["islets/one.h5ad", "islets/two.h5ad"], "islets-2": ["more.csv"], "tumour": ["tumour"]}
    assert list(corpus.manifest["studies"]) == list(files)
    for name, study in corpus.manifest["studies"].items():
        own = rows[rows["study"] == name]
        whole = sum(len(cell["input_ids"]) for file in files[name] for cell in expected[file]["whole"])
        assert (study["cells"], study["tokens"]) == (len(own), own["length"].sum())
        assert study["tokens"] + study["tokens_rare"] == whole
        assert study["cells_read"] == sum(raw_cells[file].n_obs for file in files[name])
        dropped = sum((expected[file]["dropped"] for file in files[name]), Counter())
        assert {reason: count for reason, count in study["dropped"].items() if count} == dropped
        for field in TEXTS:
            assert study["counts"][field] == own[field].value_counts().to_dict()
    for unit in corpus.manifest["units"]:
        facts = expected[unit["file"]]
        assert unit["cells"] == len(facts["tokens"])
        lengths = [len(ids) for ids, _ in facts["tokens"]]
        assert unit["tokens"] == sum(lengths)
        assert unit["genes_per_cell"] == np.histogram(lengths, np.arange(0, max(lengths) + 51, 50))[0].tolist()
        assert unit["medians"]["genes"] == np.median(lengths)
        genes = Counter(gene for cell in facts["whole"] for gene in cell["input_ids"].tolist())
        assert unit["genes_expressed"] == len(genes)
        assert unit["genes_rare"] == sum(count < (2 if unit["file"] == "more.csv" else 3) for count in genes.values())
    scales = {unit["file"]: unit["scale"] for unit in corpus.manifest["units"]}
    assert scales.pop("islets/two.h5ad").startswith("log-normalized counts")
    assert set(scales.values()) == {"counts (whole numbers)"}


def test_words_of_equally_many_cells_are_in_the_order_of_the_alphabet():
    # NumPy sorts numbers with the instructions of the machine's processor, each of which leaves equal ones in an order
    # of its own; a corpus is the same on every machine.
    words = [f"type {index:02d}" for index in range(60)]
    fields = pd.DataFrame(dict.fromkeys(schema.CELL_FIELDS, pd.Categorical(words[::-1] * 2 + ["type 30"])))
    for counts in units._counts(fields).values():
        assert list(counts) == ["type 30", *(word for word in words if word != "type 30")]


def test_the_manifest_notes_words_that_no_cell_has(corpus):
    assert len([note for note in corpus.manifest["notes"] if "name 't_cell', which no cell has" in note]) == 1
    assert len([note for note in corpus.manifest["notes"] if "no cell has" in note]) == 1


def test_the_manifest_notes_splits_whose_groups_are_too_large(corpus):
    for name, split in corpus.splits.items():
        is_off = name != "cancer_type" and not 0.05 <= split["cells"]["test"] / len(corpus) <= 0.2
        assert any(note.startswith(f"split {name!r}") for note in corpus.manifest["notes"]) == is_off


def test_shards_are_those_of_the_manifest_in_the_order_of_the_rows(corpus):
    paths = sorted(str(path.relative_to(corpus.folder)) for path in corpus.folder.glob("cells/*/*/*.arrow"))
    assert [shard["path"] for shard in corpus.manifest["shards"]] == paths
    corpus.verify()


def test_a_corpus_is_the_same_wherever_it_is_built(corpus, raw, tmp_path):
    again = build(sources(), raw, tmp_path / "another place")
    assert public_files(again.folder) == public_files(corpus.folder)
    for path, content in public_files(corpus.folder).items():
        if path.endswith((".json", ".md")):
            assert str(corpus.folder.parent.parent) not in content.decode(), path


def test_a_layer_that_cannot_be_read_is_noted_without_this_machines_paths(parts, tmp_path):
    cells = ad.read_h5ad(parts / "1.h5ad")
    cells.layers["words"] = np.full(cells.shape, "a", dtype=object)
    cells.write_h5ad(parts / "1.h5ad")
    corpus = build(part_sources(), parts, tmp_path / "corpus")
    (unit,) = [unit for unit in corpus.manifest["units"] if unit["file"] == "1.h5ad"]
    assert any("'words' is left out" in note for note in unit["notes"])
    assert str(tmp_path) not in (corpus.folder / "manifest.json").read_text(encoding="utf-8")


# -- splits ----------------------------------------------------------------------------------------------------------


def test_splits_index_the_rows(corpus, rows):
    assert list(corpus.splits) == ["donor", "study", "cancer_type", "random"]
    for name, facts in corpus.splits.items():
        parts = corpus.split(name)
        assert parts.dtype == np.uint8
        assert facts["cells"] == {part: int((parts == index).sum()) for index, part in enumerate(PARTS)}
        for index, part in enumerate(PARTS[:3]):
            got = corpus.dataset(split=name, part=part)["cell_id"][:].tolist()
            assert got == rows["cell_id"][parts == index].tolist()


def test_splits_keep_together_what_their_names_say(corpus, rows):
    kept = {
        "donor": rows["study"] + "/" + rows["donor_id"].fillna("*"),
        "study": rows["study"],
        "cancer_type": rows["cancer_type"],
    }
    for name, group in kept.items():
        parts = corpus.split(name)
        found = {part: sorted(set(group[parts == index].dropna())) for index, part in enumerate(PARTS[:3])}
        if name == "cancer_type":  # normal cells are trained on, but are no cancer
            found["train"].remove("normal")
        assert corpus.splits[name]["groups"] == found
        assert corpus.splits[name]["leaks"] == {"donors": 0, "duplicates": 0}
        assert found["test"]
    crossing = rows.groupby(kept["donor"])["file"].agg(lambda x: len(set(corpus.split("random")[x.index])) > 1)
    assert corpus.splits["random"]["leaks"] == {"donors": int(crossing.sum()), "duplicates": 0}


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param(np.zeros(79, dtype=int), id="too_few"),
        pytest.param(np.zeros((80, 1), dtype=int), id="a_column"),
        pytest.param(np.zeros(0), id="none"),
        pytest.param(np.full(80, 4), id="no_such_part"),
        pytest.param(np.full(80, -1), id="negative"),
        pytest.param(np.full(80, 256), id="beyond_a_byte"),
        pytest.param(np.full(80, 0.5), id="half"),
        pytest.param(np.full(80, np.nan), id="not_a_number"),
        pytest.param(["train"] * 80, id="words"),
    ],
)
def test_a_split_of_another_shape_or_with_other_values_is_an_error(parts, corpus):
    with pytest.raises(ValueError, match="A split gives each of the 80 cells an index into"):
        corpus.check_split(parts)


def test_a_split_of_ones_own_is_checked(corpus, rows):
    corpus.check_split(corpus.split("donor"))
    corpus.check_split(rows["study"].map({"islets": 0, "islets-2": 1, "tumour": 2}).to_numpy())
    torn = np.zeros(80, dtype=int)
    torn[np.flatnonzero(rows["donor_id"] == "d2")[0]] = 2
    with pytest.raises(LeakageError, match="islets/d2"):
        corpus.check_split(torn)
    leaks = corpus.check_split(torn, donors="allow")
    assert (leaks.donors, leaks.duplicates) == (["islets/d2"], 0)
    # What is left out is on no side.
    torn[rows["donor_id"] == "d2"] = 3
    torn[rows["donor_id"] == "d3"] = 2
    assert corpus.check_split(torn).donors == []


def test_cells_of_unknown_donors_may_be_of_any_donor_of_their_cohort(corpus, rows):
    torn = np.zeros(80, dtype=int)
    torn[np.flatnonzero(rows["study"] == "islets-2")[:3]] = 2
    with pytest.raises(LeakageError, match=r"islets-2/\*"):
        corpus.check_split(torn)


def test_an_unknown_split_or_part_is_an_error_that_names_those_there_are(corpus):
    with pytest.raises(KeyError, match=r"donor, study, cancer_type, random, got 'donors'"):
        corpus.split("donors")
    with pytest.raises(KeyError, match="got 'donors'"):
        corpus.dataset(split="donors")
    with pytest.raises(ValueError, match="train, validation, test, got 'dev'"):
        corpus.dataset(split="donor", part="dev")


# -- damage ----------------------------------------------------------------------------------------------------------


def test_verify_finds_a_shard_that_changed(changeable):
    path = changeable.folder / changeable.manifest["shards"][1]["path"]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=rf"1 of 4 .*{path.parent.name}/00000.arrow \(changed\)"):
        changeable.verify()


def test_verify_finds_a_shard_that_is_missing_or_cut(changeable):
    first, last = (changeable.folder / changeable.manifest["shards"][index]["path"] for index in (0, 3))
    first.unlink()
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.raises(CorpusError, match=r"2 of 4 .*missing.*changed"):
        changeable.verify()


@pytest.mark.parametrize("damage", ["changed", "missing", "cut"])
def test_verify_finds_a_split_that_is_not_the_manifests(damage, changeable):
    path = changeable.folder / "splits" / "donor.npy"
    parts = changeable.split("donor")
    if damage == "missing":
        path.unlink()
    else:
        np.save(path, np.append(parts[:-1], 3).astype(np.uint8) if damage == "changed" else parts[:-1])
    with pytest.raises(CorpusError, match=r"donor\.npy"):
        changeable.verify()
    with pytest.raises(CorpusError, match="Build the corpus again"):
        changeable.dataset(split="donor")
    assert len(changeable.dataset(split="study", part="train")) == changeable.splits["study"]["cells"]["train"]


def test_a_folder_without_a_manifest_is_no_corpus(tmp_path):
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(CorpusError, match=r"A corpus is a folder with manifest\.json"):
            Corpus.open(folder)


def test_a_corpus_of_another_format_is_not_read(changeable):
    path = changeable.folder / "manifest.json"
    path.write_text(json.dumps({**changeable.manifest, "format": 99}), encoding="utf-8")
    with pytest.raises(CorpusError, match="format 1, got 99"):
        Corpus.open(changeable.folder)


# -- the card --------------------------------------------------------------------------------------------------------


def tables_of(text: str) -> list[list[list[str]]]:
    """Tables in Markdown, as rows of text; the line below the head left out."""
    tables, rows = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            cells = line.replace("\\|", "\0").strip().strip("|").split("|")
            rows.append([cell.strip().replace("\0", "|") for cell in cells])
        elif rows:
            assert len({len(row) for row in rows}) == 1, rows
            assert set(rows[1]) == {"---"}
            tables.append([rows[0], *rows[2:]])
            rows = []
    return tables


def table_with(text: str, head: str) -> dict[str, dict[str, str]]:
    """The table whose first column is called so, by that column."""
    (table,) = [table for table in tables_of(text) if table[0][0] == head and len(table[0]) > 3]
    return {row[0]: dict(zip(table[0], row, strict=True)) for row in table[1:]}


def test_the_cards_head_is_what_the_hub_reads(corpus):
    head = DatasetCard.load(corpus.folder / "README.md").data
    assert (head.pretty_name, head.license, head.size_categories) == ("tiny", "cc-by-4.0", ["n<1K"])
    (config,) = head.configs
    assert config["data_files"] == [{"split": "train", "path": "cells/**/*.arrow"}]
    assert "single-cell" in head.tags


def test_the_cards_tables_hold_the_manifests_numbers(corpus):
    text = (corpus.folder / "README.md").read_text(encoding="utf-8")
    studies, manifest = corpus.manifest["studies"], corpus.manifest
    tables = [table for table in tables_of(text) if table[0][0] == "study"]
    shown, dropped, licences = ({row[0]: row[1:] for row in table[1:]} for table in tables)
    assert list(shown) == list(licences) == list(studies)
    assert list(dropped) == [*studies, "all"]
    reasons = tables[1][0][3:-2]
    for name, study in studies.items():
        assert shown[name][:3] == [str(study["cells"]), str(study["cells_read"]), str(len(study["counts"]["donor_id"]))]
        assert shown[name][5] == f"{study['tokens'] / study['cells']:,.0f}"
        assert dropped[name][:2] == [str(study["cells_read"]), str(study["cells"])]
        assert dropped[name][2:-2] == [str(study["dropped"][reason]) for reason in reasons]
        assert dropped[name][-2] == f"{study['genes_rare']:,}"
        assert int(dropped[name][0]) - int(dropped[name][1]) == sum(map(int, dropped[name][2:-2]))
    assert dropped["all"][:2] == ["97", str(len(corpus))]
    assert licences["islets"] == [
        "CC BY 4.0",
        "[Baron et al. | Cell Systems 2016](https://doi.org/10.1016/j.cels.2016.08.011)",
    ]
    cancers = table_with(text, "cancer type")
    for kind, count in manifest["counts"]["cancer_type"].items():
        assert cancers[kind]["cells"] == str(count)
        assert cancers[kind]["donors"] == str(manifest["donors_by_cancer_type"][kind])
    assert sum(int(row["cells"]) for row in cancers.values()) == len(corpus)
    splits = table_with(text, "split")
    assert list(splits) == list(corpus.splits)
    for name, split in corpus.splits.items():
        assert [splits[name][part] for part in PARTS] == [str(split["cells"][part]) for part in PARTS]
        assert splits[name]["donors on both sides"] == str(split["leaks"]["donors"])
    (totals,) = [dict(table[1:]) for table in tables_of(text) if table[1][0] == "cells read"]
    assert totals["cells kept"] == str(len(corpus))
    assert totals["tokens"] == f"{manifest['totals']['tokens']:,}"
    malignancy = manifest["counts"]["is_malignant"]
    known = (malignancy["True"], malignancy["False"])
    assert totals["malignant / non-malignant / not known"] == f"{known[0]} / {known[1]} / {len(corpus) - sum(known)}"


def test_the_summary_holds_the_same(corpus):
    text = str(corpus)
    assert text.startswith(f"tiny: {len(corpus)} cells of 97 read, 3 studies, 4 donors, 2 cancer types")
    for name in [*corpus.manifest["studies"], *corpus.splits]:
        assert any(line.startswith(f"{name} ") for line in text.splitlines())
    assert text.splitlines()[-1] == f"note: {corpus.manifest['notes'][-1]}"


def test_pictures_are_shown_and_the_same_whenever_they_are_written(changeable):
    before = public_files(changeable.folder)
    pictures = sorted(path for path in before if path.startswith("pictures/"))
    assert pictures == ["pictures/cells.png", "pictures/dropped.png", "pictures/genes.png"]
    for path in pictures:
        assert before[path].startswith(b"\x89PNG\r\n\x1a\n")
        assert f"({path})" in before["README.md"].decode()
    shutil.rmtree(changeable.folder / "pictures")
    (changeable.folder / "README.md").unlink()
    assert write_card(changeable) == changeable.folder / "README.md"
    assert public_files(changeable.folder) == before


def test_names_with_bars_and_line_ends_do_not_break_tables(parts, tmp_path):
    settings = part_sources(licence="other")
    settings["studies"]["s0"]["citation"] = "A | B\nC"
    settings["studies"]["s0"]["licence"] = "x|y"
    settings["studies"]["s0"]["values"] = {"cancer_type": "solid | liquid"}
    settings["studies"]["s1"]["values"] = {"cancer_type": "|"}
    text = (build(settings, parts, tmp_path / "corpus").folder / "README.md").read_text(encoding="utf-8")
    assert {"solid | liquid", "|", "not known"} == set(table_with(text, "cancer type"))
    assert ["s0", "x|y", "A | B C"] in [row for table in tables_of(text) for row in table]
    shown = next(table for table in tables_of(text) if "cancer types" in table[0])
    assert [row[4] for row in shown[1:3]] == ["solid | liquid", "|"]


def test_a_study_of_which_no_cell_is_kept_is_told(parts, tmp_path):
    settings = part_sources()
    settings["studies"]["s1"]["quality"] = {"min_genes": 2000}
    corpus = build(settings, parts, tmp_path / "corpus")
    assert corpus.manifest["studies"]["s1"]["cells"] == 0
    assert corpus.manifest["studies"]["s1"]["dropped"]["few genes"] == 8
    assert corpus.manifest["totals"]["studies"] == 4
    assert set(corpus.dataset()["study"][:]) == {"s0", "s2", "s3", "s4"}
    assert len(corpus) == len(corpus.split("donor")) == 31
    corpus.verify()
    text = (corpus.folder / "README.md").read_text(encoding="utf-8")
    assert ["s1", "0", "8", "0", "", "0", ""] in [row[:7] for table in tables_of(text) for row in table]
    assert "cells.png" in text
    assert str(corpus)


def test_a_corpus_of_which_every_cell_is_kept_has_its_card(parts, tmp_path):
    settings = part_sources()
    del settings["studies"]["s0"]["exclude"]
    corpus = build(settings, parts, tmp_path / "corpus")
    assert len(corpus) == 40
    assert (corpus.folder / "README.md").is_file()


def test_without_matplotlib_the_card_has_no_pictures_and_one_warning_says_so(changeable, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "panfoma_hf.data.corpus.pictures")
    with_pictures = (changeable.folder / "README.md").read_text(encoding="utf-8")
    text = write_card(changeable).read_text(encoding="utf-8")
    (warning,) = caplog.records
    assert "written without pictures" in warning.message
    assert ".png" not in text
    assert tables_of(text) == tables_of(with_pictures)
    DatasetCard.load(changeable.folder / "README.md")
