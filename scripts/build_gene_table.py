"""Build the tokenizer's gene table from HGNC's complete set.

    python scripts/build_gene_table.py hgnc_complete_set.txt.gz --date 2024-10-18

HGNC publishes the set at https://www.genenames.org/download/archive/ in the public domain (CC0). The table keeps
protein-coding genes, long non-coding RNAs, immunoglobulin and T-cell-receptor genes, and the RNA genes of the
mitochondrion; pseudogenes and small RNAs are left out, as 3' counting hardly sees them. Rows are in the order of
HGNC's numbers, which only ever grow: token ids change little when the table is built anew. The same input gives the
same bytes.
"""

import argparse
import csv
import gzip
import io
from pathlib import Path


OUTPUT = Path(__file__).resolve().parent.parent / "panfoma_hf" / "tokenization" / "genes.tsv.gz"
COLUMNS = ["hgnc_id", "symbol", "ensembl_id", "ncbi_gene_id", "locus_group", "previous_symbols", "alias_symbols"]
LOCUS_GROUPS = {
    "gene with protein product": "protein-coding",
    "RNA, long non-coding": "lncRNA",
    "immunoglobulin gene": "immunoglobulin",
    "T cell receptor gene": "T-cell receptor",
}
MITOCHONDRIAL_RNA = {"RNA, transfer", "RNA, ribosomal"}


def locus_group(row: dict[str, str]) -> str | None:
    """The table's group of a gene of the complete set, or None where the table leaves it out."""
    if row["location"] == "mitochondria" and row["locus_type"] in MITOCHONDRIAL_RNA:
        return "mitochondrial RNA"
    return LOCUS_GROUPS.get(row["locus_type"])


def select_genes(complete_set: Path) -> list[list[str]]:
    """Rows of the table, in the order of HGNC's numbers."""
    opener = gzip.open if complete_set.suffix == ".gz" else open
    with opener(complete_set, "rt", encoding="utf-8", newline="") as file:
        genes = [row for row in csv.DictReader(file, delimiter="\t") if row["status"] == "Approved"]
    rows = [
        [
            row["hgnc_id"],
            row["symbol"],
            row["ensembl_gene_id"],
            row["entrez_id"],
            locus_group(row),
            row["prev_symbol"],
            row["alias_symbol"],
        ]
        for row in genes
        if locus_group(row)
    ]
    return sorted(rows, key=lambda row: int(row[0].removeprefix("HGNC:")))


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
    print(f"{len(rows)} genes, {arguments.output.stat().st_size / 1024:.0f} KiB in {arguments.output}")


if __name__ == "__main__":
    main()
