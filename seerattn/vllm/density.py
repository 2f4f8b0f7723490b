"""Which share of the blocks each request computed of its prompt and of its answer, as `seerattn.record_density` does.

The density of a prompt is told when it was read, that of an answer when vLLM is done with the request.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from seerattn.selection.block_indices import BlockIndices
from seerattn.selection.density_meter import DensityMeter

# Under vLLM's own, whose handlers show it.
logger = logging.getLogger("vllm.seerattn")

# Prompts that a process remembers.
PLACES = 1024


@dataclass(eq=False)
class Counted:
    """What was counted of one request, of the heads of this process.

    Attributes:
        name: of the request in vLLM.
        prompt: its tokens.
        cached: leading ones that were found in pages of other requests.
        is_dense: whether it was read densely as it is too short to gain; its density is 1.
        layers: that count.
        log: whether its densities are told.
        begin: of the part that was begun last, in tokens.
        end: of that part.
        meter: counts its blocks.
        decoded: tokens that were decoded and counted.
    """

    name: str
    prompt: int
    cached: int
    is_dense: bool
    layers: int
    log: bool
    begin: int
    end: int
    meter: DensityMeter = field(default_factory=DensityMeter)
    decoded: int = 0
    _ended: int = 0
    # The tokens that were decoded last, how many of them had been counted before, and blocks that tokens had which
    # read all of them without being asked.
    _last: tuple[int, int] = (0, 0)
    _seen: int = 0
    _whole: int = 0

    @property
    def density(self) -> float:
        """Of the part of it that was read; waits for the device.

        Raises:
            ValueError: nothing of it was read yet.
        """
        return 1.0 if self.is_dense else self.meter.mean()

    @property
    def decode_density(self) -> float:
        """Of its tokens that were decoded by a policy so far; waits for the device.

        Raises:
            ValueError: there is none.
        """
        decode, whole = self.meter.decode, self._whole
        if not decode.layers and whole:
            return 1.0
        decode.add_whole(whole)
        self._whole = 0
        return decode.mean()

    def decode(self, start: int, end: int, whole: int, block_k: int) -> int:
        """Tokens at the positions ``start .. end`` are decoded by a policy, the first ``whole`` of which read all.

        Returns:
            How many of them were counted before, as happens where a request had made room for others.
        """
        # Layers with a table of pages of their own tell it again.
        if self._last != (start, end):
            counted = self.decode_begin + self.decoded
            self._last, self._seen = (start, end), min(max(counted - start, 0), end - start)
            self._whole += sum(place // block_k + 1 for place in range(start + self._seen, start + whole))
            self.decoded += end - start - self._seen
        return self._seen

    @property
    def decode_begin(self) -> int:
        """Position of the first token that is decoded; a prompt of one token is."""
        return self.prompt if self.prompt > 1 else 0

    def end_request(self) -> None:
        """vLLM is done with the request: tells of its answer."""
        if self.log and self.decoded:
            text = "request %s: %d decoded tokens, density %.4f"
            logger.info(text, self.name, self.decoded, self.decode_density)

    def add(self, layer: int, heads: int, blocks: BlockIndices) -> None:
        """Counts the part that was begun in one layer with so many query heads."""
        self.meter.add(layer, heads, blocks)
        self._ended += self.end == self.prompt
        if self.log and self._ended == self.layers:
            found = f", {self.cached} of them from the cache" if self.cached else ""
            logger.info("request %s: %d prompt tokens%s, density %.4f", self.name, self.prompt, found, self.density)


_PROMPTS: OrderedDict[str, Counted] = OrderedDict()


def begin_part(name: str, prompt: int, begin: int, end: int, *, is_dense: bool, layers: int, log: bool) -> Counted:
    """What counts tokens ``begin .. end`` of a prompt; what was counted goes on, unless the request began anew.

    Args:
        name: of the request.
        prompt: its tokens.
        begin: of the part.
        end: of the part.
        is_dense: see `Counted`.
        layers: see `Counted`.
        log: see `Counted`.
    """
    found = _PROMPTS.get(name)
    if found is None or found.prompt != prompt or begin not in (found.begin, found.end):
        found = _PROMPTS[name] = Counted(name, prompt, begin, is_dense, layers, log, begin, end)
        _PROMPTS.move_to_end(name)
        while len(_PROMPTS) > PLACES:
            _PROMPTS.popitem(last=False)
    found.begin, found.end = begin, end
    return found


def of_request(name: str, prompt: int, *, layers: int, log: bool) -> Counted:
    """What counts the answer of a request, whose prompt was begun before.

    Args:
        name: of the request.
        prompt: its tokens.
        layers: see `Counted`.
        log: see `Counted`.
    """
    found = _PROMPTS.get(name)
    if found is not None and found.prompt == prompt:
        return found
    # A prompt of one token is decoded; or so many others came since that it was forgotten.
    return begin_part(name, prompt, prompt, prompt, is_dense=True, layers=layers, log=log)


def end_requests(names: Iterable[str]) -> None:
    """vLLM is done with these requests."""
    for name in names:
        if name in _PROMPTS:
            _PROMPTS[name].end_request()


def prompts() -> list[Counted]:
    """The prompts that this process read last, in the order in which it began."""
    return list(_PROMPTS.values())
