"""Fine-tuning and inference, end to end on small cells and on real ones."""

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import panfoma_hf
from panfoma_hf import DataCollatorForCells, PanFoMaConfig, PanFoMaModel, PanFoMaTokenizer, PanFoMaTrainer, cell_dataset
from panfoma_hf.data.cells import tokenize
from panfoma_hf.training import WeightedCrossEntropy, balanced_class_weights
from tests.conftest import tiny_config


@pytest.fixture
def fresh(tokenizer) -> PanFoMaConfig:
    return PanFoMaConfig.from_size("tiny", vocab_size=len(tokenizer))


QUICK = {"num_train_epochs": 1, "disable_tqdm": True}


# -- fine-tuning ---------------------------------------------------------------------------------------------------


def test_finetuning_learns_and_saves_names_genes_and_code(trained, adata):
    folder, _ = trained
    annotated = panfoma_hf.annotate(adata.copy(), folder, progress=False)
    assert (annotated.obs["panfoma_cell_type"] == adata.obs["cell_type"]).mean() > 0.9
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {"0": "B cell", "1": "T cell", "2": "mast"}
    assert config["label_name"] == "cell_type"
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "finetuning.json",
        "config.json",
        "configuration_panfoma.py",
        "expression.py",
        "gene_names.py",
        "token_kernels.py",
        "value_scale.py",
        "genes.tsv.gz",
        "model.safetensors",
        "modeling_panfoma.py",
        "selective_scan.py",
        "reference_kernels.py",
        "numba_kernels.py",
        "triton_kernels.py",
        "tokenization_panfoma.py",
        "tokenizer_config.json",
    }


def test_one_seed_gives_one_model(adata, fresh, tmp_path):
    def weights(seed):
        trainer = panfoma_hf.finetune(adata, "cell_type", tmp_path / "x", model=fresh, seed=seed, **QUICK)
        return trainer.model.classifier.weight

    first, again, other = weights(1), weights(1), weights(2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_finetuning_starts_from_a_checkpoint_with_other_labels(trained, adata, tmp_path):
    folder, _ = trained
    adata.obs["state"] = np.where(np.arange(48) % 3 == 0, "resting", "active")
    second = panfoma_hf.finetune(adata, "state", tmp_path / "second", model=folder, learning_rate=1e-9, **QUICK)
    before = AutoModel.from_pretrained(folder)
    torch.testing.assert_close(second.model.panfoma.final_norm.weight, before.final_norm.weight)
    assert second.model.config.id2label == {0: "active", 1: "resting"}
    assert second.model.classifier.weight.shape == (2, 32)
    annotated = panfoma_hf.annotate(adata, tmp_path / "second", progress=False)
    assert "panfoma_state" in annotated.obs


def test_validation_cells_are_scored_beside_the_majority_class(adata, fresh, tmp_path):
    train, validation = adata[:30].copy(), adata[30:].copy()
    trainer = panfoma_hf.finetune(train, "cell_type", tmp_path / "x", model=fresh, validation=validation, **QUICK)
    scores = trainer.evaluate()
    assert scores["eval_majority_accuracy"] == pytest.approx(1 / 3)
    assert {"eval_accuracy", "eval_macro_f1"} <= set(scores)
    assert trainer.evaluate()["eval_loss"] == scores["eval_loss"]  # no random draw in evaluation


def test_a_gene_set_is_saved_and_applied_at_inference(adata, fresh, tmp_path):
    panfoma_hf.finetune(adata, "cell_type", tmp_path / "x", model=fresh, gene_set=12, **QUICK)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "x")
    assert len(tokenizer.gene_set) == 12
    whole = panfoma_hf.embed(adata.copy(), tmp_path / "x", progress=False)
    panel = panfoma_hf.embed(adata[:, tokenizer.gene_set].copy(), tmp_path / "x", progress=False)
    np.testing.assert_array_equal(whole.obsm["X_panfoma"], panel.obsm["X_panfoma"])
    assert whole.uns["panfoma"]["X_panfoma"]["gene_set_size"] == 12
    assert whole.uns["panfoma"]["X_panfoma"]["genes_used"] == 12


