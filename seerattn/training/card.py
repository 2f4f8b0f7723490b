"""The model card of distilled gates, written from the facts of the run."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any


def model_card(facts: dict[str, Any], parameters: int, records: list[dict[str, Any]]) -> str:
    """Markdown with the metadata that PEFT and the Hub read.

    Args:
        facts: what decided the run, see `distill.Plan.facts`.
        parameters: of all gates together.
        records: of the run, the first before any training.
    """
    config, last = facts["config"], records[-1]
    name = Path(facts["model"]).name or facts["base_model"]["architecture"]
    rows = [f"| {config['loss']} loss | {records[0]['loss']:.4f} | {last['loss']:.4f} | |"]
    for key in sorted(key for key in last if key.startswith("recall@")):
        before, after, best = (f"{x:.4f}" for x in (records[0][key], last[key], last[f"oracle_{key}"]))
        rows.append(f"| target recall at density {key.partition('@')[2]} | {before} | {after} | {best} |")
    layers = "all full-attention layers" if facts["layers"] is None else f"layers {facts['layers']}"
    documents = ", ".join(Path(source).name for source in facts["data"])
    versions = ", ".join(f"{package} {version(package)}" for package in ("seerattn", "torch", "transformers", "peft"))
    table = "\n".join(rows)
    return f"""---
base_model: {json.dumps(facts["model"])}
library_name: peft
tags:
- seerattn
- sparse-attention
---

# Attention gates for {name}

Learned block-sparse attention: gates of {parameters:,} parameters predict which blocks of {facts["gate"]["block_q"]} x
{facts["gate"]["block_k"]} tokens of an attention map matter, so that only those are computed. The weights of the model
are not changed.

```python
import seerattn
from transformers import AutoModelForCausalLM

model = seerattn.attach(AutoModelForCausalLM.from_pretrained({facts["model"]!r}), "path/to/these/gates")
seerattn.set_policy(model, seerattn.TopK(density=0.1))  # or keep {config["density"]}, which is saved with the gates
```

## Training

Distilled from the model's own attention maps on {layers}: {config["steps"]} steps of {config["batch_size"]} samples of
{config["context"]} tokens ({last["tokens"]:,} tokens), peak learning rate {config["lr"]}, recall documents in
{config["recall_share"]:.0%} of the samples, seed {config["seed"]}. Data: {documents} (token hash
{facts["data_hash"]}). Everything that decided the run is in `run.json`, its records are in `training.jsonl`.

On the training samples, averaged over layers and heads:

| | before training | at the end | best possible |
|---|---|---|---|
{table}

Made with {versions}.
"""
