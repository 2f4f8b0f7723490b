"""Tables against written-out ones."""

from dataclasses import replace

import numpy as np
import pytest
from rows import KINDS, lines, of, section, tables

from seerattn.report.names import name_of
from seerattn.report.tables.heads import by_head
from seerattn.results.record import Result

DATA = {"data": "abc", "windows": 1, "min_tokens": 0, "dtype": "float32"}
PLACE = "books, m, no dense last rows"


def result(what: str, name: str, density: float | None, value: float | None, *, last: int = 0, **more) -> Result:
    dense = name == "dense"
    values = of(name) | {"unit": "tokens", "n": 1000, "model": "m", "context": 4096, "text": "books"}
    values["realised_density"] = 1.0 if dense else None if density is None else round(density * 1.02, 3)
    values["cell"] = (
        DATA | ({} if dense else {"budget": "density", "block_q": 64, "block_k": 64}) | more.pop("cell", {})
    )
    values["settings"] = values["settings"] | ({} if dense else {"last_rows_dense": last})
    return Result(what=what, value=value, density=density, **values | more)


def perplexities() -> list[Result]:
    rows = [result("perplexity", "dense", None, 30.0, samples={"documents": [0, 1, 2]})]
    for name, values in {"streaming": (31.5, 34.25), "oracle": (30.25, 33.0), "best": (30.5, 33.5)}.items():
        for density, value, error in zip((0.2, 0.1), values, (0.125, 0.25)):
            rows.append(result("perplexity", name, density, value, stderr=2.0))
            rows.append(result("perplexity_difference", name, density, value - 30, stderr=error))
    return rows


def accuracies() -> list[Result]:
    rows = []
    for depth, right in ((0.2, 3), (0.8, 4)):
        more = {"unit": "documents", "n": 4, "seed": 0, "cell": {"task": "passkey", "documents": 4, "depth": depth}}
        rows.append(result("accuracy", "dense", None, right / 4, **more))
        rows.append(result("accuracy", "best", 0.1, (right - 2) / 4, **more))
        rows.append(result("accuracy", "best", 0.1, (right - 1) / 4, last=2, **more))
    return rows


def recalls() -> list[Result]:
    rows = []
    for name, value in (("oracle", 0.8), ("best", 0.7)):
        more = {"unit": "sequences", "n": 2}
        rows.append(result("target_recall", name, 0.1, value, stderr=0.012, **more))
        rows.append(result("target_recall", name, 0.1, 0.123, cell={"layer": 0}, samples={"heads": [value]}, **more))
    return rows


def realised(rows: list[Result], densities: dict[str, float]) -> list[Result]:
    return [replace(r, realised_density=densities[r.name]) if r.density == 0.1 else r for r in rows]


def test_perplexities_have_paired_errors_and_the_gap_is_that_from_streaming_to_the_oracle() -> None:
    found = tables(perplexities())
    table = found[f"Perplexity: {PLACE}, 4,096 tokens"]
    assert lines(table) == [
        ["method", "1", "0.2 (0.204)", "0.1 (0.102)"],
        ["dense", "30.00", "", ""],
        ["oracle", "", "30.25 ± 0.125", "33.00 ± 0.250"],
        ["gates: best", "", "30.50 ± 0.125", "33.50 ± 0.250"],
        ["streaming", "", "31.50 ± 0.125", "34.25 ± 0.250"],
    ]
    assert table.notes[0] == "3 documents, 1,000 tokens."
    # (31.5 - 30.5) / (31.5 - 30.25) and (34.25 - 33.5) / (34.25 - 33).
    gap = found[f"Share of the gap that is closed: {PLACE}, 4,096 tokens"]
    assert lines(gap) == [["method", "0.2 (0.204)", "0.1 (0.102)"], ["gates: best", "80%", "60%"]]


