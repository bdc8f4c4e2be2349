"""The command line of every command: `--name value` options in, one typed function call out.

Words are read by Python Fire with raw strings, and converted by the annotations of the command's own
function, so a date, `1, 2` or `1e-4` arrives as it was typed. All mistakes are reported together, one line
each, with status 2.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import math
import operator
import re
import signal
import sys
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import fire  # type: ignore[import-untyped]
from fire.decorators import SetParseFn  # type: ignore[import-untyped]

from data_prep.errors import UserError
from data_prep.storage import is_url, location_of

Given = dict[str, "str | list[str]"]


def parse(argv: Sequence[str], repeatable: Collection[str] = ()) -> Given:
    """Read `--name value`, `--name=value` and `--flag` (the value "True"); `-` and `_` in names are equal.

    An option named in `repeatable` gives the list of its values. A value that itself starts with `-` and a
    letter needs the form `--name=value`.

    Raises:
        UserError: a word that belongs to no option, or an option given twice.
    """
    words: list[str] = []
    found: dict[str, str] = {}

    @SetParseFn(str)
    def collect(*loose: str, **options: str) -> None:
        words.extend(loose)
        found.update(options)

    nameless = [word for word in argv if re.match(r"--(?![A-Za-z])", word)]
    # Fire keeps the last of equal names and reads `--no...` as a denial: a number in front prevents both.
    numbered = [re.sub(r"^--?(?=[A-Za-z])", f"--{i}:", word) for i, word in enumerate(argv)]
    # Fire would take a lone `-` for itself unless its separator is what no argument can hold.
    fire.Fire(collect, command=[*(word for word in numbered if word not in nameless), "--", "--separator=\0"])

    given: Given = {}
    problems = [f"unexpected word '{word}': options are written --name value" for word in [*words, *nameless]]
    for numbered_name, value in found.items():
        name = numbered_name.partition(":")[2]
        if name in repeatable:
            given.setdefault(name, []).append(value)  # type: ignore[union-attr]
        elif name in given:
            problems.append(f"--{name} is given twice")
        else:
            given[name] = value
    if problems:
        raise UserError(*problems)
    return given


def bind(target: Callable[..., object], given: Mapping[str, str | list[str]]) -> dict[str, Any]:
    """Convert options to the keyword arguments of `target`, a function or a dataclass, by its annotations.

    What a `**options` parameter of `target` would take stays raw.

    Raises:
        UserError: unknown or missing options and values of the wrong kind, all of them at once.
    """
    named = options_of(target)
    problems = [] if len(named) < len(inspect.signature(target).parameters) else unknown_options(given, named)
    arguments: dict[str, Any] = {name: value for name, value in given.items() if name not in named}
    for name, parameter in named.items():
        if name not in given:
            if parameter.default is parameter.empty:
                problems.append(f"--{name} is missing")
            continue
        try:
            arguments[parameter.name] = convert(parameter.annotation, given[name])
        except ValueError as error:
            problems.append(f"--{name} {given[name]}: {error}")
    if problems:
        raise UserError(*problems)
    return arguments


def options_of(target: Callable[..., object]) -> dict[str, inspect.Parameter]:
    """The options that `target` names, by what users type: `from_`, whose name Python keeps, is `--from`."""
    parameters = inspect.signature(target, eval_str=True).parameters.values()
    return {p.name.rstrip("_"): p for p in parameters if p.kind is not p.VAR_KEYWORD}


def unknown_options(given: Iterable[str], known: Iterable[str]) -> list[str]:
    """One line for each name of `given` that is not in `known`, with the nearest right name."""
    known = list(known)
    lines = []
    for name in given:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            lines.append(f"unknown option --{name}" + (f"; did you mean --{nearest[0]}?" if nearest else ""))
    return lines


def convert(annotation: Any, value: str | list[str]) -> Any:
    """Turn an option's text into what an annotation says.

    That is str, int, float, bool, Path, Path | str (a path or URL), a Literal, list[str], or one of these `| None`.

    Raises:
        ValueError: the text is not of that kind; the message says which is.
    """
    annotation = _required(annotation)
    if get_origin(annotation) is list:
        return value if isinstance(value, list) else [value]
    assert isinstance(value, str), f"a repeated option needs the annotation list[str], not {annotation}"
    if get_origin(annotation) is Literal:
        if value not in get_args(annotation):
            raise ValueError(f"expected one of {', '.join(get_args(annotation))}")
        return value
    return _SCALARS[annotation](value)


def _required(annotation: Any) -> Any:
    """X for `X | None`: an option that is given is never None."""
    if get_origin(annotation) in (Union, types.UnionType):
        return functools.reduce(operator.or_, [kind for kind in get_args(annotation) if kind is not type(None)])
    return annotation


def _integer(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]+", text):  # int() would also take 2025_07_01
        raise ValueError("expected a whole number")
    return int(text)


def _number(text: str) -> float:
    try:
        number = float("nan" if "_" in text else text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError("expected a number")
    return number


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError("expected true or false")
    return text.lower() == "true"


def _path(text: str) -> Path:
    if not text:
        raise ValueError("expected a path")
    return Path(text).expanduser()


def _location(text: str) -> Path | str:
    return location_of(text) if is_url(text) else _path(text)


_SCALARS: dict[Any, Callable[[str], Any]] = {
    str: str, int: _integer, float: _number, bool: _boolean, Path: _path, Path | str: _location,
}  # fmt: skip


def help_text(
    main: Callable[..., object], program: str, parts: Mapping[str, Callable[..., object]] | None = None
) -> str:
    """The usage line, `main`'s docstring, and its options with kind and default, then those of its parts."""
    lines = [f"usage: {program} [--option value ...]", "", inspect.getdoc(main) or ""]
    for heading, target in {"options": main, **(parts or {})}.items():
        lines += ["", f"{heading}:"]
        for name, parameter in options_of(target).items():
            required = parameter.default is parameter.empty
            default = "none" if parameter.default is None else parameter.default
            said = "required" if required else f"default {default}"
            lines.append(f"  --{name} {_kind(parameter.annotation)} ({said})")
    return "\n".join(lines)


