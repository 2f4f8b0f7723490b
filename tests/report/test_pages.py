"""Tables on the project's pages, each number against the records that it was taken from."""

import re
from statistics import median

import pytest
from drawn_pages import FIGURES, PAGES, RECORDS, records_of, redrawn, titles
from written_tables import ROOT, records, table, text_of

from seerattn.report.cost import answers_over, measured, over
from seerattn.report.finetuned import finetuned_tables
from seerattn.report.parts import Table
from seerattn.report.select import latest
from seerattn.report.summary import summary_tables
from seerattn.report.table import render_tables
from seerattn.results.record import Result

TEXTS = ("books-test", "proofs-test")
# Lines of the table beside other systems by what they begin with, longest first, and columns by their head.
ARMS = {
    "dense": "dense",
    "oracle": "oracle",
    "`fine` gates": "fine",
    "`salient` gates": "salient",
    "`best` gates": "best",
    "gates of the default form": "default",
    "`paper` gates": "paper",
    "MInference, search of the repository": "minference repository",
    "MInference, search of the paper": "minference paper",
    "mean-pooled": "pooled",
    "streaming": "streaming",
    "XAttention": "xattention 128",
    "MoA": "moa",
    "FlexPrefill": "flexprefill 128",
}
COLUMNS = {
    "density": "density",
    "perplexity, books": "perplexity, books-test",
    "proofs": "perplexity, proofs-test",
    "pass keys": "passkey",
    "key-value": "key-value",
    "32 keys": "multi-key",
}


def numbers(text: str) -> set[float]:
    return {float(number) for number in re.findall(r"\d+\.?\d*", text)}


def test_every_number_of_the_table_beside_other_systems_is_drawn(compared: list[Result]) -> None:
    results = [*compared, *latest(records("reference-default"))]
    tables: dict[str, Table] = {table.title: table for table in summary_tables(results)}
    summary = tables["Summary: density 0.1, 8192 tokens, reference-model"]
    drawn = {line[0]: dict(zip(summary.head, line)) for line in summary.body}
    head, *lines = table("docs/results.md", "| reference model, 8k tokens")
    found = []
    for label, *cells in lines:
        found.append(next(arm for start, arm in ARMS.items() if label.startswith(start)))
        for name, cell in zip(head[1:], cells, strict=True):
            shown = drawn[found[-1]][COLUMNS[name]]
            assert numbers(cell) and numbers(cell) <= numbers(shown), (label, name, cell, shown)
    assert len(found) >= 10 and len(set(found)) == len(found)


@pytest.mark.parametrize("page", PAGES)
def test_tables_between_comments_are_those_that_are_drawn(page: str) -> None:
    """Where this fails `python tests/report/drawn_pages.py` mends it."""
    assert text_of(page) == redrawn(text_of(page))
    # A comment that is misspelt draws nothing.
    assert text_of(page).count("<!-- drawn from") == len(titles(text_of(page))) > 0


def test_a_table_that_was_changed_by_hand_is_found_and_drawn_again() -> None:
    page = text_of("README.md")
    assert redrawn(page.replace("| streaming |", "| streaming, retyped |", 1)) == page


def test_every_page_shows_figures_that_are_there_and_drawn_ones_have_records() -> None:
    for page in PAGES:
        for figure in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text_of(page)):
            assert (ROOT / page).parent.joinpath(figure).is_file(), (page, figure)
    assert all(records_of(names).parent == RECORDS for _, names in FIGURES.values())


def test_numbers_of_the_page_on_targets_are_those_of_the_records() -> None:
    (one,) = measured(latest(records("smollm2-targets")))
    perplexity, answers = ({(c.name, c.density): c for c in columns} for columns in (one.perplexity, one.answers))

    def loss(arm: str, text: str = "books", density: float = 0.1) -> str:
        column = perplexity[f"{text}-test", density]
        return f"{over(column.rows[arm][0], column.dense[0]).value:.1f}"

    def nats(arm: str) -> tuple[float, float]:
        column = answers["passkey 4k", 0.1]
        return answers_over(column.rows[arm], column.dense)

    published, two, four = "oracle", "oracle sum:2", "oracle sum:4"
    page = " ".join(text_of("docs/targets.md").split())
    gates = [loss(arm, "proofs") for arm in ("power-2", "power-4", "largest")]
    told = [f"{value:+.1f} ± {error:.1f}" for value, error in (nats(two), nats(four))]
    for sentence in (
        f"loses {loss(published)} % on books at .1 where that by power 2 loses {loss(two)} %, and "
        f"{loss(published, density=0.2)} % against {loss(two, density=0.2)} % at .2",
        f"({loss('streaming', density=0.05)} against {loss(published, density=0.05)} %)",
        f"less probable by {-nats('oracle sum:1')[0]:.1f} nats",
        f"({told[0]} and {told[1]})",
        f"power 2 loses {loss(two)} % and power 4 {loss(four)} %, on proofs {loss(two, 'proofs')} and "
        f"{loss(four, 'proofs')} %",
        f"{loss('power-2')} % at .1 by power 2 and {loss('power-4')} % by power 4, against {loss('largest')} % by the",
        f"({gates[0]}, {gates[1]} and {gates[2]} %)",
        f"lose {-nats('largest')[0]:.1f} nats of a pass key at 4k tokens and .1, those of power 2 "
        f"{-nats('power-2')[0]:.1f} and of power 4 {-nats('power-4')[0]:.1f}",
    ):
        assert sentence in page, sentence


