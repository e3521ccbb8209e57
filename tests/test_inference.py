"""From file to file: the same results as in memory, whatever happens on the way; and what the model says of genes."""

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import warnings
import weakref
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import matplotlib
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

import panfoma_hf
from panfoma_cli import app
from panfoma_hf import PanFoMaConfig, PanFoMaForCellClassification, PanFoMaTokenizer
from panfoma_hf.data import storage
from panfoma_hf.data.cells import read_cells
from panfoma_hf.inference import gene_embeddings, gene_scores, parts_folder, streaming
from panfoma_hf.inference.running import Runner, bytes_of, length_batches, prefetched, tokens_per_batch
from panfoma_hf.inference.streaming import MANIFEST_FILE, Parts
from panfoma_hf.plotting import save_gene_ranking
from tests.conftest import ROOT, cells_of_counts, small_cells, spread_out, tiny_config
from tests.data.test_readers import (
    write_10x_h5,
    write_loom,
    write_mtx_folder,
    write_table,
    write_with_counts_in_a_layer,
    write_with_counts_in_raw,
    write_zarr,
)


EMPTY = 7
NAMES = ["B cell", "T cell", "mast"]
# Entries of a chunk: the 48 small cells are five or six chunks then.
CHUNK = 200


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory) -> Path:
    """A tiny classifier of random weights that tell cells apart."""
    folder = tmp_path_factory.mktemp("inference") / "checkpoint"
    torch.manual_seed(0)
    config = PanFoMaConfig.from_size("tiny", vocab_size=len(tokenizer), label_name="cell_type", num_labels=3)
    config.id2label, config.label2id = dict(enumerate(NAMES)), {name: index for index, name in enumerate(NAMES)}
    model = spread_out(PanFoMaForCellClassification(config))
    panfoma_hf.save_checkpoint(folder, model, tokenizer)
    return folder


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(storage, "CHUNK_ENTRIES", CHUNK)


def rich_cells(tokenizer: PanFoMaTokenizer) -> ad.AnnData:
    """The small cells, one of them empty, with something in every part of an AnnData."""
    cells = small_cells(tokenizer)
    matrix = cells.X.toarray()
    matrix[EMPTY] = 0
    cells.X = sp.csr_matrix(matrix)
    cells.obs["score"] = np.linspace(0, 1, 48)
    cells.layers["scaled"] = matrix - 1
    cells.obsm["X_own"] = np.arange(96, dtype=np.float32).reshape(48, 2)
    cells.varm["loadings"] = np.ones((40, 2))
    cells.obsp["neighbors"] = sp.identity(48, format="csr")
    cells.uns["notes"] = {"of": "mine", "numbers": np.arange(3)}
    cells.uns["panfoma"] = {"X_before": {"checkpoint": "another"}}
    return cells


@pytest.fixture
def cells(tokenizer) -> ad.AnnData:
    return rich_cells(tokenizer)


@pytest.fixture
def file(cells, tmp_path) -> Path:
    cells.write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


@dataclass
class Count:
    """Cells that went through a model."""

    cells: int = 0


@pytest.fixture
def run(monkeypatch) -> Count:
    count, forward = Count(), Runner._forward

    def counted(self, batch):
        count.cells += len(batch["input_ids"])
        return forward(self, batch)

    monkeypatch.setattr(Runner, "_forward", counted)
    return count


class Stopped(BaseException):
    """As KeyboardInterrupt: nothing but a test catches it."""


def stop_after(patch: pytest.MonkeyPatch, chunks: int, error: type[BaseException] = Stopped) -> None:
    """Have a run end when so many chunks are saved."""
    save = Parts.save

    def saved(self, index, part):
        save(self, index, part)
        if len(self.finished()) == chunks:
            raise error

    patch.setattr(Parts, "save", saved)


def read(path: Path) -> ad.AnnData:
    return ad.read_h5ad(path) if path.suffix == ".h5ad" else ad.read_zarr(path)


def annotated(file: Path, checkpoint: Path, output: Path, **options):
    return panfoma_hf.annotate(file, checkpoint, output=output, embedding_key="X_panfoma", progress=False, **options)


def assert_same_results(found: ad.AnnData, expected: ad.AnnData) -> None:
    # Whatever the order of the categories.
    tables = [
        cells.obs.assign(panfoma_cell_type=cells.obs["panfoma_cell_type"].astype(str)) for cells in (found, expected)
    ]
    pd.testing.assert_frame_equal(*tables, rtol=1e-5, atol=1e-5)
    for key in ("X_panfoma", "panfoma_cell_type_proba"):
        np.testing.assert_allclose(found.obsm[key], expected.obsm[key], rtol=1e-5, atol=1e-5)
    told = [json.dumps(cells.uns["panfoma"], sort_keys=True, default=np.ndarray.tolist) for cells in (found, expected)]
    assert told[0] == told[1]


@pytest.fixture(scope="module")
def expected(checkpoint, tokenizer) -> ad.AnnData:
    """The rich cells, annotated in memory."""
    cells = rich_cells(tokenizer)
    panfoma_hf.annotate(cells, checkpoint, embedding_key="X_panfoma", progress=False)
    return cells


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"checkpoint"}


