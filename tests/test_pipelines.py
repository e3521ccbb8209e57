"""The pipelines: what `annotate` and `embed` give, in Transformers' form, and nothing written to the user's cells."""

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, BertConfig, BertModel, pipeline

import panfoma_hf
from panfoma_hf import CellEmbeddingPipeline, CellTypeAnnotationPipeline, PanFoMaConfig, PanFoMaForCellClassification
from panfoma_hf.inference.running import Runner
from tests.conftest import run_python, small_cells, spread_out
from tests.data.test_readers import (
    write_mtx_folder,
    write_table,
    write_with_counts_in_a_layer,
    write_with_counts_in_raw,
)


NAMES = ["B cell", "T cell", "mast"]
TASKS = {"cell_type": NAMES, "disease": ["healthy", "tumour"]}


def classifier(tokenizer, **settings) -> PanFoMaForCellClassification:
    """A tiny classifier of random weights that tell cells apart."""
    torch.manual_seed(0)
    config = PanFoMaConfig.from_size("tiny", vocab_size=len(tokenizer), **settings)
    return spread_out(PanFoMaForCellClassification(config))


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory) -> str:
    """Such a classifier in a folder, calibrated."""
    folder = tmp_path_factory.mktemp("pipelines") / "checkpoint"
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: index for index, name in enumerate(NAMES)}}
    calibration = {"temperature": 1.7, "energies": np.linspace(-3, 1, 101).tolist()}
    model = classifier(tokenizer, label_name="cell_type", calibration={"cell_type": calibration}, **labels)
    panfoma_hf.save_checkpoint(folder, model, tokenizer)
    return str(folder)


@pytest.fixture(scope="module")
def name(checkpoint) -> CellTypeAnnotationPipeline:
    return pipeline("cell-type-annotation", model=checkpoint, device="cpu")


@pytest.fixture(scope="module")
def embed(checkpoint) -> CellEmbeddingPipeline:
    return pipeline("cell-embedding", model=checkpoint, device="cpu")


@pytest.fixture(scope="module")
def expected(checkpoint, tokenizer) -> ad.AnnData:
    """The small cells as `annotate` leaves them."""
    cells = small_cells(tokenizer)
    return panfoma_hf.annotate(cells, checkpoint, embedding_key="X_panfoma", progress=False, device="cpu")


def entries(cells: ad.AnnData, task: str = "cell_type") -> list[dict]:
    columns = {
        "label": cells.obs[f"panfoma_{task}"].astype(str),
        "score": cells.obs[f"panfoma_{task}_score"],
        "unfamiliarity": cells.obs.get(f"panfoma_{task}_unfamiliarity"),
    }
    return pd.DataFrame({key: values for key, values in columns.items() if values is not None}).to_dict("records")


# -- results ---------------------------------------------------------------------------------------------------------


def test_names_and_scores_are_those_of_annotate(name, adata, expected):
    found = name(adata)
    assert found == entries(expected)
    assert found[0].keys() == {"label", "score", "unfamiliarity"}
    assert len({cell["label"] for cell in found}) > 1


def test_embeddings_are_those_of_embed(embed, adata, expected):
    found = embed(adata)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected.obsm["X_panfoma"])


def test_without_calibration_there_is_no_unfamiliarity(tokenizer, adata):
    model = classifier(tokenizer, num_labels=3)
    found = pipeline("cell-type-annotation", model=model, tokenizer=tokenizer, device="cpu")(adata)
    assert found[0].keys() == {"label", "score"}


@pytest.mark.parametrize(("top_k", "count"), [(1, 1), (2, 2), (None, 3), (7, 3)])
def test_top_k_gives_the_likeliest_names_first(top_k, count, name, adata, expected):
    found = name(adata, top_k=top_k)
    probabilities = expected.obsm["panfoma_cell_type_proba"]
    for cell, of_cell, unfamiliarity in zip(
        found, probabilities, expected.obs["panfoma_cell_type_unfamiliarity"], strict=True
    ):
        assert [entry["score"] for entry in cell] == sorted(of_cell.tolist(), reverse=True)[:count]
        assert all(of_cell[NAMES.index(entry["label"])] == np.float32(entry["score"]) for entry in cell)
        assert {entry["unfamiliarity"] for entry in cell} == {unfamiliarity}
    assert [cell[0]["label"] for cell in found] == expected.obs["panfoma_cell_type"].tolist()


