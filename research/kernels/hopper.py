"""A Hopper GPU that is not there: Triton compiles for it as for any other, and launches nothing.

Tensors are on the CPU and results mean nothing. What can be seen is which kernels a call compiles, whether they do,
what they take of registers and shared memory, and how long the host is at it.
"""

from __future__ import annotations

from typing import Any

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import ty_to_cpp
from triton.runtime import driver

from seerattn.ops import launch, resolve

MULTIPROCESSORS = 132
KERNELS = ("gluon", "triton")


class Utils:
    """What Triton asks of a CUDA driver."""

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        """A module, a function, registers, spills and threads."""
        return 1, 1, 64, 0, 1024

    def get_device_properties(self, _: int) -> dict[str, int]:
        """Those of an H200 that count."""
        return {
            "max_shared_mem": 232448,
            "multiprocessor_count": MULTIPROCESSORS,
            "max_num_regs": 65536,
            "warpSize": 32,
        }


class Launcher:
    """Launches nothing."""

    def __init__(self, *_: Any) -> None: ...

    def __call__(self, *_: Any) -> None: ...


class Driver:
    """The GPU."""

    utils, launcher_cls = Utils(), Launcher
    map_python_to_cpp_type = staticmethod(ty_to_cpp)

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, _: int) -> int:
        """The default one."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """Compute capability 9.0."""
        return GPUTarget("cuda", 90, 32)


def pretend() -> None:
    """From here on kernels of this process are those of the GPU that is not there, also under ``impl="auto"``.

    Implementations of ops are imported when they are first needed, and must not have been. Triton must not interpret.
    """
    driver.set_active(Driver())
    resolve._lacking = lambda impl, *_: None if impl in KERNELS else "it is not here"
    resolve._available = lambda op, _: (name for name in resolve._names(op) if name in KERNELS)
    launch.multiprocessors = lambda _: MULTIPROCESSORS
