"""`GatedModel`: a model with gates, as `seerattn.attach` returns it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from torch import nn

from seerattn.gate_files import GATES, read_weights
from seerattn.hf.adapter import in_peft_names, take_off
from seerattn.hf.config import SeerConfig, check_folder, gate_folder
from seerattn.hf.identity import transformers_model


class GatedModel(PeftModel):
    """What `seerattn.attach` returns: a `PeftModel` around a transformers model, or around one with other adapters."""

    def __init__(self, model: nn.Module, config: SeerConfig) -> None:
        config.keeps_base = True
        super().__init__(model, config, adapter_name="default")
        self.training = model.training
        config.base_model_name_or_path = config.base_model_name_or_path or transformers_model(model).name_or_path

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """See `SeerModel.peft_config`."""
        return self.base_model.peft_config

    @peft_config.setter
    def peft_config(self, value: dict[str, PeftConfig]) -> None:
        self.base_model.peft_config = value

    @peft_config.deleter
    def peft_config(self) -> None:
        # An adapter around the gates was merged or unloaded.
        self.base_model._others = None

    @property
    def active_peft_config(self) -> SeerConfig:
        """Config of the gates that are used."""
        return self.base_model._configs[self.active_adapter]

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Runs the model without its gates inside the ``with``; other adapters stay as they are."""
        before = self.base_model.attachment.enabled
        self.base_model.disable_adapter_layers()
        try:
            yield
        finally:
            self.base_model._enable_adapter_layers(before)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Saves the gates, and no adapter around them. See `PeftModel.save_pretrained`."""
        if any(layer.part for layer in self.base_model.attachment.layers.values()):
            raise ValueError(
                "gates must be saved from a model in one piece, got the part of one process (tensor parallelism); copy "
                "the folder that they came from"
            )
        others, self.base_model._others = self.base_model._others, None
        try:
            state = kwargs.pop("state_dict", None)
            state = self.state_dict() if state is None else state
            for name in kwargs.get("selected_adapters") or self.peft_config:
                state = in_peft_names(state, name)
            # PEFT would look the base model up on the Hub, to save embeddings of another size with the adapter.
            super().save_pretrained(*args, state_dict=state, **{"save_embedding_layers": False} | kwargs)
        finally:
            self.base_model._others = others

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> nn.Module:
        """Gates take no gradient from inputs, so nothing is prepared."""
        return model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See `SeerModel.forward`."""
        return self.base_model(*args, **kwargs)

    def load_weights(self, folder: Path, modules: dict[int, str]) -> None:
        """Fills the gates from a folder that was checked; ``modules`` names the attention modules there."""
        layers = self.base_model.attachment.layers
        for layer, weights in read_weights(folder, modules).items():
            getattr(layers[layer].module, GATES)["default"].load_state_dict(weights)


def load_gated(model: nn.Module, name: str | Path) -> GatedModel:
    """A model with the saved gates of a folder or Hub repository, frozen.

    Raises:
        ValueError: the gates are not whole or belong to another model; the model is as it was.
    """
    folder = gate_folder(name)
    config = SeerConfig.from_pretrained(str(folder))
    modules = check_folder(folder, config)
    config.inference_mode = True
    gated = GatedModel(model, config)
    if config.layers != list(modules):
        take_off(transformers_model(model))
        raise ValueError(f"gates must be finite in every layer, {config.layers}, got those of {list(modules)} alone")
    gated.load_weights(folder, modules)
    return gated
