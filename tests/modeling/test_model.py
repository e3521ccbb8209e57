"""The model: equations, invariances, outputs, and what users of Transformers models expect."""

import copy
import importlib.util

import pytest
import torch

from panfoma_hf import PanFoMaForCellClassification, PanFoMaForMaskedExpression, PanFoMaModel
from panfoma_hf.modeling import use_scan_backend
from panfoma_hf.modeling.modeling_panfoma import PanFoMaAttention, bin_context, presence_context
from tests.conftest import pad_batch, random_cells, spread_out, tiny_config
from tests.modeling.naive_panfoma import NaivePanFoMa


TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
HEADS = [PanFoMaModel, PanFoMaForCellClassification, PanFoMaForMaskedExpression]
# The tiny chunk is 8 genes: below, at, one past, and several chunks with a short last one.
LENGTHS = [3, 8, 9, 21]


@pytest.fixture
def model(config) -> PanFoMaModel:
    return spread_out(PanFoMaModel(config))


# -- the equations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("groups", [1, 2], ids=["all_layers_shared", "two_groups"])
def test_model_matches_the_equations_written_a_second_time(length, groups):
    model = spread_out(PanFoMaModel(tiny_config(num_hidden_groups=groups))).double()
    cell = random_cells([length])[0]
    outputs = model(**cell, output_hidden_states=True)
    naive = NaivePanFoMa(model)(cell["input_ids"][0].tolist(), cell["expression_bins"][0].tolist())
    assert naive["pooler_output"].std() > 0.1
    torch.testing.assert_close(outputs.pooler_output[0], naive["pooler_output"])
    torch.testing.assert_close(outputs.last_hidden_state[0], naive["last_hidden_state"])
    torch.testing.assert_close(outputs.gene_scores[0], naive["gene_scores"])
    for states, expected in zip(outputs.hidden_states, naive["hidden_states"], strict=True):
        torch.testing.assert_close(states[0], expected)


def test_encoder_layers_share_one_set_of_parameters_however_many_there_are():
    parameters = [
        sum(p.numel() for p in PanFoMaModel(tiny_config(num_encoder_layers=layers)).encoder.parameters())
        for layers in (1, 6)
    ]
    assert parameters[0] == parameters[1]


@pytest.fixture(params=["reference", "numba", "triton"])
def any_body(request):
    """Each body of the scan that runs on this machine's CPU; Triton's in its interpreter."""
    if request.param == "triton" and (torch.cuda.is_available() or importlib.util.find_spec("triton") is None):
        pytest.skip("Triton's interpreter is for machines without a GPU")
    with use_scan_backend(request.param):
        yield request.param


@pytest.mark.usefixtures("any_body")
def test_every_body_of_the_scan_gives_what_the_equations_say(model):
    cell = random_cells([21])[0]
    naive = NaivePanFoMa(model)(cell["input_ids"][0].tolist(), cell["expression_bins"][0].tolist())
    outputs = model(**cell)
    torch.testing.assert_close(outputs.pooler_output[0].double(), naive["pooler_output"], **TOLERANCE)
    torch.testing.assert_close(outputs.last_hidden_state[0].double(), naive["last_hidden_state"], **TOLERANCE)


# -- invariances ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("any_body")
def test_a_cell_alone_is_the_same_cell_padded_in_a_batch(model):
    cells = random_cells(LENGTHS)
    batched = model(**pad_batch(cells, length=37))
    for row, (cell, length) in enumerate(zip(cells, LENGTHS, strict=True)):
        alone = model(**cell)
        torch.testing.assert_close(batched.pooler_output[row], alone.pooler_output[0], **TOLERANCE)
        torch.testing.assert_close(batched.last_hidden_state[row, :length], alone.last_hidden_state[0], **TOLERANCE)
        torch.testing.assert_close(batched.gene_scores[row, :length], alone.gene_scores[0], **TOLERANCE)
        assert not batched.gene_scores[row, length:].any()


