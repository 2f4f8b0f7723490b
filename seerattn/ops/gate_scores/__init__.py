"""From queries and keys after RoPE to the blocks that a gate and a rule choose."""

from seerattn.ops.gate_scores.api import KeyVectors as KeyVectors
from seerattn.ops.gate_scores.api import Rule as Rule
from seerattn.ops.gate_scores.api import pool_windows as pool_windows
from seerattn.ops.gate_scores.api import select_blocks as select_blocks
