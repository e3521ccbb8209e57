# Copyright 2026 The PanFoMa-HF authors. Licensed under the Apache License, Version 2.0.
"""PanFoMa tokenizer: the expressed genes of a cell become gene ids and within-cell expression bins.

A token is one gene with its bin. The tokenizer is a pure function: the same cell always gives the same tokens,
whatever else is in its file. What is random in training is drawn by the data collator.
"""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import BatchEncoding, PreTrainedTokenizer
from transformers.utils import logging

from .expression import bin_cells as plain_bin_cells
from .expression import check_genes, choose_matrix, compressed_rows, examples, is_anndata
from .gene_names import GeneResolution, gene_table
from .value_scale import ValueScale, log_bases


logger = logging.get_logger(__name__)

GENES_FILE = "genes.tsv.gz"
# Numba takes half a second to import; NumPy is done with so many entries by then.
FEW_ENTRIES = 2**18
# Keys of an encoding that have one value a gene, and their dtypes in padded arrays.
_SEQUENCE_KEYS = ("input_ids", "expression_bins", "attention_mask")


# ----------------------------------------------------------------------------------------------------------------------
# Results
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CellTokens:
    """Tokens of many cells, one cell after the other as in a CSR matrix.

    Parameters
    ----------
    input_ids
        (tokens,) int32, gene ids.
    expression_bins
        (tokens,) uint8 or int32, bins from 1 up.
    indptr
        (cells + 1,) int64; cell ``i`` owns the tokens from ``indptr[i]`` to ``indptr[i + 1]``.
    """

    input_ids: np.ndarray
    expression_bins: np.ndarray
    indptr: np.ndarray

    def __len__(self) -> int:
        return len(self.indptr) - 1

    @property
    def lengths(self) -> np.ndarray:
        """(cells,), tokens of each cell; 0 for a cell without an expressed gene."""
        return np.diff(self.indptr)

    @classmethod
    def concatenate(cls, parts: Sequence["CellTokens"]) -> "CellTokens":
        """The cells of several, at least one, one after the other."""
        lengths = np.concatenate([part.lengths for part in parts])
        return cls(
            input_ids=np.concatenate([part.input_ids for part in parts]),
            expression_bins=np.concatenate([part.expression_bins for part in parts]),
            indptr=np.append(0, np.cumsum(lengths)),
        )

    def cell(self, index: int) -> dict[str, np.ndarray]:
        """``input_ids`` and ``expression_bins`` of one cell."""
        owned = slice(self.indptr[index], self.indptr[index + 1])
        return {"input_ids": self.input_ids[owned], "expression_bins": self.expression_bins[owned]}


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer
# ----------------------------------------------------------------------------------------------------------------------


