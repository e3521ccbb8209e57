"""Building a corpus: only what is new is done, whatever goes wrong leaves nothing half done, and nothing leaks."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import active_children
from pathlib import Path

import anndata as ad
import dask.distributed
import numpy as np
import pytest
import scipy.sparse as sp
import yaml
from datasets import load_dataset

from panfoma_hf import Corpus, PanFoMaTokenizer
from panfoma_hf.data.corpus import CorpusError, LeakageError, SplitError, build_corpus, units
from tests.conftest import ROOT
from tests.data.corpus.conftest import build, part_sources, public_files, sources


# How long a test waits for another process, which starts in seconds, before it says that it hangs.
PATIENCE = 90


@pytest.fixture
def done(monkeypatch) -> list[str]:
    """Names of the units that were built, not found finished, since the test began; in alphabetical order."""
    names = []
    whole = units._build

    def counted(unit, *arguments):
        names.append(unit.name)
        names.sort()
        return whole(unit, *arguments)

    monkeypatch.setattr(units, "_build", counted)
    return names


def before_each_unit(monkeypatch, action) -> None:
    """Call a function with each unit that is about to be built."""
    whole = units._build

    def acted(unit, *arguments):
        action(unit)
        return whole(unit, *arguments)

    monkeypatch.setattr(units, "_build", acted)


def wait_for(condition, while_running: subprocess.Popen | None = None) -> None:
    started = time.monotonic()
    while not condition():
        assert while_running is None or while_running.poll() is None, while_running.communicate()
        assert time.monotonic() < started + PATIENCE
        time.sleep(0.02)


def finished(out: Path) -> list[str]:
    """Studies of the units that need not be built again: in the corpus, or waiting for it to be whole."""
    return sorted(path.parts[-3] for folder in ("cells", ".finished") for path in out.glob(f"{folder}/*/*/unit.json"))


def assert_no_work_is_left(out: Path) -> None:
    """No half unit is anywhere, and in a corpus that is whole none waits."""
    own = {".lock", ".inputs.json"} | (set() if (out / "manifest.json").exists() else {".finished"})
    assert {path.name for path in out.iterdir() if path.name.startswith(".")} <= own
    for unit in [*out.glob("cells/*/*/"), *out.glob(".finished/*/*/")]:
        assert sorted(path.suffix for path in unit.iterdir()) == [".arrow", ".json"]
        assert (unit / "unit.json").is_file()
    assert not [path for path in out.rglob("*") if path.name.endswith(".new") or path.name == "progress"]


def streamed(corpus: Corpus, cache: Path) -> list[str]:
    rows = load_dataset(str(corpus.folder), streaming=True, cache_dir=str(cache))["train"]
    return [row["cell_id"] for row in rows]


# -- building again --------------------------------------------------------------------------------------------------


def test_building_again_redoes_nothing_and_changes_no_byte(changeable, raw, done):
    before = public_files(changeable.folder)
    build(sources(), raw, changeable.folder)
    build(sources(), raw, changeable.folder)
    assert done == []
    assert public_files(changeable.folder) == before


ISLETS = ["islets: islets/one.h5ad", "islets: islets/two.h5ad"]


@pytest.mark.parametrize(
    ("study", "change", "redone"),
    [
        pytest.param("islets", {"values": {"tissue": "colon"}}, ISLETS, id="value"),
        pytest.param("islets", {"exclude": {}}, ISLETS, id="exclude"),
        pytest.param("tumour", {"quality": {"min_genes": 900}}, ["tumour: tumour"], id="threshold"),
        pytest.param("tumour", {"layer": "X"}, ["tumour: tumour"], id="layer"),
    ],
)
def test_a_changed_setting_redoes_its_study_only(study, change, redone, changeable, raw, done):
    settings = sources()
    settings["studies"][study].update(change)
    corpus = build(settings, raw, changeable.folder)
    assert done == redone
    assert_no_work_is_left(corpus.folder)
    corpus.verify()
    assert len(list(corpus.folder.glob("cells/*/*/unit.json"))) == 4
    fresh = build(settings, raw, changeable.folder.with_name("fresh"))
    assert public_files(corpus.folder) == public_files(fresh.folder)


def test_a_changed_threshold_redoes_the_studies_that_have_none_of_their_own(changeable, raw, done):
    settings = sources()
    settings["quality"]["min_genes"] = 900
    corpus = build(settings, raw, changeable.folder)
    assert done == [*ISLETS, "tumour: tumour"]
    assert len(corpus) > len(changeable)


def test_a_changed_label_redoes_its_study_only(changeable, raw, done):
    settings = sources()
    settings["studies"]["islets"]["labels"]["cell_type"]["gamma"] = "pancreatic PP cell"
    corpus = build(settings, raw, changeable.folder)
    assert done == ISLETS
    before, after = changeable.manifest["counts"]["cell_type"], corpus.manifest["counts"]["cell_type"]
    assert after["pancreatic PP cell"] == before["PP cell"]
    assert "PP cell" not in after


@pytest.mark.parametrize("path", ["islets/two.h5ad", "more.csv", "tumour/barcodes.tsv.gz"])
def test_a_changed_file_is_redone_and_no_other(path, changeable, raw, done, raw_cells):
    key = path.split("/barcodes")[0]
    cells = raw_cells[key].copy()
    cells.obs_names = [f"{name}x" for name in cells.obs_names]
    if path.endswith(".h5ad"):
        cells.write_h5ad(raw / path)
    elif path.endswith(".csv"):
        cells.to_df().astype(int).to_csv(raw / path)
    else:
        (raw / path).unlink()
        (raw / path.removesuffix(".gz")).write_text("\n".join(cells.obs_names) + "\n", encoding="utf-8")
    corpus = build(sources(), raw, changeable.folder)
    assert [name.split(": ")[1] for name in done] == [key]
    renamed = {str(name).endswith("x") for name in corpus.dataset()["cell_id"][:]}
    assert renamed == {True, False}
    assert len(corpus) == len(changeable)
    corpus.verify()


def test_a_touched_file_is_not_redone(changeable, raw, done):
    build(sources(), raw, changeable.folder)
    before = public_files(changeable.folder)
    for path in (raw / "more.csv", raw / "islets" / "one.h5ad", raw / "tumour" / "matrix.mtx.gz"):
        os.utime(path, (1, 1))
    build(sources(), raw, changeable.folder)
    assert done == []
    assert public_files(changeable.folder) == before


def test_an_unchanged_file_is_not_even_read(changeable, raw, monkeypatch):
    build(sources(), raw, changeable.folder)
    monkeypatch.setattr(units, "_sha256", None)
    build(sources(), raw, changeable.folder)


def test_notes_of_what_was_read_may_be_damaged(changeable, raw, done):
    before = public_files(changeable.folder)
    for content in ("", "{", "{}"):
        (changeable.folder / ".inputs.json").write_text(content, encoding="utf-8")
        build(sources(), raw, changeable.folder)
    assert done == []
    assert public_files(changeable.folder) == before


def test_what_does_not_decide_tokens_redoes_nothing_and_is_told(changeable, raw, done):
    settings = sources(
        licence="mit",
        description="Other words.",
        splits={"mine": {"by": "donor", "held_out": ["tumour/p1"], "validation": 0.0}},
        vocabularies={},
    )
    settings["studies"]["tumour"].update({"licence": "ODbL", "citation": "Someone 2020", "cohort": "others"})
    settings["splits"]["mine"]["held_out"] = ["others/p1"]
    before = public_files(changeable.folder)
    corpus = build(settings, raw, changeable.folder)
    assert done == []
    after = public_files(changeable.folder)
    changed = {path for path in {*before, *after} if before.get(path) != after.get(path)}
    assert changed == {
        "README.md",
        "manifest.json",
        "cells/dataset_info.json",
        *(f"splits/{name}.npy" for name in ("donor", "study", "cancer_type", "random", "mine")),
    }
    assert list(corpus.splits) == ["mine"]
    assert sorted(path.name for path in (corpus.folder / "splits").iterdir()) == ["mine.npy"]
    assert set(corpus.dataset("mine", "test")["study"][:]) == {"tumour"}
    manifest = Corpus.open(corpus.folder).manifest
    assert manifest["licence"] == "mit"
    assert manifest["studies"]["tumour"]["licence"] == "ODbL"
    assert "others/p1" in manifest["donors"]
    card = after["README.md"].decode()
    for words in ("license: mit", "Other words.", "ODbL", "Someone 2020", "others/p1"):
        assert words in card
        assert words not in before["README.md"].decode()


def test_a_vocabulary_holds_for_finished_files_too(changeable, raw, done):
    build(sources(), raw, changeable.folder)
    settings = sources(vocabularies={"cell_type": ["beta", "delta", "PP cells"]})
    with pytest.raises(CorpusError, match="must be of the list's vocabulary, got 'PP cell'"):
        build(settings, raw, changeable.folder)
    assert done == []
    assert Corpus.open(changeable.folder).manifest == changeable.manifest
    changeable.verify()


def test_a_word_out_of_the_vocabulary_is_an_error_that_names_it_and_the_file(changeable, raw):
    settings = sources()
    del settings["studies"]["islets"]["labels"]["cancer_type"]
    with pytest.raises(CorpusError, match=r"cancer_type must be .* got '\?', 'PDAC'.* in islets: islets/one.h5ad"):
        build(settings, raw, changeable.folder)
    assert Corpus.open(changeable.folder).manifest == changeable.manifest


def test_a_study_that_is_taken_out_disappears(changeable, raw, done):
    settings = sources()
    del settings["studies"]["islets-2"]
    corpus = build(settings, raw, changeable.folder)
    assert done == []
    assert sorted(path.name for path in corpus.folder.glob("cells/*/")) == ["islets", "tumour"]
    assert set(corpus.dataset()["study"][:]) == {"islets", "tumour"}
    assert len(corpus) == len(changeable) - 16
    corpus.verify()
    fresh = build(settings, raw, corpus.folder.with_name("fresh"))
    assert public_files(corpus.folder) == public_files(fresh.folder)


def test_another_tokenizer_redoes_everything(parts, undisturbed, done, tmp_path):
    out = tmp_path / "corpus"
    tokenizer = PanFoMaTokenizer(num_expression_bins=10)
    build(part_sources(), parts, out)
    corpus = build(part_sources(), parts, out, tokenizer=tokenizer)
    assert corpus.tokenizer.num_expression_bins == corpus.manifest["tokenizer"]["num_expression_bins"] == 10
    assert max(max(bins) for bins in corpus.dataset()["expression_bins"][:]) == 10
    assert len(done) == 10
    build(part_sources(), parts, out)
    assert public_files(out) == undisturbed


def test_a_build_that_fails_leaves_the_earlier_corpus(changeable, raw, done, tmp_path):
    rows = changeable.dataset().with_format(None)[:]
    settings = sources()
    settings["studies"]["islets"]["exclude"] = {}
    (raw / "more.csv").write_bytes(b"nothing, that\nis cells\n")
    with pytest.raises(CorpusError, match=r"1 of 4 .* 3 are finished and kept"):
        build(settings, raw, changeable.folder)
    corpus = Corpus.open(changeable.folder)
    assert corpus.manifest == changeable.manifest
    corpus.verify()
    assert corpus.dataset().with_format(None)[:] == rows
    assert [len(corpus.dataset(name)) for name in corpus.splits] == [
        split["cells"]["train"] for split in corpus.splits.values()
    ]
    assert not (corpus.folder / ".work").exists()
    assert finished(corpus.folder) == ["islets"] * 4 + ["islets-2", "tumour"]


def test_what_a_failed_build_finished_is_not_among_the_rows_that_datasets_finds(changeable, raw, tmp_path):
    # The card tells `datasets` to take every shard below cells/.
    settings = sources()
    settings["studies"]["islets"]["exclude"] = {}
    (raw / "more.csv").write_bytes(b"nothing, that\nis cells\n")
    with pytest.raises(CorpusError):
        build(settings, raw, changeable.folder)
    corpus = Corpus.open(changeable.folder)
    assert streamed(corpus, tmp_path / "cache") == corpus.dataset()["cell_id"][:].tolist()


def test_a_build_that_leaks_leaves_the_earlier_corpus(changeable, raw):
    before = public_files(changeable.folder)
    settings = sources(splits={"torn": {"by": "cell"}})
    with pytest.raises(LeakageError):
        build(settings, raw, changeable.folder)
    assert public_files(changeable.folder) == before


@pytest.mark.parametrize("file", ["manifest.json", "state.json", "README.md"])
def test_a_disk_that_is_full_at_the_end_leaves_a_whole_corpus(file, parts, tmp_path, monkeypatch, done):
    out = tmp_path / "corpus"
    first = build(part_sources(), parts, out)
    whole = units._write

    def full(path, content):
        if path.name == f".{file}.new":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        whole(path, content)

    monkeypatch.setattr(units, "_write", full)
    changed = part_sources(quality={"min_genes": 10, "min_cells_per_gene": 4})
    with pytest.raises(CorpusError, match=r"No space left.*kept: make room"):
        build(changed, parts, out)
    corpus = Corpus.open(out)
    corpus.verify()
    assert corpus.dataset()["length"][:].sum() == corpus.manifest["totals"]["tokens"]
    monkeypatch.undo()
    assert (corpus.manifest == first.manifest) == (file != "README.md")
    build(changed, parts, out)
    fresh = build(changed, parts, tmp_path / "fresh")
    assert public_files(out) == public_files(fresh.folder)
    assert fresh.manifest["totals"]["tokens"] < first.manifest["totals"]["tokens"]


# -- bad files and folders -------------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_read_stops_no_other_and_is_named(parts, undisturbed, done, tmp_path):
    out = tmp_path / "corpus"
    good = (parts / "2.h5ad").read_bytes()
    (parts / "2.h5ad").write_bytes(good[:3000] + bytes(3000) + good[6000:20000])
    with pytest.raises(CorpusError) as raised:
        build(part_sources(), parts, out)
    assert "s2: 2.h5ad" in str(raised.value)
    assert "1 of 5 that were not; 4 are finished" in str(raised.value)
    for number in (0, 1, 3, 4):
        assert f"{number}.h5ad" not in str(raised.value)
    assert not (out / "manifest.json").exists()
    assert_no_work_is_left(out)
    assert finished(out) == ["s0", "s1", "s3", "s4"]
    with pytest.raises(CorpusError, match="build it again if it was cut off"):
        Corpus.open(out)
    (parts / "2.h5ad").write_bytes(good)
    done.clear()
    build(part_sources(), parts, out)
    assert done == ["s2: 2.h5ad"]
    assert public_files(out) == undisturbed


def test_every_file_that_cannot_be_read_is_named(parts, tmp_path):
    for number in (1, 3):
        (parts / f"{number}.h5ad").write_bytes(b"garbage")
    with pytest.raises(CorpusError, match="2 of 5 that were not") as raised:
        build(part_sources(), parts, tmp_path / "corpus")
    for name in ("s1: 1.h5ad: ", "s3: 3.h5ad: "):
        assert name in str(raised.value)


def test_a_file_that_vanishes_is_named(parts, undisturbed, tmp_path, monkeypatch, done):
    out = tmp_path / "corpus"
    gone = tmp_path / "gone.h5ad"
    last = min(range(5), key=lambda number: (parts / f"{number}.h5ad").stat().st_size)
    path = parts / f"{last}.h5ad"
    before_each_unit(monkeypatch, lambda unit: path.exists() and path.rename(gone))
    with pytest.raises(CorpusError, match=rf"1 of 5 (?s:.)*s{last}: {last}.h5ad: .*got nothing at"):
        build(part_sources(), parts, out)
    assert_no_work_is_left(out)
    assert not (out / "manifest.json").exists()
    monkeypatch.undo()
    gone.rename(path)
    build(part_sources(), parts, out)
    assert public_files(out) == undisturbed


def test_a_file_that_is_written_while_it_is_read_is_not_taken(parts, undisturbed, tmp_path, monkeypatch):
    out = tmp_path / "corpus"
    cells = ad.read_h5ad(parts / "3.h5ad")

    def write(unit):
        if unit.path == "3.h5ad":
            ad.concat([cells, cells[:0]]).write_h5ad(unit.file)

    before_each_unit(monkeypatch, write)
    with pytest.raises(CorpusError, match=r"3\.h5ad changed while it was read"):
        build(part_sources(), parts, out)
    assert finished(out) == ["s0", "s1", "s2", "s4"]
    assert_no_work_is_left(out)


def test_a_file_that_is_not_there_is_named_before_anything_is_made(parts, tmp_path):
    (parts / "1.h5ad").unlink()
    with pytest.raises(FileNotFoundError, match=r"1\.h5ad of s1"):
        build(part_sources(), parts, tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()


def test_a_corpus_without_cells_is_an_error_that_tells_why(parts, tmp_path):
    with pytest.raises(CorpusError, match="none of 40 that passed quality control: 39 few genes, 1 excluded"):
        build(part_sources(quality={"min_genes": 5000}), parts, tmp_path / "corpus")
    assert not (tmp_path / "corpus" / "manifest.json").exists()


def test_a_folder_with_something_else_is_left_alone(parts, tmp_path):
    out = tmp_path / "thesis"
    (out / "cells").mkdir(parents=True)
    (out / "cells" / "thesis.tex").write_text("all of it", encoding="utf-8")
    for folder in (out, out / "cells" / "thesis.tex"):
        with pytest.raises(FileExistsError, match=r"new or empty folder.*thesis"):
            build(part_sources(), parts, folder)
    assert public_files(out) == {"cells/thesis.tex": b"all of it"}
    assert [path.name for path in out.iterdir()] == ["cells"]


def test_one_build_at_a_time_writes_a_corpus(parts, undisturbed, tmp_path, monkeypatch):
    out = tmp_path / "corpus"
    refused = []

    def build_too(unit):
        if not refused:
            with pytest.raises(CorpusError, match="One build at a time") as raised:
                build(part_sources(), parts, out)
            refused.append(raised)

    before_each_unit(monkeypatch, build_too)
    build(part_sources(), parts, out)
    assert refused
    assert public_files(out) == undisturbed


def test_no_workers_are_an_error(parts, tmp_path):
    with pytest.raises(ValueError, match="1 or more, got 0"):
        build(part_sources(), parts, tmp_path / "corpus", workers=0)


# -- interruptions ---------------------------------------------------------------------------------------------------


@pytest.fixture
def command(parts, tmp_path):
    """Arguments for Python that build `part_sources`, with more files perhaps, into a folder by the command line."""

    def arguments(out: Path, settings: dict, *options: str) -> list[str]:
        (parts / "sources.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        return [sys.executable, "-m", "panfoma_hf", "corpus", "build", str(parts / "sources.yaml"), str(out), *options]

    return arguments


def test_a_full_disk_is_told_and_the_next_build_goes_on(parts, part_cells, command, tmp_path):
    out = tmp_path / "corpus"
    # The tokenizer's gene table is written first and takes 0.9 MB; this file's shard takes more than the limit.
    cells = ad.concat([part_cells[0], part_cells[1]] * 40, index_unique="-", keys=range(80))
    cells.write_h5ad(parts / "5.h5ad")
    settings = part_sources(6, duplicates="allow")
    code = "import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (1_200_000, 1_200_000)); " + (
        "runpy.run_module('panfoma_hf', run_name='__main__', alter_sys=True)"
    )
    arguments = command(out, settings, "--workers", "1")
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments[3:]], capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE
    )
    assert result.returncode == 1, result.stderr
    assert "5.h5ad" in result.stderr.split("error: ")[-1]
    assert os.strerror(errno.EFBIG) in result.stderr
    assert "Traceback" not in result.stderr
    assert not (out / "manifest.json").exists()
    assert "s5" not in finished(out)
    assert_no_work_is_left(out)
    build(settings, parts, out)
    fresh = build(settings, parts, tmp_path / "fresh")
    assert fresh.manifest["shards"][-1]["bytes"] > 1_200_000
    assert public_files(out) == public_files(fresh.folder)


def test_a_build_that_is_killed_ends_its_workers_and_the_next_goes_on(parts, undisturbed, command, tmp_path, done):
    out = tmp_path / "corpus"
    content = (parts / "3.h5ad").read_bytes()
    (parts / "3.h5ad").unlink()
    # Whoever opens a pipe waits until somebody writes: the checksum gets its bytes, the reader after it does not.
    os.mkfifo(parts / "3.h5ad")
    process = subprocess.Popen(
        command(out, part_sources(), "--workers", "2"),
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for(lambda: len(finished(out)) == 4, process)
        write_into_pipe(parts / "3.h5ad", content, process)
        wait_for(lambda: list(out.glob(".work/*/progress")), process)
        assert len(processes_of(process.pid)) >= 3
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        wait_for(lambda: not processes_of(process.pid))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (out / "manifest.json").exists()
    (parts / "3.h5ad").unlink()
    (parts / "3.h5ad").write_bytes(content)
    build(part_sources(), parts, out)
    assert done == ["s3: 3.h5ad"]
    assert_no_work_is_left(out)
    assert public_files(out) == undisturbed


def processes_of(session: int) -> list[int]:
    """Processes of a session that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended just now
            state, _, _, its_session = path.read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state != "Z":
                found.append(int(path.parent.name))
    return found


