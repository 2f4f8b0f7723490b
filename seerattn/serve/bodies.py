"""What clients send, in the form of OpenAI's interface. What is not known, or not done, is refused by name."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

_Stop = str | list[str] | None


class StreamOptions(BaseModel):
    """How an answer streams."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class Common(BaseModel):
    """What both kinds of requests have; `density` and `top_k` are ours."""

    model_config = ConfigDict(extra="forbid")
    model: str
    density: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    stop: _Stop = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    # Known by clients and not done here: as much of them as changes nothing.
    n: Literal[1] = 1
    frequency_penalty: Literal[0, 0.0] = 0
    presence_penalty: Literal[0, 0.0] = 0
    user: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer."""
        found = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(one for one in found if one)


class Completion(Common):
    """Body of /v1/completions."""

    prompt: str | list[int]
    echo: Literal[False] = False
    best_of: Literal[1] = 1
    logprobs: None = None
    suffix: None = None


class Chat(Common):
    """Body of /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: Literal[False] | None = None
