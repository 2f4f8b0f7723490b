"""Records of version 0.1, as it wrote them, and as what they are read."""

import json
from dataclasses import asdict, replace
from typing import Any

import pytest

from seerattn.results.file import ResultsFile, read_results
from seerattn.results.record import Result, parse_line, to_line

# What lines end with, whatever they measured.
END = {
    "versions": {"seerattn": "source", "torch": "2.11.0", "transformers": "5.17.0", "python": "3.12.3"},
    "device": "NVIDIA H200", "git": "1fc79f62+", "command": "seerattn compare recipes/compare_long.yaml",
    "seconds": 2.683, "timestamp": "2026-11-26T06:13:56+00:00",
}  # fmt: skip
TOP_K = {"policy": "TopK", "sink_blocks": 1, "last_rows_dense": 0, "density": 0.1, "rule": "same_k", "length": None}
CELL = {"windows": 1, "min_tokens": 0, "data": "0a195c1fe966"}
BLOCKS = {"block_q": 64, "block_k": 64, "dtype": "bfloat16"}
TUNED = CELL | {"budget": "density"} | BLOCKS


def line(what: str, selector: str, *, gates=None, policy=None, density=None, seed=None, weights=None, **rest) -> str:
    """A line of 0.1, its fields in the order that it had."""
    common = {"value": 0.5, "n": 3, "unit": "tokens", "context": 8192, "text": "books", "stderr": 0.25}
    common |= {"realised_density": 0.125, "cell": {}, "samples": {}} | rest
    values = {
        "what": what, "value": common["value"], "n": common["n"], "unit": common["unit"], "model": "reference",
        "selector": selector, "context": common["context"], "text": common["text"], "stderr": common["stderr"],
        "gates": gates, "weights": weights or {"model": "20c1962b3c68aa63"}, "policy": policy, "density": density,
        "realised_density": common["realised_density"], "seed": seed, "cell": common["cell"],
        "samples": common["samples"],
    }  # fmt: skip
    return json.dumps(values | END | ({"part": rest["part"]} if "part" in rest else {}))