def write_into_pipe(path: Path, content: bytes, reader: subprocess.Popen) -> None:
    descriptors = []

    def opened() -> bool:
        with contextlib.suppress(OSError):  # while nobody reads
            descriptors.append(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
        return bool(descriptors)

    wait_for(opened, reader)
    os.set_blocking(descriptors[0], True)
    with open(descriptors[0], "wb") as pipe:
        pipe.write(content)


# -- many workers ----------------------------------------------------------------------------------------------------


def test_processes_give_the_bytes_of_one(parts, undisturbed, tmp_path):
    out = tmp_path / "corpus"
    build(part_sources(), parts, out, workers=2)
    assert public_files(out) == undisturbed
    assert_no_work_is_left(out)


def test_a_worker_that_is_killed_is_told_and_the_next_build_goes_on(parts, undisturbed, done, tmp_path):
    out = tmp_path / "corpus"
    content = (parts / "3.h5ad").read_bytes()
    (parts / "3.h5ad").unlink()
    os.mkfifo(parts / "3.h5ad")  # its worker waits for bytes that do not come
    before = set(active_children())
    killed = []

    def kill_one():
        try:
            wait_for(lambda: len(finished(out)) == 4)
        finally:  # or the build would wait for ever
            killed.append(next(iter(set(active_children()) - before)))
            os.kill(killed[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(CorpusError, match=r"got one that died.* 4 of 5 files are finished and kept") as raised:
        build(part_sources(), parts, out, workers=2)
    killer.join()
    assert killed
    assert "3.h5ad" in str(raised.value)
    assert not (out / "manifest.json").exists()
    (parts / "3.h5ad").unlink()
    (parts / "3.h5ad").write_bytes(content)
    build(part_sources(), parts, out)
    assert done == ["s3: 3.h5ad"]
    assert public_files(out) == undisturbed


@pytest.mark.slow
def test_a_dask_cluster_gives_the_bytes_of_one_process(parts, undisturbed, tmp_path):
    out = tmp_path / "corpus"
    with dask.distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    ) as cluster:
        assert cluster.scheduler_address.startswith("tcp://")
        build(part_sources(), parts, out, scheduler=cluster.scheduler_address)
        assert public_files(out) == undisturbed
        assert_no_work_is_left(out)
        good = (parts / "2.h5ad").read_bytes()
        (parts / "2.h5ad").write_bytes(b"garbage")
        with pytest.raises(CorpusError, match=r"s2: 2\.h5ad: "):
            build(part_sources(), parts, out, scheduler=cluster.scheduler_address)
        (parts / "2.h5ad").write_bytes(good)
        assert public_files(out) == undisturbed


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "nowhere", "carrier-pigeon://home"])
def test_a_scheduler_that_does_not_answer_is_told(address, parts, tmp_path, monkeypatch):
    # Dask tries again until its time is up; half a second is as good as the builder's twenty.
    client = dask.distributed.Client
    monkeypatch.setattr(dask.distributed, "Client", lambda at, timeout: client(at, timeout="0.5s"))
    with pytest.raises(CorpusError, match=f"running Dask scheduler, got '{address}'.*dask scheduler"):
        build(part_sources(), parts, tmp_path / "corpus", scheduler=address)
    assert_no_work_is_left(tmp_path / "corpus")


