"""How fast a corpus is built, in how much memory, and what larger ones will take: the tables of docs/corpus.md.

    python scripts/benchmark_corpus.py --cells 300000 --report docs/corpus.md

Baron's pancreas is repeated with every count thinned at random, so that no two cells are equal. Needs 10 GB of disk for
300,000 cells.
"""

import argparse
import datetime
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import yaml
from anndata.io import write_elem
from measuring import table

from panfoma_hf import Corpus
from panfoma_hf.data.corpus.corpus import read_groups
from panfoma_hf.data.corpus.sources import DEFAULT_SPLITS
from panfoma_hf.data.corpus.splits import CellGroups, make_split, shared_barcodes
from panfoma_hf.evaluation.public_tasks import baron_pancreas


START, END = "<!-- measured: start -->\n", "<!-- measured: end -->\n"
PLANNED_CELLS = (3_500_000, 50_000_000)
PLANNED_CORES = (1, 16, 256)


def write_cells(path: Path, num_cells: int, seed: int, compression: str | None = None) -> None:
    """An .h5ad of so many cells, in CSR, a donor for every 1,937 of them; never whole in memory."""
    source = baron_pancreas()
    counts = source.X.tocsr().astype(np.int32)
    generator = np.random.default_rng(seed)
    repeats = -(-num_cells // counts.shape[0])
    with h5py.File(path, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        names = [f"{seed}-{cell}" for cell in range(num_cells)]
        donors = np.repeat([f"donor{seed}-{number}" for number in range(repeats)], counts.shape[0])[:num_cells]
        types = np.tile(source.obs["cell_type"].astype(str), repeats)[:num_cells]
        obs = pd.DataFrame({"donor": pd.Categorical(donors), "cell_type": pd.Categorical(types)}, index=names)
        write_elem(file, "obs", obs)
        write_elem(file, "var", source.var[[]])
        group = file.create_group("X")
        shape = np.array([num_cells, counts.shape[1]])
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": shape})
        options = {"shape": (0,), "maxshape": (None,), "chunks": (2**16,), "compression": compression}
        data, indices = (
            group.create_dataset(name, dtype=kind, **options)
            for name, kind in (("data", np.float32), ("indices", np.int32))
        )
        lengths = []
        for repeat in range(repeats):
            chunk = counts[: num_cells - repeat * counts.shape[0]].copy()
            chunk.data = generator.binomial(chunk.data, 0.95).astype(np.int32)
            chunk.eliminate_zeros()
            size = data.shape[0]
            for dataset, values in ((data, chunk.data), (indices, chunk.indices)):
                dataset.resize((size + chunk.nnz,))
                dataset[size:] = values
            lengths.append(np.diff(chunk.indptr))
        group["indptr"] = np.append(0, np.cumsum(np.concatenate(lengths)))


class PeakMemory(threading.Thread):
    """The most memory that a process and its children held at once, in MiB; pages that they share count once."""

    def __init__(self, process: int):
        super().__init__(daemon=True)
        self.peak, self._process, self._stop_it = 0.0, process, threading.Event()

    def run(self) -> None:  # noqa: D102
        while not self._stop_it.wait(0.1):
            self.peak = max(self.peak, sum(map(_proportional, [self._process, *_children(self._process)])))

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exception):
        self._stop_it.set()
        self.join()


def _children(parent: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{parent}/task").glob("*/children"):
        try:
            for child in task.read_text().split():
                found += [int(child), *_children(int(child))]
        except OSError:  # ended just now
            continue
    return found


def _proportional(process: int) -> float:
    """Memory of a process, its share of libraries among it."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def build(folder: Path, name: str, files: list[str], workers: int) -> dict:
    """Build a corpus of files in a folder; seconds, peak memory and sizes."""
    study = {"licence": "x", "citation": "x", "columns": {"donor_id": "donor", "cell_type": "cell_type"}}
    content = {"name": name, "studies": {f"study{i}": {**study, "files": [file]} for i, file in enumerate(files)}}
    sources = folder / f"{name}.yaml"
    sources.write_text(yaml.safe_dump(content))
    out = folder / name
    command = [sys.executable, "-m", "panfoma_hf", "corpus", "build", str(sources), str(out), "--workers", str(workers)]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with process, PeakMemory(process.pid) as memory:
        code = process.wait()
    taken = time.perf_counter() - started
    if code:
        raise RuntimeError(f"{' '.join(command)} ended with {code}")
    corpus = Corpus.open(out)
    totals = corpus.manifest["totals"]
    result = {
        "seconds": taken,
        "rate": totals["cells_read"] / taken,
        "memory": memory.peak,
        "cells": totals["cells"],
        "read": sum(unit["bytes"] for unit in corpus.manifest["units"]) / totals["cells_read"],
        "written": totals["bytes"] / totals["cells_read"],
        "genes": totals["tokens"] / totals["cells"],
    }
    started = time.perf_counter()
    groups, _ = read_groups(corpus)
    for settings in (DEFAULT_SPLITS["donor"], DEFAULT_SPLITS["random"]):
        make_split(groups, settings)
    result["finish"] = time.perf_counter() - started
    shutil.rmtree(out)
    return result


def finishing(num_cells: int) -> tuple[float, float]:
    """Seconds and MiB of the splits and their guard for a corpus of so many made-up cells."""
    generator = np.random.default_rng(0)
    num_donors = max(num_cells // 5000, 10)
    donors = np.sort(generator.integers(num_donors, size=num_cells)).astype(np.int32)
    cohorts = (donors // 8).astype(np.int32)
    names = [f"cohort{number}" for number in range(int(cohorts.max()) + 1)]
    cells = CellGroups(
        studies=cohorts,
        cohorts=cohorts,
        donors=donors,
        cancer_types=(cohorts % 33).astype(np.int32),
        content=generator.integers(2**63, size=num_cells, dtype=np.uint64),
        names={
            "studies": names,
            "cohorts": names,
            "donors": [f"{names[donor // 8]}/{donor}" for donor in range(num_donors)],
            "cancer_types": [f"type{number}" for number in range(33)],
        },
    )
    barcodes = generator.integers(1, 737_000, size=num_cells, dtype=np.uint64) << np.uint64(32)
    started = time.perf_counter()
    with PeakMemory(os.getpid()) as memory:
        for name, settings in DEFAULT_SPLITS.items():
            make_split(cells, settings, name)
        shared_barcodes(cohorts, barcodes, names)
    return time.perf_counter() - started, memory.peak


def duration(seconds: float) -> str:
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:,.0f} {unit}" if seconds / size >= 10 else f"{seconds / size:,.1f} {unit}"
    return f"{seconds / 86400:,.1f} days"


def report(num_cells: int, measured: dict[str, dict], finish: dict[int, tuple[float, float]]) -> str:
    """The measured tables and the plan that follows from them."""
    first = next(iter(measured.values()))
    rows = [
        [
            name,
            values["rate"],
            f"{values['seconds']:.0f}",
            f"{values['memory']:.0f}",
            f"{values['read'] / 1e3:.1f}",
            f"{values['written'] / 1e3:.1f}",
        ]
        for name, values in measured.items()
    ]
    headings = ["files", "cells/s", "seconds", "peak MiB, all processes", "KB read per cell", "KB written per cell"]
    finish_rows = [[f"{cells:,}", f"{seconds:.1f}", f"{memory:.0f}"] for cells, (seconds, memory) in finish.items()]
    return (
        f"{datetime.date.today().isoformat()}, {os.cpu_count()} cores of {_processor()}, {num_cells:,} cells with "
        f"{first['genes']:,.0f} genes on average (Baron's pancreas, thinned at random), from files to card:\n\n"
        f"{table(headings, rows)}\n"
        "What is done once for all cells, in one process: the four splits, their guard and the search for shared "
        "barcodes, on made-up cells.\n\n"
        f"{table(['cells', 'seconds', 'peak MiB of the process'], finish_rows)}\n"
        f"{plan(measured, finish)}"
    )


def plan(measured: dict[str, dict], finish: dict[int, tuple[float, float]]) -> str:
    """What larger corpora take, from the rate of two processes side by side."""
    several = measured["4 files, 2 processes"]
    packed = measured["1 file, gzipped, 1 process"]
    per_core, per_core_packed = several["rate"] / 2, packed["rate"] / 2  # one process has threads on both cores
    one = measured["1 file, 1 process"]
    rows = []
    for cells in finish:
        once, memory_once = finish[cells]
        once += cells * one["finish"] / one["cells"]
        for cores in PLANNED_CORES:
            rate = per_core * cores
            rows.append(
                [
                    f"{cells / 1e6:g} M",
                    cores,
                    duration(cells / rate + once),
                    duration(cells / (per_core_packed * cores) + once),
                    duration(once),
                    f"{cells * several['written'] / 1e9:,.0f} GB",
                    f"{(one['memory'] * cores) / 1024:,.1f} GiB",
                    f"{memory_once / 1024:.1f} GiB",
                    f"{rate * (3 * several['read'] + several['written']) / 1e9:,.2f} GB/s",
                ]
            )
    headings = ["cells", "cores", "time", "time, gzipped", "of it in one process", "disk", "memory of workers"]
    headings += ["memory of the last step", "disk and network"]
    return (
        "What follows for larger corpora, if cores are as fast as these and nothing else is in their way "
        f"({per_core:,.0f} cells/s a core, {per_core_packed:,.0f} gzipped; every file is read three times, as a rule "
        "from the page cache the second and third time):\n\n"
        f"{table(headings, rows)}"
    )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=300_000)
    parser.add_argument("--planned", type=int, nargs="*", default=PLANNED_CELLS, help="cells to plan for")
    parser.add_argument("--report", type=Path, help="Markdown file with the markers to write the tables between")
    parser.add_argument("--scratch", type=Path, help="where to put the files, 10 GB for 300,000 cells")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        folder = Path(folder)
        quarter = arguments.cells // 4
        write_cells(folder / "one.h5ad", arguments.cells, seed=0)
        for part in range(4):
            write_cells(folder / f"part{part}.h5ad", quarter, seed=1 + part)
        write_cells(folder / "packed.h5ad", quarter, seed=5, compression="gzip")
        parts = [f"part{part}.h5ad" for part in range(4)]
        build(folder, "first", ["packed.h5ad"], workers=1)  # kernels are compiled or read from their cache
        measured = {
            "1 file, 1 process": build(folder, "one", ["one.h5ad"], workers=1),
            "4 files, 2 processes": build(folder, "several", parts, workers=2),
            "1 file, gzipped, 1 process": build(folder, "packed", ["packed.h5ad"], workers=1),
        }
    finish = {cells: finishing(cells) for cells in arguments.planned}
    text = report(arguments.cells, measured, finish)
    print(text)
    if arguments.report:
        content = arguments.report.read_text(encoding="utf-8")
        before, after = content.split(START)[0], content.split(END)[1]
        arguments.report.write_text(f"{before}{START}{text}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
