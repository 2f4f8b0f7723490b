"""Synthetic retrieval documents: facts hidden in real text, and questions that only long context answers.

Three kinds of fact share one set of templates: a pass key (five digits), key-value pairs (a made-up two-word key, five
digits) and names (who held a made-up office). `training_document` mixes them densely. For evaluation,
`passkey_document`, `key_value_document`, `multi_key_document` and `variable_tracking_document` ask one question at the
very end. Token ids are concatenated from separately encoded pieces, so answer spans are exact whatever the tokenizer
merges, and so are lengths in tokens.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate
from typing import Literal, Protocol

Kind = Literal["passkey", "key_value", "names", "mixed", "multi_key", "variable_tracking"]

_SYLLABLES = ("bal", "bren", "cor", "dal", "dren", "el", "fen", "gar", "hal", "ith", "jor", "kel", "lan") + (
    "mor",
    "nar",
    "or",
    "pel",
    "quin",
    "ras",
    "sel",
    "tar",
    "ul",
    "ven",
    "wen",
    "yar",
    "zan",
)
_ENDINGS = ("a", "an", "ar", "en", "eth", "ia", "ik", "in", "is", "o", "on", "or", "us", "y")
_OFFICES = ("baker", "captain", "doctor", "gardener", "judge", "keeper", "king", "mayor", "queen", "smith", "teacher")
_SNAP = 24  # a fact is moved this many tokens at most, to begin a line
_VARIABLES = 1000  # a tenth of the words there are
_TOKENS_PER_FACT = 128  # room that a fact and its questions are given in a training document


class Encoder(Protocol):
    """What is needed of a tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`."""
        ...


@dataclass(frozen=True)
class RetrievalDocument:
    """Token ids with the places of the answers that long context decides.

    Attributes:
        input_ids: The document; a single final question ends with the last token of its answer.
        answers: Half-open token spans of the answers in `input_ids`, in order.
        depths: For each answer, the share (0..1) of the filler text that lies before the fact it needs.
        kind: Kind of fact.
        questions: First token of the question of each answer.
    """

    input_ids: list[int]
    answers: list[tuple[int, int]]
    depths: list[float]
    kind: Kind
    questions: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class _Fact:
    statement: list[int]
    question: list[int]
    answer: list[int]


@dataclass(frozen=True)
class _Insert:
    """The statement of a fact, or a question and its answer, to stand after the share `place` of the filler."""

    place: float
    fact: int
    asked: bool


@lru_cache(maxsize=4096)
def _encode(encoder: Encoder, text: str) -> tuple[int, ...]:
    return tuple(encoder.encode(text, add_special_tokens=False))


def _ids(encoder: Encoder, *pieces: str) -> list[int]:
    return [token for piece in pieces for token in _encode(encoder, piece)]


def _word(rng: random.Random) -> str:
    return rng.choice(_SYLLABLES) + rng.choice(_SYLLABLES) + rng.choice(_ENDINGS)


def _digits(rng: random.Random) -> str:
    return f" {rng.randrange(10_000, 100_000)}"


def _passkey(encoder: Encoder, rng: random.Random) -> _Fact:
    key = _digits(rng)
    return _Fact(
        _ids(encoder, " The pass key is", key, ". Remember it.", key, " is the pass key.\n"),
        _ids(encoder, " What is the pass key? The pass key is"),
        _ids(encoder, key),
    )


def _key_value(encoder: Encoder, rng: random.Random) -> _Fact:
    return _pair(encoder, *_draw_pair(rng))


def _draw_pair(rng: random.Random) -> tuple[str, str]:
    return f" {_word(rng)} {_word(rng)}", _digits(rng)


def _pair(encoder: Encoder, key: str, value: str) -> _Fact:
    return _Fact(
        _ids(encoder, " The value of", key, " is", value, ".\n"),
        _ids(encoder, " What is the value of", key, "? The value of", key, " is"),
        _ids(encoder, value),
    )


def _name(encoder: Encoder, rng: random.Random) -> _Fact:
    office, place = rng.choice(_OFFICES), f" {_word(rng).title()}"
    name = f" {_word(rng).title()} {_word(rng).title()}"
    return _Fact(
        _ids(encoder, f" The {office} of", place, " was called", name, ".\n"),
        _ids(encoder, f" Who was the {office} of", place, f"? The {office} of", place, " was called"),
        _ids(encoder, name),
    )


_MAKERS = {"passkey": _passkey, "key_value": _key_value, "names": _name}


def _distinct(count: int, rng: random.Random) -> list[str]:
    """So many different made-up words."""
    words: dict[str, None] = {}
    while len(words) < count:
        words[_word(rng)] = None
    return list(words)


def _chain(encoder: Encoder, variables: list[str], value: str) -> list[_Fact]:
    """A value handed on from variable to variable; the first fact has the question for all of them."""
    sources = [value, *(f" {name}" for name in variables)]
    facts = [
        _Fact(_ids(encoder, " The variable", f" {name}", " is set to", source, ".\n"), [], [])
        for name, source in zip(variables, sources)
    ]
    question = _ids(encoder, " Which variables are set to", value, "? The variables set to", value, " are")
    answer = _ids(encoder, *[piece for name in variables for piece in (",", f" {name}")][1:])
    return [_Fact(facts[0].statement, question, answer), *facts[1:]]


def _assemble(
    encoder: Encoder,
    haystack_ids: Sequence[int],
    length: int,
    rng: random.Random,
    bos_token_id: int | None,
    kind: Kind,
    facts: list[_Fact],
    inserts: list[_Insert],
) -> RetrievalDocument:
    """Lay `inserts` into a random window of the haystack, so that exactly `length` tokens result."""
    head = [] if bos_token_id is None else [bos_token_id]
    inserts = sorted(inserts, key=lambda insert: insert.place)
    stop = _ids(encoder, ".\n")
    texts = []
    for number, insert in enumerate(inserts):
        fact = facts[insert.fact]
        if not insert.asked:
            texts.append(fact.statement)
        else:
            texts.append(fact.question + fact.answer + (stop if number + 1 < len(inserts) else []))
    filler = length - len(head) - sum(map(len, texts))
    if filler < 0:
        raise ValueError(
            f"length must be at least {length - filler} tokens for {len(facts)} facts, got {length}; use fewer facts"
        )
    if len(haystack_ids) < filler:
        raise ValueError(f"haystack_ids must hold at least {filler} tokens, got {len(haystack_ids)}; use a longer text")
    start = rng.randrange(len(haystack_ids) - filler + 1)
    window = [int(token) for token in haystack_ids[start : start + filler]]
    newline = _ids(encoder, "\n")[-1:]
    input_ids, answers, depths, questions, used = list(head), [], [], [], 0
    fact_depths: dict[int, float] = {}
    for insert, text in zip(inserts, texts, strict=True):
        place = round(insert.place * filler)
        for snapped in range(max(place, 1), min(place + _SNAP, filler)):
            if window[snapped - 1 : snapped] == newline:
                place = snapped
                break
        place = max(place, used)
        input_ids += window[used:place]
        used = place
        if insert.asked:
            questions.append(len(input_ids))
            begin = len(input_ids) + len(facts[insert.fact].question)
            answers.append((begin, begin + len(facts[insert.fact].answer)))
            depths.append(fact_depths[insert.fact])
        else:
            fact_depths[insert.fact] = place / max(filler, 1)
        input_ids += text
    input_ids += window[used:]
    return RetrievalDocument(input_ids, answers, depths, kind, questions)


def _fitting(facts: list[_Fact], length: int) -> list[_Fact]:
    """The first facts, one at least, that fit beside their questions, should each be asked for twice."""
    costs = accumulate(len(f.statement) + 2 * (len(f.question) + len(f.answer) + 2) for f in facts)
    return facts[: max(1, sum(cost < length for cost in costs))]


def passkey_document(
    encoder: Encoder,
    haystack_ids: Sequence[int],
    length: int,
    depth: float,
    rng: random.Random,
    *,
    bos_token_id: int | None = None,
) -> RetrievalDocument:
    """One pass key after the share `depth` of the text, asked for at the end.

    Args:
        encoder: A tokenizer.
        haystack_ids: Token ids of the text to hide the fact in; a random window of it is used.
        length: Tokens of the document, beginning-of-sequence token and answer included.
        depth: Share (0..1) of the text that comes before the fact; moved by at most 24 tokens to begin a line.
        rng: Draws the key and the window.
        bos_token_id: Put first, if given.

    Raises:
        ValueError: If `depth` is not a share, `length` is too short for the sentences, or the haystack for `length`.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must be in [0, 1], got {depth}; it is the share of the text before the fact")
    facts = [_passkey(encoder, rng)]
    inserts = [_Insert(depth, 0, asked=False), _Insert(1, 0, asked=True)]
    return _assemble(encoder, haystack_ids, length, rng, bos_token_id, "passkey", facts, inserts)


def key_value_document(
    encoder: Encoder,
    haystack_ids: Sequence[int],
    length: int,
    rng: random.Random,
    *,
    pairs: int = 8,
    bos_token_id: int | None = None,
) -> RetrievalDocument:
    """Key-value pairs at random depths, and a question about one of them at the end.

    Args:
        encoder: A tokenizer.
        haystack_ids: Token ids of the text to hide the facts in; a random window of it is used.
        length: Tokens of the document, beginning-of-sequence token and answer included.
        rng: Draws keys, values, depths, the question and the window.
        pairs: Number of pairs.
        bos_token_id: Put first, if given.

    Raises:
        ValueError: If `pairs` < 1, `length` is too short for the sentences, or the haystack for `length`.
    """
    if pairs < 1:
        raise ValueError(f"pairs must be at least 1, got {pairs}; one of them is asked for")
    drawn: dict[str, str] = {}
    while len(drawn) < pairs:
        drawn.setdefault(*_draw_pair(rng))
    facts = [_pair(encoder, key, value) for key, value in drawn.items()]
    inserts = [_Insert(rng.random(), fact, asked=False) for fact in range(pairs)]
    inserts.append(_Insert(1, rng.randrange(pairs), asked=True))
    return _assemble(encoder, haystack_ids, length, rng, bos_token_id, "key_value", facts, inserts)


def multi_key_document(
    encoder: Encoder,
    haystack_ids: Sequence[int],
    length: int,
    rng: random.Random,
    *,
    pairs: int = 32,
    bos_token_id: int | None = None,
) -> RetrievalDocument:
    """Key-value pairs like those of `key_value_document`, so many that the distractors outweigh the one asked for.

    RULER's multi-key retrieval (arXiv 2404.06654, section 3).

    Args:
        encoder: A tokenizer.
        haystack_ids: Token ids of the text to hide the facts in; a random window of it is used.
        length: Tokens of the document, beginning-of-sequence token and answer included.
        rng: Draws keys, values, depths, the question and the window.
        pairs: Number of pairs, the one asked for among them.
        bos_token_id: Put first, if given.

    Raises:
        ValueError: If `pairs` < 1, `length` is too short for the sentences, or the haystack for `length`.
    """
    document = key_value_document(encoder, haystack_ids, length, rng, pairs=pairs, bos_token_id=bos_token_id)
    return replace(document, kind="multi_key")


def variable_tracking_document(
    encoder: Encoder,
    haystack_ids: Sequence[int],
    length: int,
    rng: random.Random,
    *,
    chains: int = 2,
    hops: int = 4,
    bos_token_id: int | None = None,
) -> RetrievalDocument:
    """Chains of assignments in order through the text, and a question for the variables of one of them at the end.

    RULER's variable tracking (arXiv 2404.06654, section 3): the first variable of a chain is set to a value, each next
    one to the variable before it. The answer is the list of the asked chain's variables in that order; its depth is
    that of the first assignment. RULER also shows a solved example, which is left out.

    Args:
        encoder: A tokenizer.
        haystack_ids: Token ids of the text to hide the facts in; a random window of it is used.
        length: Tokens of the document, beginning-of-sequence token and answer included.
        rng: Draws names, values, depths, the question and the window.
        chains: Number of chains; all but one are distractors.
        hops: Assignments from a variable in each chain; one more variable holds the value.
        bos_token_id: Put first, if given.

    Raises:
        ValueError: If `chains` or `hops` < 1, there are more than 1000 variables, `length` is too short for the
            sentences, or the haystack for `length`.
    """
    if chains < 1 or hops < 1:
        raise ValueError(f"chains and hops must be at least 1, got {chains} and {hops}; one chain is asked for")
    if chains * (hops + 1) > _VARIABLES:
        raise ValueError(f"chains and hops must make at most {_VARIABLES} variables, got {chains} and {hops}")
    names, values = _distinct(chains * (hops + 1), rng), rng.sample(range(10_000, 100_000), chains)
    facts, inserts, firsts = [], [], []
    for number, value in enumerate(values):
        firsts.append(len(facts))
        places = sorted(rng.random() for _ in range(hops + 1))
        inserts += [_Insert(place, len(facts) + step, asked=False) for step, place in enumerate(places)]
        facts += _chain(encoder, names[number * (hops + 1) :][: hops + 1], f" {value}")
    inserts.append(_Insert(1, rng.choice(firsts), asked=True))
    return _assemble(encoder, haystack_ids, length, rng, bos_token_id, "variable_tracking", facts, inserts)


def training_document(
    encoder: Encoder,
    haystack_ids: Sequence[int],
    length: int,
    rng: random.Random,
    *,
    bos_token_id: int | None = None,
) -> RetrievalDocument:
    """A document with a dense recall signal: up to twelve facts, each asked for at a later place, at the end, or both.

    Args:
        encoder: A tokenizer.
        haystack_ids: Token ids of the text to hide the facts in; a random window of it is used.
        length: Tokens of the document, beginning-of-sequence token included; 256 at least.
        rng: Draws everything.
        bos_token_id: Put first, if given.

    Raises:
        ValueError: If `length` < 256 or the haystack is too short for it.
    """
    if length < 2 * _TOKENS_PER_FACT:
        raise ValueError(f"length must be at least {2 * _TOKENS_PER_FACT} tokens, got {length}; use a longer context")
    kind: Kind = rng.choices(["passkey", "key_value", "names", "mixed"], weights=[2, 3, 2, 3])[0]
    count = rng.randint(1, min(12, length // _TOKENS_PER_FACT))
    if kind == "passkey":
        kinds = ["passkey"]  # a document has one pass key: the question names no other
    elif kind == "mixed":
        kinds = ["passkey"] + rng.choices(["key_value", "names"], k=count - 1)
    else:
        kinds = [kind] * count
    facts = _fitting([_MAKERS[each](encoder, rng) for each in kinds], length)
    inserts, at_end = [], []
    for fact in range(len(facts)):
        place = rng.random()
        inserts.append(_Insert(place, fact, asked=False))
        end = rng.random() < 0.7
        if end:
            at_end.append(fact)
        if not end or rng.random() < 0.4:
            inserts.append(_Insert(rng.uniform(place, 1), fact, asked=True))
    rng.shuffle(at_end)
    inserts += [_Insert(1, fact, asked=True) for fact in at_end]
    return _assemble(encoder, haystack_ids, length, rng, bos_token_id, kind, facts, inserts)
