"""Causal attention over listed key blocks of sequences whose keys and values lie in pages."""

from seerattn.ops.paged_attention.api import paged_attention as paged_attention
