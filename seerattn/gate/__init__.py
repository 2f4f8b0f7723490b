"""The gate: pooling, projection, block RoPE, block scores."""

from seerattn.gate.attn_gate import AttnGate as AttnGate
from seerattn.gate.config import AttnGateConfig as AttnGateConfig
from seerattn.gate.rope import Pairing as Pairing
