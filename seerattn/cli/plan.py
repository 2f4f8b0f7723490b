"""`seerattn plan`: offline searches whose result, a rule for every head, is kept in a file."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from seerattn.cli.evaluate import DeviceOption, DtypeOption, MaxDocsOption, ModelOption, OneContextOption, SeedOption
from seerattn.cli.progress import progress_bars
from seerattn.cli.terminal import say
from seerattn.cli.training import TrustOption
from seerattn.cli.values import numbers
from seerattn.data.windows import cut_windows, digest, token_documents
from seerattn.eval.arms import EvalModel, choose_device, load_eval_model
from seerattn.methods.described import describe, describe_named
from seerattn.methods.head_rules import Plan
from seerattn.outputs import check_output
from seerattn.texts import visible

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

PlanOption = Annotated[Path, typer.Option(help="Where the plan is written; a plan that is there is never replaced.")]
DataOption = Annotated[
    list[str], typer.Option(help="Text or JSON-lines file, folder, or dataset to search on; may be repeated.")
]
DensityOption = Annotated[
    float, typer.Option(help="Block density of every candidate, only with the variant paper; default: 0.2.")
]
VariantOption = Annotated[
    Literal["paper", "repository"],
    typer.Option(help="paper: least error of the output at equal density; repository: most attention mass."),
]
WindowsOption = Annotated[int, typer.Option(help="Windows to search on, drawn from all of the data.", min=1)]
BlockQOption = Annotated[int, typer.Option(help="Query block size in tokens.")]
BlockKOption = Annotated[int, typer.Option(help="Key block size in tokens.")]
ImportOption = Annotated[
    Path | None, typer.Option("--import", help="Take over a plan (JSON) of the official repository, without a search.")
]
SamplesOption = Annotated[int, typer.Option(help="Documents of each length.", min=1)]
BoundOption = Annotated[
    float, typer.Option(help="Bound of MoA's density: blocks that the last row keeps over all blocks, mean over heads.")
]
StrideOption = Annotated[int, typer.Option(help="Distance of the antidiagonals in tokens.", min=1)]
BlockOption = Annotated[int, typer.Option(help="Block size in tokens, a multiple of the stride.", min=1)]
CoverageOption = Annotated[float, typer.Option(help="Share of the true attention mass that thresholds are to hold.")]
LengthsOption = Annotated[
    str, typer.Option(help="Tokens of the profile's documents; default: a quarter, a half and all of the context.")
]
ValidateOption = Annotated[
    int,
    typer.Option(help="Tokens of the documents that decide; default: 1.5 contexts, or 0.75 where that is too long."),
]


@app.callback()
def _plans() -> None:
    """Search rules for every head of a model, once, for the methods that need them."""


@app.command()
def minference(
    model: ModelOption,
    output: PlanOption,
    data: DataOption = [],  # noqa: B006
    density: DensityOption = 0.0,
    context: OneContextOption = 8192,
    variant: VariantOption = "paper",
    windows: WindowsOption = 1,
    seed: SeedOption = 0,
    max_docs: MaxDocsOption = 0,
    block_q: BlockQOption = 64,
    block_k: BlockKOption = 64,
    device: DeviceOption = "",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
    official: ImportOption = None,
) -> None:
    """Find MInference's pattern and sizes for every head: A-shape, vertical-slash or block-sparse."""
    from seerattn.methods.minference import search as plans
    from seerattn.methods.minference.patterns import METHOD

    if bool(data) == (official is not None):
        raise ValueError("either data or import must be given, got " + ("both" if data else "none"))
    if official is not None:
        imported = plans.read_official(official, describe_named(model, trust_remote_code=trust_remote_code))
        if not is_there(output, METHOD, imported.model, imported.made):
            imported.save(output)
        _print(imported, output)
        return
    settings = plans.SearchSettings(
        variant=variant,
        density=density or (0.2 if variant == "paper" else None),
        context=context,
        windows=windows,
        seed=seed,
        block_q=block_q,
        block_k=block_k,
    )
    subject, documents = _load(model, data, max_docs, device, dtype, context, output, trust_remote_code)
    settings = replace(settings, data=digest(documents), dtype=subject.dtype)
    if not is_there(output, METHOD, describe(subject.model.config), asdict(settings)):
        cut = cut_windows(documents, context=context, count=None, bos_token_id=subject.bos_token_id)
        with progress_bars() as progress:
            plan = plans.search_plan(subject, plans.draw_windows(cut, windows, seed), settings, progress=progress)
        plan.save(output)
    _print(Plan.load(output, method=METHOD), output)