@pytest.mark.usefixtures("any_body")
def test_no_gradient_reaches_a_pad(model):
    batch = pad_batch(random_cells([5, 21]))
    embeds = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    outputs = model(inputs_embeds=embeds, **batch)
    (outputs.pooler_output.sum() + outputs.last_hidden_state[0, :5].sum()).backward()
    assert embeds.grad[0, :5].abs().min() > 0
    assert not embeds.grad[0, 5:].any()


@pytest.mark.usefixtures("any_body")
def test_a_cell_depends_neither_on_its_neighbours_nor_on_the_order_of_the_batch(model):
    cells = random_cells([9, 21, 13])
    strangers = random_cells([21, 5, 30], seed=1)
    there = model(**pad_batch([cells[0], cells[1], cells[2]])).pooler_output
    reversed_batch = model(**pad_batch([cells[2], cells[1], cells[0]])).pooler_output
    among_strangers = model(**pad_batch([strangers[0], cells[0], strangers[2]])).pooler_output
    torch.testing.assert_close(there, reversed_batch.flip(0), **TOLERANCE)
    torch.testing.assert_close(there[0], among_strangers[1], **TOLERANCE)
    assert (there[0] - there[1]).abs().max() > 0.1


def take(cell, order):
    return {key: values[:, order] for key, values in cell.items()}


@pytest.mark.usefixtures("any_body")
def test_genes_within_a_chunk_may_be_permuted(model):
    cell = random_cells([24])[0]
    order = torch.cat([start + torch.randperm(8) for start in (0, 8, 16)])
    outputs, permuted = model(**cell), model(**take(cell, order))
    torch.testing.assert_close(permuted.pooler_output, outputs.pooler_output, **TOLERANCE)
    torch.testing.assert_close(permuted.last_hidden_state, outputs.last_hidden_state[:, order], **TOLERANCE)


@pytest.mark.usefixtures("any_body")
def test_chunks_may_be_permuted(model):
    cell = random_cells([24])[0]
    order = torch.cat([torch.arange(16, 24), torch.arange(0, 8), torch.arange(8, 16)])
    outputs, permuted = model(**cell), model(**take(cell, order))
    torch.testing.assert_close(permuted.pooler_output, outputs.pooler_output, **TOLERANCE)


def test_which_genes_share_a_chunk_does_matter(model):
    cell = random_cells([24])[0]
    mixed = model(**take(cell, torch.arange(24).view(8, 3).T.flatten()))
    assert (mixed.pooler_output - model(**cell).pooler_output).abs().max() > 1e-3


def test_genes_come_back_in_the_input_order(model):
    """With a decoder that adds nothing, unsorting must give each gene its own encoder state."""
    with torch.no_grad():
        for layer in model.decoder_layers:
            layer.forward_mamba.out_proj.weight.zero_()
            layer.backward_mamba.out_proj.weight.zero_()
    batch = pad_batch(random_cells([21, 9]))
    outputs = model(**batch, output_hidden_states=True)
    encoder_states = model.encoder(
        model.embeddings(batch["input_ids"], batch["expression_bins"])[0], batch["attention_mask"].bool()
    )[0]
    torch.testing.assert_close(outputs.last_hidden_state, model.final_norm(encoder_states))
    assert len(outputs.gene_scores[0].unique()) == 21


def test_genes_enter_the_decoder_by_descending_relevance(model):
    seen = []
    model.decoder_layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    cell = random_cells([21])[0]
    scores = model(**cell).gene_scores[0]
    encoded, cls, _, _ = model.encoder(model.embeddings(**cell)[0], torch.ones(1, 21, dtype=torch.bool))
    cell_state = (cls[0] * torch.tensor([[8.0], [8], [5]])).sum(0) / 21
    torch.testing.assert_close((encoded[0] * cell_state).sum(-1), scores, **TOLERANCE)
    torch.testing.assert_close(seen[0][0], encoded[0][scores.argsort(descending=True)], **TOLERANCE)


