"""Reads a recipe: TOML, `--section.field value` over it, a frozen dataclass out of it. No section is named here.

A section may have a class variable MOVED: names of fields that it once had, and what to write instead.
"""

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pydantic
from pydantic import ConfigDict, Field

from oapl_engine.errors import ConfigError, nearest

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def setting(default: Any, why: str, **limits: Any) -> Any:
    """A field of a section: its default, its unit and reason in one line, pydantic's limits (ge, lt, …)."""
    return Field(default=default, description=why, **limits)


def read_toml(path: str | Path) -> dict[str, Any]:
    """Parsed TOML. Raises ConfigError that names the file and what is wrong with it."""
    path = Path(path)
    if not path.exists():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"recipe {path} does not exist{hint}")
    if path.is_dir():
        raise ConfigError(f"recipe {path} is a directory: name a TOML file")
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"recipe {path} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"recipe {path} is not TOML: {error}") from error
    except PermissionError as error:
        raise ConfigError(f"recipe {path} cannot be read: {error.strerror}") from error


def apply_overrides(tables: dict[str, Any], overrides: list[str], schema: type) -> dict[str, Any]:
    """Tables with `--section.field value` pairs (or `--section.field=value`) laid over; values are TOML, or text."""
    tables = {k: dict(v) if isinstance(v, dict) else v for k, v in tables.items()}
    words = list(overrides)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or "." not in word:
            raise ConfigError(f"argument {word}: overrides are written --section.field value")
        name, equals, text = word[2:].partition("=")
        if not equals:
            if not words:
                raise ConfigError(f"override --{name} has no value: write --{name} VALUE")
            text = words.pop(0)
        _set_field(tables, name, text, schema)
    return tables


def overridden_fields(overrides: Iterable[str]) -> set[str]:
    """The "section.field" that `--section.field value` words name."""
    names = (word[2:].partition("=")[0].split(".") for word in overrides if word.startswith("--"))
    return {".".join(parts[:2]) for parts in names if len(parts) > 1}


def _set_field(tables: dict[str, Any], name: str, text: str, schema: type) -> None:
    section, *path = name.split(".")
    sections = _sections(schema)
    if section not in sections:
        raise ConfigError(f"override --{name}: unknown section {section}; {nearest(section, sections)}")
    if path[0] not in sections[section].__pydantic_fields__:
        raise ConfigError(f"override --{name}: {_unknown_field(path[0], section, sections[section])}")
    table = tables.setdefault(section, {})
    for key in path[:-1]:
        table = table.setdefault(key, {})
    table[path[-1]] = _toml_value(text)


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text


def _sections(schema: type) -> dict[str, Any]:
    return {f.name: f.type for f in dataclasses.fields(schema)}


def build(schema: type, tables: dict[str, Any], origin: str) -> Any:
    """A validated instance of `schema` from TOML tables. Raises ConfigError that names section, field, value, limit."""
    sections = _sections(schema)
    parts = {}
    for section, table in tables.items():
        if section not in sections:
            raise ConfigError(f"{origin}: unknown section {section}; {nearest(section, sections)}")
        if not isinstance(table, dict):
            raise ConfigError(
                f"{origin}: {section} = {table!r} must be a table: write [{section}] and its fields below"
            )
        try:
            parts[section] = sections[section](**table)
        except pydantic.ValidationError as error:
            raise ConfigError(f"{origin}: {_explain(section, sections[section], error)}") from error
    return schema(**parts)


def _explain(section: str, kind: Any, error: pydantic.ValidationError) -> str:
    lines = []
    for item in error.errors(include_url=False):
        name = str(item["loc"][0])
        if item["type"] == "unexpected_keyword_argument":
            lines.append(_unknown_field(name, section, kind))
        else:
            why = kind.__pydantic_fields__[name].description
            lines.append(f"{section}.{name} = {item['input']!r}: {item['msg'].lower()} ({why})")
    return "; ".join(lines)


def _unknown_field(name: str, section: str, kind: Any) -> str:
    moved = getattr(kind, "MOVED", {}).get(name)
    if moved:
        return f"{section}.{name} {moved}"
    return f"unknown field {name} in [{section}]; {nearest(name, kind.__pydantic_fields__)}"


def to_toml(recipe: Any) -> dict[str, Any]:
    """Plain tables of a recipe, None left out: what config.toml of a run directory holds."""
    tables = dataclasses.asdict(recipe)
    return {s: {k: v for k, v in t.items() if v is not None} for s, t in tables.items()}


def describe(schema: type) -> list[tuple[str, str, list[tuple[str, str, str, str]]]]:
    """[(section, why it exists, [(field, type, default, unit and reason)])] of a recipe class, in order."""

    def row(name: str, field: Any) -> tuple[str, str, str, str]:
        default = "off" if field.default is None else json.dumps(field.default)
        return name, _type_name(field.annotation), default, field.description

    return [
        (section, (kind.__doc__ or "").strip(), [row(*item) for item in kind.__pydantic_fields__.items()])
        for section, kind in _sections(schema).items()
    ]


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " | ".join(f'"{choice}"' for choice in get_args(annotation))
    name = annotation.__name__ if type(annotation) is type else str(annotation).replace("typing.", "")
    return name.replace("str", "text").replace("bool", "true | false").replace(" | None", "")