def _kind(annotation: Any) -> str:
    annotation = _required(annotation)
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    if get_origin(annotation) is list:
        return f"{_kind(get_args(annotation)[0])}, repeatable"
    kinds = {str: "text", int: "integer", float: "number", bool: "true|false", Path: "path", Path | str: "path or URL"}
    return kinds[annotation]


class Terminated(KeyboardInterrupt):
    """A SIGTERM that is taken as an interrupt."""


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Inside, SIGTERM raises `Terminated`, so that a command cleans up as it does after an interrupt.

    For commands whose long work is Python's own; foreign code that waits for other ranks would not notice.
    """

    def terminate(*_: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(
    main: Callable[..., object],
    argv: Sequence[str] | None = None,
    repeatable: Collection[str] = (),
    parts: Mapping[str, Callable[..., object]] = types.MappingProxyType({}),
) -> None:
    """Run a command: read `argv` (default: the process's), call `main(**options)`, end as a command should.

    `main` has keyword-only parameters; its `list[str]` ones may be repeated on the command line, and so may
    the names in `repeatable` among those that its `**options` takes as raw strings. `--help` prints and
    returns; `parts` are the functions, under a heading each, that `main` hands its `**options` to.

    Raises:
        SystemExit: 2 after a user's mistake and 1 after a `PassingFault` (one `error: ...` line each on stderr), 130
        after an interrupt, 143 after `Terminated`.
    """
    argv = sys.argv[1:] if argv is None else argv
    lists = {name for name, p in options_of(main).items() if get_origin(_required(p.annotation)) is list}
    try:
        given = parse(argv, lists | set(repeatable))
        if "help" in given or "h" in given:
            print(help_text(main, _program(), parts))
            return
        main(**bind(main, given))
    except UserError as error:
        for line in error.lines:
            print(f"error: {line}", file=sys.stderr)
        raise SystemExit(error.status) from None
    except KeyboardInterrupt as error:
        print("error: interrupted", file=sys.stderr)
        raise SystemExit(143 if isinstance(error, Terminated) else 130) from None


def _program() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name}" if spec else Path(sys.argv[0]).name