def test_a_cell_without_genes_gets_a_finite_embedding_and_leaves_its_neighbours_alone(model):
    cells = random_cells([0, 9])
    outputs = model(**pad_batch(cells, length=17))
    assert outputs.pooler_output.isfinite().all()
    torch.testing.assert_close(outputs.pooler_output[1:], model(**cells[1]).pooler_output, **TOLERANCE)
    only_empty = model(**pad_batch(cells[:1], length=1))
    torch.testing.assert_close(only_empty.pooler_output, outputs.pooler_output[:1], **TOLERANCE)


# -- outputs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_hidden_states_are_one_more_than_layers_in_gene_order(head, config):
    model = head(config).eval()
    outputs = model(**pad_batch(random_cells([21, 9])), output_hidden_states=True)
    assert len(outputs.hidden_states) == config.num_hidden_layers + 1 == 5
    assert {tuple(states.shape) for states in outputs.hidden_states} == {(2, 21, config.hidden_size)}
    base = model(**random_cells([21])[0]) if head is PanFoMaModel else None
    if base is not None:
        torch.testing.assert_close(outputs.hidden_states[-1], outputs.last_hidden_state)


@pytest.mark.parametrize("head", HEADS)
def test_tuples_hold_what_the_named_output_holds(head, config):
    model = head(config).eval()
    batch = pad_batch(random_cells([21, 9]))
    named = model(**batch)
    for value, expected in zip(model(**batch, return_dict=False), named.to_tuple(), strict=True):
        torch.testing.assert_close(value, expected)


def test_attentions_are_rows_of_weights_that_ignore_pads(config):
    model = spread_out(PanFoMaModel._from_config(config, attn_implementation="eager"))
    outputs = model(**pad_batch(random_cells([21, 5])), output_attentions=True)
    assert len(outputs.attentions) == config.num_encoder_layers
    attention = outputs.attentions[0]
    assert attention.shape == (2, 3, 4, 9, 9)  # cells, chunks, heads, [CLS] + 8 genes twice
    rows = torch.ones(2, 3, 4, 9)
    rows[:, 2, :, 6:] = 0  # the last chunk has 5 genes
    torch.testing.assert_close(attention.sum(-1), rows)
    assert not attention[1, 0, :, :, 6:].any()


def test_chunks_without_pads_skip_the_mask(config, monkeypatch):
    """Only the last, shorter chunks of this batch hold pads."""
    model = PanFoMaModel._from_config(config, attn_implementation="sdpa").eval()
    masks = []
    attend = PanFoMaAttention.forward

    def spy(self, hidden_states, attention_mask, **kwargs):
        masks.append((hidden_states.shape[1] - 1, attention_mask is None))
        return attend(self, hidden_states, attention_mask, **kwargs)

    monkeypatch.setattr(PanFoMaAttention, "forward", spy)
    model(**pad_batch(random_cells([21, 18])))
    assert set(masks) == {(8, True), (5, False)}


def test_attentions_without_eager_attention_are_an_error(config):
    model = PanFoMaModel._from_config(config, attn_implementation="sdpa")
    with pytest.raises(ValueError, match="eager"):
        model(**random_cells([9])[0], output_attentions=True)


def test_attention_implementations_agree():
    eager = spread_out(PanFoMaModel._from_config(tiny_config(), attn_implementation="eager"))
    sdpa = PanFoMaModel._from_config(tiny_config(), attn_implementation="sdpa").eval()
    sdpa.load_state_dict(eager.state_dict())
    batch = pad_batch(random_cells([21, 5]))
    torch.testing.assert_close(eager(**batch).pooler_output, sdpa(**batch).pooler_output, **TOLERANCE)
    assert (eager.config._attn_implementation, sdpa.config._attn_implementation) == ("eager", "sdpa")


# -- training ------------------------------------------------------------------------------------------------------


