"""Parts of the method by name, and a user's own file that adds some."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from data_prep.errors import UserError
from data_prep.files import sha256

T = TypeVar("T")
PLUGIN = "plugin.py"
"""What a run folder calls the text of the plugin that it was trained with"""


@dataclass(frozen=True)
class Plugin:
    """A user's file as it was run."""

    path: Path
    source: bytes
    """What was run, whatever the file says by now"""
    added: tuple[tuple[str, str], ...]
    """(kind, name) of the parts that it registered"""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.source).hexdigest()


class Registry(Generic[T]):
    """Parts of one kind by name."""

    def __init__(self, kind: str, check: Callable[[Any], None]) -> None:
        """check: raises ValueError saying what is wrong with a part that is to be added."""
        self.kind, self._check = kind, check
        self._parts: dict[str, T] = {}

    def add(self, name: str) -> Callable[[T], T]:
        """Decorator that registers a part under `name`.  Raises UserError for what is no such part, or a taken name."""
        if not isinstance(name, str) or not name:
            raise UserError(f'a {self.kind} needs a name: add("name"), not add({described(name)})')

        def register(part: T) -> T:
            if name in self._parts:
                raise UserError(f"a {self.kind} called {name} exists already; choose another name")
            try:
                self._check(part)
            except ValueError as error:
                raise UserError(f"{self.kind} {name}: {error}") from None
            self._parts[name] = part
            _added.append((self.kind, name))
            return part

        return register

    def __getitem__(self, name: str) -> T:
        return self._parts[self.check(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def check(self, name: str) -> str:
        """The name itself.  Raises ValueError, with the nearest right name, where there is no such part."""
        if name not in self._parts:
            close = difflib.get_close_matches(name, self._parts, n=1)
            nearest = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"no {self.kind} is called {name}{nearest} ({', '.join(self)}; {self._others()})")
        return name

    def _others(self) -> str:
        """What plugins have to do with the names there are."""
        if not _loaded:
            return "--plugin FILE adds others"
        return "; ".join(
            f"--plugin {plugin.path} registers " + ", ".join(f"{kind} {name}" for kind, name in plugin.added)
            for plugin in _loaded.values()
        )


# ---- what a part must be ----------------------------------------------------------------------------------------
def described(value: object) -> str:
    """What a value is, for messages."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if callable(value):
        return f"a {type(value).__name__}"
    return f"{textwrap.shorten(repr(value), 60)} ({type(value).__name__})"


def expect_subclass(part: Any, base: type, *constructor: str) -> None:
    """Raise ValueError unless `part` is a class over `base` with all its methods, made from these arguments."""
    if not isinstance(part, type) or not issubclass(part, base):
        raise ValueError(f"expected a class over {base.__name__}, got {described(part)}")
    if missing := getattr(part, "__abstractmethods__", None):
        raise ValueError(f"the class {part.__name__} does not define {', '.join(sorted(missing))}")
    expect_call(part, f"{part.__name__}.__init__", *constructor)


def expect_call(function: Any, name: str, *arguments: str) -> None:
    """Raise ValueError unless `function` can be called with so many positional arguments."""
    if not callable(function):
        raise ValueError(f"{name} is {described(function)}, expected a function of ({', '.join(arguments)})")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some of C's have none
        return
    try:
        signature.bind(*arguments)
    except TypeError:
        raise ValueError(f"{name} takes {signature}, expected ({', '.join(arguments)})") from None


# ---- a user's own file ------------------------------------------------------------------------------------------
_added: list[tuple[str, str]] = []
_loaded: dict[Path, Plugin] = {}


def load_plugin(path: Path) -> Plugin:
    """Run a user's file, which registers parts; once a process.

    Raises UserError where it cannot be read, fails, saying in which line, or registers nothing.
    """
    path = path.resolve()
    if path in _loaded:
        return _loaded[path]
    if not path.is_file():
        raise UserError(f"--plugin {path}: there is no such file")
    if path.suffix != ".py":
        raise UserError(f"--plugin {path}: not a Python file (.py)")
    spec = importlib.util.spec_from_file_location(f"plugin_{path.stem}", path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling look a class's module up
    sys.path.append(str(path.parent))  # it may import files beside it, as a script does
    before = len(_added)
    with failures_told(f"--plugin {path}", path):
        source = path.read_bytes()
        # not by the module's loader: what is run is what is hashed, and no file is written beside the user's
        exec(compile(source, str(path), "exec"), module.__dict__)
    added = tuple(_added[before:])
    if not added:
        raise UserError(f"--plugin {path} registers no part of the method; docs/new_method.md shows how")
    _loaded[path] = Plugin(path, source, added)
    return _loaded[path]


def plugin_hash(path: Path) -> str | None:
    """SHA-256 of a plugin as this process ran it, or as it is; None where there is no such file."""
    if plugin := _loaded.get(path.resolve()):
        return plugin.sha256
    return sha256(path) if path.is_file() else None


def loaded_plugins() -> list[Plugin]:
    """Every plugin that this process has run."""
    return list(_loaded.values())


@contextlib.contextmanager
def failures_told(what: str, *files: Path, theirs: bool = False) -> Iterator[None]:
    """Turn what a user's own code raises into one line, which names its last place in `files` (default: plugins).

    theirs: only where the error came through one of the files; others are this project's own.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        line = _line_of(error, files or tuple(_loaded))
        if theirs and not line:
            raise
        where = what + line
        if isinstance(error, UserError):
            raise UserError(*(f"{where}: {line}" for line in error.lines)) from None
        said = " ".join(str(error).split())
        raise UserError(f"{where}: {type(error).__name__}" + (f": {said}" if said else "")) from None


def _line_of(error: BaseException, files: tuple[Path, ...]) -> str:
    """ ", line N" of the last frame in one of `files`."""
    names = {str(path) for path in files}
    number, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename in names:
            number = trace.tb_lineno
        trace = trace.tb_next
    if number is None and isinstance(error, SyntaxError) and error.filename in names:
        number = error.lineno
    return f", line {number}" if number else ""