def test_likelihoods_of_decoded_answers_are_means_over_the_documents_of_all_depths() -> None:
    def rows(name: str, phase: str, *found: tuple[int, float, float], **more) -> list[Result]:
        cell = {"task": "passkey", "phase": phase} | ({} if name == "dense" else {"tokens": 512, "budget": "tokens"})
        return [
            result("answer_log_prob", name, None, value, n=n, stderr=error, cell=cell | {"depth": depth}, **more)
            for depth, (n, value, error) in enumerate(found)
        ]

    dense, best = ((4, -1.0, 0.5),), ((4, -2.0, 0.3), (12, -4.0, 0.2))
    found = tables([*rows("dense", "decode", *dense), *rows("best", "decode", *best, realised_density=0.125)])
    (table,) = (table for title, table in found.items() if title.startswith("Likelihood of answers: 4,096 tokens"))
    # (4 * -2 + 12 * -4) / 16, and the root of 1.2^2 + 2.4^2 over 16.
    assert lines(table)[1:] == [["dense", "-1.00 ± 0.50", ""], ["gates: best", "", "-3.50 ± 0.17 at 0.125"]]
    # What prompts retrieve is told by shares alone.
    assert not any(name.startswith("Likelihood") for name in tables(rows("best", "prefill", *best)))


def test_retrieval_adds_up_depths_and_tells_dense_last_rows_apart() -> None:
    found = tables(accuracies())
    # 7, 3 and 5 of 8, errors at 8/10, 4/10 and 6/10.
    table = found["Retrieval: 4,096 tokens, books, m, no dense last rows, passkey"]
    assert lines(table)[1:] == [["dense", "0.88 ± 0.14", ""], ["gates: best", "", "0.38 ± 0.17"]]
    assert table.notes == ["8 documents a cell."]
    table = found["Retrieval: 4,096 tokens, books, m, last 2 query-block rows dense, passkey"]
    assert lines(table)[2] == ["gates: best", "", "0.62 ± 0.17"]
    assert lines(found["Pass keys by depth: 4,096 tokens, books, m"])[1:] == [
        ["dense", "", "", "0.75", "1.00"],
        ["gates: best", "0.1", "0", "0.25", "0.50"],
        ["gates: best", "0.1", "2", "0.50", "0.75"],
    ]


def test_variants_of_a_task_have_columns_of_their_own() -> None:
    rows = []
    for pairs, right in ((8, 5), (16, 2)):
        more = {"unit": "documents", "n": 10, "seed": 0, "cell": {"task": "key_value", "pairs": pairs}}
        rows.append(result("accuracy", "best", 0.1, right / 10, **more))
    found = tables(rows)
    cells = [lines(table)[1][1] for title, table in found.items() if "key-value (" in title]
    assert [cell.split()[0] for cell in cells] == ["0.20", "0.50"] and any("pairs 8" in title for title in found)


def test_recall_is_that_of_all_layers() -> None:
    (table,) = section(recalls(), "recall").parts
    assert lines(table.by_group()[0])[1:] == [["oracle", "0.800 ± 0.012"], ["gates: best", "0.700 ± 0.012"]]


def test_gates_measured_anew_replace_the_former_and_other_text_has_its_own_table() -> None:
    rows = perplexities()
    old = replace(rows[-2], weights={"gates": "old"}, value=99.0)
    other = [replace(r, cell=DATA | {"data": "xyz"}, value=50.0) for r in rows if r.kind == "dense"]
    tables_of = section([old, *rows, *other], "perplexity").parts
    assert len(tables_of) == 2
    assert "99.00" not in {cell.text for line in tables_of[0].lines for cell in line.cells if cell}


def test_a_policy_of_its_own_says_the_density_that_it_computed() -> None:
    calibrated = result("perplexity", "best", None, 31.25, realised_density=0.15)
    table = tables([*perplexities(), calibrated])[f"Perplexity: {PLACE}, 4,096 tokens"]
    assert lines(table)[0][-1] == "own policy" and lines(table)[3][-1] == "31.25 at 0.150"
    assert not any("cells are within" in note for note in table.notes)


