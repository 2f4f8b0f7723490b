"""`seerattn eval`: measurements, each appending its results to one file of JSON lines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from seerattn.cli.progress import progress_bars
from seerattn.cli.terminal import print_table, say
from seerattn.cli.training import TrustOption
from seerattn.cli.values import numbers, words
from seerattn.data.windows import Window, cut_windows, digest, token_documents
from seerattn.eval.arms import SELECTORS, Arm, EvalModel, Gates, choose_device, load_eval_model, make_arms
from seerattn.results.file import ResultsFile
from seerattn.results.record import Result
from seerattn.selection.map_form import MapForm

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

ModelOption = Annotated[str, typer.Option(help="Base model: a folder or the name of one on the Hub.")]
GatesOption = Annotated[list[str], typer.Option(help="A folder of gates, or NAME=FOLDER; may be repeated.")]
SelectorsOption = Annotated[
    str,
    typer.Option(
        help="Ways of choosing blocks: dense, gate, oracle, streaming; oracle:sum:2 chooses by another map, keys:power."
    ),
]
DensitiesOption = Annotated[str, typer.Option(help="Shares of the causal block area to compute, in (0, 1].")]
DataOption = Annotated[list[str], typer.Option(help="Text or JSON-lines file, folder, or dataset; may be repeated.")]
TextOption = Annotated[str, typer.Option(help="What to call the text in results; default: the name of the data.")]
MaxDocsOption = Annotated[int, typer.Option(help="Use the first so many documents; 0 for all.", min=0)]
ContextsOption = Annotated[str, typer.Option(help="Context lengths in tokens.")]
OutputOption = Annotated[Path | None, typer.Option(help="Results file; finished cells in it are not run again.")]
BatchOption = Annotated[int, typer.Option(help="Sequences that run together.", min=1)]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, ...; default: cuda if there is one.")]
DtypeOption = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="Of the base model; auto is bfloat16 on an accelerator and float32 on a CPU."),
]
ImplOption = Annotated[str, typer.Option(help="Implementation of the sparse attention; auto is the fastest here.")]
LastRowsOption = Annotated[str, typer.Option(help="Query-block rows at the end that keep all blocks.")]
SavedOption = Annotated[bool, typer.Option("--saved-policy", help="Also run gates with the policy saved with them.")]
WindowsOption = Annotated[int, typer.Option(help="Windows of each document, from its start; 0 for all.", min=0)]
BlockOption = Annotated[int, typer.Option(help="Block size in tokens of oracle and streaming.", min=1)]
MinTokensOption = Annotated[
    int, typer.Option(help="Also keep shorter windows of so many tokens; 0 keeps full windows alone.", min=0)
]
TasksOption = Annotated[str, typer.Option(help="passkey, key_value, multi_key, variable_tracking.")]
DepthsOption = Annotated[str, typer.Option(help="Shares of the text before a pass key.")]
CountOption = Annotated[int, typer.Option("--n", help="Documents for each depth.", min=1)]
PairsOption = Annotated[
    int, typer.Option(help="Key-value pairs in a document; 0 for 8, and for 32 with multi_key.", min=0)
]
ChainsOption = Annotated[int, typer.Option(help="Chains of variables in a document; one is asked for.", min=1)]
HopsOption = Annotated[int, typer.Option(help="Assignments from variable to variable in a chain.", min=1)]
SeedOption = Annotated[int, typer.Option(help="Draws facts, places and text.")]
MapsOption = Annotated[Path | None, typer.Option(help="Also write block maps of one document (.npz) for the report.")]
HeadsOption = Annotated[str, typer.Option(help="Which maps: LAYER:HEAD, with commas between.")]
HarnessTasksOption = Annotated[
    str, typer.Option("--tasks", help="Tasks and groups of lm-evaluation-harness: ruler, longbench, ..., and local.")
]
DataDirOption = Annotated[Path | None, typer.Option(help="Folder with the files of local tasks.")]
LimitOption = Annotated[int, typer.Option(help="Use the first so many documents of each task; 0 for all.", min=0)]
LengthsOption = Annotated[str, typer.Option(help="Lengths in tokens of documents that are made (RULER).")]
CutOption = Annotated[
    int, typer.Option("--context", help="Longer prompts lose their middle; 0 for all that the model can take.", min=0)
]
ChatOption = Annotated[bool, typer.Option("--chat-template", help="Put prompts into the model's chat template.")]
OneGatesOption = Annotated[str, typer.Option("--gates", help="A folder of gates, or NAME=FOLDER.")]
OneContextOption = Annotated[int, typer.Option(help="Context length in tokens.", min=2)]
TargetDensityOption = Annotated[float, typer.Option(help="Density to meet.")]
TargetRecallOption = Annotated[float, typer.Option(help="Recall of the target map to meet, instead of a density.")]
PerHeadOption = Annotated[bool, typer.Option("--per-head/--global", help="One threshold a head, or one for all.")]
LevelOption = Annotated[
    Literal["auto", "score", "softmax"],
    typer.Option(help="What is compared: raw scores, the default for gates that normalise them, or their softmax."),
]
BudgetsOption = Annotated[
    bool, typer.Option("--budgets", help="Find the densities of heads that miss least together, instead of thresholds.")
]
LadderOption = Annotated[
    str, typer.Option(help="Mean densities of budgets, from the lowest that you want; default: nine of .03 to .7.")
]
GainOption = Annotated[
    str, typer.Option(help="Map of which budgets miss least, keys:power; default: the target of the gates.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Save nothing with the gates.")]


@app.command()
def perplexity(
    model: ModelOption,
    data: DataOption,
    gates: GatesOption = [],  # noqa: B006
    selectors: SelectorsOption = "",
    densities: DensitiesOption = "0.5,0.2,0.1",
    contexts: ContextsOption = "4096",
    windows: WindowsOption = 1,
    min_tokens: MinTokensOption = 0,
    max_docs: MaxDocsOption = 0,
    text: TextOption = "",
    last_rows_dense: LastRowsOption = "0",
    saved_policy: SavedOption = False,
    block: BlockOption = 64,
    batch: BatchOption = 1,
    device: DeviceOption = "",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
    impl: ImplOption = "auto",
    output: OutputOption = None,
) -> None:
    """Measure the perplexity of whole documents, each selector beside the dense model on the same documents."""
    from seerattn.eval.perplexity import evaluate_perplexity

    folders, arms = _arms(gates, selectors, densities, last_rows_dense, saved_policy, block)
    lengths = numbers("contexts", contexts, int, 2)
    where = choose_device(device or None)
    file = ResultsFile(output, where)
    subject = load_eval_model(model, gates=folders, device=where, dtype=dtype, impl=impl, context=max(lengths),
        trust_remote_code=trust_remote_code)  # fmt: skip
    cut, settings = _windows(subject, data, lengths, windows, min_tokens, max_docs)
    with progress_bars() as progress:
        rows = evaluate_perplexity(
            subject,
            arms,
            cut,
            file,
            text=text or _name_of(data),
            settings=settings,
            batch=batch,
            progress=progress,
        )
    _print_table(rows, {"perplexity": "perplexity", "perplexity_difference": "- dense"}, output)


@app.command()
def needle(
    model: ModelOption,
    data: DataOption,
    gates: GatesOption = [],  # noqa: B006
    selectors: SelectorsOption = "",
    densities: DensitiesOption = "0.2,0.1",
    contexts: ContextsOption = "4096",
    tasks: TasksOption = "passkey,key_value",
    depths: DepthsOption = "0.1,0.3,0.5,0.7,0.9",
    n: CountOption = 20,
    pairs: PairsOption = 0,
    chains: ChainsOption = 2,
    hops: HopsOption = 4,
    seed: SeedOption = 0,
    max_docs: MaxDocsOption = 0,
    text: TextOption = "",
    last_rows_dense: LastRowsOption = "0,2",
    saved_policy: SavedOption = False,
    block: BlockOption = 64,
    batch: BatchOption = 1,
    device: DeviceOption = "",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
    impl: ImplOption = "auto",
    output: OutputOption = None,
) -> None:
    """Measure retrieval: pass keys at given depths, pairs and chains of variables at random ones, hidden in the data.

    Document, question and answer are prefilled sparsely in one pass; an answer counts if each of its tokens is the
    model's first choice.
    """
    from seerattn.eval.needle import TASKS, Needle, evaluate_needle

    folders, arms = _arms(gates, selectors, densities, last_rows_dense, saved_policy, block)
    lengths = numbers("contexts", contexts, int, 2)
    places = numbers("depths", depths, float, 0)
    asked = words(tasks)
    if not asked or set(asked) - set(TASKS) or max(places) > 1:
        raise ValueError(f"tasks must be among {', '.join(TASKS)} and depths shares, got {tasks!r} and {depths!r}")
    where = choose_device(device or None)
    file = ResultsFile(output, where)
    subject = load_eval_model(model, gates=folders, device=where, dtype=dtype, impl=impl, context=max(lengths),
        trust_remote_code=trust_remote_code)  # fmt: skip
    haystacks = token_documents(data, subject.tokenizer, limit=max_docs or None)
    cells = []
    for length in lengths:
        for task in dict.fromkeys(asked):
            if task == "passkey":
                cells += [Needle(task, length, depth, n, seed) for depth in places]
            else:
                cells.append(Needle(task, length, None, n * len(places), seed, pairs or None, chains, hops))
    with progress_bars() as progress:
        rows = evaluate_needle(
            subject,
            arms,
            cells,
            haystacks,
            file,
            text=text or _name_of(data),
            settings={"data": digest(haystacks)},
            batch=batch,
            progress=progress,
        )
    _print_table(rows, {"accuracy": "accuracy", "answer_log_prob": "log-prob"}, output)


@app.command()
def recall(
    model: ModelOption,
    data: DataOption,
    gates: GatesOption = [],  # noqa: B006
    selectors: SelectorsOption = "",
    densities: DensitiesOption = "0.5,0.2,0.1",
    contexts: ContextsOption = "4096",
    windows: WindowsOption = 1,
    min_tokens: MinTokensOption = 0,
    max_docs: MaxDocsOption = 0,
    text: TextOption = "",
    saved_policy: SavedOption = False,
    block: BlockOption = 64,
    batch: BatchOption = 1,
    device: DeviceOption = "",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
    impl: ImplOption = "auto",
    maps: MapsOption = None,
    heads: HeadsOption = "0:0",
    output: OutputOption = None,
) -> None:
    """Measure how much of the true block map the chosen blocks hold, per layer and head."""
    from seerattn.eval.recall import check_heads, evaluate_recall, observe_maps
    from seerattn.results.maps import check_maps

    folders, arms = _arms(gates, selectors, densities, "0", saved_policy, block)
    lengths = numbers("contexts", contexts, int, 2)
    chosen = _heads(heads)
    drawn = next((arm for arm in reversed(arms) if arm.selector == "gate" and arm.density is not None), None)
    if maps is not None and drawn is None:
        raise ValueError("maps must have gates to show, got none; give --gates")
    if maps is not None:
        check_maps(maps)
        if output is not None and maps.absolute() == output.absolute():
            raise ValueError(f"maps must be another file than output, got {maps} for both")
    where = choose_device(device or None)
    file = ResultsFile(output, where)
    subject = load_eval_model(model, gates=folders, device=where, dtype=dtype, impl=impl, context=max(lengths),
        trust_remote_code=trust_remote_code)  # fmt: skip
    cut, settings = _windows(subject, data, lengths, windows, min_tokens, max_docs)
    if maps is not None:
        check_heads(subject, drawn, chosen)
    with progress_bars() as progress:
        rows = evaluate_recall(
            subject,
            arms,
            cut,
            file,
            text=text or _name_of(data),
            settings=settings,
            batch=batch,
            progress=progress,
        )
    if maps is not None:
        observe_maps(subject, drawn, cut[max(lengths)][0], chosen).save(maps)
    _print_table(rows, {"target_recall": "target", "mass_recall": "mass"}, output)


@app.command()
def tasks(
    model: ModelOption,
    names: HarnessTasksOption,
    gates: GatesOption = [],  # noqa: B006
    data_dir: DataDirOption = None,
    selectors: SelectorsOption = "",
    densities: DensitiesOption = "0.2,0.1",
    limit: LimitOption = 0,
    lengths: LengthsOption = "4096",
    context: CutOption = 0,
    last_rows_dense: LastRowsOption = "0",
    saved_policy: SavedOption = False,
    block: BlockOption = 64,
    chat_template: ChatOption = False,
    batch: BatchOption = 1,
    device: DeviceOption = "",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
    impl: ImplOption = "auto",
    output: OutputOption = None,
) -> None:
    """Measure tasks of lm-evaluation-harness, such as RULER and LongBench, and guard each against the dense model.

    Prompts are prefilled sparsely; what is generated after them attends to everything.
    """
    from seerattn.eval.tasks import evaluate_tasks, load_tasks

    folders, arms = _arms(gates, selectors or ("dense,gate" if gates else "dense"), densities, last_rows_dense,
        saved_policy, block)  # fmt: skip
    made = numbers("lengths", lengths, int, 1)
    where = choose_device(device or None)
    file = ResultsFile(output, where)
    subject = load_eval_model(model, gates=folders, device=where, dtype=dtype, impl=impl, context=context,
        trust_remote_code=trust_remote_code)  # fmt: skip
    longest = context or getattr(subject.model.config.get_text_config(), "max_position_embeddings", 0) or max(made)
    loaded, missing = load_tasks(words(names), tokenizer=model, data_dir=data_dir, lengths=made, limit=limit or None,
        trust_remote_code=trust_remote_code)  # fmt: skip
    for sentence in missing.values():
        say(sentence, style="red")
    with progress_bars() as progress:
        rows = evaluate_tasks(
            subject,
            arms,
            loaded,
            file,
            context=longest,
            batch=batch,
            chat_template=chat_template,
            progress=progress,
        )
    _print_table(rows, {"task_score": "score", "task_guard": "- dense"}, output)
    for row in rows:
        if row.what == "task_guard" and "note" in row.cell:
            label = f"{row.cell['task']}, {row.arm} {'' if row.density is None else f'{row.density:g}'}".rstrip()
            say(f"{label}: {row.cell['note']}", style="bold yellow")
    if missing:
        raise typer.Exit(1)


@app.command()
def calibrate(
    model: ModelOption,
    gates: OneGatesOption,
    data: DataOption,
    budgets: BudgetsOption = False,
    ladder: LadderOption = "",
    gain: GainOption = "",
    density: TargetDensityOption = 0.0,
    target_recall: TargetRecallOption = 0.0,
    per_head: PerHeadOption = True,
    on: LevelOption = "auto",
    context: OneContextOption = 4096,
    windows: WindowsOption = 1,
    max_docs: MaxDocsOption = 0,
    batch: BatchOption = 1,
    device: DeviceOption = "",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
    impl: ImplOption = "auto",
    dry_run: DryRunOption = False,
    text: TextOption = "",
    output: OutputOption = None,
) -> None:
    """Fit gates to text: share densities among heads (--budgets), or find thresholds that meet a density or a recall.

    Every second document calibrates, the others check; what was found is saved with the gates. With budgets
    `TopK(density=...)` gives every head its share of that density, at all densities and lengths.
    """
    from seerattn.methods.gate.budgets import LADDER, check_ladder, evaluate_budgets
    from seerattn.methods.gate.thresholds import evaluate_calibration

    if [budgets, density > 0, target_recall > 0].count(True) != 1:
        raise ValueError(
            "one of budgets, density and target-recall must be given, densities and recalls in (0, 1], got "
            f"{'budgets, ' if budgets else ''}{density:g} and {target_recall:g}"
        )
    if (ladder or gain) and not budgets:
        raise ValueError(f"ladder and gain must come with budgets, got {ladder or gain}; add --budgets")
    rungs = numbers("ladder", ladder, float, 0) if ladder else LADDER
    check_ladder(rungs)
    held = MapForm.parse(gain) if gain else None
    where = choose_device(device or None)
    file = ResultsFile(output, where)
    folder = _gates([gates])[0]
    subject = load_eval_model(model, gates=[folder], device=where, dtype=dtype, impl=impl, context=context,
        trust_remote_code=trust_remote_code)  # fmt: skip
    cut, settings = _windows(subject, data, [context], windows, 0, max_docs)
    common = {"context": context, "text": text or _name_of(data), "settings": settings, "save": not dry_run,
        "batch": batch}  # fmt: skip
    with progress_bars() as progress:
        if budgets:
            rows = evaluate_budgets(
                subject, folder, cut[context], file, ladder=rungs, gain=held, **common, progress=progress
            )
        else:
            rows = evaluate_calibration(
                subject,
                folder,
                cut[context],
                file,
                goal="density" if density else "recall",
                value=density or target_recall,
                per_head=per_head,
                on=None if on == "auto" else on,
                **common,
                progress=progress,
            )
    kind = "budget" if budgets else "calibrated"
    _print_table(rows, {f"{kind}_density": "density", f"{kind}_recall": "recall"}, output)


def _arms(
    gates: list[str], selectors: str, densities: str, last_rows_dense: str, saved_policy: bool, block: int
) -> tuple[list[Gates], list[Arm]]:
    folders = _gates(gates)
    names = words(selectors) or ["dense", *(["gate"] if folders else []), "oracle", "streaming"]
    arms = make_arms(
        names,
        numbers("densities", densities, float, 0),
        gates=folders,
        last_rows_dense=numbers("last-rows-dense", last_rows_dense, int, 0),
        saved_policy=saved_policy,
        block_q=block,
        block_k=block,
    )
    return folders, arms


def _gates(named: list[str]) -> list[Gates]:
    folders = []
    for one in named:
        name, _, path = one.rpartition("=")
        folders.append(Gates(name or Path(path).name, Path(path)))
        if not Path(path).is_dir():
            raise ValueError(f"gates must be a folder, got {path}")
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names) or set(names) & set(SELECTORS):
        raise ValueError(f"gates must have names of their own, got {', '.join(names)}; give NAME=FOLDER")
    return folders


def _heads(text: str) -> list[tuple[int, int]]:
    try:
        found = [(int(layer), int(head)) for layer, head in (word.split(":") for word in words(text) or [""])]
        return list(dict.fromkeys(found))
    except ValueError as error:
        raise ValueError(f"heads must be LAYER:HEAD with commas between, got {text!r}") from error


def _windows(
    subject: EvalModel, data: list[str], contexts: list[int], windows: int, min_tokens: int, max_docs: int
) -> tuple[dict[int, list[Window]], dict]:
    """Windows for each context, and what identifies them."""
    count = windows or None
    documents = token_documents(data, subject.tokenizer, limit=max_docs or None, tokens=count and count * max(contexts))
    cut = {
        context: cut_windows(
            documents,
            context=context,
            count=count,
            min_tokens=min_tokens or None,
            bos_token_id=subject.bos_token_id,
        )
        for context in contexts
    }
    for context, pieces in cut.items():
        skipped = len(documents) - len({window.document for window in pieces})
        if skipped:
            say(f"{skipped} of {len(documents)} documents are shorter than {context} tokens and left out")
    return cut, {"windows": windows, "min_tokens": min_tokens, "data": digest(documents)}


def _name_of(data: list[str]) -> str:
    return "+".join(dict.fromkeys(Path(source).name.split(".")[0] for source in data))


def _print_table(rows: list[Result], columns: dict[str, str], output: Path | None) -> None:
    """One line for each arm and cell, with a column for each quantity."""
    lines: dict[tuple, dict[str, Result]] = {}
    told = ("task", "metric", "filter", "depth", "heads")
    for row in rows:
        where = {name: row.cell[name] for name in ("per_head", *told) if name in row.cell}
        key = (row.context, row.arm, row.density, (row.policy or {}).get("last_rows_dense", 0), str(where))
        lines.setdefault(key, {})[row.what] = row
    body = []
    for (context, arm, density, rows_dense, _), found in lines.items():
        row = next(iter(found.values()))
        where = " ".join(str(row.cell[name]) for name in told if name in row.cell)
        realised = "" if row.realised_density is None else f"{row.realised_density:.3f}"
        values = [_value(found[what]) if what in found else "" for what in columns]
        nominal = "" if density is None else f"{density:g}"
        body.append([str(context), arm, nominal, realised, str(rows_dense or ""), where, str(row.n), *values])
    heads = ["context", "selector", "density", "realised", "dense rows", "cell", "n", *columns.values()]
    print_table(heads, body, texts=("selector",))
    if output is not None:
        say(f"results are in {output}")


def _value(row: Result) -> str:
    value = "not finite" if row.value is None else f"{row.value:.4g}"
    return value if row.stderr is None else f"{value} ± {row.stderr:.2g}"
