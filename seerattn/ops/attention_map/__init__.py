"""Block maps of dense causal attention: the targets of gates and the yardsticks of recall."""

from seerattn.ops.attention_map.api import attention_map as attention_map
from seerattn.ops.attention_map.maps import AttentionMaps as AttentionMaps