def test_a_cell_that_is_off_its_column_says_so_and_is_neither_best_nor_in_the_head() -> None:
    off = {"best": 0.111, "oracle": 0.109, "streaming": 0.284}
    found = tables(realised(perplexities(), off))
    table = found[f"Perplexity: {PLACE}, 4,096 tokens"]
    assert lines(table)[0][-1] == "0.1 (0.109)" and "4 of 6 cells are within 0.01" in table.notes[0]
    assert lines(table)[3][-1] == "33.50 ± 0.250 at 0.111" and lines(table)[4][-1] == "34.25 ± 0.250 at 0.284"
    # Ends at .109 and .284 are none of one density.
    gap = f"Share of the gap that is closed: {PLACE}, 4,096 tokens"
    assert lines(found[gap]) == [["method", "0.2 (0.204)"], ["gates: best", "80%"]]
    found = tables(realised(perplexities(), off | {"streaming": 0.118}))
    assert lines(found[gap])[1] == ["gates: best", "80%", "60% at 0.111"]
    found = tables(realised(perplexities(), {"best": 0.09, "oracle": 0.119, "streaming": 0.119}))
    assert lines(found[gap])[1] == ["gates: best", "80%", "60% at 0.090 (ends at 0.119)"]


def best_of(rows: list[Result], id: str = "perplexity") -> set[str]:
    return {
        line.name for table in section(rows, id).parts for line in table.lines if any(c and c.best for c in line.cells)
    }


def test_the_best_of_a_column_is_among_those_of_its_density_without_dense_and_oracle() -> None:
    values = {"oracle": 20.0, "best": 22.0, "paper": 23.0, "moa": 20.5, "random": 24.0}
    rows = [result("perplexity", name, 0.1, value) for name, value in values.items()]
    rows = [replace(r, realised_density=0.2) if r.name == "moa" else r for r in rows]
    rows += [result("perplexity", "dense", None, 19.0), result("perplexity", "flexprefill", 0.1, None)]
    assert best_of(rows) == {"gates: best"}
    # Equal as shown is equal, and one alone is not the best of anything.
    assert best_of([*rows, result("perplexity", "group", 0.1, 22.001)]) == {"gates: best", "gates: group"}
    assert best_of(rows[:2]) == set() and best_of([replace(r, realised_density=0.119) for r in rows[1:3]]) == set()


def test_notes_of_cells_are_numbered_but_for_those_that_tell_of_a_missed_density() -> None:
    rows = [result("perplexity", "xattention", 0.1, 25.0, cell={"note": "measured twice"})]
    rows.append(result("perplexity", "moa", 0.1, 20.5, realised_density=0.2, cell={"note": "cannot be reached"}))
    (table,) = section(rows, "perplexity").parts
    assert [cell.note for line in table.lines for cell in line.cells] == [0, 1]
    assert list(table.notes) == ["[1] measured twice"]


def test_budgets_of_time_have_tables_of_their_own_with_shares_as_columns() -> None:
    rows = [result("perplexity", "dense", None, 20.0)]
    rows += [result("perplexity", name, 0.5, value) for name, value in (("best", 21.0), ("paper", 22.0))]
    for name, value, density in (("best", 23.0, 0.4), ("paper", 24.0, 0.25)):
        cell = {"budget": "time", "share": 0.5}
        rows.append(result("perplexity", name, None, value, realised_density=density, cell=cell))
    table = tables(rows)[f"Perplexity: {PLACE}, by share of the time of dense attention, 4,096 tokens"]
    # Densities differ where times are equal, and none of them is "too dense".
    assert lines(table)[1:] == [
        ["dense", "20.00", ""],
        ["gates: best", "", "23.00 at 0.400"],
        ["gates: paper", "", "24.00 at 0.250"],
    ]
    assert not any("cells are within" in note for note in table.notes)


def test_kinds_stand_in_their_order_under_their_titles() -> None:
    names = ("random", "xattention 128", "xattention 64", "b2", "b10", "oracle", "dense", "a_shape")
    (table,) = section([result("perplexity", n, None if n == "dense" else 0.1, 1.0) for n in names], "perplexity").parts
    expected = ["dense", "oracle", "gates: b2", "gates: b10", "XAttention 64", "XAttention 128", "A-shape", "random"]
    assert [line.name for line in table.lines] == expected
    assert [len(of_kind) for of_kind in table.kinds.values()] == [1, 1, 2, 2, 2]


