"""Fine-tuning: its modes, tasks, splits, calibration, the methods beside it, and what it leaves when it fails."""

import copy
import json
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from transformers import AutoModelForSequenceClassification

import panfoma_hf
from panfoma_hf import PanFoMaConfig, PanFoMaForCellClassification, PanFoMaModel
from panfoma_hf.data.cells import tokenize
from panfoma_hf.data.dataset import cell_dataset
from panfoma_hf.data.forward import forward_cells
from panfoma_hf.evaluation.baselines import CLASSIFIERS
from panfoma_hf.evaluation.metrics import classification_metrics
from panfoma_hf.training import PanFoMaTrainer, balanced_class_weights, finetuning, heads
from panfoma_hf.training.finetuning import LORA_LAYERS, LORA_RANK
from tests.conftest import cells_of_counts, run_python, small_cells, tiny_config


TYPES = ["B cell", "T cell", "mast"]
TASKS = ["cell_type", "state", "is_big"]
MODES = {
    "probe": {},
    # The last weights, not the best: those solved before training may be.
    "lora": {"learning_rate": 1e-2, "num_train_epochs": 2, "eval_strategy": "no"},
    "full": {"learning_rate": 2e-3, "num_train_epochs": 2, "eval_strategy": "no"},
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Models this small have no work for two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def start(tokenizer, tmp_path_factory):
    """A checkpoint of a body, with weights that tell cells apart, to fine-tune."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("start") / "body"
    body = PanFoMaModel(PanFoMaConfig.from_size("tiny", vocab_size=len(tokenizer)))
    return panfoma_hf.save_checkpoint(folder, body, tokenizer)


@pytest.fixture
def fresh(tokenizer) -> PanFoMaConfig:
    return PanFoMaConfig.from_size("tiny", vocab_size=len(tokenizer))


def tune(cells, folder, model, label="cell_type", **options) -> PanFoMaTrainer:
    options = {"num_train_epochs": 1, "baselines": False, "disable_tqdm": True, **options}
    return panfoma_hf.finetune(cells, label, folder, model=model, **options)


def cells_of_tasks(tokenizer):
    """Three tasks of 48 cells: one known of all but two, one of half with a label of one cell, one a truth."""
    cells = small_cells(tokenizer)
    cells.obs["cell_type"] = cells.obs["cell_type"].where(~np.isin(np.arange(48), [4, 5]))
    states = np.where(np.arange(48) % 3 == 0, "resting", "active").astype(object)
    states[::2] = None
    states[1] = "dying"
    cells.obs["state"] = states
    cells.obs["is_big"] = np.asarray(cells.X.sum(1)).ravel() > 70
    return cells


@pytest.fixture(scope="module")
def runs(start, tokenizer, tmp_path_factory):
    """A trainer and its checkpoint for each mode, and one of several tasks."""
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for mode, options in MODES.items():
        found[mode] = tune(small_cells(tokenizer), folder / mode, start, mode=mode, **options), folder / mode
    found["tasks"] = tune(cells_of_tasks(tokenizer), folder / "tasks", start, TASKS), folder / "tasks"
    return found


def batch_of(cells, tokenizer):
    return tokenizer(cells, padding=True, return_tensors="pt")


def logits_of(model, cells, tokenizer) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch_of(cells, tokenizer)).logits


# -- modes ---------------------------------------------------------------------------------------------------------

READ = """
import sys, json
import torch
from transformers import AutoModelForSequenceClassification
if sys.argv[1] == "package":
    import panfoma_hf
options = {"trust_remote_code": True} if sys.argv[1] == "remote" else {}
batch = {name: torch.tensor(values) for name, values in json.load(open(sys.argv[2])).items()}
for folder in sys.argv[3:]:
    model, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True, **options)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    with torch.inference_mode():
        logits = model.eval()(**batch).logits
    print(json.dumps({"tasks": model.config.tasks, "logits": logits.tolist()}))
