"""Writes `config.md`, the reference of every key, from the models of `rl/config.py`, and the table in `from-trl.md`.

Run it after a change there (`make docs`); tests compare the files with what this module renders.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeGuard, get_args

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tandem.rl.config import Config
from tandem.rl.trl_keys import INSTEAD

TARGET = Path(__file__).parent / "config.md"
FROM_TRL = Path(__file__).parent / "from-trl.md"
BEGIN, END = "<!-- trl-keys -->", "<!-- /trl-keys -->"

_HEAD = """\
# Configuration

<!-- Written by docs/make_config_table.py from the models in rl/sections.py, rl/config.py and rl/*_config.py: change the
     docstrings there and run `make docs`. -->

A run is one YAML file of sections. `model.model_name_or_path` and `data.dataset_name` must be given, and RL also needs
`rewards.reward_funcs` or an environment; every other key has the default shown here. Unknown keys are refused, with the
nearest right name, and keys that are set but that the run's algorithm does not read are said at its start. Any key can
be overridden on the command line by its dotted name, with a YAML value:

    rl-train run config.yaml train.max_steps=20 rollout.stop_token_ids=[2] train.max_tokens=null

File names are looked up beside the config first, then from the working directory. The config with all its defaults is
kept in the run folder as `config.yaml` and can itself be run.
"""

_PLAIN_TYPES = {"string": "text", "integer": "integer", "number": "number", "boolean": "true / false", "null": "null"}
_BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
_SCHEMA_BOUNDS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}


def render() -> str:
    """The whole text of `config.md`."""
    sections = {key: field.annotation for key, field in Config.model_fields.items() if _is_model(field.annotation)}
    parts = [_HEAD, _section("Top level", Config, leave_out=set(sections))]
    for key, model in sections.items():
        parts.append(_section(f"`{key}`", model))
        for field, inner in model.model_fields.items():
            if _is_model(inner.annotation):
                parts.append(_section(f"`{key}.{field}`", inner.annotation))
            for entry in filter(_is_model, get_args(inner.annotation)):
                parts.append(_section(f"`{key}.{field}` (each entry)", entry))
    return "\n".join(parts)


def trl_table() -> str:
    """TRL's keys by what is written instead, in the order of `trl_keys.py`."""
    keys: dict[str, list[str]] = {}
    for key, instead in INSTEAD.items():
        keys.setdefault(instead, []).append(f"`{key}`")
    lines = ["| there | here |", "| --- | --- |"]
    return "\n".join(lines + [f"| {', '.join(names)} | {instead} |" for instead, names in keys.items()])


def with_trl_table(text: str) -> str:
    """The text of `from-trl.md` with its table written anew."""
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n{trl_table()}\n{END}{rest.partition(END)[2]}"


def _section(title: str, model: type[BaseModel], leave_out: Collection[str] = ()) -> str:
    schema = model.model_json_schema()
    lines = [f"## {title}", "", _one_line(model.__doc__ or ""), ""]
    lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for key, field in schema["properties"].items():
        if key in leave_out:
            continue
        default = "(required)" if key in schema.get("required", []) else f"`{_default(field)}`"
        cells = [f"`{key}`", _bounded_type(field, model.model_fields[key]), default, _one_line(field["description"])]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _bounded_type(field: dict[str, Any], info: FieldInfo) -> str:
    """The type with its bounds. Those of leniently read numbers are not in the schema, only in the field's metadata."""
    name = type_name(field)
    if any(sign in name for sign in _BOUNDS.values()):
        return name
    optional = [limit for part in get_args(info.annotation) for limit in getattr(part, "__metadata__", ())]
    found = [*info.metadata, *(one for limit in optional for one in getattr(limit, "metadata", ()))]
    limits = {key: getattr(limit, key) for limit in found for key in _BOUNDS if hasattr(limit, key)}
    if name.endswith(" or null"):
        return " ".join([name.removesuffix(" or null"), *_bounds(limits, _BOUNDS), "or null"])
    return " ".join([name, *_bounds(limits, _BOUNDS)])


def type_name(field: dict[str, Any]) -> str:
    """A JSON-schema type in words, such as `integer > 0 or null`."""
    if "anyOf" in field:
        return " or ".join(type_name(option) for option in field["anyOf"])
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if "$ref" in field:
        return "mapping (below)"
    if field["type"] == "array":
        return f"list of {type_name(field['items']).replace('mapping (below)', 'mappings (below)')}"
    if field["type"] == "object":
        return "mapping"
    return " ".join([_PLAIN_TYPES[field["type"]], *_bounds(field, _SCHEMA_BOUNDS)])


def _bounds(values: dict[str, Any], signs: dict[str, str]) -> list[str]:
    """For example `["> 0 and ≤ 1"]`; empty without bounds."""
    return [" and ".join(found)] if (found := [f"{s} {values[k]:g}" for k, s in signs.items() if k in values]) else []


def _default(field: dict[str, Any]) -> str:
    """The default as it would be written in YAML; factories are the empty list and the empty mapping."""
    if "default" not in field:
        return {"array": "[]", "object": "{}"}[field.get("type", "object")]
    value = field["default"]
    if isinstance(value, float):
        return _plain_float(value)
    return yaml.safe_dump(value).removesuffix("...\n").strip() if isinstance(value, str) else json.dumps(value)


def _plain_float(value: float) -> str:
    return f"{value:g}" if abs(value) < 1e-3 and value else repr(value)


def _is_model(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
    FROM_TRL.write_text(with_trl_table(FROM_TRL.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {TARGET} and {FROM_TRL}")