def test_blocks_of_another_size_are_told() -> None:
    rows = [result("perplexity", "xattention", 0.1, 1.0, cell={"block_q": 128, "block_k": 128})]
    rows += perplexities()
    (table,) = section(rows, "perplexity").parts
    assert "128 x 128 of XAttention 128" in table.notes[0]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("minference paper", "MInference paper"),
        ("vertical_slash", "vertical-slash"),
        ("xattention 64 profile", "XAttention 64 profile"),
        ("best_one", "gates: best_one"),
        ("oracle sum:4", "oracle by power 4"),
        ("oracle sum:inf", "oracle by largest row"),
        ("oracle sum:1, budgets per head", "oracle by mass, budgets per head"),
    ],
)
def test_names_for_people(name: str, shown: str) -> None:
    assert name_of(result("perplexity", name, 0.1, 1.0)) == shown


def test_a_method_that_is_not_known_shows_its_id() -> None:
    row = replace(result("perplexity", "moa", 0.1, 1.0), method="from_elsewhere", name="from_elsewhere 8")
    assert name_of(row) == "from_elsewhere 8"
    assert set(KINDS) >= {"dense", "oracle"}


def test_times_are_told_by_batch_with_the_share_of_the_choice() -> None:
    rows = []
    for batch, ms in ((1, 8.0), (4, 3.0)):
        cell = {"batch": batch, "budget": "density"}
        samples = {"index": [ms / 4], "attention": [ms * 3 / 4]}
        rows.append(result("attention_ms", "best", 0.2, ms, n=3, unit="forwards", cell=cell, samples=samples))
    found = [lines(table.by_group()[0])[1][1] for table in section(rows, "time").parts]
    assert found == ["8.00 (25% choice)", "3.00 (25% choice)"]


def test_a_failure_is_listed_with_its_reason_until_the_cell_is_measured() -> None:
    done = result("perplexity", "moa", 0.1, 21.0)
    failed = replace(done, what="failure", value=None, cell=done.cell | {"task": "perplexity"})
    failed = replace(failed, samples={"error": ["OutOfMemoryError: no room"]})
    (table,) = section([failed, replace(failed, density=0.05), done], "failures").parts
    reason = "OutOfMemoryError: no room"
    assert lines(table)[1:] == [["MoA", "0.05", "4,096", "books", "0", "perplexity", reason]]


def test_a_benchmark_that_failed_is_not_hidden_by_another_share_of_targets() -> None:
    step = result("finetune_step_ms", "gates", 0.1, 800.0)
    done = replace(step, cell={"work": "fine-tuning step", "layers": 4, "target_share": 0.1})
    failed = replace(done, value=None, cell=done.cell | {"target_share": 1.0}, samples={"error": ["out of memory"]})
    (table,) = section([done, failed], "failures").parts
    assert [line[-1] for line in lines(table)[1:]] == ["out of memory"]
    assert not section([failed, replace(failed, value=900.0)], "failures").parts


def test_what_was_run_counts_results_and_names_software_and_commands() -> None:
    rows = [replace(r, versions={"torch": "2"}, command="a command", timestamp="2026-01-01") for r in perplexities()]
    measured, machines, commands = section(rows, "run").parts
    assert lines(measured)[1] == ["perplexity", "m", "books", "4,096", "7", "1,000 tokens"]
    assert lines(machines)[1] == ["not recorded", "float32", "torch 2", "not recorded", "2026-01-01", "13"]
    assert lines(commands) == [["command"], ["a command"]]


def test_head_densities_are_listed_with_their_extremes_where_heads_differ() -> None:
    even, uneven = [[0.1, 0.1], [0.1, 0.1]], [[0.05, 0.1], [0.125, 0.325]]
    rows = [result("perplexity", "best", 0.1, 21.0, samples={"head_density": even})]
    rows.append(result("perplexity", "minference", 0.1, 22.0, samples={"head_density": uneven}))
    # Shorter contexts are left out.
    rows.append(result("perplexity", "minference", 0.1, 22.0, context=1024, samples={"head_density": even}))
    (table,) = section(rows, "heads").parts
    extremes = ["0.050 (layer 0, head 0)", "0.150", "0.325 (layer 1, head 1)"]
    assert lines(table)[1:] == [["MInference", "0.1", *extremes]]
    assert list(table.notes) == ["Every head alike: gates: best."]
    ragged = by_head(result("perplexity", "best", 0.1, 1.0, samples={"head_density": [[0.1], [0.2, 0.3]]}))
    assert np.isnan(ragged[0, 1]) and ragged[1, 1] == 0.3