# -- the guard -------------------------------------------------------------------------------------------------------


def test_donors_of_one_cohort_stay_together_and_are_found_in_other_splits(parts, tmp_path):
    settings = part_sources(3, splits=None)
    # Both studies know patients a and b, who are the same people.
    for name in ("s0", "s1"):
        settings["studies"][name]["cohort"] = "clinic"
    corpus = build(settings, parts, tmp_path / "corpus")
    assert set(corpus.manifest["donors"]) == {"clinic/a", "clinic/b", "s2/a", "s2/b"}
    assert corpus.manifest["donors"]["clinic/a"] == 8
    rows = corpus.dataset()
    studies, donors = np.array(rows["study"][:]), np.array(rows["donor_id"][:])
    parts_of = corpus.split("donor")
    for donor in "ab":
        assert len(set(parts_of[(donors == donor) & (studies != "s2")])) == 1
    assert len(set(corpus.split("study")[studies != "s2"])) == 1
    by_study = np.where(studies == "s0", 0, 2)
    with pytest.raises(LeakageError, match=r"2 donors in several parts of the split 'given' \(clinic/a, clinic/b\)"):
        corpus.check_split(by_study)
    assert corpus.check_split(by_study, donors="allow").donors == ["clinic/a", "clinic/b"]
    corpus.check_split(np.where(studies == "s2", 2, 0))


