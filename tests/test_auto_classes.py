"""Saving and loading: every head, through the Auto classes, with the package and without it."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import panfoma_hf
from panfoma_hf import (
    PanFoMaConfig,
    PanFoMaForCellClassification,
    PanFoMaForMaskedExpression,
    PanFoMaModel,
    PanFoMaTokenizer,
)
from tests.conftest import pad_batch, random_cells, run_python, spread_out, tiny_config


HEADS = [
    pytest.param(PanFoMaModel, AutoModel, "pooler_output", id="model"),
    pytest.param(PanFoMaForCellClassification, AutoModelForSequenceClassification, "logits", id="cell_classification"),
    pytest.param(PanFoMaForMaskedExpression, AutoModelForMaskedLM, "logits", id="masked_expression"),
    pytest.param(PanFoMaForMaskedExpression, AutoModelForPreTraining, "cell_logits", id="pretraining"),
]

# Prints the output of a checkpoint for one batch; runs in a fresh process.
READ = """
import sys, json
import torch, transformers
auto, folder, key, trust = sys.argv[1:5]
if trust == "no":
    import panfoma_hf
options = {"trust_remote_code": True} if trust == "yes" else {}
model, report = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True, **options)
assert not report["missing_keys"], report
batch = {name: torch.tensor(values) for name, values in json.load(open(sys.argv[5])).items()}
with torch.inference_mode():
    output = getattr(model.eval()(**batch), key)
print(json.dumps({"module": type(model).__module__, "output": output.tolist()}))
"""


# Each of the heads in a process of its own takes ten seconds.
FRESH = [
    pytest.param(*head.values, trust, id=f"{how}-{head.id}", marks=[] if is_quick else pytest.mark.slow)
    for head in HEADS
    for trust, how, is_quick in (
        ("no", "with_the_package", head.id in ("model", "pretraining")),
        ("yes", "remote_code_alone", head.id == "cell_classification"),
    )
]


@pytest.mark.parametrize(("head", "auto", "key", "trust"), FRESH)
def test_a_saved_model_gives_the_same_output_in_a_fresh_process(head, auto, key, trust, tmp_path):
    model = spread_out(head(tiny_config()))
    model.save_pretrained(tmp_path / "checkpoint")
    batch = pad_batch(random_cells([21, 9]))
    (tmp_path / "batch.json").write_text(json.dumps({name: values.tolist() for name, values in batch.items()}))
    printed = run_python(
        READ,
        auto.__name__,
        str(tmp_path / "checkpoint"),
        key,
        trust,
        str(tmp_path / "batch.json"),
        without_package=trust == "yes",
        HF_MODULES_CACHE=str(tmp_path / "modules"),
    )
    result = json.loads(printed)
    assert result["module"].startswith("transformers_modules" if trust == "yes" else "panfoma_hf")
    torch.testing.assert_close(torch.tensor(result["output"]), getattr(model(**batch), key), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("head", "auto", "key"), HEADS)
def test_a_reloaded_head_misses_no_weight_and_gives_the_same_output(head, auto, key, tmp_path):
    model = spread_out(head(tiny_config()))
    model.save_pretrained(tmp_path)
    loaded, report = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is head
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    batch = pad_batch(random_cells([21, 9]))
    torch.testing.assert_close(getattr(loaded.eval()(**batch), key), getattr(model(**batch), key))


def test_remote_code_saves_itself_again_and_tokenizes(trained, adata, tmp_path):
    """The checkpoint of a fine-tune, loaded, saved and loaded once more where the package is not installed."""
    folder, _ = trained
    np.save(tmp_path / "counts.npy", adata.X.toarray())
    (tmp_path / "genes.json").write_text(json.dumps(adata.var_names.tolist()))
    code = """
