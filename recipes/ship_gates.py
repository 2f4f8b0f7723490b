"""Gates to give away: weights rounded to bfloat16, under the name of the model on the Hub that they belong to.

    python recipes/ship_gates.py outputs/smollm2/gates/power-4-fine assets/smollm2-gates \\
        --base HuggingFaceTB/SmolLM2-135M-Instruct

Rounded weights take half the room. Gates compute in fp32 all the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from safetensors.torch import load_file, save_file

from seerattn.hf.checkpoint import CONFIG, WEIGHTS
from seerattn.hf.config import check_gate_folder
from seerattn.saving import write_whole


def main(
    gates: Annotated[Path, typer.Argument(help="Folder of trained gates.")],
    output: Annotated[Path, typer.Argument(help="New folder.")],
    base: Annotated[str, typer.Option(help="Name of the model on the Hub.")],
) -> None:
    """Write gates in bfloat16 to OUTPUT."""
    config = check_gate_folder(gates) | {"base_model_name_or_path": base}
    output.mkdir(parents=True)
    rounded = {name: weight.bfloat16() for name, weight in load_file(gates / WEIGHTS).items()}
    save_file(rounded, output / WEIGHTS, metadata={"format": "pt"})
    write_whole(output / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    check_gate_folder(output)
    size = sum(weight.numel() * weight.element_size() for weight in rounded.values())
    print(f"{output}: {sum(weight.numel() for weight in rounded.values()):,} parameters, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    typer.run(main)
