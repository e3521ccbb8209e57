"""Speed and memory of the tokenizer, the scan and whole models on this machine, beside what else there is.

    python scripts/benchmark_speed.py                          # all parts, within 5 minutes on 2 cores
    python scripts/benchmark_speed.py --parts scan growth
    python scripts/benchmark_speed.py --parts tokens --token-cells 300000    # files of 4 GB, in the temporary folder
    python scripts/benchmark_speed.py --report docs/performance.md
    python scripts/benchmark_speed.py --device cuda            # everything that is still to be measured on a GPU

Everything that is compared runs in turn in one process, so that a noisy machine slows all of it alike, and the least
of several times is taken: read ratios, not times. Peers have random weights and their published shapes; no weights are
loaded.
"""

import argparse
import platform
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers
from benchmark_tokens import benchmark_tokens
from measuring import in_turn, table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, MambaConfig, MambaModel
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from panfoma_hf import PanFoMaConfig, PanFoMaForMaskedExpression, PanFoMaModel
from panfoma_hf.modeling import selective_scan_fn, use_scan_backend
from panfoma_hf.modeling.modeling_panfoma import PanFoMaDecoderLayer
from panfoma_hf.modeling.selective_scan import BACKENDS


PARTS = ("tokens", "scan", "layer", "models", "floor", "growth", "training")
SCAN_LENGTHS = (256, 512, 1024, 3072, 12288)
MODEL_LENGTHS = (512, 1024, 3072, 12288)
GROWTH_LENGTHS = (768, 1536, 3072, 6144, 12288)
# Dense bfloat16 TFLOP/s, from the makers' data sheets, for model FLOP utilisation.
PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362}
CORPUS_CELLS = 3_500_000  # PanFoMaBench


# ----------------------------------------------------------------------------------------------------------------------
# The scan
# ----------------------------------------------------------------------------------------------------------------------


def scan_tensors(seq: int, channels: int, device: torch.device) -> list[Tensor]:
    """u, delta, A, B, C, D, z of one cell, 16 states, contiguous in mamba-ssm's layout."""
    u, delta, z = (torch.randn(1, channels, seq, device=device) for _ in range(3))
    A = -torch.arange(1.0, 17, device=device).expand(channels, -1).contiguous()
    B, C = (torch.randn(1, 16, seq, device=device) for _ in range(2))
    return [tensor.requires_grad_() for tensor in (u, delta - 2, A, B, C, torch.ones(channels, device=device), z)]


def channels_last(tensors: list[Tensor]) -> list[Tensor]:
    """The same tensors as PanFoMa's own projections leave them, transposes of (batch, seq, channels)."""
    return [t.detach().mT.contiguous().mT.requires_grad_() if t.ndim == 3 else t for t in tensors]


def scan_bodies(device: torch.device) -> dict[str, Callable]:
    bodies = {"Transformers' fallback": mamba_selective_scan}
    try:
        import mambapy  # noqa: F401

        bodies["mambapy"] = lambda *tensors, **kwargs: mamba_selective_scan(*tensors, use_mambapy=True, **kwargs)
    except ImportError:
        pass
    for backend in ("reference", *(("numba",) if device.type == "cpu" else ("triton", "mamba_ssm"))):
        try:
            selective_scan_fn(*scan_tensors(4, 16, device), backend=backend)
        except ImportError:
            continue
        bodies[backend] = lambda *tensors, _backend=backend, **kwargs: selective_scan_fn(
            *tensors, backend=_backend, **kwargs
        )
    return bodies


