"""What makes, judges and measures the checkpoint that ships, on something small."""

import json

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForPreTraining, AutoTokenizer

from panfoma_hf import LinearProbe, PanFoMaForMaskedExpression, save_checkpoint
from panfoma_hf.plotting import save_pretraining_curve
from tests.conftest import spread_out
from tests.test_scripts import run_script
from tests.training.conftest import made_up_cells, run, tiny_model


MARKERS = "Before.\n\n<!-- {0}: start -->\nold\n<!-- {0}: end -->\n\nAfter.\n"


@pytest.fixture(scope="module")
def judged(_corpus_once, tokenizer, tmp_path_factory):
    """A run that was evaluated and probed on the way, and its folder."""
    folder = tmp_path_factory.mktemp("judged") / "run"
    cells = made_up_cells(tokenizer, "normal", 4, seed=9)
    cells.obs["cell_type"] = cells.obs["type"]
    cells.write_h5ad(folder.parent / "crc_infercnv.h5ad")
    probes = {"made_up": LinearProbe.of_cells(cells, tokenizer), "judged": LinearProbe.of_study(_corpus_once, "judged")}
    return run(_corpus_once, folder, tokenizer, eval_strategy="steps", eval_steps=2, probes=probes), folder


@pytest.mark.slow
def test_a_checkpoint_is_judged_beside_random_weights_and_components(judged, tmp_path):
    _, folder = judged
    report = tmp_path / "report.md"
    report.write_text(MARKERS.format("measured"))
    run_script(
        *("evaluate_pretraining.py", "--data", folder.parent, "--checkpoint", folder / "model", "--run", folder),
        *("--sets", "crc_infercnv", "--seeds", 2, "--cells", 40, "--report", report),
    )
    written = report.read_text()
    assert written.startswith("Before.\n")
    assert written.endswith("After.\n")
    assert "old" not in written
    rows = [line.split(" | ") for line in written.splitlines() if line.startswith("| crc_infercnv |")]
    assert [len(row) for row in rows] == [7, 7]  # accuracy and macro-F1
    assert rows[0][1] == "40 / 2 by donor"
    # Whole cells are what a probe of whole cells is asked of, and their embeddings point where they point.
    whole = next(line for line in written.splitlines() if line.startswith("| all |")).strip("| ").split(" | ")
    assert whole[1] == "1"
    assert whole[2] == whole[3]
    assert "4 steps, " in written
    assert "| held out cancer types | frequencies by gene |" in written
    assert (tmp_path / "pretraining.png").read_bytes().startswith(b"\x89PNG")


def test_the_curve_has_a_panel_for_probes_where_there_were_any(judged, tmp_path):
    log = judged[0].state.log_history
    save_pretraining_curve(log, tmp_path / "probed.png")
    without = [line for line in log if "eval_made_up_accuracy" not in line and "eval_judged_accuracy" not in line]
    assert len(without) == len(log) - 4
    save_pretraining_curve(without, tmp_path / "plain.png")
    widths = [imread(tmp_path / name).shape[1] for name in ("probed.png", "plain.png")]
    assert widths[0] == pytest.approx(1.5 * widths[1], abs=2)


@pytest.mark.slow
def test_the_input_pipeline_and_training_steps_are_measured(corpus, tmp_path):
    report = tmp_path / "report.md"
    report.write_text(MARKERS.format("speed"))
    run_script(
        *("benchmark_pretraining.py", corpus.folder, "--sizes", "tiny", "--tokens", 256, "--steps", 2),
        *("--batches", 3, "--report", report),
    )
    written = report.read_text()
    assert "old" not in written
    for row in ("| disk | 0 |", "| stream | 2 |", "| tiny |"):
        assert row in written


def test_a_released_checkpoint_is_the_model_in_half_precision(tokenizer, tmp_path):
    model = spread_out(PanFoMaForMaskedExpression(tiny_model(tokenizer))).eval()
    save_checkpoint(tmp_path / "model", model, tokenizer)
    run_script("release_checkpoint.py", tmp_path / "model", "mine", "--folder", tmp_path)
    released = tmp_path / "mine"
    assert {path.name for path in released.iterdir()} == {
        "config.json",
        "genes.tsv.gz",
        "model.safetensors",
        "tokenizer_config.json",
    }
    assert "auto_map" not in json.loads((released / "config.json").read_text())
    exact = tuple(model._keep_in_fp32_modules_strict)
    for name, tensor in load_file(released / "model.safetensors").items():
        assert tensor.dtype == (torch.float32 if name.endswith(exact) else torch.float16)
    loaded, report = AutoModelForPreTraining.from_pretrained(released, output_loading_info=True)
    assert not report["missing_keys"]
    for (name, weight), other in zip(loaded.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-3, atol=1e-4, msg=name)
    assert len(AutoTokenizer.from_pretrained(released)) == len(tokenizer)
    assert AutoModel.from_pretrained(released).config.hidden_size == 16


def test_weights_beyond_half_precision_are_not_released(tokenizer, tmp_path):
    model = PanFoMaForMaskedExpression(tiny_model(tokenizer))
    torch.nn.init.constant_(model.gene_head.out_proj.bias, 1e6)
    save_checkpoint(tmp_path / "model", model, tokenizer)
    with pytest.raises(AssertionError, match=r"must fit into half precision, got gene_head\.out_proj\.bias"):
        run_script("release_checkpoint.py", tmp_path / "model", "mine", "--folder", tmp_path)
    assert not np.any([path.name == "mine" for path in tmp_path.iterdir()])
