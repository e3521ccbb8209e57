"""A corpus on the Hub: what is published, what replaces it, and that it comes back as it was."""

import json

import pytest
from huggingface_hub import HfApi

from panfoma_hf import Corpus
from panfoma_hf.data import schema
from panfoma_hf.data.corpus import CorpusError
from tests.conftest import run_python
from tests.data.corpus.conftest import build, public_files, sources
from tests.hub_server import HubServer


NAME = "lab/tiny"


@pytest.fixture
def hub(tmp_path):
    """A Hub without repositories, which `huggingface_hub` in this process speaks to."""
    with HubServer() as server, server.connected(tmp_path / "home"):
        yield server


def all_files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def cell_names(corpus):
    return list(corpus.dataset()[schema.CELL_ID])


def test_what_is_published_comes_back_whole(hub, corpus):
    before = all_files(corpus.folder)
    address = corpus.push_to_hub(NAME)
    published = hub.dataset(NAME)
    assert address == f"{hub.url}/datasets/{NAME}/commit/{published.commits[-1].oid}"
    assert [commit.message for commit in published.commits[1:]] == [f"tiny: {len(corpus):,} cells"]
    assert not published.is_private
    # .lock and .inputs.json stay here.
    assert published.files == public_files(corpus.folder)
    assert {path.name for path in before if path.name.startswith(".")} == {".lock", ".inputs.json"}
    assert published.files["README.md"].startswith(b"---\n")
    assert set(published.files) >= {"manifest.json", "cells/state.json", "tokenizer/tokenizer_config.json"}
    assert all_files(corpus.folder) == before

    fetched = Corpus.open(NAME)
    fetched.verify()
    assert fetched.folder != corpus.folder
    assert fetched.manifest == corpus.manifest
    assert fetched.dataset().with_format(None).to_list() == corpus.dataset().with_format(None).to_list()
    assert fetched.tokenizer.get_vocab() == corpus.tokenizer.get_vocab()
    for name in corpus.splits:
        assert (fetched.split(name) == corpus.split(name)).all()


def test_datasets_reads_it_from_the_hub_in_the_same_order_without_this_package(hub, corpus, tmp_path):
    corpus.push_to_hub(NAME)
    printed = run_python(
        "import datasets, json, sys\n"
        "streamed = datasets.load_dataset(sys.argv[1], streaming=True)\n"
        "fetched = datasets.load_dataset(sys.argv[1], split='train')\n"
        "assert streamed['train'].features == fetched.features\n"
        "print(json.dumps([list(streamed), list(streamed['train']), list(fetched)]))",
        NAME,
        without=("panfoma_hf",),
        **hub.environment(tmp_path / "datasets"),
    )
    parts, streamed, fetched = json.loads(printed)
    assert parts == ["train"]
    assert streamed == corpus.dataset().with_format(None).to_list()
    assert fetched == streamed


def test_a_later_state_replaces_the_earlier_in_one_commit(hub, changeable, raw):
    changeable.push_to_hub(NAME, message="first")
    earlier, revision = set(hub.dataset(NAME).files), hub.dataset(NAME).commits[-1].oid
    names = cell_names(changeable)
    settings = sources()
    del settings["studies"]["tumour"]
    settings["studies"]["islets-2"]["quality"]["min_genes"] = 900
    settings["splits"] = {"mine": {"by": "cell", "donors": "allow"}}
    later = build(settings, raw, changeable.folder)
    later.push_to_hub(NAME)

    published = hub.dataset(NAME)
    assert len(published.commits) == 3
    assert published.files == public_files(later.folder)
    shards = {path for path in published.files if path.endswith(".arrow")}
    assert shards == {shard["path"] for shard in later.manifest["shards"]}
    stale = earlier - set(published.files)
    assert {path.split("/")[1] for path in stale if path.startswith("cells/")} == {"tumour", "islets-2"}
    assert {path for path in stale if path.startswith("splits/")} == {f"splits/{n}.npy" for n in changeable.splits}
    assert set(published.commits[-1].deleted) == stale
    # What is the same is not sent again.
    added = published.commits[-1].added
    assert "manifest.json" in added
    assert not any(path.startswith(("cells/islets/", "tokenizer/")) for path in added)

    assert cell_names(Corpus.open(NAME)) == cell_names(later) != names
    old = Corpus.open(NAME, revision=revision)
    old.verify()
    assert cell_names(old) == names

    address = later.push_to_hub(NAME)
    assert len(published.commits) == 3
    assert address.endswith(published.commits[-1].oid)