"""


@pytest.mark.parametrize(
    ("names", "how"),
    [
        (["probe", "lora", "full", "tasks"], "package"),
        pytest.param(["lora", "tasks"], "remote", marks=pytest.mark.slow),
    ],
)
def test_a_fresh_process_gives_the_same_logits(names, how, runs, adata, tokenizer, tmp_path):
    batch = batch_of(adata[:8].copy(), tokenizer)
    (tmp_path / "batch.json").write_text(json.dumps({name: values.tolist() for name, values in batch.items()}))
    printed = run_python(
        READ,
        how,
        str(tmp_path / "batch.json"),
        *(str(runs[name][1]) for name in names),
        without_package=how == "remote",
        HF_MODULES_CACHE=str(tmp_path / "modules"),
    )
    for name, line in zip(names, printed.splitlines()[-len(names) :], strict=True):
        model = runs[name][0].model
        found = json.loads(line)
        assert found["tasks"] == model.config.tasks
        expected = logits_of(model, adata[:8].copy(), tokenizer)
        torch.testing.assert_close(torch.tensor(found["logits"]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_names_the_cells(mode, runs, adata):
    trainer, folder = runs[mode]
    annotated = panfoma_hf.annotate(adata, folder, progress=False)
    assert (annotated.obs["panfoma_cell_type"] == adata.obs["cell_type"]).mean() > 0.9
    assert trainer.evaluate()["eval_macro_f1"] == pytest.approx(
        trainer.report["tasks"]["cell_type"]["scores"]["panfoma"]["macro_f1"]
    )
    assert all(weight.requires_grad for weight in trainer.model.parameters())
    assert trainer.report["mode"] == mode


def test_a_probe_leaves_the_body_as_it_was(runs, start):
    body = PanFoMaModel.from_pretrained(start).state_dict()
    found = runs["probe"][0].model.panfoma.state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in body.items())


def test_a_probe_is_logistic_regression_on_embeddings(start, adata, tmp_path):
    adata = adata[np.r_[:20, 20:48:2]].copy()  # classes of several sizes
    trainer = tune(adata, tmp_path / "x", start, mode="probe", validation=None, gene_logits=False)
    embeddings = panfoma_hf.embed(adata.copy(), start, progress=False).obsm["X_panfoma"]
    ids = np.searchsorted(TYPES, adata.obs["cell_type"].astype(str))
    weights = balanced_class_weights(ids, 3, 0.5).numpy()
    regression = LogisticRegression(C=finetuning.EMBEDDING_STRENGTH, max_iter=300, tol=1e-3)
    scaler = StandardScaler()
    regression.fit(scaler.fit_transform(embeddings), ids, sample_weight=weights[ids])
    annotated = panfoma_hf.annotate(adata, trainer.model, progress=False)
    np.testing.assert_allclose(
        annotated.obsm["panfoma_cell_type_proba"],
        regression.predict_proba(scaler.transform(embeddings)),
        atol=1e-4,
    )


def test_a_refitted_probe_is_logistic_regression_on_all_cells(start, adata, tmp_path):
    options = {"mode": "probe", "gene_logits": False}
    refitted = tune(adata, tmp_path / "a", start, **options)
    alone = tune(adata, tmp_path / "b", start, refit=False, **options)
    assert refitted.report["refitted"]
    assert not alone.report["refitted"]
    # The scores are of the model before, on cells that it had not learned from.
    assert refitted.report["tasks"] == alone.report["tasks"]
    embeddings = panfoma_hf.embed(adata.copy(), start, progress=False).obsm["X_panfoma"]
    ids = np.searchsorted(TYPES, adata.obs["cell_type"].astype(str))
    annotated = panfoma_hf.annotate(adata.copy(), refitted.model, min_score=0, progress=False)
    temperature = refitted.model.config.calibration["cell_type"]["temperature"]
    logits = np.log(annotated.obsm["panfoma_cell_type_proba"]) * temperature
    found = []
    for strength in finetuning.EMBEDDING_STRENGTHS:  # which of them, the validation cells chose
        counts = refitted.report["train_counts"]["cell_type"]
        weights = np.array([counts[name] for name in TYPES]) ** -0.5
        weights *= sum(counts.values()) / (weights * [counts[name] for name in TYPES]).sum()
        regression = LogisticRegression(C=strength, max_iter=300, tol=1e-3)
        scaler = StandardScaler()
        regression.fit(scaler.fit_transform(embeddings), ids, sample_weight=weights[ids])
        expected = regression.decision_function(scaler.transform(embeddings))
        difference = (logits - logits.mean(1, keepdims=True)) - (expected - expected.mean(1, keepdims=True))
        found.append(np.abs(difference).max())
    assert min(found) < 2e-2
    assert max(found) > 0.1


def test_genes_are_refitted_on_all_cells_but_never_on_cells_passed_to_validate(start, adata, tmp_path):
    shares = tune(adata, tmp_path / "a", start, learning_rate=0.0)
    passed = tune(adata[:40].copy(), tmp_path / "b", start, learning_rate=0.0, validation=adata[40:].copy())
    same = tune(adata[:40].copy(), tmp_path / "c", start, learning_rate=0.0, validation=adata[40:].copy(), refit=False)
    assert shares.report["refitted"]
    assert not passed.report["refitted"]
    assert torch.equal(passed.model.gene_logits.weight, same.model.gene_logits.weight)
    before = tune(adata, tmp_path / "d", start, learning_rate=0.0, refit=False)
    assert not torch.equal(shares.model.gene_logits.weight, before.model.gene_logits.weight)
    # The network is not solved again, and weighs what it weighed.
    torch.testing.assert_close(shares.model.classifier.weight, before.model.classifier.weight)
    assert shares.model.config.calibration == before.model.config.calibration


@pytest.mark.parametrize("refit", [True, False])
def test_bins_alone_leave_the_network_out(refit, start, adata, tmp_path, monkeypatch):
    monkeypatch.setattr(finetuning, "embed_dataset", None)  # so that no cell is embedded
    options = {"mode": "probe", "validation": 0.25, "gene_logits": "alone", "refit": refit}
    trainer = tune(adata, tmp_path / "x", start, **options)
    assert trainer.report["refitted"] == refit
    assert trainer.report["tasks"]["cell_type"]["share_of_gene_logits"] == 1.0
    found = logits_of(trainer.model, adata, trainer.processing_class)
    tokens, _ = tokenize(adata, trainer.processing_class)
    bins = heads.bins_matrix(cell_dataset(tokens), trainer.model.config, 4096)
    genes = trainer.model.gene_logits.weight.detach().numpy()
    expected = bins @ genes + trainer.model.classifier.bias.detach().numpy()
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)
    assert np.ptp(expected, axis=0).min() > 0.1
    assert (found.numpy().argmax(1) == adata.obs["cell_type"].cat.codes).mean() > 0.9


def test_of_too_many_cells_no_more_than_a_regression_reads_are_embedded_or_laid_out(
    start, adata, tmp_path, monkeypatch
):
    monkeypatch.setattr(heads, "MOST_CELLS", 20)
    sizes = {"embed_dataset": [], "bins_matrix": []}
    for name, found in sizes.items():
        plain = getattr(finetuning, name)
        place = 1 if name == "embed_dataset" else 0
        monkeypatch.setattr(
            finetuning, name, lambda *got, _p=plain, _f=found, _i=place: _f.append(len(got[_i])) or _p(*got)
        )
    trainer = tune(adata, tmp_path / "few", start, mode="probe", validation=0.25)
    held_out = trainer.report["tasks"]["cell_type"]["validation_cells"]
    # Training cells and validation cells; of bins, validation cells first, and some of all at the end.
    assert sizes == {"embed_dataset": [20, held_out], "bins_matrix": [held_out, 20, 20]}


def test_adapters_change_their_layers_by_few_ranks_and_nothing_else(runs, start):
    body = PanFoMaModel.from_pretrained(start).state_dict()
    found = runs["lora"][0].model.panfoma.state_dict()
    assert set(found) == set(body)
    changed = set()
    for name, before in body.items():
        if torch.equal(found[name], before):
            continue
        assert name.split(".")[-2] in LORA_LAYERS
        assert name.endswith(".weight")
        changed.add(name.split(".")[-2])
        values = torch.linalg.svdvals((found[name] - before).double())
        assert values[0] > 1e-4
        assert (values[LORA_RANK:] < 1e-5 * values[0].clamp(min=1)).all()
    assert changed == set(LORA_LAYERS)


def test_merged_adapters_give_the_logits_that_they_gave_before(adata, tokenizer):
    model = PanFoMaForCellClassification(tiny_config(vocab_size=len(tokenizer))).eval()
    plain = logits_of(model, adata, tokenizer)
    adapted = finetuning._with_adapters(model)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.3)
    unmerged = logits_of(adapted, adata, tokenizer)
    assert (unmerged - plain).abs().max() > 0.01
    torch.testing.assert_close(logits_of(adapted.merge_and_unload(), adata, tokenizer), unmerged, rtol=1e-4, atol=1e-5)


def test_without_peft_its_extra_is_named_before_any_work(start, adata, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install panfoma-hf\[lora\]"):
        tune("no such file.h5ad", tmp_path / "x", start, mode="lora")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "all"}, "`mode` is one of full, lora, probe, got 'all'"),
        ({"gene_logits": "alone", "mode": "full"}, "'alone' with mode 'probe', got 'alone' with mode 'full'"),
        ({"gene_logits": "no"}, "`gene_logits` is True, False, or 'alone'"),
        ({"validation": 1.5}, "`validation` as a share of the cells is between 0 and 1, got 1.5"),
        ({"validation": 0}, "`validation` as a share of the cells is between 0 and 1, got 0"),
        ({"max_error": 1.0}, "`max_error` is a share"),
        ({"seeds": [1, 2], "validation": None}, "Several seeds are compared on validation cells"),
        ({"seeds": []}, "Give at least one seed"),
        ({"groups": "missing"}, "`groups` must be a column of obs, got 'missing'"),
    ],
)
def test_arguments_that_make_no_sense_are_an_error(options, message, start, adata, tmp_path):
    with pytest.raises(ValueError, match=message):
        tune(adata, tmp_path / "x", start, **options)
    assert not list(tmp_path.iterdir())


def test_a_start_without_a_weight_of_the_network_is_refused(start, adata, tmp_path):
    shutil.copytree(start, tmp_path / "older")
    weights = load_file(start / "model.safetensors")
    gone = next(name for name in weights if "pooler" in name)
    save_file({name: tensor for name, tensor in weights.items() if name != gone}, tmp_path / "older/model.safetensors")
    with pytest.raises(ValueError, match=f"holds every weight of the network, got .*older without .*{gone}"):
        tune(adata, tmp_path / "x", tmp_path / "older", mode="probe")
    assert not (tmp_path / "x").exists()


# -- several tasks -------------------------------------------------------------------------------------------------


def test_several_tasks_are_learned_by_one_model_and_each_is_written(runs, tokenizer):
    trainer, folder = runs["tasks"]
    # In the order of the alphabet, whatever order they were named in.
    expected = {"cell_type": TYPES, "is_big": ["False", "True"], "state": ["active", "dying", "resting"]}
    assert list(trainer.model.config.tasks.items()) == list(expected.items())
    assert trainer.model.config.id2label[6] == "state: dying"
    cells = panfoma_hf.annotate(cells_of_tasks(tokenizer), folder, min_score=0, progress=False)
    for task, names in expected.items():
        assert cells.obs[f"panfoma_{task}"].cat.categories.tolist() == names
        assert cells.obsm[f"panfoma_{task}_proba"].shape == (48, len(names))
        np.testing.assert_allclose(cells.obsm[f"panfoma_{task}_proba"].sum(1), 1, rtol=1e-5)
    known = cells.obs["cell_type"].notna()
    assert (cells.obs["panfoma_cell_type"] == cells.obs["cell_type"].astype(str))[known].mean() > 0.9


def test_the_report_of_several_tasks_counts_the_labels_that_are_known(runs):
    report = runs["tasks"][0].report
    assert report["labels"] == {"cell_type": 3, "state": 3, "is_big": 2}
    assert report["train_counts"]["state"]["dying"] == 1  # never scored, as there is no second one
    assert report["train_cells"] + report["validation_cells"] == 48
    assert sum(report["train_counts"]["is_big"].values()) == report["train_cells"]
    assert sum(report["train_counts"]["state"].values()) < report["train_cells"]
    assert 0 < report["tasks"]["state"]["validation_cells"] < report["tasks"]["cell_type"]["validation_cells"]


def test_a_cell_without_a_label_of_any_task_is_an_error(start, tokenizer, tmp_path):
    cells = cells_of_tasks(tokenizer)[:, :].copy()
    cells.obs["is_big"] = cells.obs["is_big"].astype(object).where(np.arange(48) != 4)
    with pytest.raises(ValueError, match=r"got 1 of 48 without one in any of .*notna\(\)\.any\(axis=1\)\]"):
        tune(cells, tmp_path / "x", start, TASKS)


def test_one_task_starts_from_a_model_of_several_and_the_other_way_round(runs, adata, tmp_path):
    trainer = tune(adata, tmp_path / "x", runs["tasks"][1], mode="probe")
    assert trainer.model.config.label_tasks is None
    assert trainer.model.config.id2label == dict(enumerate(TYPES))
    adata.obs["state"] = np.where(np.arange(48) % 3 == 0, "resting", "active")
    trainer = tune(adata, tmp_path / "x", tmp_path / "x", ["cell_type", "state"], mode="probe")
    assert trainer.model.config.num_labels == 5


# -- calibration ---------------------------------------------------------------------------------------------------


@pytest.fixture
def calibrated(runs, tokenizer):
    """A fine-tuned model whose calibration a test may write."""
    model = copy.deepcopy(runs["full"][0].model)
    return model, lambda cells, **options: panfoma_hf.annotate(
        cells, model, tokenizer=tokenizer, progress=False, **options
    )


def test_calibration_is_stored_and_read_back(runs):
    trainer, folder = runs["full"]
    calibration = trainer.model.config.calibration["cell_type"]
    assert 0.05 <= calibration["temperature"] <= 20
    assert len(calibration["energies"]) == 101
    assert (np.diff(calibration["energies"]) >= 0).all()
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    assert loaded.config.calibration == trainer.model.config.calibration
    assert json.loads((folder / "finetuning.json").read_text())["tasks"]["cell_type"]["calibration"] == calibration


def test_probabilities_are_of_logits_over_the_temperature(calibrated, adata, tokenizer):
    model, annotate = calibrated
    model.config.calibration = {"cell_type": {"temperature": 2.5}}
    logits = logits_of(model, adata, tokenizer).double().numpy()
    annotated = annotate(adata)
    np.testing.assert_allclose(annotated.obsm["panfoma_cell_type_proba"], softmax(logits / 2.5, axis=1), atol=1e-5)
    assert "panfoma_cell_type_unfamiliarity" not in annotated.obs


def test_a_threshold_counts_only_where_it_is_certified(calibrated, adata):
    model, annotate = calibrated
    median = float(annotate(adata.copy(), min_score=0).obs["panfoma_cell_type_score"].median())
    rule = {**model.config.calibration["cell_type"], "unassigned_threshold": median}

    def num_unassigned(is_certified, **options):
        model.config.calibration = {"cell_type": {**rule, "is_certified": is_certified}}
        annotated = annotate(adata.copy(), **options)
        return int((annotated.obs["panfoma_cell_type"] == "Unassigned").sum()), annotated

    some, annotated = num_unassigned(True)
    assert 20 <= some <= 24
    is_low = annotated.obs["panfoma_cell_type_score"].to_numpy() < np.float32(median)
    assert ((annotated.obs["panfoma_cell_type"] == "Unassigned") >= is_low).all()
    assert annotated.uns["panfoma"]["panfoma_cell_type"]["min_score"] == median
    assert num_unassigned(False)[0] == 0
    assert num_unassigned(True, min_score=0)[0] == 0
    assert num_unassigned(False, min_score=1)[0] == 48
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="`min_score` is a probability"):
            annotate(adata, min_score=wrong)


def test_unfamiliarity_is_the_share_of_energies_below(calibrated, adata, tokenizer):
    model, annotate = calibrated
    logits = logits_of(model, adata, tokenizer).double()
    energies = -2 * torch.logsumexp(logits / 2, dim=1).numpy()
    model.config.calibration = {
        "cell_type": {"temperature": 2.0, "energies": np.quantile(energies[:24], np.linspace(0, 1, 101)).tolist()}
    }
    found = annotate(adata).obs["panfoma_cell_type_unfamiliarity"].to_numpy()
    assert ((found >= 0) & (found <= 1)).all()
    assert (np.diff(found[np.argsort(energies)]) >= -1e-4).all()
    below = np.array([(energies[:24] < value).mean() for value in energies])
    np.testing.assert_allclose(found, below, atol=0.06)


def test_a_checkpoint_without_calibration_does_as_before(calibrated, adata, tokenizer):
    model, annotate = calibrated
    model.config.calibration = None
    annotated = annotate(adata)
    logits = logits_of(model, annotated, tokenizer).numpy()
    np.testing.assert_allclose(annotated.obsm["panfoma_cell_type_proba"], softmax(logits, axis=1), atol=1e-5)
    assert "panfoma_cell_type_unfamiliarity" not in annotated.obs
    assert annotated.uns["panfoma"]["panfoma_cell_type"]["min_score"] == 0


# -- splits --------------------------------------------------------------------------------------------------------


@pytest.fixture
def studies(monkeypatch):
    """What each run read and split."""
    seen = []
    read = finetuning.read_study
    monkeypatch.setattr(
        finetuning, "read_study", lambda *args, **kwargs: seen.append(read(*args, **kwargs)) or seen[-1]
    )
    return seen


def probe(cells, folder, model, label="cell_type", **options):
    return tune(cells, folder, model, label, mode="probe", gene_logits=False, **options)


def test_donors_are_on_one_side_by_default(start, adata, tmp_path, studies):
    adata.obs["donor_id"] = [f"D{index // 8}" for index in range(48)]
    report = probe(adata, tmp_path / "x", start).report
    train, validation = (set(cells.obs["donor_id"]) for cells in (studies[0].train, studies[0].validation))
    assert not train & validation
    assert report["split"] == {"groups": "donor_id", "held_out": sorted(validation), "leakage": []}
    assert "Validation cells are those of `donor_id` D" in (tmp_path / "x" / "README.md").read_text()


def test_without_groups_cells_are_split_and_shared_donors_are_said(start, adata, tmp_path, caplog):
    assert probe(adata, tmp_path / "x", start).report["split"] == {"groups": None, "held_out": [], "leakage": []}
    adata.obs["donor_id"] = [f"D{index // 8}" for index in range(48)]
    report = probe(adata, tmp_path / "x", start, groups=None).report
    assert report["split"]["groups"] is None
    assert "'donor_id'" in report["split"]["leakage"][0]
    assert "The split leaks" in caplog.text


def test_another_column_may_be_split_by(start, adata, tmp_path, studies):
    adata.obs["donor_id"] = [f"D{index // 8}" for index in range(48)]
    adata.obs["hospital"] = pd.Categorical([f"H{index // 16}" for index in range(48)])
    report = probe(adata, tmp_path / "x", start, groups="hospital").report
    assert report["split"]["groups"] == "hospital"
    assert set(studies[0].validation.obs["hospital"]).isdisjoint(studies[0].train.obs["hospital"])


def test_without_validation_cells_nothing_is_scored(start, adata, tmp_path):
    trainer = tune(adata, tmp_path / "x", start, validation=None, baselines=True)
    report = json.loads((tmp_path / "x" / "finetuning.json").read_text())
    assert report["tasks"]["cell_type"] == {"calibration": {}, "warnings": []}
    assert (report["train_cells"], report["validation_cells"]) == (48, 0)
    assert trainer.model.config.calibration is None
    assert ModelCard.load(tmp_path / "x" / "README.md").data.eval_results is None
    annotated = panfoma_hf.annotate(adata, tmp_path / "x", progress=False)
    assert (annotated.obs["panfoma_cell_type"] == adata.obs["cell_type"]).mean() > 0.9


def test_validation_cells_of_the_same_donors_and_the_same_cells_are_said(start, adata, tmp_path, caplog):
    adata.obs["donor_id"] = [f"D{index % 4}" for index in range(48)]
    adata.obs_names = [f"study-{index}" for index in range(48)]  # unlike "cell-1", a name
    adata[20:].copy().write_h5ad(tmp_path / "validation.h5ad")
    report = probe(adata[:30].copy(), tmp_path / "x", start, validation=tmp_path / "validation.h5ad").report
    text = " ".join(report["split"]["leakage"])
    assert "4 of 'donor_id'" in text
    assert "10 of 28 test cells have the name of a training cell" in text
    assert "10 of 28 test cells have exactly the expression" in text
    assert text in caplog.text
    assert report["split"]["held_out"] == ["validation.h5ad"]
    assert report["split"]["leakage"][0] in (tmp_path / "x" / "README.md").read_text()


def test_a_label_of_one_donor_is_learned_and_said(start, adata, tmp_path, studies, caplog):
    adata.obs["donor_id"] = np.where(adata.obs["cell_type"] == "mast", "D0", [f"D{i % 3}" for i in range(48)])
    adata.obs.loc[adata.obs_names[:2], "donor_id"] = ["D1", "D2"]
    adata.obs.loc[adata.obs_names[3:5], "donor_id"] = ["D2", "D1"]
    probe(adata, tmp_path / "x", start)
    assert (studies[0].train.obs["cell_type"] == "mast").sum() == 16
    assert "No validation cell has the 'cell_type' mast: not scored." in caplog.text


def test_groups_that_alone_have_a_label_are_trained_on(start, adata, tmp_path, studies, caplog):
    """Each of four donors has a label of its own, so that whichever is held out, one would be lost."""
    adata.obs["donor_id"] = [f"D{index % 4}" for index in range(48)]
    adata.obs["cell_type"] = adata.obs["cell_type"].astype(str)
    adata.obs.loc[adata.obs_names[:8], "cell_type"] = [f"own {index % 4}" for index in range(8)]
    probe(adata, tmp_path / "x", start, groups="donor_id")
    assert "These groups are trained on" in caplog.text
    assert "cells are split by themselves, across groups" in caplog.text
    assert {f"own {index}" for index in range(4)} <= set(studies[0].names["cell_type"])
    assert studies[0].report["split"]["groups"] is None
    assert "Split by 'donor_id'" in " ".join(studies[0].report["split"]["leakage"])


def test_of_two_held_out_donors_the_one_with_a_label_of_its_own_is_trained_on(start, adata, tmp_path, studies):
    adata.obs["donor_id"] = [f"D{index % 6}" for index in range(48)]
    adata.obs["cell_type"] = adata.obs["cell_type"].astype(str)
    alone = adata.obs["donor_id"].isin(["D0", "D1", "D2", "D3", "D4"]).to_numpy()
    first_of_donor = adata.obs.index[alone & ~adata.obs["donor_id"].duplicated().to_numpy()]
    adata.obs.loc[first_of_donor, "cell_type"] = [f"own {index}" for index in range(5)]
    probe(adata, tmp_path / "x", start, groups="donor_id", validation=0.5)
    train, validation = (set(side.obs["donor_id"]) for side in (studies[0].train, studies[0].validation))
    assert validation == {"D5"}
    assert not train & validation
    assert studies[0].report["split"]["held_out"] == ["D5"]


def test_another_tasks_label_that_only_held_out_groups_have_is_not_learned(start, adata, tmp_path, studies, caplog):
    adata.obs["donor_id"] = [f"D{index // 8}" for index in range(48)]
    adata.obs["state"] = adata.obs["donor_id"].astype(str)
    report = probe(adata, tmp_path / "x", start, ["cell_type", "state"]).report
    assert set(studies[0].names["state"]) == {f"D{index}" for index in range(6)} - set(report["split"]["held_out"])
    assert report["tasks"]["cell_type"]["validation_cells"] == studies[0].validation.n_obs
    assert "scores" not in report["tasks"]["state"]
    assert "Only held-out groups have the 'state'" in caplog.text
    assert "state: not scored, as there are no validation cells" in (tmp_path / "x" / "README.md").read_text()


def test_another_tasks_label_that_only_held_out_cells_have_is_trained_on(start, adata, tmp_path, studies):
    adata.obs["state"] = [f"state {index}" for index in range(48)]
    adata.obs.loc[adata.obs_names[:30], "state"] = "usual"
    probe(adata, tmp_path / "x", start, ["cell_type", "state"])
    assert len(studies[0].names["state"]) == 19
    assert set(studies[0].validation.obs["state"]) == {"usual"}


def test_a_label_of_one_cell_is_trained_on(start, adata, tmp_path, studies):
    adata.obs["cell_type"] = adata.obs["cell_type"].astype(str)
    adata.obs.loc[adata.obs_names[7], "cell_type"] = "unicorn"
    report = tune(adata, tmp_path / "x", start).report
    assert report["train_counts"]["cell_type"]["unicorn"] == 1
    assert studies[0].names["cell_type"] == [*TYPES, "unicorn"]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        pytest.param(np.arange(48) % 3 == 0, ["False", "True"], id="truths"),
        pytest.param(np.arange(48) % 3 + 9, ["10", "11", "9"], id="integers"),
        pytest.param(
            pd.Categorical(np.array(TYPES)[np.arange(48) % 3], categories=["never", *TYPES]),
            TYPES,
            id="unused_category",
        ),
        pytest.param(np.array(["", "Unassigned", "b"])[np.arange(48) % 3], ["", "Unassigned", "b"], id="odd_names"),
    ],
)
def test_labels_may_be_of_any_kind(labels, names, start, adata, tmp_path):
    adata.obs["kind"] = labels
    trainer = tune(adata, tmp_path / "x", start, "kind", mode="probe", baselines=True)
    assert list(trainer.model.config.id2label.values()) == names
    annotated = panfoma_hf.annotate(adata, tmp_path / "x", progress=False)
    assert (annotated.obs["panfoma_kind"].astype(str) == adata.obs["kind"].astype(str)).mean() > 0.9
    assert "not_scored" not in trainer.report["tasks"]["kind"]


def test_many_labels_of_few_cells(fresh, tokenizer, tmp_path):
    generator = np.random.default_rng(0)
    rates = generator.gamma(0.5, 4, size=(300, 40))
    cells = cells_of_counts(tokenizer, generator.poisson(np.repeat(rates, 3, axis=0)), "cell")
    cells.obs["cell_type"] = [f"type {index // 3}" for index in range(900)]
    trainer = tune(cells, tmp_path / "x", fresh, mode="probe", validation=0.3, gene_set=None)
    assert trainer.model.config.num_labels == 300
    assert trainer.report["tasks"]["cell_type"]["scores"]["panfoma"]["accuracy"] > 0.05


# -- simple methods on the same cells --------------------------------------------------------------------------------


def test_scores_of_all_methods_are_of_the_same_cells_and_in_the_card(start, adata, tmp_path):
    train, validation = adata[:30].copy(), adata[30:].copy()
    train.obs["cell_type"] = train.obs["cell_type"].astype(str)
    train.obs.loc[train.obs_names[:6], "cell_type"] = "mast"
    before = train.copy(), validation.copy()
    trainer = tune(train, tmp_path / "x", start, validation=validation, baselines=True)
    true = validation.obs["cell_type"].astype(str)
    predicted = {
        "panfoma": panfoma_hf.annotate(validation.copy(), tmp_path / "x", progress=False).obs["panfoma_cell_type"],
        "majority": np.full(18, "mast"),
        "hvg_logistic_regression": CLASSIFIERS["hvg_logistic_regression"](train, validation, "cell_type").labels,
    }
    expected = {name: classification_metrics(true, np.asarray(labels)) for name, labels in predicted.items()}
    scores = trainer.report["tasks"]["cell_type"]["scores"]
    assert set(scores) == set(expected)
    for method, metrics in expected.items():
        for metric, value in metrics.items():
            assert scores[method][metric] == pytest.approx(value)
    results = ModelCard.load(tmp_path / "x" / "README.md").data.eval_results
    assert len(results) == 6
    named = {result.metric_name: result.metric_value for result in results}
    assert named == {
        f"{metric}, {method}": round(expected[key][of], 4)
        for key, method in (
            ("panfoma", "PanFoMa"),
            ("majority", "majority class"),
            ("hvg_logistic_regression", "logistic regression, variable genes"),
        )
        for of, metric in (("accuracy", "accuracy"), ("macro_f1", "macro-F1"))
    }
    assert {result.dataset_name for result in results} == {"18 validation cells (the validation cells)"}
    assert set(trainer.report["seeds"]["42"]["cell_type"]["scores"]) == {"panfoma"}
    for cells, untouched in zip((train, validation), before, strict=True):
        pd.testing.assert_frame_equal(cells.obs, untouched.obs)
        assert (cells.X != untouched.X).nnz == 0
        assert cells.uns == untouched.uns


def test_a_model_that_learned_nothing_is_said_to_be_so(fresh, adata, tmp_path, caplog, monkeypatch):
    make = finetuning._starting_model

    def say_one_name(*args):
        model = make(*args)
        torch.nn.init.zeros_(model.classifier.weight)
        return model

    monkeypatch.setattr(finetuning, "_starting_model", say_one_name)
    trainer = tune(adata, tmp_path / "x", fresh, learning_rate=0.0, gene_logits=False, baselines=True)
    task = trainer.report["tasks"]["cell_type"]
    (name,) = task["labels_predicted"]
    assert task["warnings"][0].startswith(f"The model calls every validation cell {name!r}: train longer")
    assert "The model is behind hvg logistic regression, macro-F1 0." in task["warnings"][-1]
    card = (tmp_path / "x" / "README.md").read_text()
    for warning in task["warnings"]:
        assert f"cell_type: {warning}" in caplog.text
        assert f"- cell_type: {warning}" in card


def test_a_method_that_fails_does_not_cost_the_model(start, adata, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no convergence")

    monkeypatch.setitem(CLASSIFIERS, "hvg_logistic_regression", fails)
    trainer = probe(adata, tmp_path / "x", start, baselines=True)
    assert trainer.report["tasks"]["cell_type"]["not_scored"] == {"hvg_logistic_regression": "no convergence"}
    assert "not scored. no convergence" in (tmp_path / "x" / "README.md").read_text()


# -- the best weights ----------------------------------------------------------------------------------------------


def test_training_that_makes_it_worse_ends_with_the_weights_it_began_with(start, adata, tmp_path):
    began = probe(adata, tmp_path / "probe", start, refit=False)
    options = {"learning_rate": 10.0, "warmup_steps": 0, "gene_logits": False, "num_train_epochs": 3}
    stopped = tune(adata, tmp_path / "x", start, early_stopping=1, **options)
    assert stopped.state.epoch == 1
    whole = tune(adata, tmp_path / "x", start, early_stopping=None, **options)
    assert whole.state.epoch == 3
    for trainer in (stopped, whole):
        for (name, weight), other in zip(trainer.model.named_parameters(), began.model.parameters(), strict=True):
            assert torch.equal(weight, other), name


def test_the_last_weights_are_judged_whatever_the_interval_and_kept_where_nothing_is(start, adata, tmp_path):
    options = {"learning_rate": 1e-3, "gene_logits": False}
    rarely = tune(adata, tmp_path / "x", start, eval_strategy="steps", eval_steps=1000, **options)
    judged = [entry["step"] for entry in rarely.state.log_history if "eval_macro_f1" in entry]
    assert judged == [0, rarely.state.max_steps]
    never = tune(adata, tmp_path / "x", start, eval_strategy="no", **options)
    assert not any("eval_macro_f1" in entry for entry in never.state.log_history)
    body = PanFoMaModel.from_pretrained(start)
    assert not torch.equal(never.model.panfoma.final_norm.weight, body.final_norm.weight)


def test_of_several_seeds_the_best_is_saved_and_all_are_reported(fresh, adata, tmp_path):
    options = {"learning_rate": 0.0, "gene_logits": False}
    trainer = tune(adata, tmp_path / "x", fresh, seeds=[1, np.int64(2), 3], **options)
    report = json.loads((tmp_path / "x" / "finetuning.json").read_text())
    scores = {seed: of_seed["cell_type"]["scores"]["panfoma"] for seed, of_seed in report["seeds"].items()}
    assert list(scores) == ["1", "2", "3"]
    best = max(scores, key=lambda seed: (scores[seed]["macro_f1"], -scores[seed]["log_loss"]))
    assert report["seed"] == int(best)
    assert report["tasks"]["cell_type"]["scores"]["panfoma"] == scores[best]
    # The split follows the first seed, the weights their own.
    alone = tune(adata, tmp_path / "y", fresh, seeds=[int(best)], **options)
    assert torch.equal(alone.model.classifier.weight, trainer.model.classifier.weight)


def test_one_of_several_seeds_is_a_seed(fresh, adata, tmp_path):
    first, second = (tune(adata, tmp_path / "x", fresh, **seed).model for seed in ({"seeds": [1]}, {"seed": 1}))
    for weight, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(weight, other)


@pytest.mark.parametrize("class_weights", [True, False])
def test_label_smoothing_reaches_the_loss(class_weights, fresh, adata, tmp_path):
    adata = adata[np.arange(48) // (48 // (np.arange(48) % 3 + 1)) == 0].copy()
    options = {"learning_rate": 0.0, "validation": adata, "class_weights": class_weights, "gene_logits": False}
    trainer = tune(adata, tmp_path / "x", fresh, label_smoothing_factor=0.3, **options)
    logits = logits_of(trainer.model, adata, trainer.processing_class)
    ids = torch.tensor(np.searchsorted(TYPES, adata.obs["cell_type"].astype(str)))
    weights = balanced_class_weights(ids.numpy(), 3, 0.5 if class_weights else 0.0)
    assert len(set(weights.tolist())) == (3 if class_weights else 1)
    expected = torch.nn.functional.cross_entropy(logits, ids, weights, reduction="sum", label_smoothing=0.3) / len(ids)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-4)


# -- failures ------------------------------------------------------------------------------------------------------


def test_an_error_in_training_leaves_an_older_checkpoint_as_it_was(runs, start, adata, tmp_path, monkeypatch):
    tune(adata, tmp_path / "x", start, mode="probe")
    before = {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()}

    def fails(self, *_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(PanFoMaTrainer, "training_step", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        tune(adata, tmp_path / "x", start)
    assert {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_readme_without_a_checkpoint_is_not_overwritten(start, adata, tmp_path):
    (tmp_path / "README.md").write_text("my project")
    with pytest.raises(FileExistsError, match=r"something else in it: README\.md"):
        tune(adata, tmp_path, start)


# -- one pass over cells -------------------------------------------------------------------------------------------


def test_a_pass_over_cells_keeps_their_order_and_the_mode(adata, tokenizer):
    model = PanFoMaForCellClassification(tiny_config(vocab_size=len(tokenizer), hidden_dropout_prob=0.5)).train()
    tokens, _ = tokenize(adata, tokenizer)
    dataset = cell_dataset(tokens)
    outputs = ["pooler_output", "logits"]
    found = forward_cells(model, dataset, tokenizer, outputs=outputs, batch_size=7)
    assert model.training
    singly = [forward_cells(model, dataset.select([index]), tokenizer, outputs=outputs) for index in range(0, 48, 5)]
    for name in outputs:
        assert found[name].dtype == np.float32
        expected = np.concatenate([each[name] for each in singly])
        np.testing.assert_allclose(found[name][::5], expected, rtol=1e-5, atol=1e-5)
    assert len(set(tokens.lengths.tolist())) > 5  # or no cell would have moved
    model.eval()
    forward_cells(model, dataset.select([0]), tokenizer)
    assert not model.training


def test_the_mode_is_restored_after_an_error(adata, tokenizer):
    model = PanFoMaForCellClassification(tiny_config(vocab_size=len(tokenizer))).train()
    tokens, _ = tokenize(adata, tokenizer)
    with pytest.raises(KeyError):
        forward_cells(model, cell_dataset(tokens), tokenizer, outputs=["no_such_output"])
    assert model.training
