"""`pretrain` end to end: what it learns, logs, evaluates and leaves behind, and what it refuses."""

import itertools
import json
import runpy
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scipy.optimize import brentq
from scipy.special import expit, log_expit
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModel, AutoModelForPreTraining, AutoTokenizer, TrainingArguments
from typer.testing import CliRunner

from panfoma_cli import app
from panfoma_hf import PanFoMaForCellClassification, save_checkpoint
from panfoma_hf.data.collator import DataCollatorForMaskedExpression
from panfoma_hf.data.corpus import CorpusError
from panfoma_hf.data.corpus.choice import HELD_OUT_CANCER_TYPES, HELD_OUT_DONORS, TRAIN, CellChoice
from panfoma_hf.data.gene_factors import gene_factors
from panfoma_hf.evaluation.probes import LinearProbe
from panfoma_hf.training import PretrainingError, last_good_checkpoint, pretraining, pretraining_trainer
from panfoma_hf.training.safety import checkpoints_of, problem_of
from panfoma_hf.training.throughput import peak_flops, pretraining_flops
from tests.conftest import ROOT
from tests.training.conftest import (
    ARGUMENTS,
    NUM_GENES,
    PEAK_FLOPS,
    Killed,
    before_step,
    damage,
    kill,
    lines,
    losses,
    run,
    tiny_model,
)


LOGGED = {
    "loss",
    "grad_norm",
    "learning_rate",
    "epoch",
    "step",
    "gene_loss",
    "cell_loss",
    "presence_loss",
    "gene_accuracy",
    "cell_accuracy",
    "majority_accuracy",
    "cells_seen",
    "cells_per_second",
    "tokens_per_second",
    "padding",
    "flop_utilisation",
}
# Logs show float32 sums of float32 losses.
CLOSE = 1e-5


class Counting:
    """A probe that says how often it was asked, and of what."""

    def __init__(self):
        self.models = []

    def __call__(self, model):
        self.models.append(model)
        return {"asked": float(len(self.models))}


@pytest.fixture(scope="module")
def easy(_corpus_once, tokenizer, tmp_path_factory):
    """A run that has time to learn, with evaluation, probes and checkpoints; tests must not change it."""
    folder = tmp_path_factory.mktemp("easy") / "run"
    counting = Counting()
    trainer = run(
        _corpus_once,
        folder,
        tokenizer,
        max_steps=150,
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=50,
        save_strategy="steps",
        save_steps=75,
        probes={"counting": counting, "judged": LinearProbe.of_study(_corpus_once, "judged")},
    )
    return trainer, folder, counting


def purposes(corpus) -> np.ndarray:
    return CellChoice("donor", 10, ["judged"], ["melanoma"]).of_all(corpus)


def rows_of(corpus, rows) -> list[dict]:
    return [
        {key: np.asarray(row[key]) for key in ("input_ids", "expression_bins")}
        for row in corpus.dataset().select(rows).to_list()
    ]


# -- what it leaves behind -------------------------------------------------------------------------------------------


def test_the_result_loads_with_plain_auto_classes(easy, corpus):
    trainer, folder, _ = easy
    assert {"model", "run.json", "trainer_state.json", "checkpoint-75", "checkpoint-150"} == {
        path.name for path in folder.iterdir()
    }
    model, report = AutoModelForPreTraining.from_pretrained(folder / "model", output_loading_info=True)
    assert type(model).__name__ == "PanFoMaForMaskedExpression"
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    base, report = AutoModel.from_pretrained(folder / "model", output_loading_info=True)
    assert not report["missing_keys"]
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.get_vocab() == corpus.tokenizer.get_vocab()

    batch = tokenizer.pad(rows_of(corpus, range(3)), return_tensors="pt")
    trained = trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, trained(**batch).logits)
        torch.testing.assert_close(base.eval()(**batch).pooler_output, trained(**batch).pooler_output)


def test_its_checkpoints_are_whole_and_load_too(easy):
    trainer, folder, _ = easy
    assert [path.name for path in checkpoints_of(folder)] == ["checkpoint-150", "checkpoint-75"]
    assert [problem_of(path) for path in checkpoints_of(folder)] == [None, None]
    _, report = AutoModelForPreTraining.from_pretrained(folder / "checkpoint-75", output_loading_info=True)
    assert not report["missing_keys"]
    last, result = (load_file(folder / name / "model.safetensors") for name in ("checkpoint-150", "model"))
    assert last.keys() == result.keys()
    assert all(torch.equal(last[name], result[name]) for name in last)
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["global_step"] == 150
    assert state["log_history"] == json.loads(json.dumps(trainer.state.log_history))


