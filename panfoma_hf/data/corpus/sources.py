"""The source list of a corpus: which files of which studies, what their columns mean, and whose they are."""

import difflib
import glob
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, ValidationError, model_validator

from .. import schema
from ..cells import MIN_COVERAGE
from ..plain_yaml import PlainYaml
from ..quality import Quality


# What is written for nothing, whatever the column; other wordings are mapped to null in the list.
_MISSING = ("", "nan", "NaN", "None", "<NA>")
_TRUTHS = {"True": True, "False": False}


def _text(value: Any) -> str:
    """A value of YAML or of a column as text, by which they are compared: 1.0 is 1, TRUE is True."""
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    text = str(value).strip()
    return text.capitalize() if text.lower() in ("true", "false") else text


def _text_keys(table: Any) -> Any:
    return {_text(key): value for key, value in table.items()} if isinstance(table, dict) else table


def _texts(values: Any) -> Any:
    return [None if value is None else _text(value) for value in values] if isinstance(values, list) else values


def _known_fields(table: Any) -> Any:
    for key in table if isinstance(table, dict) else ():
        if key not in schema.CELL_FIELDS:
            raise ValueError(
                f"must be one of {', '.join(schema.CELL_FIELDS)}, got {key!r}{_similar(key, schema.CELL_FIELDS)}"
            )
    return table


