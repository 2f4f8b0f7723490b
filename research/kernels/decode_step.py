"""Where the GPU's time of a decoded token goes: kernels of one step of a CUDA graph, by name.

    python research/kernels/decode_step.py --context 32768 --batch 24 --form default-group --density 0.1
    python research/kernels/decode_step.py --context 131072 --batch 1 --density 1     # dense, by this library's kernel
    python research/kernels/decode_step.py --context 32768 --batch 24 --compile       # norms and MLPs by torch.compile
    TRITON_INTERPRET=1 python research/kernels/decode_step.py --size tiny --context 99 --density 1 --device cpu  # here

The model has the shape of Llama-3.1-8B, random weights, and few layers. Prints the times of kernels for one layer, what
is outside of layers spread over them, and what the whole graph takes.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import replace

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import seerattn
from seerattn.bench.decode import decoded_tokens
from seerattn.bench.model import SIZES, gate_form, random_model
from seerattn.selection import TopK

# A graph is recorded at the second step.
WARM_UPS, STEPS = 4, 8


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="llama-3.1-8b", choices=sorted(SIZES))
    parser.add_argument("--layers", type=int, default=8, help="layers that are measured")
    parser.add_argument("--context", type=int, required=True, help="tokens behind which one is decoded")
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--form", default="default", help="form of the gates, see seerattn bench serve --help")
    parser.add_argument("--density", type=float, default=0.1, help="share of the blocks that are read; 1 for dense")
    parser.add_argument("--compile", action="store_true", help="compile norms and MLPs")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    device = torch.device(args.device)
    size = replace(SIZES[args.size], layers=min(args.layers, SIZES[args.size].layers))
    policy = None if args.density == 1 else TopK(density=args.density)
    model = seerattn.attach(random_model(size, device), gate_form(args.form), decode_policy=policy, impl="sparse")
    launch = "compiled" if args.compile else "graph"
    steps = decoded_tokens(model, size, args.batch, args.context, WARM_UPS + 2 * STEPS + 1, launch)
    for _ in range(WARM_UPS):
        next(steps)
    if device.type != "cuda":
        print("ran; times of kernels need a GPU")
        return
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(STEPS):
        next(steps)
    end.record()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(STEPS):
            next(steps)
        torch.cuda.synchronize()
    times: dict[str, list[float]] = defaultdict(list)
    for event in found.events():
        if event.device_type == DeviceType.CUDA:
            times[event.name].append(event.device_time)
    per = 1 / STEPS / size.layers
    whole = begin.elapsed_time(end) * 1e3 * per
    print(f"{args.batch} x {args.context}, gates {args.form}, density {args.density:g}, {size.layers} layers")
    print(f"{whole:8.1f} us a layer, by events; kernels {sum(map(sum, times.values())) * per:.1f}")
    for name, each in sorted(times.items(), key=lambda item: -sum(item[1])):
        print(f"{sum(each) * per:8.2f} us  {len(each) * per:6.2f} a layer  {name[:110]}")


if __name__ == "__main__":
    main()
