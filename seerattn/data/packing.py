"""Which tokens of which documents are a sample: a plan that is made as far as it is looked at."""

from __future__ import annotations

import random
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import NamedTuple, overload


class Segment(NamedTuple):
    """Consecutive tokens of one document."""

    document: int
    start: int
    length: int


Sample = list[Segment] | None  # None is a synthetic retrieval document


class SamplePlan(Sequence[Sample]):
    """The samples of a run, by index, each a function of the seed and its index alone.

    Every pass over the documents cuts long ones into windows at another offset, and packs short ones in another order.
    Packed documents are cut to whole blocks, so that each lies on the block grid as it would alone, and the last one
    of a sample to what is left of it. The samples of a pass are shuffled. A run may be many passes long: what is kept
    is the last pass that was looked at, the beginning of each before it, and a byte for every sample. A sample that is
    one window may be cut into shorter ones, each of which is a document of its own then.

    Args:
        lengths: tokens of every document, two blocks at least.
        count: number of samples.
        context: tokens of a sample, a multiple of ``block``.
        head: tokens put before every segment: 1 for a model with a beginning-of-sequence token, else 0.
        block: tokens of a block.
        retrieval_share: share of the samples that are synthetic.
        seed: draws offsets, orders, which samples are synthetic, and the lengths of windows.
        windows: lengths, in tokens, one of which is drawn for each sample to be cut into; each divides ``context``
            into whole windows of a multiple of ``block``. By default samples stay whole.

    Raises:
        ValueError: windows that do not.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        count: int,
        context: int,
        head: int,
        block: int,
        retrieval_share: float,
        seed: int,
        windows: Sequence[int] = (),
    ) -> None:
        if any(window < 2 * block or window % block or context % window for window in windows):
            raise ValueError(
                f"window_lengths must be multiples of the block size {block} that divide the context {context}, two "
                f"blocks at least, got {', '.join(map(str, windows))}"
            )
        self._lengths, self._count, self._context, self._head, self._block = lengths, count, context, head, block
        self.retrieval_share, self._seed, self.windows = retrieval_share, seed, tuple(windows) or (context,)
        self._synthetic = bytearray()  # of the samples up to the furthest that was looked at
        self._begins = array("q", [0])  # of the passes, counted in samples of text
        self._held: tuple[int, list[list[Segment]]] | None = None

    @property
    def short(self) -> int:
        """Documents that do not fill a sample and so are packed."""
        return sum(length < self._context - self._head for length in self._lengths)

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(f"sample must be one of {self._count}, got {index}")
        index %= self._count
        if self.is_synthetic(index):
            return None
        segments = self._text(index - self._synthetic_before(index))
        return self._cut(segments[0], index) if len(segments) == 1 else segments

    def _cut(self, whole: Segment, index: int) -> list[Segment]:
        """A sample of one window in windows of the length that is drawn for it, one after the other."""
        length = random.Random(f"window {self._seed} {index}").choice(self.windows)
        room = length - self._head
        return [whole._replace(start=whole.start + i * room, length=room) for i in range(self._context // length)]

    def rng(self, index: int) -> random.Random:
        """What draws the content of a synthetic sample; its first number says whether the sample is one."""
        return random.Random(f"sample {self._seed} {index}")

    def is_synthetic(self, index: int) -> bool:
        """Whether a sample is a retrieval document."""
        if self.retrieval_share in (0, 1):
            return bool(self.retrieval_share)
        for i in range(len(self._synthetic), index + 1):
            self._synthetic.append(self.rng(i).random() < self.retrieval_share)
        return bool(self._synthetic[index])

    def _synthetic_before(self, index: int) -> int:
        # Without a share there are none, and with a share of 1 nobody asks.
        return self._synthetic.count(1, 0, index)

    def has_packed(self) -> bool:
        """Whether some sample holds several documents."""
        # The first pass has such samples, or none has.
        packed = (ordinal for ordinal, sample in enumerate(self._pass(0)) if len(sample) > 1)
        first = next(packed, None)
        if first is None or self.retrieval_share in (0, 1):
            return first is not None and not self.retrieval_share and first < self._count
        texts = 0
        for index in range(self._count):
            texts += not self.is_synthetic(index)
            if texts > first:
                return True
        return False

    def _text(self, ordinal: int) -> list[Segment]:
        """The sample of text of that number."""
        while ordinal >= self._begins[-1]:
            drawn = self._pass(len(self._begins) - 1)
            self._begins.append(self._begins[-1] + len(drawn))
        number = bisect_right(self._begins, ordinal) - 1
        return self._pass(number)[ordinal - self._begins[number]]

    def _pass(self, number: int) -> list[list[Segment]]:
        if self._held is None or self._held[0] != number:
            self._held = number, self._draw(number)
        return self._held[1]

    def _draw(self, number: int) -> list[list[Segment]]:
        rng, room = random.Random(f"samples {self._seed} {number}"), self._context - self._head
        short, drawn = [], []
        for document, length in enumerate(self._lengths):
            windows = length // room
            if not windows:
                short.append(document)
                continue
            offset = rng.randrange(length - windows * room + 1)
            drawn += [[Segment(document, offset + window * room, room)] for window in range(windows)]
        rng.shuffle(short)
        whole = [(document, (self._lengths[document] + self._head) // self._block * self._block) for document in short]
        drawn += _packed(whole, self._context, self._head)
        rng.shuffle(drawn)
        return drawn


def _packed(short: list[tuple[int, int]], context: int, head: int) -> Iterator[list[Segment]]:
    """Samples that hold each document, given with its tokens, once; the last one is filled up with the first ones."""
    waiting, documents = len(short), cycle(short)
    while waiting > 0:
        sample, room = [], context
        while room > 0:
            document, tokens = next(documents)
            taken = min(tokens, room)
            sample.append(Segment(document, 0, taken - head))
            room -= taken
            waiting -= 1
        yield sample
