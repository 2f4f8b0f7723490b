"""Choosing blocks: index lists, policies, the selector protocol."""

from seerattn.selection.block_indices import BlockIndices as BlockIndices
from seerattn.selection.budgets import HeadBudgets as HeadBudgets
from seerattn.selection.decode_blocks import DecodeBlocks as DecodeBlocks
from seerattn.selection.decode_selector import DecodeSelector as DecodeSelector
from seerattn.selection.policies import KeepAll as KeepAll
from seerattn.selection.policies import Policy as Policy
from seerattn.selection.policies import Threshold as Threshold
from seerattn.selection.policies import TokenBudget as TokenBudget
from seerattn.selection.policies import TopK as TopK
from seerattn.selection.policies import TopP as TopP
from seerattn.selection.policies import policy_from_dict as policy_from_dict
from seerattn.selection.selector import AttentionContext as AttentionContext
from seerattn.selection.selector import RotaryTables as RotaryTables
from seerattn.selection.selector import Selector as Selector
