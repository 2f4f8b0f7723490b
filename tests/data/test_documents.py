"""Retrieval documents: exact lengths and spans, facts before questions, however a tokenizer splits digits."""

import random
import re

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from seerattn.data.retrieval import (
    RetrievalDocument,
    key_value_document,
    multi_key_document,
    passkey_document,
    training_document,
    variable_tracking_document,
)

_TEXT = "\n".join(f"On day {day} the boat left the harbour, and nobody came back." for day in range(600))
_BOS = 1


class _Characters:
    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [ord(character) + 10 for character in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(token - 10) for token in ids)


class _MergedDigits:
    """Byte-level BPE that has learned tokens of several digits, and of words with their space."""

    def __init__(self) -> None:
        self.tokenizer = Tokenizer(models.BPE())
        self.tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.tokenizer.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=900, special_tokens=["<pad>", "<bos>"], initial_alphabet=alphabet, show_progress=False
        )
        numbers = " ".join(str(number) for number in range(10_000, 12_000))
        self.tokenizer.train_from_iterator([_TEXT, numbers, "What is the value of the pass key?"], trainer)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)


@pytest.fixture(scope="module", params=[_Characters, _MergedDigits], ids=["characters", "merged-digits"])
def encoder(request):
    return request.param()


@pytest.fixture(scope="module")
def haystack(encoder) -> list[int]:
    return encoder.encode(_TEXT, add_special_tokens=False)


_STATEMENT = {
    "pass key": r"The pass key is (\d{5})\. Remember it\. \1 is the pass key\.",
    "value": r"The value of ([a-z]+ [a-z]+) is (\d{5})\.\n",
    "called": r"The [a-z]+ of [A-Z][a-z]+ was called ([A-Z][a-z]+ [A-Z][a-z]+)\.\n",
}


def _fact_start(encoder, document: RetrievalDocument, index: int) -> int:
    """Token index where the statement begins that answer `index` needs, found in the decoded text alone; -1 if none."""
    begin, end = document.answers[index]
    text, answer = encoder.decode(document.input_ids[1:begin]), encoder.decode(document.input_ids[begin:end])
    cue = text[text.rindex("? ") + 2 :]  # "The value of <key> is", which the statement repeats
    match = re.search(re.escape(cue + answer) + r"\.", text)
    return -1 if match is None else 1 + len(encoder.encode(text[: match.start()], add_special_tokens=False))


@pytest.mark.parametrize("depth", [0.0, 0.31, 0.5, 1.0])
@pytest.mark.parametrize("length", [701, 1024])
def test_passkey_document_holds_the_key_at_its_depth_and_asks_last(encoder, haystack, length, depth):
    document = passkey_document(encoder, haystack, length, depth, random.Random(3), bos_token_id=_BOS)
    assert len(document.input_ids) == length and document.input_ids[0] == _BOS
    [(begin, end)] = document.answers
    assert end == length
    text = encoder.decode(document.input_ids[1:])
    key = re.search(_STATEMENT["pass key"], text).group(1)
    assert encoder.decode(document.input_ids[begin:end]) == f" {key}"
    assert text.count(key) == 3 and text.endswith(f"What is the pass key? The pass key is {key}")
    before, after = text.split(re.search(_STATEMENT["pass key"], text).group(0))
    after = after[: after.rindex(" What is the pass key?")]
    share = len(before) / (len(before) + len(after))
    assert share == pytest.approx(document.depths[0], abs=0.01)  # in characters, of nearly even text
    assert 0 <= document.depths[0] - depth <= 24 / (length / 2)  # the filler is more than half of the document


@pytest.mark.parametrize(("make", "count"), [(key_value_document, 8), (multi_key_document, 32)])
def test_key_value_documents_ask_for_one_of_their_pairs(encoder, haystack, make, count):
    document = make(encoder, haystack, 2500, random.Random(5), bos_token_id=_BOS)
    assert len(document.input_ids) == 2500
    text = encoder.decode(document.input_ids[1:])
    pairs = dict(re.findall(_STATEMENT["value"], text))
    assert len(pairs) == count
    [(begin, end)] = document.answers
    asked = re.search(
        r"What is the value of ([a-z ]+)\? The value of \1 is$", encoder.decode(document.input_ids[1:begin])
    )
    assert end == 2500 and encoder.decode(document.input_ids[begin:end]) == f" {pairs[asked.group(1)]}"