def test_studies_without_a_cohort_share_no_donors(parts, tmp_path):
    corpus = build(part_sources(3), parts, tmp_path / "corpus")
    assert len(corpus.manifest["donors"]) == 6
    corpus.check_split(np.where(np.array(corpus.dataset()["study"][:]) == "s0", 0, 2))


def planted(parts: Path, **changes) -> dict:
    """Two studies, and a third with the cells of the first."""
    shutil.copy(parts / "0.h5ad", parts / "copy.h5ad")
    splits = {"study": {"by": "study", "held_out": ["other"], "validation": 0.0}}
    settings = part_sources(2, splits=splits, **changes)
    settings["studies"]["other"] = {**settings["studies"]["s0"], "files": ["copy.h5ad"]}
    return settings


def test_equal_cells_on_both_sides_stop_the_build_and_are_named(parts, part_cells, tmp_path):
    out = tmp_path / "corpus"
    with pytest.raises(LeakageError) as raised:
        build(planted(parts), parts, out)
    message = str(raised.value)
    assert "14 cells with an equal in another part of the split 'study'" in message
    names = [name for name in part_cells[0].obs_names if f"{name} of s0: 0.h5ad" in message]
    assert len(names) == 1
    assert f"{names[0]} of other: copy.h5ad" in message
    assert "`cohort`" in message
    assert "`duplicates: leave_out`" in message
    assert not (out / "manifest.json").exists()
    assert not (out / "splits").exists()
    assert_no_work_is_left(out)


