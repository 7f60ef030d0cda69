"""Secrets in a config: refused, because a config is kept in the run folder, in reports and by trackers."""

from __future__ import annotations

import re
from typing import Any

from tandem.rl.errors import UserError

_NAME = re.compile(
    r"(^|[_-])(api[_-]?key|secret([_-]?key)?|password|passwd|(access|auth|bearer|api|hf|wandb)[_-]?token|credentials?)$",
    re.I,
)
# What the keys of widely used services look like, and a password in an address.
_VALUE = re.compile(
    r"\bsk-[\w-]{16,}|\bhf_[A-Za-z0-9]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bAKIA[0-9A-Z]{16}\b|\bxox[abprs]-[\w-]{10,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----|://[^/\s:@]+:[^/\s:@]+@"
)


def refuse_secrets(raw: Any, source: str) -> None:
    """Look through a config as it was read, before anything in it is shown.

    Raises:
        UserError: a value looks like a secret, or has the name of one. The value is not in the message.
    """
    for place, key, value in _texts(raw, ""):
        if value and (_NAME.search(key) or _VALUE.search(value)):
            raise UserError(
                f"{source}: {place} looks like a secret (its value is not shown)",
                reason="the config is kept in the run folder, and trackers and reports get it",
                fix="put it into an environment variable and read that where it is needed (a judge: api_key_env)",
            )


def _texts(node: Any, place: str, key: str = "") -> list[tuple[str, str, str]]:
    if isinstance(node, dict):
        return [found for k, v in node.items() for found in _texts(v, f"{place}.{k}" if place else str(k), str(k))]
    if isinstance(node, list):
        return [found for i, v in enumerate(node) for found in _texts(v, f"{place}[{i}]", key)]
    return [(place, key, node)] if isinstance(node, str) else []