@pytest.mark.parametrize("top_k", [pytest.param({}, id="name"), pytest.param({"top_k": 2}, id="top_2")])
def test_a_model_of_several_tasks_gives_a_dict_by_task(top_k, tokenizer, adata):
    model = classifier(tokenizer, label_tasks=TASKS, num_labels=5)
    pipe = pipeline("cell-type-annotation", model=model, tokenizer=tokenizer, device="cpu")
    found = pipe(adata, **top_k)
    annotated = panfoma_hf.annotate(adata.copy(), model, tokenizer=tokenizer, progress=False)
    assert len(found) == len(adata)
    for task in TASKS:
        of_task = [cell[task] for cell in found]
        if top_k:
            assert {len(names) for names in of_task} == {2}
            of_task = [names[0] for names in of_task]
        assert of_task == entries(annotated, task)


def test_a_cell_below_the_score_is_unassigned_and_top_k_still_says_what_it_may_be(name, adata):
    assert {cell["label"] for cell in name(adata, min_score=1.0)} == {"Unassigned"}
    assert {cell[0]["label"] for cell in name(adata, min_score=1.0, top_k=1)} <= set(NAMES)


def test_an_empty_cell_is_unassigned(name, adata):
    matrix = adata.X.toarray()
    matrix[7] = 0
    adata.X = sp.csr_matrix(matrix)
    assert name(adata)[7] == {"label": "Unassigned", "score": 0.0, "unfamiliarity": 1.0}


# -- inputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "write", [write_with_counts_in_raw, write_with_counts_in_a_layer, write_mtx_folder, write_table]
)
def test_files_of_any_format_are_read(write, name, embed, adata, tmp_path):
    path = write(tmp_path, adata)
    expected = panfoma_hf.annotate(path, name.model, tokenizer=name.tokenizer, progress=False)
    assert name(str(path)) == entries(expected)
    panfoma_hf.embed(path, embed.model, tokenizer=embed.tokenizer, progress=False)
    assert embed(Path(path)).shape == (48, 32)


def test_a_list_gives_a_list_of_results(name, embed, adata, tmp_path):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    halves = [adata[:20], adata[20:].copy(), tmp_path / "cells.h5ad"]
    found = name(halves, top_k=1)
    assert [len(cells) for cells in found] == [20, 28, 48]
    assert [cell[0]["label"] for cell in found[0] + found[1]] == [cell["label"] for cell in name(adata)]
    assert [len(cells) for cells in embed(tuple(halves))] == [20, 28, 48]
    assert name([]) == []


def full_of_everything(adata: ad.AnnData) -> ad.AnnData:
    adata.layers["counts"] = adata.X.copy()
    adata.raw = adata.copy()
    adata.X = adata.X.toarray() / 2
    adata.obsm["X_panfoma"] = np.ones((48, 2))
    adata.obs["panfoma_cell_type"] = "mine"
    adata.uns["panfoma"] = "mine, too"
    return adata


def test_the_cells_of_the_user_stay_as_they_are(name, embed, adata):
    cells = full_of_everything(adata)
    before = cells.copy()
    name(cells)
    embed(cells)
    name(cells[5:40])
    pd.testing.assert_frame_equal(cells.obs, before.obs)
    pd.testing.assert_frame_equal(cells.var, before.var)
    assert cells.uns == before.uns
    assert cells.obsm.keys() == before.obsm.keys()
    np.testing.assert_array_equal(cells.obsm["X_panfoma"], before.obsm["X_panfoma"])
    np.testing.assert_array_equal(cells.X, before.X)
    assert (cells.layers["counts"] != before.layers["counts"]).nnz == 0


def test_matrices_are_not_copied(name, adata):
    cells = full_of_everything(adata)
    given = name.preprocess(cells)
    assert given.X is cells.X
    assert np.shares_memory(given.layers["counts"].data, cells.layers["counts"].data)
    assert np.shares_memory(given.raw.X.data, cells.raw.X.data)


