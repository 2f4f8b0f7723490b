"""Rules of heads: one rule for every head of one model, as an offline search found them, kept in a JSON file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seerattn.outputs import check_output
from seerattn.results.environment import fingerprint
from seerattn.saving import write_whole
from seerattn.texts import parse_json, short

Rule = dict[str, Any]

_FORMAT = 1
_SIZES = ("layers", "heads", "kv_heads", "head_dim")


@dataclass(frozen=True)
class HeadRules:
    """Rules by layer and head, the model that they are for, and how they were found.

    Attributes:
        method: whose rules these are, "minference" for example; only that method reads them.
        model: "layers", "heads", "kv_heads" and "head_dim" of the model, and under "weights" a fingerprint of its
            weights where that is known; see `describe_model`.
        rules: ``rules[layer][head]``, plain JSON values; an empty list for a layer without full attention.
        made: everything that identifies the search, plain JSON values.

    Raises:
        ValueError: the sizes of the model are missing, or the rules are not of its layers and heads.
    """

    method: str
    model: dict[str, Any]
    rules: list[list[Rule]]
    made: dict[str, Any]

    def __post_init__(self) -> None:
        for name, value, kind in (
            ("method", self.method, str),
            ("model", self.model, dict),
            ("rules", self.rules, list),
            ("made", self.made, dict),
        ):
            if not isinstance(value, kind):
                raise ValueError(f"{name} of a plan must be of type {kind.__name__}, got {short(value)}")
        missing = [name for name in _SIZES if not _is_size(self.model.get(name))]
        if missing:
            raise ValueError(f"model of a plan must have whole numbers {', '.join(_SIZES)}, got none for {missing}")
        if not isinstance(self.model.get("weights", ""), str):
            raise ValueError(f"weights of a plan's model must be text, got {short(self.model['weights'])}")
        if len(self.rules) != self.model["layers"]:
            raise ValueError(f"rules must be of {self.model['layers']} layers, got {len(self.rules)}")
        for layer, heads in enumerate(self.rules):
            whole = isinstance(heads, list) and len(heads) in (0, self.model["heads"])
            if not whole or not all(isinstance(rule, dict) for rule in heads):
                raise ValueError(
                    f"rules of a layer must be an object for each of {self.model['heads']} heads, "
                    f"got {short(heads)} in layer {layer}"
                )

    @property
    def digest(self) -> str:
        """Short hash of method and rules, which tells plans apart in results."""
        text = json.dumps([self.method, self.rules], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def check(self, model: dict[str, Any]) -> None:
        """Refuses another model than the plan's.

        Args:
            model: as of `describe_model`; weights count only where both sides know them.

        Raises:
            ValueError: names what differs.
        """
        differing = [
            f"{name} {self.model[name]}, not {model[name]}"
            for name in (*_SIZES, "weights")
            if None not in (self.model.get(name), model.get(name)) and self.model[name] != model[name]
        ]
        if differing:
            raise ValueError(
                f"a plan must be of the model that it is used with, got one for {'; '.join(differing)}; "
                "search a plan on this model"
            )

    def save(self, path: Path | str) -> None:
        """Writes the plan, whole or not at all, one head a line; the folder is made if it is missing.

        Raises:
            ValueError: the file holds something else than a plan.
            OSError: it could not be written; what was there before is as it was.
        """
        path = Path(path)
        check_output(path, "output", "a plan", HeadRules.load)
        path.parent.mkdir(parents=True, exist_ok=True)
        layers = [",\n".join(f"      {json.dumps(rule, allow_nan=False)}" for rule in heads) for heads in self.rules]
        rules = ",\n".join(f"    [\n{heads}\n    ]" if heads else "    []" for heads in layers)
        head = {"plan": _FORMAT, "method": self.method, "model": self.model, "made": self.made}
        lines = [f"  {json.dumps(key)}: {json.dumps(value, allow_nan=False)}," for key, value in head.items()]
        write_whole(path, "{\n" + "\n".join(lines) + f'\n  "rules": [\n{rules}\n  ]\n}}\n')

    @classmethod
    def load(cls, path: Path | str, *, method: str | None = None, model: dict[str, Any] | None = None) -> HeadRules:
        """Reads a plan.

        Args:
            path: the file.
            method: whose plan it must be, if given.
            model: the model that it must be for, if given; see `check`.

        Raises:
            ValueError: the file is no plan or a damaged one, or of another method or another model.
            OSError: there is no such file.
        """
        try:
            values = parse_json(Path(path).read_text(encoding="utf-8"))
            if not isinstance(values, dict) or values.get("plan") != _FORMAT:
                raise ValueError(f'it must be an object with "plan": {_FORMAT}, got {short(values)}')
            plan = cls(*(values.get(name) for name in ("method", "model", "rules", "made")))
        except ValueError as error:
            raise ValueError(
                f"plan must be a whole file that a search wrote, got {path}: {error}; search it again"
            ) from error
        if method is not None and plan.method != method:
            raise ValueError(f"plan must be one of {method}, got one of {plan.method} in {path}")
        if model is not None:
            plan.check(model)
        return plan


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def describe_model(config: Any) -> dict[str, Any]:
    """What a file of rules keeps of a model; the weights only where they lie in a folder.

    Args:
        config: the configuration of a transformers model.
    """
    text, folder = config.get_text_config(), getattr(config, "_name_or_path", "")
    heads = text.num_attention_heads
    sizes = {
        "layers": text.num_hidden_layers,
        "heads": heads,
        "kv_heads": getattr(text, "num_key_value_heads", None) or heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
    }
    return sizes | ({"weights": fingerprint(folder)} if folder and Path(folder).is_dir() else {})
