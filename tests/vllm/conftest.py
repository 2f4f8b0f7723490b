"""vLLM in the process of the tests, on one thread and on the CPU; it reads these when it is imported."""

import os
import sys
from pathlib import Path

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    # What it keeps of models and compilations: beside it, not in the home of the user.
    "VLLM_CACHE_ROOT": str(Path(sys.prefix) / "cache"),
}
