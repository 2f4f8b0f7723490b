import pytest
from tiny_corpus import tiny_tokenizer, write_documents

from seerattn.data.windows import Window, batches, cut_windows, digest, token_documents


def test_windows_match_a_written_out_cut() -> None:
    first, second = list(range(10, 35)), list(range(50, 57))
    windows = cut_windows([first, second], context=8, count=None, bos_token_id=1)
    assert windows == [Window(0, [1, *range(a, a + 7)]) for a in (10, 17, 24)] + [Window(1, [1, *range(50, 57)])]


def test_a_last_shorter_window_counts_only_from_the_minimum_on() -> None:
    ids = list(range(20))
    assert [len(w.input_ids) for w in cut_windows([ids], context=8, count=None)] == [8, 8]
    assert [len(w.input_ids) for w in cut_windows([ids], context=8, count=None, min_tokens=4)] == [8, 8, 4]
    assert [len(w.input_ids) for w in cut_windows([ids], context=8, count=1, min_tokens=4)] == [8]
    assert cut_windows([ids[:5], ids], context=8, count=1)[0].document == 1


def test_windows_reject_documents_that_are_all_too_short() -> None:
    with pytest.raises(ValueError, match="at least 64 tokens"):
        cut_windows([[1, 2, 3]], context=64, count=1)


def test_batches_hold_equal_lengths_and_lose_nothing() -> None:
    windows = [Window(i, [0] * length) for i, length in enumerate([8, 8, 8, 5, 8, 5, 5])]
    groups = batches(windows, 2)
    assert [len(group) for group in groups] == [2, 1, 1, 1, 2]
    assert [window for group in groups for window in group] == windows


@pytest.mark.parametrize("limit", [1, 37, 299, 300, 5000])
def test_a_limited_encoding_is_the_start_of_the_whole(tmp_path, limit: int) -> None:
    path = write_documents(tmp_path / "d.jsonl", 300, 200)
    whole = token_documents([path], tiny_tokenizer())
    assert [len(ids) for ids in whole] == [300, 200]
    assert token_documents([path], tiny_tokenizer(), tokens=limit) == [ids[:limit] for ids in whole]
    assert token_documents([path], tiny_tokenizer(), limit=1) == whole[:1]


def test_a_limited_encoding_does_not_split_a_long_word_at_its_edge(tmp_path) -> None:
    path = tmp_path / "d.txt"
    path.write_text("incomprehensible " + "a " * 100)

    def word_lengths(text: str, **_) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}

    assert token_documents([path], word_lengths, tokens=1) == [[16]]


def test_digest_tells_tokens_and_boundaries_apart() -> None:
    digests = {digest(d) for d in ([[1, 2], [3]], [[1], [2, 3]], [[1, 2, 3]], [[1, 2], [4]])}
    assert len(digests) == 4
    assert digest([[1, 2], [3]]) == digest([[1, 2], [3]])
