"""YAML and JSON files as users write them: strict where a slip would change a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from data_prep.errors import UserError
from data_prep.files import parse_json


class _Loader(yaml.SafeLoader):
    """Plain YAML, but a key that is given twice is refused, and `1:30` is text (YAML 1.1 counts it as 90)."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return node


def _without_base_60(construct: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda loader, node: node.value if ":" in node.value else construct(loader, node)


_Loader.add_constructor("tag:yaml.org,2002:int", _without_base_60(yaml.SafeLoader.construct_yaml_int))
_Loader.add_constructor("tag:yaml.org,2002:float", _without_base_60(yaml.SafeLoader.construct_yaml_float))


def read_yaml(text: str) -> Any:
    """The values of a YAML text.  Raises ValueError, whatever is wrong with it."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def load_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object from a file.  Raises UserError with one line where it cannot be had."""
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{what} {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{what} {path}: not JSON: {error}") from None
    except RecursionError:
        raise UserError(f"{what} {path}: nested too deeply") from None
    if not isinstance(value, dict):
        raise UserError(f"{what} {path}: expected an object")
    return value
