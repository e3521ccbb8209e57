"""Model cards: what a fine-tune and a released checkpoint say of themselves, by the Hub's rules."""

import json

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard, metadata_eval_result

import panfoma_hf
from panfoma_hf.evaluation.metrics import bootstrap_interval
from panfoma_hf.hub import Facts, Score, checkpoint_files, model_card
from panfoma_hf.training import finetuning
from panfoma_hf.training.report import finetuning_card
from tests.conftest import ROOT
from tests.hub_server import HubServer, metadata_errors
from tests.test_scripts import run_script


TAGS = ["biology", "genomics", "single-cell", "pan-cancer", "panfoma", "mamba"]
SECTIONS = ["How to load it", "What it learned from", "Labels", "Scores", "What goes in", "Limits", "Licence"]
FACTS = ROOT / "model_cards" / "small.yaml"


@pytest.fixture
def hub(tmp_path):
    with HubServer() as server, server.connected(tmp_path / "home"):
        yield server


def card_of(folder):
    return ModelCard.load(folder / "README.md")


def require_whole(card: ModelCard, sections):
    """A card that the Hub takes, with these sections in turn and nothing left to fill in."""
    card.validate()
    heads = [line.removeprefix("## ") for line in card.text.splitlines() if line.startswith("## ")]
    assert len(heads) == len(sections)
    assert all(head.startswith(section) for head, section in zip(heads, sections, strict=True)), heads
    assert not [word for word in ("{{", "{%", "None", "Undefined", "\n\n\n") if word in card.text.split("```bibtex")[0]]
    assert "Not for clinical use" in card.text
    assert "arXiv:2512.03111" in card.text
    assert (card.data.library_name, card.data.license, card.data.tags) == ("transformers", "apache-2.0", TAGS)


# -- a fine-tune -----------------------------------------------------------------------------------------------------


def test_a_finetune_says_what_it_learned_and_how_good_it_is(hub, trained, tokenizer):
    folder, _ = trained
    report = json.loads((folder / "finetuning.json").read_text())
    card = card_of(folder)
    require_whole(card, SECTIONS)
    assert card.data.pipeline_tag == "tabular-classification"
    task = report["tasks"]["cell_type"]
    for text in (
        f"| training cells | {report['train_cells']} |",
        f"| validation cells | {48 - report['train_cells']} |",
        "| split | by cell |",
        "| started from | random weights |",
        f"- cell_type: B cell ({report['train_counts']['cell_type']['B cell']}), T cell (",
        "into 50 bins",
        "all genes of the vocabulary",
        "25,532 genes. HGNC complete set of 2024-10-18",
        f"`{tokenizer.genes_sha256}`",
        'panfoma_hf.annotate("cells.h5ad", checkpoint)',
        "AutoModelForSequenceClassification.from_pretrained(checkpoint, trust_remote_code=True)",
        "intervals are of cells drawn anew",
    ):
        assert text in card.text
    low, high = task["intervals"]["panfoma"]["accuracy"]
    row = next(line for line in card.text.splitlines() if line.startswith("| cell_type |") and "| PanFoMa |" in line)
    assert f"{task['scores']['panfoma']['accuracy']:.3f} ({low:.3f} to {high:.3f})" in row
    assert "Unassigned" in card.text or "every cell is named" in card.text


