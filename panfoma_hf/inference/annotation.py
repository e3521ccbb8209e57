"""Embed and annotate cells: AnnData in, AnnData out; or file in, file out, whatever its size."""

from pathlib import Path

import anndata as ad
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

from ..data.cells import MIN_COVERAGE, Expression, name_of, read_expression, writable_cells
from ..data.readers import anndata_cells
from ..modeling import PanFoMaForCellClassification, PanFoMaPreTrainedModel
from ..tokenization import PanFoMaTokenizer
from .files import check_output
from .loading import load_tokenizer
from .results import Additions, Inference, Plan, names_of_cells
from .running import Options, joined
from .streaming import FileReport, infer_file


def embed(
    cells: ad.AnnData | str | Path,
    model: str | Path | PanFoMaPreTrainedModel,
    *,
    output: str | Path | None = None,
    tokenizer: PanFoMaTokenizer | None = None,
    key_added: str = "X_panfoma",
    layer: str | None = None,
    gene_column: str | None = None,
    min_coverage: float = MIN_COVERAGE,
    memory: int | str | None = None,
    batch_size: int | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    num_threads: int | None = None,
    progress: bool = True,
    resume: bool = True,
    overwrite: bool = False,
) -> ad.AnnData | FileReport:
    """Write each cell's embedding to ``obsm[key_added]`` (cells, hidden), and where it came from to ``uns["panfoma"]``.

    Results depend neither on how cells are put into batches nor on the other cells, but for rounding (1e-5 in float32).

    With ``output`` the cells may be more than fit into memory: they are read a chunk at a time, the results of finished
    chunks wait in the folder ``<output>.parts``, and at the end the input is copied to ``output`` with the results
    added. A run that was cut off goes on from the finished chunks when it is called again in the same way. Under
    ``accelerate launch`` each process runs its share of the chunks; the first one writes the file, the others return
    when their share is done.

    Parameters
    ----------
    cells
        An AnnData, which is written to in place; or a file of any format that `panfoma_hf.open_cells` reads, which is
        left as it is.
    model
        A checkpoint (folder or Hub name), or a model.
    output
        An ``.h5ad`` or ``.zarr`` to write, for cells that are given as a file; None gives an AnnData. Where input and
        output are both h5ad, or both folders of zarr, everything else stays as it is. Otherwise matrices are written
        as CSR, and whatever else an AnnData has is carried over.
    tokenizer
        The model's tokenizer; None loads it from the model's checkpoint.
    key_added
        Key of ``obsm``.
    layer
        The matrix to read: a layer's name, "X" or "raw". None looks for the counts, and says what it found.
    gene_column
        Column of ``var`` with gene names. None takes ``var_names``, with ids in other columns to help out.
    min_coverage
        Share of the counts that must fall on genes that the model knows.
    memory
        What a batch may take while the model runs, in bytes or as a text such as "4GB". Cells of like length share a
        batch, many of few genes or few of many. None takes 1 GiB on a CPU, and half of what is free on a GPU.
    batch_size
        Cells of a batch, in place of ``memory``.
    dtype
        "float32", or "bfloat16" for autocast, the one for GPUs with tensor cores: results then agree with those of
        float32 to two or three digits. None is float32 on a GPU, too, so that results do not depend on the machine.
    device
        None takes a GPU where there is one; a model that is passed stays where it is.
    num_threads
        Threads of the model on a CPU; None leaves torch's number.
    progress
        Whether to show a progress bar, with cells/s and the time that is left.
    resume
        Whether a run that was cut off goes on; False begins anew.
    overwrite
        Whether ``output`` may replace what is there; it does so when the new one is whole.

    Returns
    -------
    The AnnData, to which nothing is written on an error; or, with ``output``, what was done.

    Raises
    ------
    ValueError
        If expression is not usable, too few genes are known, model and tokenizer do not belong together, or the run to
        go on with had other settings or another input.
    FileExistsError
        If there is an output already.
    MemoryError
        If a batch does not fit into the memory of a GPU.
    """
    options = Options(
        tokenizer=tokenizer,
        layer=layer,
        gene_column=gene_column,
        min_coverage=min_coverage,
        memory=memory,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        num_threads=num_threads,
        progress=progress,
    )

    def plan(model: PanFoMaPreTrainedModel) -> Plan:
        return Plan(
            model.base_model,
            ["pooler_output"],
            [key_added],
            lambda found, provenance: Additions(obsm={key_added: found["pooler_output"]}, uns={key_added: provenance}),
        )

    return _infer(cells, AutoModel, model, plan, options, output, resume, overwrite)


