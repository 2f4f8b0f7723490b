"""Which requests the rows of a forward are, and how long their prompts: vLLM tells attention neither.

What runs the model knows both. It is met where a worker is handed what was scheduled, which is the last place that
every executor and every device goes through.
"""

from __future__ import annotations

from contextvars import ContextVar
from functools import wraps
from typing import Any, NamedTuple

from seerattn.vllm.density import end_requests

_RUNNER: ContextVar[Any] = ContextVar("seerattn_vllm_runner", default=None)


class Request(NamedTuple):
    """One request: its name in vLLM, and the tokens of its prompt."""

    name: str
    prompt: int


def follow_workers() -> None:
    """From now on workers of this process tell who runs their model; safe to call several times."""
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    plain = WorkerWrapperBase.execute_model
    if hasattr(plain, "__wrapped__"):
        return

    @wraps(plain)
    def execute_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = _RUNNER.set(self.worker.model_runner)
        scheduled = args[0] if args else kwargs["scheduler_output"]
        end_requests(scheduled.finished_req_ids)
        try:
            return plain(self, *args, **kwargs)
        finally:
            _RUNNER.reset(token)

    WorkerWrapperBase.execute_model = execute_model


def requests_of(common: Any) -> list[Request] | None:
    """The requests of the forward at hand, in the order of its rows; None of a forward of no requests, as in warm-up.

    Args:
        common: vLLM's metadata of the batch.
    """
    runner = _RUNNER.get()
    if runner is None:
        return None
    if common.req_idx is not None:  # the second generation of runners
        states = runner.req_states
        numbers = [int(number) for number in common.req_idx]
        return [Request(states.index_to_req_id[number], int(states.prompt_len.np[number])) for number in numbers]
    batch = runner.input_batch
    return [Request(name, int(batch.num_prompt_tokens[row])) for row, name in enumerate(batch.req_ids)]
