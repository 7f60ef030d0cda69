"""Reading and writing configs: YAML, `section.key=value` overrides, and errors a person can act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from tandem.rl.config import Config
from tandem.rl.errors import UserError
from tandem.rl.journal import write_whole
from tandem.rl.secrets_check import refuse_secrets
from tandem.rl.sections import PreferenceConfig, Section
from tandem.rl.trl_keys import INSTEAD

_FUNCTION_LISTS = ("reward_funcs", "watch_funcs")
# Fields whose value may name a file beside the config.
_PATH_KEYS = {
    "dataset_name",
    "function",
    "loss",
    "init_from",
    "chat_template",
    "model_name_or_path",
    "rubric_file",
    "schema_file",
    "factory",
    "tools",
}

# What people look for in algorithm.name or loss_type, and where it stands.
_OTHER_KEY = {
    "gspo": "algorithm.importance_sampling_level: sequence",
    "rloo": "algorithm.advantage_estimator: rloo",
    "reinforce_plus_plus": "algorithm.advantage_estimator: reinforce_plus_plus",
} | {
    name: f"algorithm.name: dpo with preference.loss_type: {name}"
    for name in get_args(PreferenceConfig.model_fields["loss_type"].annotation)
}


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping; YAML itself silently keeps the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in seen:
                problem = f"the key {key.value!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read, override and check a config.

    Relative file names in it are resolved against the config's own folder where such a file exists, so that a config
    works from any working directory; `output_dir` stays relative to the working directory.

    Raises:
        UserError: the file is missing or no YAML mapping, or a key or value is wrong.
    """
    path = Path(path)
    return _checked(_mapping(path), path, overrides)


def _mapping(path: Path) -> dict[str, Any]:
    """What the file holds."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the config {str(path)!r}: {error}", fix="give the path of a YAML file") from None
    try:
        raw = yaml.load(text, Loader=_UniqueKeys)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that no calendar has
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if _holds_itself(raw):
        raise UserError(f"{path} is not valid YAML: an alias (*name) stands within what it names")
    if not isinstance(raw, dict):
        what = "is empty" if raw is None else f"holds {type(raw).__name__}"
        raise UserError(f"{path} {what}, not a mapping of sections", fix="start from a file in examples/")
    return raw


def _checked(raw: dict[str, Any], path: Path, overrides: list[str] | None) -> Config:
    for override in overrides or []:
        _apply_override(raw, override)
    return parse_config(_resolve_paths(raw, path.resolve().parent), source=str(path))


def load_run_config(run_dir: Path, overrides: list[str] | None = None) -> Config:
    """The config of a run folder, which may have been moved or renamed since.

    Raises:
        UserError: it is no run folder, its config is not whole, or an override is wrong.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise UserError(
            f"{run_dir} is no run folder: it has no config.yaml", fix="give a folder that rl-train run made"
        )
    raw = _mapping(path)
    # What is cut off at the end of a line is valid YAML, and would come back with its defaults.
    if missing := [name for name in _sections() if name not in raw]:
        raise UserError(
            f"{path} is not whole: it lacks {', '.join(missing)}",
            reason="a run writes every section",
            fix="put the file back, or start a new run from the config that this one was made from",
        )
    config = _checked(raw, path, overrides)
    return config.model_copy(update={"output_dir": str(run_dir.parent), "run_name": run_dir.resolve().name})


def _sections() -> list[str]:
    kinds = {name: field.annotation for name, field in Config.model_fields.items()}
    return [name for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Section)]


def parse_config(raw: dict[str, Any], source: str = "config") -> Config:
    """Check a plain mapping. Raises UserError with every problem in it."""
    refuse_secrets(raw, source)
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        algorithm = raw.get("algorithm")
        name = algorithm.get("name") if isinstance(algorithm, dict) else None
        # Where a key stands in several sections, the one that this algorithm reads.
        reads = "preference" if name in ("dpo", "online_dpo") else ""
        problems = [_explain(e, reads) for e in _by_key(error.errors())]
        raise UserError(f"{source}: " + "\n".join(problems)) from None


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config; the file is itself runnable."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    write_whole(path, text.encode("utf-8"))


def _holds_itself(node: Any, around: tuple[int, ...] = ()) -> bool:
    if not isinstance(node, (dict, list)):
        return False
    if id(node) in around:
        return True
    inner = node.values() if isinstance(node, dict) else node
    return any(_holds_itself(value, (*around, id(node))) for value in inner)


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise UserError(
            f"override {override!r} is not of the form section.key=value", fix="for example train.max_steps=20"
        )
    node, parts = raw, key.strip().split(".")
    for part in parts[:-1]:
        inner = {} if node.get(part) is None else node[part]
        if not isinstance(inner, dict):
            raise UserError(f"override {override!r}: {part!r} is not a section")
        node[part] = dict(inner)  # by an alias (*name) it may be another section's too
        node = node[part]
    try:
        node[parts[-1]] = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"override {override!r}: the value is not valid YAML: {error}") from None


