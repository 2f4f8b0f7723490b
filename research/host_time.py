"""What a sparse layer takes of the host, on any machine: Triton compiles for Hopper and launches nothing.

    python research/host_time.py

A small model is bound by the host, so this is what its sparse prompts cost beside dense ones. The model with gates runs
in turns with a plain one whose attention does nothing; tensors are on the CPU, where what torch does in place of the
GPU's queue is little at this size. Driver calls are not in it. Prints microseconds of CPU time a layer, the lower
quartile of many runs, and with ``--profile`` where they go.
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import os
import pstats
import time
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import ty_to_cpp
from triton.runtime import driver

import seerattn
from seerattn.bench.model import gate_form
from seerattn.ops import resolve
from seerattn.ops.gate_scores import triton_select
from seerattn.selection import TopK

LAYERS = 30


class Utils:
    """What Triton asks of a CUDA driver."""

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        """A module, a function, registers, spills and threads."""
        return 1, 1, 64, 0, 1024

    def get_device_properties(self, _: int) -> dict[str, int]:
        """Those of an H200 that count."""
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}


class Launcher:
    """Launches nothing."""

    def __init__(self, *_: Any) -> None: ...

    def __call__(self, *_: Any) -> None: ...


class Driver:
    """A Hopper GPU that is not there."""

    utils, launcher_cls = Utils(), Launcher
    map_python_to_cpp_type = staticmethod(ty_to_cpp)

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, _: int) -> int:
        """The default one."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """Hopper."""
        return GPUTarget("cuda", 90, 32)


def nothing(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **_: Any) -> tuple[Tensor, None]:
    """Attention that takes no time."""
    return q.transpose(1, 2).contiguous(), None


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", default="default", help="form of the gates, see seerattn bench serve --help")
    parser.add_argument("--runs", type=int, default=60, help="forwards of either model")
    parser.add_argument("--profile", action="store_true", help="also print where the time goes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    driver.set_active(Driver())
    resolve._lacking = lambda impl, *_: None if impl in ("gluon", "triton") else "not here"
    resolve._available = lambda op, _: (name for name in resolve._names(op) if name in ("gluon", "triton"))
    triton_select.multiprocessors = lambda _: 132
    AttentionInterface.register("nothing", nothing)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=LAYERS, head_dim=64)
    config.num_attention_heads, config.num_key_value_heads = 2, 1

    def make() -> LlamaForCausalLM:
        return LlamaForCausalLM(copy.deepcopy(config)).eval().to(torch.bfloat16)

    plain = make()
    plain.set_attn_implementation("nothing")
    gated = seerattn.attach(make(), gate_form(args.form), TopK(density=0.2), impl="sparse")
    tokens = torch.randint(0, 64, (1, 256))

    @torch.no_grad()
    def run(model: PreTrainedModel) -> float:
        begin = time.process_time_ns()
        model(input_ids=tokens, logits_to_keep=1)
        return (time.process_time_ns() - begin) / 1e3 / LAYERS

    times: dict[str, list[float]] = {"plain": [], "gated": []}
    for model in (plain, gated) * 3:
        run(model)
    for _ in range(args.runs):
        for name, model in (("plain", plain), ("gated", gated)):
            times[name].append(run(model))
    low = {name: sorted(found)[len(found) // 4] for name, found in times.items()}
    print(f"{low['plain']:.0f} us a layer without attention, {low['gated'] - low['plain']:.0f} more when it is sparse")
    if args.profile:
        profile = cProfile.Profile()
        profile.runcall(lambda: [run(gated) for _ in range(20)])
        pstats.Stats(profile).sort_stats("cumulative").print_stats("seerattn|triton", 60)


if __name__ == "__main__":
    main()