# -- file to file ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
def test_a_file_gives_a_file_with_the_same_results_and_everything_else_as_it_was(
    kind, cells, expected, checkpoint, tmp_path, small_chunks
):
    file, output = tmp_path / f"cells.{kind}", tmp_path / f"out.{kind}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of formats to come
        cells.write_h5ad(file) if kind == "h5ad" else cells.write_zarr(file)
    report = annotated(file, checkpoint, output)
    found = read(output)
    assert_same_results(found, expected)
    assert found.uns["panfoma"].keys() == {"X_before", "panfoma_cell_type", "X_panfoma"}
    assert (found.X != cells.X).nnz == 0
    np.testing.assert_array_equal(found.layers["scaled"], cells.layers["scaled"])
    np.testing.assert_array_equal(found.obsm["X_own"], cells.obsm["X_own"])
    np.testing.assert_array_equal(found.varm["loadings"], cells.varm["loadings"])
    assert (found.obsp["neighbors"] != cells.obsp["neighbors"]).nnz == 0
    assert found.uns["notes"]["of"] == "mine"
    assert not [key for key in read(file).obs if "panfoma" in key]
    assert left_in(tmp_path) == {file.name, output.name}
    assert (report.cells, report.cells_run, report.cells_resumed, report.empty_cells) == (48, 48, 0, 1)
    counts = found.obs["panfoma_cell_type"].value_counts().to_dict()
    assert report.names == {"panfoma_cell_type": counts}
    assert 0 < report.model_seconds < report.seconds


def test_an_empty_cell_is_unassigned_in_a_file_too(file, checkpoint, tmp_path, caplog):
    annotated(file, checkpoint, tmp_path / "out.h5ad")
    found = read(tmp_path / "out.h5ad")
    is_unassigned = found.obs["panfoma_cell_type"] == "Unassigned"
    assert np.flatnonzero(is_unassigned).tolist() == [EMPTY]
    assert found.obs["panfoma_cell_type_score"].iloc[EMPTY] == 0
    assert np.isfinite(found.obsm["X_panfoma"]).all()
    assert found.uns["panfoma"]["X_panfoma"]["empty_cells"] == 1
    assert "1 of 48 cells have no expressed gene" in caplog.text


def test_an_older_result_under_the_same_key_is_replaced(file, checkpoint, tmp_path):
    annotated(file, checkpoint, tmp_path / "first.h5ad", min_score=1)
    annotated(tmp_path / "first.h5ad", checkpoint, tmp_path / "second.h5ad", min_score=0)
    first, second = read(tmp_path / "first.h5ad"), read(tmp_path / "second.h5ad")
    assert list(first.obs) == list(second.obs)
    assert (first.obs["panfoma_cell_type"] == "Unassigned").sum() > 1
    assert (second.obs["panfoma_cell_type"] == "Unassigned").sum() == 1
    assert second.uns["panfoma"]["panfoma_cell_type"]["min_score"] == 0


def write_csc(folder: Path, cells: ad.AnnData) -> Path:
    ad.AnnData(cells.X.tocsc(), obs=cells.obs, var=cells.var).write_h5ad(folder / "csc.h5ad")
    return folder / "csc.h5ad"


def write_dense_zarr(folder: Path, cells: ad.AnnData) -> Path:
    return write_zarr(folder, cells, sp.csr_matrix.toarray)


def write_zipped_zarr(folder: Path, cells: ad.AnnData) -> Path:
    write_zarr(folder, cells)
    shutil.make_archive(str(folder / "cells.zarr"), "zip", folder / "cells.zarr")
    return folder / "cells.zarr.zip"


SOURCES = {
    "h5ad_csc": write_csc,
    "h5ad_raw": write_with_counts_in_raw,
    "h5ad_layer": write_with_counts_in_a_layer,
    "zarr_dense": write_dense_zarr,
    "zarr_zip": write_zipped_zarr,
    "loom": write_loom,
    "10x_h5": write_10x_h5,
    "10x_mtx": write_mtx_folder,
    "csv": write_table,
}


def entries(matrix) -> np.ndarray:
    return matrix.toarray() if sp.issparse(matrix) else np.asarray(matrix)


@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
@pytest.mark.parametrize("source", SOURCES)
def test_every_format_gives_an_anndata_of_either_kind(source, kind, adata, checkpoint, tmp_path, small_chunks):
    (tmp_path / "input").mkdir()
    path, output = SOURCES[source](tmp_path / "input", adata), tmp_path / "output" / f"out.{kind}"
    expected = panfoma_hf.embed(path, checkpoint, progress=False)
    panfoma_hf.embed(path, checkpoint, output=output, progress=False)
    found = read(output)
    assert list(found.obs_names) == list(expected.obs_names)
    assert list(found.var_names) == list(expected.var_names)
    assert list(found.obs) == list(expected.obs)
    np.testing.assert_array_equal(entries(found.X), entries(expected.X))
    assert found.layers.keys() == expected.layers.keys()
    for key in expected.layers:
        np.testing.assert_array_equal(entries(found.layers[key]), entries(expected.layers[key]))
    assert (found.raw is None) == (expected.raw is None)
    if expected.raw is not None:
        np.testing.assert_array_equal(entries(found.raw.X), entries(expected.raw.X))
        assert list(found.raw.var_names) == list(expected.raw.var_names)
    np.testing.assert_allclose(found.obsm["X_panfoma"], expected.obsm["X_panfoma"], rtol=1e-5, atol=1e-5)
    assert left_in(output.parent) == {output.name}


def test_what_an_anndata_has_is_carried_over_to_the_other_kind(cells, file, checkpoint, tmp_path):
    panfoma_hf.embed(file, checkpoint, output=tmp_path / "out.zarr", progress=False)
    found = read(tmp_path / "out.zarr")
    assert found.obs.columns.tolist() == cells.obs.columns.tolist()
    for part in ("obsm", "varm", "obsp"):
        for key, values in getattr(cells, part).items():
            np.testing.assert_array_equal(entries(getattr(found, part)[key]), entries(values))
    assert found.uns["notes"]["of"] == "mine"
    assert found.uns["panfoma"].keys() == {"X_before", "X_panfoma"}