def _similar(word: str, words) -> str:
    found = difflib.get_close_matches(str(word), list(words), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


Columns = Annotated[dict[str, str], BeforeValidator(_known_fields)]
Words = Annotated[dict[str, str | StrictBool | None], BeforeValidator(_text_keys)]
Texts = Annotated[list[str], BeforeValidator(_texts)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=80)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Study(_Strict):
    """One study: its files, and what is known of their cells.

    Every field of a cell (`schema.CELL_FIELDS`) comes from a column of ``obs``, is the same for the whole study, or is
    missing.
    """

    files: Annotated[list[str], Field(min_length=1)]
    """Paths relative to the root, or patterns such as ``GSE1/*.h5ad``; each file is one unit of work."""
    licence: Annotated[str, Field(min_length=1)]
    """Under which the data may be used, as words or an SPDX identifier."""
    citation: Annotated[str, Field(min_length=1)]
    """Whose data they are: a reference, a DOI, an accession."""
    url: str | None = None
    cohort: Name | None = None
    """Whose donors they are, where several studies share donors or cells; None takes the study's own name. Donors go
    by cohort and name, and cells without a donor may be of any donor of their cohort."""
    layer: str | None = None
    """The matrix to read; None looks for the counts."""
    gene_column: str | None = None
    min_coverage: Annotated[float, Field(ge=0, le=1)] = MIN_COVERAGE
    columns: Columns = {}
    """Fields of a cell and the columns of ``obs`` that hold them."""
    values: Annotated[dict[str, str | StrictBool], BeforeValidator(_known_fields)] = {}
    """Fields that are the same for all cells of the study."""
    labels: Annotated[dict[str, Words], BeforeValidator(_known_fields)] = {}
    """By field, the study's wording and the benchmark's; null where the wording says nothing."""
    exclude: Annotated[
        dict[str, Annotated[list[str | None], BeforeValidator(_texts)]], BeforeValidator(_text_keys)
    ] = {}
    """Columns of ``obs``, and the values in them of cells to leave out; null leaves out cells without one."""
    quality: dict[str, Any] = {}
    """Thresholds that differ from the list's."""

    @model_validator(mode="after")
    def _check_fields(self) -> "Study":
        for field in self.values:
            if field in self.columns:
                raise ValueError(f"{field} must come from `columns` or `values`, got both; keep one")
        for field in self.labels:
            if field not in self.columns:
                raise ValueError(f"`labels` of {field} need a column in `columns`, got none; name it or leave them out")
        words = [(field, value) for field, value in self.values.items()]
        words += [(field, value) for field, labels in self.labels.items() for value in labels.values()]
        for field, value in words:
            if value is not None and (field == schema.IS_MALIGNANT) != isinstance(value, bool):
                raise ValueError(
                    f"{schema.IS_MALIGNANT} is true or false and other fields are text, got {field}: {value!r}"
                )
        return self


class SplitSettings(_Strict):
    """How a split is made; see `panfoma_hf.data.corpus.splits.make_split`."""

    by: Literal["donor", "study", "cancer_type", "cell"]
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.1
    test: Annotated[float, Field(gt=0, lt=1)] = 0.1
    seed: int = 0
    held_out: Texts | None = None
    """Of which the test cells are: studies, cancer types, or donors as cohort/donor; None draws them."""
    donors: Literal["error", "allow"] = "error"
    """What to do about donors on both sides."""
    duplicates: Literal["error", "leave_out", "allow"] | None = None
    """What to do about equal cells on both sides; leave_out keeps them on the side of the first, null does as the list
    says."""

    @model_validator(mode="after")
    def _check(self) -> "SplitSettings":
        if self.validation + self.test >= 1:
            raise ValueError(f"validation and test must leave cells to train on, got {self.validation} and {self.test}")
        if self.by == "cell" and self.held_out is not None:
            raise ValueError("a split by cell holds no names out, got `held_out`; leave it out")
        return self


DEFAULT_SPLITS = {
    "donor": SplitSettings(by="donor"),
    "study": SplitSettings(by="study"),
    "cancer_type": SplitSettings(by="cancer_type"),
    "random": SplitSettings(by="cell", donors="allow"),
}


class SourceList(_Strict):
    """What a corpus is made of. Read one with `SourceList.load`."""

    name: Name
    description: str = ""
    licence: str = "other"
    """Of the corpus as a whole, as the Hub names licences; each study keeps its own."""
    quality: Quality = Quality()
    vocabularies: Annotated[dict[str, Texts], BeforeValidator(_known_fields)] = {}
    """By field, the only words it may have in the end."""
    studies: Annotated[dict[Name, Study], Field(min_length=1)]
    splits: dict[Name, SplitSettings] | None = None
    """None makes those of `DEFAULT_SPLITS` that the corpus allows."""
    duplicates: Literal["error", "leave_out", "allow"] = "error"
    """What splits do about equal cells on both sides, unless they say it themselves."""

    @model_validator(mode="after")
    def _check_studies(self) -> "SourceList":
        folders: dict[str, str] = {}
        for name in self.studies:
            if name in ("state.json", "dataset_info.json"):
                raise ValueError(f"a study's name is that of its folder, got {name!r}, which is a file's; rename it")
            if folders.setdefault(name.lower(), name) != name:
                raise ValueError(
                    f"names of studies must differ in more than case, got {folders[name.lower()]!r} and {name!r}"
                )
            try:
                self.quality_of(name)
            except ValidationError as error:
                raise ValueError(f"quality of {name}: {_explained(error)}") from None
        return self

    @classmethod
    def load(cls, path: str | Path) -> "SourceList":
        """Read and check a list in YAML.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If it is no YAML, a key stands twice, or a setting is unknown, missing or out of its range.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"A source list is a YAML file, got nothing at {path}. Check the path.")
        try:
            content = yaml.load(path.read_text(encoding="utf-8"), Loader=PlainYaml)
        except (yaml.YAMLError, ValueError, TypeError) as error:  # of dates that are none, and of text that is no UTF-8
            raise ValueError(
                f"A source list must be YAML, got {' '.join(str(error).split())} in {path}. Mend it."
            ) from None
        if not isinstance(content, dict):
            raise ValueError(
                f"A source list has `name` and `studies`, got {type(content).__name__} in {path}. "
                "docs/corpus.md shows one."
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise ValueError(f"{path}: {_explained(error)}. docs/corpus.md lists the settings.") from None

    def quality_of(self, study: str) -> Quality:
        """The list's thresholds with the study's own."""
        return Quality.model_validate({**self.quality.model_dump(), **self.studies[study].quality})

    def cohort_of(self, study: str) -> str:
        """Whose donors a study's are."""
        return self.studies[study].cohort or study

    def split_settings(self) -> dict[str, SplitSettings]:
        """The splits asked for, or those made by default."""
        splits = DEFAULT_SPLITS if self.splits is None else self.splits
        return {
            name: settings.model_copy(update={"duplicates": settings.duplicates or self.duplicates})
            for name, settings in splits.items()
        }

    def files(self, root: str | Path) -> list[tuple[str, str]]:
        """Study and path relative to ``root`` of every file, studies in the list's order, files in that of their names.

        Raises
        ------
        FileNotFoundError
            If a file is not there, or a pattern fits none.
        ValueError
            If a file is listed twice.
        """
        found, missing = {}, []
        for study, settings in self.studies.items():
            for pattern in settings.files:
                if Path(pattern).is_absolute():
                    raise ValueError(
                        f"Files are named relative to the root, got {pattern} of {study}. Name the folder as the root."
                    )
                is_pattern = re.search(r"[*?\[]", pattern) and not Path(root, pattern).exists()
                paths = sorted(glob.glob(pattern, root_dir=root, recursive=True)) if is_pattern else [pattern]
                if not paths or not Path(root, paths[0]).exists():
                    missing.append(f"{pattern} of {study}")
                for path in paths:
                    path = Path(os.path.normpath(path)).as_posix()
                    if path in found:
                        raise ValueError(
                            f"A file belongs to one study, once, got {path} in {found[path]} and in {study}. Keep one."
                        )
                    found[path] = study
        if missing:
            raise FileNotFoundError(
                f"Every file of the source list must be there, got nothing for {len(missing):,}: "
                f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}. They are looked for in "
                f"{Path(root).resolve()}: name another folder as the root, or mend the list."
            )
        return [
            (study, path) for path, study in sorted(found.items(), key=lambda item: (self._order(item[1]), item[0]))
        ]

    def _order(self, study: str) -> int:
        return list(self.studies).index(study)