def guarded(dense: float, sparse: float, note: str | None) -> list[Result]:
    more = {"n": 50, "unit": "documents", "stderr": 0.05, "text": "niah_single_1"}
    cell = {"task": "niah_single_1", "metric": "4096", "documents": 50}
    row = result("task_score", "best", 0.2, sparse, cell=cell, **more)
    base = result("task_score", "dense", None, dense, cell=cell, **more)
    samples = {"score": [sparse], "dense": [dense], "p": [0.01], "test": ["paired sign flips"]}
    guard = replace(row, what="task_guard", value=sparse - dense, stderr=0.04, samples=samples)
    return [base, row, replace(guard, cell=guard.cell | ({"note": note} if note else {}))]


def test_tasks_have_guards_that_are_marked_where_they_are_significant() -> None:
    (table,) = section(guarded(0.75, 0.5, "significantly lower"), "tasks").parts
    line = ["niah_single_1", "4,096", "accuracy", "gates: best", "0.2", "0.204", "0", "0.750", "0.500"]
    assert lines(table)[1] == [*line, "-0.250 ± 0.040", "0.01", "50", "⚠ differs"]
    assert table.lines[0].warned and "1 of 1 lines" in table.notes[0]
    (table,) = section(guarded(0.75, 0.75, None), "tasks").parts
    assert lines(table)[1][-1] == "" and not table.lines[0].warned
    # Scores without a guard have a table of their own.
    (table,) = section(guarded(0.75, 0.5, None)[:2], "tasks").parts
    assert [line[-2:] for line in lines(table)[1:]] == [["0.750 ± 0.050", "50"], ["0.500 ± 0.050", "50"]]


def test_systems_by_tasks_tell_differences_from_dense_and_their_mean() -> None:
    def row(name: str, task: str, context: int, gap: float, stderr: float, note: bool = False, **more) -> Result:
        cell = {"task": task, "metric": more.pop("metric", "log_prob_per_token"), "documents": 50}
        samples = {"score": [gap - 2.0], "dense": [-2.0], "p": [0.5], "test": ["paired sign flips"]}
        cell |= {"note": "significantly lower"} if note else {}
        return result(
            "task_guard", name, 0.2, gap, stderr=stderr, n=50, context=context, text=task, cell=cell, samples=samples,
            **more,
        )  # fmt: skip

    rows = [
        row("best", "ruler_vt", 4096, -0.1, 0.03, realised_density=0.2),
        row("best", "niah_single_1", 8192, 0.3, 0.04, realised_density=0.19),
        row("streaming", "ruler_vt", 4096, -1.0, 0.25, note=True, realised_density=0.26),
        row("best", "ruler_vt", 4096, 0.5, 0.1, metric="4096"),
        row("random", "ruler_vt", 4096, -1.0, 0.3, realised_density=0.2),
        row("random", "niah_single_1", 8192, -2.0, 0.4, realised_density=0.24),
    ]
    found = [table for table in section(rows, "tasks").parts if "beside dense" in table.title]
    (table,) = found  # one task is no grid
    assert table.title == "Right answers beside dense: m, density 0.2"
    assert lines(table) == [
        ["method", "vt 4k (0.200)", "single 1 8k (0.190)", "mean"],
        ["dense", "-2.00", "-2.00", "-2.00"],
        ["gates: best", "-0.10 ± 0.03", "+0.30 ± 0.04", "+0.10 ± 0.03"],
        ["random", "-1.00 ± 0.30", "-2.00 ± 0.40 at 0.240", "-1.50 ± 0.25 at 0.220"],
        ["streaming", "-1.00* ± 0.25 at 0.260", "", ""],
    ]
    assert table.notes[1] == "50 documents a task and length."
