"""Attention of one token of every sequence over listed key blocks, or over all."""

from seerattn.ops.decode_attention.api import decode_attention as decode_attention
