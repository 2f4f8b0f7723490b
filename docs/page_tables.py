"""The tables of the pages: which records each is drawn from, and what of them. `docs/draw_pages.py` puts them there."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

from seerattn.report.benchmarks import tokens
from seerattn.report.names import name_of
from seerattn.report.parts import Cell, Table, plain
from seerattn.report.select import asked, budget, by_line, group, latest, paired, perplexity_key
from seerattn.report.tables import sections
from seerattn.results import statistics
from seerattn.results.file import read_results
from seerattn.results.record import Result
from seerattn.texts import parse_json, read_decompressed

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "research" / "records"
sys.path.insert(0, str(ROOT / "research"))

REFERENCE = ("reference-perplexity", "reference-retrieval", "reference-recall")
COMPARED = ("compare-perplexity", "compare-retrieval")
GAP = "Share of the gap that is closed: .*no dense last rows"


@dataclass(frozen=True)
class Drawn:
    """What stands between two comments of a page.

    Attributes:
        records: files of research/records that it is drawn from.
        make: the tables of their results. Several stand under their titles, one without.
        raw: files of records of another form, which `make` gets as its second argument.
    """

    records: Sequence[str]
    make: Callable[..., list[Table]]
    raw: Sequence[str] = field(default=())

    def tables(self) -> list[Table]:
        """The tables, each without groups of columns."""
        raw = [[parse_json(line) for line in read_decompressed(path(name)).splitlines()] for name in self.raw]
        found = self.make(read_results([path(name) for name in self.records]), *raw)
        return [part for table in found for part in table.by_group()]


def path(name: str) -> Path:
    """A file of records; block maps are named with their ending."""
    return RECORDS / (name if name.endswith(".npz") else f"{name}.jsonl.xz")


def report(
    *titles: str, lines: Mapping[str, str] | None = None, columns: Mapping[str, str] | None = None, kind: str = ""
) -> Callable[[list[Result]], list[Table]]:
    """Tables of ``seerattn report``.

    Args:
        titles: patterns that a title begins with.
        lines: the lines that are shown, in this order, and what they are called here.
        columns: the columns that are shown, and what they are called here.
        kind: the kind of the lines that are shown.
    """

    def make(results: list[Result]) -> list[Table]:
        parts = [table for of in sections(latest(results)) for part in of.parts for table in part.by_group()]
        return [picked(table, lines, columns, kind) for table in parts if any(re.match(t, table.title) for t in titles)]

    return make


def picked(
    table: Table, lines: Mapping[str, str] | None = None, columns: Mapping[str, str] | None = None, kind: str = ""
) -> Table:
    """Lines and columns of a table, as `report` says."""
    shown = [line for line in table.lines if not kind or line.kind.startswith(kind)]
    if lines:
        found = {line.name: line for line in shown}
        shown = [replace(found[name], name=label) for name, label in lines.items()]
    names = [column.name for column in table.columns]
    places = [names.index(name) for name in columns or names]
    heads = [replace(table.columns[i], name=(columns or {}).get(names[i], names[i])) for i in places]
    return replace(table, columns=heads, lines=[replace(line, cells=[line.cells[i] for i in places]) for line in shown])


def gap_in_short(results: list[Result]) -> list[Table]:
    """Shares of the gap that gates close at 8k tokens, for both texts side by side."""
    names = {"gates: best": "best", "gates: salient": "salient", "gates: fine": "fine", "gates: paper": "paper"}
    heads, cells = [], {name: [] for name in names.values()}
    for table in report(f"{GAP}, 8,192 tokens", lines=names, columns={"0.1": "0.1", "0.2": "0.2"})(results):
        text = re.search(r"(\w+)-test", table.title)[1]
        heads += [f"{text}, {column.name}" for column in table.columns]
        for line in table.lines:
            cells[line.name] += line.cells
    return [plain("", ["gates", *heads], [[name, *of] for name, of in cells.items()])]


def long_context(results: list[Result]) -> list[Table]:
    """Perplexity at three densities beside times at one, in batches of 4 and of 1."""
    errors = paired(results)
    body = []
    for rows in by_line(r for r in results if budget(r) == "density").values():
        losses = {r.density: r for r in rows if r.what == "perplexity"}
        # Dense attention was timed in two processes, first in that of the others.
        times = {r.cell["batch"]: r for r in reversed(rows) if r.what == "attention_ms" and asked(r) in (None, 0.1)}
        cells = []
        for density in (0.2, 0.1, 0.05):
            row = losses.get(density) or (losses.get(None) if density == 0.2 else None)
            error = row and errors.get(perplexity_key(row))
            cells.append(Cell(f"{row.value:.2f}", f"{error:.2f}" if error else "") if row else Cell(""))
        alone = median(times[4].sampled("attention"))
        clocks = [f"{ms:.2f}" for ms in (times[4].value, alone, times[1].value)]
        body.append([name_of(rows[0]), *cells, *clocks])
    body[1:] = sorted(body[1:], key=lambda line: float(line[2].text))
    heads = ["perplexity, 0.2", "0.1", "0.05", "ms at 0.1, batch 4", "attention alone", "batch 1"]
    return [plain("", ["method", *heads], body)]


def speed_in_short(results: list[Result]) -> list[Table]:
    """Some lines of the tables of speed, at three lengths."""
    shown = {
        ("Attention alone", "FlashAttention-2", ""): "dense: FlashAttention-2",
        ("Attention alone", "cuDNN", ""): "dense: cuDNN",
        ("Attention alone", "gluon, random blocks, 64x64 per head", "0.9"): "sparse, 64 x 64, a list a head",
        ("Attention alone", "gluon, random blocks, 64x64 per group", "0.9"): "sparse, 64 x 64, a list a KV group",
        ("Gate and selection", "gates paper, triton, 64x64 per head", "0.9"): "gate: published form, a list a head",
        (
            "Gate and selection",
            "gates paper-group, triton, 64x64 per group",
            "0.9",
        ): "gate: the same, a list a KV group",
        ("Gate and selection", "gates default, triton, 64x64 per head", "0.9"): "gate: 8 x 8 sub-blocks, a list a head",
        ("Time to first", "FlashAttention-2, 32 layers", ""): "first token of 32 layers, s: FlashAttention-2",
        ("Time to first", "cuDNN, 32 layers", ""): "first token of 32 layers, s: cuDNN",
        ("Time to first", "gates paper, gluon, 64x64 per head, 32 layers", "0.9"): (
            "first token of 32 layers, s: gates of the published form, a list a head"
        ),
    }
    found = {}
    for table in report("Attention alone", "Gate and selection", "Time to first")(results):
        heads = [column.name for column in table.columns]
        for line in table.lines:
            cells = dict(zip(heads, line.cells))
            found[line.name, cells["sparsity"].text] = [
                replace(cells[length], more="") for length in ("8k", "32k", "128k")
            ]
    return [plain("", ["", "8k", "32k", "128k"], [[label, *found[place[1:]]] for place, label in shown.items()])]


def backward(_: list[Result], rows: list[dict]) -> list[Table]:
    """Forward and backward of attention together, beside both dense ones."""
    both = {(r["lists"], r["sparsity"]): r["ms"] for r in rows if r["part"].startswith("both")}
    dense = {"FlashAttention-2": both.pop(("dense flash", 0.0)), "cuDNN": both.pop(("dense cudnn", 0.0))}
    lines = [(name, "", ms) for name, ms in dense.items()]
    for (lists, sparsity), ms in sorted(
        both.items(), key=lambda item: (item[0][0][-2:] == "28", item[0][0][:1] == "g")
    ):
        share, blocks = lists.split()
        lines.append((f"random blocks, {blocks} per {share}", f"{sparsity:g}", ms))
    body = [
        [name, sparsity, f"{ms:.2f}", *(f"{other / ms:.2f}x" for other in dense.values())]
        for name, sparsity, ms in lines
    ]
    return [plain("", ["", "sparsity", "ms", *(f"over {name}" for name in dense)], body)]


# Shapes of a whole model and of its attention, by the name of the model.
SHAPES = {
    "Llama-3.2-3B": "24/8 heads of 128",
    "Llama-3.2-1B": "32/8 heads of 64",
    "Llama-3.1-8B": "32/8 heads of 128",
}


def finetuning_steps(results: list[Result]) -> list[Table]:
    """A layer's attention with all that fine-tuning adds, and steps of whole models, beside both dense ones."""
    body = []
    for name, shape in SHAPES.items():
        steps = [r for r in results if r.model == f"{name} shape" and r.what == "finetune_step_ms"]
        steps.sort(key=lambda r: (r.kind != "dense", r.cell["impl"] != "flash", -(1 - (r.density or 1)), _target(r)))
        layers = {_way(r): r for r in results if r.model == shape and r.what == "finetune_layer_ms"}
        second = {_way(r): r for r in results if r.model == f"{name} shape" and r.what == "tokens_per_second"}
        dense: list[tuple[float, float]] = []
        for r in steps:
            layer = layers[_way(r)]
            of_layer = _times(layer.value, [times[0] for times in dense])
            of_step = _times(r.value, [times[1] for times in dense])
            way = f"gates, targets of {_target(r):.0%} of the query blocks"
            if r.kind == "dense":
                dense.append((layer.value, r.value))
                way = {"flash": "FlashAttention-2", "cudnn": "cuDNN"}[r.cell["impl"]]
            sparsity = "" if r.density is None else f"{1 - r.density:g}"
            model = f"{name} shape, {r.cell['layers']} layers"
            body.append([model, way, sparsity, of_layer, of_step, f"{second[_way(r)].value:,.0f}"])
    heads = ["model", "attention", "sparsity", "layer, ms", "step, ms", "tokens a second"]
    return [plain("", heads, body, texts=2)]