# Lines of 0.1, and the fields of the record that each of them is now. What is not told is as it was.
LINES: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": (
        line("perplexity", "dense", cell=CELL | {"dtype": "bfloat16"}, samples={"losses": [1.5], "tokens": [3]}),
        {"method": "dense", "kind": "dense", "name": "dense", "settings": {}, "cell": CELL | {"dtype": "bfloat16"}},
    ),
    "an oracle with budgets per head": (
        line(
            "accuracy", "oracle sum:2, budgets per head", policy=TOP_K, density=0.1, seed=1, part=[1, 2],
            cell={"task": "passkey", "depth": 0.1, "budgets": "f75af98f8c20"} | BLOCKS,
            samples={"correct": [True, False], "log_prob": [-1.5, -3.25]},
        ),
        {
            "method": "oracle", "kind": "oracle", "name": "oracle sum:2, budgets per head", "seed": 1, "part": [1, 2],
            "settings": TOP_K | {"target": "sum:2", "budgets": "f75af98f8c20"},
            "cell": {"task": "passkey", "depth": 0.1} | BLOCKS,
        },
    ),
    "the published oracle with budgets per head": (
        line("accuracy", "oracle, budgets per head", policy=TOP_K, cell={"task": "multi_key", "budgets": "f7"}),
        {
            "method": "oracle", "kind": "oracle", "name": "oracle, budgets per head",
            "settings": TOP_K | {"budgets": "f7"}, "cell": {"task": "multi_key"},
        },
    ),
    "gates with a policy": (
        line(
            "accuracy", "gate", gates="default", policy=TOP_K | {"heads": "equal"}, density=0.1,
            weights={"model": "e13da306b41a768d", "gates": "7447bb483caa3077"}, cell={"task": "key_value"},
        ),
        {
            "method": "gate", "kind": "learned", "name": "default", "settings": TOP_K | {"heads": "equal"},
            "cell": {"task": "key_value"}, "weights": {"model": "e13da306b41a768d", "gates": "7447bb483caa3077"},
        },
    ),
    "gates of a comparison": (
        line(
            "perplexity", "gate", gates="best head thresholds", density=0.5, cell=TUNED,
            policy={"policy": "head_thresholds", "calibration": "bfc9fd9ac7ca", "last_rows_dense": 0, "knob": 0.4988},
        ),
        {
            "method": "gate", "kind": "learned", "name": "best head thresholds", "cell": TUNED,
            "settings": {
                "policy": "head_thresholds", "calibration": "bfc9fd9ac7ca", "last_rows_dense": 0, "setting": 0.4988
            },
        },
    ),
    "xattention under a name of its own": (
        line("perplexity", "x", policy={"stride": 8, "last_rows_dense": 2, "knob": 0.875}, density=0.2, cell=TUNED),
        {
            "method": "xattention", "kind": "training-free", "name": "x", "cell": TUNED,
            "settings": {"stride": 8, "last_rows_dense": 2, "setting": 0.875},
        },
    ),
    "xattention with a plan": (
        line("perplexity", "xattention 64 profile", policy={"stride": 8, "plan": "7f75", "knob": 0.75}, density=0.2),
        {
            "method": "xattention", "kind": "training-free", "name": "xattention 64 profile", "cell": {},
            "settings": {"stride": 8, "plan": "7f75", "setting": 0.75},
        },
    ),
    "minference of a variant": (
        line("perplexity", "minference paper", policy={"plan": "7f", "variant": "paper", "knob": 2.0}, density=0.2),
        {
            "method": "minference", "kind": "training-free", "name": "minference paper", "cell": {},
            "settings": {"plan": "7f", "variant": "paper", "setting": 2.0},
        },
    ),
    "a knob": (
        line(
            "knob", "pooled", value=0.5, policy={"sink_blocks": 1, "last_rows_dense": 0}, density=0.5,
            cell={"tuned_on": "f8893737e41b", "sequences": 8} | TUNED, samples={"knobs": [0.5], "values": [0.50399]},
        ),
        {
            "what": "setting", "method": "mean_pooled", "kind": "training-free", "name": "mean_pooled", "value": 0.5,
            "settings": {"sink_blocks": 1, "last_rows_dense": 0},
            "cell": {"tuned_on": "f8893737e41b", "sequences": 8} | TUNED,
            "samples": {"settings": [0.5], "values": [0.50399]},
        },
    ),
    "a time of the map's kernel": (
        line("pooled_ms", "dense", value=1.69808, unit="runs", text="random", stderr=None,
             cell={"dtype": "bfloat16", "impl": "flash", "device": "NVIDIA H100 80GB HBM3", "map": False}),
        {
            "what": "attention_map_ms", "method": "dense", "kind": "dense", "name": "dense", "settings": {},
            "cell": {"dtype": "bfloat16", "impl": "flash", "device": "NVIDIA H100 80GB HBM3", "map": False},
        },
    ),
    "a failure": (
        line("failure", "slash", value=None, policy={"last_rows_dense": 0}, samples={"error": ["OutOfMemoryError"]},
             cell={"task": "perplexity", "budget": "time", "share": 0.5}),
        {
            "method": "slash", "kind": "training-free", "name": "slash", "settings": {"last_rows_dense": 0},
            "cell": {"task": "perplexity", "budget": "time", "share": 0.5}, "value": None,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LINES)
def test_a_record_of_0_1_is_read_as_the_record_of_now_that_says_the_same(name: str) -> None:
    text, told = LINES[name]
    values = json.loads(text)
    same = {key: values[key] for key in values if key not in ("selector", "gates", "policy")}
    assert asdict(parse_line(text)) == asdict(Result(**same | told))
    # And is written as such.
    assert parse_line(to_line(parse_line(text))) == parse_line(text)


@pytest.mark.parametrize(
    ("selector", "method", "kind"),
    [
        ("streaming", "streaming", "static"),
        ("random", "random", "static"),
        ("a_shape 4", "a_shape", "static"),
        ("tri-shape", "tri_shape", "static"),
        ("vertical_slash", "vertical_slash", "training-free"),
        ("moa", "moa", "training-free"),
        ("flexprefill 64", "flexprefill", "training-free"),
    ],
)
def test_methods_of_0_1_are_told_by_how_their_names_began(selector: str, method: str, kind: str) -> None:
    record = parse_line(line("perplexity", selector))
    assert (record.method, record.kind) == (method, kind) and record.name.startswith(method)


@pytest.mark.parametrize(
    ("options", "method"),
    [
        ({"share": "query_head"}, "oracle"),
        ({"seed": 3}, "random"),
        ({"n_init": 128, "n_last": 0}, "a_shape"),
        ({"columns": 1000, "offsets": 6096}, "vertical_slash"),
        ({"plan": "7f", "variant": "paper"}, "minference"),
        ({"plan": "7f", "length": 8192}, "moa"),
        ({"stride": 16}, "xattention"),
        ({"tau": 0.1, "min_budget": 1}, "flexprefill"),
    ],
)
def test_methods_under_names_of_their_own_are_told_by_options_that_no_other_had(options: dict, method: str) -> None:
    record = parse_line(line("perplexity", "mine", policy=options | {"knob": 0.5}))
    assert (record.method, record.name) == (method, "mine")
    assert record.settings == options | {"setting": 0.5}


def test_a_last_line_of_0_1_that_was_cut_is_ignored_whatever_byte_it_ends_at(tmp_path) -> None:
    path = tmp_path / "r.jsonl"
    first, last = (LINES[name][0] for name in ("dense", "an oracle with budgets per head"))
    whole = (first + "\n").encode()
    for size in range(len(last) + 1):
        path.write_bytes(whole + last[:size].encode())
        assert [row.name for row in read_results([path])] == ["dense"]
    # Writing goes on from there, in the form of now; what was there stays as it was.
    path.write_bytes(whole + last[:300].encode())
    file = ResultsFile(path)
    assert file.find(parse_line(first)) is not None
    added = file.append(replace(parse_line(first), context=64))
    assert path.read_bytes().startswith(whole)
    assert read_results([path]) == [parse_line(first), added]


def test_a_group_of_0_1_whose_last_lines_are_missing_is_ignored(tmp_path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text("".join(LINES[name][0] + "\n" for name in ("dense", "an oracle with budgets per head")))
    assert [row.name for row in read_results([path])] == ["dense"]


@pytest.mark.parametrize("text", ["# mine", '{"what": "x", "selector": 1', '{"selector": "dense", "what": "x"'])
def test_what_0_1_did_not_write_is_no_line_that_was_cut(tmp_path, text: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(LINES["dense"][0] + "\n" + text)
    with pytest.raises(ValueError, match="line 2"):
        read_results([path])


@pytest.mark.parametrize(
    "change", [{"selector": 3}, {"policy": [1]}, {"cell": 3}, {"gates": 5}, {"surprise": 1}, {"n": "x"}]
)
def test_a_line_with_a_field_of_a_wrong_kind_is_refused(change: dict) -> None:
    with pytest.raises(ValueError):
        parse_line(json.dumps(json.loads(LINES["dense"][0]) | change))
