"""PanFoMa a second time, from the equations: one cell, one chunk, one head, one step at a time, in float64.

It shares no code with the package and reads nothing but a state dict and sizes, so that a mistake would have to be
made twice. Equation by equation it follows the paper's method section and Gu and Dao, arXiv 2312.00752.
"""

import math

import torch


class NaivePanFoMa:
    """Cell embedding, gene states, scores and layer outputs of single cells."""

    def __init__(self, model):
        self.weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
        self.config = model.config

    def __call__(self, genes: list[int], bins: list[int]) -> dict:
        config, weights = self.config, self.weights
        embedded = [
            weights["embeddings.gene_embeddings.weight"][gene] + weights["embeddings.bin_embeddings.weight"][bin_id]
            for gene, bin_id in zip(genes, bins, strict=True)
        ]
        hidden_states = [embedded]

        # Local context: each chunk by itself, led by [CLS].
        chunks = [embedded[start : start + config.chunk_size] for start in range(0, len(embedded), config.chunk_size)]
        sequences = [[weights["encoder.cls_token"], *chunk] for chunk in chunks]
        for layer in range(config.num_encoder_layers):
            group = layer // (config.num_encoder_layers // config.num_hidden_groups)
            sequences = [self.encoder_layer(f"encoder.layer_groups.{group}", sequence) for sequence in sequences]
            hidden_states.append([state for sequence in sequences for state in sequence[1:]])
        sequences = [[self.layer_norm("encoder.final_norm", state) for state in sequence] for sequence in sequences]
        states = [state for sequence in sequences for state in sequence[1:]]

        # Global cell state: mean of the [CLS] states, weighted by the chunks' numbers of genes.
        total = sum(len(sequence) - 1 for sequence in sequences)
        cell = sum((len(sequence) - 1) / total * sequence[0] for sequence in sequences)
        scores = [float((state * cell).sum()) for state in states]
        order = sorted(range(len(states)), key=lambda gene: -scores[gene])

        # Global decoder over the genes, most relevant first.
        decoded = [states[gene] for gene in order]
        for layer in range(config.num_decoder_layers):
            decoded = self.decoder_layer(f"decoder_layers.{layer}", decoded)
            hidden_states.append(self.unsorted(decoded, order))
        decoded = [self.rms_norm("final_norm", state) for state in decoded]
        hidden_states[-1] = self.unsorted(decoded, order)
        return {
            "pooler_output": self.pooler(genes, embedded, hidden_states[-1], cell),
            "last_hidden_state": torch.stack(hidden_states[-1]),
            "gene_scores": torch.tensor(scores, dtype=torch.float64),
            "hidden_states": [torch.stack(states) for states in hidden_states],
        }

    def pooler(self, genes, embedded, states, cell):
        """Weighted mean of genes' normed ids and scaled final states, plus the scaled global cell state."""
        shares = [math.exp(self.linear("pooler.gene_weight", self.rms_norm("pooler.norm", x))) for x in embedded]
        pooled = 0
        for share, gene, state in zip(shares, genes, states, strict=True):
            id_embedding = self.weights["embeddings.gene_embeddings.weight"][gene]
            value = self.rms_norm("pooler.norm", id_embedding) + self.weights["pooler.gene_scale"] * state
            pooled = pooled + share / sum(shares) * value
        return pooled + self.weights["pooler.cell_scale"] * cell

    @staticmethod
    def unsorted(decoded, order):
        states = [None] * len(order)
        for place, gene in enumerate(order):
            states[gene] = decoded[place]
        return states

    def linear(self, name, vector):
        bias = self.weights.get(f"{name}.bias")
        return self.weights[f"{name}.weight"] @ vector + (0 if bias is None else bias)

    def layer_norm(self, name, vector):
        centred = vector - vector.mean()
        scale = (centred.pow(2).mean() + self.config.layer_norm_eps).sqrt()
        return centred / scale * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def rms_norm(self, name, vector):
        scale = (vector.pow(2).mean() + self.config.layer_norm_eps).sqrt()
        return vector / scale * self.weights[f"{name}.weight"]

    def encoder_layer(self, name, sequence):
        attended = self.attention(f"{name}.attention", [self.layer_norm(f"{name}.attention_norm", x) for x in sequence])
        sequence = [x + y for x, y in zip(sequence, attended, strict=True)]
        output = []
        for x in sequence:
            inner = self.linear(f"{name}.mlp_up_proj", self.layer_norm(f"{name}.mlp_norm", x))
            inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
            output.append(x + self.linear(f"{name}.mlp_down_proj", inner))
        return output

    def attention(self, name, sequence):
        heads = self.config.num_attention_heads
        size = self.config.hidden_size // heads
        projected = [self.linear(f"{name}.qkv_proj", x).split(self.config.hidden_size) for x in sequence]
        outputs = []
        for query, _, _ in projected:
            mixed = []
            for head in range(heads):
                part = slice(head * size, (head + 1) * size)
                logits = torch.stack([(query[part] * key[part]).sum() / math.sqrt(size) for _, key, _ in projected])
                attention = logits.exp() / logits.exp().sum()
                mixed.append(sum(a * value[part] for a, (_, _, value) in zip(attention, projected, strict=True)))
            outputs.append(self.linear(f"{name}.out_proj", torch.cat(mixed)))
        return outputs

    def decoder_layer(self, name, sequence):
        normed = [self.rms_norm(f"{name}.norm", x) for x in sequence]
        forward = self.mamba(f"{name}.forward_mamba", normed)
        backward = self.mamba(f"{name}.backward_mamba", normed[::-1])[::-1]
        output = []
        for x, n, f, b in zip(sequence, normed, forward, backward, strict=True):
            gate = 1 / (1 + torch.exp(-self.linear(f"{name}.gate_proj", n)))
            output.append(x + gate * f + (1 - gate) * b)
        return output

    def mamba(self, name, sequence):
        config, weights = self.config, self.weights
        channels = config.expand * config.hidden_size
        projected = [self.linear(f"{name}.in_proj", x).split(channels) for x in sequence]
        kernel, bias = weights[f"{name}.conv1d.weight"][:, 0], weights[f"{name}.conv1d.bias"]
        A = -weights[f"{name}.A_log"].exp()
        state = torch.zeros(channels, config.state_size, dtype=torch.float64)
        outputs = []
        for t, (_, gate) in enumerate(projected):
            u = bias.clone()
            for lag in range(config.conv_kernel):
                if t - lag >= 0:
                    u += kernel[:, config.conv_kernel - 1 - lag] * projected[t - lag][0]
            u = u / (1 + torch.exp(-u))
            step, B, C = self.linear(f"{name}.x_proj", u).split(
                [config.time_step_rank, config.state_size, config.state_size]
            )
            delta = torch.log1p(torch.exp(self.linear(f"{name}.dt_proj", step)))
            state = torch.exp(delta[:, None] * A) * state + (delta * u)[:, None] * B[None, :]
            y = state @ C + weights[f"{name}.D"] * u
            outputs.append(self.linear(f"{name}.out_proj", y * gate / (1 + torch.exp(-gate))))
        return outputs