@pytest.mark.parametrize("damage", ["shard changed", "shard missing", "split changed"])
def test_a_corpus_that_is_not_whole_is_refused_before_anything_is_sent(damage, hub, changeable):
    if damage == "split changed":
        path = changeable.folder / "splits" / "donor.npy"
    else:
        path = changeable.folder / changeable.manifest["shards"][1]["path"]
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    if damage == "shard missing":
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(CorpusError, match=r"Shards must be|A split must be") as error:
        changeable.push_to_hub(NAME)
    assert path.name in str(error.value)
    assert hub.requests == []
    assert hub.repositories == {}


def test_a_damaged_corpus_on_the_hub_is_told(hub, corpus):
    corpus.push_to_hub(NAME)
    files = hub.dataset(NAME).commits[-1].files
    path = corpus.manifest["shards"][0]["path"]
    files[path] = files[path][:-20] + b"\1" + files[path][-19:]
    with pytest.raises(CorpusError, match="download the corpus again"):
        Corpus.open(NAME).verify()


def test_a_private_one_needs_the_token(hub, corpus, tmp_path):
    corpus.push_to_hub(NAME, private=True)
    assert hub.dataset(NAME).is_private
    before = all_files(corpus.folder), list(hub.dataset(NAME).commits)
    with hub.connected(tmp_path / "other", token="hf_wrong"):
        with pytest.raises(CorpusError, match="Invalid credentials"):
            Corpus.open(NAME)
        with pytest.raises(CorpusError, match="Invalid credentials"):
            corpus.push_to_hub(NAME)
        with pytest.raises(CorpusError, match="Invalid credentials"):
            corpus.push_to_hub("lab/new")
        assert len(Corpus.open(NAME, token=hub.token)) == len(corpus)
        corpus.push_to_hub("lab/new", token=hub.token)
    assert (all_files(corpus.folder), hub.dataset(NAME).commits) == before
    assert hub.dataset("lab/new").files == hub.dataset(NAME).files


def test_a_name_that_is_not_there_and_a_repository_without_a_corpus(hub):
    with pytest.raises(CorpusError, match="Repository Not Found"):
        Corpus.open(NAME)
    HfApi().create_repo(NAME, repo_type="dataset")
    with pytest.raises(CorpusError, match=r"A corpus is a folder with manifest\.json"):
        Corpus.open(NAME)


def test_without_the_hub_a_push_fails_and_what_was_fetched_still_opens(corpus, tmp_path):
    with HubServer() as hub, hub.connected(tmp_path / "home"):
        corpus.push_to_hub(NAME)
        Corpus.open(NAME)
    before = all_files(corpus.folder)
    with hub.connected(tmp_path / "home"):
        with pytest.raises(CorpusError, match="refused"):
            corpus.push_to_hub(NAME)
        with pytest.raises(CorpusError, match="check your internet connection"):
            Corpus.open("lab/other")
        Corpus.open(NAME).verify()
    assert all_files(corpus.folder) == before


# -- known bugs ------------------------------------------------------------------------------------------------------


def test_units_of_a_build_that_failed_are_not_published(hub, changeable, raw):
    settings = sources()
    settings["studies"]["islets-2"]["quality"]["min_genes"] = 900
    settings["studies"]["tumour"]["layer"] = "none"
    with pytest.raises(CorpusError, match="tumour"):
        build(settings, raw, changeable.folder)
    corpus = Corpus.open(changeable.folder)
    corpus.push_to_hub(NAME)
    shards = {path for path in hub.dataset(NAME).files if path.endswith(".arrow")}
    assert shards == {shard["path"] for shard in corpus.manifest["shards"]}


def test_hidden_files_are_not_published(hub, changeable):
    for path in ("cells/.DS_Store", "cells/.state.json.new", "splits/.donor.npy"):
        (changeable.folder / path).write_bytes(b"x")
    changeable.push_to_hub(NAME)
    assert not [path for path in hub.dataset(NAME).files if "/." in path]