def test_a_finetuned_model_finds_its_own_tokenizer_not_that_of_its_start(adata, fresh, tmp_path):
    panfoma_hf.finetune(adata, "cell_type", tmp_path / "a", model=fresh, gene_set=adata.var_names[:20], **QUICK)
    trainer = panfoma_hf.finetune(
        adata, "cell_type", tmp_path / "b", model=tmp_path / "a", gene_set=adata.var_names[20:], **QUICK
    )
    by_model = panfoma_hf.embed(adata.copy(), trainer.model, progress=False)
    by_path = panfoma_hf.embed(adata.copy(), tmp_path / "b", progress=False)
    np.testing.assert_allclose(by_model.obsm["X_panfoma"], by_path.obsm["X_panfoma"], rtol=1e-5, atol=1e-6)
    assert by_model.uns["panfoma"] == by_path.uns["panfoma"]


def test_mambas_a_and_d_norms_and_biases_are_not_decayed(tmp_path):
    model = panfoma_hf.PanFoMaForCellClassification(tiny_config())
    trainer = PanFoMaTrainer(model=model, args=TrainingArguments(output_dir=tmp_path, report_to="none"))
    decayed = set(trainer.get_decay_parameter_names(model))
    spared = {name for name, _ in model.named_parameters()} - decayed
    kinds = ("A_log", ".D", "bias", "norm.weight")
    assert spared == {name for name, _ in model.named_parameters() if name.endswith(kinds)}


def test_class_weights_have_a_mean_of_one_over_the_cells():
    labels = np.array([0] * 90 + [1] * 9 + [2])
    weights = balanced_class_weights(labels, 3, power=0.5)
    assert weights[labels].mean().item() == pytest.approx(1)
    assert (weights[1] / weights[0]).item() == pytest.approx(10**0.5)
    assert balanced_class_weights(labels, 3, power=0).tolist() == pytest.approx([1, 1, 1])
    loss = WeightedCrossEntropy(weights)
    logits = torch.randn(100, 3)
    expected = (
        torch.nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="none") * weights[labels]
    ).mean()
    torch.testing.assert_close(loss({"logits": logits}, torch.tensor(labels)), expected)


def test_a_users_own_plain_trainer_works(trained, adata, tmp_path):
    folder, _ = trained
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, ignore_mismatched_sizes=True)
    tokens, _ = tokenize(adata, tokenizer)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=tmp_path / "out",
            max_steps=2,
            report_to="none",
            disable_tqdm=True,
            gradient_accumulation_steps=2,
            dataloader_pin_memory=False,
        ),
        train_dataset=cell_dataset(tokens, labels=np.arange(48) % 2),
        data_collator=DataCollatorForCells(tokenizer),
    )
    assert trainer.train().training_loss > 0


def test_label_smoothing_reaches_the_weighted_loss(tmp_path):
    weights, logits, labels = torch.tensor([0.5, 2.0]), torch.randn(4, 2), torch.tensor([0, 1, 1, 0])
    expected = torch.nn.functional.cross_entropy(logits, labels, weights, reduction="sum", label_smoothing=0.2) / 4
    torch.testing.assert_close(WeightedCrossEntropy(weights, 0.2)({"logits": logits}, labels), expected)
    args = TrainingArguments(output_dir=tmp_path, report_to="none", label_smoothing_factor=0.2)
    trainer = PanFoMaTrainer(
        model=panfoma_hf.PanFoMaForCellClassification(tiny_config()), args=args, class_weights=weights
    )
    assert trainer.compute_loss_func.label_smoothing == 0.2


