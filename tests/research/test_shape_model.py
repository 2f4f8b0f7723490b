"""A folder of a shape holds what its experiment names: a model, gates that fit it, and a text that is long enough."""

import runpy
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from seerattn.bench.model import TINY
from seerattn.data.windows import token_documents
from seerattn.eval.experiment import Experiment
from seerattn.hf.attach import attach, detach

RESEARCH = Path(__file__).parents[2] / "research"
RECIPE = runpy.run_path(str(RESEARCH / "shape_model.py"))
EXPERIMENT = RESEARCH / "experiments" / "llama-time.yaml"


def test_a_shape_has_all_that_its_experiment_names(tmp_path) -> None:
    folder = tmp_path / "shape"
    RECIPE["main"](output=folder, layers=3, size="tiny")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    config = model.config
    heads = (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    assert heads == (3, TINY.shape.heads, TINY.shape.kv_heads, TINY.shape.head_dim)
    for name in RECIPE["FORMS"]:
        detach(attach(model, folder / name))
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert len(tokenizer) <= config.vocab_size
    experiment = Experiment.from_file(EXPERIMENT)
    (task,) = experiment.tasks
    (document,) = token_documents([str(folder / "text.jsonl")], tokenizer)
    assert len(document) >= task.windows * max(experiment.contexts)