def annotate(
    cells: ad.AnnData | str | Path,
    model: str | Path | PanFoMaForCellClassification,
    *,
    output: str | Path | None = None,
    tokenizer: PanFoMaTokenizer | None = None,
    embedding_key: str | None = None,
    min_score: float | None = None,
    layer: str | None = None,
    gene_column: str | None = None,
    min_coverage: float = MIN_COVERAGE,
    memory: int | str | None = None,
    batch_size: int | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    num_threads: int | None = None,
    progress: bool = True,
    resume: bool = True,
    overwrite: bool = False,
) -> ad.AnnData | FileReport:
    """Name each cell with a fine-tuned classifier.

    With ``<label>`` the name that the model was fine-tuned for, such as "cell_type", it writes
    ``obs["panfoma_<label>"]`` (categorical), ``obs["panfoma_<label>_score"]`` (the probability of that name),
    ``obsm["panfoma_<label>_proba"]`` (cells, labels) and where they came from to ``uns["panfoma"]``, with the names of
    the columns of probabilities. A model of several tasks writes these for each of them.

    Where the model was calibrated (`panfoma_hf.finetune` does that on its validation cells), scores are calibrated
    probabilities, cells below the score that keeps to the stated error are called "Unassigned" (if enough validation
    cells vouch for it), and ``obs["panfoma_<label>_unfamiliarity"]`` is the share of the validation cells that look
    more like the training cells than this one does, by the energy of the logits (Liu et al., NeurIPS 2020): near 1 for
    a cell of another kind.
    A cell without an expressed gene is called "Unassigned", with a score of 0.

    Parameters
    ----------
    cells, output, tokenizer, layer, gene_column, min_coverage
        As in `embed`.
    model
        A checkpoint (folder or Hub name) with a classifier, or such a model.
    embedding_key
        Key of ``obsm`` to write the embeddings of the same pass to, as `embed` does.
    min_score
        Score below which a cell is called "Unassigned"; None takes the checkpoint's own, 0 names every cell.
    memory, batch_size, dtype, device, num_threads, progress, resume, overwrite
        As in `embed`.

    Returns
    -------
    As `embed`.

    Raises
    ------
    ValueError
        As in `embed`, and if the model has no trained classifier or names no single class, or ``min_score`` is not a
        probability.
    FileExistsError, MemoryError
        As in `embed`.
    """
    if min_score is not None and not 0 <= min_score <= 1:
        raise ValueError(
            f"`min_score` is a probability from 0 to 1, got {min_score}. Pass 0 to name every cell, None for the "
            "checkpoint's own."
        )
    options = Options(
        tokenizer=tokenizer,
        layer=layer,
        gene_column=gene_column,
        min_coverage=min_coverage,
        memory=memory,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        num_threads=num_threads,
        progress=progress,
    )

    def plan(model: PanFoMaPreTrainedModel) -> Plan:
        _check_names_cells(model)
        return Plan(
            model,
            ["logits", *(["pooler_output"] if embedding_key is not None else [])],
            [*(f"panfoma_{label}" for label in model.config.tasks), *([embedding_key] if embedding_key else [])],
            lambda found, provenance: names_of_cells(found, provenance, model.config, min_score, embedding_key),
        )

    return _infer(cells, AutoModelForSequenceClassification, model, plan, options, output, resume, overwrite)


def _check_names_cells(model: PanFoMaPreTrainedModel) -> None:
    """Raise ValueError unless a model gives each cell one of at least two names."""
    config = model.config
    if not hasattr(model, "classifier"):
        raise ValueError(
            f"Cells are named by a model with a classifier, got {type(model).__name__}. Load the checkpoint with "
            "AutoModelForSequenceClassification, or use `panfoma_hf.embed`."
        )
    is_named = config.label_tasks is not None or config.problem_type in (None, "single_label_classification")
    if not is_named or config.num_labels < 2:
        raise ValueError(
            f"Cells are named by a single-label classifier, got problem_type {config.problem_type!r} with "
            f"{config.num_labels} labels. Call the model itself and read its logits, or use `embed`."
        )


def _infer(cells, auto_class, model, plan, options: Options, output, resume: bool, overwrite: bool):
    """What `embed` and `annotate` share: from cells to what is written, in memory or file to file."""
    if output is not None:
        if isinstance(cells, ad.AnnData):
            raise ValueError(
                f"`output` goes with cells in a file, got an AnnData. Pass the file's path, or leave `output` out and "
                f"write the AnnData that comes back: adata.write_h5ad({str(output)!r})."
            )
        check_output(Path(cells), Path(output), overwrite)
        tokenizer = load_tokenizer(model, options.tokenizer)

        def begin(expression: Expression) -> Inference:
            return Inference.begin(expression, auto_class, model, tokenizer, options, plan)

        return infer_file(Path(cells), Path(output), begin, tokenizer, options, resume=resume, overwrite=overwrite)
    adata = writable_cells(cells)
    if not adata.n_obs:
        raise ValueError("At least one cell is needed, got an AnnData without cells. Check how it was subset.")
    tokenizer = load_tokenizer(model, options.tokenizer)
    # What is wrong with the cells as a whole is said before a model is loaded.
    expression = read_expression(anndata_cells(adata, name_of(cells)), tokenizer, **options.reading)
    inference = Inference.begin(expression, auto_class, model, tokenizer, options, plan)
    found = joined(inference.results(), expression.bounds)
    inference.additions(found).write_to(adata)
    return adata
