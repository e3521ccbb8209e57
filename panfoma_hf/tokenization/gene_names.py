# Copyright 2026 The PanFoMa-HF authors. Licensed under the Apache License, Version 2.0.
"""Which gene a name stands for: symbols old and new, ids of three databases, and what files do to all of these."""

import dataclasses
import functools
import gzip
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .expression import examples


# How a name was resolved ...
APPROVED = "approved symbol"
ADDED = "added token"
ENSEMBL = "Ensembl id"
HGNC = "HGNC id"
NCBI = "NCBI Gene id"
PREVIOUS = "previous symbol"
ALIAS = "alias symbol"
SPELLING = "other spelling"
DATE = "spreadsheet date"
SUFFIX = "made-unique suffix"
# ... or why it was not.
AMBIGUOUS = "ambiguous"
OUTSIDE = "outside the vocabulary"
SPECIES = "other species"
NOT_A_GENE = "not a gene"
UNKNOWN_ENSEMBL = "unknown Ensembl id"
CLONE = "clone name"
UNKNOWN = "unknown"

# What each rule means, in the order of the report.
RULES = {
    APPROVED: "HGNC's symbol as it is",
    ADDED: "a token added to this tokenizer",
    ENSEMBL: "human Ensembl gene id, with or without version",
    HGNC: "number of HGNC",
    NCBI: "number of NCBI Gene (Entrez)",
    PREVIOUS: "an earlier approved symbol of one gene",
    ALIAS: "a synonym of one gene",
    SPELLING: "case or separators mended",
    DATE: "a symbol that a spreadsheet took for a date",
    SUFFIX: "a number that made_unique appends taken off",
    AMBIGUOUS: "a name of several genes; not guessed",
    OUTSIDE: "a gene that the model does not read, such as a pseudogene",
    SPECIES: "a gene of another species",
    NOT_A_GENE: "antibody, spike-in, transcript or a counter's summary row",
    UNKNOWN_ENSEMBL: "an Ensembl id that HGNC has no gene for",
    CLONE: "a transcript named after a sequenced clone, which HGNC has no gene for",
    UNKNOWN: "in no name or id of HGNC",
}

# Version suffixes count revisions of a gene's model, not other genes; _PAR_Y is the Y copy of a gene shared with X.
# Names such as CD3E_ENSG00000198851 carry the id beside the symbol.
_HUMAN_ENSEMBL = re.compile(r"(?<![A-Z0-9])ENSG\d{11}(?!\d)", re.IGNORECASE)
_HGNC_ID = re.compile(r"HGNC[:_ ]\s*(\d+)", re.IGNORECASE)
_NCBI_ID = re.compile(r"(?:GeneID|NCBI(?:Gene)?|Entrez)[:_]\s*(\d+)", re.IGNORECASE)
_HUMAN_PREFIX = re.compile(
    r"(?:GRCh3[78](?:\.p\d+)?(?:-\d{4}-[A-Z])?|hg(?:18|19|38)|HUMAN|Homo_sapiens)[_:.-]+(?=.)", re.IGNORECASE
)
_OTHER_PREFIX = re.compile(
    r"(?:mm(?:9|10|39)|GRCm3[89](?:-\d{4}-[A-Z])?|rn[67]|mRatBN7\.2|GRCz1[01]|MOUSE|Mus_musculus)[_:.-]+(?=.)",
    re.IGNORECASE,
)
_SUFFIX = re.compile(r"(.+)[-.](\d{1,3})")
# What programs write where there is no name; NA was XK's symbol.
_MISSING = {"", "na", "n/a", "nan", "none", "<na>", "null"}
# Shorter aliases in another case are as likely to be anything else: g10, t1, cell2.
_MIN_ALIAS = 6
# More names than any file has genes are barcodes, which are asked for once.
_MAX_CACHED = 200_000
_SEPARATORS = str.maketrans({".": "-", "_": "-", " ": "-"})