import sys, json
import numpy as np, torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer
folder, scratch = sys.argv[1:3]
counts, genes = np.load(f"{scratch}/counts.npy"), json.load(open(f"{scratch}/genes.json"))
logits = []
for source, target in ((folder, f"{scratch}/second"), (f"{scratch}/second", f"{scratch}/third")):
    model = AutoModelForSequenceClassification.from_pretrained(source, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=True)
    batch = tokenizer(counts, gene_names=genes, padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits.append(model(**batch).logits)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
torch.testing.assert_close(*logits)
body = AutoModel.from_pretrained(f"{scratch}/third", trust_remote_code=True).eval()
assert type(body).__name__ == "PanFoMaModel" and body(**batch).pooler_output.shape == (48, 32)
print(json.dumps([model.config.id2label[label] for label in logits[0].argmax(-1).tolist()]))
"""
    printed = run_python(
        code, str(folder), str(tmp_path), without_package=True, HF_MODULES_CACHE=str(tmp_path / "modules")
    )
    annotated = panfoma_hf.annotate(adata, folder, progress=False)
    assert json.loads(printed.splitlines()[-1]) == annotated.obs["panfoma_cell_type"].tolist()
    # What the fine-tune said of itself is not the model's to save.
    travelling = {path.name for path in folder.iterdir()} - {"README.md", "finetuning.json"}
    for name in ("second", "third"):
        assert {path.name for path in (tmp_path / name).iterdir()} == travelling


def test_the_installed_package_wins_over_a_checkpoints_code(trained, adata):
    folder, _ = trained
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(model) is PanFoMaModel
    assert type(AutoConfig.from_pretrained(folder, trust_remote_code=True)) is PanFoMaConfig
    # Transformers takes a tokenizer from the checkpoint if it is told to trust it; either does the same.
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert tokenizer(adata) == PanFoMaTokenizer.from_pretrained(folder)(adata)
    by_path = panfoma_hf.embed(adata.copy(), folder, progress=False)
    by_tokenizer = panfoma_hf.embed(adata.copy(), model, tokenizer=tokenizer, progress=False)
    np.testing.assert_array_equal(by_path.obsm["X_panfoma"], by_tokenizer.obsm["X_panfoma"])


def test_the_code_of_a_checkpoint_may_be_loaded_beside_the_package(trained):
    """Two copies of the scan's operators live in one process; neither may take the other's place.

    The folder's name becomes part of a module's name, and need not be one.
    """
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    folder, model = trained
    folder = folder.rename(folder.with_name("my model (v2) é"))
    copy = get_class_from_dynamic_module("modeling_panfoma.PanFoMaForCellClassification", str(folder))
    assert copy is not PanFoMaForCellClassification
    other = copy.from_pretrained(folder).eval()
    batch = random_cells([12])[0]
    torch.testing.assert_close(other(**batch).logits, model.eval()(**batch).logits)


def test_the_body_of_a_classifiers_checkpoint_loads_whole_and_without_a_report(trained):
    folder, model = trained
    body, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    batch = random_cells([12])[0]
    torch.testing.assert_close(body.eval()(**batch).pooler_output, model.panfoma.eval()(**batch).pooler_output)


def test_auto_classes_build_models_from_a_configuration():
    config = tiny_config()
    assert type(AutoModel.from_config(config)) is PanFoMaModel
    assert type(AutoModelForPreTraining.from_config(config)) is PanFoMaForMaskedExpression
    assert type(AutoConfig.for_model("panfoma", hidden_size=64)) is PanFoMaConfig


def test_a_classifier_of_a_checkpoint_takes_new_labels(trained):
    folder, _ = trained
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=7, ignore_mismatched_sizes=True)
    assert model.classifier.weight.shape == (7, 32)


# -- bad checkpoints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "config.json|Unrecognized model"),
        ("model.safetensors", "model.safetensors"),
        ("genes.tsv.gz", "genes.tsv.gz"),
    ],
)
def test_a_missing_file_is_an_error_that_names_it(missing, message, trained, adata):
    folder, _ = trained
    (folder / missing).unlink()
    with pytest.raises((OSError, ValueError), match=message):
        panfoma_hf.annotate(adata, folder, progress=False)
    assert list(adata.obs) == ["cell_type"]


def test_missing_code_is_an_error_that_names_it(trained, tmp_path):
    folder, _ = trained
    (folder / "modeling_panfoma.py").unlink()
    code = """
import sys
from transformers import AutoModel
try:
    AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
except OSError as error:
    print(error)
"""
    printed = run_python(code, str(folder), without_package=True, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert "modeling_panfoma.py" in printed


def test_a_missing_weight_is_an_error_in_annotation(trained, adata):
    folder, _ = trained
    weights = load_file(folder / "model.safetensors")
    del weights["panfoma.encoder.cls_token"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"without panfoma.encoder.cls_token"):
        panfoma_hf.annotate(adata, folder, progress=False)
