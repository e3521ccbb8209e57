"""Which cells pretraining learns from, and reading them from the shards, on disk or on the Hub."""

import copy
import hashlib
import itertools
import shutil
from collections import Counter
from itertools import islice

import anndata as ad
import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from huggingface_hub import HfFileSystem
from torch.utils.data import DataLoader

from panfoma_hf import Corpus
from panfoma_hf.data import schema
from panfoma_hf.data.batches import Batching
from panfoma_hf.data.corpus import PARTS, CorpusError, units
from panfoma_hf.data.corpus.choice import HELD_OUT_CANCER_TYPES, HELD_OUT_DONORS, TRAIN, UNUSED, CellChoice
from panfoma_hf.data.corpus.streaming import StreamedCells, gather
from tests.conftest import cells_of_counts
from tests.data.corpus.conftest import build
from tests.hub_server import HubServer


NAME = "lab/made-up"
# Genes that were measured, and cancer types of its donors, each of whom has eight cells.
STUDIES = {
    "blood": (60, ["normal"] * 5),
    "marrow": (60, ["leukemia", "melanoma", None, "leukemia", "normal"]),
    "skin": (50, ["melanoma"] * 3),
    "judged": (60, ["normal", "melanoma", None]),
    "panel": (20, ["normal", "melanoma", "leukemia"]),
}
CELLS_OF_A_DONOR = 8


