"""Which share of the blocks of each prompt was computed, as `seerattn.record_density` counts it."""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass, field

from seerattn.selection.block_indices import BlockIndices
from seerattn.selection.density_meter import DensityMeter

# Under vLLM's own, whose handlers show it.
logger = logging.getLogger("vllm.seerattn")

# Prompts that a process remembers.
PLACES = 1024


@dataclass(eq=False)
class Counted:
    """What was counted of one prompt, of the heads of this process.

    Attributes:
        name: of the request in vLLM.
        prompt: its tokens.
        cached: leading ones that were found in pages of other requests.
        is_dense: whether it was read densely as it is too short to gain; its density is 1.
        layers: that count.
        log: whether its density is told once it was read.
        begin: of the part that was begun last, in tokens.
        end: of that part.
        meter: counts its blocks.
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
    _ended: int = 0

    @property
    def density(self) -> float:
        """Of the part of it that was read; waits for the device.

        Raises:
            ValueError: nothing of it was read yet.
        """
        return 1.0 if self.is_dense else self.meter.mean()

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


def prompts() -> list[Counted]:
    """The prompts that this process read last, in the order in which it began."""
    return list(_PROMPTS.values())