def _way(r: Result) -> tuple:
    return r.cell["impl"], r.density, _target(r)


def _target(r: Result) -> float:
    return r.cell.get("target_share", 0.0)


def _times(ms: float, dense: Sequence[float]) -> Cell:
    faster = ", ".join(f"{other / ms:.2f}x" for other in dense)
    return Cell(f"{ms:,.0f}" if ms >= 100 else f"{ms:#.3g}", more=faster)


WAYS = {
    "not trained": "YaRN, not trained",
    "dense": "trained with dense attention",
    "gates afterwards": "gates distilled afterwards",
    "trained together": "trained together, a run for each",
    "trained together, annealed": "trained together once, sparsity rising to 0.9",
    "trained together, annealed, run dense": "the same, run dense",
}
TEXTS = {"books-test": "books", "proofs-test": "proofs"}


def decoding(results: list[Result]) -> list[Table]:
    """Attention of one token, at the densities and pages that people decode with."""

    def shown(r: Result) -> bool:
        listed = r.density in (0.05, 0.1) and r.cell.get("page") in (0, 64)
        return r.what == "decode_attention_ms" and (listed or r.kind == "dense")

    return report("Attention of one token")([r for r in results if shown(r)])


def decoded_pass_keys(results: list[Result]) -> list[Table]:
    """Shares of pass keys that are found, by context and tokens read, side by side; dense ones read all."""
    heads, cells = [], {}
    for table in report("Retrieval: .*, passkey")(results):
        context = table.title.split()[1]
        places = [i for i, column in enumerate(table.columns) if column.name in ("512", "256")]
        heads += [f"{context}, {table.columns[i].name}" for i in places]
        for line in table.lines:
            shown = [line.cells[0]] * len(places) if line.name == "dense" else [line.cells[i] for i in places]
            cells.setdefault(line.name, []).extend(replace(cell, more="") for cell in shown)
    return [plain("", ["tokens of the prompt, and read", *heads], [[name, *of] for name, of in cells.items()])]


