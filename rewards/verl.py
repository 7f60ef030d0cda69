"""verl's reward functions, unchanged: `compute_score(data_source, solution_str, ground_truth, extra_info=None)`.

verl calls them for one sample at a time, or, with its batch reward manager, for a batch at once:
`compute_score(data_sources, solution_strs, ground_truths, extra_infos)`. They are known by their parameters:
`solution_str` and `ground_truth`, or both in the plural.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

from tandem.rewards.completion import completion_text
from tandem.rl.errors import UserError

_SAMPLE = ("data_source", "solution_str", "ground_truth", "extra_info")
_BATCH = {name: f"{name}s" for name in _SAMPLE}
_ANSWERS = ("ground_truth", "answer", "solution")


def is_verl(function: Any) -> bool:
    """Whether a callable takes one sample, or a batch, in verl's way."""
    try:
        parameters = set(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return False
    return {"solution_str", "ground_truth"} <= parameters or {"solution_strs", "ground_truths"} <= parameters


class VerlScore:
    """A verl function as a reward on a batch.

    Per row it gets `data_source` (column), `solution_str` (the completion's text), `ground_truth` (the column
    `reward_model`'s `ground_truth`, else the columns `ground_truth`, `answer`, `solution`) and `extra_info` (column).
    The kwargs of the config go to every call, and may also give `data_source`. The result is a number, or a mapping
    whose `score` is the reward and whose other entries are logged beside the completions. A function of batches gets
    lists of these under their plural names and returns a list of such results. Async functions of one sample are in
    flight together.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.__wrapped__ = function
        self._parameters = dict(inspect.signature(function).parameters)
        self._batch = "solution_strs" in self._parameters
        self._open = any(p.kind is p.VAR_KEYWORD for p in self._parameters.values())
        self.__name__ = getattr(function, "__name__", "compute_score")
        self.__signature__ = self._batch_signature()

    def __call__(self, completions: list[Any], log_extra: Callable[..., None], **columns: Any) -> Any:
        """One value per completion; a coroutine if the function is async.

        Raises:
            UserError: a column that the function needs is missing, or a result is neither number nor such a mapping.
        """
        rows = len(completions)
        samples = [self._sample(row, completion, columns) for row, completion in enumerate(completions)]
        own = {n: columns[n] for n, p in self._parameters.items() if n in columns and self._is_own(n, p)}
        if self._batch:
            samples = [{_BATCH[name]: [sample[name] for sample in samples] for name in _SAMPLE}]
        calls = [{n: v for n, v in s.items() if n in self._parameters or self._open} | own for s in samples]
        function = self.__wrapped__
        if inspect.iscoroutinefunction(function):

            async def run() -> list[Any]:
                return self._unpacked(await asyncio.gather(*(function(**call) for call in calls)), rows, log_extra)

            return run()
        return self._unpacked([function(**call) for call in calls], rows, log_extra)

    def _batch_signature(self) -> inspect.Signature:
        """What the toolkit sees: completions, every column, and the function's further parameters by name."""
        keyword = inspect.Parameter.KEYWORD_ONLY
        own = [p.replace(kind=keyword) for n, p in self._parameters.items() if self._is_own(n, p)]
        parameters = [inspect.Parameter(n, keyword) for n in ("completions", "log_extra")]
        columns = {*_ANSWERS, "reward_model", "data_source", "extra_info"} - {p.name for p in own}
        parameters += [inspect.Parameter(n, keyword, default=None) for n in sorted(columns)]
        rest = [inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)] if self._open else []
        return inspect.Signature([*parameters, *own, *rest])

    @staticmethod
    def _is_own(name: str, parameter: inspect.Parameter) -> bool:
        given = name in _SAMPLE or name in _BATCH.values()
        return not given and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)

    def _sample(self, row: int, completion: Any, columns: dict[str, Any]) -> dict[str, Any]:
        source = _cell(columns.get("data_source"), row)
        if source is None and _required(self._parameters.get("data_sources" if self._batch else "data_source")):
            raise UserError(
                f"verl's {self.__name__} needs a data_source, and row {row} has none",
                fix="add such a column, or give data_source in the reward's kwargs",
            )
        return {
            "data_source": source,
            "solution_str": completion_text(completion),
            "ground_truth": self._ground_truth(row, columns),
            "extra_info": _cell(columns.get("extra_info"), row),
        }

    def _ground_truth(self, row: int, columns: dict[str, Any]) -> Any:
        nested = _cell(columns.get("reward_model"), row)
        if isinstance(nested, dict) and nested.get("ground_truth") is not None:
            return nested["ground_truth"]
        for name in _ANSWERS:
            if (value := _cell(columns.get(name), row)) is not None:
                return value
        raise UserError(
            f"verl's {self.__name__} needs a ground_truth, and row {row} has none",
            reason="it is looked for in reward_model['ground_truth'] and in the columns " + ", ".join(_ANSWERS),
            fix="rename the column of known answers to 'ground_truth'",
        )

    def _unpacked(self, results: list[Any], rows: int, log_extra: Callable[..., None]) -> list[Any]:
        if self._batch:
            results = list(results[0])
            if len(results) != rows:
                return results  # the wrong length is a fault that all rewards share
        scores = []
        for row, result in enumerate(results):
            if isinstance(result, dict) and "score" not in result:
                raise UserError(
                    f"verl's {self.__name__} returned a mapping without 'score' for row {row}: {sorted(result)}",
                    fix="return a number, or a mapping with 'score'",
                )
            scores.append(result["score"] if isinstance(result, dict) else result)
        details = [r if isinstance(r, dict) else {} for r in results]
        for key in dict.fromkeys(k for detail in details for k in detail if k != "score"):
            log_extra(key, [detail.get(key) for detail in details])
        return scores


def _required(parameter: inspect.Parameter | None) -> bool:
    return parameter is not None and parameter.default is parameter.empty


def _cell(column: Any, row: int) -> Any:
    """A column's value in a row; a constant from the config's kwargs counts for all rows."""
    return column[row] if isinstance(column, list) else column
