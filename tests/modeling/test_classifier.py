"""The classifier: logits of genes, several tasks, and what the configuration says of both."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from panfoma_hf import DataCollatorForCells, PanFoMaConfig, PanFoMaForCellClassification, cell_dataset
from panfoma_hf.modeling.modeling_panfoma import multi_task_cross_entropy
from panfoma_hf.tokenization import CellTokens
from panfoma_hf.training import PanFoMaTrainer, WeightedCrossEntropy
from tests.conftest import pad_batch, random_cells, spread_out, tiny_config


TASKS = {"cell_type": ["B cell", "T cell", "mast"], "state": ["active", "resting"]}
EXACT = {"rtol": 1e-6, "atol": 1e-6}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def with_gene_logits(**overrides) -> PanFoMaForCellClassification:
    model = spread_out(PanFoMaForCellClassification(tiny_config(use_gene_logits=True, **overrides)))
    torch.nn.init.normal_(model.gene_logits.weight)
    return model


def without(model: PanFoMaForCellClassification) -> PanFoMaForCellClassification:
    """The same network alone."""
    alone = copy.deepcopy(model)
    alone.config.use_gene_logits = False
    return alone


def sums(model, batch) -> np.ndarray:
    """(cells, labels), what genes add, gene by gene."""
    weight = model.gene_logits.weight.detach().double().numpy()
    found = np.zeros((len(batch["input_ids"]), model.num_labels))
    for cell in range(len(found)):
        for gene, amount, is_there in zip(
            *(batch[key][cell].tolist() for key in ("input_ids", "expression_bins", "attention_mask")), strict=True
        ):
            if is_there and amount <= 50:
                found[cell] += amount / 50 * weight[gene]
    return found


# -- logits of genes -----------------------------------------------------------------------------------------------


def test_logits_are_the_networks_plus_a_sum_over_genes():
    model = with_gene_logits()
    batch = pad_batch(random_cells([0, 1, 9, 21]), length=30)
    batch["expression_bins"][3, :5] = model.config.mask_bin_id
    batch["expression_bins"][2, :3] = 0
    added = sums(model, batch)
    assert not added[0].any()
    assert np.abs(added[2:]).min() > 1e-3
    network = without(model)(**batch).logits
    torch.testing.assert_close(
        model(**batch).logits.double(), network.double() + torch.tensor(added), rtol=1e-6, atol=5e-6
    )


def test_cells_without_any_gene_have_the_networks_logits():
    model = with_gene_logits()
    empty = {
        "input_ids": torch.zeros(2, 0, dtype=torch.long),
        "expression_bins": torch.zeros(2, 0, dtype=torch.long),
    }
    torch.testing.assert_close(model(**empty).logits, without(model)(**empty).logits)


def test_without_a_mask_pads_add_nothing():
    model = with_gene_logits()
    (cell,) = random_cells([9])
    padded = {
        "input_ids": F.pad(cell["input_ids"], (0, 7), value=model.config.pad_token_id),
        "expression_bins": F.pad(cell["expression_bins"], (0, 7), value=model.config.pad_bin_id),
    }
    added = model(**padded).logits - without(model)(**padded).logits
    torch.testing.assert_close(added, model(**cell).logits - without(model)(**cell).logits, **CLOSE)


def test_neither_padding_nor_neighbours_nor_the_order_of_genes_matter():
    model = with_gene_logits()
    cells = random_cells([5, 8, 21])
    batched = model(**pad_batch(cells, length=37)).logits
    for row, cell in enumerate(cells):
        torch.testing.assert_close(batched[row], model(**cell).logits[0], **CLOSE)
    torch.testing.assert_close(model(**pad_batch(cells[::-1])).logits.flip(0), batched, **CLOSE)
    order = torch.randperm(8)  # within one chunk, beyond which the network reads genes otherwise
    permuted = {key: values[:, order] for key, values in cells[1].items()}
    torch.testing.assert_close(model(**permuted).logits[0], batched[1], **CLOSE)


def test_a_fresh_model_has_the_logits_of_one_without():
    torch.manual_seed(1)
    plain = PanFoMaForCellClassification(tiny_config()).eval()
    torch.manual_seed(1)
    fresh = PanFoMaForCellClassification(tiny_config(use_gene_logits=True)).eval()
    assert not fresh.gene_logits.weight.any()
    fresh.load_state_dict(plain.state_dict(), strict=False)
    batch = pad_batch(random_cells([9, 21]))
    torch.testing.assert_close(fresh(**batch).logits, plain(**batch).logits, rtol=0, atol=0)


def test_they_are_saved_and_loaded_and_start_at_zero_in_a_checkpoint_without(tmp_path):
    model = with_gene_logits()
    batch = pad_batch(random_cells([9, 21]))
    model.save_pretrained(tmp_path / "with")
    loaded, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "with", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    torch.testing.assert_close(loaded.eval()(**batch).logits, model(**batch).logits)
    alone = without(model)
    del alone.gene_logits
    alone.save_pretrained(tmp_path / "without")
    started = AutoModelForSequenceClassification.from_pretrained(tmp_path / "without", use_gene_logits=True)
    torch.testing.assert_close(started.eval()(**batch).logits, alone(**batch).logits)


@pytest.mark.parametrize("size", [150, 100])
def test_resizing_keeps_genes_logits_and_gives_new_ones_none(size, tmp_path):
    model = with_gene_logits()
    before = model.gene_logits.weight.detach().clone()
    model.gene_logits.requires_grad_(False)
    model.resize_token_embeddings(size)
    kept = min(size, 120)
    assert model.gene_logits.weight.shape == (size, 3)
    torch.testing.assert_close(model.gene_logits.weight[:kept], before[:kept])
    assert not model.gene_logits.weight[kept:].any()
    assert not model.gene_logits.weight.requires_grad
    batch = {key: values.clamp(max=99) for key, values in pad_batch(random_cells([9, 21])).items()}
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)


def test_embeddings_in_place_of_gene_ids_are_an_error():
    model = with_gene_logits()
    batch = pad_batch(random_cells([9]))
    embeds = model.get_input_embeddings()(batch.pop("input_ids"))
    assert without(model)(inputs_embeds=embeds, **batch).logits.shape == (1, 3)
    with pytest.raises(ValueError, match=r"`input_ids` are needed.*got None.*Pass"):
        model(inputs_embeds=embeds, **batch)


def test_they_learn_and_run_in_bfloat16():
    model = with_gene_logits().train()
    batch = pad_batch(random_cells([9, 21]))
    model(**batch, labels=torch.tensor([0, 2])).loss.backward()
    seen = set(batch["input_ids"][batch["attention_mask"].bool()].tolist())
    assert set(model.gene_logits.weight.grad.abs().sum(1).nonzero()[:, 0].tolist()) <= seen
    half = copy.deepcopy(model).to(torch.bfloat16).eval()
    assert half(**batch).logits.isfinite().all()


# -- several tasks -------------------------------------------------------------------------------------------------


def plain_loss(logits, labels, weights, smoothing):
    """The loss of `multi_task_cross_entropy`, label by label."""
    total, known, start = 0.0, 0, 0
    for task, names in enumerate(TASKS.values()):
        stop = start + len(names)
        for cell, label in enumerate(labels[:, task].tolist()):
            if label == -100:
                continue
            log_probabilities = torch.log_softmax(logits[cell, start:stop].double(), 0)
            weight = weights[start:stop].double()
            total -= (1 - smoothing) * weight[label] * log_probabilities[label]
            total -= smoothing / len(names) * (weight * log_probabilities).sum()
            known += 1
        start = stop
    return total / known


LABELS = torch.tensor([[0, 1], [2, -100], [-100, 0], [1, 1]])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 1.0, 2.0, 3.0, 0.25])], ids=["equal", "weighted"])
def test_the_loss_is_over_the_labels_that_are_known(weights, smoothing):
    logits = torch.randn(4, 5) * 3
    expected = plain_loss(logits, LABELS, torch.ones(5) if weights is None else weights, smoothing).float()
    found = multi_task_cross_entropy(logits, LABELS, TASKS, weights=weights, label_smoothing=smoothing)
    torch.testing.assert_close(found, expected, **EXACT)
    loss = WeightedCrossEntropy(weights, smoothing, TASKS)
    torch.testing.assert_close(loss({"logits": logits}, LABELS), expected, **EXACT)
    # Of a step of 12 known labels this batch has 6.
    torch.testing.assert_close(loss({"logits": logits}, LABELS, torch.tensor(12)), expected / 2, **EXACT)


def test_a_missing_label_has_no_gradient_and_a_batch_without_any_no_loss():
    logits = torch.randn(4, 5, requires_grad=True)
    multi_task_cross_entropy(logits, LABELS, TASKS).backward()
    assert not logits.grad[1, 3:].any()
    assert not logits.grad[2, :3].any()
    assert logits.grad[0].abs().min() > 0
    assert multi_task_cross_entropy(logits, torch.full((4, 2), -100), TASKS) == 0


def test_a_model_of_several_tasks_says_so_and_gives_their_loss(tmp_path):
    model = spread_out(PanFoMaForCellClassification(tiny_config(label_tasks=TASKS)))
    assert model.config.num_labels == 5
    assert model.config.id2label[3] == "state: active"
    batch = pad_batch(random_cells([9, 21, 5, 3]))
    found = model(**batch, labels=LABELS)
    torch.testing.assert_close(found.loss, multi_task_cross_entropy(found.logits, LABELS, TASKS))
    half = model(**batch, labels=LABELS, num_items_in_batch=torch.tensor(12)).loss
    torch.testing.assert_close(half, found.loss / 2)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert loaded.config.tasks == TASKS
    torch.testing.assert_close(loaded(**batch).logits, found.logits)


@pytest.mark.parametrize("tasks", [{}, {"cell_type": []}])
def test_tasks_without_labels_are_an_error(tasks):
    with pytest.raises(ValueError, match="`label_tasks` needs at least one task"):
        PanFoMaConfig(label_tasks=tasks)


def small_dataset(labels) -> tuple:
    cells = random_cells([9, 21, 5, 3])
    lengths = [cell["input_ids"].shape[1] for cell in cells]
    tokens = CellTokens(
        np.concatenate([cell["input_ids"][0] for cell in cells]).astype(np.int32),
        np.concatenate([cell["expression_bins"][0] for cell in cells]).astype(np.uint8),
        np.cumsum([0, *lengths]),
    )
    return cell_dataset(tokens, labels, has_tasks=True)


def test_a_users_plain_trainer_learns_several_tasks(tokenizer, tmp_path):
    model = PanFoMaForCellClassification(tiny_config(label_tasks=TASKS, use_gene_logits=True))
    before = model.classifier.weight.detach().clone()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=tmp_path,
            max_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=small_dataset(LABELS.numpy()),
        eval_dataset=small_dataset(LABELS.numpy()),
        data_collator=DataCollatorForCells(tokenizer),
    )
    assert trainer.train().training_loss > 0
    assert not torch.equal(model.classifier.weight, before)
    assert np.isfinite(trainer.evaluate()["eval_loss"])


def test_labels_of_tasks_that_make_no_sense_are_an_error():
    with pytest.raises(ValueError, match="got 1 cells without any and 0 other"):
        small_dataset(np.array([[0, 1], [-100, -100], [0, 0], [0, 0]]))
    with pytest.raises(ValueError, match="0 cells without any and 1 other"):
        small_dataset(np.array([[0, 1], [-1, 0], [0, 0], [0, 0]]))
    with pytest.raises(ValueError, match="Labels of several tasks are integers"):
        small_dataset(np.array([[0, 1.0], [1, 0], [0, 0], [0, 0]]))


# -- label smoothing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 2.0, 1.0])], ids=["equal", "weighted"])
def test_label_smoothing_is_torchs(weights, tmp_path):
    model = spread_out(PanFoMaForCellClassification(tiny_config()))
    args = TrainingArguments(output_dir=tmp_path, report_to="none", label_smoothing_factor=0.2)
    trainer = PanFoMaTrainer(model=model, args=args, class_weights=weights)
    batch = pad_batch(random_cells([9, 21, 5, 3]))
    labels = torch.tensor([0, 2, 1, 1])
    expected = F.cross_entropy(model(**batch).logits, labels, weights, reduction="sum", label_smoothing=0.2) / 4
    torch.testing.assert_close(trainer.compute_loss(model, {**batch, "labels": labels}), expected)


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 1.0, 2.0, 3.0, 0.25])], ids=["equal", "weighted"])
def test_label_smoothing_of_several_tasks_is_within_each(weights, tmp_path):
    model = spread_out(PanFoMaForCellClassification(tiny_config(label_tasks=TASKS)))
    args = TrainingArguments(output_dir=tmp_path, report_to="none", label_smoothing_factor=0.2)
    trainer = PanFoMaTrainer(model=model, args=args, class_weights=weights, tasks=TASKS)
    batch = pad_batch(random_cells([9, 21, 5, 3]))
    expected = plain_loss(model(**batch).logits, LABELS, torch.ones(5) if weights is None else weights, 0.2).float()
    torch.testing.assert_close(trainer.compute_loss(model, {**batch, "labels": LABELS}), expected, **CLOSE)