def tasks_in_short(results: list[Result]) -> list[Table]:
    """Means over all tasks and lengths at each density, of the systems that have done all of them; dense by itself."""
    densities, cells = [], {}
    for table in report("Right answers beside dense")(results):
        densities.append(table.title.split()[-1])
        for line in table.lines:
            if line.cells[-1] is not None:
                cells.setdefault(line.name, {})[densities[-1]] = line.cells[-1]
    body = [[name, *(of.get(density, Cell("")) for density in densities)] for name, of in cells.items()]
    return [plain("", ["mean of all tasks", *densities], body)]


def tasks_of(make: Callable[[list[Result]], list[Table]], *contexts: int) -> Callable[[list[Result]], list[Table]]:
    """Tables of tasks whose documents have one of these lengths, tokens."""
    return lambda results: make([r for r in results if r.context in contexts])


def choosing_for_tokens(results: list[Result]) -> list[Table]:
    """Choice of the blocks of one token, by the kernel alone."""
    shown = [r for r in results if r.what == "decode_select_ms" and r.cell["impl"] == "triton"]
    return report("Choice of the blocks of one token")(shown)


def in_pages(results: list[Result]) -> list[Table]:
    """Prompts whose keys lie in pages, beside the kernels that have them in one piece."""
    return report("Attention alone")([r for r in results if r.what == "attention_ms"])


