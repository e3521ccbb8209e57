"""Annotate many cells from file to file: memory, share of the model's time, and a kill in the middle.

    python scripts/benchmark_inference.py cells.h5ad my-checkpoint --cells 100000 --out runs/many

The cells of a file are repeated until there are as many as asked for. They are annotated by `panfoma annotate` in
a process of its own, which is killed (SIGKILL) when a third is finished and started again. What is written is compared
with what `annotate` says of the cells in memory.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from measuring import table

import panfoma_hf
from panfoma_hf.inference import parts_folder


KILLED_AT = 1 / 3


def repeated(path: Path, num_cells: int, out: Path) -> int:
    """Write the first matrix of a file over and over; return how many cells are different."""
    cells = ad.read_h5ad(path)
    times = -(-num_cells // cells.n_obs)
    matrix = sp.vstack([sp.csr_matrix(cells.X)] * times, format="csr")[:num_cells]
    obs = pd.DataFrame(index=[f"cell-{index}" for index in range(num_cells)])
    ad.AnnData(matrix, obs=obs, var=cells.var).write_h5ad(out)
    return cells.n_obs


def annotate(arguments: list, parts: Path, killed_at: int | None) -> tuple[dict, float]:
    """What a run said, and its seconds; of a run that is killed, nothing."""
    started = time.perf_counter()
    running = subprocess.Popen(arguments, stdout=subprocess.PIPE)
    while killed_at is not None and running.poll() is None:
        if len(list(parts.glob("chunk-*.safetensors"))) >= killed_at:
            running.kill()
            break
        time.sleep(0.2)
    printed = running.communicate()[0]
    return json.loads(printed) if printed else {}, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="cells, .h5ad with counts in X")
    parser.add_argument("checkpoint", help="a fine-tuned one")
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=Path("runs/many"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    source, output = arguments.out / "cells.h5ad", arguments.out / "annotated.h5ad"
    num_different = repeated(arguments.file, arguments.cells, source)
    print(f"{source}: {arguments.cells:,} cells, {source.stat().st_size / 2**20:,.0f} MiB", flush=True)

    command = [sys.executable, "-m", "panfoma_hf", "annotate", source, arguments.checkpoint, "--out", output, "--json"]
    command = [*map(str, command), "--overwrite"]
    parts = parts_folder(output)
    with panfoma_hf.open_cells(source) as opened:
        num_chunks = len(panfoma_hf.read_expression(opened, _tokenizer(arguments.checkpoint)).bounds)
    _, before = annotate(command, parts, max(1, int(KILLED_AT * num_chunks)))
    report, after = annotate(command, parts, None)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20

    some = ad.read_h5ad(arguments.file)
    panfoma_hf.annotate(some, arguments.checkpoint, progress=False)
    written = ad.read_h5ad(output, backed="r")
    key = next(name for name in written.obs if name.endswith("_score")).removesuffix("_score")
    place = np.arange(arguments.cells) % num_different
    same = (written.obs[key].astype(str).to_numpy() == some.obs[key].astype(str).to_numpy()[place]).mean()
    apart = np.abs(written.obs[f"{key}_score"].to_numpy() - some.obs[f"{key}_score"].to_numpy()[place]).max()
    print(
        table(
            ["", ""],
            [
                ["cells", f"{report['cells']:,}"],
                ["of these from before the kill", f"{report['cells_resumed']:,}"],
                ["seconds until the kill, and after it", f"{before:,.0f}, {after:,.0f}"],
                ["cells/s after it", f"{report['cells_per_second']:,.1f}"],
                ["share of the model's time after it", f"{report['model_seconds'] / report['seconds']:.1%}"],
                ["peak memory of the process, GiB", f"{peak:.2f}"],
                ["same name as in memory", f"{same:.4%}"],
                ["largest difference of a score", f"{apart:.1e}"],
            ],
        )
    )


def _tokenizer(checkpoint: str):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint)


if __name__ == "__main__":
    main()