def test_equal_cells_are_left_out_where_that_is_asked_for(parts, tmp_path):
    corpus = build(planted(parts, duplicates="leave_out"), parts, tmp_path / "corpus")
    split, studies = corpus.split("study"), np.array(corpus.dataset()["study"][:])
    # The first of two equal cells stays; "other" is before "s0" in the order of the rows.
    assert set(split[studies == "other"]) == {2}
    assert set(split[studies == "s0"]) == {3}
    assert corpus.splits["study"]["cells"] == {"train": 8, "validation": 0, "test": 7, "left out": 7}
    assert corpus.splits["study"]["leaks"] == {"donors": 0, "duplicates": 0}
    assert len(corpus.dataset("study", "train")) == 8
    corpus.check_split(split)


def test_equal_cells_are_counted_where_they_are_allowed(parts, tmp_path):
    corpus = build(planted(parts, duplicates="allow"), parts, tmp_path / "corpus")
    assert corpus.splits["study"]["leaks"] == {"donors": 0, "duplicates": 14}
    assert corpus.splits["study"]["cells"]["left out"] == 0
    with pytest.raises(LeakageError, match="14 cells with an equal"):
        corpus.check_split(corpus.split("study"))
    leaks = corpus.check_split(corpus.split("study"), duplicates="allow")
    assert leaks.duplicates == 14
    first, second = leaks.examples
    assert corpus.dataset()[first]["content_hash"] == corpus.dataset()[second]["content_hash"]
    assert {corpus.describe_cell(index).split(": ")[1] for index in (first, second)} == {"0.h5ad", "copy.h5ad"}