def test_trainers_own_checkpoints_hold_the_tokenizer(adata, fresh, tmp_path):
    panfoma_hf.finetune(adata, "cell_type", tmp_path / "x", model=fresh, save_strategy="epoch", **QUICK)
    (saved,) = (tmp_path / "x-trainer").iterdir()
    assert (saved / "genes.tsv.gz").is_file()
    assert panfoma_hf.embed(adata, saved, progress=False).obsm["X_panfoma"].shape == (48, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            lambda a: a.obs.drop(columns="cell_type", inplace=True), "`label` must be a column", id="no_column"
        ),
        pytest.param(lambda a: a.obs.__setitem__("cell_type", "same"), "At least two labels", id="one_label"),
        pytest.param(
            lambda a: setattr(a, "obs", a.obs.where(np.arange(48)[:, None] > 4)),
            "5 of 48 without one",
            id="missing_labels",
        ),
        pytest.param(lambda a: setattr(a, "X", a.X * -1), "negative values in X", id="negative"),
        pytest.param(
            lambda a: setattr(a, "var_names", [f"feature{i}" for i in range(40)]),
            r"got 0.0% in the AnnData \(0 of 40",
            id="no_gene",
        ),
    ],
)
def test_cells_that_cannot_be_learned_from_leave_nothing_behind(change, message, adata, fresh, tmp_path):
    change(adata)
    with pytest.raises(ValueError, match=message):
        panfoma_hf.finetune(adata, "cell_type", tmp_path / "x", model=fresh, **QUICK)
    assert not list(tmp_path.iterdir())


def test_validation_labels_that_training_never_saw_are_an_error(adata, fresh, tmp_path):
    with pytest.raises(ValueError, match=r"got \['mast'\] besides"):
        panfoma_hf.finetune(
            adata[adata.obs["cell_type"] != "mast"].copy(),
            "cell_type",
            tmp_path / "x",
            model=fresh,
            validation=adata,
            **QUICK,
        )


def test_a_folder_with_something_else_in_it_is_not_overwritten(adata, fresh, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="something else in it"):
        panfoma_hf.finetune(adata, "cell_type", tmp_path, model=fresh, **QUICK)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_checkpoint_with_a_users_notes_in_it_is_not_overwritten(trained):
    folder, model = trained
    (folder / "notes.txt").write_text("the good one")
    with pytest.raises(FileExistsError, match=r"something else in it: notes\.txt"):
        panfoma_hf.save_checkpoint(folder, model, AutoTokenizer.from_pretrained(folder))
    assert (folder / "model.safetensors").is_file()


def test_an_older_checkpoint_is_replaced_and_put_back_if_that_fails(trained, monkeypatch):
    folder, model = trained
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before = (folder / "model.safetensors").read_bytes()
    with torch.no_grad():
        model.classifier.weight.add_(1)
    rename = Path.rename

    def refuse_the_new(self, target):
        if self.name == "new":
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_the_new)
    with pytest.raises(OSError, match="no"):
        panfoma_hf.save_checkpoint(folder, model, tokenizer)
    assert (folder / "model.safetensors").read_bytes() == before
    monkeypatch.undo()
    panfoma_hf.save_checkpoint(folder, model, tokenizer)
    assert (folder / "model.safetensors").read_bytes() != before


def test_a_failing_save_keeps_the_older_checkpoint(trained, monkeypatch):
    folder, model = trained
    before = (folder / "model.safetensors").read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    monkeypatch.setattr(tokenizer, "save_pretrained", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with torch.no_grad():
        model.classifier.weight.add_(1)
    with pytest.raises(OSError, match="disk full"):
        panfoma_hf.save_checkpoint(folder, model, tokenizer)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]


# -- inference -----------------------------------------------------------------------------------------------------