def _resolve_paths(node: Any, folder: Path, key: str = "") -> Any:
    if isinstance(node, dict):
        return {k: _resolve_paths(v, folder, str(k)) for k, v in node.items()}
    if isinstance(node, list):
        return [_resolve_paths(v, folder, "function" if key in _FUNCTION_LISTS else key) for v in node]
    if key in _FUNCTION_LISTS:
        key = "function"
    if isinstance(node, str) and key in _PATH_KEYS and "://" not in node:
        file, colon, function = node.rpartition(":") if ".py:" in node else (node, "", "")
        if candidate := _existing(file, folder):
            return f"{candidate}{colon}{function}"
    return node


def _existing(file: str, folder: Path) -> Path | None:
    """The file or folder of that name, relative to `folder`; None where there is none, or can be none."""
    try:
        candidate = folder / Path(file).expanduser()
        return candidate if file and candidate.exists() else None
    except (OSError, RuntimeError, ValueError):
        return None  # too long for a file name, an unknown user after ~, a null character: a name of something else


def _by_key(errors: Iterable[Any]) -> list[dict[str, Any]]:
    """One error a key, or one for each wrong item of it. Of a value that may be of several types pydantic reports each,
    with the type's name behind the key's."""
    keys = {full for _, full in all_keys()}
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for error in errors:
        where = error["loc"]
        if len(where) > 2 and ".".join(map(str, where[:2])) in keys and _is_type(where[2]):
            where = (*where[:2], *where[3:])
        if where in found:
            found[where]["msg"] += f", or {error['msg'].removeprefix('Input should be ')}"
        else:
            found[where] = {**error, "loc": where}
    holders = {where[:-1] for where in found if where and isinstance(where[-1], int)}
    return [error for where, error in found.items() if where not in holders]


def _is_type(part: Any) -> bool:
    return part in ("bool", "int", "float", "str") or (isinstance(part, str) and part.endswith("]"))


def _explain(error: Any, reads: str) -> str:
    """One line for one of pydantic's errors: where, what was given, what is right.

    Args:
        reads: section whose keys are meant before those of the same name in others, where the key's own has none.
    """
    where = ".".join(str(p) for p in error["loc"])
    if error["type"] == "extra_forbidden":
        name = str(error["loc"][-1])
        elsewhere = dict(all_keys())
        if name in INSTEAD and name not in elsewhere:
            return f"unknown key {where!r}; for TRL's {name}: {INSTEAD[name].replace('`', '')} (docs/from-trl.md)"
        section = ".".join(str(p) for p in error["loc"][:-1] if not isinstance(p, int))
        own = [k for k, full in all_keys() if full.rpartition(".")[0] == section]
        # The exact name of another section's key says more than a similar name in this section.
        near = [name] if name in elsewhere else difflib.get_close_matches(name, own, n=1, cutoff=0.6)
        near = near or difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.7)
        meant = section if near and near[0] in own else reads
        hint = f"; did you mean {full_name(near[0], meant)!r}?" if near else f"; keys here are {', '.join(own)}"
        return f"unknown key {where!r}{hint}"
    if error["type"] == "missing":
        return f"{where} is missing"
    message = error["msg"].removeprefix("Value error, ")
    if not where:
        return message
    if error["type"] == "literal_error" and (other := _OTHER_KEY.get(str(error["input"]))):
        message += f"; {error['input']} is {other}"
    given = f" (given: {error['input']!r})" if not isinstance(error["input"], dict) else ""
    return f"{where}: {message}{given}"


def full_name(key: str, section: str = "") -> str:
    """A key's dotted name, in that section if it is there, else where it stands first; itself where it is unknown."""
    names = [full for k, full in all_keys() if k == key]
    return next((n for n in names if n.rpartition(".")[0] == section), names[0] if names else key)


def all_keys() -> Iterator[tuple[str, str]]:
    """Every key of a config as (last part, full dotted name)."""
    for name, field in Config.model_fields.items():
        yield name, name
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            for key, inner in section.model_fields.items():
                yield key, f"{name}.{key}"
                for arg in (inner.annotation, *get_args(inner.annotation)):
                    if isinstance(arg, type) and issubclass(arg, BaseModel):
                        for leaf in arg.model_fields:
                            yield leaf, f"{name}.{key}.{leaf}"
