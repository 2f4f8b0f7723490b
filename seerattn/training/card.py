"""Model cards of gates, written from the facts of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from seerattn.results.environment import package_version

# Folder of the weights that `seerattn finetune` writes.
MODEL_NAME = "model"
# What makes a card one of ours.
_TAGS = "library_name: peft\ntags:\n- seerattn\n"


def model_card(facts: dict[str, Any], parameters: int, records: list[dict[str, Any]]) -> str:
    """Markdown with the metadata that PEFT and the Hub read.

    Args:
        facts: what decided the run, see `TrainingRun.facts`.
        parameters: of all gates together.
        records: of the run, the first before any training.
    """
    config, last = facts["config"], records[-1]
    name = model_name(facts["model"]) or facts["base_model"]["architecture"]
    rows = [f"| {config['loss']} loss | {records[0]['loss']:.4f} | {last['loss']:.4f} | |"]
    for key in sorted(key for key in last if key.startswith(("recall@", "decode_recall@"))):
        before, after, best = (f"{x:.4f}" for x in (records[0][key], last[key], last[f"oracle_{key}"]))
        of = " of single tokens" if key.startswith("decode") else ""
        rows.append(f"| target recall{of} at density {key.partition('@')[2]} | {before} | {after} | {best} |")
    layers = "all full-attention layers" if facts["layers"] is None else f"layers {facts['layers']}"
    layers += "" if facts["gates"] is None else f", starting from the gates in {facts['gates'][0]}"
    documents = _documents(facts)
    table = "\n".join(rows)
    return f"""{_metadata(facts["model"])}
# Attention gates for {name}

Learned block-sparse attention: gates of {parameters:,} parameters predict which blocks of {facts["gate"]["block_q"]} x
{facts["gate"]["block_k"]} tokens of an attention map matter, so that only those are computed. The weights of the model
are not changed.

```python
import seerattn
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({json.dumps(facts["model"])})
model = seerattn.attach(model, "path/to/these/gates")
seerattn.set_policy(model, seerattn.TopK(density=0.1))  # or keep {config["density"]}, which is saved with the gates
```

## Training

Distilled from the model's own attention maps on {layers}: {config["steps"]} steps of {config["batch_size"]} samples of
{config["context"]} tokens ({last["tokens"]:,} tokens), peak learning rate {config["lr"]}, retrieval documents in
{config["retrieval_share"]:.0%} of the samples, seed {config["seed"]}. Data: {documents} (token hash
{facts["data_hash"]}). Everything that decided the run is in `run.json`, its records are in `training.jsonl`.

On the training samples, averaged over layers and heads:

| | before training | at the end | best possible |
|---|---|---|---|
{table}

Made with {_versions()}.
"""


def finetuned_card(facts: dict[str, Any], model: str, records: list[dict[str, Any]]) -> str:
    """Markdown of gates that were trained together with their model.

    Args:
        facts: what decided the run, see `TrainingRun.facts`.
        model: where the fine-tuned weights are.
        records: of the run.
    """
    config, first, last = facts["config"], records[0], records[-1]
    learned = [record for record in records if "gate_loss" in record]
    name = model_name(facts["model"]) or facts["base_model"]["architecture"]
    documents = _documents(facts)
    rising = f", rising from 0 over the first {config['anneal']:.0%} of the steps" if config["anneal"] else ""
    start = "fresh gates" if facts["gates"] is None else f"the gates in {facts['gates'][0]}"
    return f"""{_metadata(model)}
# Attention gates trained together with {name}

Learned block-sparse attention: the gates choose blocks of {facts["gate"]["block_q"]} x {facts["gate"]["block_k"]}
tokens of an attention map, and the model was fine-tuned while only those were computed. They belong to the fine-tuned
weights, which the run saved beside them as `model`.

```python
import seerattn
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({json.dumps(model)})
model = seerattn.attach(model, "path/to/these/gates")
seerattn.set_policy(model, seerattn.TopK(density=0.1))  # or keep {1 - config["sparsity"]:.4g}, saved with the gates
```

## Training

From {start}: {config["steps"]} steps of {config["batch_size"]} samples of {config["context"]} tokens
({last["tokens"]:,} tokens), sparsity {config["sparsity"]:g}{rising}, context extended {config["context_factor"]:g}
times (YaRN), peak learning rate {config["lr"]:g}, of the gates {config["gate_lr"]:g}, seed {config["seed"]}. Data:
{documents} (token hash {facts["data_hash"]}). Everything that decided the run is in `run.json`, its records are in
`training.jsonl`.

| | first step | last record |
|---|---|---|
| cross-entropy | {first["loss"]:.4f} | {last["loss"]:.4f} |
| {config["loss"]} loss of the gates | {learned[0]["gate_loss"]:.4f} | {learned[-1]["gate_loss"]:.4f} |

Made with {_versions()}.
"""


def model_name(model: str) -> str:
    """What cards call a model, by its folder or its name on the Hub; "" if it has none.

    `seerattn finetune` puts every model into a folder of the same name, where the folder around it says more.
    """
    path = Path(model)
    return (path.name == MODEL_NAME and path.parent.name) or path.name


def _metadata(model: str) -> str:
    return f"""---
base_model: {json.dumps(model)}
{_TAGS}- sparse-attention
---
"""


def is_card(text: str) -> bool:
    """Whether a text is a card as they are written here."""
    return text.startswith("---\nbase_model: ") and _TAGS in text


def _documents(facts: dict[str, Any]) -> str:
    return ", ".join(Path(source).name for source in facts["data"]) or "tokenised text"


def _versions() -> str:
    packages = ("seerattn", "torch", "transformers", "peft")
    return ", ".join(f"{package} {package_version(package)}" for package in packages)
