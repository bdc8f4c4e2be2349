"""From recipe files and the command line to a configuration: defaults <- recipes <- options, all problems at once.

Nothing here builds a model or a process group; what is wrong is said before any long work starts.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from data_prep.cli import unknown_options
from data_prep.errors import UserError
from pipeline.config import RunConfig, inconsistencies
from pipeline.registry import load_plugin
from pipeline.user_files import read_yaml


def field_names(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, annotation) of everything that can be set."""
    for name, info in model.model_fields.items():
        kinds = (info.annotation, *get_args(info.annotation))
        sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if len(kinds) > 1 or not sections:  # a section that may be none can be set as a whole
            yield prefix + name, info.annotation
        for section in sections:
            if get_origin(info.annotation) is not list:
                yield from field_names(section, f"{prefix}{name}.")


def load_config(
    recipe: Path | Sequence[Path] | None, overrides: Mapping[str, str], also: Iterable[str] = ()
) -> RunConfig:
    """Defaults <- recipes, the first to the last <- overrides (dotted name -> text).

    `also` are the command's own options, to be suggested.  Raises UserError naming every unknown key (with the nearest
    right name) and every bad value.
    """
    recipes = [recipe] if isinstance(recipe, Path) else list(recipe or [])
    values = read_recipes(recipes)
    values = _without_other_data(values, [name.removeprefix("data.") for name in overrides])
    known = dict(field_names())
    problems = unknown_options(overrides, [*known, *also])
    for name, text in overrides.items():
        if name not in known:
            continue
        place = values
        *sections, last = name.split(".")
        for section in sections:
            inner = place.get(section)
            if inner is not None and not isinstance(inner, dict):
                break  # validation says what is wrong with it
            place[section] = place = dict(inner or {})
        else:
            place[last] = _value(text, known[name])
    if isinstance(plugin := values.get("plugin"), str):
        load_plugin(Path(plugin))  # before the names that it registers are checked
    try:
        config = validate(values, ",".join(map(str, recipes)) or "defaults")
    except UserError as error:
        raise UserError(*problems, *error.lines) from None
    if problems:
        raise UserError(*problems)
    return config


def validate(values: Mapping[str, Any], origin: str) -> RunConfig:
    """Typed config of nested values.  Raises UserError with one line for each problem."""
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        known = dict(field_names())
        raise UserError(*(f"{origin}: {explain(problem, known)}" for problem in error.errors())) from None
    if problems := list(inconsistencies(config)):
        raise UserError(*(f"{origin}: {line}" for line in problems))
    return config


def recipe_paths(names: str) -> list[Path]:
    """The files of a `--recipe` option, which has commas between several."""
    return [Path(name) for name in names.split(",")]


def merged(values: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with those of `over`, section by section; a list is replaced whole."""
    both = dict(values)
    for name, value in over.items():
        before = both.get(name)
        both[name] = merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return both


def read_recipes(paths: Iterable[Path]) -> dict[str, Any]:
    """Nested values of recipe files, laid over each other in order.  Raises UserError as `read_recipe`."""
    values: dict[str, Any] = {}
    for path in paths:
        over = read_recipe(path)
        given = over.get("data")
        values = merged(_without_other_data(values, given if isinstance(given, dict) else ()), over)
    return values


def _without_other_data(values: dict[str, Any], given: Collection[str]) -> dict[str, Any]:
    """`values` without the shard folders that those `given` later, of fields of `data`, take the place of."""
    replaced = {"path": "mix", "mix": "path"}
    gone = {other for name, other in replaced.items() if name in given and other not in given}
    data = values.get("data")
    if not gone or not isinstance(data, dict):
        return values
    return {**values, "data": {name: value for name, value in data.items() if name not in gone}}


def read_recipe(path: Path) -> dict[str, Any]:
    """The recipe file's nested values.  Raises UserError where it is missing or not YAML of a mapping."""
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"recipe {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"recipe {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"recipe {path}: expected sections such as `train:`")
    return values


def _value(text: str, annotation: Any) -> Any:
    """An option's text as YAML reads it, but text where text is wanted."""
    union = get_origin(annotation) in (Union, UnionType)
    kinds = get_args(annotation) if union else (annotation,)
    if str in kinds or any(get_origin(kind) is Literal for kind in kinds):
        return None if type(None) in kinds and text.lower() in ("none", "null") else text
    try:
        value = read_yaml(text)
    except ValueError:
        return text
    if isinstance(value, bool) and bool not in kinds:
        return text  # an option without a value, where a number was meant: validation refuses it
    return None if text.lower() == "none" else value


def explain(problem: Any, known: Iterable[str] = ()) -> str:
    """One of pydantic's errors in a line: the field's name and what is wrong; `known` names are suggested."""
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name, known, n=1)
        return f"unknown key {name}" + (f"; did you mean {close[0]}?" if close else "")
    message = problem["msg"].removeprefix("Value error, ")
    given = problem.get("input")
    shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool) else ""
    return f"{name}: {message}{shown}" if name else message