def of_model(name: str, make: Callable[[list[Result]], list[Table]]) -> Callable[[list[Result]], list[Table]]:
    """Tables of one model among several."""
    return lambda results: make([r for r in results if r.model == name])


def finetuned(results: list[Result]) -> list[Table]:
    """The table of fine-tuned models with both texts side by side, and differences alone where there are some."""
    (table,) = [t for of in sections(latest(results)) for t in of.parts if t.title.startswith("Fine-tuned: perplexity")]
    heads = ["", "sparsity"]
    heads += [f"{TEXTS[c.group]}, {tokens(int(c.name.split()[0].replace(',', '')))}" for c in table.columns[1:]]
    body = []
    for line in table.lines:
        sparsity, *cells = line.cells
        if line.name in WAYS:
            compared = line.name not in ("not trained", "dense")
            shown = [Cell(cell.more.removesuffix(" %") if compared else cell.text) for cell in cells]
            body.append([WAYS[line.name], sparsity.text.split()[0].strip(","), *shown])
    return [plain("", heads, body)]


def finetuned_in_short(results: list[Result]) -> list[Table]:
    """Perplexities at the longest context, of models at the highest sparsity."""
    (table,) = [t for of in sections(latest(results)) for t in of.parts if t.title.startswith("Fine-tuned: perplexity")]
    places = [i for i, column in enumerate(table.columns) if column.name == "32,768 tokens"]
    body = []
    for line in table.lines:
        sparsity = line.cells[0].text.split()[0]
        if line.name in WAYS and (line.name, sparsity) != ("not trained", "0") and sparsity in ("0", "0.9"):
            cells = [line.cells[i] for i in places]
            body.append(
                [WAYS[line.name], sparsity, *(replace(c, more=re.sub(r" ± [\d.]+", "", c.more)) for c in cells)]
            )
    return [plain("", ["", "run at sparsity", "perplexity, books", "proofs"], body)]


def curves(_: list[Result], records: list[dict]) -> list[Table]:
    """How the losses of training ended."""
    runs = group(records, lambda r: r["arm"])
    dense = {r["step"]: r["loss"] for r in runs["dense"]}
    last = max(dense) - 50
    body = []
    for name, of in runs.items():
        differences = [r["loss"] - dense[r["step"]] for r in of if r["step"] > last and r.get("loss") is not None]
        ended = of[-1].get("gate_loss")
        if ended is not None:
            found = statistics.mean(differences) if differences else None
            text = f"{found.value:+.4f} ± {found.stderr:.4f}" if found else ""
            body.append([name, f"{of[-1]['sparsity']:.3f}" if found else "", text, f"{ended:.4f}"])
    heads = [
        "run",
        "sparsity at the end",
        "loss minus that of dense training, last 50 steps",
        "loss of the gates at the end",
    ]
    return [plain("", heads, body)]


def ablation(results: list[Result], variants: list[dict]) -> list[Table]:
    """Forms of gates by study."""
    from ablation_table import tables

    return tables(results, {variant["name"]: variant for variant in variants})


def forms(table: str) -> Callable[[list[Result]], list[Table]]:
    """Forms of gates of a public model."""

    def make(results: list[Result]) -> list[Table]:
        from forms_table import TABLES

        return [TABLES[table](results)]

    return make