class PanFoMaTokenizer(PreTrainedTokenizer):
    """Counts to gene ids and expression bins, and back to gene symbols.

    Parameters
    ----------
    genes_file
        The gene table, tab-separated and gzipped; None opens the packaged one (HGNC). Checkpoints carry their own.
    gene_set
        Names of genes to restrict every cell to, such as the variable genes of a fine-tune's training cells; saved
        with the tokenizer. None reads all genes of the table.
    num_expression_bins
        Bins for non-zero expression, as in the model's configuration.
    model_max_length
        Genes of a cell that are kept; the others are dropped in a fixed pseudo-random order, never by expression.
    genes_sha256
        Checksum of the gene table that a saved tokenizer was made with; checked when it is loaded.

    Raises
    ------
    ValueError
        If the gene table is missing or another than the saved tokenizer's, or the gene set has unknown names.

    Examples
    --------
    >>> tokenizer = PanFoMaTokenizer()
    >>> cells = tokenizer([[5, 0, 2]], gene_names=["CD3E", "MS4A1", "ENSG00000153563.15"])
    >>> tokenizer.decode(cells["input_ids"][0])
    'CD3E CD8A'
    """

    vocab_files_names = {"genes_file": GENES_FILE}
    model_input_names = list(_SEQUENCE_KEYS)

    def __init__(
        self,
        genes_file: str | None = None,
        gene_set: Sequence[str] | None = None,
        num_expression_bins: int = 50,
        model_max_length: int = 3072,
        genes_sha256: str | None = None,
        pad_token: str = "[PAD]",
        **kwargs,
    ):
        if not isinstance(num_expression_bins, int) or num_expression_bins < 1:
            raise ValueError(
                f"`num_expression_bins` must be a positive integer, got {num_expression_bins!r}. "
                "Use that of the model's configuration."
            )
        if kwargs.get("padding_side", "right") != "right":
            raise ValueError(
                f"Padding must be on the right, got {kwargs['padding_side']!r}: a cell's chunks are cut from its "
                "start. Leave `padding_side` out."
            )
        self._genes_bytes = _read_genes_file(genes_file, genes_sha256)
        self._genes = gene_table(self._genes_bytes)
        self._id_of_symbol = {symbol: token_id for token_id, symbol in enumerate(self._genes.symbols, start=1)}
        self._pad_symbol = str(pad_token)
        self.num_expression_bins = num_expression_bins
        self.genes_sha256 = hashlib.sha256(self._genes_bytes).hexdigest()
        # What this call names and the base class keeps in `init_kwargs` is what save_pretrained writes.
        super().__init__(
            gene_set=None,
            num_expression_bins=num_expression_bins,
            model_max_length=model_max_length,
            genes_sha256=self.genes_sha256,
            pad_token=pad_token,
            **kwargs,
        )
        self.gene_set = gene_set

    # -- vocabulary ------------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Padding and the genes of the table, without added tokens; ``len(tokenizer)`` counts those too."""
        return 1 + len(self._genes.symbols)

    def get_vocab(self) -> dict[str, int]:
        """Approved symbols, padding and added tokens, with their ids."""
        return {self._pad_symbol: 0, **self._id_of_symbol, **self.get_added_vocab()}

    def _convert_token_to_id(self, token: str) -> int | None:
        return 0 if token == self._pad_symbol else self._id_of_symbol.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        if not 0 <= index < self.vocab_size:
            raise ValueError(
                f"Gene ids are 0 to {len(self) - 1:,}, got {index}. Decode `input_ids`, not labels or bins."
            )
        return self._pad_symbol if index == 0 else self._genes.symbols[index - 1]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Gene symbols, separated by a space."""
        return " ".join(tokens)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write the gene table beside the tokenizer's configuration."""
        name = f"{filename_prefix}-{GENES_FILE}" if filename_prefix else GENES_FILE
        path = Path(save_directory) / name
        path.write_bytes(self._genes_bytes)
        return (str(path),)

    @property
    def mask_bin_id(self) -> int:
        """Bin id that hides a gene's expression."""
        return self.num_expression_bins + 1

    @property
    def pad_bin_id(self) -> int:
        """Bin id of padding."""
        return self.num_expression_bins + 2

    @property
    def gene_set(self) -> list[str] | None:
        """Symbols of the genes that cells are restricted to, or None for all; settable."""
        return self._gene_set

    @gene_set.setter
    def gene_set(self, names: Sequence[str] | None) -> None:
        if names is None:
            self._gene_set = None
            return
        resolution = self.resolve_genes(names)
        unknown = resolution.names[resolution.token_ids < 0]
        if len(unknown) or not len(resolution.names):
            raise ValueError(
                f"A gene set must hold at least one name, all of them known, got {len(resolution.names):,} names of "
                f"which {len(unknown):,} are unknown{examples(unknown)}. Keep those that "
                "`tokenizer.resolve_genes(names)` resolves."
            )
        self._gene_set = self.convert_ids_to_tokens(np.unique(resolution.token_ids).tolist())

    # -- genes -----------------------------------------------------------------------------------------------------

    @property
    def gene_table_source(self) -> str:
        """Where the gene table comes from, with its date."""
        return self._genes.source

    def resolve_genes(self, names: Sequence[str], counts: np.ndarray | None = None) -> GeneResolution:
        """Find the gene that each name stands for.

        In this order: tokens that were added; HGNC's approved, previous and alias symbols; Ensembl ids with or without
        version, HGNC ids, NCBI Gene ids; symbols in another case or with other separators; symbols that a spreadsheet
        took for dates; symbols with a number that ``make_unique`` appended. White space, quotes and genome prefixes
        are taken off first. A name of several genes is reported as ambiguous, not guessed.

        Parameters
        ----------
        names
            (genes,), such as ``adata.var_names``.
        counts
            (genes,), each column's sum over cells, for the share of counts that is covered; or None.

        Returns
        -------
        The token id and the rule for each name; print it for a table.
        """
        if isinstance(names, str):
            raise TypeError(f"Gene names must be a list, got the string {names!r}. Put it into a list.")
        names = np.asarray(names, dtype=object)
        if names.ndim != 1:
            raise ValueError(f"Gene names must be one list, got {names.ndim} dimensions. Flatten them.")
        resolution = self._genes.resolve(names, self.get_added_vocab())
        return resolution if counts is None else resolution.with_counts(counts)

    # -- cells -----------------------------------------------------------------------------------------------------

    def tokenize_cells(
        self,
        cells,
        gene_names: Sequence[str] | GeneResolution | None = None,
        *,
        layer: str | None = None,
        gene_column: str | None = None,
        max_length: int | None = None,
        min_coverage: float = 0.0,
        scale: ValueScale | None = None,
    ) -> CellTokens:
        """Tokenize many cells into flat arrays; what a data set or a file of any size is built from.

        Each cell is restricted to the genes of the vocabulary, or of ``gene_set``, before its values are ranked, so
        its tokens do not depend on which other genes its file has. Columns of the same gene are added up.

        Parameters
        ----------
        cells, gene_names, layer, gene_column
            As in calling the tokenizer; ``gene_names`` may also be what `resolve_genes` returned.
        max_length
            Genes of a cell that are kept, in the fixed pseudo-random order; None keeps all.
        min_coverage
            Share of the counts that must fall on genes of the vocabulary; less is an error.
        scale
            What the values are, which matters where columns of one gene are added up: logarithms are added up as what
            they were taken of. None tells it for each cell by its own values.

        Raises
        ------
        ValueError, TypeError
            As in calling the tokenizer.
        """
        matrix, names, source = self._matrix_and_names(cells, gene_names, layer, gene_column)
        resolution = names if isinstance(names, GeneResolution) else self.resolve_genes(names)
        indptr, genes, values = compressed_rows(matrix, source)
        if min_coverage:
            check_genes(genes, len(resolution))
            resolution = resolution.with_counts(np.bincount(genes, np.nan_to_num(values), minlength=len(resolution)))
        resolution.require(min_coverage, source)
        bin_cells = _compiled_bin_cells() if len(values) > FEW_ENTRIES else plain_bin_cells
        try:
            tokens, bins, lengths = bin_cells(
                indptr,
                genes,
                values,
                self._usable_tokens(resolution),
                len(self),
                self.num_expression_bins,
                max_length,
                log_scales=self._log_scales(indptr, values, scale) if resolution.duplicates else None,
            )
        except ValueError as error:
            raise ValueError(str(error).replace("the matrix", source, 1)) from None
        return CellTokens(input_ids=tokens, expression_bins=bins, indptr=np.append(0, np.cumsum(lengths)))

    @staticmethod
    def _log_scales(indptr: np.ndarray, values: np.ndarray, scale: ValueScale | None) -> np.ndarray | None:
        """What a cell's values are multiplied with before expm1 undoes their logarithm; None where there is none."""
        if scale is not None:
            return None if scale.log_base is None else np.full(len(indptr) - 1, np.log(scale.log_base))
        if values.dtype.kind in "biu" or (values == np.rint(values)).all():
            return None
        return np.nan_to_num(np.log(log_bases(indptr, np.where(np.isfinite(values), values, 0))))

    def _matrix_and_names(self, cells, gene_names, layer, gene_column):
        """The (cells, genes) matrix, its gene names or their resolution, and what to call it in an error."""
        if isinstance(cells, (str, bytes)) or (isinstance(cells, Sequence) and cells and isinstance(cells[0], str)):
            raise TypeError(
                "PanFoMaTokenizer reads expression, not text, got a string. "
                "Pass a (cells, genes) matrix with `gene_names`, or an AnnData."
            )
        if is_anndata(cells):
            matrix, names, source = choose_matrix(cells, layer, gene_column)
            if layer is None:
                logger.warning_once(f"Expression is read from {source}; pass `layer` to choose another matrix.")
            names = names if gene_names is None else gene_names
        elif layer is not None or gene_column is not None:
            raise ValueError(
                f"`layer` and `gene_column` belong to an AnnData, got {type(cells).__name__}. Leave them out."
            )
        else:
            matrix, names, source = cells, gene_names, "the matrix"
            if hasattr(cells, "columns") and hasattr(cells, "to_numpy"):  # a data frame
                matrix = cells.to_numpy(dtype=np.float64, na_value=np.nan)
                names = list(cells.columns) if gene_names is None else gene_names
            elif hasattr(cells, "detach"):  # a tensor, on whatever device and of whatever dtype
                matrix = cells.detach().double().cpu().numpy()
            elif not hasattr(cells, "tocsr"):
                matrix = np.asarray(cells)
        if names is None:
            raise ValueError(
                "A matrix needs `gene_names`, one name for each column, got None. "
                "Pass them, or pass an AnnData or a data frame that carries them."
            )
        if getattr(matrix, "ndim", 2) == 1:
            matrix = matrix[None] if isinstance(matrix, np.ndarray) else matrix.reshape(1, -1)
        num_names = len(names.names) if isinstance(names, GeneResolution) else len(names)
        if matrix.shape[-1] != num_names:
            hint = (
                "The matrix has genes in rows: transpose it." if matrix.shape[0] == num_names else "Pass both as one."
            )
            raise ValueError(
                f"`gene_names` must have one name for each column of {source}, got {num_names:,} names for "
                f"{matrix.shape[-1]:,} columns. {hint}"
            )
        return matrix, names, source

    def _usable_tokens(self, resolution: GeneResolution) -> np.ndarray:
        """Token id of each column, -1 where it is unknown or outside the gene set; at least one is known."""
        tokens = resolution.token_ids
        if self._gene_set is not None:
            tokens = np.where(np.isin(tokens, self.convert_tokens_to_ids(self._gene_set)), tokens, -1)
        if not (tokens >= 0).any():
            among = "the vocabulary" if self._gene_set is None else f"the {len(self._gene_set):,} genes of the gene set"
            raise ValueError(
                f"At least one gene must be among {among}, got none of {len(tokens):,}{examples(resolution.names)}. "
                "Pass HGNC symbols or human Ensembl ids as `gene_names` or `var_names`, or name the column of var that "
                "has them with `gene_column`."
            )
        return tokens

    def __call__(
        self,
        cells,
        gene_names: Sequence[str] | GeneResolution | None = None,
        *,
        layer: str | None = None,
        gene_column: str | None = None,
        padding: bool | str = False,
        truncation: bool = True,
        max_length: int | None = None,
        min_coverage: float = 0.0,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool = True,
        return_length: bool = False,
    ) -> BatchEncoding:
        """Tokenize one cell or many.

        Parameters
        ----------
        cells
            (cells, genes) or one cell's (genes,): dense, sparse or a data frame; or an AnnData. Non-negative, in any
            scale that keeps a cell's order: counts, CPM and log1p(CPM) give the same tokens.
        gene_names
            (genes,), names that `resolve_genes` reads; an AnnData or a data frame brings its own.
        layer, gene_column
            An AnnData's layer (or "X", "raw") and the column of ``var`` with gene names. By default the counts are
            looked for in ``layers["counts"]``, ``raw.X`` and ``X``, and ``var_names`` are read.
        padding
            False, True or "longest", or "max_length".
        truncation
            Whether a cell keeps ``max_length`` genes at most, in a fixed pseudo-random order of genes. True unless
            said otherwise, as the model is trained on such cells.
        max_length
            None takes ``model_max_length``.
        min_coverage
            Share of the counts that must fall on genes of the vocabulary; less is an error.
        pad_to_multiple_of
            Pad to a multiple of this length.
        return_tensors
            "pt" or "np"; None returns lists.
        return_attention_mask, return_length
            Whether to return them.

        Returns
        -------
        ``input_ids``, ``expression_bins`` and ``attention_mask``, (cells, seq) each; for one cell given as a vector and
        without ``return_tensors``, (seq,). A cell without an expressed gene is all padding, and a warning says so.

        Raises
        ------
        ValueError
            If a value is negative, NaN or infinite, the gene names do not fit the matrix, too few are known, or most
            are of another species.
        TypeError
            If the expression is not numeric.
        """
        max_length = self.model_max_length if max_length is None else max_length
        if max_length < 1:
            raise ValueError(
                f"`max_length` must be at least 1, got {max_length}. Leave it out to take model_max_length."
            )
        if not isinstance(truncation, bool):
            raise ValueError(f"`truncation` must be True or False, got {truncation!r}. There is one way to truncate.")
        tokens = self.tokenize_cells(
            cells,
            gene_names,
            layer=layer,
            gene_column=gene_column,
            max_length=max_length if truncation else None,
            min_coverage=min_coverage,
        )
        warn_of_empty_cells(tokens.lengths)
        batch = [tokens.cell(index) for index in range(len(tokens))]
        encoding = {key: [cell[key].tolist() for cell in batch] for key in ("input_ids", "expression_bins")}
        if return_attention_mask:
            encoding["attention_mask"] = [[1] * length for length in tokens.lengths.tolist()]
        if return_length:
            encoding["length"] = tokens.lengths.tolist()
        encoding = self.pad(
            encoding,
            padding=padding,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            return_attention_mask=return_attention_mask,
            return_tensors=return_tensors,
        )
        is_single = not is_anndata(cells) and np.ndim(cells) == 1
        if is_single and return_tensors is None:
            encoding = BatchEncoding({key: values[0] for key, values in encoding.items()})
        return encoding

    def pad(
        self,
        encoded_inputs: Mapping | Sequence[Mapping],
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Pad encoded cells to one length, with the [PAD] gene and the [PAD] bin, on the right.

        Parameters
        ----------
        encoded_inputs
            One encoding, a list of encodings (as a data loader gives), or a batch; lists or arrays.
        padding
            True or "longest", "max_length", or False.
        max_length
            Length for "max_length"; None takes ``model_max_length``.
        pad_to_multiple_of
            Round the length up to a multiple of this.
        padding_side
            "right" or None.
        return_attention_mask
            None returns it.
        return_tensors
            "pt" or "np"; None returns lists.
        verbose
            Of no effect; other tokenizers take it.

        Returns
        -------
        The encoding with ``input_ids``, ``expression_bins`` and ``attention_mask`` padded, at least one position long,
        and whatever else the inputs had, as it was.

        Raises
        ------
        ValueError
            If the inputs have no gene ids, or a cell is longer than the length to pad to.
        """
        if padding_side not in (None, "right"):
            raise ValueError(f"Padding must be on the right, got {padding_side!r}. Leave `padding_side` out.")
        if not isinstance(encoded_inputs, Mapping):
            if not len(encoded_inputs):
                raise ValueError("At least one cell is needed to make a batch, got none. Leave empty batches out.")
            encoded_inputs = {key: [cell[key] for cell in encoded_inputs] for key in encoded_inputs[0]}
        batch = dict(encoded_inputs)
        if "input_ids" not in batch:
            raise ValueError(
                f"Encodings to pad need 'input_ids', got {sorted(batch)}. Pass what the tokenizer returns."
            )
        is_single = len(batch["input_ids"]) > 0 and np.ndim(batch["input_ids"][0]) == 0
        if is_single:
            batch = {key: [values] for key, values in batch.items()}
        lengths = [len(ids) for ids in batch["input_ids"]]
        if return_attention_mask is not False and "attention_mask" not in batch:
            batch["attention_mask"] = [np.ones(length, dtype=np.int64) for length in lengths]
        if padding not in (False, "do_not_pad"):
            length = self._padded_length(lengths, padding, max_length, pad_to_multiple_of)
            fillers = {"input_ids": self.pad_token_id, "expression_bins": self.pad_bin_id, "attention_mask": 0}
            for key in batch.keys() & fillers.keys():
                padded = _pad_rows(batch[key], length, fillers[key])
                batch[key] = padded if return_tensors else padded.tolist()
        if is_single:
            batch = {key: values[0] for key, values in batch.items()}
        return BatchEncoding(
            batch, tensor_type=return_tensors, prepend_batch_axis=is_single and return_tensors is not None
        )

    def _padded_length(self, lengths, padding, max_length, pad_to_multiple_of) -> int:
        longest = max(lengths, default=0)
        length = longest
        if padding == "max_length":
            length = self.model_max_length if max_length is None else max_length
            if longest > length:
                raise ValueError(
                    f"Cells must fit into the length to pad to, {length}, got one of {longest} genes. "
                    "Truncate when tokenizing, or pad to a larger `max_length`."
                )
        elif padding not in (True, "longest"):
            raise ValueError(f"`padding` must be True, False, 'longest' or 'max_length', got {padding!r}.")
        length = max(length, 1)  # a batch of empty cells still is a batch
        return length if not pad_to_multiple_of else -(-length // pad_to_multiple_of) * pad_to_multiple_of


@functools.cache
def _compiled_bin_cells() -> Callable:
    """The compiled twin of `bin_cells`, or the plain one where Numba is not to be had."""
    try:
        from .token_kernels import bin_cells
    except Exception as error:  # Numba may also be installed and broken
        logger.warning(f"Cells are tokenized by NumPy, several times slower than by Numba: {error}")
        return plain_bin_cells
    return bin_cells


def _pad_rows(rows: Sequence, length: int, filler: int) -> np.ndarray:
    """(rows, length) int64 with each row at the start of its line."""
    padded = np.full((len(rows), length), filler, dtype=np.int64)
    for line, row in zip(padded, rows, strict=True):
        line[: len(row)] = row
    return padded


def check_tokenizer(tokenizer, config) -> None:
    """Raise ValueError unless a tokenizer gives the genes and bins that a model of this configuration reads."""
    read, given = (config.vocab_size, config.num_expression_bins), (len(tokenizer), tokenizer.num_expression_bins)
    if read != given:
        raise ValueError(
            f"A model and its tokenizer must have the same genes and bins, got {read[0]:,} and {read[1]} in the model, "
            f"{given[0]:,} and {given[1]} in the tokenizer. Load both from one checkpoint, or build the configuration "
            "with `vocab_size=len(tokenizer)`."
        )


def warn_of_empty_cells(lengths: np.ndarray) -> None:
    """Say which cells have no expressed gene that the model reads."""
    empty = np.flatnonzero(np.asarray(lengths) == 0)
    if len(empty):
        logger.warning(
            f"{len(empty):,} of {len(lengths):,} cells have no expressed gene of the vocabulary{examples(empty)}; "
            "their embedding says nothing. Remove them, or check the gene names."
        )


def _read_genes_file(genes_file: str | None, expected_sha256: str | None) -> bytes:
    """The gene table's bytes; a saved tokenizer must find its own table again, not another."""
    packaged = Path(__file__).parent / GENES_FILE
    if genes_file is None and expected_sha256 is not None:
        raise ValueError(
            f"A saved tokenizer needs its gene table {GENES_FILE}, got a checkpoint without it. "
            "Copy the file from where the checkpoint came from, or download the checkpoint again."
        )
    path = packaged if genes_file is None else Path(genes_file)
    if not path.is_file():
        raise ValueError(
            f"A gene table must be a file, got {path}. "
            "Load the tokenizer with `from_pretrained`, or install panfoma-hf for the packaged table."
        )
    table = path.read_bytes()
    if expected_sha256 is not None and hashlib.sha256(table).hexdigest() != expected_sha256:
        raise ValueError(
            f"A saved tokenizer needs the gene table that it was made with, got another or a damaged one in {path}. "
            "Download the checkpoint again."
        )
    return table


PanFoMaTokenizer.register_for_auto_class()

__all__ = ["CellTokens", "GeneResolution", "PanFoMaTokenizer"]
