"""`annotate` and `embed` as ``pipeline("cell-type-annotation")`` and ``pipeline("cell-embedding")`` of Transformers."""

import os
import warnings
from typing import Any

import numpy as np
from transformers import AutoModel, AutoModelForSequenceClassification, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from .modeling import PanFoMaConfig
from .shipped import checkpoint


# Arguments of `embed` and `annotate` that a pipeline hands on.
_OPTIONS = ("layer", "gene_column", "min_coverage", "memory", "batch_size", "num_threads", "progress")
# Asks for the one name of each cell, as `annotate` gives it.
_CALLED = object()


class _Loader:
    """An Auto class that notes on the model which weights its checkpoint lacks.

    An error here would be caught by Transformers and come out below the traceback of each try to load; the pipeline
    says it instead.
    """

    @classmethod
    def from_pretrained(cls, *arguments, **options):
        model, report = super().from_pretrained(*arguments, output_loading_info=True, **options)
        model.missing_keys = report["missing_keys"]
        return model


class _CellModel(_Loader, AutoModel):
    pass


class _CellClassifier(_Loader, AutoModelForSequenceClassification):
    pass


class _CellPipeline(Pipeline):
    """What both pipelines share: cells in, the arguments of `embed`, one result for each input."""

    _load_tokenizer = True
    _load_processor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    # Arguments of the pipeline's function.
    _options = _OPTIONS

    def __init__(self, *arguments, batch_size: int | None = None, **options):
        # Transformers would keep `batch_size` for a DataLoader of its own, and never hand it on.
        super().__init__(*arguments, cells_per_batch=batch_size, **options)
        if not isinstance(self.model.config, PanFoMaConfig):
            raise ValueError(
                f"{self.task} needs a checkpoint of PanFoMa, got {type(self.model).__name__}. Name one, or leave "
                "`model` out to embed cells with the checkpoint that comes with the package."
            )
        from .inference.loading import check_weights

        check_weights(self.model, self.model.name_or_path, getattr(self.model, "missing_keys", ()))

    def __call__(self, cells, *, batch_size: int | None = None, **options) -> Any:
        """Run over cells; see the class."""
        inputs = cells if isinstance(cells, (list, tuple)) else [cells]
        for one in inputs:
            self._check_input(one)
        # One after the other: each is many cells, which are put into batches by themselves.
        results = [super(_CellPipeline, self).__call__(one, cells_per_batch=batch_size, **options) for one in inputs]
        return results if inputs is cells else results[0]

    def _check_input(self, cells) -> None:
        """Raise unless these are cells."""
        import anndata as ad

        if isinstance(cells, (str, os.PathLike)):
            if not os.path.exists(cells):  # of a long text, too, of which pathlib raises another error
                text = str(cells)
                raise FileNotFoundError(
                    f"{self.task} reads cells from a file or a folder, got nothing at "
                    f"{text if len(text) <= 80 else text[:77] + '...'}. Check the path, or pass an AnnData."
                )
        elif not isinstance(cells, ad.AnnData):
            raise TypeError(
                f"{self.task} takes an AnnData, the path of a file of cells or a list of these, got "
                f"{type(cells).__name__}. Make an AnnData of it: anndata.AnnData(matrix, obs=cells, var=genes), with "
                "the names of the genes as the index of `var`."
            )

    def save_pretrained(self, save_directory: str | os.PathLike, **options) -> None:
        """Save model and tokenizer, as a checkpoint like any other.

        That of Transformers also writes the pipeline's code, which then asks for ``trust_remote_code`` where this
        package is installed, and cannot run where it is not.
        """
        self.model.save_pretrained(save_directory, **options)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(save_directory, **options)

    def _sanitize_parameters(self, cells_per_batch: int | None = None, **options) -> tuple[dict, dict, dict]:
        if cells_per_batch is not None:
            options["batch_size"] = cells_per_batch
        unknown = sorted(options.keys() - set(self._options))
        if unknown:
            raise TypeError(
                f"Arguments of {self.task} are {', '.join(self._options)}, got {', '.join(unknown)}. Leave it out, or "
                "call panfoma_hf.annotate or panfoma_hf.embed, which have more."
            )
        after = {"top_k": options.pop("top_k")} if "top_k" in options else {}
        return {}, options, after

    def preprocess(self, cells):
        """The path of a file, or an AnnData with the user's matrices that may be written to."""
        import anndata as ad

        if not isinstance(cells, ad.AnnData):
            return cells
        with warnings.catch_warnings():
            # The user has been told when the AnnData was made.
            warnings.filterwarnings("ignore", message=r"(Observation|Variable) names are not unique")
            return ad.AnnData(
                cells.X,
                obs=cells.obs[[]],
                var=cells.var,
                layers=dict(cells.layers),
                raw=None if cells.raw is None else {"X": cells.raw.X, "var": cells.raw.var},
            )