def test_its_scores_are_the_hubs_model_index(trained):
    folder, _ = trained
    task = json.loads((folder / "finetuning.json").read_text())["tasks"]["cell_type"]
    found = card_of(folder).data.to_dict()["model-index"]
    assert [len(model["results"]) for model in found] == [1]
    metrics = found[0]["results"][0]["metrics"]
    assert {metric["name"] for metric in metrics} == {
        f"{metric}, {method}"
        for metric in ("accuracy", "macro-F1")
        for method in ("PanFoMa", "majority class", "logistic regression, variable genes")
    }
    cells = f"{task['validation_cells']} validation cells"
    expected = metadata_eval_result(
        model_pretty_name="PanFoMa fine-tuned on cell_type",
        task_pretty_name="cell_type",
        task_id="tabular-classification",
        metrics_pretty_name="macro-F1, PanFoMa",
        metrics_id="f1",
        metrics_value=round(task["scores"]["panfoma"]["macro_f1"], 4),
        metrics_config="macro",
        dataset_pretty_name=cells,
        dataset_id="cells",
        dataset_config=f"cell_type, {cells}",
    )["model-index"][0]
    assert found[0]["name"] == expected["name"]
    result = expected["results"][0]
    assert {key: found[0]["results"][0][key] for key in ("task", "dataset")} == {
        key: result[key] for key in ("task", "dataset")
    }
    one = next(metric for metric in metrics if metric["name"] == "macro-F1, PanFoMa")
    bounds = one.pop("args")["confidence_interval"]
    assert one == {key: value for key, value in result["metrics"][0].items() if key != "verified"}
    assert bounds == [round(bound, 4) for bound in task["intervals"]["panfoma"]["macro_f1"]]


def test_intervals_are_of_donors_where_cells_were_split_by_them(adata, tokenizer, tmp_path, monkeypatch):
    adata.obs["donor_id"] = [f"D{index // 6}" for index in range(48)]
    drawn = []
    monkeypatch.setattr(
        finetuning, "bootstrap_interval", lambda *given: drawn.append(given) or bootstrap_interval(*given)
    )
    config = panfoma_hf.PanFoMaConfig.from_size("tiny", vocab_size=len(tokenizer))
    options = {"mode": "probe", "validation": 0.3, "disable_tqdm": True}
    trainer = panfoma_hf.finetune(adata, "cell_type", tmp_path / "x", model=config, **options)
    task, split = trainer.report["tasks"]["cell_type"], trainer.report["split"]
    held_out = adata.obs["donor_id"].isin(split["held_out"]).to_numpy()
    assert len(split["held_out"]) > 1
    assert task["intervals_over"] == "donor_id"
    assert set(task["intervals"]) == {"panfoma", "majority", "hvg_logistic_regression"}
    for true, _, groups, metric in drawn:
        np.testing.assert_array_equal(true, adata.obs["cell_type"].astype(str)[held_out])
        np.testing.assert_array_equal(groups, adata.obs["donor_id"][held_out])
        assert metric in ("accuracy", "macro_f1")
    found = {(metric, *bootstrap_interval(*given[:3], metric)) for given in drawn for metric in [given[3]]}
    assert {(m, *bounds) for each in task["intervals"].values() for m, bounds in each.items()} == found
    text = card_of(tmp_path / "x").text
    assert "intervals are of `donor_id` drawn anew" in text
    assert f"| `donor_id` in training | {8 - len(split['held_out'])} |" in text
    assert f"| `donor_id` in validation | {len(split['held_out'])} |" in text


def test_its_base_model_is_named_if_it_is_on_the_hub_and_no_path_is_published(hub, trained, tokenizer, adata, tmp_path):
    folder, _ = trained
    report = json.loads((folder / "finetuning.json").read_text())
    assert card_of(folder).data.base_model is None
    card = ModelCard(finetuning_card(report | {"started_from": "lab/panfoma"}, tokenizer))
    card.validate()
    assert card.data.base_model == "lab/panfoma"
    adata.write_h5ad(tmp_path / "mine.h5ad")
    options = {"mode": "probe", "baselines": False, "disable_tqdm": True, "validation": tmp_path / "mine.h5ad"}
    panfoma_hf.finetune(tmp_path / "mine.h5ad", "cell_type", tmp_path / "x", model=folder, **options)
    for name in ("README.md", "finetuning.json"):
        assert str(tmp_path) not in (tmp_path / "x" / name).read_text()
    text = card_of(tmp_path / "x").text
    assert "| cells | mine.h5ad |" in text
    assert "| split | validation cells of their own: mine.h5ad |" in text
    assert "| started from | checkpoint |" in text


# -- the template ----------------------------------------------------------------------------------------------------