def test_dropout_is_of_pretraining_only_and_the_checkpoint_keeps_its_own(easy, corpus, tokenizer, tmp_path):
    trainer, folder, _ = easy

    def rates(model):
        return {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}

    assert rates(trainer.model) == {0.0}
    again = AutoModelForPreTraining.from_pretrained(folder / "model")
    assert again.config.hidden_dropout_prob == 0.1
    assert 0.1 in rates(again)
    assert rates(run(corpus, tmp_path / "run", tokenizer, dropout=0.25, max_steps=1).model) == {0.25}


# -- what it learns --------------------------------------------------------------------------------------------------


def test_it_learns_what_the_genes_that_are_seen_say_of_the_masked_ones(easy):
    trainer, _, _ = easy
    # From what counting tells, which is where it starts.
    for name, most in (("gene_loss", 0.9), ("cell_loss", 0.9), ("presence_loss", 0.5)):
        found = [line[name] for line in lines(trainer)]
        assert np.mean(found[-10:]) < most * np.mean(found[:10])
    last = {key: value for line in trainer.state.log_history for key, value in line.items()}
    for name in ("held_out_donors", "held_out_cancer_types"):
        assert last[f"eval_{name}_gene_loss"] < last[f"eval_{name}_frequency_loss"] - 0.5
        for part in ("gene", "cell"):
            assert last[f"eval_{name}_{part}_loss"] < last[f"eval_{name}_context_frequency_loss"] - 0.03
        assert last[f"eval_{name}_presence_loss"] < 0.5 * last[f"eval_{name}_presence_frequency_loss"]
        assert last[f"eval_{name}_gene_accuracy"] > last[f"eval_{name}_majority_accuracy"]


def test_a_fresh_model_starts_from_how_often_each_gene_is_expressed_and_has_each_bin(corpus, tokenizer, tmp_path):
    trainer = run(corpus, tmp_path / "run", tokenizer, max_steps=1, learning_rate=0.0)
    counts = np.zeros((len(tokenizer), tokenizer.num_expression_bins + 1))
    for cell in rows_of(corpus, np.flatnonzero(purposes(corpus) == TRAIN)):
        counts[cell["input_ids"], cell["expression_bins"]] += 1
    common = counts.sum(0) + 1 / counts.shape[1]
    smooth = counts + 10 * common / common.sum()
    expected = np.log(smooth / smooth.sum(1, keepdims=True))
    np.testing.assert_allclose(trainer.model.bin_priors.weight.detach(), expected, rtol=1e-5)
    cells = counts[:, 1:].sum(1)
    expected = np.log((cells + 0.5) / (60 - cells + 0.5))
    np.testing.assert_allclose(trainer.model.presence_priors.weight[:, 0].detach(), expected, rtol=1e-5)


def test_a_fresh_models_genes_start_from_factors_of_their_bins(corpus, tokenizer, tmp_path):
    start = {"max_steps": 1, "learning_rate": 0.0}
    with_factors = run(corpus, tmp_path / "with", tokenizer, **start).model
    without = run(corpus, tmp_path / "without", tokenizer, **start, gene_factors=False).model
    genes, plain = (model.get_input_embeddings().weight.detach() for model in (with_factors, without))
    cells = corpus.dataset().select(np.flatnonzero(purposes(corpus) == TRAIN))
    factors = torch.from_numpy(gene_factors(cells, genes.shape[0], genes.shape[1] - 1))
    known = factors.any(1)
    assert NUM_GENES * 0.9 < known.sum() <= NUM_GENES
    size = 10 * with_factors.config.initializer_range
    torch.testing.assert_close(genes[known, 1:], size * factors[known])
    # A gene that no cell has keeps its random direction, and has the length of the others.
    torch.testing.assert_close(genes[~known, 1:], 10 * plain[~known, 1:])
    assert genes[~known, 1:].std() == pytest.approx(size, rel=0.1)
    assert not genes[tokenizer.pad_token_id].any()
    weights, others = with_factors.state_dict(), without.state_dict()
    small = {
        name
        for name in weights
        if name.startswith("panfoma") and name.endswith(("out_proj.weight", "mlp_down_proj.weight"))
    }
    assert len(small) == 2 * with_factors.config.num_encoder_layers + with_factors.config.num_decoder_layers
    pooler = {f"panfoma.pooler.{name}" for name in ("gene_scale", "cell_scale", "gene_weight.weight")}
    embeddings = {f"panfoma.embeddings.{name}_embeddings.weight" for name in ("gene", "bin")}
    for name in weights.keys() - embeddings - pooler:
        torch.testing.assert_close(weights[name], others[name] * (0.1 if name in small else 1), msg=name)