_OTHER_SPECIES_ID = re.compile(
    r"(ENS(?!T\d|P\d)[A-Z]{3,4})G\d{11}.*|(FBgn)\d{7}|(WBGene)\d{8}|(Y)[A-P][LR]\d{3}[WC](?:-[A-Z])?|(AT)[1-5CM]G\d{5}",
    re.IGNORECASE,
)
_SPECIES = {
    "ENSMUS": "mouse",
    "ENSRNO": "rat",
    "ENSDAR": "zebrafish",
    "ENSMMU": "macaque",
    "ENSMFA": "macaque",
    "ENSPTR": "chimpanzee",
    "ENSSSC": "pig",
    "ENSBTA": "cow",
    "ENSGAL": "chicken",
    "ENSOCU": "rabbit",
    "ENSCAF": "dog",
    "FBGN": "fruit fly",
    "WBGENE": "C. elegans",
    "Y": "yeast",
    "AT": "Arabidopsis",
}
_MOUSE = "mouse or rat"
# Cd3e, H2-Ab1, mt-Nd1, Gm12345, 1700001C02Rik.
_MOUSE_STYLE = re.compile(r"[A-Z][a-z][a-z0-9]*(?:[-.][A-Za-z0-9]+)*|H2-[A-Z][a-z0-9]*|mt-[A-Z][a-z0-9]+|.*Rik")
_NOT_A_GENE = re.compile(
    r"ERCC-\d{5}|.*_TotalSeq[A-D].*|__\w+|N_(?:unmapped|multimapping|noFeature|ambiguous)|ENS[TP]\d{11}.*|NM_\d+.*|NR_\d+.*",
    re.IGNORECASE,
)

# RP11-34P13.7, AC020656.1, XXbac-BPG299F13.17: what GENCODE calls a locus that has no symbol.
_CLONE = re.compile(
    r"(?:RP\d+|CT[A-D]|CH\d+|GS1|KB|LA16c|LL\w+|XX\w+|hsa-mir|DKFZ\w+|WI2|bP-\w+|yR\w+)-\w+\.\d+|[A-Z]{1,2}\d{5,6}\.\d+"
)

# What a spreadsheet makes of MARCH1, MARC1, SEPT9, SEP15, DEC1, OCT4: 1-Mar, Sep-09, 2021-03-01 00:00:00, 3/1/2021.
_MONTHS = {
    "jan": (1, ("JAN",)),
    "feb": (2, ("FEB",)),
    "mar": (3, ("MARCH", "MARC", "MAR")),
    "mrz": (3, ("MARCH", "MARC", "MAR")),
    "mär": (3, ("MARCH", "MARC", "MAR")),
    "apr": (4, ("APR",)),
    "may": (5, ("MAY",)),
    "mai": (5, ("MAY",)),
    "jun": (6, ("JUN",)),
    "jul": (7, ("JUL",)),
    "aug": (8, ("AUG",)),
    "sep": (9, ("SEPT", "SEP")),
    "oct": (10, ("OCT",)),
    "okt": (10, ("OCT",)),
    "nov": (11, ("NOV",)),
    "dec": (12, ("DEC",)),
    "dez": (12, ("DEC",)),
}
_STEMS = dict(_MONTHS.values())
_DAY_MONTH = re.compile(r"(\d{1,2})[-/. ]+([A-Za-zä]{3})t?\.?(?:[-/ ](?:\d{2}|\d{4}))?")
_MONTH_DAY = re.compile(r"([A-Za-zä]{3})t?[-/. ]+(\d{1,2})")
_ISO_DATE = re.compile(r"\d{4}-(\d{2})-(\d{2})(?:[ T]00:00:00(?:\.0+)?)?")
_SLASHED_DATE = re.compile(r"(\d{1,2})/(\d{1,2})/(?:\d{2}|\d{4})")


