"""Blocks of one token of every sequence, scored and chosen in one launch."""

from seerattn.ops.decode_select.api import TokenRule as TokenRule
from seerattn.ops.decode_select.api import select_blocks as select_blocks
from seerattn.ops.decode_select.table import KeyTable as KeyTable
