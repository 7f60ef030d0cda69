"""vLLM's requests run step by step, as `LLM.generate` does it, with an ear for every one that is finished."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def generate_stepwise(
    llm: Any,
    prompts: Sequence[Any],
    params: Sequence[Any],
    *,
    lora_request: Any,
    on_output: Callable[[int, Any], None],
) -> list[Any]:
    """The outputs of the prompts, in their order. The engine must have no other requests.

    Args:
        llm: a `vllm.LLM`.
        on_output: called with (place in `prompts`, output) once all completions of a prompt are finished, where
            vLLM's names of requests say which prompt it is.

    Raises:
        RuntimeError: an output's name and its place in the order contradict each other.
    """
    ids = llm.enqueue(prompts, params, lora_request=lora_request, use_tqdm=False)
    # Requests are counted; vLLM may give them a name of its own inside, with the number before a dash.
    place_of = {str(name).partition("-")[0]: place for place, name in enumerate(ids)}
    handed: dict[int, Any] = {}
    outputs: list[Any] = []
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if not output.finished:
                continue
            outputs.append(output)
            place = place_of.get(str(output.request_id))
            if place is not None:
                handed[place] = output
                on_output(place, output)
    outputs.sort(key=lambda output: int(output.request_id))
    if len(outputs) != len(prompts) or any(outputs[place] is not output for place, output in handed.items()):
        raise RuntimeError(f"vLLM answered {len(outputs)} of {len(prompts)} prompts under names that are not theirs")
    return outputs