def benchmark_scan(arguments, device: torch.device) -> str:
    """Part a: each body, forward and with backward."""
    bodies = scan_bodies(device)
    own = "numba" if device.type == "cpu" else "triton"
    report = (
        f"One cell, {arguments.channels:,} channels, 16 states, float32. Inputs are contiguous in mamba-ssm's layout "
        "(batch, channels, seq), or channels are neighbours, as PanFoMa's projections leave them.\n"
    )
    last = {"forward": {}, "forward + backward": {}}
    for mode in last:
        rows = []
        for seq in arguments.scan_lengths:
            tensors = scan_tensors(seq, arguments.channels, device)
            calls = {}
            for name, body in bodies.items():
                calls[name] = scan_call(body, tensors, mode)
            if own in bodies:
                calls[f"{own}, channels last"] = scan_call(bodies[own], channels_last(tensors), mode)
            # Backward through the fallback's loop grows with the square of the length.
            growth = 2 if mode != "forward" else 1
            for name, (length, taken) in last[mode].items():
                if taken * (seq / length) ** growth > arguments.longest_call:
                    calls.pop(name, None)
            measured = in_turn(calls, device, arguments.repeats)
            last[mode] |= {name: (seq, taken) for name, (taken, _) in measured.items()}
            size = sum(t.numel() * 4 for t in tensors) / 2**20
            mine, _ = measured.get(f"{own}, channels last", (None, None))
            for name, (taken, peak) in measured.items():
                share = None if peak is None else peak / size
                rows.append([f"{seq:,}", name, taken * 1e3, mine and taken / mine, peak, share])
        headings = ["steps", mode, "ms", f"time / {own}, channels last", "peak MiB", "peak / inputs"]
        report += "\n" + table(headings, rows)
    return report


def scan_call(body: Callable, tensors: list[Tensor], mode: str) -> Callable[[], object]:
    def forward():
        with torch.inference_mode():
            return body(*tensors, delta_softplus=True)

    def both():
        loss = body(*tensors, delta_softplus=True).sum()
        return torch.autograd.grad(loss, tensors)

    return forward if mode == "forward" else both


def benchmark_layer(arguments, device: torch.device) -> str:
    """A bidirectional layer of base on each body of the scan, forward and with backward."""
    config = PanFoMaConfig.from_size("base")
    layer = PanFoMaDecoderLayer(config).to(device)
    cells, genes = arguments.layer_cells, arguments.layer_genes
    states = torch.randn(cells, genes, config.hidden_size, device=device, requires_grad=True)
    lengths = torch.full((cells,), genes, device=device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def call(backend, backward):
        def run():
            autocast = torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16)
            with use_scan_backend(backend), autocast, torch.set_grad_enabled(backward):
                outputs = layer(states, lengths)
            return torch.autograd.grad(outputs.sum(), [states, *layer.parameters()]) if backward else outputs

        return run

    rows = []
    for backward in (False, True):
        calls = {name: call(name, backward) for name in scan_bodies(device) if name in BACKENDS}
        measured = in_turn(calls, device, arguments.repeats)
        least = min(taken for taken, _ in measured.values())
        mode = "forward + backward" if backward else "forward"
        rows += [[mode, name, taken * 1e3, taken / least, peak] for name, (taken, peak) in measured.items()]
    title = f"{cells} cells of {genes:,} genes, hidden {config.hidden_size}, {str(dtype).removeprefix('torch.')}.\n\n"
    return title + table(["layer", "body", "ms", "time / fastest", "peak MiB"], rows)


# ----------------------------------------------------------------------------------------------------------------------
# Whole models
# ----------------------------------------------------------------------------------------------------------------------


def panfoma(size: str, device: torch.device) -> PanFoMaModel:
    return PanFoMaModel(PanFoMaConfig.from_size(size)).eval().to(device)


def panfoma_batch(cells: int, genes: int, device: torch.device) -> dict[str, Tensor]:
    return {
        "input_ids": torch.randint(1, 25_000, (cells, genes), device=device),
        "expression_bins": torch.randint(1, 51, (cells, genes), device=device),
    }


def inference(model: torch.nn.Module, batch: dict[str, Tensor], bfloat16: bool = False) -> Callable[[], object]:
    device = next(model.parameters()).device

    def call():
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            return model(**batch)

    return call


def peers(device: torch.device) -> dict[str, tuple[torch.nn.Module, int]]:
    """Models of published shape with random weights, and the length that they were made for."""

    def bert(layers, hidden, heads, inner, tokens):
        config = BertConfig(
            vocab_size=25_426,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=inner,
            max_position_embeddings=tokens,
        )
        return BertModel(config, add_pooling_layer=False).eval().to(device), tokens

    mamba = MambaConfig(vocab_size=25_426, hidden_size=512, num_hidden_layers=24)
    return {
        "Geneformer V1 (BERT 6 x 256)": bert(6, 256, 4, 512, 2048),
        "Geneformer V2 (BERT 12 x 512)": bert(12, 512, 8, 1024, 4096),
        "scGPT (BERT 12 x 512)": bert(12, 512, 8, 512, 1200),
        "GeneMamba (Transformers' Mamba 24 x 512)": (MambaModel(mamba).eval().to(device), 2048),
    }