# ----------------------------------------------------------------------------------------------------------------------
# Report
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class GeneResolution:
    """What each gene name was taken for; print it for a table.

    Parameters
    ----------
    names
        (genes,), the names as given.
    token_ids
        (genes,) int64; -1 where a name was not resolved.
    rule
        (genes,) strings: the rule by which a name was resolved, or why it was not; `RULES` explains each.
    symbols
        (genes,) strings: the approved symbol, also of a gene outside the vocabulary; "" where there is none.
    ambiguous
        The symbols that each ambiguous name may stand for.
    kinds
        Names by what they look like: "symbol", "Ensembl id", "HGNC id", "NCBI Gene id" and "other".
    notes
        Further counts: genome prefixes that were taken off, groups of genes outside the vocabulary, species.
    counts
        (genes,) summed counts of each column, by which `coverage` is weighted; None where they are not known.
    """

    names: np.ndarray
    token_ids: np.ndarray
    rule: np.ndarray
    symbols: np.ndarray
    ambiguous: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    kinds: Mapping[str, int] = field(default_factory=dict)
    notes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    counts: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.names)

    @property
    def num_resolved(self) -> int:
        """How many names stand for a gene of the vocabulary."""
        return int((self.token_ids >= 0).sum())

    @property
    def coverage(self) -> float | None:
        """Share of the cells' counts that fall on resolved genes; antibodies and the like do not count as counts."""
        if self.counts is None:
            return None
        total = self.counts[self.rule != NOT_A_GENE].sum()
        return float(self.counts[self.token_ids >= 0].sum() / total) if total else 0.0

    @functools.cached_property
    def duplicates(self) -> dict[str, list[str]]:
        """Genes that several columns stand for, by symbol, with those columns' names; their counts are added up."""
        names_of = defaultdict(list)
        ids, how_many = np.unique(self.token_ids[self.token_ids >= 0], return_counts=True)
        for column in np.flatnonzero(np.isin(self.token_ids, ids[how_many > 1])):
            names_of[str(self.symbols[column])].append(str(self.names[column]))
        return dict(names_of)

    @functools.cached_property
    def named_by_two_kinds(self) -> dict[str, list[str]]:
        """Those of `duplicates` that are named both by a symbol and by an id."""
        return {
            symbol: names
            for symbol, names in self.duplicates.items()
            if len({_kind(name.strip()) for name in names}) > 1
        }

    @property
    def species(self) -> str | None:
        """Another species that most of the recognised names belong to, or None."""
        others = self.notes.get("species", {})
        if sum(others.values()) <= self.num_resolved:
            return None
        return max(others, key=others.get)

    def with_counts(self, counts: np.ndarray) -> "GeneResolution":
        """The same resolution, weighted by the summed counts of each column, (genes,)."""
        counts = np.asarray(counts, dtype=np.float64)
        if counts.shape != self.token_ids.shape:
            raise ValueError(
                f"`counts` must have one number for each of the {len(self):,} names, got shape {counts.shape}. "
                "Pass the matrix's sums over cells."
            )
        return dataclasses.replace(self, counts=counts)

    def filled_from(self, other: "GeneResolution") -> "GeneResolution":
        """The same columns, with names of them from elsewhere, such as ids beside symbols, where nothing was found.

        A gene that is outside the vocabulary by its first name stays so.
        """
        filled = np.isin(self.rule, (AMBIGUOUS, UNKNOWN_ENSEMBL, CLONE, UNKNOWN)) & (other.symbols != "")
        if not filled.any():
            return self
        changed = {
            key: np.where(filled, getattr(other, key), getattr(self, key))
            for key in ("names", "token_ids", "rule", "symbols")
        }
        note = "found by further columns of names"
        before = self.notes.get(note, {}).get("columns", 0)
        left = tuple(str(name).strip() for name in self.names[(self.rule == AMBIGUOUS) & ~filled])
        return dataclasses.replace(
            self,
            **changed,
            ambiguous={
                name: symbols for name, symbols in self.ambiguous.items() if any(text.endswith(name) for text in left)
            },
            notes={**self.notes, note: {"columns": before + int(filled.sum())}},
        )

    def without(self, is_other: np.ndarray) -> "GeneResolution":
        """The same columns, those of a mask (genes,) left out as no genes: antibodies, peaks, hashtags."""
        changed = {
            "token_ids": np.where(is_other, -1, self.token_ids),
            "rule": np.where(is_other, NOT_A_GENE, self.rule),
        }
        return dataclasses.replace(self, **changed)

    def require(self, min_coverage: float = 0.0, source: str = "the names") -> None:
        """Raise unless enough of the expression is of known human genes.

        Parameters
        ----------
        min_coverage
            Share of the counts that must fall on resolved genes; of the names, where counts are not known.
        source
            Where the names are from, for the error.

        Raises
        ------
        ValueError
            If most genes are of another species, or the share is lower.
        """
        if not 0 <= min_coverage <= 1:
            raise ValueError(f"`min_coverage` is a share from 0 to 1, got {min_coverage}. 0 switches it off.")
        if self.species:
            shown = self.names[self.rule == SPECIES]
            raise ValueError(
                f"PanFoMa reads human genes, got those of {self.species}{examples(shown)} in {source}. Map them to "
                "their human one-to-one orthologues (Ensembl BioMart) and pass those as gene names; a score for such "
                "cells is not to be trusted as for human ones."
            )
        num_genes = int((self.rule != NOT_A_GENE).sum())
        of_names = self.num_resolved / num_genes if num_genes else 0.0
        share, what = (of_names, "gene names") if self.coverage is None else (self.coverage, "counts")
        if share < min_coverage:
            columns = np.flatnonzero((self.token_ids < 0) & (self.rule != NOT_A_GENE))
            if self.counts is not None:
                columns = columns[np.argsort(-self.counts[columns], kind="stable")]
            raise ValueError(
                f"At least {min_coverage:.0%} of the {what} must be of genes that the model knows, got {share:.1%} "
                f"in {source} ({self.num_resolved:,} of {len(self):,} names); the largest of the others: "
                f"{', '.join(str(self.names[column]) for column in columns[:5])}. "
                "Name the column that holds symbols or Ensembl ids with `gene_column`, or lower `min_coverage`."
            )

    def by_rule(self) -> dict[str, int]:
        """Number of names by rule, in the order of `RULES`."""
        counted = Counter(self.rule.tolist())
        return {rule: counted[rule] for rule in RULES if counted[rule]}

    def summary(self) -> str:
        """One line: how many names were resolved, by which rules."""
        rules = ", ".join(f"{count:,} {rule}" for rule, count in self.by_rule().items())
        covered = "" if self.coverage is None else f", {self.coverage:.1%} of the counts"
        return f"{self.num_resolved:,} of {len(self):,} gene names resolved{covered} ({rules})"

    def to_dict(self, num_examples: int = 5) -> dict:
        """Everything in the report as what JSON can hold; the names themselves only as examples."""
        rules = {}
        for rule, count in self.by_rule().items():
            columns = np.flatnonzero(self.rule == rule)
            if self.counts is not None:
                columns = columns[np.argsort(-self.counts[columns], kind="stable")]
            rules[rule] = {"names": count, "examples": [str(self.names[column]) for column in columns[:num_examples]]}
            if self.counts is not None and (total := self.counts.sum()):
                rules[rule]["share_of_counts"] = float(self.counts[columns].sum() / total)
        return {
            "genes": len(self),
            "resolved": self.num_resolved,
            "coverage": self.coverage,
            "rules": rules,
            "ambiguous": {name: list(symbols) for name, symbols in self.ambiguous.items()},
            "duplicates": self.duplicates,
            "kinds": dict(self.kinds),
            "notes": {key: dict(values) for key, values in self.notes.items()},
        }

    def provenance(self) -> dict:
        """What an AnnData's ``uns`` keeps: numbers by rule, the share of counts, and columns that were added up."""
        kept = {
            "resolved": self.num_resolved,
            "total": len(self),
            "by_rule": self.by_rule(),
            "genes_of_several_columns": len(self.duplicates),
        }
        return kept if self.coverage is None else {**kept, "coverage": round(self.coverage, 6)}

    def __str__(self) -> str:
        """A table: names and counts by rule, then what is ambiguous and what was added up."""
        facts = self.to_dict(num_examples=3)
        lines = [f"{'gene names':<24}{'names':>8}{'counts':>10}  examples"]
        for rule, row in facts["rules"].items():
            share = row.get("share_of_counts")
            shown = ", ".join(row["examples"])
            lines.append(f"{rule:<24}{row['names']:>8,}{'' if share is None else f'{share:.2%}':>10}  {shown}")
        covered = "" if self.coverage is None else f"{self.coverage:.2%}"
        of_genes = ", antibodies and the like not counted" if NOT_A_GENE in facts["rules"] else ""
        lines.append(f"{'resolved':<24}{self.num_resolved:>8,}{covered:>10}  of {len(self):,}{of_genes}")
        if self.duplicates:
            shown = "; ".join(f"{gene} from {', '.join(names)}" for gene, names in list(self.duplicates.items())[:3])
            lines.append(f"counts added up for {len(self.duplicates):,} genes of several columns: {shown}")
        for name, symbols in list(self.ambiguous.items())[:5]:
            lines.append(f"ambiguous: {name} may be {' or '.join(symbols)}")
        for note, values in self.notes.items():
            lines.append(f"{note}: {', '.join(f'{key} {count:,}' for key, count in values.items())}")
        return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# Table
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Match:
    """A rule, the rows of the table that it found, and what else it names: an added token, or a species."""

    rule: str
    rows: tuple[int, ...] = ()
    label: str = ""


