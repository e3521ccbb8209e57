"""A corpus: many files of cells, checked, named alike and tokenized, with splits, a manifest and a data card."""

from .build import build_corpus
from .corpus import Corpus, CorpusError
from .sources import SourceList
from .splits import PARTS, LeakageError, SplitError


__all__ = ["PARTS", "Corpus", "CorpusError", "LeakageError", "SourceList", "SplitError", "build_corpus"]
