"""What a model says of genes: their embeddings, by themselves and in cells, and which of them it sorts first."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import torch
from transformers import AutoModel

from ..data.cells import MIN_COVERAGE, Expression, name_of, read_expression
from ..data.readers import anndata_cells, open_cells
from ..modeling import PanFoMaPreTrainedModel
from ..tokenization import PanFoMaTokenizer
from .loading import load_model, load_tokenizer
from .running import Options, Runner


# What all cells are called where no groups are asked for.
ALL_CELLS = "all"


def gene_embeddings(
    model: str | Path | PanFoMaPreTrainedModel,
    cells: ad.AnnData | str | Path | None = None,
    groupby: str | Sequence | None = None,
    *,
    genes: Sequence[str] | None = None,
    min_cells: int = 1,
    tokenizer: PanFoMaTokenizer | None = None,
    layer: str | None = None,
    gene_column: str | None = None,
    min_coverage: float = MIN_COVERAGE,
    memory: int | str | None = None,
    batch_size: int | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    num_threads: int | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Embeddings of genes: what the model knows of each by itself, or what it makes of it in cells.

    Without cells, static ones: the table of input embeddings. With cells, contextual ones: the mean of a gene's final
    states over the cells of a group that express it. Cells in a file are read a chunk at a time; sums take 8 bytes for
    each group, gene and dimension.

    Parameters
    ----------
    model
        A checkpoint (folder or Hub name), or a model.
    cells
        An AnnData, or a file of any format that `panfoma_hf.open_cells` reads; None gives static embeddings.
    groupby
        Column of ``obs``, or (cells,) names; cells without one are left out. None makes one group of all cells.
    genes
        Names of the genes, as `tokenizer.resolve_genes` knows them; None takes all: those of the vocabulary, or of the
        file.
    min_cells
        Cells of a group that must express a gene.
    tokenizer, layer, gene_column, min_coverage, memory, batch_size, dtype, device, num_threads, progress
        As in `embed`.

    Returns
    -------
    (genes, hidden) of float32 with gene symbols in the index; or, with cells, (groups x genes, hidden) with ``group``
    and ``gene`` in the index.

    Raises
    ------
    ValueError
        As in `embed`, and if a gene is not known or there is no such column.
    """
    tokenizer = load_tokenizer(model, tokenizer)
    wanted = None if genes is None else _ids_of(genes, tokenizer)
    if cells is None:
        loaded = load_model(AutoModel, model, tokenizer, device)
        ids = np.arange(1, len(tokenizer)) if wanted is None else wanted
        table = loaded.get_input_embeddings().weight.detach()[torch.from_numpy(ids)].float().cpu().numpy()
        return pd.DataFrame(table, index=pd.Index(tokenizer.convert_ids_to_tokens(ids.tolist()), name="gene"))
    options = Options(
        tokenizer, layer, gene_column, min_coverage, memory, batch_size, dtype, device, num_threads, progress
    )
    with _grouped(cells, model, groupby, tokenizer, options) as grouped:
        known = np.unique(grouped.expression.resolution.token_ids)
        ids = known[known >= 0] if wanted is None else wanted
        place_of_id = torch.full((len(tokenizer),), -1)
        place_of_id[torch.from_numpy(ids)] = torch.arange(len(ids))
        num_rows = len(grouped.names) * len(ids)
        # Sums of many cells in float32 would depend on their order.
        sums = torch.zeros(num_rows, grouped.runner.model.config.hidden_size, dtype=torch.float64)
        counts = torch.zeros(num_rows, dtype=torch.int64)
        for _, codes, batches in grouped.chunks():
            for index, batch, output in batches:
                places = place_of_id[batch["input_ids"].cpu()]
                is_wanted = batch["attention_mask"].cpu().bool() & (places >= 0)
                rows = (torch.from_numpy(codes[index])[:, None] * len(ids) + places)[is_wanted]
                states = output["last_hidden_state"][is_wanted.to(output["last_hidden_state"].device)]
                sums.index_add_(0, rows, states.cpu().double())
                counts.index_add_(0, rows, torch.ones_like(rows))
    kept = torch.nonzero(counts >= max(1, min_cells))[:, 0]
    means = (sums[kept] / counts[kept, None]).float().numpy()
    symbols = np.array(tokenizer.convert_ids_to_tokens(ids.tolist()), dtype=object)
    index = [np.array(grouped.names, dtype=object)[kept // len(ids)], symbols[kept % len(ids)]]
    return pd.DataFrame(means, index=pd.MultiIndex.from_arrays(index, names=["group", "gene"]))


def gene_scores(
    cells: ad.AnnData | str | Path,
    model: str | Path | PanFoMaPreTrainedModel,
    groupby: str | Sequence | None = None,
    *,
    min_share: float = 0.1,
    tokenizer: PanFoMaTokenizer | None = None,
    layer: str | None = None,
    gene_column: str | None = None,
    min_coverage: float = MIN_COVERAGE,
    memory: int | str | None = None,
    batch_size: int | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    num_threads: int | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Which genes matter in which kind of cell, by the scores that the model sorts genes by.

    The model scores each gene of a cell by ``s_i = h_i . h_global``, how well its state fits the cell's as a whole,
    and reads the genes in that order. Scores differ in scale from cell to cell, so they are standardised within each:
    ``z_i = (s_i - mean(s)) / std(s)``, over the genes that are read of the cell, with 0 where all are equal. A gene's
    score in a group is the mean of ``z_i`` over the cells of the group in which it is read. A score is no test: it says
    what the model attends to, not what differs between groups.

    Parameters
    ----------
    cells
        An AnnData, which is left as it is; or a file of any format that `panfoma_hf.open_cells` reads, a chunk at a
        time.
    model
        A checkpoint (folder or Hub name), or a model.
    groupby
        Column of ``obs``, or (cells,) names; cells without one are left out. None makes one group of all cells.
    min_share
        Share of a group's cells that must express a gene for it to be ranked: the score of a gene of few cells is
        mostly chance.
    tokenizer, layer, gene_column, min_coverage, memory, batch_size, dtype, device, num_threads, progress
        As in `embed`.

    Returns
    -------
    A row for each group and gene, the highest score of a group first: ``group``, ``gene``, ``score``, ``share`` (of the
    group's cells that express it, those without any gene among them) and ``rank`` (from 1, within the group).

    Raises
    ------
    ValueError
        As in `embed`, and if there is no such column or ``min_share`` is no share.
    """
    if not 0 <= min_share <= 1:
        raise ValueError(f"`min_share` is a share from 0 to 1, got {min_share}. Such as 0.1.")
    tokenizer = load_tokenizer(model, tokenizer)
    options = Options(
        tokenizer, layer, gene_column, min_coverage, memory, batch_size, dtype, device, num_threads, progress
    )
    with _grouped(cells, model, groupby, tokenizer, options) as grouped:
        shape = (len(grouped.names), len(tokenizer))
        sums, read, expressed = np.zeros(shape), np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        for tokens, codes, batches in grouped.chunks():
            np.add.at(expressed, (np.repeat(codes, tokens.lengths), tokens.input_ids), 1)
            for index, batch, output in batches:
                is_gene = batch["attention_mask"].cpu().numpy().astype(bool)
                standardised = _standardised(output["gene_scores"].double().cpu().numpy(), is_gene)
                group_of_cell = np.broadcast_to(codes[index][:, None], is_gene.shape)
                where = group_of_cell[is_gene], batch["input_ids"].cpu().numpy()[is_gene]
                np.add.at(sums, where, standardised[is_gene])
                np.add.at(read, where, 1)
    tables = []
    for group, name in enumerate(grouped.names):
        share = expressed[group] / max(1, grouped.sizes[group])
        ids = np.flatnonzero((read[group] > 0) & (share >= min_share))
        table = pd.DataFrame(
            {
                "group": name,
                "gene": tokenizer.convert_ids_to_tokens(ids.tolist()),
                "score": sums[group, ids] / read[group, ids],
                "share": share[ids],
            }
        ).sort_values(["score", "share", "gene"], ascending=[False, False, True], ignore_index=True)
        tables.append(table.assign(rank=np.arange(1, len(table) + 1)))
    return pd.concat(tables, ignore_index=True)


def _standardised(scores: np.ndarray, is_gene: np.ndarray) -> np.ndarray:
    """Scores (cells, seq) less the mean of their cell's, over their standard deviation; 0 at pads."""
    num_genes = np.maximum(is_gene.sum(1, keepdims=True), 1)
    centred = np.where(is_gene, scores - np.where(is_gene, scores, 0).sum(1, keepdims=True) / num_genes, 0)
    deviation = np.sqrt((centred**2).sum(1, keepdims=True) / num_genes)
    return np.divide(centred, deviation, out=np.zeros_like(centred), where=deviation > 0)


def _ids_of(genes: Sequence[str], tokenizer: PanFoMaTokenizer) -> np.ndarray:
    """Ids of genes, each once, in the order of their names."""
    resolution = tokenizer.resolve_genes(genes)
    unknown = resolution.names[resolution.token_ids < 0]
    if len(unknown) or not len(resolution):
        raise ValueError(
            f"`genes` are at least one name, all of them known, got {len(unknown):,} of {len(resolution):,} that are "
            f"not: {', '.join(map(str, unknown[:3]))}. Print `tokenizer.resolve_genes(genes)` to see why."
        )
    return np.array(list(dict.fromkeys(resolution.token_ids.tolist())))


@dataclass
class _Grouped:
    """Cells in groups, with a model that is ready to run over them.

    Parameters
    ----------
    expression, runner
        The cells, and what runs the model.
    codes
        (cells,), each one's place in ``names``; -1 for a cell that is left out.
    names
        Of the groups.
    """

    expression: Expression
    runner: Runner
    codes: np.ndarray
    names: list[str]

    @property
    def sizes(self) -> np.ndarray:
        """(groups,), numbers of cells."""
        return np.bincount(self.codes[self.codes >= 0], minlength=len(self.names))

    def chunks(self) -> Iterator[tuple]:
        """Of each chunk its tokens, the groups of its cells as places in ``names``, and its batches."""
        is_kept, bounds = self.codes >= 0, self.expression.bounds
        for index, tokens, batches in self.runner.chunks(self.expression, is_kept=is_kept):
            codes = self.codes[slice(*bounds[index])]
            yield tokens, codes[codes >= 0], batches


@contextmanager
def _grouped(cells, model, groupby, tokenizer: PanFoMaTokenizer, options: Options) -> Iterator[_Grouped]:
    if isinstance(cells, ad.AnnData) and not cells.n_obs:
        raise ValueError("At least one cell is needed, got an AnnData without cells. Check how it was subset.")
    opened = anndata_cells(cells, name_of(cells)) if isinstance(cells, ad.AnnData) else open_cells(cells, tokenizer)
    with opened as file:
        codes, names = _groups(file.obs, groupby)
        expression = read_expression(file, tokenizer, **options.reading)
        loaded = load_model(AutoModel, model, tokenizer, options.device)
        yield _Grouped(expression, Runner(loaded.base_model, tokenizer, options), codes, names)


def _groups(obs: pd.DataFrame, groupby: str | Sequence | None) -> tuple[np.ndarray, list[str]]:
    """(cells,) places of the groups, -1 for none, and their names."""
    if groupby is None:
        return np.zeros(len(obs), dtype=np.int64), [ALL_CELLS]
    if isinstance(groupby, str) and groupby not in obs:
        raise ValueError(
            f"`groupby` must be a column of obs, got {groupby!r}; the columns are {sorted(map(str, obs))}. "
            "Or pass a name for each cell."
        )
    values = obs[groupby] if isinstance(groupby, str) else groupby
    if len(values) != len(obs):
        raise ValueError(f"Each of the {len(obs):,} cells needs a name, got {len(values):,}. Pass one for each.")
    groups = pd.Categorical(values).remove_unused_categories()
    if not len(groups.categories):
        raise ValueError(f"At least one cell needs a group, got none in {groupby!r}. Name another column.")
    return groups.codes.astype(np.int64), [str(name) for name in groups.categories]