TABLES = {
    "smollm2-in-short": Drawn(["smollm2-gates"], report("In short")),
    "smollm2-perplexity": Drawn(["smollm2-gates"], report("Perplexity over dense")),
    "smollm2-answers": Drawn(["smollm2-gates"], report("Answers beside dense")),
    "smollm2-budgets": Drawn(["smollm2-gates"], report("Budgets per head")),
    "smollm2-methods": Drawn(["smollm2-methods"], report("Perplexity: books-test", "Perplexity: proofs-test")),
    "gemma3-methods": Drawn(["gemma3-methods"], report("Perplexity: books-test")),
    "smollm2-tasks-likely": Drawn(["smollm2-tasks"], report("Right answers beside dense")),
    "smollm2-tasks-in-short": Drawn(["smollm2-tasks"], tasks_in_short),
    "smollm2-tasks-first": Drawn(["smollm2-tasks"], report("First choices beside dense")),
    "gemma3-tasks-in-short": Drawn(["gemma3-tasks"], tasks_of(tasks_in_short, 4096, 8192)),
    "gemma3-tasks-likely": Drawn(["gemma3-tasks"], tasks_of(report("Right answers beside dense"), 4096, 8192)),
    "gemma3-tasks-first": Drawn(["gemma3-tasks"], tasks_of(report("First choices beside dense"), 4096, 8192)),
    "gemma3-tasks-32k": Drawn(["gemma3-tasks"], tasks_of(report("Right answers beside dense"), 32768)),
    "time-smollm2": Drawn(["h200-time-smollm2"], report("Milliseconds of attention")),
    "time-gemma3": Drawn(["h200-time-gemma3"], report("Milliseconds of attention")),
    "time-llama": Drawn(["h200-time-llama"], report("Milliseconds of attention")),
    "targets-perplexity": Drawn(["smollm2-targets"], report("Perplexity over dense")),
    "targets-answers": Drawn(["smollm2-targets"], report("Answers beside dense")),
    "gemma3-perplexity": Drawn(["gemma3-gates"], report("Perplexity over dense")),
    "gemma3-answers": Drawn(["gemma3-gates"], report("Answers beside dense")),
    "reference": Drawn(REFERENCE, report("Summary", "Perplexity", GAP, "Retrieval", "Pass keys", "Recall")),
    "methods-in-short": Drawn(
        [*COMPARED, "reference-default"],
        report(
            "Summary: density 0.1",
            lines={
                "dense": "dense",
                "oracle": "oracle: the best blocks of the true map",
                "gates: fine": "gates: fine, 16 x 16 sub-blocks",
                "gates: salient": "gates: salient, 8 x 8, pooled by learned salience",
                "gates: best": "gates: best, 8 x 8 sub-blocks of plain poolings",
                "gates: default": "gates: default form, 4 x 8, salience, power 4",
                "gates: paper": "gates: paper, the published form",
                "MInference repository": "MInference, search of the repository",
                "MInference paper": "MInference, search of the paper",
                "mean-pooled q.k": "mean-pooled q.k",
                "streaming": "streaming: first and last blocks",
                "XAttention 128": "XAttention, stride 16",
                "MoA": "MoA",
                "FlexPrefill 128": "FlexPrefill",
            },
            columns={
                "density": "density",
                "perplexity, books-test": "perplexity, books",
                "perplexity, proofs-test": "perplexity, proofs",
                "passkey": "pass keys",
                "key-value": "key-value",
                "multi-key": "32 keys",
            },
        ),
    ),
    "gap-in-short": Drawn(COMPARED, gap_in_short),
    "long-context": Drawn(["compare-long", "compare-long-time"], long_context),
    "methods-summary": Drawn(COMPARED, report("Summary")),
    "methods-perplexity": Drawn(COMPARED, report("Perplexity: .*no dense last rows")),
    "methods-gap": Drawn(COMPARED, report(GAP, kind="Learned")),
    "decode-retrieval": Drawn(["reference-decode"], report("Retrieval")),
    "decode-smollm2": Drawn(["smollm2-decode"], report("Retrieval", "Likelihood of answers")),
    "decode-smollm2-outputs": Drawn(["smollm2-decode"], report("Long outputs")),
    "decode-gemma3": Drawn(["gemma3-decode"], report("Retrieval", "Likelihood of answers")),
    "decode-gemma3-in-short": Drawn(["gemma3-decode"], decoded_pass_keys),
    "decode-continuation": Drawn(["reference-continuation"], report("Long outputs")),
    "methods-retrieval": Drawn(COMPARED, report("Retrieval", "Pass keys")),
    "methods-recall": Drawn(["compare-recall"], report("Recall")),
    "policies": Drawn(["compare-gates"], report("Perplexity: ", GAP)),
    "speed-in-short": Drawn(["h100-attention", "h100-ttft"], speed_in_short),
    "attention": Drawn(["h100-attention", "h100-flash4"], report("Attention alone")),
    "gate": Drawn(["h100-attention"], report("Gate and selection")),
    "gate-h200": Drawn(["h200-gate"], report("Gate and selection")),
    "first-token": Drawn(["h100-ttft", "h100-auto"], report("Time to first token")),
    "first-token-h200": Drawn(["h200-ttft"], report("Time to first token")),
    "decoding": Drawn(["h200-decode"], decoding),
    "decoded-tokens": Drawn(["h200-decode-model"], report("Decoded tokens of whole models")),
    "choosing-for-tokens": Drawn(["h200-decode"], choosing_for_tokens),
    "pages": Drawn(["h200-decode"], in_pages),
    "serving": Drawn(["h200-serve"], report("Serving")),
    "memory": Drawn(["h100-ttft", "h100-auto", "h100-distill"], report("Peak memory")),
    "attention-map": Drawn(["h100-pooled"], report("Attention with the map of blocks, ms")),
    "distillation": Drawn(["h100-distill"], report("Tokens a second")),
    "backward": Drawn([], backward, raw=["backward-launches"]),
    "finetuning-steps": Drawn(["h200-finetune"], finetuning_steps),
    "finetuned": Drawn(["yarn"], finetuned),
    "finetuned-public-in-short": Drawn(["yarn-smollm2"], of_model("smollm2", finetuned_in_short)),
    "finetuned-public": Drawn(["yarn-smollm2"], of_model("smollm2", finetuned)),
    "finetuned-public-again": Drawn(["yarn-smollm2"], of_model("smollm2, seed 1", finetuned)),
    "finetuned-public-passkeys": Drawn(["yarn-smollm2"], of_model("smollm2", report("Fine-tuned: retrieval"))),
    "finetuned-targets": Drawn(["yarn"], report("Fine-tuned: targets")),
    "curves": Drawn([], curves, raw=["yarn-curves"]),
    "ablation": Drawn(["gate-ablation"], ablation, raw=["gate-variants"]),
    # Of a form in both the later record counts.
    "forms": Drawn(["smollm2-targets", "smollm2-gates"], forms("targets")),
    "smollm2-rope": Drawn(["smollm2-ablation"], forms("rope")),
    "smollm2-poolings": Drawn(["smollm2-ablation"], forms("poolings")),
}
# A figure of a page, the file of a report that it is, and the records that the report is made of.
FIGURES = {
    "smollm2.png": ("teachers.png", ["smollm2-gates"]),
    "targets.png": ("teachers.png", ["smollm2-targets"]),
    "smollm2_maps.png": ("choices.png", ["smollm2-maps.npz"]),
    "summary.png": ("summary.png", COMPARED),
    "perplexity.png": ("perplexity.png", COMPARED),
    "head_density.png": ("head_density.png", COMPARED),
    "long_time.png": ("pareto.png", ["compare-long", "compare-long-time"]),
    "smollm2_time.png": ("pareto.png", ["h200-time-smollm2"]),
    "gemma3_time.png": ("pareto.png", ["h200-time-gemma3"]),
    "speedup.png": ("speedup.png", ["h100-attention"]),
    "breakdown.png": ("breakdown.png", ["h100-attention"]),
    "attention_map.png": ("attention_map.png", ["h100-pooled"]),
    "ttft.png": ("ttft.png", ["h100-ttft"]),
    "yarn_curves.png": ("curves.png", ["yarn-curves"]),
    "yarn_smollm2_curves.png": ("curves.png", ["yarn-smollm2-curves"]),
}
