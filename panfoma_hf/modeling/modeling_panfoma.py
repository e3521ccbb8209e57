# Copyright 2026 The PanFoMa-HF authors. Licensed under the Apache License, Version 2.0.
"""PanFoMa: a shared-weight Transformer over chunks of genes, then a bidirectional Mamba over sorted genes.

Source: Huang et al., "PanFoMa: A Lightweight Foundation Model and Benchmark for Pan-Cancer", AAAI 2026,
arXiv 2512.03111. The file follows the paper's order: embeddings, local-context encoder, global cell state and
dynamic sorting, global decoder, model, heads. "Paper" marks what the paper states; "ours" what it leaves open.

Shape words: batch, seq (genes of a cell), chunk (genes of a chunk), hidden; a cell is one sequence and a token is
one gene with its expression bin.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations import use_kernelized_func
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_panfoma import PanFoMaConfig
from .selective_scan import ScanInputs, bidirectional_scan_fn, causal_conv1d_fn, hub_selective_scan


# ----------------------------------------------------------------------------------------------------------------------
# Outputs
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class PanFoMaModelOutput(ModelOutput):
    """Output of `PanFoMaModel`; every sequence is in the input's gene order.

    Parameters
    ----------
    last_hidden_state
        (batch, seq, hidden), contextual gene embeddings; values at pads mean nothing.
    pooler_output
        (batch, hidden), the cell embedding.
    gene_scores
        (batch, seq) float32, relevance of each gene to the global cell state; 0 at pads.
    hidden_states
        One (batch, seq, hidden) for the embeddings and one after each layer.
    attentions
        One (batch, chunks, heads, chunk + 1, chunk + 1) for each encoder layer; position 0 is [CLS]. Where the last
        of several chunks is shorter, its missing rows and columns are 0.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    gene_scores: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class PanFoMaMaskedExpressionOutput(ModelOutput):
    """Output of `PanFoMaForMaskedExpression`.

    Parameters
    ----------
    loss
        Scalar, the weighted sum of the three losses.
    logits
        (batch, seq, bins + 1), prediction of each gene's bin from its contextual state.
    cell_logits
        (batch, seq, bins + 1), the same from the cell embedding and the gene's id alone.
    presence_logits
        (batch, vocab), log odds that the cell expresses each gene, from the cell embedding.
    gene_loss, cell_loss
        Scalars, cross-entropy of either prediction of bins over the labelled genes.
    presence_loss
        Scalar, binary cross-entropy of ``presence_logits`` summed over the vocabulary, for each labelled gene.
    pooler_output
        (batch, hidden), the cell embedding.
    hidden_states, attentions
        As in `PanFoMaModelOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cell_logits: Tensor | None = None
    presence_logits: Tensor | None = None
    gene_loss: Tensor | None = None
    cell_loss: Tensor | None = None
    presence_loss: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class PanFoMaClassifierOutput(ModelOutput):
    """Output of `PanFoMaForCellClassification`.

    Parameters
    ----------
    loss
        Scalar, where labels were given.
    logits
        (batch, labels); of several tasks, side by side.
    pooler_output
        (batch, hidden), the cell embedding.
    hidden_states, attentions
        As in `PanFoMaModelOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


# ----------------------------------------------------------------------------------------------------------------------
# Dtypes, chunks and orders
# ----------------------------------------------------------------------------------------------------------------------


def at_least_float32(tensor: Tensor) -> Tensor:
    """Float16 and bfloat16 to float32; float64 as it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def split_into_chunks(sequence: Tensor, chunk_size: int) -> Tensor:
    """Cut at multiples of ``chunk_size`` from the start, so that padding moves no gene to another chunk.

    Parameters
    ----------
    sequence
        (batch, seq, ...).
    chunk_size
        Genes per chunk; the last chunk is filled with zeros, a single one is left at its length.

    Returns
    -------
    (batch, chunks, chunk, ...)
    """
    batch, seq = sequence.shape[:2]
    chunks = max(1, -(-seq // chunk_size))
    length = chunk_size if chunks > 1 else seq
    missing = chunks * length - seq
    if missing:
        filler = sequence.new_zeros(batch, missing, *sequence.shape[2:])
        sequence = torch.cat([sequence, filler], dim=1)
    return sequence.reshape(batch, chunks, length, *sequence.shape[2:])


def reorder(sequence: Tensor, order: Tensor) -> Tensor:
    """Take (batch, seq, hidden) in the order of positions (batch, seq)."""
    return sequence.gather(1, order[..., None].to(sequence.device).expand_as(sequence))


# ----------------------------------------------------------------------------------------------------------------------
# Embeddings
# ----------------------------------------------------------------------------------------------------------------------


class PanFoMaEmbeddings(nn.Module):
    """Sum of a gene's id embedding and its expression bin's embedding, without positions (paper)."""

    def __init__(self, config: PanFoMaConfig):
        super().__init__()
        self.gene_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.bin_embeddings = nn.Embedding(config.num_bin_ids, config.hidden_size, padding_idx=config.pad_bin_id)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, input_ids: Tensor | None, expression_bins: Tensor | None, inputs_embeds: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The sum, and the genes' part of it; (batch, seq, hidden) each."""
        genes = self.gene_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        total = genes if expression_bins is None else genes + self.bin_embeddings(expression_bins)
        return self.dropout(total), genes


# ----------------------------------------------------------------------------------------------------------------------
# Local-context encoder
# ----------------------------------------------------------------------------------------------------------------------


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Attention in plain operators, for `attn_implementation="eager"` and to read attention weights."""
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class PanFoMaAttention(nn.Module):
    """Multi-head self-attention among the genes of one chunk, through the Transformers attention interface."""

    def __init__(self, config: PanFoMaConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs) -> tuple[Tensor, Tensor | None]:
        chunks, seq, hidden = hidden_states.shape
        qkv = self.qkv_proj(hidden_states).view(chunks, seq, 3, self.config.num_attention_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_probs_dropout_prob if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.out_proj(output.reshape(chunks, seq, hidden)), weights


class PanFoMaEncoderLayer(GradientCheckpointingLayer):
    """Pre-norm Transformer block with a GELU MLP (ours; the paper says "Transformer encoder")."""

    def __init__(self, config: PanFoMaConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = PanFoMaAttention(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp_up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = ACT2FN[config.hidden_act]
        self.mlp_down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs) -> tuple[Tensor, Tensor | None]:
        attended, weights = self.attention(self.attention_norm(hidden_states), attention_mask, **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        mlp = self.mlp_down_proj(self.act(self.mlp_up_proj(self.mlp_norm(hidden_states))))
        return hidden_states + self.dropout(mlp), weights


# Chunks of about so many genes go through the encoder's layers together on a CPU: larger tensors leave the cache, and
# the system's allocator clears their memory anew for every operator (docs/log.md).
CPU_TOKENS = 4096


class PanFoMaEncoder(nn.Module):
    """One encoder for all chunks, its layers sharing parameters within each group (paper: one group).

    Every chunk is led by the same learnable [CLS] vector (ours), so any number of chunks works.
    """

    def __init__(self, config: PanFoMaConfig):
        super().__init__()
        self.config = config
        self.cls_token = nn.Parameter(torch.empty(config.hidden_size))
        self.layer_groups = nn.ModuleList(PanFoMaEncoderLayer(config) for _ in range(config.num_hidden_groups))
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        embeddings: Tensor,
        attention_mask: Tensor,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        **kwargs,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Encode each chunk by itself.

        Returns
        -------
        Gene states (batch, seq, hidden); [CLS] states (batch, chunks, hidden); the gene states after each layer and
        the attentions of each layer where asked for.
        """
        seq, size = embeddings.shape[1], self.config.chunk_size
        # Whole chunks together, and the rest at its own length: it is not filled up, and its pads mask nothing else.
        whole = seq // size * size
        bounds = [(start, stop) for start, stop in ((0, whole), (whole, seq)) if stop > start] or [(0, 0)]
        parts = [
            self._encode_chunks(
                embeddings[:, start:stop].unflatten(1, (max(1, (stop - start) // size), -1)),
                attention_mask[:, start:stop],
                output_hidden_states,
                output_attentions,
                **kwargs,
            )
            for start, stop in bounds
        ]
        if len(parts) == 1:
            return parts[0]
        genes, cls_states, hidden_states, attentions = zip(*parts, strict=True)
        missing = size - (seq - whole)
        return (
            torch.cat(genes, dim=1),
            torch.cat(cls_states, dim=1),
            tuple(torch.cat(states, dim=1) for states in zip(*hidden_states, strict=True)),
            tuple(
                torch.cat([full, F.pad(rest, (0, missing, 0, missing))], dim=1)
                for full, rest in zip(*attentions, strict=True)
            ),
        )

    def _encode_chunks(self, chunks, attention_mask, output_hidden_states, output_attentions, **kwargs):
        """`forward` for chunks (batch, chunks, chunk, hidden) of one length."""
        batch, num_chunks, size, hidden = chunks.shape
        cls = self.cls_token.to(chunks.dtype).expand(batch, num_chunks, 1, hidden)
        # Chunks fold into the batch: the one encoder reads them all in parallel.
        hidden_states = torch.cat([cls, chunks], dim=2).flatten(0, 1)
        attention_mask = F.pad(attention_mask.reshape(batch * num_chunks, size), (1, 0), value=True)
        at_once = len(hidden_states)
        if hidden_states.device.type == "cpu" and not torch.compiler.is_compiling():
            at_once = max(1, CPU_TOKENS // (size + 1))
        pieces = [
            self._encode_sequences(
                hidden_states[start : start + at_once],
                attention_mask[start : start + at_once],
                output_hidden_states,
                output_attentions,
                **kwargs,
            )
            for start in range(0, len(hidden_states), at_once)
        ]
        final, all_hidden_states, all_attentions = pieces[0]
        if len(pieces) > 1:
            final = torch.cat([piece[0] for piece in pieces])
            all_hidden_states, all_attentions = (
                tuple(torch.cat(layer) for layer in zip(*(piece[index] for piece in pieces), strict=True))
                for index in (1, 2)
            )

        def genes(states: Tensor) -> Tensor:
            return states.unflatten(0, (batch, num_chunks))[:, :, 1:].flatten(1, 2)

        return (
            genes(final),
            final.unflatten(0, (batch, num_chunks))[:, :, 0],
            tuple(genes(states) for states in all_hidden_states),
            tuple(weights.unflatten(0, (batch, num_chunks)) for weights in all_attentions),
        )

    def _encode_sequences(self, hidden_states, attention_mask, output_hidden_states, output_attentions, **kwargs):
        """The layers, for sequences (chunks, 1 + chunk, hidden): final states, and those and attentions of layers."""
        # None where there are no pads: attention is faster without a mask.
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask)
        all_hidden_states, all_attentions = (), ()
        layers_per_group = self.config.num_encoder_layers // self.config.num_hidden_groups
        for index in range(self.config.num_encoder_layers):
            layer = self.layer_groups[index // layers_per_group]
            hidden_states, weights = layer(hidden_states, mask, **kwargs)
            if output_hidden_states:
                all_hidden_states += (hidden_states,)
            if output_attentions:
                all_attentions += (weights,)
        return self.final_norm(hidden_states), all_hidden_states, all_attentions


# ----------------------------------------------------------------------------------------------------------------------
# Global cell state and dynamic sorting
# ----------------------------------------------------------------------------------------------------------------------


def global_cell_state(cls_states: Tensor, attention_mask: Tensor, chunk_size: int) -> Tensor:
    """Mean of the chunks' [CLS] states (paper), weighted by each chunk's number of real genes (ours).

    Parameters
    ----------
    cls_states
        (batch, chunks, hidden).
    attention_mask
        (batch, seq), true at real genes.

    Returns
    -------
    (batch, hidden). A cell without genes takes the [CLS] state of its first, empty chunk.
    """
    weights = split_into_chunks(attention_mask, chunk_size).sum(-1)
    empty = weights.sum(-1, keepdim=True) == 0
    weights = torch.cat([weights[:, :1] + empty, weights[:, 1:]], dim=1).to(cls_states.dtype)
    return (cls_states * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)


def relevance_order(gene_states: Tensor, cell_state: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Score genes by ``s_i = h_i . h_global`` and sort them, highest first, stably, pads last (paper).

    Returns
    -------
    Scores (batch, seq) in float32, 0 at pads; positions (batch, seq) in the sorted order. The order has no gradient.
    """
    scores = (at_least_float32(gene_states) * at_least_float32(cell_state)[:, None]).sum(-1)
    order = scores.detach().masked_fill(~attention_mask, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    return scores.masked_fill(~attention_mask, 0.0), order


# ----------------------------------------------------------------------------------------------------------------------
# Global decoder
# ----------------------------------------------------------------------------------------------------------------------


class PanFoMaTimeStepProjection(nn.Module):
    """Mamba's step-size projection: returns its bias apart, in float32, for the scan to add.

    Not an `nn.Linear`, as whatever replaces those (adapters, quantisation) expects a tensor back.
    """

    def __init__(self, rank: int, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, rank))
        # Small steps need float32 whatever the model's dtype is.
        self.bias = nn.Parameter(torch.empty(channels, dtype=torch.float32))

    def forward(self, time_step: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(time_step, self.weight), at_least_float32(self.bias)


class PanFoMaCausalConv1d(nn.Conv1d):
    """Mamba's short convolution of each channel by itself, with its activation; the parameters are `nn.Conv1d`'s."""

    def __init__(self, channels: int, width: int, bias: bool, reverse: bool):
        super().__init__(channels, channels, kernel_size=width, groups=channels, bias=bias)
        self.reverse = reverse

    def forward(self, inputs: Tensor, lengths: Tensor | None) -> Tensor:
        """(batch, seq, channels) to (batch, seq, channels); a position sees itself and those read before it."""
        outputs = causal_conv1d_fn(
            inputs.transpose(1, 2), self.weight.squeeze(1), self.bias, "silu", lengths=lengths, reverse=self.reverse
        )
        return outputs.transpose(1, 2)


class PanFoMaMambaMixer(nn.Module):
    """One direction of Mamba (S6), with the parameter names of Transformers' Mamba.

    It prepares a scan; `PanFoMaDecoderLayer` runs those of both directions at once, and then `out_proj`.

    Source: Gu and Dao, arXiv 2312.00752, figure 3 and algorithm 2.
    """

    def __init__(self, config: PanFoMaConfig, reverse: bool):
        super().__init__()
        self.config = config
        channels, states = config.mamba_intermediate_size, config.state_size
        self.in_proj = nn.Linear(config.hidden_size, 2 * channels, bias=config.use_bias)
        self.conv1d = PanFoMaCausalConv1d(channels, config.conv_kernel, config.use_conv_bias, reverse)
        self.x_proj = nn.Linear(channels, config.time_step_rank + 2 * states, bias=False)
        self.dt_proj = PanFoMaTimeStepProjection(config.time_step_rank, channels)
        self.A_log = nn.Parameter(torch.empty(channels, states, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(channels, dtype=torch.float32))
        self.out_proj = nn.Linear(channels, config.hidden_size, bias=config.use_bias)

    @torch.no_grad()
    def init_mamba_weights(self):
        """Mamba's own initialisation: A by S4D-real, steps log-uniform between time_step_min and time_step_max."""
        config, channels = self.config, self.config.mamba_intermediate_size
        A = torch.arange(1, config.state_size + 1, dtype=torch.float32, device=self.A_log.device)
        init.copy_(self.A_log, A.log().expand(channels, -1))
        init.ones_(self.D)
        init.kaiming_uniform_(self.conv1d.weight, a=math.sqrt(5))
        bound = config.time_step_rank**-0.5 * config.time_step_scale
        init.uniform_(self.dt_proj.weight, -bound, bound)
        low, high = math.log(config.time_step_min), math.log(config.time_step_max)
        uniform = torch.rand(channels, dtype=torch.float32, device=self.dt_proj.bias.device)
        steps = (uniform * (high - low) + low).exp().clamp(min=config.time_step_floor)
        init.copy_(self.dt_proj.bias, steps + torch.log(-torch.expm1(-steps)))  # inverse of softplus

    def forward(self, hidden_states: Tensor, lengths: Tensor | None) -> ScanInputs:
        """What the scan reads, from (batch, seq, hidden) of which the first ``lengths`` (batch,) genes are real."""
        inputs, gate = self.in_proj(hidden_states).chunk(2, dim=-1)
        inputs = self.conv1d(inputs, lengths)
        rank, states = self.config.time_step_rank, self.config.state_size
        time_step, B, C = self.x_proj(inputs).split([rank, states, states], dim=-1)
        delta, delta_bias = self.dt_proj(time_step)
        return ScanInputs(
            u=inputs.transpose(1, 2),
            delta=delta.transpose(1, 2),
            A=-torch.exp(at_least_float32(self.A_log)),
            B=B.transpose(1, 2),
            C=C.transpose(1, 2),
            D=at_least_float32(self.D),
            z=gate.transpose(1, 2),
            delta_bias=delta_bias,
        )


@use_kernelized_func(hub_selective_scan)
class PanFoMaDecoderLayer(GradientCheckpointingLayer):
    """Forward and backward Mamba with separate weights, mixed by a vector gate (gate: paper; per layer: ours)."""

    def __init__(self, config: PanFoMaConfig):
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.forward_mamba = PanFoMaMambaMixer(config, reverse=False)
        self.backward_mamba = PanFoMaMambaMixer(config, reverse=True)
        self.gate_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, lengths: Tensor | None) -> Tensor:
        """(batch, seq, hidden) sorted genes, the first ``lengths`` (batch,) of them real, the pads last.

        Both directions end at a cell's own last gene, so pads reach neither the convolution nor the state of a real
        gene (ours).
        """
        normed = self.norm(hidden_states)
        forward, backward = bidirectional_scan_fn(
            self.forward_mamba(normed, lengths),
            self.backward_mamba(normed, lengths),
            delta_softplus=True,
            lengths=lengths,
        )
        forward = self.forward_mamba.out_proj(forward.transpose(1, 2))
        backward = self.backward_mamba.out_proj(backward.transpose(1, 2))
        gate = torch.sigmoid(self.gate_proj(normed))
        # g * forward + (1 - g) * backward
        return hidden_states + self.dropout(torch.lerp(backward, forward, gate))


# In a fresh model's cell embedding, what layers of random weights made of genes beside the genes themselves: with 1 in
# place of 0.1, few cells' kinds can be told (docs/log.md).
STATES_OVER_GENES = 0.1


class PanFoMaCellPooler(nn.Module):
    """The cell embedding: a weighted mean over genes of what they are and of what the model made of them (ours).

    ``sum_i w_i (norm(g_i) + a * h_i) + c * h_global``, where ``g_i`` is a gene's static embedding and ``h_i`` its final
    state, ``a`` and ``c`` are learned scales of each dimension (LayerScale; Touvron et al., ICCV 2021), and ``w`` is
    the softmax of a linear function of the norm of ``g_i`` plus its bin's embedding: which genes count, by name and by
    expression, as rare words do in a sentence (Arora et al., ICLR 2017). It starts as the plain mean.

    The static embeddings' own path is there because pretraining on few cells leaves the final states worse at telling
    cells apart than what they were made from (docs/log.md). The order of the genes carries no gradient; through
    ``h_global`` [CLS] learns what the genes are sorted by.
    """

    def __init__(self, config: PanFoMaConfig):
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gene_weight = nn.Linear(config.hidden_size, 1, bias=False)
        self.gene_scale = nn.Parameter(torch.empty(config.hidden_size))
        self.cell_scale = nn.Parameter(torch.empty(config.hidden_size))

    def forward(
        self, embeddings: Tensor, genes: Tensor, gene_states: Tensor, cell_state: Tensor, attention_mask: Tensor
    ) -> Tensor:
        """Pool a cell.

        Parameters
        ----------
        embeddings, genes, gene_states
            (batch, seq, hidden), input embeddings of genes with their bins, static embeddings of genes, and final
            states, in one order.
        cell_state
            (batch, hidden).
        attention_mask
            (batch, seq), true at real genes.

        Returns
        -------
        (batch, hidden); the global cell state alone, scaled, for a cell without genes.
        """
        mask = attention_mask.to(gene_states.device)
        embeddings, genes = embeddings.to(gene_states), genes.to(gene_states)
        scores = at_least_float32(self.gene_weight(self.norm(embeddings))).squeeze(-1)
        # The lowest number, not minus infinity: a cell without genes has no other score.
        weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1) * mask
        states = at_least_float32(self.norm(genes) + self.gene_scale * gene_states).masked_fill(~mask[..., None], 0.0)
        pooled = (weights[..., None] * states).sum(1)
        return pooled.to(gene_states) + self.cell_scale * cell_state


# ----------------------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------------------

# What a checkpoint says of itself, so that every Auto class finds its code in it, whichever head was saved.
AUTO_MAP = {
    "AutoConfig": "configuration_panfoma.PanFoMaConfig",
    "AutoModel": "modeling_panfoma.PanFoMaModel",
    "AutoModelForSequenceClassification": "modeling_panfoma.PanFoMaForCellClassification",
    "AutoModelForMaskedLM": "modeling_panfoma.PanFoMaForMaskedExpression",
    "AutoModelForPreTraining": "modeling_panfoma.PanFoMaForMaskedExpression",
}


class PanFoMaPreTrainedModel(PreTrainedModel):
    """Initialisation, dtypes and saving shared by PanFoMa and its heads."""

    config_class = PanFoMaConfig
    base_model_prefix = "panfoma"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PanFoMaEmbeddings", "PanFoMaEncoderLayer", "PanFoMaDecoderLayer"]
    _keep_in_fp32_modules_strict = ["A_log", "D", "dt_proj.bias"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            # Spread by the width that a layer reads, as Mamba's authors do: with 0.02 throughout, the decoder of a
            # narrow model adds next to nothing and training stalls on the majority class (docs/log.md).
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        elif isinstance(module, PanFoMaMambaMixer):
            module.init_mamba_weights()
        elif isinstance(module, PanFoMaEncoder):
            init.normal_(module.cls_token, std=self.config.initializer_range)
        elif isinstance(module, PanFoMaCellPooler):
            init.zeros_(module.gene_weight.weight)
            init.constant_(module.gene_scale, STATES_OVER_GENES)
            init.constant_(module.cell_scale, STATES_OVER_GENES)

    def save_pretrained(self, save_directory, **kwargs):
        """Save weights, configuration and the code that every Auto class needs to load them; see `PreTrainedModel`."""
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, **kwargs)


class PanFoMaModel(PanFoMaPreTrainedModel):
    """PanFoMa without a head: cell and gene embeddings.

    Parameters
    ----------
    config
        `PanFoMaConfig`.
    """

    # The body of a checkpoint with a head is loaded without a report of what the head would have been.
    _keys_to_ignore_on_load_unexpected = [
        r"^((classifier|gene_logits|gene_head|cell_head|cell_proj|gene_id_proj|presence_proj|\w+_priors)\.|log_bin_frequencies$)"
    ]

    def __init__(self, config: PanFoMaConfig):
        super().__init__(config)
        self.embeddings = PanFoMaEmbeddings(config)
        self.encoder = PanFoMaEncoder(config)
        self.decoder_layers = nn.ModuleList(PanFoMaDecoderLayer(config) for _ in range(config.num_decoder_layers))
        self.final_norm = nn.RMSNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = PanFoMaCellPooler(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """Embeddings of gene ids, (vocab, hidden): the static gene embeddings."""
        return self.embeddings.gene_embeddings

    def set_input_embeddings(self, value: nn.Embedding):
        """Replace the embeddings of gene ids, as `resize_token_embeddings` does."""
        self.embeddings.gene_embeddings = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        expression_bins: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> PanFoMaModelOutput:
        """Embed cells and their genes.

        Parameters
        ----------
        input_ids
            (batch, seq), gene ids.
        expression_bins
            (batch, seq), expression bins; required with ``input_ids``.
        attention_mask
            (batch, seq), 1 at genes and 0 at pads; None means no pads. Pads belong at the end: a cell's chunks are
            cut from its start.
        inputs_embeds
            (batch, seq, hidden), in place of the id embeddings of ``input_ids``.
        output_hidden_states, output_attentions
            Whether to return them; attentions need ``attn_implementation="eager"``.
        kwargs
            ``return_dict``, and whatever the attention implementation takes.

        Raises
        ------
        ValueError
            If the inputs do not fit together.
        """
        config = self.config
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        attention_mask = self._check_inputs(input_ids, expression_bins, attention_mask, inputs_embeds)
        if output_attentions and config._attn_implementation != "eager":
            raise ValueError(
                f"Attentions are returned by the eager implementation only, got {config._attn_implementation!r}. "
                "Load the model with `attn_implementation='eager'`, or leave `output_attentions` out."
            )

        embeddings, genes = self.embeddings(input_ids, expression_bins, inputs_embeds)
        gene_states, cls_states, hidden_states, attentions = self.encoder(
            embeddings, attention_mask, output_hidden_states, output_attentions, **kwargs
        )

        # With the layers spread over devices, what is computed here follows the states.
        attention_mask = attention_mask.to(gene_states.device)
        cell_state = global_cell_state(cls_states, attention_mask, config.chunk_size)
        gene_scores, order = relevance_order(gene_states, cell_state, attention_mask)
        position_of_gene = order.argsort(dim=-1)  # the inverse permutation: unsorts

        sorted_states = reorder(gene_states, order)
        lengths = attention_mask.sum(-1)
        decoded = ()
        for layer in self.decoder_layers:
            sorted_states = layer(sorted_states, lengths)
            decoded += (sorted_states,)
        last_hidden_state = reorder(self.final_norm(sorted_states), position_of_gene)

        if output_hidden_states:
            # As elsewhere in Transformers, the last entry is the normed last_hidden_state.
            decoded = tuple(reorder(states, position_of_gene) for states in decoded[:-1])
            hidden_states = (embeddings, *hidden_states, *decoded, last_hidden_state)
        return PanFoMaModelOutput(
            last_hidden_state=last_hidden_state,
            pooler_output=self.pooler(embeddings, genes, last_hidden_state, cell_state, attention_mask),
            gene_scores=gene_scores,
            hidden_states=hidden_states if output_hidden_states else None,
            attentions=attentions if output_attentions else None,
        )

    @staticmethod
    def _check_inputs(input_ids, expression_bins, attention_mask, inputs_embeds) -> Tensor:
        """Raise on inputs that do not fit; return the mask as booleans (batch, seq)."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                "Exactly one of `input_ids` and `inputs_embeds` is needed, got "
                f"{'neither' if input_ids is None else 'both'}. "
                "Pass what the tokenizer returns: `model(**tokenizer(...))`."
            )
        if input_ids is not None and expression_bins is None:
            raise ValueError(
                "`expression_bins` must come with `input_ids`, got None. "
                "Pass everything that the tokenizer returns: `model(**tokenizer(...))`."
            )
        reference = input_ids if input_ids is not None else inputs_embeds[..., 0]
        if reference.ndim != 2:
            raise ValueError(
                f"Inputs must be (batch, seq), got {tuple(reference.shape)}. For one cell add a batch dimension, or "
                "call the tokenizer with `return_tensors='pt'`."
            )
        for name, tensor in (("expression_bins", expression_bins), ("attention_mask", attention_mask)):
            if tensor is not None and tensor.shape != reference.shape:
                raise ValueError(
                    f"`{name}` must have the shape of the gene ids, {tuple(reference.shape)}, got "
                    f"{tuple(tensor.shape)}. "
                    "Pad them together with `tokenizer.pad`."
                )
        if attention_mask is None:
            return torch.ones_like(reference, dtype=torch.bool)
        return attention_mask.bool()


# ----------------------------------------------------------------------------------------------------------------------
# Heads
# ----------------------------------------------------------------------------------------------------------------------


class PanFoMaForMaskedExpression(PanFoMaPreTrainedModel):
    """PanFoMa that predicts the expression bins of masked genes: pretraining, and imputation of bins (ours).

    Bins are predicted from each gene's state, and from the cell embedding and the gene's id. The cell embedding also
    predicts which genes of the vocabulary the cell expresses, as a logistic factor model does with the gene embeddings
    for loadings (Schein, Saul and Ungar, AISTATS 2003): bins are those of expressed genes, most
    of which follow from the depth of sequencing, and say little of what kind of cell it is (docs/log.md).

    Predictions start from what counting tells, so that the rest of the model need not learn it:

    - of a gene without looking at its cell: ``bin_priors`` (vocab, bins + 1) and ``presence_priors`` (vocab, 1), logits
      that pretraining sets to how often each gene has each bin and is expressed, and goes on learning;
    - of a cell without looking at which genes they are: how much commoner than elsewhere (``log_bin_frequencies``) each
      bin is among its unmasked ones, see `bin_context`, and how many genes it expresses, see `presence_context`. Both
      follow from the depth of sequencing, which is thereby given to all predictions, as the library size is to the
      decoder of scVI (Lopez et al., Nature Methods 2018): the cell embedding need not hold it.
    """

    # Logits of each gene that no cell changes.
    _priors = ("bin_priors", "presence_priors")

    def __init__(self, config: PanFoMaConfig):
        super().__init__(config)
        self.panfoma = PanFoMaModel(config)
        self.gene_head = PanFoMaExpressionHead(config)
        self.cell_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.gene_id_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.cell_head = PanFoMaExpressionHead(config)
        self.presence_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.bin_priors = nn.Embedding(config.vocab_size, config.num_expression_bins + 1)
        self.presence_priors = nn.Embedding(config.vocab_size, 1)
        # Counted, not learned; all bins are equally frequent until pretraining has counted.
        self.log_bin_frequencies = nn.Parameter(torch.empty(config.num_expression_bins + 1), requires_grad=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if module in (self.bin_priors, self.presence_priors):
            init.zeros_(module.weight)
        elif module is self:
            init.constant_(self.log_bin_frequencies, -math.log(len(self.log_bin_frequencies)))

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Embedding:
        """As in Transformers; genes that are new have no prior."""
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        num_tokens = embeddings.num_embeddings
        for name in self._priors:
            old = getattr(self, name)
            if num_tokens != old.num_embeddings:
                weight = old.weight.new_zeros(num_tokens, old.embedding_dim)
                kept = min(num_tokens, old.num_embeddings)
                weight[:kept] = old.weight.detach()[:kept]
                setattr(self, name, nn.Embedding(*weight.shape, _weight=weight))
                getattr(self, name).requires_grad_(old.weight.requires_grad)
        return embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        expression_bins: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        withheld_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs,
    ) -> PanFoMaMaskedExpressionOutput:
        """Predict bins, from each gene's state and from the cell embedding alone, and which genes are expressed.

        Parameters
        ----------
        input_ids, expression_bins, attention_mask
            (batch, seq), as in `PanFoMaModel`; masked genes hold ``config.mask_bin_id``.
        labels
            (batch, seq), the true bins of the masked genes and -100 elsewhere.
        withheld_ids
            (batch, withheld), genes that the cell expresses beside those of ``input_ids``, filled up with the pad id.
        num_items_in_batch
            Labelled genes of the whole optimiser step, which Trainer gives when it accumulates gradients.

        Raises
        ------
        ValueError
            If the inputs do not fit together; gene ids are needed, as the second prediction is made from them.
        """
        if input_ids is None:
            raise ValueError(
                "`input_ids` are needed to predict bins from the cell embedding, got None. "
                "Pass what the tokenizer returns: `model(**tokenizer(...))`."
            )
        outputs = self.panfoma(
            input_ids,
            expression_bins,
            attention_mask,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            **kwargs,
        )
        context = bin_context(expression_bins, attention_mask, self.log_bin_frequencies)
        priors = self.bin_priors(input_ids)
        priors = priors + context[:, None].to(priors.device)
        logits = self.gene_head(outputs.last_hidden_state) + priors.to(outputs.last_hidden_state.device)
        gene_ids = self.panfoma.get_input_embeddings()(input_ids).to(outputs.pooler_output.device)
        cell_logits = self.cell_head(self.cell_proj(outputs.pooler_output)[:, None] + self.gene_id_proj(gene_ids))
        cell_logits = cell_logits + priors.to(cell_logits.device)

        expressed = expressed_genes(
            input_ids, attention_mask, withheld_ids, self.config.vocab_size, self.config.pad_token_id
        )
        presence_logits = self._presence_logits(outputs.pooler_output, expressed.sum(1))

        loss = gene_loss = cell_loss = presence_loss = None
        if labels is not None:
            num_items = (labels != -100).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            gene_loss = masked_cross_entropy(logits, labels, num_items)
            cell_loss = masked_cross_entropy(cell_logits, labels, num_items)
            presence_loss = presence_cross_entropy(presence_logits, expressed).sum() / _on(presence_logits, num_items)
            config = self.config
            loss = config.gene_loss_weight * gene_loss + config.cell_loss_weight * cell_loss.to(gene_loss.device)
            loss = loss + config.presence_loss_weight * presence_loss.to(gene_loss.device)
        return PanFoMaMaskedExpressionOutput(
            loss=loss,
            logits=logits,
            cell_logits=cell_logits,
            presence_logits=presence_logits,
            gene_loss=gene_loss,
            cell_loss=cell_loss,
            presence_loss=presence_loss,
            pooler_output=outputs.pooler_output,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _presence_logits(self, cell_embeddings: Tensor, num_expressed: Tensor) -> Tensor:
        """(batch, vocab), log odds that cells of embeddings (batch, hidden), of so many genes, express each gene."""
        # By way of the module, not its weight, which may be sharded or lie elsewhere.
        genes = self.panfoma.get_input_embeddings()
        all_genes = torch.arange(genes.num_embeddings, device=cell_embeddings.device)
        loadings, priors = (table(all_genes).to(cell_embeddings.device) for table in (genes, self.presence_priors))
        priors = priors[:, 0]
        context = presence_context(priors.detach(), num_expressed.to(priors.device))
        return F.linear(self.presence_proj(cell_embeddings), loadings, priors) + context[:, None]


class PanFoMaExpressionHead(nn.Module):
    """Dense, activation, norm, and one logit for each bin from 0 to the last."""

    def __init__(self, config: PanFoMaConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.act = ACT2FN[config.hidden_act]
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.out_proj = nn.Linear(config.hidden_size, config.num_expression_bins + 1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.out_proj(self.norm(self.act(self.dense(hidden_states))))


# Genes with the bins of all cells that are added to a cell's unmasked ones: bins that it does not show stay possible.
CONTEXT_PRIOR_GENES = 10.0
# Of Newton's method; real cells need four.
CONTEXT_STEPS = 8


def bin_context(expression_bins: Tensor, attention_mask: Tensor | None, log_bin_frequencies: Tensor) -> Tensor:
    """How much commoner than in all cells each bin is among a cell's unmasked genes, as a logarithm.

    Bins are ranks within a cell, and genes of equal counts share one. In a cell of few counts most genes have one count
    and so one bin, whatever they are; the unmasked ones tell which.

    Parameters
    ----------
    expression_bins, attention_mask
        (batch, seq); masked genes and pads are not counted.
    log_bin_frequencies
        (bins + 1,), logarithms of the shares of bins in all cells.

    Returns
    -------
    (batch, bins + 1), at least float32; 0 for a cell that shows no bin.
    """
    log_frequencies = at_least_float32(log_bin_frequencies)
    seen = expression_bins < len(log_frequencies)
    if attention_mask is not None:
        seen = seen & attention_mask.bool()
    counts = torch.zeros(len(seen), len(log_frequencies), dtype=log_frequencies.dtype, device=seen.device)
    counts.scatter_add_(1, expression_bins.where(seen, 0).long(), seen.to(counts.dtype))
    log_frequencies = log_frequencies.to(counts.device)
    counts = counts + CONTEXT_PRIOR_GENES * log_frequencies.exp()
    return (counts / counts.sum(1, keepdim=True)).log() - log_frequencies


def masked_cross_entropy(logits: Tensor, labels: Tensor, num_items: Tensor | int) -> Tensor:
    """Cross-entropy over the labels that are not -100, averaged over ``num_items``; 0 where none is."""
    labels = labels.to(logits.device)
    total = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    return total / _on(logits, num_items)


def _on(tensor: Tensor, number: Tensor | int) -> Tensor | int:
    """A number, on the device of a tensor if it is one itself."""
    return number.to(tensor.device) if torch.is_tensor(number) else number


def expressed_genes(
    input_ids: Tensor, attention_mask: Tensor | None, withheld_ids: Tensor | None, vocab_size: int, pad_id: int
) -> Tensor:
    """(batch, vocab), true at the genes that a cell expresses: those it shows (batch, seq), and those withheld."""
    shown = input_ids if attention_mask is None else input_ids.masked_fill(~attention_mask.bool(), pad_id)
    expressed = torch.zeros(len(input_ids), vocab_size, dtype=torch.bool, device=input_ids.device)
    for genes in (shown,) if withheld_ids is None else (shown, withheld_ids):
        expressed.scatter_(1, genes.long(), True)
    expressed[:, pad_id] = False
    return expressed


def presence_context(log_odds: Tensor, num_expressed: Tensor) -> Tensor:
    """What is added to all genes' log odds so that as many genes as a cell expresses are expected of it.

    Newton's method on ``sum(sigmoid(log_odds + context)) = num_expressed``.

    Parameters
    ----------
    log_odds
        (vocab,), of each gene in all cells.
    num_expressed
        (batch,), genes that each cell expresses; fewer than half a gene or more than all but half count as that.

    Returns
    -------
    (batch,), at least float32.
    """
    log_odds = at_least_float32(log_odds)
    target = num_expressed.to(log_odds.dtype).clamp(0.5, len(log_odds) - 0.5)
    # Exact where all genes are equally frequent.
    context = torch.logit(target / len(log_odds)) - torch.logit(log_odds.sigmoid().mean(), eps=1e-6)
    for _ in range(CONTEXT_STEPS):
        probability = (log_odds + context[:, None]).sigmoid()
        slope = (probability * (1 - probability)).sum(1)
        context = context + ((target - probability.sum(1)) / slope.clamp(min=1e-6)).clamp(-2, 2)
    return context


def presence_cross_entropy(logits: Tensor, expressed: Tensor) -> Tensor:
    """(batch,) float32, binary cross-entropy of log odds (batch, vocab), summed over the vocabulary."""
    expressed = expressed.to(logits.device)
    return F.binary_cross_entropy_with_logits(logits.float(), expressed.float(), reduction="none").sum(1)


class PanFoMaForCellClassification(PanFoMaPreTrainedModel):
    """PanFoMa with a linear classifier on the cell embedding: cell type, cancer type, malignant or normal.

    The names of the classes are in ``config.id2label``; ``config.problem_type`` may be
    "single_label_classification", "multi_label_classification" or "regression". With ``config.label_tasks`` one model
    answers several questions: each task's logits are a stretch of ``logits``, in the order of ``config.tasks``.
    """

    def __init__(self, config: PanFoMaConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.panfoma = PanFoMaModel(config)
        dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        if config.use_gene_logits:
            self.gene_logits = nn.EmbeddingBag(config.vocab_size, config.num_labels, mode="sum")
        # Transformers picks its loss by class name, which names cells here, not sequences.
        self.loss_type = "ForSequenceClassification"
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, nn.EmbeddingBag):
            init.zeros_(module.weight)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Embedding:
        """As in Transformers; genes that are new have no logits of their own."""
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        num_tokens = embeddings.num_embeddings
        if self.config.use_gene_logits and num_tokens != self.gene_logits.num_embeddings:
            old = self.gene_logits.weight
            weight = old.new_zeros(num_tokens, self.num_labels)
            kept = min(num_tokens, len(old))
            weight[:kept] = old.detach()[:kept]
            self.gene_logits = nn.EmbeddingBag(*weight.shape, mode="sum", _weight=weight)
            self.gene_logits.requires_grad_(old.requires_grad)
        return embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        expression_bins: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs,
    ) -> PanFoMaClassifierOutput:
        """Classify cells.

        Parameters
        ----------
        input_ids, expression_bins, attention_mask, inputs_embeds
            As in `PanFoMaModel`; with ``config.use_gene_logits`` gene ids are needed.
        labels
            (batch,) integers for single-label problems, (batch, labels) floats for multi-label problems and
            regression, (batch, tasks) integers for several tasks, -100 where a cell's label is not known.
        num_items_in_batch
            Labels of the whole optimiser step, which Trainer gives when it accumulates gradients.

        Returns
        -------
        ``loss`` where labels are given, ``logits`` (batch, labels), and ``pooler_output`` (batch, hidden), the cell
        embeddings.

        Raises
        ------
        ValueError
            If the inputs do not fit together.
        """
        outputs = self.panfoma(
            input_ids,
            expression_bins,
            attention_mask,
            inputs_embeds,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            **kwargs,
        )
        logits = self.classifier(self.dropout(outputs.pooler_output))
        if self.config.use_gene_logits:
            logits = logits + self._logits_of_genes(input_ids, expression_bins, attention_mask).to(logits.device)
        loss = None
        if labels is not None and self.config.label_tasks is not None:
            loss = multi_task_cross_entropy(logits, labels, self.config.tasks, num_items_in_batch)
        elif labels is not None:
            loss = self.loss_function(
                labels=labels, pooled_logits=logits, config=self.config, num_items_in_batch=num_items_in_batch
            )
            if num_items_in_batch is not None and self.config.problem_type != "single_label_classification":
                # Transformers' losses of these problems are means whatever the number of items.
                loss = loss * (labels.numel() / num_items_in_batch)
        return PanFoMaClassifierOutput(
            loss=loss,
            logits=logits,
            pooler_output=outputs.pooler_output,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _logits_of_genes(self, input_ids, expression_bins, attention_mask) -> Tensor:
        """(batch, labels), the sum of a cell's genes' logits, each times its bin as a share of the highest."""
        if input_ids is None:
            raise ValueError(
                "`input_ids` are needed where genes have logits of their own, got None. "
                "Pass what the tokenizer returns: `model(**tokenizer(...))`."
            )
        weight = self.gene_logits.weight
        # Ids of [MASK] and [PAD] are no amounts.
        bins = expression_bins.masked_fill(expression_bins > self.config.num_expression_bins, 0)
        if attention_mask is not None:
            bins = bins.masked_fill(~attention_mask.bool(), 0)
        amounts = (bins.to(weight.dtype) / self.config.num_expression_bins).to(weight.device)
        if input_ids.shape[1] == 0:
            return weight.new_zeros(len(input_ids), self.num_labels)
        return self.gene_logits(input_ids.to(weight.device), per_sample_weights=amounts)


def multi_task_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    tasks: dict[str, list[str]],
    num_items: Tensor | int | None = None,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of several tasks, averaged over the labels that are known.

    Parameters
    ----------
    logits
        (batch, labels), the tasks' logits side by side.
    labels
        (batch, tasks), ids within each task; -100 where a label is not known.
    tasks
        Names of the labels by task.
    num_items
        Known labels to average over; None counts those given, at least one.
    weights
        (labels,), of the classes; None for equal ones.
    label_smoothing
        Share of the target that is spread over all classes of its task.
    """
    logits, labels = logits.float(), labels.to(logits.device).long()
    sizes = [len(names) for names in tasks.values()]
    weights = [None] * len(sizes) if weights is None else weights.to(logits.device).split(sizes)
    total = sum(
        F.cross_entropy(
            task, labels[:, index], weights[index], reduction="sum", label_smoothing=label_smoothing, ignore_index=-100
        )
        for index, task in enumerate(logits.split(sizes, dim=1))
    )
    return total / ((labels != -100).sum().clamp(min=1) if num_items is None else _on(logits, num_items))


PanFoMaModel.register_for_auto_class("AutoModel")
PanFoMaForMaskedExpression.register_for_auto_class("AutoModelForMaskedLM")
PanFoMaForCellClassification.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = [
    "PanFoMaClassifierOutput",
    "PanFoMaForCellClassification",
    "PanFoMaForMaskedExpression",
    "PanFoMaMaskedExpressionOutput",
    "PanFoMaModel",
    "PanFoMaModelOutput",
    "PanFoMaPreTrainedModel",
]