def test_tasks_on_the_same_cells_are_told_apart(tokenizer):
    facts = Facts(
        title="x",
        summary="y",
        labels={"cell_type": {"B": 3, "T": 4}, "is_big": {"False": None, "True": None}},
        scores=[Score(task, "9 cells", "PanFoMa", "accuracy", 0.5) for task in ("cell_type", "is_big")],
    )
    card = ModelCard(model_card(facts, tokenizer, is_classifier=True))
    assert [result.task_name for result in card.data.eval_results] == ["cell_type", "is_big"]
    assert [result["task"]["name"] for result in card.data.to_dict()["model-index"][0]["results"]] == [
        "cell_type",
        "is_big",
    ]
    assert "- cell_type: B (3), T (4)\n- is_big: False, True\n" in card.text
    assert "logits = model(**batch).logits" in card.text
    assert "95 % intervals" not in card.text


def test_what_users_write_does_not_break_the_table(tokenizer):
    facts = Facts(
        title="x",
        summary="y",
        data={"cells": "a|b\nc {{ d }}"},
        scores=[Score("type | subtype", "9 cells", "PanFoMa", "accuracy", 0.5, 0.25, 0.75)],
    )
    text = model_card(facts, tokenizer, is_classifier=False)
    assert "| cells | a\\|b c {{ d }} |" in text
    assert "| type \\| subtype | 9 cells | PanFoMa | 0.500 (0.250 to 0.750) |" in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"licence": "mine"}, '"license" must be one of'),
        ({"base_model": "a/b/c"}, '"base_model" with value "a/b/c"'),
        ({"datasets": ["lab/cells", "no name!"]}, '"datasets" with value "no name!"'),
    ],
)
def test_facts_that_the_hub_does_not_take_are_found_by_its_check(change, said, hub, tokenizer):
    facts = {"title": "x", "summary": "y", "datasets": ["lab/cells"], "base_model": "lab/base"}
    ModelCard(model_card(Facts(**facts), tokenizer, is_classifier=True)).validate()
    card = model_card(Facts(**{**facts, **change}), tokenizer, is_classifier=True)
    assert any(said in error for error in metadata_errors(card))
    with pytest.raises(ValueError, match=r"must be one of|with value"):
        ModelCard(card).validate()


def test_facts_of_another_name_are_an_error():
    with pytest.raises(TypeError, match="licenze"):
        Facts(title="x", summary="y", licenze="mit")


# -- released checkpoints --------------------------------------------------------------------------------------------


def test_the_card_that_comes_along_is_that_of_its_facts(hub, tmp_path):
    run_script("write_model_cards.py", "--folder", tmp_path)
    written = tmp_path / "small" / "README.md"
    shipped = panfoma_hf.checkpoint("small") / "README.md"
    assert written.read_text() == shipped.read_text(), "run scripts/write_model_cards.py"
    card = card_of(shipped.parent)
    require_whole(card, [section for section in SECTIONS if section != "Labels"])
    assert card.data.pipeline_tag == "feature-extraction"
    assert "panfoma_hf.annotate" not in card.text
    settings = json.loads((shipped.parent / "tokenizer_config.json").read_text())
    assert f"`{settings['genes_sha256']}`" in card.text


def test_its_figures_are_those_that_were_measured():
    measured = (ROOT / "docs" / "pretraining.md").read_text()
    scores = yaml.safe_load(FACTS.read_text())["scores"]
    assert len(scores) > 50
    for score in scores:
        name = score["cells"].split(":")[0].replace("held-out", "held out")
        lines = [line for line in measured.splitlines() if line.startswith(f"| {name} |")]
        text = f"| {score['value']:.3g} |"
        if "low" in score:
            text = f"| {score['value']:.3f} ± {(score['high'] - score['low']) / 2:.3f} |"
        assert any(text in line for line in lines), score


def test_an_exported_checkpoint_is_complete_with_its_card(tmp_path):
    folder = panfoma_hf.export_checkpoint("small", tmp_path / "panfoma")
    names = {path.name for path in checkpoint_files(folder)}
    assert {"README.md", "config.json", "model.safetensors", "genes.tsv.gz", "modeling_panfoma.py"} <= names
    assert (folder / "README.md").read_text() == (panfoma_hf.checkpoint("small") / "README.md").read_text()
