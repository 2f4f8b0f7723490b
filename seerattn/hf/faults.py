"""What goes wrong in a forward of continuous batching fails the request whose fault it is, and no other.

transformers ends a manager, and every request of it, with the first exception of a forward. Here

- attention of one row that fails fails its request: the row goes on as zeros to the end of the forward
  (`seerattn.hf.paged`);
- scores of a next token that are not finite fail their request: drawing from them would raise, on a GPU for good;
- any other exception of a forward of several requests has them begin anew, as they do to make room for others, and run
  one at a time until each has got its next token (`Batching.suspects`). One that fails alone is at fault;
- a device that does not answer any more ends the manager, as does what goes wrong between forwards.
"""

from __future__ import annotations

import logging
import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching import ContinuousBatchingManager

from seerattn.hf.requests import Batching

logger = logging.getLogger(__name__)


def isolate_faults(manager: ContinuousBatchingManager, batching: Batching) -> None:
    """Has the forwards of a manager fail single requests."""
    manager._generation_step = partial(_step, weakref.ref(manager), batching)


def _step(manager: weakref.ref[ContinuousBatchingManager], batching: Batching) -> None:
    """One forward; what failed in it is told to its requests and taken out of what the forward gave."""
    alive = manager()
    processor = alive.batch_processor
    _watch_scores(processor.model_runner, batching)
    futures = processor.inputs_and_outputs.requests_in_batch
    batching.failed.clear()
    try:
        processor._generation_step(alive.model)
    except Exception as error:
        if not _answers(alive.model.device):
            raise
        _blame(processor, batching, futures, error)
        kept = []
    else:
        for future, is_bad in zip([one for one in futures if one.has_new_token], batching.unsound.tolist()):
            if is_bad:
                error = ValueError("the scores of the next token must be finite, got some that are not")
                batching.failed.setdefault(future.state.request_id, error)
        kept = [one for one in futures if one.state.request_id not in batching.failed]
        if len(futures) == 1 and futures[0].has_new_token:
            batching.cleared(futures[0].state.request_id)
    for future in futures:
        error = batching.failed.get(future.state.request_id)
        if error is not None:
            logger.error("request %s failed: %s", future.state.request_id, error)
            processor._handle_request_error(error, future.state)
            _take_out(processor.scheduler, future.state)
    _keep(processor.inputs_and_outputs, futures, kept)


def _blame(processor: Any, batching: Batching, futures: list[Any], error: Exception) -> None:
    """Fails the only request of a forward that gave nothing; several begin anew, one at a time."""
    logger.error("a forward of %d requests failed", len(futures), exc_info=error)
    # Without its frames, which hold the tensors of the forward.
    error = error.with_traceback(None)
    if len(futures) == 1:
        batching.failed.setdefault(futures[0].state.request_id, error)
    for future in futures:
        state = future.state
        if state.request_id not in batching.failed:
            anew = state.create_equivalent_initial_request()
            _take_out(processor.scheduler, state)
            processor.scheduler.add_waiting_request(anew)
            batching.suspects.append(state.request_id)


def _take_out(scheduler: Any, state: Any) -> None:
    """Frees the place of a request that ends, or begins anew."""
    scheduler.finish_request(state.request_id)
    scheduler._requests_to_fork[:] = [one for one in scheduler._requests_to_fork if one is not state]
    # As where one is answered: there is room for those who wait.
    scheduler.block_new_requests = False


def _keep(io: Any, futures: list[Any], kept: list[Any]) -> None:
    """Leaves in the outputs of a forward what it gave to some of its requests."""
    if len(kept) < len(futures):
        ours = {id(one) for one in kept}
        rows = [row for row, one in enumerate(one for one in futures if one.has_new_token) if id(one) in ours]
        io.output_ids[:, : len(rows)] = io.output_ids[:, rows]
    io.requests_in_batch = kept


def _watch_scores(runner: Any, batching: Batching) -> None:
    if "_sample" not in vars(runner):
        runner._sample = partial(_sample_from_finite, weakref.ref(runner), batching)


def _sample_from_finite(runner: weakref.ref[Any], batching: Batching, scores: Tensor, output_ids: Tensor) -> None:
    """Draws next tokens from scores ``[1, n, vocabulary]``, of rows that are not finite any one."""
    alive = runner()
    is_bad = ~scores.amax(-1).isfinite()
    type(alive)._sample(alive, scores.masked_fill_(is_bad[..., None], 0.0), output_ids)
    batching.unsound = is_bad[0]


def _answers(device: torch.device) -> bool:
    """Whether the device still works: after an illegal access a GPU refuses all that this process asks of it."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True
