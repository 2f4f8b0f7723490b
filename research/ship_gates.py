"""Gates to give away: weights in fp16, under the name of the model on the Hub that they belong to.

    python research/ship_gates.py outputs/smollm2/gates/power-4-fine assets/smollm2-gates \\
        --base HuggingFaceTB/SmolLM2-135M-Instruct

Gates run in fp32 whatever their file holds. Half the bytes change 1 of 13,000 blocks that gates choose (docs/LOG.md).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file, save_file

from seerattn.gate_files import CONFIG, WEIGHTS
from seerattn.hf.config import check_gate_folder
from seerattn.saving import write_whole


def main(
    gates: Annotated[Path, typer.Argument(help="Folder of trained gates.")],
    output: Annotated[Path, typer.Argument(help="New folder.")],
    base: Annotated[str, typer.Option(help="Name of the model on the Hub.")],
) -> None:
    """Write gates for a model of the Hub to OUTPUT."""
    config = check_gate_folder(gates) | {"base_model_name_or_path": base}
    output.mkdir(parents=True)
    halve(gates / WEIGHTS, output / WEIGHTS)
    write_whole(output / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    check_gate_folder(output)
    print(f"{output}: {(output / WEIGHTS).stat().st_size / 1e6:.1f} MB")


def halve(weights: Path, output: Path) -> None:
    """Writes the tensors of a safetensors file in fp16."""
    tensors = {name: tensor.to(torch.float16) for name, tensor in load_file(weights).items()}
    save_file(tensors, output, metadata={"format": "pt"})


if __name__ == "__main__":
    typer.run(main)
