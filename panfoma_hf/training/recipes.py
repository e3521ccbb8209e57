"""Recipes: what a run is made with, in a file that can be kept, sent and compared."""

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

from ..data.plain_yaml import PlainYaml


# The folder and the checkpoint to resume from are arguments of their own.
_GIVEN_OTHERWISE = {"output_dir", "resume_from_checkpoint", "remove_unused_columns", "logging_nan_inf_filter"}


def read_recipe(
    function: Callable, path: str | Path | None = None, changes: Sequence[str] = (), also: Sequence[str] = ()
) -> dict[str, Any]:
    """Read the keyword arguments of `pretrain` or `finetune` from a YAML file, and change some.

    Parameters
    ----------
    function
        What the recipe is for: it may name this function's keyword arguments, and those of
        `transformers.TrainingArguments`.
    path
        A YAML file with a mapping; or None.
    changes
        ``name=value`` each, the value in YAML.
    also
        Further names that are understood.

    Returns
    -------
    The arguments by name.

    Raises
    ------
    ValueError
        If the file is no mapping, or a name is not known.
    """
    recipe: dict[str, Any] = {}
    if path is not None:
        recipe = _parsed(Path(path).read_text(encoding="utf-8"), str(path)) or {}
        if not isinstance(recipe, dict):
            raise ValueError(f"A recipe is a mapping of names to values, got {type(recipe).__name__} in {path}.")
    recipe = {name: _number(value) for name, value in recipe.items()}
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"A change is `name=value`, got {change!r}. Write, for example, max_steps=1000.")
        recipe[name.strip()] = _number(_parsed(value, change))
    own = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    trainers = {field.name for field in dataclasses.fields(TrainingArguments) if field.init} - _GIVEN_OTHERWISE
    known = {*own, *also, *trainers}
    for name in recipe:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=2)
            hint = f" Did you mean {' or '.join(close)}?" if close else ""
            raise ValueError(
                f"A recipe names arguments of {function.__name__}() and of transformers.TrainingArguments, got "
                f"{name!r}.{hint}"
            )
    return recipe


def _parsed(text: str, place: str) -> Any:
    try:
        return yaml.load(text, Loader=PlainYaml)
    except yaml.YAMLError as error:
        raise ValueError(f"A recipe is YAML, got {error} in {place}. Mend it.") from error


def _number(value: Any) -> Any:
    """A value of YAML; numbers such as 1e-3, which YAML takes for text, as numbers."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