def test_tables_of_the_comparison_page_are_those_that_are_drawn(compared: list[Result]) -> None:
    tables = render_tables(compared)
    recall, gates = (render_tables(latest(records(f"compare-{name}"))) for name in ("recall", "gates"))
    page = text_of("docs/comparison.md")
    drawn = f"{tables}\n{recall}\n# Policies, poolings and RoPE\n\n{gates}".replace("### ", "## ")
    assert page[page.index("## Summary") :] == drawn


def test_tables_of_the_results_page_are_those_that_are_drawn() -> None:
    page = text_of("docs/results.md")
    drawn = render_tables(latest(records("reference-perplexity", "reference-retrieval", "reference-recall")))
    assert page[page.index("## Tables") :] == f"## Tables\n\n{drawn}"


def test_counts_of_cells_on_the_comparison_page_are_those_of_the_records(compared: list[Result]) -> None:
    cells: dict[tuple, list[Result]] = {}
    for r in compared:
        if r.what in ("perplexity", "accuracy") and r.policy is not None and not r.policy["last_rows_dense"]:
            cells.setdefault((r.what, r.context, r.text, r.cell.get("task"), r.arm, r.density), []).append(r)
    counts: dict[tuple, list[bool]] = {}
    for (what, context, *_, density), rows in cells.items():
        off = abs(sum(r.realised_density for r in rows) / len(rows) - density)
        counts.setdefault((what, context), []).append(off <= 0.01 + 1e-9)
    page = " ".join(text_of("docs/comparison.md").split())
    found = {place: f"{sum(near)} of {len(near)}" for place, near in counts.items()}
    ours = [found["perplexity", context] for context in (8192, 4096, 2048)]
    text = "{} came within .01 of what was asked for at 8192 tokens, {} at 4096 and {} at 2048".format(*ours)
    assert text in page and f"of retrieval, all at 8192 tokens, {found['accuracy', 8192]}" in page


def short(number: str) -> str:
    """A number as the pages write it: no zero before the point."""
    return re.sub(r"(?<!\d)0\.", ".", number)


def yarn() -> dict[tuple[str, str, str, int], str]:
    """Cells of the drawn tables by way of training, sparsity, text and context."""
    found = {}
    for drawn in finetuned_tables(records("yarn")):
        place = re.match(r"Fine-tuned: perplexity, (\S+), (\d+) tokens", drawn.title)
        if place:
            for name, *cells in drawn.body:
                for sparsity, cell in zip(drawn.head[1:], cells):
                    found[name, short(sparsity.split()[0]), place[1], int(place[2])] = short(cell)
    return found


def test_perplexities_of_the_fine_tuning_page_are_those_of_the_records() -> None:
    drawn = yarn()
    names = {
        "YaRN, not trained": "not trained",
        "trained with dense attention": "dense",
        "gates distilled afterwards": "gates afterwards",
        "trained together, a run for each": "trained together",
        "trained together once, sparsity rising to .9": "trained together, annealed",
    }
    places = [(text, context) for text in TEXTS for context in (8192, 16384, 32768)]
    head, *lines = table("docs/finetuning.md", "| | sparsity | books, 8k")
    assert len(head) == 2 + len(places) and len(lines) == 18
    name = ""
    for label, sparsity, *cells in lines:
        if label == "the same, run dense":
            way, at = f"{name}, run dense", ".9"
        else:
            way = name = names.get(label, name)
            at = sparsity
        for place, cell in zip(places, cells, strict=True):
            value = drawn[(way, at, *place)]
            inside = re.search(r"\((.*) %\)", value)
            assert cell == (inside[1] if inside and way != "not trained" else value.split()[0]), (way, at, place)


def test_partial_targets_of_the_fine_tuning_page_are_those_of_the_records() -> None:
    drawn = next(t for t in finetuned_tables(records("yarn")) if "targets of some rows" in t.title)
    _, whole, tenth, every = table("docs/finetuning.md", "| targets | books, 8k")
    for written, line in zip((whole, tenth, every), drawn.body, strict=True):
        for cell, value in zip(written[1:], line[1:], strict=True):
            inside = re.search(r"\((.*)\)", value)
            assert cell == short(inside[1]) if inside else value.startswith(cell) or f"{float(value):.2f}" == cell


