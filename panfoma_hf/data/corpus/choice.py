"""Which cells of a corpus pretraining learns from, and which it is evaluated on."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from .. import schema
from .corpus import Corpus
from .splits import PARTS


# What a cell is for; the first is for nothing.
UNUSED, TRAIN, HELD_OUT_DONORS, HELD_OUT_CANCER_TYPES = range(4)


@dataclass
class CellChoice:
    """Which cells of a corpus to pretrain on.

    Parameters
    ----------
    split
        A split of the corpus: pretraining learns from its part "train", held-out donors are those of "validation", and
        of "test" only cells of cancer types that are held out are evaluated.
    min_genes_measured
        Genes that a study must have measured: where fewer are in its files, most of what a cell expresses is unknown.
    held_out_studies
        Studies that nothing is learned from, such as those that the model will be judged on.
    held_out_cancer_types
        Cancer types that are left out of all studies, and evaluated on: all their cells, of any part and study.
    """

    split: str = "donor"
    min_genes_measured: int = 10_000
    held_out_studies: Sequence[str] = field(default_factory=list)
    held_out_cancer_types: Sequence[str] = field(default_factory=list)

    def check(self, corpus: Corpus) -> None:
        """Raise ValueError where something is held out that the corpus does not have."""
        if self.split not in corpus.splits:
            raise ValueError(
                f"`split` is one of the corpus', {', '.join(corpus.splits)}, got {self.split!r}. Name one of these."
            )
        for name, known in (
            ("held_out_studies", set(corpus.manifest["studies"])),
            ("held_out_cancer_types", set(corpus.manifest["donors_by_cancer_type"])),
        ):
            if unknown := sorted(set(getattr(self, name)) - known):
                raise ValueError(
                    f"`{name}` must be in the corpus, got {', '.join(unknown)}. It has {', '.join(sorted(known))}."
                )

    def purposes(self, corpus: Corpus, study: str, parts: np.ndarray, cancer_types: pa.ChunkedArray) -> np.ndarray:
        """What each cell of a study is for.

        Parameters
        ----------
        corpus
            The corpus.
        study
            Whose cells they are.
        parts
            (cells,), their parts of the split, as indices into `PARTS`.
        cancer_types
            (cells,), null where none is known.

        Returns
        -------
        (cells,) uint8, one of `TRAIN`, `HELD_OUT_DONORS`, `HELD_OUT_CANCER_TYPES` and `UNUSED`.
        """
        purposes = np.full(len(parts), UNUSED, dtype=np.uint8)
        if corpus.manifest["studies"][study]["genes_measured"] < self.min_genes_measured:
            return purposes
        is_type_out = np.isin(np.array(cancer_types.to_pylist(), dtype=object), list(self.held_out_cancer_types))
        purposes[is_type_out] = HELD_OUT_CANCER_TYPES
        if study not in self.held_out_studies:
            purposes[~is_type_out & (parts == PARTS.index("train"))] = TRAIN
            purposes[~is_type_out & (parts == PARTS.index("validation"))] = HELD_OUT_DONORS
        return purposes

    def of_all(self, corpus: Corpus) -> np.ndarray:
        """(cells,) uint8, what each cell of a corpus on disk is for.

        Raises
        ------
        ValueError
            If something is held out that is not there, or nothing is left to learn from.
        """
        self.check(corpus)
        parts, start, found = corpus.split(self.split), 0, []
        for shard in corpus.manifest["shards"]:
            stop = start + shard["cells"]
            study = corpus.manifest["units"][shard["unit"]]["study"]
            cancer_types = corpus.shard_columns(shard, [schema.CANCER_TYPE])[schema.CANCER_TYPE]
            found.append(self.purposes(corpus, study, parts[start:stop], cancer_types))
            start = stop
        purposes = np.concatenate(found)
        if not (purposes == TRAIN).any():
            raise self.nothing_left(corpus)
        return purposes

    def nothing_left(self, corpus: Corpus) -> ValueError:
        """The error where no cell is left to learn from."""
        return ValueError(
            f"Pretraining needs cells, got none of {len(corpus):,} in the part 'train' of the split {self.split!r}, of "
            f"studies with at least {self.min_genes_measured:,} genes measured, and outside of what is held out. Lower "
            "`min_genes_measured`, or hold out less."
        )