def _rows_by_name(column: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The rows that each name stands in; a cell holds several names between bars."""
    rows = {}
    for row, names in enumerate(column):
        for name in names.split("|") if names else ():
            if row not in (others := rows.get(name, ())):
                rows[name] = (*others, row)
    return rows


def _spelled(name: str) -> str:
    """A name without what files change: case, and the separator, which R's make.names turns into a dot."""
    return name.casefold().translate(_SEPARATORS)


class GeneTable:
    """HGNC's genes and every name of theirs.

    Parameters
    ----------
    table
        The gzipped table that ``scripts/build_gene_table.py`` writes.
    """

    def __init__(self, table: bytes):
        lines = gzip.decompress(table).decode("utf-8").splitlines()
        self.source = lines[0].removeprefix("# ")
        cells = zip(*(line.split("\t") for line in lines[2:]), strict=True)
        columns = dict(zip(lines[1].split("\t"), cells, strict=True))
        if "token_id" not in columns:
            raise ValueError(
                f"A gene table has a column token_id, got {', '.join(columns)}. It is of a development version of "
                "panfoma-hf: fine-tune that checkpoint again."
            )
        self.all_symbols, self.locus_group = columns["symbol"], columns["locus_group"]
        self.token_of_row = [int(token or -1) for token in columns["token_id"]]
        self.symbols = [symbol for symbol, token in zip(self.all_symbols, self.token_of_row, strict=True) if token > 0]
        if [token for token in self.token_of_row if token > 0] != list(range(1, len(self.symbols) + 1)):
            raise ValueError(
                "The token ids of a gene table must be 1, 2, 3 and so on, got others. "
                "Build it with scripts/build_gene_table.py."
            )
        self.ensembl, self.ncbi, self.hgnc = (
            _rows_by_name(columns[name]) for name in ("ensembl_id", "ncbi_gene_id", "hgnc_id")
        )
        # The later of equal names wins: approved over previous over alias. Previous symbols come before aliases, as
        # count files are written with what was approved at their time: KMT2D was MLL2, which is an alias of KMT2B.
        tiers = ((ALIAS, "alias_symbols"), (PREVIOUS, "previous_symbols"), (APPROVED, "symbol"))
        self.by_symbol = {
            name: _Match(rule, rows) for rule, column in tiers for name, rows in _rows_by_name(columns[column]).items()
        }
        self._resolved: dict[tuple, GeneResolution] = {}

    @functools.cached_property
    def by_spelling(self) -> dict[str, tuple[int, ...]]:
        """Rows of the symbols that are equal but for case and separators, of the best rule among them."""
        best = {}
        for name, match in self.by_symbol.items():
            if match.rule != ALIAS or len(name) >= _MIN_ALIAS:
                best.setdefault((_spelled(name), match.rule), []).extend(match.rows)
        return {
            key: tuple(dict.fromkeys(rows))
            for rule in (ALIAS, PREVIOUS, APPROVED)
            for (key, rule_of_key), rows in best.items()
            if rule_of_key == rule
        }

    def resolve(self, names: np.ndarray, added: Mapping[str, int]) -> GeneResolution:
        """Find the gene of each name, (genes,), with tokens that were added to the vocabulary."""
        texts = tuple(map(str, names.tolist()))
        key = (texts, tuple(added.items()))
        if len(texts) > _MAX_CACHED:
            return _Resolver(self, texts, added).report(names)
        if key not in self._resolved:
            if len(self._resolved) >= 8:  # a file's names are asked for again and again, and few files at a time
                self._resolved.pop(next(iter(self._resolved)))
            self._resolved[key] = _Resolver(self, texts, added).report(names)
        return self._resolved[key]

    def find_date(self, name: str) -> tuple[int, ...]:
        """Rows of the symbols that a spreadsheet turns into this date.

        Symbols that were approved at some time come before aliases, as count files are written with the former.
        """
        candidates = [f"{stem}{day}" for month, day in _dates(name) for stem in _STEMS[month]]
        matches = [self.by_symbol[name] for name in candidates if name in self.by_symbol]
        rows = {row for match in matches if match.rule != ALIAS for row in match.rows}
        return tuple(sorted(rows or {row for match in matches for row in match.rows}))


def _dates(name: str) -> list[tuple[int, int]]:
    """(month, day) that a date may stand for; two where its order is not known, none where it is no date."""
    if not (name[:1].isdigit() or name[:3].casefold() in _MONTHS):
        return []
    if match := _DAY_MONTH.fullmatch(name):
        day, month = int(match[1]), _MONTHS.get(match[2].casefold())
        return [(month[0], day)] if month else []
    if match := _MONTH_DAY.fullmatch(name):
        month, day = _MONTHS.get(match[1].casefold()), int(match[2])
        return [(month[0], day)] if month else []
    if match := _ISO_DATE.fullmatch(name):
        pairs = [(int(match[1]), int(match[2]))]
    elif match := _SLASHED_DATE.fullmatch(name):
        first, second = int(match[1]), int(match[2])
        pairs = [(first, second), (second, first)]
    else:
        return []
    return [(month, day) for month, day in dict.fromkeys(pairs) if 1 <= month <= 12 and day]


# ----------------------------------------------------------------------------------------------------------------------
# Resolution
# ----------------------------------------------------------------------------------------------------------------------


def _are_row_numbers(numbers: Sequence[int]) -> bool:
    """Whether numbers, in the order of a file, count the rows of a table or a part of them.

    Ids of genes are scattered up to 10^8 and stand in any order; what is dense, or ascends within what a table may
    have, are numbers of rows.
    """
    if len(numbers) < 3:
        return False
    is_dense = max(numbers) < 2 * len(numbers)
    return is_dense or (len(numbers) >= 20 and max(numbers) < 10**5 and bool((np.diff(numbers) > 0).all()))


class _Resolver:
    """Resolves the names of one file: some rules look at the other names too."""

    def __init__(self, table: GeneTable, names: tuple[str, ...], added: Mapping[str, int]):
        self.table, self.added = table, added
        self.prefixes = Counter()
        self.names = [self._clean(name) for name in names]
        self.matches = {name: self._certain(name) for name in dict.fromkeys(self.names)}
        unmatched = [name for name, match in self.matches.items() if match.rule == UNKNOWN]
        self.numbers_are_rows = _are_row_numbers([int(name) for name in unmatched if name.isdecimal()])
        num_human = sum(bool(match.rows) or match.rule == ADDED for match in self.matches.values())
        self.is_mouse = sum(_MOUSE_STYLE.fullmatch(name) is not None for name in unmatched) > num_human
        # Only now, so that a suffix is judged by what the names themselves say.
        self.matches.update({name: self._mended(name) for name in unmatched})

    def _clean(self, name: str) -> str:
        name = name.strip().strip("\"'").strip()
        if match := _HUMAN_PREFIX.match(name):
            self.prefixes[match[0]] += 1
            name = name[match.end() :]
        return name

    def _certain(self, name: str) -> _Match:
        """What a name says by itself."""
        if name in self.added:
            return _Match(ADDED, label=name)
        if name.isdecimal() or name.casefold() in _MISSING:  # names of a few genes too, but not in files
            return _Match(UNKNOWN)
        if match := self.table.by_symbol.get(name):
            return match
        if match := _HUMAN_ENSEMBL.search(name):
            if rows := self.table.ensembl.get(match[0].upper()):
                return _Match(ENSEMBL, rows)
            # An id that was retired may stand beside a symbol: SYMBOL_ENSG00000000000.
            beside = _HUMAN_ENSEMBL.sub("", name).strip("_|.:- ")
            return self.table.by_symbol.get(beside, _Match(UNKNOWN_ENSEMBL))
        if match := _HGNC_ID.fullmatch(name):
            return self._by_id(HGNC, self.table.hgnc, f"HGNC:{match[1]}")
        if match := _NCBI_ID.fullmatch(name):
            return self._by_id(NCBI, self.table.ncbi, match[1])
        if match := _OTHER_SPECIES_ID.fullmatch(name):
            prefix = next(group for group in match.groups() if group)
            return _Match(SPECIES, label=_SPECIES.get(prefix.upper(), "another species"))
        if match := _OTHER_PREFIX.match(name):
            return _Match(SPECIES, label="zebrafish" if match[0].lower().startswith("grcz") else _MOUSE)
        return _Match(NOT_A_GENE if _NOT_A_GENE.fullmatch(name) else UNKNOWN)

    @staticmethod
    def _by_id(rule: str, rows_of: Mapping[str, tuple[int, ...]], name: str) -> _Match:
        return _Match(rule, rows_of[name]) if name in rows_of else _Match(UNKNOWN)

    def _mended(self, name: str) -> _Match:
        """What a name was before a file or a program changed it."""
        if name.casefold() in _MISSING:
            return _Match(UNKNOWN)
        if name.isdecimal():
            return self._by_id(NCBI, {} if self.numbers_are_rows else self.table.ncbi, name.lstrip("0"))
        if self.is_mouse and _MOUSE_STYLE.fullmatch(name):
            return _Match(SPECIES, label=_MOUSE)
        if rows := self.table.by_spelling.get(_spelled(name)):
            return _Match(SPELLING, rows)
        if rows := self.table.find_date(name):
            return _Match(DATE, rows)
        base = name
        while match := _SUFFIX.fullmatch(base):
            base = match[1]
            # make_unique leaves the first of equal names as it was, so a base that is not there must be beyond doubt.
            is_present = base in self.matches
            found = self.matches[base] if is_present else self._certain(base)
            if is_present and found.rule == UNKNOWN:
                found = self._mended(base)
            if not found.rows or not (is_present or found.rule in (APPROVED, ENSEMBL)):
                continue
            # ACE-2 may be the second ACE of a file, or ACE2, unless that is there too.
            other = self.table.by_symbol.get(match[1] + match[2])
            may_be_other = other is not None and match[1] + match[2] not in self.matches
            return _Match(SUFFIX, tuple(dict.fromkeys((*found.rows, *(other.rows if may_be_other else ())))))
        return _Match(CLONE if _CLONE.match(name) else UNKNOWN)

    def report(self, names: np.ndarray) -> GeneResolution:
        """The resolution of all names, in their order."""
        table = self.table
        resolved, ambiguous, groups, species = {}, {}, Counter(), Counter()
        for name, match in self.matches.items():
            token, symbol, rule = -1, "", match.rule
            if rule == ADDED:
                token, symbol = self.added[match.label], match.label
            elif rule == SPECIES:
                species[match.label] += 1
            elif len(match.rows) > 1:
                rule = AMBIGUOUS
                ambiguous[name] = tuple(sorted(table.all_symbols[row] for row in match.rows))
            elif match.rows:
                (row,) = match.rows
                token, symbol = int(table.token_of_row[row]), table.all_symbols[row]
                if token < 0:
                    rule = OUTSIDE
                    groups[table.locus_group[row]] += 1
            resolved[name] = token, rule, symbol
        notes = {
            "genome prefixes taken off": dict(self.prefixes),
            OUTSIDE: dict(groups.most_common()),
            "species": dict(species),
        }
        token_ids, rule, symbols = (
            zip(*(resolved[name] for name in self.names), strict=True) if self.names else ((),) * 3
        )
        resolution = GeneResolution(
            names=names.copy(),
            token_ids=np.array(token_ids, dtype=np.int64),
            rule=np.array(rule, dtype=object),
            symbols=np.array(symbols, dtype=object),
            ambiguous=dict(sorted(ambiguous.items())),
            kinds=dict(Counter(map(_kind, self.names)).most_common()),
            notes={note: values for note, values in notes.items() if values},
        )
        for array in (resolution.names, resolution.token_ids, resolution.rule, resolution.symbols):
            array.setflags(write=False)  # who asks for the same names again gets the same object
        return resolution


def _kind(name: str) -> str:
    if _HUMAN_ENSEMBL.match(name):
        return ENSEMBL
    if _HGNC_ID.fullmatch(name):
        return HGNC
    if name.isdecimal() or _NCBI_ID.fullmatch(name):
        return "number"
    return "other" if _OTHER_SPECIES_ID.fullmatch(name) or _NOT_A_GENE.fullmatch(name) else "symbol"


@functools.lru_cache(maxsize=4)
def gene_table(table: bytes) -> GeneTable:
    """The parsed table; tokenizers of the same table share it."""
    return GeneTable(table)


__all__ = ["RULES", "GeneResolution", "GeneTable", "gene_table"]