@pytest.mark.filterwarnings("ignore::anndata.OldFormatWarning", "ignore:Moving element from:FutureWarning")
def test_an_h5ad_of_an_old_anndata_is_written_anew(checkpoint, tmp_path):
    folder = importlib.util.find_spec("scanpy").submodule_search_locations[0]
    path = Path(folder, "datasets", "10x_pbmc68k_reduced.h5ad")
    panfoma_hf.embed(path, checkpoint, output=tmp_path / "out.h5ad", progress=False)
    found, expected = read(tmp_path / "out.h5ad"), read_cells(path)
    pd.testing.assert_frame_equal(found.obs, expected.obs)
    np.testing.assert_array_equal(entries(found.X), entries(expected.X))
    np.testing.assert_array_equal(entries(found.raw.X), entries(expected.raw.X))
    np.testing.assert_array_equal(found.obsm["X_umap"], expected.obsm["X_umap"])
    assert found.obsm["X_panfoma"].shape == (700, 32)


def test_tokens_of_few_chunks_are_in_memory_at_a_time(file, checkpoint, tmp_path, small_chunks, monkeypatch):
    made, most = [], 0
    tokenize, forward = PanFoMaTokenizer.tokenize_cells, Runner._forward

    def remembered(self, *arguments, **options):
        tokens = tokenize(self, *arguments, **options)
        made.append(weakref.ref(tokens))
        return tokens

    def looked_at(self, batch):
        nonlocal most
        most = max(most, sum(reference() is not None for reference in made))
        return forward(self, batch)

    monkeypatch.setattr(PanFoMaTokenizer, "tokenize_cells", remembered)
    monkeypatch.setattr(Runner, "_forward", looked_at)
    panfoma_hf.embed(file, checkpoint, output=tmp_path / "out.h5ad", progress=False)
    assert len(made) >= 5
    assert most <= 3  # the one that is run, the next one, and perhaps the last one, not yet given up


def test_the_next_item_is_made_while_one_is_worked_on():
    is_made = threading.Event()

    def items():
        yield 1
        is_made.set()
        yield 2

    found = prefetched(items())
    assert next(found) == 1
    assert is_made.wait(10)
    assert list(found) == [2]


# -- a run that is cut off -------------------------------------------------------------------------------------------


def test_a_run_goes_on_after_its_last_finished_chunk(file, expected, checkpoint, tmp_path, small_chunks, run):
    output, parts = tmp_path / "out.zarr", parts_folder(tmp_path / "out.zarr")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Stopped):
            annotated(file, checkpoint, output)
    assert not output.exists()
    chunks = sorted(parts.glob("chunk-*"))
    assert len(chunks) == 3
    first = run.cells
    assert 0 < first < 48
    (parts / "chunk-000003.safetensors.tmp").write_bytes(b"half")
    (parts / f"unfinished{output.suffix}").mkdir()
    report = annotated(file, checkpoint, output, batch_size=5)
    assert run.cells == 48
    assert (report.cells_resumed, report.cells_run) == (first, 48 - first)
    found = read(output)
    assert_same_results(found, expected)
    assert left_in(tmp_path) == {file.name, output.name}


def test_a_damaged_part_is_run_again(file, checkpoint, tmp_path, small_chunks, run):
    output = tmp_path / "out.h5ad"
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            annotated(file, checkpoint, output)
    first, part = run.cells, parts_folder(output) / "chunk-000001.safetensors"
    part.write_bytes(part.read_bytes()[:50])
    report = annotated(file, checkpoint, output)
    assert report.cells_resumed < first
    assert run.cells == 48 + first - report.cells_resumed
    assert np.isfinite(read(output).obsm["X_panfoma"]).all()


KILLED = f"""
import os, signal, sys
import panfoma_hf
from panfoma_hf.data import storage
from panfoma_hf.inference.streaming import Parts
storage.CHUNK_ENTRIES = {CHUNK}
save = Parts.save
def killed(self, index, part):
    if index == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, index, part)
Parts.save = killed
panfoma_hf.annotate(sys.argv[1], sys.argv[2], output=sys.argv[3], embedding_key="X_panfoma", progress=False)
"""


def test_a_run_goes_on_after_its_process_was_killed(file, checkpoint, tmp_path, small_chunks, run):
    output = tmp_path / "out.h5ad"
    command = [sys.executable, "-c", KILLED, file, checkpoint, output]
    done = subprocess.run(command, capture_output=True, cwd=ROOT, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not output.exists()
    report = annotated(file, checkpoint, output)
    assert report.cells_resumed > 0
    assert run.cells == 48 - report.cells_resumed
    assert left_in(tmp_path) == {file.name, output.name}


def change_input(file: Path, options: dict) -> None:
    cells = ad.read_h5ad(file)
    cells.X = cells.X + sp.csr_matrix(np.eye(48, 40, dtype=np.float32))
    cells.write_h5ad(file)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        pytest.param(change_input, "input was", id="input"),
        pytest.param(lambda file, options: options.update(dtype="bfloat16"), "dtype was", id="dtype"),
        pytest.param(lambda file, options: options.update(layer="scaled"), "negative", id="matrix"),
        pytest.param(lambda file, options: options.update(embedding_key=None), "outputs was", id="outputs"),
    ],
)
def test_another_input_or_other_settings_are_refused(change, name, file, checkpoint, tmp_path, small_chunks, run):
    output, options = tmp_path / "out.h5ad", {"embedding_key": "X_panfoma"}
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            panfoma_hf.annotate(file, checkpoint, output=output, progress=False, **options)
    change(file, options)
    before = run.cells
    with pytest.raises(ValueError, match=name):
        panfoma_hf.annotate(file, checkpoint, output=output, progress=False, **options)
    assert run.cells == before
    assert len(list(parts_folder(output).glob("chunk-*"))) == 2
    assert not output.exists()