def benchmark_models(arguments, device: torch.device) -> str:
    """Part b: cells a second and peak memory of PanFoMa and of peers."""
    rows = []

    def measure(name, model, batch, tokens, bfloat16=False):
        call = inference(model, batch, bfloat16)
        taken, peak = in_turn({name: call}, device, arguments.repeats)[name]
        cells, dtype = len(batch["input_ids"]), "bfloat16" if bfloat16 else "float32"
        rows.append([name, f"{tokens:,}", dtype, cells, cells / taken, tokens * cells / taken, peak])

    for size in arguments.sizes:
        model = panfoma(size, device)
        for genes in arguments.model_lengths:
            cells = max(1, arguments.tokens_per_batch // genes)
            for bfloat16 in (False, True):
                measure(f"PanFoMa {size}", model, panfoma_batch(cells, genes, device), genes, bfloat16)
    for name, (model, tokens) in peers(device).items() if arguments.peers else ():
        measure(name, model, {"input_ids": torch.randint(1, 25_000, (1, tokens), device=device)}, tokens)
    headings = ["model", "genes", "dtype", "cells at once", "cells/s", "genes/s", "peak MiB"]
    return "Inference, random weights.\n\n" + table(headings, rows)


class Recorder(TorchDispatchMode):
    """Counts matrix products and attentions by the shapes that they were called with."""

    KINDS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_dot_product")

    def __init__(self):
        super().__init__()
        self.counts, self.arguments = Counter(), {}

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        if function._schema.name.startswith(self.KINDS):
            given = tuple(a.shape if torch.is_tensor(a) else a for a in arguments)
            key = f"{function._schema.name} {given} {[a.dtype for a in arguments if torch.is_tensor(a)]} {kwargs}"
            self.counts[key] += 1
            if key not in self.arguments:
                copies = [a.clone() if torch.is_tensor(a) else a for a in arguments]
                self.arguments[key] = function, copies, dict(kwargs or {})
        return function(*arguments, **(kwargs or {}))


def benchmark_floor(arguments, device: torch.device) -> str:
    """Part c: the whole model over its matrix products and attention alone."""
    rows = []
    for size in arguments.sizes:
        model = panfoma(size, device)
        for genes in arguments.floor_lengths:
            cells = max(1, arguments.tokens_per_batch // genes)
            batch = panfoma_batch(cells, genes, device)
            times = {}
            for bfloat16 in (False, True):
                call = inference(model, batch, bfloat16)
                # Inference mode would hand products over before they are taken apart.
                with (
                    Recorder() as recorder,
                    torch.no_grad(),
                    torch.autocast(device.type, torch.bfloat16, enabled=bfloat16),
                ):
                    model(**batch)

                def floor(recorder=recorder):
                    with torch.inference_mode():
                        for key, (function, given, kwargs) in recorder.arguments.items():
                            for _ in range(recorder.counts[key]):
                                function(*given, **kwargs)

                dtype = "bfloat16" if bfloat16 else "float32"
                times |= {f"model {dtype}": call, f"floor {dtype}": floor}
            taken = in_turn(times, device, arguments.repeats, limit=5.0)
            speedup = taken["model float32"][0] / taken["model bfloat16"][0]
            for dtype in ("float32", "bfloat16"):
                (model_time, _), (floor_time, _) = taken[f"model {dtype}"], taken[f"floor {dtype}"]
                gain = speedup if dtype == "bfloat16" else 1.0
                row = [
                    size,
                    f"{genes:,}",
                    cells,
                    dtype,
                    model_time * 1e3,
                    floor_time * 1e3,
                    model_time / floor_time,
                    gain,
                ]
                rows.append(row)
    headings = ["PanFoMa", "genes", "cells at once", "dtype", "ms", "floor ms", "time / floor", "gain over float32"]
    return "The floor is what the model's matrix products and attention take by themselves.\n\n" + table(headings, rows)


def benchmark_growth(arguments, device: torch.device) -> str:
    """Part d: time against length, as a table and a picture."""
    lengths, times = arguments.growth_lengths, {}
    for size in arguments.sizes:
        model = panfoma(size, device)
        calls = {genes: inference(model, panfoma_batch(1, genes, device)) for genes in lengths}
        measured = in_turn(calls, device, arguments.repeats, limit=15.0)
        times[f"PanFoMa {size}"] = {genes: taken for genes, (taken, _) in measured.items()}
    rows = []
    for name, taken in times.items():
        for before, genes in zip((None, *lengths), lengths, strict=False):
            rows.append([name, f"{genes:,}", taken[genes] * 1e3, before and taken[genes] / taken[before]])
    picture = arguments.picture
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw_growth(times, picture)
    headings = ["model", "genes", "ms", "time / half the genes"]
    return "One cell, float32.\n\n" + table(headings, rows) + f"\n![Time against genes]({picture.name})\n"


def draw_growth(times: dict[str, dict[int, float]], path: Path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 4), layout="constrained")
    for name, taken in times.items():
        axes.loglog(list(taken), list(taken.values()), "o-", label=name)
        first = min(taken)
        axes.loglog(list(taken), [taken[first] * genes / first for genes in taken], "--", color="grey", linewidth=1)
    axes.plot([], [], "--", color="grey", label="linear")
    lengths = list(next(iter(times.values())))
    axes.set_xticks(lengths, [f"{genes:,}" for genes in lengths])
    axes.minorticks_off()
    axes.set_xlabel("genes of a cell")
    axes.set_ylabel("seconds a cell")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def benchmark_training(arguments, device: torch.device) -> str:
    """A pretraining step; on a GPU with model FLOP utilisation and the time for a pass over PanFoMaBench."""
    rows = []
    peak = arguments.peak_tflops
    if peak is None and device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peak = next((value for part, value in PEAK_TFLOPS.items() if part in name), None)
    for size in arguments.sizes:
        for genes in arguments.training_lengths:
            cells = max(1, arguments.tokens_per_training_batch // genes)
            model = PanFoMaForMaskedExpression(PanFoMaConfig.from_size(size)).train().to(device)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
            batch = panfoma_batch(cells, genes, device)
            labels = batch["expression_bins"].where(torch.rand(cells, genes, device=device) < 0.3, -100)

            def step(model=model, optimizer=optimizer, batch=batch, labels=labels):
                with torch.autocast(device.type, torch.bfloat16):
                    loss = model(**batch, labels=labels).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

            with FlopCounterMode(display=False) as counter:
                step()
            taken, peak_mib = in_turn({"step": step}, device, arguments.repeats)["step"]
            flops = counter.get_total_flops() / taken
            hours = CORPUS_CELLS * taken / cells / 3600
            utilisation = peak and flops / (peak * 1e12)
            rows.append([size, f"{genes:,}", cells, taken * 1e3, cells / taken, flops / 1e12, utilisation, hours])
            rows[-1].append(peak_mib)
    headings = ["PanFoMa", "genes", "cells at once", "ms a step", "cells/s", "TFLOP/s", "share of peak"]
    headings += [f"hours for {CORPUS_CELLS:,} cells", "peak MiB"]
    return (
        "Masked-expression pretraining, bfloat16 autocast, AdamW; matrix products only are counted as FLOPs.\n\n"
        + table(headings, rows)
    )


# ----------------------------------------------------------------------------------------------------------------------


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        cpu = Path("/proc/cpuinfo")
        names = (
            [line.split(":")[1].strip() for line in cpu.read_text().splitlines() if "model name" in line]
            if cpu.exists()
            else []
        )
        hardware = f"{torch.get_num_threads()} threads of {names[0] if names else platform.processor()}"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{datetime.now(UTC):%Y-%m-%d}, {hardware}, {versions}"


def parse_arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", nargs="+", default=["small", "base"], help="of PanFoMa")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--channels", type=int, default=1024, help="of the scan")
    parser.add_argument("--scan-lengths", type=int, nargs="+", default=SCAN_LENGTHS)
    parser.add_argument("--token-cells", type=int, default=20_000, help="of the made-up matrix and of the files")
    parser.add_argument("--layer-cells", type=int, help="of the bidirectional layer; 32 on a GPU")
    parser.add_argument("--layer-genes", type=int, default=3072)
    parser.add_argument("--model-lengths", type=int, nargs="+", default=MODEL_LENGTHS)
    parser.add_argument("--floor-lengths", type=int, nargs="+", default=(3072,))
    parser.add_argument("--growth-lengths", type=int, nargs="+", default=GROWTH_LENGTHS)
    parser.add_argument("--training-lengths", type=int, nargs="+", default=(1024,))
    parser.add_argument("--tokens-per-batch", type=int, help="cells at once times genes, in inference")
    parser.add_argument("--tokens-per-training-batch", type=int)
    parser.add_argument("--longest-call", type=float, default=12.0, help="seconds beyond which a peer is left out")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="leave whole models of others out")
    parser.add_argument(
        "--peak-tflops", type=float, help="of the device in bfloat16, where this script does not know it"
    )
    parser.add_argument("--report", type=Path, help="write the tables to this Markdown file too")
    parser.add_argument("--picture", type=Path, help="of the growth; beside the report, or in runs/speed")
    arguments = parser.parse_args(given)
    on_gpu = torch.device(arguments.device).type == "cuda"
    arguments.tokens_per_batch = arguments.tokens_per_batch or (98_304 if on_gpu else 3072)
    arguments.tokens_per_training_batch = arguments.tokens_per_training_batch or (98_304 if on_gpu else 3072)
    arguments.layer_cells = arguments.layer_cells or (32 if on_gpu else 1)
    if arguments.picture is None:
        folder = arguments.report.parent if arguments.report else Path("runs/speed")
        arguments.picture = folder / "growth.png"
    return arguments


