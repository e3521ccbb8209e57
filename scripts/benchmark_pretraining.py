"""Speed of pretraining on this machine: the input pipeline by itself, and steps of whole models.

    python scripts/benchmark_pretraining.py CORPUS --report docs/pretraining.md

CORPUS is a folder that `panfoma corpus build` wrote. The tables go between the report's markers.
"""

import argparse
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from measuring import table
from torch.utils.data import DataLoader

import panfoma_hf
from panfoma_hf.data.batches import Batching, BatchSchedule, EpochCells
from panfoma_hf.data.collator import DataCollatorForMaskedExpression
from panfoma_hf.data.corpus.choice import CellChoice
from panfoma_hf.data.corpus.streaming import StreamedCells
from panfoma_hf.training import pretrain
from panfoma_hf.training.throughput import pretraining_flops


CELLS = 3_500_000
START, END = "<!-- speed: start -->\n", "<!-- speed: end -->\n"
# Share of its FLOP/s that training may use of a GPU: what is usual, not what was measured.
ASSUMED_UTILISATION = (0.1, 0.3)
H100_FLOPS = 989e12


def fake_model(**batch: torch.Tensor) -> torch.Tensor:
    """Costs nothing: reads one number of each tensor."""
    return sum(tensor.flatten()[0] for tensor in batch.values())


def input_pipeline(corpus: panfoma_hf.Corpus, tokens_per_batch: int, batches: int) -> str:
    """Cells a second from the Arrow corpus to a model that costs nothing."""
    collator = DataCollatorForMaskedExpression(corpus.tokenizer, (0.15, 0.4))
    cells = EpochCells(corpus.dataset())
    batching = Batching(tokens_per_batch=tokens_per_batch, max_genes=collator.most_genes)
    rows = []
    for workers in (0, 1, 2):
        for name, source in (
            ("disk", None),
            ("stream", StreamedCells(corpus, CellChoice(min_genes_measured=0), batching)),
        ):
            if source is None:
                how = {"dataset": cells, "batch_sampler": BatchSchedule(cells.lengths, batching, batches + 10)}
            else:
                how = {"dataset": source, "batch_size": None}
            loader = iter(DataLoader(**how, collate_fn=collator, num_workers=workers))
            for batch in islice(loader, 10):  # workers start, the file cache fills
                fake_model(**batch)
            start, num_cells, num_tokens, positions = time.perf_counter(), 0, 0, 0
            for batch in islice(loader, batches):
                fake_model(**batch)
                num_cells += len(batch["input_ids"])
                num_tokens += int(batch["attention_mask"].sum())
                positions += batch["input_ids"].numel()
            seconds = time.perf_counter() - start
            rows.append([name, workers, num_cells / seconds, num_tokens / seconds, 100 * (1 - num_tokens / positions)])
    return table(["read from", "workers", "cells/s", "tokens/s", "padding %"], rows)


def training_steps(corpus: panfoma_hf.Corpus, sizes: list[str], tokens_per_batch: int, steps: int) -> str:
    """Speed of real steps, and what a pass over 3.5 million cells costs at it."""
    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            trainer = pretrain(
                corpus,
                folder,
                model=size,
                min_genes_measured=0,
                tokens_per_batch=tokens_per_batch,
                max_steps=steps + 2,
                logging_steps=2,
                eval_strategy="no",
                save_strategy="no",
                bf16=True,
                disable_tqdm=True,
            )
        lines = [line for line in trainer.state.log_history if "tokens_per_second" in line][1:]  # the first compiles
        tokens, utilisation = (
            np.mean([line[key] for line in lines]) for key in ("tokens_per_second", "flop_utilisation")
        )
        mean_length = corpus.manifest["totals"]["tokens"] / len(corpus)
        hours = CELLS * mean_length / tokens / 3600
        flops = CELLS * pretraining_flops(panfoma_hf.PanFoMaConfig.from_size(size), 1, round(mean_length))
        gpu = [flops / (H100_FLOPS * share) / 3600 for share in reversed(ASSUMED_UTILISATION)]
        rows.append(
            [
                size,
                tokens,
                tokens / mean_length,
                100 * utilisation,
                hours,
                flops / 1e18,
                f"{gpu[0]:.1f} to {gpu[1]:.1f}",
            ]
        )
    return table(
        [
            "model",
            "tokens/s",
            "cells/s",
            "% of a matrix product",
            "hours a pass here",
            "EFLOP a pass",
            "hours on an H100 (computed)",
        ],
        rows,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--sizes", nargs="+", default=["small", "base"])
    parser.add_argument("--tokens", type=int, default=4096, help="most genes of a batch of a real model")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batches", type=int, default=300, help="batches of the input pipeline")
    parser.add_argument("--report", type=Path, help="Markdown file with markers to write between")
    arguments = parser.parse_args()
    corpus = panfoma_hf.Corpus.open(arguments.corpus)
    text = f"The input pipeline, batches of 65,536 genes:\n\n{input_pipeline(corpus, 65_536, arguments.batches)}\n\n"
    text += f"Training steps, {arguments.tokens:,} genes a batch, bfloat16:\n\n"
    text += training_steps(corpus, arguments.sizes, arguments.tokens, arguments.steps) + "\n"
    print(text)
    if arguments.report:
        before, rest = arguments.report.read_text(encoding="utf-8").split(START)
        arguments.report.write_text(f"{before}{START}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
