"""How the gene names of many files resolve, as a table in Markdown.

    python scripts/report_gene_names.py FOLDER --report docs/gene-names.md

FOLDER holds files of cells of any format that `panfoma_hf.open_cells` reads; up to 2,048 cells of each, evenly spaced,
weigh the names.
"""

import argparse
from pathlib import Path

import numpy as np

import panfoma_hf
from panfoma_hf.tokenization.gene_names import (
    ADDED,
    ALIAS,
    AMBIGUOUS,
    APPROVED,
    CLONE,
    DATE,
    ENSEMBL,
    HGNC,
    NCBI,
    NOT_A_GENE,
    OUTSIDE,
    PREVIOUS,
    RULES,
    SPELLING,
    SUFFIX,
    UNKNOWN,
    UNKNOWN_ENSEMBL,
    GeneResolution,
)


ENOUGH = 0.97
GROUPS = {
    "symbol or id": (APPROVED, ADDED, ENSEMBL, HGNC, NCBI),
    "earlier symbol or alias": (PREVIOUS, ALIAS),
    "mended": (SPELLING, DATE, SUFFIX),
    "outside the vocabulary": (OUTSIDE,),
    "ids and clones without a gene of HGNC": (UNKNOWN_ENSEMBL, CLONE),
    "ambiguous": (AMBIGUOUS,),
    "unknown": (UNKNOWN,),
}


def resolved_file(path: Path, tokenizer: panfoma_hf.PanFoMaTokenizer) -> GeneResolution:
    with panfoma_hf.open_cells(path, tokenizer) as cells:
        return panfoma_hf.read_expression(cells, tokenizer, min_coverage=0).resolution


def row(path: Path, genes: GeneResolution) -> str:
    total = genes.counts[genes.rule != NOT_A_GENE].sum()
    shares = [genes.counts[np.isin(genes.rule, rules)].sum() / total for rules in GROUPS.values()]
    cells = [path.stem, f"{genes.num_resolved:,} of {len(genes):,}", f"**{genes.coverage:.2%}**"]
    return "| " + " | ".join([*cells, *(f"{share:.2%}" for share in shares)]) + " |"


def explanation(path: Path, genes: GeneResolution) -> str:
    """What the counts are that no gene of the vocabulary covers."""
    total = genes.counts[genes.rule != NOT_A_GENE].sum()
    lines = []
    for rule in (OUTSIDE, UNKNOWN_ENSEMBL, CLONE, AMBIGUOUS, UNKNOWN):
        columns = np.flatnonzero(genes.rule == rule)
        share = genes.counts[columns].sum() / total
        if share < 0.001:
            continue
        largest = columns[np.argsort(-genes.counts[columns], kind="stable")[:4]]
        shown = ", ".join(str(genes.symbols[column] or genes.names[column]) for column in largest)
        lines.append(f"{share:.2%} {rule} ({len(columns):,} names: {shown}{', ...' if len(columns) > 4 else ''})")
    return f"- `{path.stem}`, {genes.coverage:.2%} covered: {'; '.join(lines)}."


def report(folder: Path) -> str:
    """The whole page."""
    tokenizer = panfoma_hf.PanFoMaTokenizer()
    files = sorted(path for path in folder.iterdir() if path.suffix in (".h5ad", ".zarr", ".loom", ".h5"))
    resolved = {path: resolved_file(path, tokenizer) for path in files}
    headings = ["file", "names resolved", "counts covered", *GROUPS]
    rows = [row(path, genes) for path, genes in resolved.items()]
    low = [explanation(path, genes) for path, genes in resolved.items() if genes.coverage < ENOUGH]
    table = "\n".join(["| " + " | ".join(headings) + " |", "| --- " * len(headings) + "|", *rows])
    enough = len(resolved) - len(low)
    low = "\n".join([". What the rest is in the others:\n", *low]) if low else "."
    rules = "\n".join(f"| {rule} | {meaning} |" for rule, meaning in RULES.items())
    return PAGE.format(
        source=tokenizer.gene_table_source,
        table=table,
        low=low,
        enough=enough,
        all=len(resolved),
        rules=rules,
    )


PAGE = """# Gene names

Written by `python scripts/report_gene_names.py FOLDER --report docs/gene-names.md`.
The gene table: {source}.

`tokenizer.resolve_genes(names)` takes each name for a gene by the first of these rules that fits, or says why not:

| rule | meaning |
| --- | --- |
{rules}

White space, quotes and genome prefixes (`GRCh38_`, `hg19-`) are taken off before. A previous symbol comes before
another gene's alias, as count files are written with what was approved at their time. What `make_unique` appended is
taken off where the name without it is in the file too, or is an approved symbol or an id. Further columns of names,
such as ids beside symbols, are asked for what the first leaves open.

## How files resolve

Share of the counts (of the genes; antibodies, spike-ins and the like are left out) by what their names resolved to;
up to 2,048 cells of each file, evenly spaced.

{table}

{enough} of {all} files reach 97 %{low}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--report", type=Path, help="write the page to this Markdown file; printed otherwise")
    arguments = parser.parse_args()
    page = report(arguments.folder)
    if arguments.report:
        arguments.report.write_text(page, encoding="utf-8")
    else:
        print(page)


if __name__ == "__main__":
    main()