def labels_for(head, batch):
    if head is PanFoMaForCellClassification:
        return torch.arange(len(batch["input_ids"])) % 3
    return batch["expression_bins"].clamp(max=50).masked_fill(batch["attention_mask"] == 0, -100)


@pytest.mark.parametrize("head", HEADS[1:])
def test_every_parameter_learns(head, config):
    model = head(config)
    batch = pad_batch(random_cells([21, 9, 5]))
    model(**batch, labels=labels_for(head, batch)).loss.backward()
    silent = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    counted = {"log_bin_frequencies"} if head is PanFoMaForMaskedExpression else set()
    assert silent == counted


@pytest.mark.parametrize("head", HEADS[1:])
def test_training_overfits_one_batch(head, config):
    model = head(config)
    batch = pad_batch(random_cells([21, 9, 5, 14, 3, 8]))
    labels = labels_for(head, batch)
    if head is PanFoMaForMaskedExpression:
        hidden = (labels != -100) & (torch.rand(labels.shape) < 0.3)
        labels = labels.masked_fill(~hidden, -100)
        batch["expression_bins"] = batch["expression_bins"].masked_fill(hidden, config.mask_bin_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = model(**batch, labels=labels).loss.item()
    for _ in range(80):
        optimizer.zero_grad()
        loss = model(**batch, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert loss.item() < 0.05 * first


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(reentrant, config):
    plain = PanFoMaForCellClassification(config).train()
    checkpointed = copy.deepcopy(plain)
    # Transformers renamed it on the way from 5.17.
    name = "activation_checkpointing_enable"
    enable = getattr(checkpointed, name, None) or checkpointed.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    calls = []
    checkpointed.panfoma.decoder_layers[0].norm.register_forward_hook(lambda *_: calls.append(1))
    batch = pad_batch(random_cells([21, 9]))
    for model in (plain, checkpointed):
        model(**batch, labels=torch.tensor([0, 1])).loss.backward()
    assert len(calls) == 2  # once forward, once recomputed
    for (name, p), q in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_masked_expression_reports_three_losses_and_the_cell_loss_sees_no_bin_of_its_gene():
    config = tiny_config(gene_loss_weight=2.0, cell_loss_weight=0.5, presence_loss_weight=0.25)
    model = spread_out(PanFoMaForMaskedExpression(config))
    batch = pad_batch(random_cells([21]))
    labels = labels_for(PanFoMaForMaskedExpression, batch)
    outputs = model(**batch, labels=labels)
    weighted = 2 * outputs.gene_loss + 0.5 * outputs.cell_loss + 0.25 * outputs.presence_loss
    torch.testing.assert_close(outputs.loss, weighted)
    assert outputs.logits.shape == outputs.cell_logits.shape == (1, 21, 51)
    expected = torch.nn.functional.cross_entropy(outputs.cell_logits[0], labels[0])
    torch.testing.assert_close(outputs.cell_loss, expected)
    # From one cell embedding, the same gene id gets the same prediction wherever it stands and whatever its bin.
    gene_ids = model.gene_id_proj(model.get_input_embeddings()(batch["input_ids"]))
    again = model.cell_head(model.cell_proj(outputs.pooler_output)[:, None] + gene_ids)
    context = bin_context(batch["expression_bins"], None, model.log_bin_frequencies)
    torch.testing.assert_close(outputs.cell_logits, again + context[:, None])


def test_the_context_of_a_bin_is_its_share_of_the_unmasked_genes_over_its_share_of_all_genes(config):
    frequencies = torch.rand(51, dtype=torch.float64) + 0.1
    frequencies /= frequencies.sum()
    bins = torch.tensor([[3, 3, 3, 51, 7, 51, 50, 3, 52, 52], [1, 51, 51, 51, 51, 52, 52, 52, 52, 52], [51] * 10])
    mask = torch.tensor([[1] * 7 + [0] * 3, [1] * 5 + [0] * 5, [1] * 10])  # the last 3 of the first cell is no gene
    context = bin_context(bins, mask, frequencies.log())
    seen = [{3: 3, 7: 1, 50: 1}, {1: 1}, {}]
    for row, counts in enumerate(seen):
        total = sum(counts.values()) + 10
        for name in range(51):
            share = (counts.get(name, 0) + 10 * frequencies[name]) / total
            torch.testing.assert_close(context[row, name], (share / frequencies[name]).log())
    assert bin_context(bins, mask, frequencies.log().bfloat16()).dtype == torch.float32


def test_the_context_of_presence_makes_as_many_genes_expected_as_are_expressed():
    """With log odds as they are counted in a corpus: most genes are rare, and some are everywhere."""
    log_odds = torch.linspace(-9.9, 4, 25_000, dtype=torch.float64)
    for number in (1, 30, 500, 3_000, 12_000):
        context = presence_context(log_odds.float(), torch.tensor([number]))
        assert torch.sigmoid(log_odds + context).sum().item() == pytest.approx(number, rel=1e-4)
    # One by itself, and beside others; none at all, and all of them.
    alone, beside = (presence_context(log_odds, torch.tensor(numbers)) for numbers in ([500], [7, 500]))
    torch.testing.assert_close(beside[1:], alone)
    assert presence_context(log_odds, torch.tensor([0, 25_000])).isfinite().all()
    # Where all genes are alike, as in a model that has counted nothing.
    torch.testing.assert_close(presence_context(torch.zeros(100), torch.tensor([20])), torch.tensor([0.2]).logit())


def test_predictions_start_from_what_counting_tells(config):
    """Frequencies of each gene's bins, and what the cell's other bins add: the rest of the model is added to it."""
    model = PanFoMaForMaskedExpression(config).eval()
    for head in (model.gene_head, model.cell_head):
        torch.nn.init.zeros_(head.out_proj.weight)
        torch.nn.init.zeros_(head.out_proj.bias)
    torch.nn.init.normal_(model.bin_priors.weight)
    model.log_bin_frequencies.copy_(torch.randn(51).log_softmax(0))
    batch = pad_batch(random_cells([21, 9]))
    outputs = model(**batch)
    context = bin_context(batch["expression_bins"], batch["attention_mask"], model.log_bin_frequencies)
    expected = model.bin_priors.weight[batch["input_ids"]] + context[:, None]
    torch.testing.assert_close(outputs.logits, expected)
    torch.testing.assert_close(outputs.cell_logits, expected)


def test_what_was_counted_is_saved_and_not_learned(config, tmp_path):
    model = PanFoMaForMaskedExpression(config)
    uniform = torch.full((51,), 1 / 51).log()
    torch.testing.assert_close(model.log_bin_frequencies.detach(), uniform)
    assert not model.log_bin_frequencies.requires_grad
    model.log_bin_frequencies.copy_(torch.randn(51).log_softmax(0))
    model.save_pretrained(tmp_path / "pretrained")
    loaded = PanFoMaForMaskedExpression.from_pretrained(tmp_path / "pretrained")
    torch.testing.assert_close(loaded.log_bin_frequencies, model.log_bin_frequencies)
    # A checkpoint without it counts all bins as equally frequent.
    PanFoMaModel(config).save_pretrained(tmp_path / "body")
    loaded = PanFoMaForMaskedExpression.from_pretrained(tmp_path / "body")
    torch.testing.assert_close(loaded.log_bin_frequencies.detach(), uniform)


def test_without_a_masked_gene_there_are_no_bins_to_lose_on(config):
    batch = pad_batch(random_cells([9]))
    outputs = PanFoMaForMaskedExpression(config)(**batch, labels=torch.full((1, 9), -100))
    assert outputs.gene_loss.item() == outputs.cell_loss.item() == 0
    expected = config.presence_loss_weight * outputs.presence_loss.item()
    assert outputs.loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("withheld", [None, [[3, 119, 0], [5, 0, 0]]])
def test_the_presence_loss_asks_of_every_gene_whether_the_cell_expresses_it(withheld, config):
    """Genes that are shown or withheld are; pads are not, whatever stands where there is no gene."""
    model = spread_out(PanFoMaForMaskedExpression(config))
    torch.nn.init.normal_(model.presence_priors.weight)
    cells = random_cells([9, 6])
    batch = pad_batch(cells)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, :4] = batch["expression_bins"][:, :4]
    batch["input_ids"][1, 6:] = 77  # behind the attention mask
    given = {} if withheld is None else {"withheld_ids": torch.tensor(withheld)}
    outputs = model(**batch, labels=labels, **given)

    genes = model.get_input_embeddings().weight
    total = 0.0
    for row, cell in enumerate(cells):
        expressed = set(cell["input_ids"][0].tolist()) | (set(withheld[row]) - {0} if withheld else set())
        assert 77 not in expressed
        loadings = model.presence_proj(outputs.pooler_output[row])
        context = presence_context(model.presence_priors.weight[:, 0], torch.tensor([len(expressed)]))
        for gene in range(config.vocab_size):
            logit = loadings @ genes[gene] + model.presence_priors.weight[gene, 0] + context[0]
            torch.testing.assert_close(outputs.presence_logits[row, gene], logit, rtol=1e-4, atol=1e-5)
            total -= torch.nn.functional.logsigmoid((logit if gene in expressed else -logit).double()).item()
    # For each labelled gene, as the other losses.
    assert outputs.presence_loss.item() == pytest.approx(total / 8, rel=1e-5)
    halved = model(**batch, labels=labels, **given, num_items_in_batch=torch.tensor(16))
    assert halved.presence_loss.item() == pytest.approx(total / 16, rel=1e-5)


@pytest.mark.parametrize(
    ("problem_type", "labels"),
    [
        ("single_label_classification", torch.tensor([0, 2])),
        ("multi_label_classification", torch.tensor([[0.0, 1, 1], [1, 0, 0]])),
        ("regression", torch.tensor([[0.5, 1, -1], [3, 0, 0.1]])),
    ],
)
def test_loss_follows_the_problem_type(problem_type, labels):
    model = PanFoMaForCellClassification(tiny_config(problem_type=problem_type)).eval()
    outputs = model(**pad_batch(random_cells([9, 5])), labels=labels)
    expected = {
        "single_label_classification": torch.nn.functional.cross_entropy,
        "multi_label_classification": torch.nn.functional.binary_cross_entropy_with_logits,
        "regression": torch.nn.functional.mse_loss,
    }[problem_type](outputs.logits, labels)
    torch.testing.assert_close(outputs.loss, expected)


@pytest.mark.parametrize(
    ("problem_type", "labels"),
    [
        ("single_label_classification", torch.tensor([0, 2])),
        ("multi_label_classification", torch.tensor([[0.0, 1, 1], [1, 0, 0]])),
        ("regression", torch.tensor([[0.5, 1, -1], [3, 0, 0.1]])),
    ],
)
def test_gradient_accumulation_divides_by_the_labels_of_the_whole_step(problem_type, labels):
    model = PanFoMaForCellClassification(tiny_config(problem_type=problem_type)).eval()
    batch = pad_batch(random_cells([9, 5]))
    mean = model(**batch, labels=labels).loss
    whole_step = torch.tensor(4 * labels.numel())
    torch.testing.assert_close(model(**batch, labels=labels, num_items_in_batch=whole_step).loss, mean / 4)


def test_masked_expression_needs_gene_ids(config):
    with pytest.raises(ValueError, match="`input_ids` are needed"):
        PanFoMaForMaskedExpression(config)(inputs_embeds=torch.zeros(1, 9, 32))


# -- dtypes, devices, compilation ------------------------------------------------------------------------------------


def test_mamba_starts_as_mamba_does(config):
    model = PanFoMaModel(config)
    mixer = model.decoder_layers[0].backward_mamba
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).expand(64, -1))
    assert (mixer.D == 1).all()
    steps = torch.nn.functional.softplus(mixer.dt_proj.bias.detach())
    assert 1e-3 * 0.99 <= steps.min() < steps.max() <= 0.1 * 1.01
    assert model.embeddings.gene_embeddings.weight[1:].std().item() == pytest.approx(0.02, rel=0.1)
    other = model.decoder_layers[0].forward_mamba.dt_proj.bias
    assert not torch.equal(other, mixer.dt_proj.bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_keep_mambas_own_parameters_in_float32(dtype, config, tmp_path):
    wide = spread_out(PanFoMaForCellClassification(config))
    wide.save_pretrained(tmp_path)
    narrow = PanFoMaForCellClassification.from_pretrained(tmp_path, dtype=dtype)
    kept = {name for name, p in narrow.named_parameters() if p.dtype == torch.float32}
    assert kept == {n for n, _ in wide.named_parameters() if n.endswith((".A_log", ".D", "dt_proj.bias"))}
    assert narrow.dtype == dtype
    batch = pad_batch(random_cells([9, 5]))
    logits = narrow(**batch).logits
    assert logits.dtype == dtype
    assert (logits.float() - wide(**batch).logits).abs().max() < 0.1 * wide(**batch).logits.abs().max()


def test_bfloat16_autocast_trains(config):
    model = PanFoMaForCellClassification(config)
    batch = pad_batch(random_cells([21, 9]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch, labels=torch.tensor([0, 1])).loss
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of its own deprecations
@pytest.mark.parametrize(
    ("head", "backend"),
    [
        pytest.param(PanFoMaForMaskedExpression, "aot_eager", marks=pytest.mark.slow),
        (PanFoMaForCellClassification, "eager"),
        pytest.param(PanFoMaForCellClassification, "aot_eager", marks=pytest.mark.slow),
        pytest.param(PanFoMaForCellClassification, "inductor", marks=pytest.mark.slow),
    ],
)
def test_compiled_model_gives_the_same_output_and_gradients(head, backend, config):
    model = spread_out(head(config))
    compiled = torch.compile(copy.deepcopy(model), backend=backend, fullgraph=True, dynamic=True)
    for lengths in ([21, 9], [5, 14]):
        batch = pad_batch(random_cells(lengths))
        labels = labels_for(head, batch)
        expected, got = model(**batch, labels=labels), compiled(**batch, labels=labels)
        torch.testing.assert_close(got.logits, expected.logits, **TOLERANCE)
        expected.loss.backward()
        got.loss.backward()
        for p, q in zip(model.parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["reference", "triton", "mamba_ssm"])
def test_a_cell_alone_is_the_same_in_a_batch_on_a_gpu_and_on_the_cpu(backend, model):
    if backend != "reference":
        pytest.importorskip(backend)
    cells = random_cells(LENGTHS)
    expected = [model(**cell).pooler_output[0] for cell in cells]
    model = model.cuda()
    with use_scan_backend(backend):
        batched = model(**{name: tensor.cuda() for name, tensor in pad_batch(cells, length=37).items()}).pooler_output
        for row, cell in enumerate(cells):
            alone = model(**{name: tensor.cuda() for name, tensor in cell.items()}).pooler_output[0]
            torch.testing.assert_close(batched[row], alone, **TOLERANCE)
            torch.testing.assert_close(alone.cpu(), expected[row], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}], ids=["auto", "cpu"])
