"""What is in a file of cells, whether PanFoMa can read it, and what to do where it cannot: `panfoma check`."""

import re
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
from transformers.utils import logging

from .data.cell_file import CellFile
from .data.cells import (
    MIN_COVERAGE,
    SAMPLE_CELLS,
    check_genes,
    check_scale,
    look_at_matrices,
    resolve_columns,
    source_of,
    weigh,
)
from .data.readers import open_cells
from .data.storage import CompressedColumns, sample_of
from .tokenization import CellTokens, GeneResolution, PanFoMaTokenizer, ValueScale


logger = logging.get_logger(__name__)

# Cells with fewer genes, or a larger share of mitochondrial counts, are commonly left out as damaged or empty (Luecken
# and Theis, Molecular Systems Biology 2019; both depend on tissue and assay).
MIN_GENES = 200
MAX_MITOCHONDRIAL = 0.2
# A droplet with fewer genes holds no cell.
EMPTY_GENES = 10
# Below this share of a checkpoint's gene set its scores do not carry over.
MIN_GENE_SET = 0.5
# Columns of obs by what they hold, the first that fits; names without case and separators.
ROLES = {
    "cell type": r"cell(type|label|ontology|line|identity)|annotation|bulklabels|^labels?$|^ident$|leiden|louvain",
    "disease": r"cancer|tumou?r|malignan|disease|diagnosis|condition|status",
    "donor": r"donor|patient|individual|subject",
    "batch": r"batch|sample|library|lane|plate|dataset|study|origident|channel|chemistry|assay|platform|protocol",
    "tissue": r"tissue|organ|site",
}
MAX_DISTINCT = 1000


@dataclass
class CheckReport:
    """What `check` found; print it, or take `to_dict`.

    Parameters
    ----------
    path
        The file.
    facts
        Numbers and names by subject, as JSON can hold them.
    problems
        What keeps the file from being read as it should, each with its remedy.
    notes
        What is worth knowing and keeps nothing from working.
    genes
        The resolution of the gene names, where there is a matrix.
    """

    path: str
    facts: dict = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    genes: GeneResolution | None = None

    @property
    def is_ready(self) -> bool:
        """Whether nothing needs to be done."""
        return not self.problems

    def to_dict(self) -> dict:
        """The report as what JSON can hold."""
        genes = {} if self.genes is None else {"gene_names": self.genes.to_dict()}
        return {
            "path": self.path,
            "ready": self.is_ready,
            "problems": self.problems,
            "notes": self.notes,
            **self.facts,
            **genes,
        }

    def __str__(self) -> str:
        lines = [self.path]
        lines += [f"{subject:<12}{_shown(fact)}" for subject, fact in self.facts.items()]
        if self.genes is not None:
            lines += ["", *str(self.genes).splitlines()]
        lines += ["", *(f"note: {note}" for note in self.notes)] if self.notes else []
        if self.is_ready:
            return "\n".join([*lines, "", "ready"])
        todo = [f"{number}. {problem}" for number, problem in enumerate(self.problems, start=1)]
        return "\n".join([*lines, "", "not ready:", *todo])


def _shown(fact) -> str:
    if isinstance(fact, dict):
        return "; ".join(f"{key.replace('_', ' ')} {_shown(value)}" for key, value in fact.items())
    if isinstance(fact, bool) or not isinstance(fact, int | float):
        return str(fact)
    return f"{fact:,.0f}" if isinstance(fact, int) or fact >= 100 else f"{fact:.2g}"


def check(
    path: str | Path,
    model: str | Path | None = None,
    *,
    layer: str | None = None,
    gene_column: str | None = None,
    min_coverage: float = MIN_COVERAGE,
) -> CheckReport:
    """Look at a file of cells before a model reads it.

    Cells are sampled, evenly spaced, where there are more than 2,048: what is said of all cells by their number
    (barcodes, columns, genes) is exact, what is said of expression is of the sample.

    Parameters
    ----------
    path
        A file of any format that `panfoma_hf.open_cells` reads.
    model
        A checkpoint, whose genes are looked for and whose time on this machine is measured; or None.
    layer, gene_column, min_coverage
        As in `panfoma_hf.annotate`.
    """
    report = CheckReport(str(path))
    try:
        tokenizer = _tokenizer_of(model)
        with open_cells(path, tokenizer) as cells:
            report.notes += cells.notes
            _describe_file(report, path, cells)
            _describe_expression(report, cells, tokenizer, model, layer, gene_column, min_coverage)
    except (OSError, ValueError) as error:
        report.problems.append(str(error))
    return report


