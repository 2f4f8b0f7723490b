"""Runs a test file as a script in two processes that talk by gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# What `accelerate launch` makes of the options of docs/howto/several-gpus.md.
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer,AttnGate",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
# Accelerate shards on accelerators only. What is emulated is its answer to one question, the kind of device, on which
# it starts gloo on CPUs; all that follows is its own.
ON_CPUS = """
import sys
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import PreTrainedModel
from seerattn.cli import main
from seerattn.training.finetune import FinetuneRun
from seerattn.training.finetune_trainer import FinetuneTrainer

def gloo_as_if_on_gpus(self, *_, **__):
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return "gloo", DistributedType.MULTI_GPU

def read_weights(kind, *args, read=PreTrainedModel.from_pretrained.__func__, **kwargs):
    assert dist.get_rank() == 0, "a process read weights that it must be sent"
    return read(kind, *args, **kwargs)

PartialState._prepare_backend = gloo_as_if_on_gpus
PreTrainedModel.from_pretrained = classmethod(read_weights)
"""


def launch_two(*arguments: str) -> subprocess.CompletedProcess:
    """Runs what `torchrun` takes twice side by side, on CPUs."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*launch, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )


def in_two_processes(script: str, folder: Path) -> None:
    """Runs ``script FOLDER`` so; what goes wrong in a process is shown."""
    done = launch_two(script, str(folder))
    assert done.returncode == 0, "\n".join(line for line in done.stderr.splitlines() if "[rank" in line)[-2000:]