def test_annotation_writes_names_scores_and_provenance_and_changes_nothing_else(trained, adata, tmp_path):
    folder, _ = trained
    before = adata.copy()
    result = panfoma_hf.annotate(adata, folder, embedding_key="X_panfoma", progress=False)
    assert result is adata
    assert adata.obs["panfoma_cell_type"].cat.categories.tolist() == ["B cell", "T cell", "mast"]
    probabilities = adata.obsm["panfoma_cell_type_proba"]
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    np.testing.assert_array_equal(probabilities.max(1), adata.obs["panfoma_cell_type_score"])
    assert adata.obsm["X_panfoma"].shape == (48, 32)
    provenance = adata.uns["panfoma"]["panfoma_cell_type"]
    assert provenance["checkpoint"] == str(folder)
    assert provenance["panfoma_hf_version"] == panfoma_hf.__version__
    assert (provenance["expression"], provenance["values"]) == ("X", "counts (whole numbers)")
    genes = provenance["genes"]
    assert (genes["resolved"], genes["total"], genes["coverage"]) == (40, 40, 1.0)
    assert genes["by_rule"] == {"approved symbol": 40}
    assert "HGNC complete set" in provenance["gene_table"]
    assert (adata.X != before.X).nnz == 0
    assert adata.obs[before.obs.columns].equals(before.obs)
    adata.write_h5ad(tmp_path / "annotated.h5ad")
    again = ad.read_h5ad(tmp_path / "annotated.h5ad")
    assert again.uns["panfoma"]["panfoma_cell_type"]["labels"].tolist() == ["B cell", "T cell", "mast"]
    assert (again.obs["panfoma_cell_type"] == adata.obs["panfoma_cell_type"]).all()


def test_another_checkpoints_provenance_stays(trained, adata):
    folder, _ = trained
    panfoma_hf.embed(adata, folder, key_added="X_first", progress=False)
    panfoma_hf.embed(adata, folder, key_added="X_second", progress=False)
    assert set(adata.uns["panfoma"]) == {"X_first", "X_second"}


def test_results_depend_neither_on_batches_nor_on_neighbours_nor_on_the_order_of_cells(trained, baron):
    folder, _ = trained
    embed = lambda cells, **kwargs: panfoma_hf.embed(cells.copy(), folder, progress=False, **kwargs).obsm["X_panfoma"]  # noqa: E731
    few = baron[:6]
    expected = embed(few)
    np.testing.assert_allclose(embed(few, batch_size=1), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(embed(few[::-1]), expected[::-1], rtol=1e-4, atol=1e-4)
    assert np.abs(expected[0] - expected[1]).max() > 0.01


def test_a_model_and_its_tokenizer_may_be_passed(trained, adata):
    folder, model = trained
    by_path = panfoma_hf.annotate(adata.copy(), folder, progress=False)
    model.train()
    by_model = panfoma_hf.annotate(adata.copy(), model, tokenizer=AutoTokenizer.from_pretrained(folder), progress=False)
    np.testing.assert_allclose(
        by_model.obsm["panfoma_cell_type_proba"], by_path.obsm["panfoma_cell_type_proba"], rtol=1e-5
    )
    assert model.training  # as it was


def test_a_model_outlives_the_folder_that_it_was_loaded_from(trained, adata):
    folder, _ = trained
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    folder.rename(folder.with_name("elsewhere"))
    panfoma_hf.embed(adata, model, tokenizer=tokenizer, progress=False)
    assert adata.uns["panfoma"]["X_panfoma"]["revision"] == ""


def test_a_file_is_annotated_without_being_changed(trained, adata, tmp_path):
    folder, _ = trained
    adata.write_h5ad(tmp_path / "cells.h5ad")
    before = (tmp_path / "cells.h5ad").read_bytes()
    annotated = panfoma_hf.annotate(tmp_path / "cells.h5ad", folder, progress=False)
    assert "panfoma_cell_type" in annotated.obs
    assert (tmp_path / "cells.h5ad").read_bytes() == before


def test_an_empty_cell_is_called_unassigned_and_has_a_finite_embedding(trained, adata, caplog):
    folder, _ = trained
    matrix = adata.X.toarray()
    matrix[7] = 0
    adata.X = sp.csr_matrix(matrix)
    annotated = panfoma_hf.annotate(adata, folder, embedding_key="X_panfoma", progress=False)
    assert annotated.obs["panfoma_cell_type"].iloc[7] == "Unassigned"
    assert annotated.obs["panfoma_cell_type_score"].iloc[7] == 0
    assert (annotated.obs["panfoma_cell_type"] == "Unassigned").sum() == 1
    assert np.isfinite(annotated.obsm["X_panfoma"]).all()
    assert annotated.uns["panfoma"]["X_panfoma"]["empty_cells"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda a: setattr(a, "X", a.X * -1), "negative", id="negative"),
        pytest.param(lambda a: setattr(a, "X", a.X * np.nan), "NaN", id="nan"),
        pytest.param(
            lambda a: setattr(a, "var_names", [f"feature{i}" for i in range(40)]),
            r"got 0.0% in the AnnData \(0 of 40",
            id="no_gene",
        ),
    ],
)
@pytest.mark.parametrize("verb", [panfoma_hf.annotate, panfoma_hf.embed])
def test_on_an_error_nothing_is_written(verb, change, message, trained, adata):
    folder, _ = trained
    change(adata)
    with pytest.raises(ValueError, match=message):
        verb(adata, folder, progress=False)
    assert list(adata.obs) == ["cell_type"]
    assert not adata.obsm
    assert not adata.uns