def test_longer_contexts_in_short_are_those_of_the_records() -> None:
    drawn = yarn()
    ways = {
        "trained with dense attention": ("dense", "0"),
        "gates distilled for it": ("gates afterwards", ".9"),
        "weights and gates trained together": ("trained together", ".9"),
        "the same, once": ("trained together, annealed", ".9"),
    }
    _, *lines = table("docs/finetuning.md", "| reference model at 32k tokens")
    assert len(lines) == len(ways)
    for label, sparsity, *cells in lines:
        way, at = next(found for start, found in ways.items() if label.startswith(start))
        assert sparsity == at
        for text, cell in zip(TEXTS, cells, strict=True):
            value = drawn[way, at, text, 32768]
            assert cell == re.sub(r" ± [\d.]+", "", value), (label, text)


def test_comparison_at_32k_tokens_is_that_of_the_records() -> None:
    names = {
        "gates, top-k": "top-k",
        "gates, top-p": "top-p",
        "gates, one threshold": "one threshold",
        "vertical-slash": "vertical_slash",
        "MInference, search of the repository": "minference repository",
        "MInference, search of the paper": "minference paper",
        "mean-pooled q.k": "pooled",
        "A-shape": "a_shape",
        "tri-shape": "tri_shape",
        "XAttention, stride 8, blocks of 64": "xattention 64",
        "XAttention, stride 16, blocks of 128": "xattention",
        "FlexPrefill, blocks of 64": "flexprefill 64",
        "FlexPrefill, blocks of 128": "flexprefill",
    }
    rows = [r for r in records("compare-long", "compare-long-time") if r.cell.get("budget") != "time"]
    # Dense attention was timed in two processes, first in that of the others.
    found = {(r.what, r.gates or r.selector, r.density, r.cell.get("batch")): r for r in reversed(rows)}
    _, *lines = table("docs/comparison.md", "| selector | perplexity, .2")
    assert len(lines) == 17
    for label, *cells in lines:
        arm = names.get(label, label)
        asked = (None, None, None) if arm == "dense" else (0.2, 0.1, 0.05)
        for density, cell in zip(asked, cells[:3], strict=True):
            if cell:
                value = f"{found['perplexity', arm, density, None].value:.2f}"
                error = found.get(("perplexity_difference", arm, density, None))
                assert cell == (value if error is None else short(f"{value} ± {error.stderr:.2f}")), (arm, density)
        four, one = (found["attention_ms", arm, asked[1], batch] for batch in (4, 1))
        alone = median(four.samples["attention"])
        assert cells[3:] == [f"{ms:.2f}" for ms in (four.value, alone, one.value)], arm


def test_fine_tuning_steps_of_the_speed_page_are_those_of_the_records() -> None:
    """In brackets stands how many times as fast as FlashAttention-2 a line is, then as cuDNN."""
    shapes = {"Llama-3.2-3B": "24/8 heads of 128", "Llama-3.2-1B": "32/8 heads of 64"}
    shapes["Llama-3.1-8B"] = "32/8 heads of 128"
    found: dict[tuple, float] = {}
    for r in records("h200-finetune"):
        found[r.what, r.model, r.cell["impl"], r.density, r.cell.get("target_share")] = r.value
    _, *lines = table("docs/speed.md", "| | sparsity | layer, ms | step, ms")
    assert len(lines) == 14
    shape, share = "", 0.1
    for label, sparsity, *cells in lines:
        shape = next((name for name in shapes if label.startswith(name)), shape)
        share = 1.0 if "all query blocks" in label else 0.1 if "10 %" in label else share
        dense = "flash" if "FlashAttention" in label else "cudnn" if "cuDNN" in label else None
        way = (dense, None, None) if dense else ("gluon", round(1 - float(sparsity), 6), share)
        for what, model, cell, digits in (
            ("finetune_layer_ms", shapes[shape], cells[0], 1),
            ("finetune_step_ms", f"{shape} shape", cells[1], 2),
        ):
            ms = found[(what, model, *way)]
            slower = {"flash": (), "cudnn": ("flash",), "gluon": ("flash", "cudnn")}[way[0]]
            digits = 2 if way[0] == "cudnn" else digits
            times = ", ".join(f"{found[what, model, other, None, None] / ms:.{digits}f}x" for other in slower)
            written = f"{ms:,.0f}" if ms >= 100 else f"{ms:#.3g}"
            assert cell == (f"{written} ({times})" if times else written), (label, cell)
        assert cells[2] == f"{found[('tokens_per_second', f'{shape} shape', *way)]:,.0f}"