@pytest.mark.parametrize(("chains", "hops"), [(1, 1), (2, 4), (5, 2)])
def test_variable_tracking_asks_for_the_variables_that_following_the_text_finds(encoder, haystack, chains, hops):
    document = variable_tracking_document(
        encoder, haystack, 2500, random.Random(7), chains=chains, hops=hops, bos_token_id=_BOS
    )
    assert len(document.input_ids) == 2500
    text = encoder.decode(document.input_ids[1:])
    held: dict[str, str] = {}
    for name, source in re.findall(r"The variable ([a-z]+) is set to ([a-z0-9]+)\.\n", text):
        held[name] = held.get(source, source)  # what a reader knows at this point: a later source would stay a name
    assert len(held) == chains * (hops + 1) and len(set(held.values())) == chains
    [(begin, end)] = document.answers
    asked = re.search(
        r"Which variables are set to (\d{5})\? The variables set to \1 are$",
        encoder.decode(document.input_ids[1:begin]),
    )
    names = [name for name, value in held.items() if value == asked.group(1)]
    assert len(names) == hops + 1
    assert end == 2500 and encoder.decode(document.input_ids[begin:end]) == " " + ", ".join(names)
    share = text.index(f"The variable {names[0]} is") / text.index(" Which variables")
    assert share == pytest.approx(document.depths[0], abs=0.15)  # other statements before it are no filler


def test_pairs_are_as_many_as_asked_for_even_where_keys_collide(monkeypatch):
    encoder = _Characters()
    draws = iter(["bal"] * 4 + ["bal", "cor"] + [f"w{i}" for i in range(9)])
    monkeypatch.setattr("seerattn.data.retrieval._word", lambda rng: next(draws))
    document = key_value_document(encoder, [40] * 3000, 900, random.Random(0), pairs=3)
    assert len(set(re.findall(_STATEMENT["value"].replace("a-z", "a-z0-9"), encoder.decode(document.input_ids)))) == 3


@pytest.mark.parametrize("length", [2049, 4097])
def test_training_documents_state_every_fact_before_it_is_asked(encoder, haystack, length):
    if isinstance(encoder, _Characters):
        length *= 4  # a token is a character
    kinds, rng = set(), random.Random(11)
    for _ in range(60):
        document = training_document(encoder, haystack, length, rng, bos_token_id=_BOS)
        kinds.add(document.kind)
        assert len(document.input_ids) == length and document.input_ids[0] == _BOS
        assert len(document.answers) == len(document.depths) >= 1
        for index, (begin, end) in enumerate(document.answers):
            stated = _fact_start(encoder, document, index)
            assert 0 < stated <= begin, "the fact must stand in the text before its question"
            assert 0 <= document.depths[index] <= 1 and end <= length
        assert document.answers == sorted(document.answers)
    assert kinds == {"passkey", "key_value", "names", "mixed"}


def test_training_documents_ask_far_and_near():
    """Expected: a third of the answers more than half a document behind the fact, two fifths less than a quarter."""
    rng, encoder, length = random.Random(0), _MergedDigits(), 8193
    haystack = encoder.encode(_TEXT, add_special_tokens=False)
    documents = [training_document(encoder, haystack, length, rng) for _ in range(200)]
    distances = [
        begin / length - depth
        for document in documents
        for (begin, _), depth in zip(document.answers, document.depths, strict=True)
    ]
    assert sum(distance > 0.5 for distance in distances) > 0.25 * len(distances)
    assert sum(distance < 0.25 for distance in distances) > 0.25 * len(distances)
    assert len(distances) > 4 * len(documents)


def test_documents_are_the_same_for_the_same_seed_and_differ_otherwise(encoder, haystack):
    def build(seed: int) -> list[RetrievalDocument]:
        rng = random.Random(seed)
        return [
            passkey_document(encoder, haystack, 900, 0.5, rng),
            key_value_document(encoder, haystack, 1500, rng),
            variable_tracking_document(encoder, haystack, 1500, rng),
            training_document(encoder, haystack, 3000, rng),
        ]

    assert build(1) == build(1)
    assert all(a != b for a, b in zip(build(1), build(2)))


def test_short_training_documents_hold_as_many_facts_as_fit():
    encoder = _Characters()
    haystack = encoder.encode("a quiet day in the valley\n" * 200, add_special_tokens=False)
    for seed in range(60):
        document = training_document(encoder, haystack, 700, random.Random(seed))
        assert len(document.input_ids) == 700 and document.answers
        for begin, end in document.answers:
            answer = encoder.decode(document.input_ids[begin:end])
            assert answer in encoder.decode(document.input_ids[:begin])


def test_documents_reject_what_cannot_be_built(encoder, haystack):
    rng = random.Random(0)
    with pytest.raises(ValueError, match="length"):
        passkey_document(encoder, haystack, 20, 0.5, rng)
    with pytest.raises(ValueError, match="haystack_ids"):
        passkey_document(encoder, haystack[:100], 900, 0.5, rng)
    with pytest.raises(ValueError, match="depth"):
        passkey_document(encoder, haystack, 900, 1.5, rng)
    with pytest.raises(ValueError, match="pairs"):
        key_value_document(encoder, haystack, 900, rng, pairs=0)
    with pytest.raises(ValueError, match="hops"):
        variable_tracking_document(encoder, haystack, 900, rng, hops=0)
    with pytest.raises(ValueError, match="variables"):
        variable_tracking_document(encoder, haystack, 900, rng, chains=400)
    with pytest.raises(ValueError, match="length"):
        training_document(encoder, haystack, 255, rng)