def warm_up(device: torch.device):
    """Have the kernels compiled, which takes seconds where they are not in the cache yet."""
    model = PanFoMaModel(PanFoMaConfig.from_size("tiny")).to(device)
    for bfloat16 in (False, True):
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            model(**panfoma_batch(2, 16, device)).pooler_output.sum().backward()
    for body in scan_bodies(device).values():
        scan_call(body, scan_tensors(4, 16, device), "forward + backward")()


PREFACE = """# Performance

Written by `python scripts/benchmark_speed.py --report docs/performance.md`; `make bench` prints the same for your
machine. What is compared ran in turn in one process: read ratios, not times. Peers have random weights and their
published shapes. Memory is what a call takes at its peak beyond its inputs; with backward, the gradients of all inputs
are in it.

"""
NOT_MEASURED = """
## On a GPU

Not yet measured: time and memory of the Triton kernels and of mamba-ssm's, which of them ought to be the default, FLOP
utilisation of training, and cells a second. One command measures all of it, `python scripts/benchmark_speed.py --device
cuda`, and `pytest tests/modeling` tests every body on that GPU too. Until then mamba-ssm's scan is taken on CUDA where
it is installed, or fetched with `use_kernels=True`, and Triton's everywhere else.
"""


def main(given: list[str] | None = None) -> None:
    arguments = parse_arguments(given)
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    warm_up(device)
    titles = {
        "tokens": (benchmark_tokens, "Counts to tokens"),
        "scan": (benchmark_scan, "The scan"),
        "layer": (benchmark_layer, "A bidirectional layer"),
        "models": (benchmark_models, "Whole models"),
        "floor": (benchmark_floor, "The model and its floor"),
        "growth": (benchmark_growth, "Growth with length"),
        "training": (benchmark_training, "Training"),
    }
    report = f"{machine(device)}\n"
    print(report)
    for part in arguments.parts:
        function, title = titles[part]
        started = time.perf_counter()
        section = f"## {title}\n\n{function(arguments, device)}"
        print(f"{section}\n({part}: {time.perf_counter() - started:.0f} s)\n", flush=True)
        report += f"\n{section}"
    if arguments.report:
        report = PREFACE + report + (NOT_MEASURED if device.type == "cpu" else "")
        arguments.report.write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main()