def test_device_map_places_the_model(device_map, config, tmp_path):
    model = spread_out(PanFoMaForCellClassification(config))
    model.save_pretrained(tmp_path)
    placed = PanFoMaForCellClassification.from_pretrained(tmp_path, device_map=device_map)
    batch = pad_batch(random_cells([21, 9]))
    torch.testing.assert_close(placed(**batch).logits.cpu(), model(**batch).logits, **TOLERANCE)


def test_layers_offloaded_to_disk_give_the_same_logits(config, tmp_path):
    model = spread_out(PanFoMaForCellClassification(config))
    model.save_pretrained(tmp_path / "model")
    device_map = {
        "panfoma.embeddings": "cpu",
        "panfoma.encoder": "cpu",
        "panfoma.decoder_layers.0": "disk",
        "panfoma.decoder_layers.1": "cpu",
        "panfoma.final_norm": "cpu",
        "panfoma.pooler": "disk",
        "classifier": "cpu",
    }
    offloaded = PanFoMaForCellClassification.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    batch = pad_batch(random_cells([21, 9]))
    torch.testing.assert_close(offloaded(**batch).logits, model(**batch).logits, **TOLERANCE)


# Accelerate needs a place for a weight that is in no module, and warns that it is no module.
@pytest.mark.filterwarnings("ignore:The following device_map keys do not match:UserWarning")
def test_priors_offloaded_to_disk_give_the_same_logits(config, tmp_path):
    model = spread_out(PanFoMaForMaskedExpression(config))
    model.save_pretrained(tmp_path / "model")
    device_map = dict.fromkeys((name for name, _ in model.named_children()), "cpu")
    device_map |= {"bin_priors": "disk", "presence_priors": "disk", "log_bin_frequencies": "cpu"}
    offloaded = PanFoMaForMaskedExpression.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    batch = pad_batch(random_cells([21, 9]))
    for name in ("logits", "cell_logits", "presence_logits"):
        torch.testing.assert_close(offloaded(**batch)[name], model(**batch)[name], **TOLERANCE)


