"""The text of tokens that come one by one: what is given away is what the whole answer says."""

import random
from collections.abc import Callable
from itertools import accumulate

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from seerattn.serve.text import TextStream

SIGNS = [" hello", "hello", " w", "ö", "r", "日本", "語", "😀", "👩\u200d👩\u200d👧", "\u2019", "\n", " ", "  ", "."]
SIGNS += [" .", ",", "'s", "12"]


def byte_level() -> PreTrainedTokenizerFast:
    """A token a byte, as GPT-2 writes bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: at for at, letter in enumerate(["<end>", *letters])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def with_bytes_behind(decoder: decoders.Decoder) -> PreTrainedTokenizerFast:
    """Words with a mark for a space before them, and bytes of what is no word, as Llama 2 has it."""
    words = ["<end>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁hello", "hello", "▁w", "r", ".", "▁.", "日"]
    tokenizer = Tokenizer(models.BPE({word: at for at, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def strips_space() -> PreTrainedTokenizerFast:
    """As Llama 2: the space before the first word is taken away."""
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return with_bytes_behind(decoders.Sequence(parts))


def keeps_space() -> PreTrainedTokenizerFast:
    return with_bytes_behind(decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]))


TOKENIZERS = [byte_level, strips_space, keeps_space, ByT5Tokenizer]


def answer(tokenizer: PreTrainedTokenizerBase, draw: random.Random) -> list[int]:
    """Tokens of a text, with marks between them that are no text, which may end within a sign."""
    ids = []
    for sign in draw.choices(SIGNS, k=draw.randint(1, 30)):
        ids += tokenizer(sign, add_special_tokens=False)["input_ids"]
        ids += [tokenizer.eos_token_id] * draw.choice([0, 0, 0, 1])
    return ids[: draw.randint(1, len(ids))]


def text_of(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of tokens, and marks behind it for a sign that they do not write to its end."""
    known = len(ids)
    while "\ufffd" in tokenizer.decode(ids[:known], skip_special_tokens=True):
        known -= 1
    texts = [tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:known], ids[known:])]
    return "".join(texts)


def streamed(tokenizer: PreTrainedTokenizerBase, ids: list[int], draw: random.Random, *stop: str) -> list[str]:
    """The pieces of an answer whose tokens come in groups, up to its end."""
    text, pieces, at = TextStream(tokenizer, stop), [], 0
    while at < len(ids):
        at = min(len(ids), at + draw.choice([1, 1, 1, 3]))
        piece, ended = text.add(ids[:at], last=at == len(ids))
        pieces.append(piece)
        if ended:
            break
    return pieces


@pytest.mark.parametrize("make", TOKENIZERS)
def test_pieces_are_the_text_of_all_tokens_and_end_in_whole_signs(make: Callable) -> None:
    tokenizer, draw = make(), random.Random(0)
    for _ in range(200):
        ids = answer(tokenizer, draw)
        pieces = streamed(tokenizer, ids, draw)
        whole = text_of(tokenizer, ids)
        assert "".join(pieces) == whole and "\ufffd" not in "".join(pieces[:-1])
        # Nothing is held back that is known.
        assert all(whole.startswith(so_far) for so_far in accumulate(pieces))
    assert any(streamed(tokenizer, tokenizer(" hello hello").input_ids, draw)[:-1])


@pytest.mark.parametrize("make", TOKENIZERS)
def test_answer_ends_before_the_first_of_the_texts_that_stop_it(make: Callable) -> None:
    tokenizer, draw = make(), random.Random(1)
    ends = 0
    for _ in range(200):
        ids = answer(tokenizer, draw)
        whole = text_of(tokenizer, ids)
        at = draw.randrange(len(whole) + 1)
        stop = (whole[at : at + draw.randint(1, 4)] or "none", "never said")
        expected = whole[: whole.index(stop[0])] if stop[0] in whole else whole
        if "\ufffd" not in stop[0]:
            assert "".join(streamed(tokenizer, ids, draw, *stop)) == expected
            ends += expected != whole
    assert ends > 50


@pytest.mark.parametrize("make", [strips_space, keeps_space, byte_level])
def test_bytes_that_are_no_text_take_nothing_from_what_is_said_after_them(make: Callable) -> None:
    tokenizer, draw = make(), random.Random(2)
    for _ in range(100):
        noise = [draw.randrange(1, 257) for _ in range(draw.randint(1, 12))]
        ids = answer(tokenizer, draw) + noise + tokenizer(". hello hello", add_special_tokens=False)["input_ids"]
        assert "".join(streamed(tokenizer, ids, draw)).endswith("hello hello")


def test_a_token_costs_the_same_however_long_the_answer_is(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, decoded = strips_space(), []
    decode = type(tokenizer).decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **options: decoded.append(len(ids)) or decode(tokenizer, ids))
    ids = tokenizer("hello wr. 😀" * 50)["input_ids"]
    assert "".join(streamed(tokenizer, ids, random.Random(3))).endswith("😀") and decoded == [0]
