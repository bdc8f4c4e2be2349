"""Parts of the method by name, and a user's own file that adds some."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

from data_prep.errors import UserError

T = TypeVar("T")


class Registry(Generic[T]):
    """Parts of one kind by name."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._parts: dict[str, T] = {}

    def add(self, name: str) -> Callable[[T], T]:
        """Decorator that registers a part under `name`.  Raises UserError where another part has it."""

        def register(part: T) -> T:
            if name in self._parts:
                raise UserError(f"a {self.kind} called {name} exists already; choose another name")
            self._parts[name] = part
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
            raise ValueError(f"no {self.kind} is called {name}{nearest} ({', '.join(self)}; --plugin FILE adds others)")
        return name


_loaded: set[Path] = set()


def load_plugin(path: Path) -> None:
    """Run a user's file, which registers parts; once a process.

    Raises UserError where it cannot be read or fails, saying in which line.
    """
    path = path.resolve()
    if path in _loaded:
        return
    if not path.is_file():
        raise UserError(f"--plugin {path}: there is no such file")
    spec = importlib.util.spec_from_file_location(f"plugin_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--plugin {path}: not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling look a class's module up
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:
        line = _line_of(error, path)
        raise UserError(f"--plugin {path}{line}: {type(error).__name__}: {error}") from None
    _loaded.add(path)


def _line_of(error: Exception, path: Path) -> str:
    """ ", line N" of the last frame in `path`."""
    if isinstance(error, SyntaxError):
        return f", line {error.lineno}"
    number, trace = None, error.__traceback__
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename) == path:
            number = trace.tb_lineno
        trace = trace.tb_next
    return f", line {number}" if number else ""