def test_other_weights_are_refused_and_a_run_begins_anew_if_asked_to(file, checkpoint, tmp_path, small_chunks, run):
    output = tmp_path / "out.h5ad"
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            annotated(file, model, output)
    with torch.no_grad():
        model.panfoma.final_norm.weight[0] += 0.01
    with pytest.raises(ValueError, match=r"model was .* \(--restart\)"):
        annotated(file, model, output)
    before = run.cells
    report = annotated(file, model, output, resume=False)
    assert (report.cells_resumed, run.cells - before) == (0, 48)
    panfoma_hf.annotate(in_memory := read(file), model, embedding_key="X_panfoma", progress=False)
    np.testing.assert_allclose(read(output).obsm["X_panfoma"], in_memory.obsm["X_panfoma"], rtol=1e-5, atol=1e-5)


def test_an_input_that_changes_during_the_run_gives_no_output(file, checkpoint, tmp_path, monkeypatch):
    save = Parts.save

    def changed(self, index, part):
        save(self, index, part)
        os.utime(file, (1, 1))

    monkeypatch.setattr(Parts, "save", changed)
    with pytest.raises(ValueError, match="changed while it was read"):
        annotated(file, checkpoint, tmp_path / "out.h5ad")
    assert not (tmp_path / "out.h5ad").exists()


@pytest.mark.parametrize("chunks", [0, 2])
def test_an_error_of_reading_leaves_no_output_and_what_was_finished(chunks, file, checkpoint, tmp_path, small_chunks):
    output, read_rows, calls = tmp_path / "out.h5ad", storage.CompressedRows.read, []

    def failing(self, start, stop):
        calls.append(start)
        # Small files are sampled whole, in one read; chunks come after it.
        if len(calls) > 1 + chunks:
            raise OSError("the disk is gone")
        return read_rows(self, start, stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage.CompressedRows, "read", failing)
        with pytest.raises(ValueError, match=r"cells.h5ad cannot be read: the disk is gone"):
            annotated(file, checkpoint, output)
    assert not output.exists()
    assert parts_folder(output).exists() == (chunks > 0)
    report = annotated(file, checkpoint, output)
    assert (report.cells_resumed > 0) == (chunks > 0)
    assert left_in(tmp_path) == {file.name, output.name}


def test_a_full_disk_at_the_end_keeps_what_was_found(file, checkpoint, tmp_path, run):
    output = tmp_path / "out.h5ad"

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        with pytest.raises(OSError, match="No space left"):
            annotated(file, checkpoint, output)
    assert left_in(tmp_path) == {file.name, f"{output.name}.parts"}
    assert not list(parts_folder(output).glob("unfinished*"))
    annotated(file, checkpoint, output)
    assert run.cells == 48


def test_a_second_run_of_the_same_output_is_refused(file, checkpoint, tmp_path):
    output = tmp_path / "out.h5ad"
    with (
        Parts(parts_folder(output), []).locked(),
        pytest.raises(FileExistsError, match="One run at a time"),
    ):
        annotated(file, checkpoint, output)


# -- outputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
def test_an_existing_output_stays_until_it_is_to_be_replaced_and_the_new_one_is_whole(
    kind, file, checkpoint, tmp_path, small_chunks, run
):
    output = tmp_path / f"out.{kind}"
    panfoma_hf.embed(file, checkpoint, output=output, key_added="X_first", progress=False)
    first = run.cells
    with pytest.raises(FileExistsError, match="overwrite=True"):
        panfoma_hf.embed(file, checkpoint, output=output, key_added="X_second", progress=False)
    assert run.cells == first
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            panfoma_hf.embed(file, checkpoint, output=output, key_added="X_second", overwrite=True, progress=False)
    assert "X_first" in read(output).obsm
    panfoma_hf.embed(file, checkpoint, output=output, key_added="X_second", overwrite=True, progress=False)
    assert set(read(output).obsm) == {"X_own", "X_second"}
    assert left_in(tmp_path) == {file.name, output.name}


def test_an_output_that_appears_during_the_run_stays(file, checkpoint, tmp_path, monkeypatch):
    output, save = tmp_path / "out.h5ad", Parts.save

    def meanwhile(self, index, part):
        save(self, index, part)
        output.write_text("somebody's")

    monkeypatch.setattr(Parts, "save", meanwhile)
    with pytest.raises(FileExistsError, match="meanwhile"):
        annotated(file, checkpoint, output)
    assert output.read_text() == "somebody's"