def test_at_the_start_genes_weigh_in_the_cell_embedding_by_bin_and_rarity(corpus, tokenizer, tmp_path):
    model = run(corpus, tmp_path / "run", tokenizer, max_steps=1, learning_rate=0.0).model.panfoma.eval()
    cells = rows_of(corpus, np.flatnonzero(purposes(corpus) == TRAIN))
    expressed = np.bincount(np.concatenate([cell["input_ids"] for cell in cells]), minlength=len(tokenizer))
    cell = next(iter(rows_of(corpus, [0])))
    genes, bins = np.array(cell["input_ids"]), np.array(cell["expression_bins"])
    weights = bins * -np.log((expressed[genes] + 0.5) / (len(cells) + 1))
    with torch.no_grad():
        inputs, static = model.embeddings(torch.tensor(genes)[None], torch.tensor(bins)[None])
        found = model.pooler.gene_weight(model.pooler.norm(inputs))[0, :, 0].softmax(0).numpy()
    # Norming all dimensions together bends the logarithms a little.
    assert np.corrcoef(np.log(found), np.log(weights))[0, 1] > 0.95
    # What the layers made of the genes hardly counts yet.
    batch = {"input_ids": torch.tensor(genes)[None], "expression_bins": torch.tensor(bins)[None]}
    with torch.no_grad():
        pooled = model(**batch).pooler_output[0]
        alone = torch.from_numpy(found) @ model.pooler.norm(static)[0]
    assert (pooled - alone).norm() < 0.1 * alone.norm()


def test_weights_that_were_trained_before_are_not_started_again(easy, corpus, tokenizer, tmp_path, monkeypatch):
    _, folder, _ = easy

    def fail(*arguments):
        raise AssertionError("looked for factors")

    monkeypatch.setattr(pretraining, "find_gene_factors", fail)
    run(corpus, tmp_path / "run", tokenizer, model=folder / "model", max_steps=1)
    # Nor those of another head, which know no frequencies yet.
    classifier = PanFoMaForCellClassification(tiny_model(tokenizer))
    save_checkpoint(tmp_path / "classifier", classifier, tokenizer)
    trainer = run(corpus, tmp_path / "other", tokenizer, model=tmp_path / "classifier", max_steps=1, learning_rate=0.0)
    assert trainer.model.bin_priors.weight.any()
    for (name, weight), other in zip(
        trainer.model.panfoma.named_parameters(), classifier.panfoma.parameters(), strict=True
    ):
        torch.testing.assert_close(weight, other, rtol=0, atol=0, msg=name)
    with pytest.raises(AssertionError, match="looked for factors"):
        run(corpus, tmp_path / "fresh", tokenizer, max_steps=1)


def test_genes_that_are_withheld_are_learned_from_as_expressed(corpus, tokenizer, tmp_path):
    still = {"learning_rate": 0.0, "max_steps": 1, "model": tiny_model(tokenizer, presence_loss_weight=0.0)}
    trainer = run(corpus, tmp_path / "run", tokenizer, withhold_ratio=0.5, **still)
    (keys,) = trainer.schedule
    batch = trainer.data_collator(trainer.train_dataset.__getitems__(keys))
    assert batch["withheld_ids"].any()
    expected = reference(trainer.model, [batch], (1.0, 1.0, 0.0))
    assert {name: lines(trainer)[0][name] for name in expected} == pytest.approx(expected, rel=CLOSE)