def test_equal_cells_of_one_cohort_are_on_one_side(parts, tmp_path):
    settings = planted(parts)
    settings["studies"]["s0"]["cohort"] = settings["studies"]["other"]["cohort"] = "same"
    corpus = build(settings, parts, tmp_path / "corpus")
    assert corpus.splits["study"]["leaks"] == {"donors": 0, "duplicates": 0}
    assert corpus.splits["study"]["groups"]["test"] == ["other", "s0"]


def test_cells_are_equal_as_counts_and_as_logarithms(parts, part_cells, tmp_path):
    settings = planted(parts)
    logs = part_cells[0].copy()
    logs.X = (sp.diags(1e4 / logs.X.sum(1).A1) @ logs.X).astype("float32").log1p().tocsr()
    logs.write_h5ad(parts / "copy.h5ad")
    with pytest.raises(LeakageError, match="14 cells with an equal"):
        build(settings, parts, tmp_path / "corpus")


def test_cohorts_with_the_same_barcodes_are_noted(parts, part_cells, tmp_path):
    # The genes differ, and with them the tokens: only their names tell that they are the same cells.
    cells = part_cells[0].copy()
    cells.obs_names = ["".join("ACGT"[(index >> shift) % 4] for shift in range(14)) + "-1" for index in range(8)]
    cells[:, :1500].write_h5ad(parts / "0.h5ad")
    cells.obs_names = [name.replace("-1", "_sample") for name in cells.obs_names]
    cells[:, 500:].write_h5ad(parts / "1.h5ad")
    corpus = build(part_sources(), parts, tmp_path / "corpus")
    assert any("s0 and s1 share 7 barcodes" in note for note in corpus.manifest["notes"])