@pytest.mark.parametrize("head", HEADS)
def test_token_embeddings_can_be_resized(head, config):
    model = head(config).eval()
    batch = pad_batch(random_cells([9]))
    before = model(**batch)[0] if head is PanFoMaModel else model(**batch).logits
    model.resize_token_embeddings(130)
    assert model.config.vocab_size == 130
    assert model.get_input_embeddings().weight.shape == (130, 32)
    after = model(**batch)[0] if head is PanFoMaModel else model(**batch).logits
    torch.testing.assert_close(after, before)
    if head is PanFoMaForMaskedExpression:
        assert model.bin_priors.weight.shape == (130, 51)
        assert model.presence_priors.weight.shape == (130, 1)
        assert model(**batch).presence_logits.shape == (1, 130)
    batch["input_ids"][0, 0] = 129
    assert (model(**batch)[0] if head is PanFoMaModel else model(**batch).logits).isfinite().all()


def test_evaluation_is_deterministic_and_training_drops_out():
    model = PanFoMaModel(tiny_config(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2))
    cell = random_cells([21])[0]
    model.eval()
    assert torch.equal(model(**cell).pooler_output, model(**cell).pooler_output)
    model.train()
    assert not torch.equal(model(**cell).pooler_output, model(**cell).pooler_output)


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda b: b.pop("expression_bins"), "`expression_bins` must come with", id="no_bins"),
        pytest.param(lambda b: b.pop("input_ids"), "Exactly one of `input_ids`", id="no_ids"),
        pytest.param(lambda b: b.update(inputs_embeds=torch.zeros(2, 9, 32)), "got both", id="ids_and_embeds"),
        pytest.param(
            lambda b: b.update(attention_mask=torch.ones(2, 8)), "`attention_mask` must have the shape", id="short_mask"
        ),
        pytest.param(
            lambda b: b.update({k: v[0] for k, v in b.items()}), r"Inputs must be \(batch, seq\)", id="no_batch"
        ),
    ],
)
def test_inputs_that_do_not_fit_are_errors(change, message, model):
    batch = pad_batch(random_cells([9, 5]))
    change(batch)
    with pytest.raises(ValueError, match=message):
        model(**batch)