def test_it_goes_on_from_a_checkpoints_weights(easy, corpus, tokenizer, tmp_path):
    _, folder, _ = easy
    more = run(corpus, tmp_path / "run", tokenizer, model=folder / "model", max_steps=1, learning_rate=0.0)
    before, after = (load_file(path / "model" / "model.safetensors") for path in (folder, tmp_path / "run"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    fresh = run(corpus, tmp_path / "fresh", tokenizer, max_steps=1)
    assert losses(more)[0] < losses(fresh)[0] - 0.5


def test_the_seed_decides_everything(corpus, tokenizer, tmp_path):
    first, again, other = (
        losses(run(corpus, tmp_path / str(number), tokenizer, seed=seed, dropout=0.1))
        for number, seed in enumerate((1, 1, 2))
    )
    assert first == again
    assert first != other


def test_norms_biases_priors_and_mambas_a_and_d_are_not_decayed(easy):
    trainer, _, _ = easy
    names = {id(p): name for name, p in trainer.model.named_parameters() if p.requires_grad}
    groups = {
        group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in trainer.optimizer.param_groups
    }
    assert set(groups) == {0.0, 0.01}
    assert groups[0.0] | groups[0.01] == set(names.values())
    spared = ("A_log", ".D", "bias", "norm.weight", "bin_priors.weight", "presence_priors.weight")
    assert groups[0.0] == {name for name in names.values() if name.endswith(spared)}
    for kind in spared:
        assert any(name.endswith(kind) for name in groups[0.0]), kind


# -- what it logs ----------------------------------------------------------------------------------------------------


def presence(batch) -> list[set[int]]:
    """The genes that each cell expresses: those it shows, and those it withholds."""
    found = []
    for row, (genes, here) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
        withheld = batch["withheld_ids"][row].tolist() if "withheld_ids" in batch else []
        found.append(set(genes[here == 1].tolist()) | set(withheld) - {0})
    return found


def reference(model, batches, weights=(1.0, 1.0, 0.1)) -> dict[str, float]:
    """Mean losses over the masked genes of some batches, and the shares of them that are right."""
    sums = np.zeros(5)
    masked = 0
    for batch in batches:
        with torch.no_grad():
            outputs = model.eval()(**batch)
        where = batch["labels"] != -100
        true = batch["labels"][where]
        for index, logits in enumerate((outputs.logits[where].double(), outputs.cell_logits[where].double())):
            sums[index] += F.cross_entropy(logits, true, reduction="sum").item()
            sums[2 + index] += (logits.argmax(-1) == true).sum().item()
        for genes, logits in zip(presence(batch), outputs.presence_logits.double(), strict=True):
            logits = logits.clone()
            logits[sorted(genes)] *= -1
            sums[4] += F.softplus(logits).sum().item()
        masked += len(true)
    names = ("gene_loss", "cell_loss", "gene_accuracy", "cell_accuracy", "presence_loss")
    means = dict(zip(names, (sums / masked).tolist(), strict=True))
    parts = zip(weights, ("gene_loss", "cell_loss", "presence_loss"), strict=True)
    return {**means, "loss": sum(weight * means[name] for weight, name in parts)}


@pytest.mark.parametrize("accumulated", [1, 2])
def test_what_is_logged_of_a_step_is_that_of_all_its_batches(accumulated, corpus, tokenizer, tmp_path):
    """Of a model that stands still, against its own logits for the batches of the schedule."""
    trainer = run(
        corpus,
        tmp_path / "run",
        tokenizer,
        model=tiny_model(tokenizer, gene_loss_weight=2.0, cell_loss_weight=0.5, presence_loss_weight=0.1),
        learning_rate=0.0,
        gradient_accumulation_steps=accumulated,
        mask_ratio=(0.15, 0.4),
        max_genes=40,
        max_steps=3,
    )
    assert len(lines(trainer)) == 3
    batches = [trainer.data_collator(trainer.train_dataset.__getitems__(keys)) for keys in trainer.schedule]
    assert len(batches) == 3 * accumulated
    majority = torch.from_numpy(commonest_bins(corpus, tokenizer))
    config, cells_seen = trainer.model.config, 0
    for number, line in enumerate(lines(trainer)):
        assert set(line) == LOGGED
        step = batches[number * accumulated : (number + 1) * accumulated]
        expected = reference(trainer.model, step, (2.0, 0.5, 0.1))
        assert {name: line[name] for name in expected} == pytest.approx(expected, rel=CLOSE)
        cells = sum(len(batch["input_ids"]) for batch in step)
        tokens = sum(int(batch["attention_mask"].sum()) for batch in step)
        positions = sum(batch["input_ids"].numel() for batch in step)
        right = sum(
            int((majority[batch["input_ids"]] == batch["labels"])[batch["labels"] != -100].sum()) for batch in step
        )
        assert line["majority_accuracy"] == right / sum(int((batch["labels"] != -100).sum()) for batch in step)
        cells_seen += cells
        assert line["cells_seen"] == cells_seen
        assert line["epoch"] == cells_seen / 60
        assert line["padding"] == pytest.approx(1 - tokens / positions)
        assert line["tokens_per_second"] / line["cells_per_second"] == pytest.approx(tokens / cells)
        flops = sum(pretraining_flops(config, *batch["input_ids"].shape) for batch in step)
        utilisation = flops / cells * line["cells_per_second"] / PEAK_FLOPS
        assert line["flop_utilisation"] == pytest.approx(utilisation)
        assert line["cells_per_second"] > 0


def commonest_bins(corpus, tokenizer) -> np.ndarray:
    counts = np.zeros((len(tokenizer), tokenizer.num_expression_bins + 1), dtype=int)
    for cell in rows_of(corpus, np.flatnonzero(purposes(corpus) == TRAIN)):
        counts[cell["input_ids"], cell["expression_bins"]] += 1
    return counts.argmax(1)


def test_a_line_of_the_log_is_the_mean_of_its_steps(corpus, tokenizer, tmp_path):
    each = lines(run(corpus, tmp_path / "each", tokenizer, max_steps=6))
    some = lines(run(corpus, tmp_path / "some", tokenizer, max_steps=6, logging_steps=3))
    assert [line["step"] for line in some] == [3, 6]
    for line, three in zip(some, (each[:3], each[3:]), strict=True):
        parts = ("gene_loss", "cell_loss", "presence_loss")
        for key in ("loss", *parts):
            assert line[key] == pytest.approx(np.mean([one[key] for one in three]), rel=CLOSE)
        weighted = line["gene_loss"] + line["cell_loss"] + 0.1 * line["presence_loss"]
        assert line["loss"] == pytest.approx(weighted, rel=CLOSE)
        assert line["cells_seen"] == three[-1]["cells_seen"]


def test_the_peak_of_the_device_is_looked_up_once_for_its_dtype(corpus, tokenizer, tmp_path, monkeypatch):
    asked = []

    def noted(device, dtype):
        asked.append((device.type, dtype))
        return peak_flops(device, dtype)

    monkeypatch.setattr(pretraining_trainer, "peak_flops", noted)
    trainer = run(corpus, tmp_path / "run", tokenizer, max_steps=2)
    assert asked == [("cpu", torch.float32)]
    assert all(0 < line["flop_utilisation"] < 1 for line in lines(trainer))


def test_tensorboard_gets_what_is_logged(corpus, tokenizer, tmp_path):
    trainer = run(corpus, tmp_path / "run", tokenizer, max_steps=2, report_to="tensorboard")
    (events,) = {path.parent for path in (tmp_path / "run").rglob("events.out.tfevents.*")}
    accumulator = EventAccumulator(str(events)).Reload()
    for name in ("gene_loss", "cell_loss", "presence_loss", "cells_per_second", "flop_utilisation"):
        found = [event.value for event in accumulator.Scalars(f"train/{name}")]
        assert found == pytest.approx([line[name] for line in lines(trainer)], rel=1e-6)


# -- evaluation ------------------------------------------------------------------------------------------------------


def as_many_expected(log_odds: np.ndarray, number: int) -> np.ndarray:
    """Log odds, all shifted alike so that their probabilities add up to a number."""
    return log_odds + brentq(lambda shift: expit(log_odds + shift).sum() - number, -30, 30)


def test_evaluation_gives_what_the_models_logits_and_plain_counts_give(easy, corpus, tokenizer):
    trainer, _, _ = easy
    logged = {key: value for line in trainer.state.log_history for key, value in line.items()}
    counts = np.zeros((len(tokenizer), tokenizer.num_expression_bins + 1))
    for cell in rows_of(corpus, np.flatnonzero(purposes(corpus) == TRAIN)):
        counts[cell["input_ids"], cell["expression_bins"]] += 1
    common = counts.sum(0) + 1 / counts.shape[1]
    common /= common.sum()
    by_gene = (counts + 10 * common) / (counts.sum(1, keepdims=True) + 10)
    log_odds = np.log(counts[:, 1:].sum(1) + 0.5) - np.log(60 - counts[:, 1:].sum(1) + 0.5)

    for name, purpose in (("held_out_donors", HELD_OUT_DONORS), ("held_out_cancer_types", HELD_OUT_CANCER_TYPES)):
        cells = rows_of(corpus, np.flatnonzero(purposes(corpus) == purpose))
        assert len(cells) == 24
        # A batch for each cell: no padding, no order.
        collator = DataCollatorForMaskedExpression(tokenizer, 0.3, random=False)
        batches = [collator([cell]) for cell in cells]
        expected = reference(trainer.model, batches)
        sums = dict.fromkeys(("frequency_loss", "context_frequency_loss", "majority_accuracy", "context"), 0.0)
        sums["presence_frequency_loss"] = 0.0
        masked = 0
        for batch in batches:
            genes, bins, true = (batch[key][0].numpy() for key in ("input_ids", "expression_bins", "labels"))
            is_present = np.isin(np.arange(len(log_odds)), genes)
            shifted = as_many_expected(log_odds, is_present.sum())
            sums["presence_frequency_loss"] -= log_expit(np.where(is_present, shifted, -shifted)).sum()
            seen = np.bincount(bins[true == -100], minlength=len(common)) + 10 * common
            context = seen / seen.sum() / common
            for gene, label in zip(genes[true != -100], true[true != -100], strict=True):
                sums["frequency_loss"] -= np.log(by_gene[gene, label])
                sums["majority_accuracy"] += counts[gene].argmax() == label
                together = by_gene[gene] * context
                sums["context_frequency_loss"] -= np.log(together[label] / together.sum())
                sums["context"] += together.argmax() == label
                masked += 1
        sums["context_frequency_accuracy"] = sums.pop("context")
        expected |= {key: value / masked for key, value in sums.items()}
        assert {key: logged[f"eval_{name}_{key}"] for key in expected} == pytest.approx(expected, rel=1e-4)


def test_evaluation_takes_the_same_cells_each_time_and_leaves_training_as_it_was(corpus, tokenizer, tmp_path):
    without = run(corpus, tmp_path / "without", tokenizer)
    evaluated = run(corpus, tmp_path / "with", tokenizer, eval_strategy="steps", eval_steps=1, max_eval_cells=10)
    assert losses(evaluated) == losses(without)
    assert {len(cells) for cells in evaluated.eval_dataset.values()} == {10}
    again = run(corpus, tmp_path / "again", tokenizer, seed=5, max_steps=1, max_eval_cells=10)
    for name, cells in evaluated.eval_dataset.items():
        assert cells.to_list() == again.eval_dataset[name].to_list()
    first, second = (evaluated.evaluate()["eval_held_out_donors_loss"] for _ in range(2))
    assert first == second


def test_a_corpus_without_held_out_cancer_types_is_evaluated_on_donors_alone(corpus, tokenizer, tmp_path):
    trainer = run(corpus, tmp_path / "run", tokenizer, held_out_cancer_types=[], max_steps=1)
    assert list(trainer.eval_dataset) == ["held_out_donors"]


def test_probes_are_asked_once_after_each_evaluation(easy):
    trainer, _, counting = easy
    history = trainer.state.log_history
    asked = [line for line in history if "eval_counting_asked" in line]
    assert [(line["step"], line["eval_counting_asked"]) for line in asked] == [(50, 1.0), (100, 2.0), (150, 3.0)]
    assert all(model is trainer.model.base_model for model in counting.models)
    scores = [line["eval_judged_accuracy"] for line in history if "eval_judged_accuracy" in line]
    assert len(scores) == 3
    assert all(0 <= score <= 1 for score in scores)


# -- options ---------------------------------------------------------------------------------------------------------


# Transformers 5.23 has new names for these, which the oldest that we support does not know.
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")
def test_gradient_checkpointing_changes_nothing(corpus, tokenizer, tmp_path):
    plain = losses(run(corpus, tmp_path / "plain", tokenizer, dropout=0.1))
    trainer = run(corpus, tmp_path / "less", tokenizer, dropout=0.1, gradient_checkpointing=True)
    assert trainer.model.is_gradient_checkpointing
    assert losses(trainer) == pytest.approx(plain, rel=CLOSE)


def test_what_accelerate_launch_says_of_precision_counts(corpus, tokenizer, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        pretraining_trainer, "peak_flops", lambda device, dtype: asked.append(dtype) or (PEAK_FLOPS, "made up")
    )
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    run(corpus, tmp_path / "run", tokenizer, max_steps=1)
    assert asked == [torch.bfloat16]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["mixed_precision"] == "bf16"
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    with pytest.raises(PretrainingError, match="mixed_precision 'bf16' -> 'no'"):
        run(corpus, tmp_path / "run", tokenizer, max_steps=1, resume=True)


def test_one_process_does_not_take_several_gpus(corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match=r"got one process that sees 2\. Start it by `accelerate launch`"):
        run(corpus, tmp_path / "run", tokenizer)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ratio", [0, [0, 0], np.float32(0)])
def test_a_share_may_be_a_whole_number(ratio, corpus, tokenizer, tmp_path):
    run(corpus, tmp_path / "run", tokenizer, withhold_ratio=ratio, max_steps=1)
    assert set(json.loads((tmp_path / "run" / "run.json").read_text())["withhold_ratio"]) == {0.0}


def test_bfloat16_stays_near_float32_and_its_weights_are_saved_in_float32(corpus, tokenizer, tmp_path):
    plain = losses(run(corpus, tmp_path / "plain", tokenizer))
    found = losses(run(corpus, tmp_path / "half", tokenizer, bf16=True))
    assert found == pytest.approx(plain, rel=0.02)
    assert found != pytest.approx(plain, rel=1e-6)
    weights = load_file(tmp_path / "half" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_accumulated_batches_make_one_step_over_the_cells_of_all(corpus, tokenizer, tmp_path):
    """Eight steps of two batches read the cells that sixteen steps of one do, in their order."""
    sizes = {"tokens_per_batch": None, "per_device_train_batch_size": 5}
    two = run(corpus, tmp_path / "two", tokenizer, max_steps=8, gradient_accumulation_steps=2, **sizes)
    one = run(corpus, tmp_path / "one", tokenizer, max_steps=16, **sizes)
    assert list(two.schedule) == list(one.schedule)
    assert [line["cells_seen"] for line in lines(two)] == [line["cells_seen"] for line in lines(one)[1::2]]
    assert two.state.global_step == 8


def test_epochs_are_passes_over_the_training_cells(corpus, tokenizer, tmp_path):
    trainer = run(corpus, tmp_path / "run", tokenizer, max_steps=-1, num_train_epochs=2)
    assert sorted(itertools.chain.from_iterable(trainer.schedule)) == list(range(120))
    assert trainer.state.log_history[-1]["epoch"] == 2
    assert lines(trainer)[-1]["cells_seen"] == 120
    half = run(corpus, tmp_path / "half", tokenizer, max_steps=-1, num_train_epochs=0.5, gradient_accumulation_steps=2)
    assert half.state.global_step == round(half.schedule.batches_of(0.5) / 2)
    # To the nearest step of two batches.
    assert abs(lines(half)[-1]["cells_seen"] - 30) <= 2 * max(len(batch) for batch in half.schedule)


def test_workers_read_the_same_batches(corpus, tokenizer, tmp_path):
    alone = losses(run(corpus, tmp_path / "alone", tokenizer, max_steps=2))
    assert losses(run(corpus, tmp_path / "two", tokenizer, max_steps=2, dataloader_num_workers=2)) == alone


def test_a_stream_is_trained_on_for_some_steps(corpus, tokenizer, tmp_path):
    trainer = run(
        corpus, tmp_path / "run", tokenizer, streaming=True, max_steps=30, eval_strategy="steps", eval_steps=30
    )
    assert len(losses(trainer)) == 30
    assert lines(trainer)[-1]["cells_seen"] > 60
    last = {key: value for line in trainer.state.log_history for key, value in line.items()}
    disk = run(corpus, tmp_path / "disk", tokenizer, max_steps=1)
    # The same held-out cells, hence what no model changes is the same.
    expected = disk.evaluate()
    for name in ("held_out_donors", "held_out_cancer_types"):
        key = f"eval_{name}_majority_accuracy"
        assert last[key] == pytest.approx(expected[key])


def test_a_stream_needs_a_number_of_steps(corpus, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="`max_steps`"):
        run(corpus, tmp_path / "run", tokenizer, streaming=True, max_steps=-1)
    assert not (tmp_path / "run").exists()


# -- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"save_total_limit": 1}, "`save_total_limit` must be at least 2, got 1"),
        ({"min_genes_measured": 10_000}, "got none of 144 in the part 'train'"),
        ({"held_out_studies": ["lung"]}, "`held_out_studies` must be in the corpus, got lung"),
        ({"held_out_cancer_types": ["flu"]}, "`held_out_cancer_types` must be in the corpus, got flu"),
        ({"mask_ratio": 1.5}, "`mask_ratio` is a share"),
        ({"withhold_ratio": 1.0}, "`withhold_ratio` is a share"),
        ({"split": "patient"}, "got 'patient'"),
    ],
)
def test_an_argument_that_breaks_a_rule_is_an_error_before_anything_is_written(
    changes, message, corpus, tokenizer, tmp_path
):
    with pytest.raises((ValueError, OSError), match=message):
        run(corpus, tmp_path / "run", tokenizer, **changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("harm", ["changed", "missing"])
def test_a_corpus_that_is_not_whole_is_an_error_before_anything_is_written(harm, changeable, tokenizer, tmp_path):
    shard = changeable.manifest["shards"][1]["path"]
    path = changeable.folder / shard
    if harm == "changed":
        damage(path)
    else:
        path.unlink()
    with pytest.raises(CorpusError, match=rf"got 1 of 4 .*{shard} \({harm}\)"):
        run(changeable, tmp_path / "run", tokenizer)
    assert not (tmp_path / "run").exists()


# -- what goes wrong on the way --------------------------------------------------------------------------------------


def spoil(name: str, value: float):
    """Sets a weight to a value that it should not have."""

    def action(trainer):
        with torch.no_grad():
            dict(trainer.model.named_parameters())[name].view(-1)[-1] = value

    return action


SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 8}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_good_checkpoint(
    value, corpus, tokenizer, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    before_step(monkeypatch, 5, spoil("gene_head.out_proj.bias", value))
    with pytest.raises(PretrainingError, match=r"Losses must be finite, got (nan|inf) after step 5\..*checkpoint-4 is"):
        run(corpus, folder, tokenizer, **SAVING)
    assert last_good_checkpoint(folder).name == "checkpoint-4"
    assert problem_of(folder / "checkpoint-4") is None
    assert not (folder / "model").exists()
    weights = load_file(folder / "checkpoint-4" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    _, report = AutoModelForPreTraining.from_pretrained(folder / "checkpoint-4", output_loading_info=True)
    assert not report["missing_keys"]


def test_a_learning_rate_that_is_much_too_large_stops_the_run(corpus, tokenizer, tmp_path):
    with pytest.raises(PretrainingError, match=r"must be finite.*No checkpoint was saved yet.*Lower `learning_rate`"):
        run(corpus, tmp_path / "run", tokenizer, learning_rate=1e38, max_grad_norm=0.0, warmup_steps=0)


def test_weights_that_are_not_finite_are_not_saved_though_the_loss_is(corpus, tokenizer, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    # What is known of the last gene of the vocabulary, whose bins are asked of no cell.
    before_step(monkeypatch, 5, spoil("bin_priors.weight", float("inf")))
    with pytest.raises(PretrainingError, match=r"Weights must be finite, got inf after step 6\..*checkpoint-4 is"):
        run(corpus, folder, tokenizer, **SAVING)
    assert [path.name for path in checkpoints_of(folder)] == ["checkpoint-4", "checkpoint-2"]
    assert problem_of(folder / "checkpoint-4") is None


@pytest.mark.parametrize("replaced", [False, True])
def test_a_folder_that_vanishes_stops_the_run_and_what_was_in_it_stays_whole(
    replaced, corpus, tokenizer, tmp_path, monkeypatch
):
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"

    def move(trainer):
        folder.rename(elsewhere)
        if replaced:
            folder.mkdir()

    before_step(monkeypatch, 5, move)
    with pytest.raises(PretrainingError, match=rf"got {folder} gone or replaced at step 6"):
        run(corpus, folder, tokenizer, **SAVING)
    assert [problem_of(path) for path in checkpoints_of(elsewhere)] == [None, None]
    assert last_good_checkpoint(elsewhere).name == "checkpoint-4"
    assert folder.exists() == replaced
    assert not replaced or not list(folder.iterdir())
    # It is brought back, and the run goes on.
    monkeypatch.undo()
    if replaced:
        folder.rmdir()
    elsewhere.rename(folder)
    assert run(corpus, folder, tokenizer, resume=True, **SAVING).state.global_step == 8


def test_any_other_error_of_training_is_not_hidden(corpus, tokenizer, tmp_path, monkeypatch):
    before_step(monkeypatch, 3, kill)
    with pytest.raises(Killed):
        run(corpus, tmp_path / "run", tokenizer)


# -- the command -----------------------------------------------------------------------------------------------------


def command(corpus, out, tmp_path, *options, recipe=None):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({**ARGUMENTS, "model": "tiny", "max_steps": 2, **(recipe or {})}))
    return CliRunner().invoke(app, ["pretrain", str(corpus.folder), str(out), "--recipe", str(path), *options])


def failed(result) -> str:
    """What a command that fails says of it: on stderr, as one message, with exit code 1."""
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    assert result.stderr.count("error: ") == 1
    assert "Traceback" not in result.stderr
    return result.stderr.partition("error: ")[2]


def test_the_command_takes_a_recipe_changes_and_probes(corpus, tmp_path):
    out = tmp_path / "run"
    result = command(
        corpus, out, tmp_path, "--set", "learning_rate=2e-3", "--set", "eval_strategy=steps", "--probe", "judged"
    )
    assert result.exit_code == 0, result.output
    assert f"{out / 'model'} after 2 steps" in result.stdout
    assert json.loads((out / "run.json").read_text())["learning_rate"] == 0.002
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    # It would be after 500 steps, and is at the end.
    assert [line["step"] for line in log if "eval_judged_accuracy" in line] == [2]

    message = failed(command(corpus, out, tmp_path))
    assert "A run begins in a folder without one" in message
    assert "--resume" in message
    message = failed(command(corpus, out, tmp_path, "--resume"))
    assert "learning_rate 0.002 -> 0.0005" in message


def test_the_command_scores_a_probe_after_each_evaluation(corpus, tmp_path):
    recipe = {"eval_strategy": "steps", "eval_steps": 1, "probe": ["judged"]}
    assert command(corpus, tmp_path / "run", tmp_path, recipe=recipe).exit_code == 0
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert [line["step"] for line in log if "eval_judged_macro_f1" in line] == [1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--set", "learning_rate=1e38", "--set", "max_grad_norm=0", "--set", "warmup_steps=0"), "must be finite"),
        (("--set", "learing_rate=1"), "Did you mean learning_rate"),
        (("--set", "split=patient"), "'patient'"),
        (("--set", "min_genes_measured=99999"), "Lower `min_genes_measured`"),
        (("--set", "output_dir=elsewhere"), "output_dir"),
        (("--set", "max_steps=many"), "max_steps"),
        (("--set", "held_out_studies=lung"), "lung"),
        (("--probe", "lung"), "lung"),
        (("--probe", "judged", "--probe", "judged"), "'judged' twice"),
        (("--set", "probe=lung"), "got lung"),
        (("--set", "mask_ratio=[0.15"), "A recipe is YAML"),
        (("--recipe", "nothing.yaml"), "nothing.yaml"),
    ],
)
def test_the_command_says_what_is_wrong_without_a_traceback(options, message, corpus, tmp_path):
    assert message in failed(command(corpus, tmp_path / "run", tmp_path, *options))


def test_the_command_names_a_damaged_shard(changeable, tmp_path):
    shard = changeable.manifest["shards"][0]["path"]
    damage(changeable.folder / shard)
    assert f"{shard} (changed)" in failed(command(changeable, tmp_path / "run", tmp_path))
    assert not (tmp_path / "run").exists()


def test_the_script_takes_the_options_of_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / "pretrain.py"), run_name="__main__")
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for word in ("CORPUS", "OUT", "--recipe", "--set", "--probe", "--resume", "Exit code 1"):
        assert word.lower() in printed.lower()