def _explained(error: ValidationError) -> str:
    """What pydantic found, each as a place, a rule and what was got."""
    lines = []
    for item in error.errors():
        place = ".".join(str(part) for part in item["loc"]) or "the list"
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            names = {*Study.model_fields, *SourceList.model_fields, *Quality.model_fields, *SplitSettings.model_fields}
            lines.append(f"{place} is no setting{_similar(item['loc'][-1], names)}")
        elif item["type"] == "missing":
            lines.append(f"{place} is missing")
        elif item["type"] == "value_error":
            lines.append(f"{place}: {message}")
        else:
            lines.append(f"{place}: {message}, got {item['input']!r}")
    return "; ".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# A study's words for its cells
# ----------------------------------------------------------------------------------------------------------------------


def cell_fields(obs: pd.DataFrame, study: Study, source: str) -> tuple[pd.DataFrame, dict[str, list[str]]]:
    """What the source list says of each cell, in the benchmark's words.

    Parameters
    ----------
    obs
        (cells,), the file's.
    study
        Says which columns to take, and what to call what is in them.
    source
        The file, for errors.

    Returns
    -------
    (cells,), a categorical column for each of `schema.CELL_FIELDS`; and the wordings that occurred, by field.

    Raises
    ------
    ValueError
        If a column is not there, or malignancy is neither true nor false.
    """
    fields, seen = {}, {}
    for field in schema.CELL_FIELDS:
        if field in study.columns:
            words = _words(_column(obs, study.columns[field], f"columns.{field}", source))
            labels = study.labels.get(field, {})
            seen[field] = words.categories.tolist()
            renamed = {word: _TRUTHS.get(word, word) if field == schema.IS_MALIGNANT else word for word in seen[field]}
            renamed.update({word: labels[word] for word in seen[field] if word in labels})
            if field == schema.IS_MALIGNANT and (
                others := [w for w, new in renamed.items() if new not in (True, False, None)]
            ):
                raise ValueError(
                    f"{schema.IS_MALIGNANT} is true, false or null, got {', '.join(others[:5])} in "
                    f"obs[{study.columns[field]!r}] of {source}. Map these words with `labels`."
                )
            fields[field] = _renamed(words, renamed)
        else:
            value = study.values.get(field)
            fields[field] = pd.Categorical.from_codes(
                np.full(len(obs), -1 if value is None else 0), categories=[] if value is None else [value]
            )
    return pd.DataFrame(fields), seen


