"""What training costs in arithmetic, and how much of a device's arithmetic it uses."""

import time

import torch

from ..modeling import PanFoMaConfig


# Dense bfloat16 with float32 accumulation, FLOP/s, from NVIDIA's data sheets (without sparsity), by words of a device's
# name; boards of other forms before the SXM ones.
PEAK_BY_DEVICE = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "L4": 121e12,
    "V100": 125e12,
}


def pretraining_flops(config: PanFoMaConfig, num_cells: int, seq: int) -> float:
    """Floating-point operations of a forward and a backward pass of masked-expression pretraining.

    Matrix products, attention and the short convolutions are counted, a multiplication and an addition as two; the
    selective scan, norms and activations are not. The backward pass is taken as twice the forward pass (Kaplan et al.,
    arXiv 2001.08361); what gradient checkpointing computes again is not counted, as is usual for model FLOP utilisation
    (Chowdhery et al., arXiv 2204.02311).

    Parameters
    ----------
    config
        Shape of the model.
    num_cells, seq
        Cells of a batch, and genes to which each is padded.
    """
    hidden, channels = config.hidden_size, config.mamba_intermediate_size
    rank, states = config.time_step_rank, config.state_size
    tokens = num_cells * seq
    whole, rest = divmod(seq, config.chunk_size)
    # [CLS] leads each chunk, and every gene of a chunk attends to all of it.
    lengths = [config.chunk_size + 1] * whole + [rest + 1] * bool(rest)
    encoded = num_cells * sum(lengths)
    pairs = num_cells * sum(length**2 for length in lengths)
    encoder = encoded * (8 * hidden**2 + 4 * hidden * config.intermediate_size) + 4 * hidden * pairs
    mixer = 4 * hidden * channels + 2 * channels * (rank + 2 * states) + 2 * rank * channels + 2 * channels * hidden
    decoder = tokens * (2 * (mixer + 2 * config.conv_kernel * channels) + 2 * hidden**2)
    head = 2 * hidden**2 + 2 * hidden * (config.num_expression_bins + 1)
    # From the cell embedding: its share of the predicted bins, and which genes of the vocabulary are expressed.
    cell_heads = num_cells * (4 * hidden**2 + 2 * hidden * config.vocab_size)
    heads = tokens * (2 * head + 2 * hidden**2) + cell_heads
    pooler = tokens * 2 * hidden  # the weights of genes
    return 3.0 * (config.num_encoder_layers * encoder + config.num_decoder_layers * decoder + pooler + heads)


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Most floating-point operations a second of a device, and where the number is from.

    A known GPU has its data sheet's; anything else is measured by a large matrix product, which takes about a second.
    """
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        words = set(torch.cuda.get_device_name(device).replace("-", " ").split())
        for known, peak in PEAK_BY_DEVICE.items():
            if words.issuperset(known.split()):
                return peak, f"data sheet of {known}"
    size = 8192 if device.type == "cuda" else 1536
    matrix = torch.ones(size, size, device=device, dtype=dtype)  # no random numbers: dropout draws from the same
    fastest = float("inf")
    for _ in range(4):  # the first one warms up
        _wait(device)
        start = time.perf_counter()
        matrix @ matrix
        _wait(device)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest, f"measured, {size} x {size} matrices"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