def test_an_output_that_cannot_be_replaced_is_put_back(file, checkpoint, tmp_path):
    output, rename = tmp_path / "out.zarr", Path.replace
    embed = lambda **options: panfoma_hf.embed(file, checkpoint, output=output, progress=False, **options)  # noqa: E731
    embed(key_added="X_first")

    def refused(self, target):
        if Path(target) == output:
            raise OSError("no")
        return rename(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", refused)
        with pytest.raises(OSError, match="no"):
            embed(key_added="X_second", overwrite=True)
    assert "X_first" in read(output).obsm
    # As a kill between the two steps leaves it.
    output.rename(parts_folder(output) / "replaced.zarr")
    with pytest.raises(FileExistsError, match="meanwhile"):
        embed(key_added="X_second")
    assert "X_first" in read(output).obsm
    embed(key_added="X_second", overwrite=True)
    assert set(read(output).obsm) == {"X_own", "X_second"}
    assert left_in(tmp_path) == {file.name, output.name}


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        pytest.param("cells.h5ad", {"overwrite": True}, ValueError, "another file than the input", id="the_input"),
        pytest.param("out.csv", {}, ValueError, r"ends in .h5ad or .zarr", id="another_suffix"),
        pytest.param("thesis.zarr", {"overwrite": True}, FileExistsError, "something else in", id="not_ours"),
        pytest.param("taken.h5ad", {}, FileExistsError, "something else in it: notes.txt", id="parts_not_ours"),
        pytest.param("out.h5ad", {"embedding_key": "X/y"}, ValueError, "has no '/'", id="slash"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_a_cell_is_run(
    name, options, error, message, file, checkpoint, tmp_path, run
):
    for folder in ("thesis.zarr", "taken.h5ad.parts"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "notes.txt").write_text("years of work")
    with pytest.raises(error, match=message):
        panfoma_hf.annotate(file, checkpoint, output=tmp_path / name, progress=False, **options)
    assert run.cells == 0
    assert left_in(tmp_path) == {"cells.h5ad", "thesis.zarr", "taken.h5ad.parts"}
    assert (tmp_path / "thesis.zarr" / "notes.txt").exists()


def test_something_else_under_our_key_of_uns_is_refused(cells, checkpoint, tmp_path, run):
    cells.uns["panfoma"] = "mine"
    cells.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(ValueError, match=r"uns\['panfoma'\] must be free"):
        annotated(tmp_path / "cells.h5ad", checkpoint, tmp_path / "out.h5ad")
    assert run.cells == 0


def test_an_anndata_is_not_written_to_a_file(cells, checkpoint, tmp_path):
    with pytest.raises(ValueError, match="`output` goes with cells in a file"):
        panfoma_hf.embed(cells, checkpoint, output=tmp_path / "out.h5ad")


# -- several processes -----------------------------------------------------------------------------------------------


@dataclass
class Process:
    """One of two processes, as Accelerate tells of them."""

    process_index: int
    num_processes: int = 2

    @property
    def is_main_process(self) -> bool:
        return self.process_index == 0

    def wait_for_everyone(self) -> None:
        """A test runs them in turns."""


def test_processes_share_the_chunks_and_the_first_one_writes(
    file, expected, checkpoint, tmp_path, small_chunks, run, monkeypatch
):
    output, finish = tmp_path / "out.h5ad", streaming._finish
    other = None

    def finish_after_the_other(*arguments):
        nonlocal other
        own = run.cells
        monkeypatch.setattr(streaming, "PartialState", lambda: Process(1))
        other = annotated(file, checkpoint, output)
        assert run.cells - own == other.cells_run
        assert not other.is_written
        assert not output.exists()
        finish(*arguments)

    monkeypatch.setattr(streaming, "PartialState", lambda: Process(0))
    monkeypatch.setattr(streaming, "_finish", finish_after_the_other)
    report = annotated(file, checkpoint, output)
    assert report.is_written
    assert run.cells == report.cells_run + other.cells_run == 48
    assert min(report.cells_run, other.cells_run) > 10
    found = read(output)
    assert_same_results(found, expected)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.slow
def test_two_processes_of_accelerate_write_one_file(file, expected, checkpoint, tmp_path):
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    command = [
        *launch,
        "--main_process_port",
        str(free_port()),
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "-m",
    ]
    command += ["panfoma_hf", "embed", file, checkpoint, "--out", tmp_path / "out.h5ad", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["is_written"]
    found = read(tmp_path / "out.h5ad").obsm["X_panfoma"]
    np.testing.assert_allclose(found, expected.obsm["X_panfoma"], rtol=1e-5, atol=1e-5)


# -- batches ---------------------------------------------------------------------------------------------------------


def cells_of_lengths(tokenizer: PanFoMaTokenizer, lengths: list[int]) -> ad.AnnData:
    """Cells that express so many genes."""
    rng = np.random.default_rng(0)
    counts = np.zeros((len(lengths), max(lengths)))
    for cell, length in zip(counts, lengths, strict=True):
        cell[rng.permutation(len(cell))[:length]] = 1 + rng.poisson(3, length)
    return cells_of_counts(tokenizer, counts, "cell")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"batch_size": 1}, id="one_by_one"),
        pytest.param({"batch_size": 7}, id="seven"),
        pytest.param({"memory": "600KB"}, id="small_budget"),
        pytest.param({"memory": "4GB"}, id="large_budget"),
    ],
)
def test_a_cells_results_depend_neither_on_batches_nor_on_order_nor_on_other_cells(options, tokenizer, checkpoint):
    cells = cells_of_lengths(tokenizer, [3, 150, 40, 1, 97, 8, 300, 12, 64, 300, 41, 2])
    annotate = lambda cells, **options: panfoma_hf.annotate(  # noqa: E731
        cells.copy(), checkpoint, embedding_key="X_panfoma", progress=False, **options
    )
    expected = annotate(cells)
    order = np.random.default_rng(1).permutation(12)
    for found, at in ((annotate(cells, **options), slice(None)), (annotate(cells[order], **options), order)):
        for key in ("X_panfoma", "panfoma_cell_type_proba"):
            np.testing.assert_allclose(found.obsm[key], expected.obsm[key][at], rtol=1e-5, atol=1e-5)
    few = annotate(cells[[4, 9]], **options)
    np.testing.assert_allclose(few.obsm["X_panfoma"], expected.obsm["X_panfoma"][[4, 9]], rtol=1e-5, atol=1e-5)
    distances = np.linalg.norm(expected.obsm["X_panfoma"][:, None] - expected.obsm["X_panfoma"], axis=-1)
    assert distances[~np.eye(12, dtype=bool)].min() > 0.01