def is_excluded(obs: pd.DataFrame, study: Study, source: str) -> np.ndarray:
    """(cells,), whether the source list leaves a cell out.

    Raises
    ------
    ValueError
        If a column is not there.
    """
    excluded = np.zeros(len(obs), dtype=bool)
    for column, values in study.exclude.items():
        words = _words(_column(obs, column, "exclude", source))
        codes = [place for place, word in enumerate(words.categories) if word in values]
        excluded |= np.isin(words.codes, [*codes, -1] if None in values else codes)
    return excluded


def exclusions_seen(obs: pd.DataFrame, study: Study, source: str) -> dict[str, list[str]]:
    """By column, those of the values to leave out that occur in a file."""
    found = {column: set(_words(_column(obs, column, "exclude", source)).categories) for column in study.exclude}
    return {column: [word for word in study.exclude[column] if word in found[column]] for column in found}


def _column(obs: pd.DataFrame, column: str, setting: str, source: str) -> pd.Series:
    if column not in obs:
        raise ValueError(
            f"`{setting}` must name a column of obs, got {column!r}{_similar(column, obs)}; {source} has "
            f"{', '.join(map(str, obs)) or 'none'}. Mend the source list."
        )
    return obs[column]


def _words(column: pd.Series) -> pd.Categorical:
    """A column as text, missing where nothing is written; whole numbers as such, also where some are missing."""
    values = pd.Categorical(column)
    texts = [_text(value) for value in values.categories]
    return _renamed(
        values,
        {value: None if text in _MISSING else text for value, text in zip(values.categories, texts, strict=True)},
    )


def _renamed(words: pd.Categorical, names: dict) -> pd.Categorical:
    """Categories renamed, several perhaps to one, None to missing."""
    new = [names[word] for word in words.categories]
    categories = sorted({name for name in new if name is not None})
    place = {name: index for index, name in enumerate(categories)}
    codes = np.array([*(place.get(name, -1) if name is not None else -1 for name in new), -1])[words.codes]
    return pd.Categorical.from_codes(codes, categories=categories)


def check_vocabulary(counts: dict[str, dict[str, int]], vocabularies: dict[str, list[str]], source: str) -> None:
    """Raise ValueError where cells are called something that the list does not allow.

    Parameters
    ----------
    counts
        By field, its words and how many cells have them.
    vocabularies
        By field, the words that are allowed.
    source
        The file, for the error.
    """
    for field, allowed in vocabularies.items():
        others = sorted(set(counts[field]) - set(allowed))
        if others:
            raise ValueError(
                f"{field} must be of the list's vocabulary, got {', '.join(repr(word) for word in others[:5])}"
                f"{_similar(others[0], allowed)} in {source}. Map these words with `labels`, or add them to "
                f"`vocabularies`."
            )


def check_exclusions_occur(sources: SourceList, seen: dict[str, dict[str, set[str]]]) -> list[str]:
    """Values to leave out that no file of their study has, a line each: a typo leaves such cells in.

    Parameters
    ----------
    sources
        The list.
    seen
        By study and column, those that occurred.
    """
    return [
        f"{study}: `exclude` names {word!r} of {column}, which no cell has"
        for study, settings in sources.studies.items()
        for column, words in settings.exclude.items()
        for word in words
        if word is not None and study in seen and word not in seen[study].get(column, ())
    ]


def check_labels_occur(sources: SourceList, seen: dict[str, dict[str, set[str]]]) -> list[str]:
    """Words in label maps that no file of their study has, a line each: a typo leaves cells as they were called.

    Parameters
    ----------
    sources
        The list.
    seen
        By study and field, the wordings that occurred.
    """
    return [
        f"{study}: `labels` of {field} name {word!r}, which no cell has{_similar(word, seen[study].get(field, ()))}"
        for study, settings in sources.studies.items()
        for field, words in settings.labels.items()
        for word in words
        if study in seen and word not in seen[study].get(field, ())
    ]


def resolved_settings(sources: SourceList, study: str) -> dict[str, Any]:
    """What of the list decides the tokens and labels of a study's files, as JSON can hold it."""
    settings = sources.studies[study].model_dump(
        include={"layer", "gene_column", "min_coverage", "columns", "values", "labels", "exclude"}
    )
    return {**settings, "quality": sources.quality_of(study).model_dump()}
