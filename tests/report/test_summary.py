"""The summary against a written-out table."""

from dataclasses import replace

from rows import lines, of, section

from seerattn.results.record import Result


def result(what: str, name: str, density: float | None, value: float, **more) -> Result:
    dense = name == "dense"
    values = of(name) | {"n": 20, "unit": "documents", "model": "m", "context": 8192, "text": "books"}
    values["cell"] = {"task": "passkey", "documents": 20, "depth": 0.5} if what == "accuracy" else {"windows": 1}
    return Result(
        what=what, value=value, density=density, **values | {"realised_density": density if not dense else 1.0} | more
    )


def measured() -> list[Result]:
    rows = [result("perplexity", "dense", None, 20.0), result("accuracy", "dense", None, 1.0)]
    for depth, right in ((0.2, 9), (0.8, 16)):
        cell = {"task": "passkey", "documents": 20, "depth": depth}
        rows.append(result("accuracy", "best", 0.1, right / 20, cell=cell, realised_density=0.105))
    rows += [result("perplexity", "best", density, 21.0, realised_density=0.1) for density in (0.1, 0.5)]
    rows.append(result("perplexity", "best", 0.1, 7.5, text="proofs", realised_density=0.092))
    rows.append(result("perplexity", "moa", 0.1, 30.0, realised_density=0.2))
    # Left out: another context, dense last rows, a density without retrieval.
    rows += [result(what, "best", 0.1, 0.5, context=4096) for what in ("perplexity", "accuracy")]
    rows.append(result("perplexity", "best", 0.1, 99.0, settings={"last_rows_dense": 2}))
    return rows


def test_summary_matches_a_written_out_table() -> None:
    (table,) = section(measured(), "summary").parts
    assert table.title == "Summary: density 0.1, 8,192 tokens, m"
    assert lines(table) == [
        ["method", "density", "perplexity, books", "perplexity, proofs", "passkey"],
        ["dense", "1", "20.00", "", "1.00"],
        # 25 of 40.
        ["gates: best", "0.092 to 0.105", "21.00", "7.50", "0.62"],
        ["MoA", "0.200", "30.00 at 0.200", "", ""],
    ]
    assert "20 or 40 documents a retrieval task" in table.notes[0]
    assert not section([r for r in measured() if r.what == "perplexity"], "summary").parts


def test_summary_keeps_other_documents_and_other_weights_apart() -> None:
    rows = measured()
    other = replace(rows[0], cell={"windows": 9}, value=50.0)
    (table,) = section([*rows, other], "summary").parts
    assert lines(table)[0][2:5] == ["perplexity, books", "perplexity, books (2)", "perplexity, proofs"]
    assert lines(table)[1][2:5] == ["20.00", "50.00", ""]
    trained = [replace(r, weights={"model": "w"}) for r in rows]
    assert len(section([*rows, *trained], "summary").parts) == 2