def _tokenizer_of(model) -> PanFoMaTokenizer:
    if model is None:
        return PanFoMaTokenizer()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def _describe_file(report: CheckReport, path: str | Path, cells: CellFile) -> None:
    path = Path(path)
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    report.facts["format"] = f"{cells.format}, {sum(file.stat().st_size for file in files) / 2**20:,.1f} MiB"
    report.facts["cells"] = len(cells.obs)
    for role, columns in _columns_by_role(cells.obs).items():
        report.facts[role] = columns


def _columns_by_role(obs: pd.DataFrame) -> dict[str, dict[str, str]]:
    """Columns of ``obs`` that may hold labels, by what they seem to hold, with the number of their names."""
    found = {}
    for column in obs:
        name = re.sub(r"[^a-z0-9]", "", str(column).lower())
        role = next((role for role, pattern in ROLES.items() if re.search(pattern, name)), None)
        if role is None or name.startswith("panfoma") or obs[column].dtype.kind == "f":
            continue
        distinct, missing = obs[column].nunique(), int(obs[column].isna().sum())
        if 1 <= distinct <= min(MAX_DISTINCT, max(len(obs) // 2, 1)):
            shown = ", ".join(map(str, obs[column].value_counts().index[:3]))
            more = f", {missing:,} missing" if missing else ""
            found.setdefault(role, {})[str(column)] = f"({distinct:,}: {shown}{', ...' if distinct > 3 else ''}{more})"
    return found


def _describe_expression(report, cells, tokenizer, model, layer, gene_column, min_coverage) -> None:
    looked = look_at_matrices(cells, layer)
    sample, scale, rows = looked.sample, looked.scale, cells.matrices[looked.layer].rows
    report.facts["matrices"] = {source_of(key): str(scale) for key, scale in looked.scales.items()}
    try:
        check_scale(cells, looked, is_named=layer is not None)
        report.facts["expression"] = f"{source_of(looked.layer)}, {scale}"
    except ValueError as error:
        report.problems.append(str(error))
    report.facts["looked at"] = (
        "all cells" if sample.shape[0] == len(cells.obs) else f"{sample.shape[0]:,} cells, evenly spaced"
    )
    report.genes = weigh(resolve_columns(cells.matrices[looked.layer], tokenizer, gene_column), sample, scale)
    report.facts["genes"] = len(report.genes)
    report.facts["ids"] = dict(report.genes.kinds)
    report.facts["species"] = report.genes.species or "human"
    try:
        check_genes(cells, report.genes, sample, tokenizer, min_coverage)
    except ValueError as error:
        report.problems.append(str(error))
    if report.problems or not report.genes.num_resolved:
        return
    tokens = tokenizer.tokenize_cells(sample, report.genes, max_length=tokenizer.model_max_length, scale=scale)
    if not isinstance(rows, CompressedColumns):  # of which a sample costs as much as the whole
        started = time.perf_counter()  # once more, now that what is compiled has been loaded
        sample_of(rows, SAMPLE_CELLS)
        tokenizer.tokenize_cells(sample, report.genes, max_length=tokenizer.model_max_length, scale=scale)
        rate = sample.shape[0] / (time.perf_counter() - started)
        report.facts["reading"] = (
            f"{rate:,.0f} cells/s from file to tokens, {_shown(len(cells.obs) / rate)} s for all cells"
        )
    _describe_cells(report, sample, scale, tokens, tokenizer)
    if model is not None:
        _describe_model(report, model, tokenizer, tokens, len(cells.obs))


def _describe_cells(report, sample: sp.csr_matrix, scale: ValueScale, tokens: CellTokens, tokenizer) -> None:
    is_mitochondrial = np.array([symbol.startswith("MT-") for symbol in report.genes.symbols])
    values = sample.copy()
    if scale.log_base is not None:
        values.data = np.expm1(values.data * np.log(scale.log_base))
    total = np.asarray(values.sum(axis=1)).ravel()
    mitochondrial = np.asarray(values[:, np.flatnonzero(is_mitochondrial)].sum(axis=1)).ravel() / np.maximum(
        total, 1e-12
    )
    genes = np.diff(sample.indptr)
    if is_mitochondrial.any():
        too_many = int((mitochondrial > MAX_MITOCHONDRIAL).sum())
        quality = {f"above_{MAX_MITOCHONDRIAL:.0%}_mitochondrial": too_many}
    else:
        quality = {"mitochondrial_genes": "none"}
    report.facts["quality"] = {
        "median_genes": int(np.median(genes)),
        "median_total": round(float(np.median(total))),
        f"below_{MIN_GENES}_genes": int((genes < MIN_GENES).sum()),
        "without_a_known_gene": int((tokens.lengths == 0).sum()),
        **quality,
    }
    longest = tokenizer.model_max_length
    report.facts["length"] = {
        "median": int(np.median(tokens.lengths)),
        "longest": int(tokens.lengths.max()),
        f"at_the_limit_of_{longest:,}": int((tokens.lengths == longest).sum()),
    }
    if (genes < EMPTY_GENES).mean() > 0.5:
        report.problems.append(
            f"Most barcodes must be cells, got fewer than {EMPTY_GENES} genes in {(genes < EMPTY_GENES).mean():.0%} of "
            "them. This looks like the matrix of all droplets: take the filtered one, or call cells first."
        )
    elif (tokens.lengths == 0).any():
        report.notes.append("cells without a known gene will be called Unassigned")
    if report.genes.ambiguous:
        report.notes.append("counts of ambiguous names are left out; rename these genes to read them")
    kinds = [kind for kind, count in report.genes.kinds.items() if count > 0.05 * len(report.genes) and kind != "other"]
    if len(kinds) > 1:
        report.notes.append(f"gene names are of several kinds ({', '.join(kinds)}); each is resolved by itself")


def _describe_model(report, model, tokenizer, tokens: CellTokens, num_cells: int) -> None:
    """Measure the model's time on some of the cells, and look for the genes that it was fine-tuned on."""
    if tokenizer.gene_set:
        found = np.isin(tokenizer.gene_set, report.genes.symbols).mean()
        report.facts["gene set"] = f"{found:.1%} of the checkpoint's {len(tokenizer.gene_set):,} genes are in the file"
        if found < MIN_GENE_SET:
            report.problems.append(
                f"At least {MIN_GENE_SET:.0%} of the genes that {model} was fine-tuned on must be in the file, got "
                f"{found:.1%}. Take a checkpoint that was trained on such a panel, or fine-tune one on these genes."
            )
    import torch
    from transformers import AutoModel

    from .data.collator import DataCollatorForCells

    body = AutoModel.from_pretrained(model).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    collate = DataCollatorForCells(tokenizer, random=False)
    filled = np.flatnonzero(tokens.lengths)
    if not len(filled):
        return
    batches = np.array_split(filled[np.argsort(-tokens.lengths[filled], kind="stable")], max(1, len(filled) // 16))
    timed, seconds = 0, 0.0
    with torch.inference_mode():
        for place in np.random.default_rng(0).permutation(len(batches)):
            batch = collate([tokens.cell(index) for index in batches[place]])
            batch = {key: tensor.to(body.device) for key, tensor in batch.items()}
            if not timed:  # kernels are compiled or read from their cache
                body(**batch)
            started = time.perf_counter()
            body(**batch).pooler_output.sum().item()
            seconds += time.perf_counter() - started
            timed += len(batches[place])
            if seconds > 2:
                break
    report.facts["time"] = {
        "model_cells_per_s": timed / seconds,
        "minutes_for_all_cells": num_cells * seconds / timed / 60,
        "device": str(body.device),
    }