@app.command()
def moa(
    model: ModelOption,
    data: DataOption,
    output: PlanOption,
    density: BoundOption = 0.5,
    context: OneContextOption = 8192,
    samples: SamplesOption = 16,
    lengths: LengthsOption = "",
    validate_at: ValidateOption = 0,
    seed: SeedOption = 0,
    max_docs: MaxDocsOption = 0,
    device: DeviceOption = "",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
) -> None:
    """Find MoA's span for every head, from how much each block changes the loss of the model's own answers.

    The plan keeps the profile: comparisons solve the programme again for any density.
    """
    from seerattn.methods.moa import search as plans
    from seerattn.methods.moa.profile import METHOD

    chosen = tuple(sorted(numbers("lengths", lengths, int, 1))) if lengths else plans.default_lengths(context)
    subject, documents = _load(
        model, data, max_docs, device, dtype, max(*chosen, validate_at), output, trust_remote_code
    )
    config = subject.model.config
    longest = getattr(config.get_text_config(), "max_position_embeddings", 2 * max(chosen))
    settings = plans.ProfileSettings(
        lengths=chosen,
        validation=validate_at or plans.default_validation(max(chosen), longest),
        samples=samples,
        density=density,
        seed=seed,
        data=digest(documents),
        dtype=subject.dtype,
    )
    if not is_there(output, METHOD, describe(config), settings.to_dict()):
        with progress_bars() as progress:
            plan = plans.make_plan(subject, documents, settings, progress=progress)
        plan.save(output)
    _print(Plan.load(output, method=METHOD), output)


@app.command("xattention_profile")
def xattention_profile(
    model: ModelOption,
    data: DataOption,
    output: PlanOption,
    stride: StrideOption = 16,
    block: BlockOption = 128,
    coverage: CoverageOption = 0.9,
    context: OneContextOption = 8192,
    windows: WindowsOption = 4,
    seed: SeedOption = 0,
    max_docs: MaxDocsOption = 0,
    device: DeviceOption = "",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
) -> None:
    """Find XAttention's threshold for every head: its estimate of the fewest blocks that hold most of the true mass."""
    from seerattn.methods.minference.search import draw_windows
    from seerattn.methods.xattention import search as plans
    from seerattn.methods.xattention.estimate import METHOD

    subject, documents = _load(model, data, max_docs, device, dtype, context, output, trust_remote_code)
    settings = plans.ThresholdSettings(
        stride=stride,
        block=block,
        coverage=coverage,
        context=context,
        windows=windows,
        seed=seed,
        data=digest(documents),
        dtype=subject.dtype,
    )
    if not is_there(output, METHOD, describe(subject.model.config), asdict(settings)):
        cut = cut_windows(documents, context=context, count=None, bos_token_id=subject.bos_token_id)
        with progress_bars() as progress:
            plan = plans.profile_plan(subject, draw_windows(cut, windows, seed), settings, progress=progress)
        plan.save(output)
    _print(Plan.load(output, method=METHOD), output)


def _load(
    model: str,
    data: list[str],
    max_docs: int,
    device: str,
    dtype: str,
    context: int,
    output: Path,
    trust_remote_code: bool,
) -> tuple[EvalModel, list[list[int]]]:
    """The model to search on, and the documents as its tokens, if the plan can be written."""
    check_output(output, "output", "a plan", Plan.load)
    where = choose_device(device or None)
    subject = load_eval_model(model, device=where, dtype=dtype, context=context, trust_remote_code=trust_remote_code)
    return subject, token_documents(data, subject.tokenizer, limit=max_docs or None)


def is_there(path: Path, method: str, model: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether a file holds the plan that is asked for already.

    Raises:
        ValueError: it holds something else.
    """
    if not path.exists() or path.stat().st_size == 0:
        return False
    plan = Plan.load(path, method=method, model=model)
    different = [
        f"{name} {plan.made.get(name)}, not {settings.get(name)}"
        for name in {**settings, **plan.made}
        if name != "found" and plan.made.get(name) != settings.get(name)
    ]
    if different:
        raise ValueError(
            f"output must be a new file or a plan of the same settings, got {path} with {'; '.join(different)}; "
            "name another file"
        )
    return True


def _print(plan: Plan, path: Path) -> None:
    found = plan.made.get("found")
    for name, value in found.items() if isinstance(found, dict) else ():
        shown = ", ".join(f"{n} {k}" for k, n in value.items()) if isinstance(value, dict) else _number(value)
        typer.echo(visible(f"{name.replace('_', ' ')}: {shown}"))
    say(f"the plan is in {path}")


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
