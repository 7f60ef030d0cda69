"""Whether a completion's answer is JSON that fits a schema."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

from tandem.rewards.completion import completion_text, final_text
from tandem.rl.errors import UserError

# Blocks of other languages too: what closes one of them must not open the next.
_BLOCK = re.compile(
    r"(?:^[ \t]*```[ \t]*(?P<language>[^\s`]*)[^\n`]*|```[ \t]*(?:json|JSON)?[ \t]*\r?)\n(?P<body>.*?)```",
    re.DOTALL | re.MULTILINE,
)


def json_schema(
    completions: list[Any],
    schema: dict[str, Any] | list[Any] | str | None = None,
    schema_file: str | None = None,
    valid_json: float = 0.0,
    **_columns: Any,
) -> list[float | None]:
    """1.0 where the completion's answer is JSON that fits the schema, else 0.0.

    The answer is the last fenced code block (```json or without a language) of what follows the reasoning, else all of
    that. It must be one JSON value and nothing else; NaN, Infinity and repeated keys are not JSON here. References in a
    schema are never fetched from the network.

    Args:
        completions: texts or message lists.
        schema: a JSON schema (as a mapping or as JSON text), or a column with one per row; a row without one gets None.
            Without schema and schema_file any JSON is right.
        schema_file: path of a JSON file with the schema.
        valid_json: value of JSON that does not fit the schema, to reward the first step.

    Raises:
        UserError: the schema is wrong or cannot be read, or the package jsonschema is not installed.

    >>> json_schema(['{"name": "Ada"}', "no"])
    [1.0, 0.0]
    """
    if schema_file is not None:
        schema = _read(schema_file)
    per_row = schema if isinstance(schema, list) else [schema] * len(completions)
    results: list[float | None] = []
    for completion, wanted in zip(completions, per_row, strict=True):
        if wanted is None and schema is not None:
            results.append(None)
            continue
        # The schema first: a mistake in it must show even where no completion is JSON.
        validator = None if wanted is None else _validator(_as_text(wanted))
        found, value = read_json(answer_json(completion_text(completion)))
        if not found:
            results.append(0.0)
        elif validator is None:
            results.append(1.0)
        else:
            results.append(1.0 if _fits(validator, value) else float(valid_json))
    return results


def answer_json(text: str) -> str:
    """The part of a completion that should be JSON."""
    text = final_text(text)
    blocks = [b["body"] for b in _BLOCK.finditer(text) if (b["language"] or "json").lower() == "json"]
    return (blocks[-1] if blocks else text).strip()


def read_json(text: str) -> tuple[bool, Any]:
    """Whether the text is one strict JSON value, and the value."""
    try:
        return True, json.loads(text, parse_constant=_refuse, object_pairs_hook=_unique)
    except (ValueError, RecursionError):  # also nested deeper than Python's stack, or numbers of too many digits
        return False, None


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key is repeated")
    return dict(pairs)


def _fits(validator: Any, value: Any) -> bool:
    try:
        return bool(validator.is_valid(value))
    except RecursionError:
        return False
    except Exception as error:  # a reference that leads nowhere; the library's classes for it differ by version
        raise UserError(
            f"the JSON schema cannot be applied: {type(error).__name__}: {error}",
            reason="references are looked up inside the schema only",
            fix="put what it refers to under $defs",
        ) from error


def _as_text(schema: Any) -> str:
    if isinstance(schema, str):
        return schema
    # Arrow gives every row's struct the keys of all rows: those without a value are not part of the schema.
    return json.dumps(_without_none(schema), sort_keys=True)


def _without_none(node: Any) -> Any:
    if isinstance(node, dict):
        return {k: _without_none(v) for k, v in node.items() if v is not None}
    return [_without_none(v) for v in node] if isinstance(node, list) else node


@functools.lru_cache(maxsize=1024)
def _validator(text: str) -> Any:
    try:
        import jsonschema
        import referencing
    except ImportError as error:
        raise UserError(
            f"json_schema needs the package jsonschema: {error}",
            fix="pip install jsonschema, or leave the schema out to reward any JSON",
        ) from None
    try:
        schema = json.loads(text)
    except ValueError as error:
        raise UserError(f"the schema {text[:100]!r} is no JSON: {error}", fix="give a JSON schema") from None
    if not isinstance(schema, (dict, bool)):
        raise UserError(f"the schema is {type(schema).__name__}, not a mapping", fix="give a JSON schema")
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise UserError(f"the JSON schema is wrong at {error.json_path}: {error.message}", fix="correct it") from None
    return kind(schema, registry=referencing.Registry())


@functools.lru_cache(maxsize=64)
def _read(file: str) -> str:
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read schema_file {file!r}: {error}", fix="give the path of a JSON file") from None
