"""One GPU and several: prompts by heads (tensor parallelism) or by tokens (context parallelism), and training steps.

    python research/shape_model.py --layers 32 --output outputs/llama-shape
    python research/several_gpus.py one --output several.jsonl
    torchrun --nproc-per-node 2 research/several_gpus.py tensor --output several.jsonl
    torchrun --nproc-per-node 2 research/several_gpus.py context --lengths 131072,262144,524288 --output several.jsonl

    python research/several_gpus.py distill --batch 2 --time-limit 300 --output several.jsonl
    torchrun --nproc-per-node 2 research/several_gpus.py distill --batch 2 --time-limit 300 --output several.jsonl

    FSDP="--num_processes 2 --mixed_precision no --use_fsdp --fsdp_version 2 --fsdp_reshard_after_forward true"
    FSDP="$FSDP --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP --fsdp_state_dict_type FULL_STATE_DICT"
    FSDP="$FSDP --fsdp_cpu_ram_efficient_loading true --fsdp_transformer_layer_cls_to_wrap LlamaDecoderLayer"
    TRAIN="research/several_gpus.py finetune --batch 2 --time-limit 200 --output several.jsonl --arm"
    python $TRAIN sparse; python $TRAIN cudnn; python $TRAIN flash
    accelerate launch $FSDP,AttnGate $TRAIN sparse
    accelerate launch $FSDP $TRAIN cudnn; accelerate launch $FSDP $TRAIN flash

    torchrun --nproc-per-node 2 research/several_gpus.py links --output several.jsonl

Seconds to the first token of a prompt of random tokens ("ttft_s"), dense and by gates with random weights at each
density; of several processes those of the slowest. `one` goes first: it keeps the last logits of a short prompt beside
OUTPUT, of the model as it is and in twice the precision. The others may be off by twice what it is off; else nothing is
timed. A cell that the file holds is not measured again. `context` keeps no cache, the others do.

Training is that of the commands, of one sample at once on a process, with the optimizer, of which nothing is saved:
seconds of a step, tokens a second, the peak of the fullest GPU, and beside them what the plan said. One process goes
first, where it has the memory: several must begin with its loss. `links` are bytes that a process is sent, a second.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from several_links import measure_links
from several_prompts import PROMPTS, Arm, Prompts, measure_prompts
from several_steps import ARMS, Steps, measure_steps

from seerattn.bench.session import Session
from seerattn.hf.eval_model import choose_device
from seerattn.options import parse_value
from seerattn.results.file import ResultsFile, read_results

PARTS = (*PROMPTS, *ARMS, "links")
# A layer of Llama-3.1-8B has 416 MiB in bfloat16.
LENGTHS = dict.fromkeys(PROMPTS, "32768,65536,131072") | {"links": "1,16,128,512"}


def main(
    part: Annotated[str, typer.Argument(help=f"One of {', '.join(PARTS)}.")],
    output: Annotated[Path, typer.Option(help="Results file.")],
    model: Annotated[Path, typer.Option(help="Folder of the model.")] = Path("outputs/llama-shape/model"),
    gates: Annotated[Path, typer.Option(help="Folder of its gates.")] = Path("outputs/llama-shape/default"),
    text: Annotated[Path, typer.Option(help="What to train on.")] = Path("outputs/llama-shape/text.jsonl"),
    lengths: Annotated[str, typer.Option(help="Tokens of prompts or of samples; MiB of links.")] = "",
    densities: Annotated[str, typer.Option(help="Densities beside dense, or that of fine-tuning.")] = "0.1",
    arm: Annotated[str, typer.Option(help="Of fine-tuning: sparse, cudnn, flash or sdpa.")] = "",
    batch: Annotated[int, typer.Option(help="Samples of a step, over all processes.", min=1)] = 2,
    repeats: Annotated[int, typer.Option(help="Runs of a cell; long prompts are run twice.", min=2)] = 5,
    time_limit: Annotated[float, typer.Option(help="Begin nothing new after so many seconds.", min=1)] = 1e9,
) -> None:
    """Time prompts and training steps on one GPU, or on several."""
    if part not in PARTS:
        raise typer.BadParameter(f"part must be one of {', '.join(PARTS)}, got {part}")
    device = choose_device()
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    # Training begins the group by itself.
    if part not in ("one", *ARMS):
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    sizes = parse_value("lengths", lengths or LENGTHS.get(part, "32768"), tuple[int, ...])
    drawn = parse_value("densities", densities, tuple[float, ...])
    where = {"model": model, "gates": gates}
    late = deadline(time_limit, device)
    with measuring(output, device) as (session, known):
        if part in ARMS:
            if len(sizes) > 1 or len(drawn) > 1:
                raise typer.BadParameter("training takes one length and one density a launch")
            step = {"context": sizes[0], "batch": batch, "density": drawn[0], "repeats": repeats}
            steps = Steps(part=part, arm=arm or ARMS[part][0], text=text, limit=time_limit, **where, **step)
            measure_steps(steps, session, known)
        elif part == "links":
            measure_links(session, known, sizes, repeats, late)
        else:
            arms = [Arm(), *map(Arm, drawn)]
            kept = output.with_suffix(".checks.pt")
            prompts = Prompts(part=part, lengths=sizes, arms=arms, repeats=repeats, kept=kept, **where)
            measure_prompts(prompts, session, known, late)
    if dist.is_initialized():
        dist.destroy_process_group()


def deadline(seconds: float, device: torch.device) -> Callable[[], bool]:
    """Whether time is up on some process; all processes have to ask."""
    begin = time.monotonic()

    def late() -> bool:
        up = torch.tensor(float(time.monotonic() - begin > seconds), device=device)
        if dist.is_initialized():
            dist.all_reduce(up, dist.ReduceOp.MAX)
        return bool(up)

    return late


@contextmanager
def measuring(output: Path, device: torch.device) -> Iterator[tuple[Session, set[str]]]:
    """What this process measures with, and the keys of the results that there are already.

    All processes decide alike: each reads the file before the first one can have written to it.
    """
    known = {row.key for row in read_results([output])} if output.exists() else set()
    if dist.is_initialized():
        dist.barrier()
    first = os.environ.get("RANK", "0") == "0"
    file = ResultsFile(output if first else None, device)
    session = Session(device, file, say=print if first else lambda text: None)
    yield session, known
    for label in session.left_out:
        session.say(f"left out, time is up: {label}")
    if session.failures:
        raise SystemExit("; ".join(session.failures))


if __name__ == "__main__":
    typer.run(main)
