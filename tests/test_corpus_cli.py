"""`panfoma corpus`: what it prints, where it prints it, and with which exit code it ends."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml
from typer.testing import CliRunner

from panfoma_cli import app
from panfoma_hf import Corpus
from tests.conftest import ROOT, small_cells
from tests.hub_server import HubServer


STUDY = {
    "licence": "CC0",
    "citation": "Unpublished",
    "columns": {"donor_id": "donor", "cell_type": "cell_type"},
    "values": {"cancer_type": "normal"},
}
SOURCES = {
    "name": "small",
    "quality": {"min_genes": 18},
    "studies": {"one": {**STUDY, "files": ["one.h5ad"]}, "two": {**STUDY, "files": ["more/two.h5ad"]}},
    "splits": {"donor": {"by": "donor", "test": 0.3}},
}


def run(*arguments):
    return CliRunner().invoke(app, ["corpus", *map(str, arguments)])


def run_and_fail(*arguments):
    """What a command that fails says of it: on stderr, as one message, with exit code 1."""
    result = run(*arguments)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.count("error: ") == 1
    assert "Traceback" not in result.stderr
    return result.stderr


def write_list(path, **changes):
    path.write_text(yaml.safe_dump({**SOURCES, **changes}))
    return path


def build(folder, out="corpus"):
    return run("build", folder / "sources.yaml", folder / out, "--workers", 1)


@pytest.fixture(scope="module")
def small_corpus(tokenizer, tmp_path_factory):
    """A folder with a list, its two files and the corpus, and what `build` said; tests must not change it."""
    folder = tmp_path_factory.mktemp("cli")
    cells = small_cells(tokenizer)
    cells.obs["donor"] = [f"d{index % 2 + 2 * (index >= 30)}" for index in range(48)]
    (folder / "more").mkdir()
    cells[:30].copy().write_h5ad(folder / "one.h5ad")
    cells[30:].copy().write_h5ad(folder / "more" / "two.h5ad")
    write_list(folder / "sources.yaml")
    return folder, build(folder)


@pytest.fixture
def folder(small_corpus, tmp_path):
    """A copy of that folder, for a test to change."""
    return shutil.copytree(small_corpus[0], tmp_path / "cli")


# -- build -----------------------------------------------------------------------------------------------------------


def test_build_prints_what_it_built(small_corpus):
    folder, result = small_corpus
    assert result.exit_code == 0, result.output
    totals = Corpus.open(folder / "corpus").manifest["totals"]
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"small: {totals['cells']:,} cells of 48 read, 2 studies, 4 donors, 0 cancer types")
    assert f"dropped: {48 - totals['cells']} few genes" in lines
    assert any(line.split()[:2] == ["normal", str(totals["cells"])] for line in lines)
    assert any(line.startswith("donor ") for line in lines)
    assert lines[-1] == f"{folder / 'corpus' / 'README.md'} is its data card"
    assert "[2/2]" in result.stderr
    assert "of 30 cells (without " in result.stderr


def test_build_again_reads_only_what_changed(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.glob("corpus/cells/*/*/*")}
    result = build(folder)
    assert result.exit_code == 0
    # The copies have other paths, so they are read once more to tell that they are the same.
    assert build(folder).stderr.splitlines()[0] == "2 of 2 files are finished and unchanged"
    write_list(folder / "sources.yaml", quality={"min_genes": 19})
    fewer = build(folder)
    assert fewer.exit_code == 0
    assert fewer.stdout.splitlines()[0] != result.stdout.splitlines()[0]
    assert not any(path.exists() for path in before)


def test_build_finds_the_files_below_the_root(folder, tmp_path):
    path = write_list(tmp_path / "elsewhere.yaml")
    message = run_and_fail("build", path, tmp_path / "new")
    assert "got nothing for 2: one.h5ad of one, more/two.h5ad of two" in message
    assert f"They are looked for in {tmp_path}: name another folder as the root" in message
    assert not (tmp_path / "new").exists()
    result = run("build", path, tmp_path / "new", "--root", folder, "--workers", 1)
    assert result.exit_code == 0
    assert Corpus.open(tmp_path / "new").manifest["shards"] == Corpus.open(folder / "corpus").manifest["shards"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nme": "x"}, "nme is no setting; did you mean 'name'?"),
        ({"studies": {"one": {"files": ["one.h5ad"]}}}, "studies.one.licence is missing"),
        ({"quality": {"min_genes": -1}}, "min_genes"),
        ({"studies": {"one": {**STUDY, "files": ["one.h5ad"], "columns": {"donor": "donor"}}}}, "'donor_id'"),
        ({"splits": {"donor": {"by": "donor", "held_out": ["nobody"]}}}, "`held_out` names donors"),
    ],
)
def test_build_says_what_is_wrong_with_a_list(change, message, folder):
    path = write_list(folder / "sources.yaml", **change)
    before = (folder / "corpus" / "manifest.json").read_bytes()
    assert message in run_and_fail("build", path, folder / "corpus", "--workers", 1)
    assert (folder / "corpus" / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("content", [None, "name: [", "- a\n- b\n", "name: a\nname: b\n"])
def test_build_needs_a_list(content, tmp_path):
    path = tmp_path / "sources.yaml"
    if content is not None:
        path.write_text(content)
    message = run_and_fail("build", path, tmp_path / "corpus")
    assert "A source list" in message
    assert str(path) in message
    assert not (tmp_path / "corpus").exists()


def test_build_names_every_file_that_cannot_be_read_and_keeps_the_others(folder):
    (folder / "more" / "two.h5ad").write_bytes(b"these are no cells")
    shutil.rmtree(folder / "corpus")
    message = run_and_fail("build", folder / "sources.yaml", folder / "corpus", "--workers", 1)
    assert "two: more/two.h5ad: Cells are read from .h5ad" in message
    assert "got 1 of 2 that were not; 1 are finished and kept" in message
    assert "one: one.h5ad:" not in message.partition("error: ")[2]
    assert "A corpus is a folder with manifest.json" in run_and_fail("info", folder / "corpus")
    write_list(folder / "sources.yaml", studies={"one": SOURCES["studies"]["one"]})
    result = build(folder)
    assert result.exit_code == 0
    assert "1 of 1 files are finished and unchanged" in result.stderr


def test_build_does_not_write_into_a_folder_with_something_else(folder):
    message = run_and_fail("build", folder / "sources.yaml", folder / "more", "--workers", 1)
    assert "Choose another folder" in message
    assert [path.name for path in (folder / "more").iterdir()] == ["two.h5ad"]


def test_build_says_that_there_is_no_scheduler(folder):
    assert "dask" in run_and_fail("build", folder / "sources.yaml", folder / "new", "--scheduler", "nonsense").lower()


# -- info ------------------------------------------------------------------------------------------------------------


def test_info_prints_what_build_printed(small_corpus):
    folder, built = small_corpus
    result = run("info", folder / "corpus")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert result.stdout.strip() == built.stdout.rpartition("\n\n")[0].strip()
    assert run("info", folder / "corpus", "--verify").stdout == (
        result.stdout + "\nall shards and splits are as they were written\n"
    )


def test_info_as_json_is_the_manifest(small_corpus):
    path = small_corpus[0] / "corpus"
    result = run("info", path, "--json")
    assert json.loads(result.stdout) == json.loads((path / "manifest.json").read_text()) == Corpus.open(path).manifest
    assert run("info", path, "--json", "--verify").stdout == result.stdout


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_info_finds_a_shard_that_is_not_as_it_was_written(damage, folder):
    shard = Corpus.open(folder / "corpus").manifest["shards"][1]["path"]
    path = folder / "corpus" / shard
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    if damage == "missing":
        path.unlink()
    assert run("info", folder / "corpus").exit_code == 0
    message = run_and_fail("info", folder / "corpus", "--verify")
    assert "got 1 of 2" in message
    assert f"{shard} ({damage})" in message
    assert "error: Shards must be as they were written" in run_and_fail("info", folder / "corpus", "--verify", "--json")


def test_info_needs_a_corpus_of_a_known_format(folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "got none in" in run_and_fail("info", folder / "more")
    assert "got none in" in run_and_fail("info", folder / "nothing")
    assert "outgoing traffic has been disabled" in run_and_fail("info", "lab/nothing")
    path = folder / "corpus" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    assert "got 99" in run_and_fail("info", folder / "corpus")
    path.write_text("{")
    run_and_fail("info", folder / "corpus")


# -- push ------------------------------------------------------------------------------------------------------------


def test_push_prints_the_address_and_info_reads_it_from_there(folder, tmp_path):
    with HubServer() as hub, hub.connected(tmp_path / "home"):
        result = run("push", folder / "corpus", "lab/small")
        assert result.exit_code == 0
        assert result.stdout == f"{hub.url}/datasets/lab/small/commit/{hub.dataset('lab/small').commits[-1].oid}\n"
        assert not hub.dataset("lab/small").is_private
        assert "manifest.json" in hub.dataset("lab/small").files
        fetched = run("info", "lab/small", "--verify")
        assert fetched.exit_code == 0
        assert fetched.stdout == run("info", folder / "corpus", "--verify").stdout
        assert run("push", folder / "corpus", "lab/hidden", "--private").exit_code == 0
        assert hub.dataset("lab/hidden").is_private

        sent = len(hub.requests)
        assert "A corpus is a folder" in run_and_fail("push", folder / "more", "lab/other")
        assert "Repo id must" in run_and_fail("push", folder / "corpus", "no name")
        next(folder.glob("corpus/cells/one/*/*.arrow")).unlink()
        assert "(missing)" in run_and_fail("push", folder / "corpus", "lab/other")
        assert len(hub.requests) == sent
        assert "Repository Not Found" in run_and_fail("info", "lab/other")
        with hub.connected(tmp_path / "other", token="hf_wrong"):
            assert "Invalid credentials" in run_and_fail("info", "lab/small")


# -- known bugs ------------------------------------------------------------------------------------------------------


def test_push_says_that_the_hub_cannot_be_reached(folder, tmp_path):
    with HubServer() as hub:
        pass
    with hub.connected(tmp_path / "home"):
        run_and_fail("push", folder / "corpus", "lab/small")


def test_push_takes_a_folder_only(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with HubServer() as hub, hub.connected(tmp_path / "home"):
        run("push", folder / "corpus", "runs/small")
        sent = len(hub.requests)
        run_and_fail("push", "runs/small", "lab/small")
        assert len(hub.requests) == sent


def test_info_finds_a_split_that_was_cut_off(folder):
    (folder / "corpus" / "splits" / "donor.npy").write_bytes(b"")
    assert "A split must be that of the manifest" in run_and_fail("info", folder / "corpus", "--verify")


def test_build_where_nothing_is_left_out(folder):
    write_list(folder / "sources.yaml", quality={"min_genes": 0})
    result = build(folder)
    assert result.exit_code == 0, result.exception
    assert "dropped: none" in result.stdout


# -- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ((), ("build", "info", "push")),
        (("build",), ("SOURCES", "OUT", "--root", "--workers", "--scheduler", "--model", "Exit code 1", "Example:")),
        (("info",), ("--json", "--verify", "its name on the Hub")),
        (("push",), ("REPO_ID", "--private", "lab/panfoma-bench")),
    ],
)
def test_the_commands_say_what_they_take(command, words):
    result = CliRunner().invoke(app, ["corpus", *command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0
    text = " ".join(result.output.split()).lower()
    assert [word for word in words if word.lower() not in text] == []


def test_a_mistyped_option_is_a_usage_error():
    for arguments in (["build"], ["build", "a", "b", "--workers", "0"], ["info", "a", "--nonsense"], ["nonsense"]):
        assert run(*arguments).exit_code == 2


def test_the_module_runs_as_the_command_does():
    result = subprocess.run(
        [sys.executable, "-m", "panfoma_hf", "corpus", "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200"},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "Build, inspect and publish a corpus" in result.stdout