class CellTypeAnnotationPipeline(_CellPipeline):
    """Name cells with a fine-tuned classifier, by `panfoma_hf.annotate`.

    ``pipeline("cell-type-annotation", model="my-checkpoint")`` gives one. It is called with an AnnData, to which
    nothing is written; the path of a file of any format that `panfoma_hf.open_cells` reads; or a list of these, which
    gives a list of results. A result is a list with an entry for each cell, in their order:

    - ``{"label": name, "score": probability}``, with ``"unfamiliarity"`` where the model was calibrated; "Unassigned"
      where the score is too low;
    - with ``top_k``, a list of such entries, the likeliest name first: what the model holds for possible, also of a
      cell that is "Unassigned" otherwise;
    - of a model of several tasks, a dict of these by the name of the task.

    Arguments, when it is made or called (then they count for that call): ``top_k``, the number of names of a cell,
    None for all; ``min_score``, ``layer``, ``gene_column``, ``min_coverage``, ``memory``, ``batch_size``,
    ``num_threads`` and ``progress`` (False here), as in `panfoma_hf.annotate`. ``device`` and ``dtype`` are those of
    the weights, as in any pipeline; ``num_workers`` changes nothing, as there is no DataLoader.

    Raises
    ------
    TypeError
        If an argument is unknown, or the input is neither an AnnData nor a path.
    FileNotFoundError
        If there is nothing at a path.
    ValueError
        As in `panfoma_hf.annotate`, or if the model is not PanFoMa, or ``top_k`` below 1.
    """

    _options = (*_OPTIONS, "min_score", "top_k")

    def _forward(self, cells, *, progress: bool = False, **options):
        from .inference import annotate

        return annotate(cells, self.model, tokenizer=self.tokenizer, progress=progress, **options)

    def postprocess(self, adata, *, top_k: int | object | None = _CALLED) -> list[dict] | list[list[dict]]:
        """Entries of each cell, of what `annotate` wrote."""
        if top_k is not None and top_k is not _CALLED and (not isinstance(top_k, int) or top_k < 1):
            raise ValueError(f"`top_k` is a number of names from 1, got {top_k!r}. Pass None for all names.")
        by_task = {task: _entries(adata, f"panfoma_{task}", top_k) for task in self.model.config.tasks}
        if self.model.config.label_tasks is None:
            return next(iter(by_task.values()))
        return [dict(zip(by_task, entries, strict=True)) for entries in zip(*by_task.values(), strict=True)]


class CellEmbeddingPipeline(_CellPipeline):
    """Embed cells, by `panfoma_hf.embed`.

    ``pipeline("cell-embedding")`` gives one with the checkpoint that comes with the package, ``model=`` one with
    another. Inputs and arguments are those of `CellTypeAnnotationPipeline`, without ``top_k`` and ``min_score``. A
    result is a float32 array, (cells, hidden).

    Raises
    ------
    TypeError, FileNotFoundError, ValueError
        As `CellTypeAnnotationPipeline`.
    """

    def _forward(self, cells, *, progress: bool = False, **options):
        from .inference import embed

        return embed(cells, self.model, tokenizer=self.tokenizer, progress=progress, **options)

    def postprocess(self, adata) -> np.ndarray:
        """The embeddings that `embed` wrote."""
        return adata.obsm["X_panfoma"]


def _entries(adata, key: str, top_k: int | object | None) -> list[dict] | list[list[dict]]:
    """Of each cell the name under a key of ``obs``, or the ``top_k`` likeliest ones, with what is known of them."""
    facts = {}
    if f"{key}_unfamiliarity" in adata.obs:
        facts["unfamiliarity"] = adata.obs[f"{key}_unfamiliarity"].tolist()
    if top_k is _CALLED:
        facts = {"label": adata.obs[key].tolist(), "score": adata.obs[f"{key}_score"].tolist(), **facts}
        return [dict(zip(facts, values, strict=True)) for values in zip(*facts.values(), strict=True)]
    names, probabilities = adata.uns["panfoma"][key]["labels"], adata.obsm[f"{key}_proba"]
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
    scores = np.take_along_axis(probabilities, best, axis=1)
    more = [dict(zip(facts, values, strict=True)) for values in zip(*facts.values(), strict=True)] or [{}] * len(adata)
    return [
        [{"label": names[index], "score": score, **of_cell} for index, score in zip(indices, of_indices, strict=True)]
        for indices, of_indices, of_cell in zip(best.tolist(), scores.tolist(), more, strict=True)
    ]


def register_pipelines() -> None:
    """Make the pipelines known to Transformers, with the checkpoint that comes with the package as their default.

    It has no classifier, and the error that says so tells more than Transformers' where there is no default.
    """
    default = {"model": (str(checkpoint()), None)}
    for task, pipeline_class, loader in (
        ("cell-type-annotation", CellTypeAnnotationPipeline, _CellClassifier),
        ("cell-embedding", CellEmbeddingPipeline, _CellModel),
    ):
        PIPELINE_REGISTRY.register_pipeline(task, pipeline_class=pipeline_class, pt_model=loader, default=default)