def test_batches_hold_every_cell_once_and_no_more_tokens_than_allowed():
    lengths = np.random.default_rng(0).integers(0, 3000, 500)
    batches = list(length_batches(lengths, 4000))
    assert sorted(np.concatenate(batches)) == list(range(500))
    padded = [len(batch) * lengths[batch].max() for batch in batches]
    assert all(size <= 4000 or len(batch) == 1 for size, batch in zip(padded, batches, strict=True))
    assert len(batches[0]) == 1  # the longest come first
    assert len(batches[-1]) > 5
    assert [len(batch) for batch in length_batches(lengths, 4000, batch_size=300)] == [300, 200]


def test_a_budget_of_memory_is_shared_by_tokens():
    model = panfoma_hf.PanFoMaModel(tiny_config())
    few, many = tokens_per_batch(model, "100MB"), tokens_per_batch(model, "1GB")
    assert many == pytest.approx(10 * few, abs=10)
    wide = panfoma_hf.PanFoMaModel(tiny_config(hidden_size=64))
    assert tokens_per_batch(wide, "1GB") < many


@pytest.mark.parametrize(
    ("memory", "size"), [("4GB", 4 * 10**9), ("1.5 MiB", 1.5 * 2**20), ("700", 700), (2**30, 2**30), (None, None)]
)
def test_memory_is_told_in_bytes_or_by_its_unit(memory, size):
    assert bytes_of(memory) == size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "much"}, "`memory` is an amount"),
        ({"memory": "0GB"}, "`memory` is an amount"),
        ({"dtype": "float16"}, "`dtype` must be 'float32' or 'bfloat16'"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"num_threads": 0}, "`num_threads` must be at least 1"),
    ],
)
def test_options_out_of_range_are_refused(options, message, cells, checkpoint):
    with pytest.raises(ValueError, match=message):
        panfoma_hf.embed(cells, checkpoint, **options)


def test_bfloat16_is_near_float32_and_noted(cells, checkpoint):
    full = panfoma_hf.embed(cells.copy(), checkpoint, progress=False)
    half = panfoma_hf.embed(cells.copy(), checkpoint, dtype="bfloat16", progress=False)
    difference = np.abs(half.obsm["X_panfoma"] - full.obsm["X_panfoma"])
    assert 0 < difference.max() < 0.2 * np.abs(full.obsm["X_panfoma"]).max()
    assert half.uns["panfoma"]["X_panfoma"]["dtype"] == "bfloat16"
    assert full.uns["panfoma"]["X_panfoma"]["dtype"] == "float32"


def test_a_batch_that_does_not_fit_is_told_with_what_to_do(file, checkpoint, tmp_path, small_chunks, monkeypatch):
    forward, calls = PanFoMaForCellClassification.forward, []

    def full(self, *arguments, **options):
        calls.append(len(options["input_ids"]))
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, *arguments, **options)

    monkeypatch.setattr(PanFoMaForCellClassification, "forward", full)
    with pytest.raises(MemoryError, match=r"got \d+ cells of up to \d+ genes that do not. Allow a batch less"):
        annotated(file, checkpoint, tmp_path / "out.h5ad")
    assert len(list(parts_folder(tmp_path / "out.h5ad").glob("chunk-*"))) == 2


def test_threads_are_set_for_the_run_alone(cells, checkpoint, monkeypatch):
    before, seen, forward = torch.get_num_threads(), set(), Runner._forward

    def looked_at(self, batch):
        seen.add(torch.get_num_threads())
        return forward(self, batch)

    monkeypatch.setattr(Runner, "_forward", looked_at)
    panfoma_hf.embed(cells, checkpoint, num_threads=before + 1, progress=False)
    assert seen == {before + 1}
    assert torch.get_num_threads() == before


def test_another_length_of_cells_is_refused(file, checkpoint, tmp_path, small_chunks):
    output = tmp_path / "out.h5ad"
    shorter = AutoTokenizer.from_pretrained(checkpoint, model_max_length=4)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            panfoma_hf.embed(file, checkpoint, output=output, tokenizer=shorter, progress=False)
    with pytest.raises(ValueError, match="max_length was 4, is 3072"):
        panfoma_hf.embed(file, checkpoint, output=output, progress=False)


def test_a_run_that_finished_nothing_binds_no_settings(file, checkpoint, tmp_path):
    output = tmp_path / "out.h5ad"
    parts_folder(output).mkdir()
    (parts_folder(output) / MANIFEST_FILE).write_text('{"dtype": "bfloat16"}')  # as a kill in the first chunk leaves it
    panfoma_hf.embed(file, checkpoint, output=output, progress=False)
    assert read(output).uns["panfoma"]["X_panfoma"]["dtype"] == "float32"


def test_an_older_output_that_a_kill_left_aside_is_in_no_ones_way(file, checkpoint, tmp_path):
    output = tmp_path / "out.zarr"
    panfoma_hf.embed(file, checkpoint, output=output, key_added="X_first", progress=False)
    shutil.copytree(output, parts_folder(output) / "replaced.zarr")
    panfoma_hf.embed(file, checkpoint, output=output, key_added="X_second", overwrite=True, progress=False)
    assert set(read(output).obsm) == {"X_own", "X_second"}
    assert left_in(tmp_path) == {file.name, output.name}


