"""Dense causal attention with its block maps: the targets of gates and the yardsticks of recall."""

from seerattn.ops.pooled_attention.api import block_mass as block_mass
from seerattn.ops.pooled_attention.api import pooled_attention as pooled_attention
from seerattn.ops.pooled_attention.api import pooled_targets as pooled_targets
