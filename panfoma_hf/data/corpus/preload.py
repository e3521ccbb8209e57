"""Imported once, by the server that workers are forked off: libraries, kernels and gene table, which they share."""

import gc

import numpy as np
import scipy.sparse as sp

from ...tokenization import PanFoMaTokenizer
from ...tokenization.tokenization_panfoma import FEW_ENTRIES
from . import units  # noqa: F401 - what workers run


def _load_kernels() -> None:
    """Tokenize made-up cells, enough of them for the compiled kernels, as float32, which files hold most."""
    tokenizer = PanFoMaTokenizer()
    genes = tokenizer.convert_ids_to_tokens([1, 2, 3])
    cells = np.ones((FEW_ENTRIES // len(genes) + 1, len(genes)), dtype=np.float32)
    tokenizer.tokenize_cells(sp.csr_matrix(cells), tokenizer.resolve_genes(genes))


_load_kernels()
# The collector would write to the pages of all that was imported, and so copy them into every worker.
gc.collect()
gc.freeze()
