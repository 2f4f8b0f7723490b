"""What vLLM calls in each of its processes: our backends stand where it looks its own up."""

from __future__ import annotations


def register() -> None:
    """Puts `seerattn.vllm.backends` in the place of vLLM's attention backends; safe to call several times.

    Without options each backend is the one that it was: see `seerattn.vllm.backends`.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    for member in AttentionBackendEnum:
        if member.value and not member.is_overridden():
            register_backend(member, f"seerattn.vllm.backends.{member.name}")