def test_a_checkpoint_without_a_classifier_does_not_annotate(adata, fresh, tmp_path):
    panfoma_hf.save_checkpoint(tmp_path / "body", PanFoMaModel(fresh), PanFoMaTokenizer())
    with pytest.raises(ValueError, match=r"without classifier.bias, classifier.weight.*finetune"):
        panfoma_hf.annotate(adata, tmp_path / "body", progress=False)
    assert panfoma_hf.embed(adata, tmp_path / "body", progress=False).obsm["X_panfoma"].shape == (48, 32)


def test_a_model_without_a_classifier_does_not_annotate(adata, fresh, tokenizer):
    with pytest.raises(ValueError, match="got PanFoMaModel"):
        panfoma_hf.annotate(adata, PanFoMaModel(fresh), tokenizer=tokenizer)


def test_cells_that_cannot_be_written_to_are_an_error_before_any_work(trained, adata, tmp_path):
    folder, _ = trained
    adata.uns["panfoma"] = "mine"
    with pytest.raises(ValueError, match=r"uns\['panfoma'\] must be free"):
        panfoma_hf.annotate(adata, folder, progress=False)
    assert list(adata.obs) == ["cell_type"]
    del adata.uns["panfoma"]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    with pytest.raises(ValueError, match="to_memory"):
        panfoma_hf.embed(backed[:3], folder, progress=False)
    assert panfoma_hf.embed(backed, folder, progress=False).obsm["X_panfoma"].shape == (48, 32)
    backed.file.close()


def test_a_multi_label_model_does_not_annotate(adata, tokenizer):
    config = tiny_config(vocab_size=len(tokenizer), problem_type="multi_label_classification")
    model = panfoma_hf.PanFoMaForCellClassification(config)
    with pytest.raises(ValueError, match="single-label classifier"):
        panfoma_hf.annotate(adata, model, tokenizer=tokenizer)


def test_a_model_and_a_tokenizer_of_other_genes_are_an_error(adata, tokenizer):
    with pytest.raises(ValueError, match="got 120 and 50 in the model, 25,533 and 50 in the tokenizer"):
        panfoma_hf.embed(adata, PanFoMaModel(tiny_config()), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="Pass `tokenizer`"):
        panfoma_hf.embed(adata, PanFoMaModel(tiny_config()))


def test_a_model_of_other_genes_does_not_start_training(adata, tmp_path):
    with pytest.raises(ValueError, match="got 120 and 50 in the model"):
        panfoma_hf.finetune(adata, "cell_type", tmp_path / "x", model=tiny_config(), **QUICK)
    assert not list(tmp_path.iterdir())


def test_what_was_understood_is_said(trained, adata, caplog):
    folder, _ = trained
    panfoma_hf.embed(adata, folder, progress=False)
    assert "48 cells from X, counts (whole numbers): 40 of 40 gene names resolved" in caplog.text
