"""What all tests share: Triton's interpreter where there is no GPU, and parts of the suite for several processes."""

import gc
import os
from pathlib import Path

import pytest
import torch
from interpreted import patch_language_once_a_launch

TESTS = Path(__file__).parent
# What files take of a processor, in seconds, those left out 4. A number that is wrong costs balance alone.
SECONDS = {
    180: "training/test_sharded_runs",
    130: "ops/test_gate_scores",
    70: "ops/test_decode_select research/test_side_by_side",
    60: "research/test_kernels_compile training/test_finetune_runs",
    50: "research/test_several_gpus training/test_distill_runs training/test_run_folders",
    45: "eval/test_harness serve/test_server",
    35: "hf/test_adapter ops/test_block_sparse_attention_backward report/test_page",
    28: "hf/test_batching research/test_worker_pool training/test_decode_phase training/test_watch",
    22: "cli/test_eval fuzz/test_fuzz hf/test_decode hf/test_decode_together ops/test_attention_map_triton"
    " research/test_serve_load training/test_spread_runs",
    18: "cli/test_bench report/test_report test_gate_memory training/test_finetune_trainer training/test_micro_batches",
    15: "cli/test_terminal eval/test_decoding hf/test_context_parallel hf/test_faults hf/test_tensor_parallel"
    " ops/test_paged_attention",
}

# To be chosen before a kernel is defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="1/1", help="which part of the files of tests to run, such as 1/2")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps files, whole, as their tests share what they make: each part takes about as long as any other."""
    part, parts = map(int, config.getoption("--shard").split("/"))
    files = {item.path for item in items}
    if len(files) < parts:  # one file that shares out its tests itself
        return
    seconds = {TESTS / f"{name}.py": own for own, names in SECONDS.items() for name in names.split()}
    shares: list[set[Path]] = [set() for _ in range(parts)]
    taken = [0] * parts
    for path in sorted(files, key=lambda path: (-seconds.get(path, 4), path)):
        least = taken.index(min(taken))
        shares[least].add(path)
        taken[least] += seconds.get(path, 4)
    kept = shares[part - 1]
    config.hook.pytest_deselected(items=[item for item in items if item.path not in kept])
    items[:] = [item for item in items if item.path in kept]


def pytest_collection_finish() -> None:
    """Makes tests quicker once all is imported."""
    patch_language_once_a_launch()
    # What imports made lasts: a trainer collects garbage at its end, for half a second with all of that.
    gc.collect()
    gc.freeze()