@pytest.mark.parametrize("as_matrix", [sp.csr_matrix, sp.csr_matrix.toarray], ids=["sparse", "dense"])
def test_cells_on_disk_are_read_from_there(as_matrix, embed, adata, expected, tmp_path):
    adata.X = as_matrix(adata.X)
    adata.raw = adata.copy()
    adata.write_h5ad(tmp_path / "cells.h5ad")
    cells = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    np.testing.assert_array_equal(embed(cells), expected.obsm["X_panfoma"])
    assert list(cells.obsm) == []
    cells.file.close()


@pytest.mark.filterwarnings("ignore:Observation names are not unique", "ignore:Variable names are not unique")
def test_names_that_are_there_twice_change_nothing(embed, adata, expected):
    adata.obs_names = ["cell"] * 48
    np.testing.assert_array_equal(embed(adata), expected.obsm["X_panfoma"])


@pytest.mark.parametrize(
    ("cells", "error", "message"),
    [
        pytest.param("no-such-file.h5ad", FileNotFoundError, "got nothing at no-such-file.h5ad", id="no_file"),
        pytest.param("A T cell. " * 100, FileNotFoundError, r"got nothing at A T cell.*\.\.\.\. Check", id="text"),
        pytest.param(pd.DataFrame({"CD3E": [1]}), TypeError, "got DataFrame. Make an AnnData of it", id="table"),
        pytest.param(np.ones((2, 3)), TypeError, "takes an AnnData, .* got ndarray", id="array"),
        pytest.param([["cells.h5ad"]], TypeError, "a list of these, got list", id="list_in_a_list"),
        pytest.param((cells for cells in ()), TypeError, "got generator", id="generator"),
        pytest.param(None, TypeError, "got NoneType", id="nothing"),
    ],
)
def test_what_is_no_cells_is_refused(cells, error, message, name, embed):
    for pipe in (name, embed):
        with pytest.raises(error, match=message):
            pipe(cells)


# -- arguments -------------------------------------------------------------------------------------------------------


def test_arguments_count_for_all_calls_or_for_one(checkpoint, adata):
    adata.layers["own"] = adata.X.copy()
    adata.X = adata.X.toarray() - 1
    made = pipeline("cell-type-annotation", model=checkpoint, device="cpu", top_k=2, layer="own", min_score=1.0)
    assert [len(cell) for cell in made(adata)] == [2] * 48
    assert [len(cell) for cell in made(adata, top_k=3)] == [3] * 48
    assert [len(cell) for cell in made(adata)] == [2] * 48
    with pytest.raises(ValueError, match="`layer` must be 'X', 'raw' or a layer's name, got 'other'"):
        made(adata, layer="other")


@pytest.mark.parametrize("where", ["made", "called"])
def test_batch_size_and_threads_get_to_the_model(where, checkpoint, adata, monkeypatch):
    seen, forward = [], Runner._forward

    def counted(self, batch):
        seen.append((len(batch["input_ids"]), torch.get_num_threads(), self.options.progress))
        return forward(self, batch)

    monkeypatch.setattr(Runner, "_forward", counted)
    options = {"batch_size": 10, "num_threads": 1, "progress": True}
    pipe = pipeline("cell-embedding", model=checkpoint, device="cpu", **(options if where == "made" else {}))
    pipe([adata], **(options if where == "called" else {}))
    assert sorted(seen) == [(8, 1, True)] + [(10, 1, True)] * 4


def test_there_is_no_bar_unless_asked_for(embed, adata, capsys):
    embed(adata)
    assert "PanFoMa" not in capsys.readouterr().err
    embed(adata, progress=True)
    assert "PanFoMa" in capsys.readouterr().err


@pytest.mark.parametrize("unknown", ["batchsize", "output", "key_added"])
def test_an_unknown_argument_is_an_error(unknown, name, embed, checkpoint, adata):
    for pipe in (name, embed):
        with pytest.raises(TypeError, match=f"Arguments of {pipe.task} are layer, .*, got {unknown}"):
            pipe(adata, **{unknown: 3})
    with pytest.raises(TypeError, match=f"got {unknown}"):
        pipeline("cell-embedding", model=checkpoint, device="cpu", **{unknown: 3})


