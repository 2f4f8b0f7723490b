"""A method whose rules by head a search found before."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from seerattn.methods.head_rules import HeadRules, describe_model
from seerattn.methods.method import Method
from seerattn.options import option


@dataclass(frozen=True, kw_only=True)
class PlannedMethod(Method):
    """A method that cannot run without the file of rules that its search makes."""

    plan: Path = option(help="File that seerattn search made.")

    @cached_property
    def rules(self) -> HeadRules:
        """What the file holds."""
        return HeadRules.load(self.plan, method=self.id)

    def check_model(self, config: Any) -> None:
        self.rules.check(describe_model(config))