def test_a_split_that_cannot_be_made_is_an_error_where_it_was_asked_for(parts, tmp_path):
    settings = part_sources(2, splits={"mine": {"by": "cancer_type"}})
    with pytest.raises(SplitError, match="split 'mine': A split by cancer type needs two"):
        build(settings, parts, tmp_path / "corpus")
    settings["splits"] = None
    corpus = build(settings, parts, tmp_path / "corpus")
    assert list(corpus.splits) == ["donor", "study", "random"]
    assert any("there is no split 'cancer_type'" in note for note in corpus.manifest["notes"])


def test_a_split_holds_out_what_it_names_or_says_that_it_is_not_there(parts, tmp_path):
    settings = part_sources(2, splits={"mine": {"by": "donor", "held_out": ["s1/b"], "validation": 0.0}})
    corpus = build(settings, parts, tmp_path / "corpus")
    test = corpus.dataset("mine", "test")
    assert set(zip(test["study"][:], test["donor_id"][:], strict=True)) == {("s1", "b")}
    settings["splits"]["mine"]["held_out"] = ["s1/c"]
    with pytest.raises(SplitError, match="got s1/c; it has s0/a, s0/b, s1/a, s1/b"):
        build(settings, parts, tmp_path / "corpus")
    assert Corpus.open(corpus.folder).manifest == corpus.manifest


def test_a_list_in_a_file_has_its_paths_from_its_own_folder(parts, undisturbed, tmp_path):
    (parts / "sources.yaml").write_text(yaml.safe_dump(part_sources(), sort_keys=False), encoding="utf-8")
    corpus = build_corpus(parts / "sources.yaml", tmp_path / "corpus", progress=False)
    assert public_files(corpus.folder) == undisturbed
    assert json.loads(undisturbed["manifest.json"]) == corpus.manifest
