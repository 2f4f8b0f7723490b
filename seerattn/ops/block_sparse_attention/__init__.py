"""Causal attention over listed key blocks."""

from seerattn.ops.block_sparse_attention.api import block_sparse_attention as block_sparse_attention