def test_weights_that_are_cut_off_are_told(file, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"weights are whole and fit its configuration, got .*cut"):
        panfoma_hf.embed(file, tmp_path / "cut", output=tmp_path / "out.h5ad", progress=False)
    assert left_in(tmp_path) == {file.name, "cut"}


# -- the command -----------------------------------------------------------------------------------------------------


def command(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_the_command_annotates_and_tells_as_text_or_as_json(file, checkpoint, tmp_path):
    result = command("annotate", file, checkpoint, "--out", tmp_path / "text.h5ad", "--memory", "1GB")
    assert result.exit_code == 0, result.stderr
    counts = read(tmp_path / "text.h5ad").obs["panfoma_cell_type"].value_counts()
    assert "48 cells" in result.stdout
    for name, count in counts.items():
        assert re.search(rf"^{name} +{count} +{count / 48:.1%}$", result.stdout, re.MULTILINE)
    result = command("annotate", file, checkpoint, "--out", tmp_path / "json.zarr", "--json", "--min-score", 0)
    report = json.loads(result.stdout)
    assert (report["cells"], report["cells_run"], report["empty_cells"]) == (48, 48, 1)
    assert report["names"]["panfoma_cell_type"]["Unassigned"] == 1
    assert 'obs["panfoma_cell_type"]' in report["keys"]
    assert "panfoma_cell_type" in read(tmp_path / "json.zarr").obs


def test_the_command_embeds(file, checkpoint, tmp_path):
    result = command("embed", file, checkpoint, "--out", tmp_path / "out.h5ad", "--key", "X_mine", "--threads", 1)
    assert result.exit_code == 0, result.stderr
    assert read(tmp_path / "out.h5ad").obsm["X_mine"].shape == (48, 32)


def test_an_error_is_told_in_one_message(file, checkpoint, tmp_path):
    (tmp_path / "out.h5ad").write_text("mine")
    result = command("embed", file, checkpoint, "--out", tmp_path / "out.h5ad")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: An output is a new file")
    assert result.stdout == ""
    assert (tmp_path / "out.h5ad").read_text() == "mine"


def test_ctrl_c_says_how_to_go_on(file, checkpoint, tmp_path, small_chunks, run):
    arguments = ("embed", file, checkpoint, "--out", tmp_path / "out.h5ad", "--json")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2, KeyboardInterrupt)
        result = command(*arguments)
    assert result.exit_code == 130
    assert "The same command goes on from there; --restart begins anew." in result.stderr
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2, KeyboardInterrupt)
        anew = command(*arguments, "--restart")
    assert "The same command without --restart goes on from there." in anew.stderr
    first = run.cells // 2
    result = command(*arguments)
    assert (result.exit_code, run.cells) == (0, first + 48)
    assert json.loads(result.stdout)["cells_resumed"] == first


def test_ctrl_c_before_a_chunk_is_finished_leaves_nothing(file, checkpoint, tmp_path, monkeypatch):
    def interrupted(self, batch):
        raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "_forward", interrupted)
    result = command("embed", file, checkpoint, "--out", tmp_path / "out.h5ad")
    assert result.exit_code == 130
    assert "stopped: nothing was finished." in result.stderr
    assert left_in(tmp_path) == {file.name}


def test_restart_begins_anew(file, checkpoint, tmp_path, small_chunks, run):
    arguments = ("embed", file, checkpoint, "--out", tmp_path / "out.h5ad")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2, KeyboardInterrupt)
        command(*arguments)
    assert json.loads((parts_folder(tmp_path / "out.h5ad") / MANIFEST_FILE).read_text())["dtype"] == "float32"
    first = run.cells
    result = command(*arguments, "--dtype", "bfloat16")
    assert result.exit_code == 1
    assert "dtype was" in result.stderr
    assert command(*arguments, "--dtype", "bfloat16", "--restart").exit_code == 0
    assert run.cells == first + 48


# -- genes -----------------------------------------------------------------------------------------------------------


def by_hand(cells: ad.AnnData, model, tokenizer) -> list[dict]:
    """Each cell by itself: its genes, and its output."""
    found = []
    for index in range(cells.n_obs):
        row = cells.X[index].toarray()
        encoded = tokenizer(row, gene_names=list(cells.var_names), return_tensors="pt")
        length = int(encoded["attention_mask"].sum())
        with torch.no_grad():
            output = model(**encoded)
        genes = tokenizer.convert_ids_to_tokens(encoded["input_ids"][0, :length].tolist())
        states, scores = output.last_hidden_state[0, :length].numpy(), output.gene_scores[0, :length].numpy()
        found.append({"genes": genes, "states": states, "scores": scores})
    return found


def test_gene_scores_are_those_of_a_plain_loop(cells, checkpoint, tokenizer, small_chunks):
    model = AutoModel.from_pretrained(checkpoint).eval()
    table = gene_scores(cells, checkpoint, "cell_type", min_share=0.2, progress=False)
    single = by_hand(cells, model, tokenizer)
    for kind in ("B cell", "T cell", "mast"):
        members = [one for one, name in zip(single, cells.obs["cell_type"], strict=True) if name == kind]
        scores, expected = {}, []
        for one in members:
            if not one["genes"]:
                continue
            standardised = (one["scores"] - one["scores"].mean()) / one["scores"].std()
            for gene, score in zip(one["genes"], standardised, strict=True):
                scores.setdefault(gene, []).append(score)
        for gene, values in scores.items():
            if len(values) / len(members) >= 0.2:
                expected.append((gene, np.mean(values), len(values) / len(members)))
        expected.sort(key=lambda line: -line[1])
        found = table[table["group"] == kind]
        assert len(expected) > 10
        assert set(found["gene"]) == {gene for gene, _, _ in expected}
        by_gene = found.set_index("gene")
        for gene, score, share in expected:
            assert by_gene.loc[gene, "score"] == pytest.approx(score, abs=1e-4)
            assert by_gene.loc[gene, "share"] == pytest.approx(share)
        assert found["rank"].tolist() == list(range(1, len(found) + 1))
        assert (np.diff(found["score"]) <= 0).all()


