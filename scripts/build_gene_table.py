"""Build the tokenizer's gene table from HGNC's complete set.

    python scripts/build_gene_table.py hgnc_complete_set.txt.gz --date 2024-10-18

HGNC publishes the set at https://www.genenames.org/download/archive/ in the public domain (CC0). Protein-coding genes,
long non-coding RNAs, immunoglobulin and T-cell-receptor genes, and the RNA genes of the mitochondrion are the
vocabulary and get a token id; pseudogenes, small RNAs and the rest, which 3' counting hardly sees, are listed without
one, so that their names are recognised and never taken for another gene's alias. Rows are in the order of HGNC's
numbers, which only ever grow: token ids change little when the table is built anew. The same input gives the same
bytes.
"""

import argparse
import csv
import gzip
import io
from pathlib import Path


OUTPUT = Path(__file__).resolve().parent.parent / "panfoma_hf" / "tokenization" / "genes.tsv.gz"
COLUMNS = [
    "token_id",
    "hgnc_id",
    "symbol",
    "ensembl_id",
    "ncbi_gene_id",
    "locus_group",
    "previous_symbols",
    "alias_symbols",
]
LOCUS_GROUPS = {
    "gene with protein product": "protein-coding",
    "RNA, long non-coding": "lncRNA",
    "immunoglobulin gene": "immunoglobulin",
    "T cell receptor gene": "T-cell receptor",
}
MITOCHONDRIAL_RNA = {"RNA, transfer", "RNA, ribosomal"}


def locus_group(row: dict[str, str]) -> tuple[str, bool]:
    """The table's group of a gene of the complete set, and whether the group is part of the vocabulary."""
    locus_type = row["locus_type"]
    if row["location"] == "mitochondria" and locus_type in MITOCHONDRIAL_RNA:
        return "mitochondrial RNA", True
    if locus_type in LOCUS_GROUPS:
        return LOCUS_GROUPS[locus_type], True
    if "pseudogene" in locus_type:
        return "pseudogene", False
    return ("small RNA" if locus_type.startswith("RNA, ") else "other locus"), False


def select_genes(complete_set: Path) -> list[list[str]]:
    """Rows of the table, in the order of HGNC's numbers."""
    opener = gzip.open if complete_set.suffix == ".gz" else open
    with opener(complete_set, "rt", encoding="utf-8", newline="") as file:
        genes = [row for row in csv.DictReader(file, delimiter="\t") if row["status"] == "Approved"]
    rows, num_tokens = [], 0
    for gene in sorted(genes, key=lambda gene: int(gene["hgnc_id"].removeprefix("HGNC:"))):
        group, in_vocabulary = locus_group(gene)
        num_tokens += in_vocabulary
        rows.append(
            [
                str(num_tokens) if in_vocabulary else "",
                gene["hgnc_id"],
                gene["symbol"],
                gene["ensembl_gene_id"],
                gene["entrez_id"],
                group,
                gene["prev_symbol"],
                gene["alias_symbol"],
            ]
        )
    return rows


def write_table(rows: list[list[str]], date: str, output: Path) -> None:
    """Write the table with a first line that names the source, gzipped without a time stamp."""
    text = io.StringIO()
    text.write(f"# HGNC complete set of {date}, public domain (CC0), https://www.genenames.org\n")
    writer = csv.writer(text, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_NONE)
    writer.writerow(COLUMNS)
    writer.writerows(rows)
    output.write_bytes(gzip.compress(text.getvalue().encode("utf-8"), compresslevel=9, mtime=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("complete_set", type=Path, help="HGNC's complete set, a tab-separated file, gzipped or not")
    parser.add_argument("--date", required=True, help="the set's date, such as 2024-10-18; written into the table")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    rows = select_genes(arguments.complete_set)
    write_table(rows, arguments.date, arguments.output)
    num_tokens = sum(row[0] != "" for row in rows)
    size = arguments.output.stat().st_size / 1024
    print(f"{len(rows)} genes, {num_tokens} of them tokens, {size:.0f} KiB in {arguments.output}")


if __name__ == "__main__":
    main()