def made_up_study(tokenizer, num_genes: int, cancer_types: list, seed: int) -> ad.AnnData:
    generator = np.random.default_rng(seed)
    num_cells = CELLS_OF_A_DONOR * len(cancer_types)
    # Some cells are much larger than others.
    rates = generator.choice([0.3, 1.0, 4.0], (num_cells, 1)) * np.ones(num_genes)
    cells = cells_of_counts(tokenizer, generator.poisson(rates), str(seed))
    cells.obs["donor"] = np.repeat([f"d{number}" for number in range(len(cancer_types))], CELLS_OF_A_DONOR)
    cells.obs["cancer"] = np.repeat(np.array([kind or "unknown" for kind in cancer_types]), CELLS_OF_A_DONOR)
    return cells


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A corpus of shards of one or two batches of cells."""
    root = tmp_path_factory.mktemp("streaming")
    studies = {}
    for seed, (name, (num_genes, cancer_types)) in enumerate(STUDIES.items()):
        made_up_study(tokenizer, num_genes, cancer_types, seed).write_h5ad(root / f"{name}.h5ad")
        studies[name] = {
            "files": [f"{name}.h5ad"],
            "licence": "CC0",
            "citation": "Made up",
            "columns": {"donor_id": "donor", "cancer_type": "cancer"},
            "labels": {"cancer_type": {"unknown": None}},
        }
    settings = {
        "name": "made-up",
        "quality": {"min_genes": 2, "max_genes_mads": None, "max_counts_mads": None, "min_cells_per_gene": 1},
        "studies": studies,
        "splits": {
            "donor": {"by": "donor", "validation": 0.25, "test": 0.15},
            "random": {"by": "cell", "donors": "allow", "validation": 0.2, "test": 0.2, "seed": 1},
        },
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "BATCH_CELLS", 7)
        patch.setattr(units, "SHARD_BYTES", 5000)
        return build(settings, root, root / "corpus").folder


@pytest.fixture(scope="module")
def corpus(folder) -> Corpus:
    """Tests must not change its folder."""
    return Corpus.open(folder)


@pytest.fixture(scope="module")
def rows(corpus) -> list[dict]:
    """All cells as plain values, with their parts of both splits."""
    rows = corpus.dataset().with_format(None).to_list()
    for name in corpus.splits:
        for row, part in zip(rows, corpus.split(name), strict=True):
            row[name] = PARTS[part]
    return rows


@pytest.fixture(scope="module")
def index_of(rows) -> dict:
    """Positions of cells by their tokens, which no two share."""
    found = {(tuple(row["input_ids"]), tuple(row["expression_bins"])): index for index, row in enumerate(rows)}
    assert len(found) == len(rows)
    return found


def choose(**changes) -> CellChoice:
    settings = {"min_genes_measured": 30, "held_out_studies": ["judged"], "held_out_cancer_types": ["melanoma"]}
    return CellChoice(**{**settings, **changes})


CHOICES = {
    "all": {"min_genes_measured": 0, "held_out_studies": [], "held_out_cancer_types": []},
    "usual": {},
    "by_cell": {"split": "random"},
    "two_of_each": {"held_out_studies": ["skin", "blood"], "held_out_cancer_types": ("leukemia", "normal")},
    "many_genes": {"min_genes_measured": 51, "held_out_studies": [], "held_out_cancer_types": []},
    "just_enough_genes": {"min_genes_measured": 60, "held_out_studies": []},
}
some_choices = pytest.mark.parametrize("changes", CHOICES.values(), ids=CHOICES)


def expected_purpose(row: dict, choice: CellChoice) -> int:
    """What a cell is for, as the docstring of `CellChoice` has it."""
    if STUDIES[row["study"]][0] < choice.min_genes_measured:
        return UNUSED
    if row["cancer_type"] in choice.held_out_cancer_types:
        return HELD_OUT_CANCER_TYPES
    if row["study"] in choice.held_out_studies:
        return UNUSED
    return {"train": TRAIN, "validation": HELD_OUT_DONORS}.get(row[choice.split], UNUSED)


# -- the choice ------------------------------------------------------------------------------------------------------


def test_the_made_up_corpus_has_what_these_tests_are_about(corpus, rows):
    assert len(rows) == CELLS_OF_A_DONOR * 19 - sum(row_count_lost(corpus).values())
    shards = corpus.manifest["shards"]
    assert len(shards) > 8  # more than are read at the same time
    batches = [len(list(pa.ipc.open_stream(corpus.folder / shard["path"]))) for shard in shards]
    assert max(batches) > 1
    per_study = Counter(corpus.manifest["units"][shard["unit"]]["study"] for shard in shards)
    assert min(per_study[name] for name in ("blood", "marrow")) > 1
    for split in ("donor", "random"):
        assert {row[split] for row in rows} == {"train", "validation", "test"}
    assert {row["cancer_type"] for row in rows} == {"normal", "melanoma", "leukemia", None}
    found = Counter(expected_purpose(row, choose()) for row in rows)
    assert min(found[purpose] for purpose in (UNUSED, TRAIN, HELD_OUT_DONORS, HELD_OUT_CANCER_TYPES)) >= 8


def row_count_lost(corpus) -> Counter:
    lost = Counter()
    for study, (_, cancer_types) in STUDIES.items():
        lost[study] = CELLS_OF_A_DONOR * len(cancer_types) - corpus.manifest["studies"][study]["cells"]
    return lost


@some_choices
def test_purposes_are_those_of_a_plain_loop_over_the_cells(changes, corpus, rows):
    choice = choose(**changes)
    purposes = choice.of_all(corpus)
    assert purposes.dtype == np.uint8
    assert purposes.tolist() == [expected_purpose(row, choice) for row in rows]


def test_nothing_is_learned_from_what_is_held_out(corpus, rows):
    learned = [row for row, purpose in zip(rows, choose().of_all(corpus), strict=True) if purpose == TRAIN]
    assert {row["study"] for row in learned} == {"blood", "marrow"}
    assert {row["cancer_type"] for row in learned} == {"normal", "leukemia", None}
    assert {row["donor"] for row in learned} == {"train"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"held_out_studies": ["judged", "brain", "bone"]},
            r"`held_out_studies` must be in the corpus, got bone, brain\. It has blood, judged, marrow, panel, skin\.",
        ),
        (
            {"held_out_cancer_types": ["Melanoma"]},
            r"`held_out_cancer_types` must be in the corpus, got Melanoma\. It has leukemia, melanoma, normal\.",
        ),
    ],
    ids=["study", "cancer_type"],
)
def test_what_is_held_out_must_be_there(changes, message, corpus):
    with pytest.raises(ValueError, match=message):
        choose(**changes).of_all(corpus)
    with pytest.raises(ValueError, match=message):
        StreamedCells(corpus, choose(**changes), Batching(cells_per_batch=1))


def test_a_split_must_be_there(corpus):
    with pytest.raises(ValueError, match="donor, random, got 'study'"):
        choose(split="study").of_all(corpus)
    with pytest.raises(ValueError, match="donor, random, got 'study'"):
        StreamedCells(corpus, choose(split="study"), Batching(cells_per_batch=1))


NOTHING_LEFT = [
    {"min_genes_measured": 61},
    {"held_out_studies": list(STUDIES)},
    {"held_out_studies": ["marrow", "judged"], "held_out_cancer_types": ["normal", "melanoma"]},
]


@pytest.mark.parametrize("changes", NOTHING_LEFT, ids=["genes", "studies", "types"])
def test_nothing_left_to_learn_from_is_an_error_that_says_what_to_do(changes, corpus, rows):
    genes = choose(**changes).min_genes_measured
    with pytest.raises(ValueError, match="Pretraining needs cells, got none") as error:
        choose(**changes).of_all(corpus)
    assert f"got none of {len(rows):,} in the part 'train' of the split 'donor'" in str(error.value)
    assert f"at least {genes:,} genes measured" in str(error.value)
    assert "Lower `min_genes_measured`, or hold out less." in str(error.value)


@pytest.mark.parametrize("changes", NOTHING_LEFT[:2], ids=["genes", "studies"])
def test_a_stream_without_a_shard_to_read_is_the_same_error(changes, corpus):
    with pytest.raises(ValueError, match="Pretraining needs cells, got none"):
        StreamedCells(corpus, choose(**changes), Batching(cells_per_batch=1))


def test_a_stream_whose_shards_hold_no_such_cell_ends_with_the_same_error(corpus):
    # Only reading tells which cancer types are in a shard.
    stream = StreamedCells(corpus, choose(**NOTHING_LEFT[2]), Batching(cells_per_batch=1))
    with pytest.raises(ValueError, match="Pretraining needs cells, got none"):
        next(iter(stream))


def test_a_reader_whose_shards_hold_no_such_cell_waits_for_a_pass_in_which_they_do(corpus):
    # Of four donors with leukemia or melanoma in "marrow" and "skin", few shards are left.
    changes = {"held_out_studies": ["marrow", "judged"], "held_out_cancer_types": ["normal"]}
    readers = len(stream(corpus, changes).shards)
    for index in range(readers):
        own = stream(corpus, changes, num_processes=readers, process_index=index)
        epochs = [batch[0]["epoch"] for batch in islice(own, 2)]
        assert len(epochs) == 2
        if epochs[0] > 0:
            return
    pytest.fail("every reader had a cell in its first pass: the test shows nothing")


# -- the corpus ------------------------------------------------------------------------------------------------------


def test_columns_of_shards_are_those_of_the_data_set(corpus, rows):
    start = 0
    for shard in corpus.manifest["shards"]:
        table = corpus.shard_columns(shard, [schema.CANCER_TYPE, schema.CELL_ID])
        own = rows[start : start + shard["cells"]]
        assert table.column_names == [schema.CANCER_TYPE, schema.CELL_ID]
        assert table.to_pylist() == [{name: row[name] for name in table.column_names} for row in own]
        start += shard["cells"]
    assert start == len(rows)


def test_the_fingerprint_changes_with_any_shard_and_any_split(corpus, folder):
    def changed(change) -> str:
        manifest = copy.deepcopy(corpus.manifest)
        change(manifest)
        return Corpus(corpus.folder, manifest).fingerprint

    found = {corpus.fingerprint}
    for number in range(len(corpus.manifest["shards"])):
        found.add(changed(lambda manifest, number=number: manifest["shards"][number].update(sha256="0" * 64)))
    found.add(changed(lambda manifest: manifest["shards"].pop()))
    found.add(changed(lambda manifest: manifest["shards"].reverse()))
    for name in corpus.splits:
        found.add(changed(lambda manifest, name=name: manifest["splits"][name].update(sha256="0" * 64)))
    found.add(changed(lambda manifest: manifest["splits"].pop("random")))
    assert len(found) == 1 + len(corpus.manifest["shards"]) + 2 + 3
    assert Corpus.open(folder).fingerprint == corpus.fingerprint
    assert changed(lambda manifest: manifest.update(description="Other words.")) == corpus.fingerprint


# -- streaming -------------------------------------------------------------------------------------------------------


def stream(corpus, changes=None, **options) -> StreamedCells:
    """Of four cells a batch; options of `Batching` or of `StreamedCells`."""
    own = {name: options.pop(name) for name in ("purpose", "passes") if name in options}
    if "tokens_per_batch" not in options:
        options.setdefault("cells_per_batch", 4)
    return StreamedCells(corpus, choose(**(changes or {})), Batching(**options), **own)


def cells_of(batches, index_of, epoch: int | None = None) -> list[int]:
    """Positions of the cells of some batches, in their order."""
    cells = [cell for batch in batches for cell in batch]
    assert all(set(cell) == {"input_ids", "expression_bins", "epoch"} for cell in cells)
    assert epoch is None or {cell["epoch"] for cell in cells} <= {epoch}
    return [index_of[tuple(cell["input_ids"].tolist()), tuple(cell["expression_bins"].tolist())] for cell in cells]


def rows_for(rows, purpose: int, changes=None) -> list[int]:
    choice = choose(**(changes or {}))
    return [index for index, row in enumerate(rows) if expected_purpose(row, choice) == purpose]


@some_choices
@pytest.mark.parametrize("purpose", [TRAIN, HELD_OUT_DONORS, HELD_OUT_CANCER_TYPES])
def test_a_pass_reads_every_chosen_cell_once(purpose, changes, corpus, rows, index_of):
    cells = cells_of(stream(corpus, changes, purpose=purpose, passes=1), index_of, epoch=0)
    assert sorted(cells) == rows_for(rows, purpose, changes)


def test_the_same_cells_come_from_disk_and_from_the_stream(corpus, rows, index_of):
    chosen = np.flatnonzero(choose().of_all(corpus) == TRAIN).tolist()
    assert sorted(cells_of(stream(corpus, passes=1), index_of)) == chosen


def test_passes_follow_each_other_each_with_every_cell_in_another_order(corpus, rows, index_of):
    cells = [cell for batch in stream(corpus, passes=3) for cell in batch]
    expected = rows_for(rows, TRAIN)
    orders = []
    for epoch in range(3):
        orders.append(cells_of([cells[epoch * len(expected) : (epoch + 1) * len(expected)]], index_of, epoch))
        assert sorted(orders[-1]) == expected
    assert len(set(map(tuple, orders))) == 3
    without_end = itertools.islice(stream(corpus), 3 * len(expected))
    numbers = [cell["epoch"] for batch in without_end for cell in batch]
    assert numbers == sorted(numbers)
    assert numbers[-1] >= 3


@pytest.mark.parametrize("num_processes", [2, 5])
def test_processes_share_the_cells_of_a_pass(num_processes, corpus, rows, index_of):
    own = [
        cells_of(stream(corpus, passes=1, process_index=index, num_processes=num_processes), index_of)
        for index in range(num_processes)
    ]
    assert sorted(itertools.chain(*own)) == rows_for(rows, TRAIN)
    assert sum(map(bool, own)) > 1


def test_processes_and_their_workers_share_the_cells_of_each_pass(corpus, rows, index_of):
    passes = []
    for index in range(2):
        streamed = stream(corpus, passes=2, process_index=index, num_processes=2)
        loader = DataLoader(streamed, batch_size=None, num_workers=2, collate_fn=list)
        passes += [cell for batch in loader for cell in batch]
    for epoch in range(2):
        own = [cell for cell in passes if cell["epoch"] == epoch]
        assert sorted(cells_of([own], index_of)) == rows_for(rows, TRAIN)


def test_shards_are_dealt_anew_in_each_pass(corpus, index_of):
    cells = [cell for batch in stream(corpus, passes=6, process_index=0, num_processes=2) for cell in batch]
    dealt = {
        frozenset(cells_of([[cell for cell in cells if cell["epoch"] == epoch]], index_of, epoch)) for epoch in range(6)
    }
    assert len(dealt) > 3


@pytest.mark.parametrize("sizes", [{"cells_per_batch": 4}, {"tokens_per_batch": 200, "max_genes": 50}], ids=str)
def test_with_the_same_numbers_a_stream_is_always_the_same(sizes, corpus, folder, index_of):
    def read(opened, **options):
        return [cells_of([batch], index_of) for batch in stream(opened, passes=2, **sizes, **options)]

    first = read(corpus, seed=3, num_processes=2)
    again = stream(Corpus.open(folder), passes=2, **sizes, seed=3, num_processes=2)
    assert [cells_of([batch], index_of) for batch in again] == first
    assert [cells_of([batch], index_of) for batch in again] == first
    assert read(corpus, seed=4, num_processes=2) != first


@pytest.mark.parametrize("max_genes", [None, 25])
def test_batches_keep_to_their_tokens_padding_included(max_genes, corpus, rows, index_of):
    budget = 50
    batches = list(stream(corpus, tokens_per_batch=budget, max_genes=max_genes, passes=1))
    lengths = [[min(len(cell["input_ids"]), max_genes or 10**9) for cell in batch] for batch in batches]
    assert all(len(own) == 1 or len(own) * max(own) <= budget for own in lengths)
    assert max(map(len, lengths)) > 2
    assert (max(map(max, lengths)) > budget) == (max_genes is None)
    # Cells are as long as what is kept of them: those that are cut share batches.
    assert (max(len(own) for own in lengths if max(own) >= 25) > 1) == (max_genes is not None)
    assert sorted(cells_of(batches, index_of)) == rows_for(rows, TRAIN)


def test_batches_of_some_cells_are_full_and_of_like_length(corpus, rows):
    batches = list(stream(corpus, cells_per_batch=4, passes=1))
    sizes = Counter(map(len, batches))
    assert set(sizes) <= {4, len(rows_for(rows, TRAIN)) % 4}
    assert sizes[4] == len(rows_for(rows, TRAIN)) // 4
    lengths = [[len(cell["input_ids"]) for cell in batch] for batch in batches]
    positions = sum(len(own) * max(own) for own in lengths)
    assert sum(map(sum, lengths)) / positions > 0.85
    assert [max(own) for own in lengths] != sorted((max(own) for own in lengths), reverse=True)


def test_cells_of_several_shards_mix(corpus, rows, index_of, monkeypatch):
    monkeypatch.setattr("panfoma_hf.data.batches.BATCHES_SORTED_TOGETHER", 4)
    batches = list(stream(corpus, passes=1))
    studies = [{rows[index]["study"] for index in cells_of(batches[start : start + 4], index_of)} for start in (0, 4)]
    assert studies == [{"blood", "marrow"}] * 2


def test_a_stream_says_how_many_cells_its_shards_have_and_leaves_the_others_closed(corpus, monkeypatch):
    opened = []
    open_shard = Corpus.open_shard
    monkeypatch.setattr(
        Corpus, "open_shard", lambda self, shard: opened.append(shard["path"]) or open_shard(self, shard)
    )
    streamed = stream(corpus, passes=1)
    list(streamed)
    assert {path.split("/")[1] for path in opened} == {"blood", "marrow", "skin"}
    assert len(set(opened)) == len(opened)
    studies = corpus.manifest["studies"]
    assert streamed.num_cells == sum(studies[name]["cells"] for name in ("blood", "marrow", "skin"))
    opened.clear()
    list(stream(corpus, passes=1, purpose=HELD_OUT_CANCER_TYPES))
    assert {path.split("/")[1] for path in opened} == {"blood", "marrow", "skin", "judged"}


# -- a sample of a stream --------------------------------------------------------------------------------------------


def test_a_sample_holds_the_first_cells_of_the_purpose_the_same_each_time(corpus, rows, index_of):
    expected = rows_for(rows, TRAIN)
    sample, again = gather(corpus, choose(), TRAIN, 20), gather(corpus, choose(), TRAIN, 20)
    assert isinstance(sample, Dataset)
    assert sample.features == schema.features()
    assert sample["length"][:].tolist() == [len(row["input_ids"]) for row in sample]
    found = cells_of([[{**cell, "epoch": 0} for cell in sample.remove_columns("length")]], index_of)
    assert len(set(found)) == len(found) == 20
    assert set(found) < set(expected)
    assert again.with_format(None).to_list() == sample.with_format(None).to_list()
    more = gather(corpus, choose(), TRAIN, 10**6)
    assert len(more) == len(expected)
    assert more.with_format(None).to_list()[:20] == sample.with_format(None).to_list()


def test_a_sample_of_what_is_not_there_is_empty(corpus):
    none = gather(corpus, choose(held_out_cancer_types=[]), HELD_OUT_CANCER_TYPES, 10)
    assert len(none) == 0
    assert none.features == schema.features()


def test_shards_that_cannot_hold_held_out_cells_are_not_read(corpus, rows, monkeypatch):
    opened, open_shard = [], Corpus.open_shard

    def noted(self, shard):
        opened.append(shard["path"])
        return open_shard(self, shard)

    monkeypatch.setattr(Corpus, "open_shard", noted)
    assert len(gather(corpus, choose(held_out_cancer_types=[]), HELD_OUT_CANCER_TYPES, 10)) == 0
    assert opened == []
    parts, ends = corpus.split("donor"), np.cumsum([shard["cells"] for shard in corpus.manifest["shards"]])
    without = [
        shard["path"]
        for shard, some in zip(corpus.manifest["shards"], np.split(parts, ends[:-1]), strict=True)
        if not (some == PARTS.index("validation")).any()
    ]
    assert len(gather(corpus, choose(), HELD_OUT_DONORS, 10**6)) == len(rows_for(rows, HELD_OUT_DONORS))
    assert opened
    assert not set(opened) & set(without)


# -- the Hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(corpus, tmp_path):
    """A Hub that has the corpus, which `huggingface_hub` in this process speaks to."""
    HfFileSystem.clear_instance_cache()  # which keep the address that they were made with
    with HubServer() as server, server.connected(tmp_path / "home"):
        corpus.push_to_hub(NAME)
        server.requests.clear()
        yield server
    HfFileSystem.clear_instance_cache()


def arrow_files(tmp_path) -> list:
    return list((tmp_path / "home").rglob("*.arrow"))


def test_a_streamed_corpus_leaves_its_shards_on_the_hub_and_reads_the_same_cells_there(
    hub, corpus, rows, index_of, tmp_path
):
    fetched = Corpus.open(NAME, streaming=True)
    assert fetched.manifest == corpus.manifest
    assert fetched.fingerprint == corpus.fingerprint
    assert len(fetched.tokenizer) == len(corpus.tokenizer)
    for name in corpus.splits:
        assert np.array_equal(fetched.split(name), corpus.split(name))
    assert any("/resolve/" in request for request in hub.requests)
    assert not [request for request in hub.requests if request.endswith(".arrow")]
    assert arrow_files(tmp_path) == []

    for shard in corpus.manifest["shards"][:2]:
        with fetched.open_shard(shard) as file:
            assert hashlib.sha256(file.read()).hexdigest() == shard["sha256"]
    batches = list(stream(fetched, passes=1))
    cells = cells_of(batches, index_of, epoch=0)
    assert sorted(cells) == rows_for(rows, TRAIN)
    assert cells == cells_of(stream(corpus, passes=1), index_of)
    asked = {request.split("/cells/")[1].split("/")[0] for request in hub.requests if request.endswith(".arrow")}
    assert asked == {"blood", "marrow", "skin"}
    assert arrow_files(tmp_path) == []


def test_a_streamed_corpus_stays_at_the_state_that_was_opened(hub, corpus, rows, index_of):
    fetched = Corpus.open(NAME, streaming=True)
    later = dict(hub.dataset(NAME).files)
    commits = hub.dataset(NAME).commits
    damaged = {path: b"" if path.endswith(".arrow") else content for path, content in later.items()}
    commits.append(type(commits[-1])("later", damaged, parent=commits[-1].oid))
    assert sorted(cells_of(stream(fetched, passes=1), index_of)) == rows_for(rows, TRAIN)
    with pytest.raises(CorpusError, match="Shards must be as they were written"):
        list(stream(Corpus.open(NAME, streaming=True), passes=1))


def test_without_streaming_shards_are_fetched_and_a_folder_stays_where_it_is(hub, corpus, tmp_path):
    fetched = Corpus.open(NAME)
    assert len(arrow_files(tmp_path)) == len(corpus.manifest["shards"])
    assert fetched.remote is None
    local = Corpus.open(corpus.folder, streaming=True)
    assert (local.folder, local.remote) == (corpus.folder, None)
    with local.open_shard(corpus.manifest["shards"][0]) as file:
        assert hashlib.sha256(file.read()).hexdigest() == corpus.manifest["shards"][0]["sha256"]


def test_a_private_corpus_is_streamed_with_the_token_that_it_was_opened_with(hub, corpus, rows, index_of, tmp_path):
    hub.dataset(NAME).is_private = True
    with hub.connected(tmp_path / "other", token="hf_wrong"):
        HfFileSystem.clear_instance_cache()
        with pytest.raises(CorpusError, match="Invalid credentials"):
            Corpus.open(NAME, streaming=True)
        fetched = Corpus.open(NAME, streaming=True, token=hub.token)
        assert hub.token not in repr(fetched)
        assert sorted(cells_of(stream(fetched, passes=1), index_of)) == rows_for(rows, TRAIN)


def test_a_shard_that_is_gone_from_the_hub_is_told(hub, corpus):
    fetched = Corpus.open(NAME, streaming=True)
    path = next(shard["path"] for shard in corpus.manifest["shards"] if "/blood/" in shard["path"])
    del hub.dataset(NAME).commits[-1].files[path]
    with pytest.raises(CorpusError, match="Check the connection") as error:
        list(stream(fetched, passes=1))
    assert path in str(error.value)


def test_what_needs_shards_on_disk_says_that_they_were_left_on_the_hub(hub, corpus):
    fetched = Corpus.open(NAME, streaming=True)
    for use in (
        fetched.dataset,
        fetched.verify,
        lambda: choose().of_all(fetched),
        lambda: fetched.describe_cell(0),
        lambda: fetched.groups,
    ):
        with pytest.raises(CorpusError, match=f"shards were left on the Hub: datasets/{NAME}@.*Open it without"):
            use()


def test_a_hub_that_cannot_be_reached_is_told(hub, corpus):
    fetched = Corpus.open(NAME, streaming=True)
    hub.shutdown()
    hub.server_close()
    with pytest.raises(CorpusError, match="Check the connection"):
        list(stream(fetched, passes=1))


# -- bad input -------------------------------------------------------------------------------------------------------


def test_more_readers_than_shards_are_an_error_that_says_what_to_do(corpus, rows, index_of):
    number = len(stream(corpus).shards)
    readers = [stream(corpus, num_processes=number, process_index=index, passes=1) for index in range(number)]
    assert sorted(itertools.chain(*(cells_of(own, index_of) for own in readers))) == rows_for(rows, TRAIN)
    with pytest.raises(ValueError, match="needs a shard of its own, got") as error:
        next(iter(stream(corpus, num_processes=number + 1)))
    assert f"got {number + 1} of them for {number} shards" in str(error.value)
    assert "dataloader_num_workers" in str(error.value)


@pytest.fixture
def copied(folder, tmp_path) -> Corpus:
    """A corpus that a test may damage, whose shards are copies."""
    return Corpus.open(shutil.copytree(folder, tmp_path / "corpus"))


@pytest.mark.parametrize("damage", ["within a batch", "between batches", "empty", "missing", "other bytes"])
def test_a_damaged_shard_is_an_error_that_names_it(damage, copied):
    shards = [shard for shard in copied.manifest["shards"] if "/blood/" in shard["path"]]
    counted = [len(list(pa.ipc.open_stream(copied.folder / shard["path"]))) for shard in shards]
    shard = shards[int(np.argmax(counted))]
    path = copied.folder / shard["path"]
    content = path.read_bytes()
    if damage == "between batches":
        with pa.ipc.open_stream(path) as reader, pa.BufferOutputStream() as out:
            with pa.ipc.new_stream(out, reader.schema) as writer:
                writer.write_batch(reader.read_next_batch())
            content_of_one = out.getvalue().to_pybytes()
        assert max(counted) > 1
        path.write_bytes(content_of_one)
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"within a batch": content[:-300], "empty": b"", "other bytes": b"x" * len(content)}[damage])
    with pytest.raises(CorpusError, match=r"Shards must be as they were written|must hold the cells") as error:
        list(stream(copied, passes=1))
    assert shard["path"] in str(error.value)
    assert "\n" not in str(error.value)
    if damage == "between batches":
        assert f"of {shard['cells']} in" in str(error.value)