def test_gene_scores_of_a_file_are_those_of_its_cells(cells, file, checkpoint, small_chunks):
    of_cells = gene_scores(cells, checkpoint, "cell_type", progress=False)
    of_file = gene_scores(file, checkpoint, "cell_type", batch_size=3, progress=False)
    keys = ["group", "gene"]
    pd.testing.assert_frame_equal(
        of_file.sort_values(keys, ignore_index=True).drop(columns="rank"),
        of_cells.sort_values(keys, ignore_index=True).drop(columns="rank"),
        atol=1e-4,
    )


def test_cells_without_a_group_are_left_out(cells, checkpoint, small_chunks):
    names = cells.obs["cell_type"].astype(object).to_numpy().copy()
    names[np.arange(48) % 2 == 1] = None
    with_gaps = gene_scores(cells, checkpoint, names, min_share=0, progress=False)
    without = gene_scores(cells[::2].copy(), checkpoint, "cell_type", min_share=0, progress=False)
    keys = ["group", "gene"]
    pd.testing.assert_frame_equal(
        with_gaps.sort_values(keys, ignore_index=True).drop(columns="rank"),
        without.sort_values(keys, ignore_index=True).drop(columns="rank"),
        atol=1e-4,
    )


def test_without_groups_all_cells_are_one(cells, checkpoint):
    table = gene_scores(cells, checkpoint, progress=False)
    assert set(table["group"]) == {"all"}
    expressed = dict(zip(cells.var_names, np.asarray((cells.X > 0).mean(0)).ravel(), strict=True))
    assert all(row["share"] == pytest.approx(expressed[row["gene"]]) for _, row in table.iterrows())


@pytest.mark.parametrize(
    ("groupby", "message"),
    [("no_such", "the columns are"), (["a", "b"], "48 cells needs a name, got 2"), ([None] * 48, "needs a group")],
    ids=["column", "too_few", "none"],
)
def test_groups_that_are_none_are_refused(groupby, message, cells, checkpoint):
    with pytest.raises(ValueError, match=message):
        gene_scores(cells, checkpoint, groupby, progress=False)


def test_static_gene_embeddings_are_the_input_table(checkpoint, tokenizer):
    model = AutoModel.from_pretrained(checkpoint)
    table = model.get_input_embeddings().weight.detach().numpy()
    all_genes = gene_embeddings(checkpoint)
    assert all_genes.shape == (len(tokenizer) - 1, 32)
    np.testing.assert_array_equal(all_genes.to_numpy(), table[1:])
    few = gene_embeddings(checkpoint, genes=["CD3E", "ENSG00000153563.15"])
    assert few.index.tolist() == ["CD3E", "CD8A"]
    np.testing.assert_array_equal(few.loc["CD8A"], table[tokenizer.convert_tokens_to_ids("CD8A")])
    with pytest.raises(ValueError, match="1 of 2 that are not: no-such-gene"):
        gene_embeddings(checkpoint, genes=["CD3E", "no-such-gene"])


def test_contextual_gene_embeddings_are_means_of_a_plain_loop(cells, file, checkpoint, tokenizer, small_chunks):
    model = AutoModel.from_pretrained(checkpoint).eval()
    sums: dict[tuple, list] = {}
    for one, kind in zip(by_hand(cells, model, tokenizer), cells.obs["cell_type"], strict=True):
        for gene, state in zip(one["genes"], one["states"], strict=True):
            sums.setdefault((kind, gene), []).append(state)
    found = gene_embeddings(checkpoint, file, "cell_type", min_cells=3, progress=False)
    expected = {key: np.mean(states, 0) for key, states in sums.items() if len(states) >= 3}
    assert set(found.index) == set(expected)
    for key, state in expected.items():
        np.testing.assert_allclose(found.loc[key], state, rtol=1e-4, atol=1e-4)
    gene = found.index[0][1]
    one = gene_embeddings(checkpoint, cells, "cell_type", genes=[gene], progress=False)
    assert set(one.index.get_level_values("gene")) == {gene}
    np.testing.assert_allclose(one.loc[found.index[0]], found.iloc[0], rtol=1e-4, atol=1e-4)


def test_a_ranking_of_genes_is_drawn_with_its_first_genes(tmp_path):
    table = pd.DataFrame(
        {
            "group": ["B cell"] * 3 + ["T cell"] * 2,
            "gene": ["CD19", "MS4A1", "CD79A", "CD3E", "CD8A"],
            "score": [2.0, 1.5, 1.0, 2.5, 0.5],
            "share": [0.9, 0.5, 0.2, 1.0, 0.3],
            "rank": [1, 2, 3, 1, 2],
        }
    )
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        save_gene_ranking(table, tmp_path / "genes.svg", num_genes=2)
    drawn = (tmp_path / "genes.svg").read_text()
    for text in ("B cell", "T cell", "CD19", "MS4A1", "CD3E", "CD8A"):
        assert f">{text}<" in drawn
    assert ">CD79A<" not in drawn
    with pytest.raises(ValueError, match="At least one gene"):
        save_gene_ranking(table[:0], tmp_path / "none.png")