@pytest.mark.parametrize("wrong", ["top_k", "min_score"])
def test_embedding_names_nothing(wrong, embed, adata):
    with pytest.raises(TypeError, match=f"Arguments of cell-embedding are .*, got {wrong}"):
        embed(adata, **{wrong: 1})


@pytest.mark.parametrize("top_k", [0, -1, 2.5, "all"])
def test_top_k_is_a_number_of_names(top_k, name, adata):
    with pytest.raises(ValueError, match="`top_k` is a number of names from 1, got"):
        name(adata, top_k=top_k)


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
def test_dtype_is_that_of_the_weights(argument, checkpoint, adata):
    pipe = pipeline("cell-embedding", model=checkpoint, device="cpu", **{argument: "bfloat16"})
    assert pipe.dtype == torch.bfloat16
    model = AutoModel.from_pretrained(checkpoint, dtype="bfloat16")
    panfoma_hf.embed(adata, model, progress=False)
    np.testing.assert_array_equal(pipe(adata), adata.obsm["X_panfoma"])


# -- models ----------------------------------------------------------------------------------------------------------


def test_cells_are_embedded_by_the_shipped_checkpoint_where_none_is_named(adata):
    found = pipeline("cell-embedding", device="cpu")(adata)
    panfoma_hf.embed(adata, panfoma_hf.checkpoint(), device="cpu", progress=False)
    np.testing.assert_array_equal(found, adata.obsm["X_panfoma"])


def test_a_model_and_its_tokenizer_will_do(checkpoint, tokenizer, adata, expected):
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    name = pipeline("cell-type-annotation", model=model, tokenizer=tokenizer, device="cpu")
    assert name(adata) == entries(expected)
    embed = pipeline("cell-embedding", model=model, tokenizer=tokenizer, device="cpu")
    np.testing.assert_array_equal(embed(adata), expected.obsm["X_panfoma"])


def test_a_saved_pipeline_is_a_checkpoint_that_needs_no_remote_code(name, adata, expected, tmp_path):
    name.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "pipelines.py").exists()
    again = pipeline("cell-type-annotation", model=tmp_path / "saved", device="cpu", trust_remote_code=False)
    assert again(adata) == entries(expected)
    panfoma_hf.annotate(adata, tmp_path / "saved", device="cpu", progress=False)
    assert entries(adata) == entries(expected)


def test_a_checkpoint_without_classifier_is_refused_in_the_words_of_annotate(adata):
    with pytest.raises(ValueError, match="must hold every weight") as of_annotate:
        panfoma_hf.annotate(adata, panfoma_hf.checkpoint(), device="cpu", progress=False)
    for arguments in ({"model": panfoma_hf.checkpoint()}, {}):
        with pytest.raises(ValueError, match="must hold every weight") as of_pipeline:
            pipeline("cell-type-annotation", device="cpu", **arguments)
        assert str(of_pipeline.value) == str(of_annotate.value)


def test_a_model_without_classifier_is_refused_in_the_words_of_annotate(embed, tokenizer, adata):
    name = pipeline("cell-type-annotation", model=embed.model, tokenizer=tokenizer, device="cpu")
    with pytest.raises(ValueError, match="named by a model with a classifier, got PanFoMaModel"):
        name(adata)


def test_a_model_of_another_kind_is_refused(tokenizer):
    model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    with pytest.raises(ValueError, match="needs a checkpoint of PanFoMa, got BertModel"):
        pipeline("cell-embedding", model=model, tokenizer=tokenizer, device="cpu")


def test_the_pipelines_are_known_once_the_package_is_imported():
    code = """
from transformers.pipelines import PIPELINE_REGISTRY, get_supported_tasks
before = get_supported_tasks()
import sys, panfoma_hf
print(sorted(set(get_supported_tasks()) - set(before)), "anndata" in sys.modules)
"""
    assert run_python(code).splitlines()[-1] == "['cell-embedding', 'cell-type-annotation'] False"
