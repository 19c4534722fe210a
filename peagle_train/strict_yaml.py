"""YAML without its surprises, for files that people write."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped,unused-ignore]

from peagle_train.errors import one_line


class YamlError(ValueError):
    """Text that is no YAML document, told in one line."""


class StrictLoader(yaml.SafeLoader):  # type: ignore[misc,unused-ignore]
    """No duplicate keys, octals, base 60, dates or merge keys; `no` and `on` are words; 1e-4 is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                problem = f"duplicate key {key!r}"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            if isinstance(key, Hashable):
                seen.add(key)
        values: dict[Hashable, Any] = super().construct_mapping(node, deep=deep)
        return values


class StrictDumper(yaml.SafeDumper):  # type: ignore[misc,unused-ignore]
    """Quotes every string that any YAML reader, this one included, would take for something else."""


_NUMBER = re.compile(r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9]+)(?:[eE][-+]?[0-9]+)?$")
StrictLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in [
    ("null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789")),
    ("float", re.compile(r"[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"), list("-+.")),
    ("float", re.compile(rf"(?!0[0-9])(?=.*[.eE]){_NUMBER.pattern}"), list("-+.0123456789")),
]:
    StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)
    StrictDumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)


def parse_yaml(text: str, where: str) -> Any:
    """The value of one YAML document; a YamlError that begins with `where` if there is none."""
    try:
        return yaml.load(text, Loader=StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise YamlError(f"{where}: not valid YAML: {error.problem or error.context}{place}") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        # PyYAML lets plain errors through on digits without end, odd tags (!!bool x) and deep nesting.
        raise YamlError(f"{where}: not valid YAML: {one_line(error)}") from None


def read_yaml(path: Path) -> Any:
    """The value that a file holds; a YamlError that begins with the file's name if it cannot be read."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise YamlError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise YamlError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    return parse_yaml(text, str(path))


def dump_line(value: Any) -> str:
    """`value` as one line of YAML; `parse_yaml` reads it back."""
    text = str(yaml.dump([value], Dumper=StrictDumper, default_flow_style=True, width=float("inf"), allow_unicode=True))
    return text.strip()[1:-1]  # as an element of a list, so that a word alone has no end-of-document mark


def dump_yaml(value: Any) -> str:
    """`value` as block YAML, in the order of its keys; `parse_yaml` reads it back."""
    return str(yaml.dump(value, Dumper=StrictDumper, sort_keys=False))
