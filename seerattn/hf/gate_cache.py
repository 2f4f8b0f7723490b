"""What selectors keep of the sequences of a cache: held as long as the cache, and only what its keys still say.

A cache of transformers may be cropped, reordered, repeated, cut to some rows, reset, moved or written to, and tells
nobody. So nothing of it is patched or followed. What was kept is believed for two reasons alone:

- The cache holds, right before it takes the keys of a call, the very tensor of keys that the last call ended with, and
  torch counted no write to it. That is the case from chunk to chunk of a prompt, and costs a comparison on the host.
- Else keys are compared: `MARKS` channels of every token were copied, a hundredth of the keys, and as many leading
  tokens are believed as are equal bit for bit. A row that equals another one before, as after a search with beams,
  takes that one's. The host waits for the device once a layer, in the first call of a turn.

A cache that nobody knows, such as a copy of a prompt's, is held to what was kept of others in the same way.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import Cache

from seerattn.selection.block_indices import BlockIndices
from seerattn.selection.selector import AttentionContext, Kept, Memory, Selector

if TYPE_CHECKING:
    from seerattn.hf.call import Prefill

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Channels of a token that tell its keys from those of another one, of the first and the last head and spread over both:
# some that lie together may be zero in all tokens. One channel of bf16 would be equal by chance in some hundred tokens.
MARKS = 8
# Names under which attention modules are given the cache.
NAMES = ("past_key_values", "layer_past")
# Caches that one of which nothing is known is held to, the last ones first.
OTHERS = 8


class Record(NamedTuple):
    """What was kept of a batch, or of one row of a padded batch.

    Attributes:
        marks: of the keys that it was made of, see `_marks`.
        kept: by the selector.
    """

    marks: Tensor
    kept: Kept


@dataclass(eq=False)
class LayerRecords:
    """Records of one layer of one cache.

    Attributes:
        rows: by row of the batch, those of a whole batch under None.
        keys: the tensor of keys that the last call ended with, held weakly.
        version: writes to it that torch had counted, None where it counts none.
    """

    rows: dict[int | None, Record] = field(default_factory=dict)
    keys: weakref.ref[Tensor] | None = None
    version: int | None = None


class GateCache:
    """What the selectors of one model keep of all caches that are alive. A copy of it begins empty."""

    def __init__(self) -> None:
        self._caches: weakref.WeakKeyDictionary[Cache, dict[int, LayerRecords]] = weakref.WeakKeyDictionary()

    def __deepcopy__(self, memo: dict) -> GateCache:
        return GateCache()

    def __reduce__(self) -> tuple:
        return GateCache, ()

    def recall(self, module: nn.Module, layer: int, cache: Cache) -> Recall:
        """What is known of a layer before its module gives the cache the keys of a call."""
        records = self._caches.setdefault(cache, {}).setdefault(layer, LayerRecords())
        keys, version = _keys_of(module, cache), records.version
        same = keys is not None and records.keys is not None and records.keys() is keys
        return Recall(self, module, layer, cache, records, same and version is not None and _version(keys) == version)

    def doubt(self, cache: Cache) -> None:
        """From here on keys of a cache are compared: it is written to in ways that torch does not count."""
        for records in self._caches.get(cache, {}).values():
            records.keys = None

    def others(self, cache: Cache, layer: int, row: int | None) -> Iterator[Record]:
        """Records of other caches, the last ones first."""
        # Another thread may add to the caches meanwhile: their references are listed at once.
        alive = (other for ref in reversed(self._caches.keyrefs()) if (other := ref()) is not None)
        for other in islice((other for other in alive if other is not cache), OTHERS):
            found = self._caches.get(other, {}).get(layer)
            if found is not None and row in found.rows:
                yield found.rows[row]

    def nbytes(self, cache: Cache) -> int:
        """Bytes that are kept beside a cache."""
        records = (record for layer in self._caches.get(cache, {}).values() for record in layer.rows.values())
        return sum(record.marks.nbytes + record.kept.nbytes for record in records)


@dataclass(frozen=True, eq=False)
class Recall:
    """What is known of the sequences of one call of a layer.

    Attributes:
        store: of the model.
        module: the attention module.
        layer: index of the decoder layer.
        cache: that the module was given.
        records: of the layer and the cache.
        untouched: whether the cache holds what the last call of the layer left, bit for bit.
    """

    store: GateCache
    module: nn.Module
    layer: int
    cache: Cache
    records: LayerRecords
    untouched: bool

    def find(self, row: int | None, k: Tensor, past: int, untouched: bool) -> tuple[Memory, Tensor | None]:
        """What is known of the first ``past`` of the keys ``[B, HKV, S, D]`` of a call, and marks of its keys."""
        record = self.records.rows.get(row)
        if not past:
            return Memory(), None
        if record is not None and untouched and record.marks.shape[2] <= past:
            # Fewer where tokens were decoded of which a selector kept nothing new.
            return Memory(record.marks.shape[2], record.kept), record.marks
        known, best = 0, None
        for found in self.store.others(self.cache, self.layer, row) if record is None else (record,):
            tokens, record = _held_to(found, k, past)
            if tokens > known:
                known, best = tokens, record
            if tokens == min(found.marks.shape[2], past):
                break
        return (Memory(), None) if best is None else (Memory(known, best.kept), best.marks[:, :, :known])

    def keep(self, row: int | None, k: Tensor, memory: Memory, marks: Tensor | None) -> None:
        """Keeps what a selector left of a call, whose earlier keys have these marks."""
        if memory.kept is None:
            self.records.rows.pop(row, None)
            return
        known = 0 if marks is None else marks.shape[2]
        new = _marks(k[:, :, known:]).detach().clone()
        self.records.rows[row] = Record(new if marks is None else torch.cat((marks, new), 2), memory.kept)

    def through(self, row: int | None, k: Tensor, past: int, untouched: bool, select: Callable[[Memory], T]) -> T:
        """What a selector finds that is told what is known, and of which is kept what it leaves.

        Args:
            row: see `find`, as the next two.
            k: keys of the call.
            past: those before it.
            untouched: whether nothing of them needs a comparison.
            select: the selector.
        """
        memory, marks = self.find(row, k, past, untouched)
        before = memory.kept
        found = select(memory)
        # What is the same is of the keys that have marks already.
        if memory.kept is None or memory.kept is not before or row not in self.records.rows:
            self.keep(row, k, memory, marks)
        return found

    def end(self, key: Tensor) -> None:
        """Notes what the cache holds after a call with these keys."""
        held = _keys_of(self.module, self.cache)
        # A cache may hold less than it gives, or in another form.
        self.records.keys = weakref.ref(held) if held is key else None
        self.records.version = _version(key)


def recall_of(store: GateCache, module: nn.Module, layer: int, kwargs: dict[str, Any]) -> Recall | None:
    """What is known of the cache that a module is about to be called with; None without one."""
    for name in NAMES:
        if isinstance(cache := kwargs.get(name), Cache):
            return store.recall(module, layer, cache)
    return None


def choose(
    call: Prefill, selector: Selector, q: Tensor, k: Tensor, context: AttentionContext, row: int | None = None
) -> BlockIndices:
    """Lists of a batch, or of one row of a padded one, by a selector that remembers earlier calls of the same cache."""
    recall = call.seer.recall
    if recall is None:
        return selector.select(q, k, context)
    # Which slots of a row are its own may change from call to call where its padding is not on the left.
    untouched = recall.untouched and (row is None or call.mask.rows is None)
    past = k.shape[2] - q.shape[2]
    blocks = recall.through(row, k, past, untouched, lambda m: selector.select(q, k, replace(context, memory=m)))
    recall.end(call.key)
    return blocks


def _held_to(record: Record, k: Tensor, past: int) -> tuple[int, Record | None]:
    """How many leading tokens of a record are the first ones of keys ``k`` in every row, its rows in their order."""
    past = min(record.marks.shape[2], past)
    marks, given = record.marks[:, :, :past], _marks(k[:, :, :past])
    if marks.device != given.device or marks.dtype != given.dtype or marks.shape[1:] != given.shape[1:]:
        return 0, None
    known = min(_equal(given, marks).tolist()) if marks.shape[0] == given.shape[0] else 0
    if known == past:
        return past, record
    # Each row of the call beside all rows of the record.
    best = torch.stack([_equal(row, marks) for row in given]).max(1)
    known = max(known, min(best.values.tolist()))
    if known < past:
        _tell_of_change()
    return known, Record(record.marks[best.indices], record.kept.rows(best.indices))


def _marks(k: Tensor) -> Tensor:
    """Some channels of keys ``[B, HKV, S, D]``, ``[B, 1 or 2, S, n]``."""
    heads = min(k.shape[1], 2)
    return k[:, :: max(1, k.shape[1] - 1), :, :: max(1, k.shape[3] * heads // MARKS)]


def _equal(a: Tensor, b: Tensor) -> Tensor:
    """Leading tokens of marks ``[.., heads, tokens, channels]`` that are equal, int64 ``[..]``."""
    return (a == b).all(-1).all(-2).long().cumprod(-1).sum(-1)


def _keys_of(module: nn.Module, cache: Cache) -> Tensor | None:
    """The tensor of keys that a cache holds for a module; None where it has none yet, or none of this kind."""
    index, layers = getattr(module, "layer_idx", None), getattr(cache, "layers", ())
    return getattr(layers[index], "keys", None) if index is not None and index < len(layers) else None


def _version(x: Tensor) -> int | None:
    """How often a tensor was written to, None where torch does not count it."""
    return None if x.is_inference() else x._version


@functools.cache
def _tell_of_change() -> None:
    logger.warning(
        "a cache holds other keys than those that gate keys were made of: it was cropped and went on otherwise, or was "
        "written to; gate keys from there on are made again"
    )
