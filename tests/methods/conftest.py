"""A tiny model with two sets of gates, and documents for it."""

from gated_model import documents, gate_folders, model

__all__ = ["documents", "gate_folders", "model"]
