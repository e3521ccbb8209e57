"""A model over cells: embeddings and names, in memory or file to file, and what the model says of genes."""

from .annotation import annotate, embed
from .genes import gene_embeddings, gene_scores
from .results import UNASSIGNED
from .streaming import FileReport, parts_folder


__all__ = ["UNASSIGNED", "FileReport", "annotate", "embed", "gene_embeddings", "gene_scores", "parts_folder"]
