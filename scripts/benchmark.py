"""Speed of the selective scan and of the model on this machine, as ratios measured side by side.

    python scripts/benchmark.py
    python scripts/benchmark.py --size small --cells 8 --genes 512 --repeats 3

The scan is timed beside the same recurrence as a plain loop over the sequence, in which autograd keeps every step: how
such models run where no kernel is installed.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from panfoma_hf import PanFoMaConfig, PanFoMaForCellClassification
from panfoma_hf.modeling import selective_scan_fn


def loop_over_sequence(u, delta, A, B, C, D, z):
    """The recurrence, one step of all cells and channels at a time."""
    delta = F.softplus(delta)
    state, outputs = u.new_zeros(*u.shape[:2], A.shape[1]), []
    for t in range(u.shape[2]):
        state = torch.exp(delta[..., t, None] * A) * state + (delta * u)[..., t, None] * B[:, None, :, t]
        outputs.append((state * C[:, None, :, t]).sum(-1))
    return (torch.stack(outputs, -1) + D[:, None] * u) * F.silu(z)


def median_seconds(function: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median time of a call, after one that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def scan_inputs(cells: int, channels: int, states: int, genes: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Random input of a scan, with gradients."""
    shapes = {
        "u": (cells, channels, genes),
        "delta": (cells, channels, genes),
        "B": (cells, states, genes),
        "C": (cells, states, genes),
        "D": (channels,),
        "z": (cells, channels, genes),
    }
    inputs = {name: torch.randn(shape, device=device).requires_grad_() for name, shape in shapes.items()}
    return {**inputs, "A": (-torch.rand(channels, states, device=device)).requires_grad_()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small", help="base, small or tiny")
    parser.add_argument("--cells", type=int, default=16)
    parser.add_argument("--genes", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device, cells, genes = torch.device(arguments.device), arguments.cells, arguments.genes
    config = PanFoMaConfig.from_size(arguments.size, num_labels=10)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    print(f"torch {torch.__version__}, {device}{threads}; {arguments.size}: {cells} cells x {genes} genes")

    inputs = scan_inputs(cells, config.mamba_intermediate_size, config.state_size, genes, device)
    bodies = {
        "loop over the sequence": loop_over_sequence,
        "selective_scan_fn": lambda **inputs: selective_scan_fn(**inputs, delta_softplus=True),
    }
    timed = {}
    for name, body in bodies.items():
        with torch.inference_mode():
            forward = median_seconds(lambda body=body: body(**inputs), arguments.repeats, device)
        both = median_seconds(lambda body=body: body(**inputs).sum().backward(), arguments.repeats, device)
        timed[name] = forward, both
    slow = timed["loop over the sequence"]
    for name, (forward, both) in timed.items():
        print(
            f"  scan, {name:<24} forward {forward * 1e3:8.1f} ms ({slow[0] / forward:4.1f}x)   "
            f"with backward {both * 1e3:8.1f} ms ({slow[1] / both:4.1f}x)"
        )

    model = PanFoMaForCellClassification(config).to(device)
    batch = {
        "input_ids": torch.randint(1, config.vocab_size, (cells, genes), device=device),
        "expression_bins": torch.randint(1, config.num_expression_bins + 1, (cells, genes), device=device),
    }
    labels = torch.randint(0, 10, (cells,), device=device)
    with torch.inference_mode():
        inference = median_seconds(lambda: model.eval()(**batch), arguments.repeats, device)
    model.train()
    training = median_seconds(lambda: model(**batch, labels=labels).loss.backward(), arguments.repeats, device)
    print(f"  model: inference {cells / inference:.1f} cells/s, training {cells / training:.1f} cells/s")


if __name__ == "__main__":
    main()
