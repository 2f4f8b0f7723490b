"""What all tests share: Triton's interpreter where there is no GPU, and parts of the suite for several processes."""

import gc
import os

import pytest
import torch
from interpreted import patch_language_once_a_launch

# To be chosen before a kernel is defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="1/1", help="which part of the files of tests to run, such as 1/2")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps every so manieth file, whole, as its tests share what they make."""
    part, parts = map(int, config.getoption("--shard").split("/"))
    files = sorted({item.path for item in items})
    if len(files) < parts:  # one file that shares out its tests itself
        return
    kept = set(files[part - 1 :: parts])
    config.hook.pytest_deselected(items=[item for item in items if item.path not in kept])
    items[:] = [item for item in items if item.path in kept]


def pytest_collection_finish() -> None:
    """Sets apart what imports made, which lasts: a trainer collects garbage at its end, for 0.3 s with all of that."""
    patch_language_once_a_launch()
    gc.collect()
    gc.freeze()
