"""Gate queries of single tokens by one kernel: what is written out here in fp64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from seerattn import AttnGate, AttnGateConfig
from seerattn.gate.rope import Pairing
from seerattn.ops.gate_query import gate_queries
from seerattn.selection.selector import RotaryTables
from tests.gate.test_attn_gate import FORMS

pytest.importorskip("seerattn.ops.gate_query.triton_one")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
H, HKV = 6, 2
# Head dim, and how the model rotates: width, whether neighbours, columns from pair to pair.
ROTATIONS = {
    "halves": (48, RotaryTables(width=48)),
    "part": (40, RotaryTables(width=16)),
    "neighbours": (32, RotaryTables(width=32, interleaved=True, column_step=2)),
    "part neighbours": (32, RotaryTables(width=16, interleaved=True)),
    "none": (32, RotaryTables()),
}


def make(config: AttnGateConfig, dim: int, pairing: Pairing | None = None) -> AttnGate:
    torch.manual_seed(0)
    width = config.gate_dim or dim
    inv_freq = 1e4 ** -(torch.arange(0, width, 2) / width) if config.rope else None
    sizes = {"num_heads": H, "num_kv_heads": HKV, "head_dim": dim}
    gate = AttnGate(replace(config, init="normal"), **sizes, inv_freq=inv_freq, pairing=pairing)
    for norm in (gate.q_norm, gate.k_norm):
        if hasattr(norm, "weight"):
            torch.nn.init.normal_(norm.weight, 1.0, 0.3)
    return gate


def rotated(q: Tensor, form: RotaryTables, positions: Tensor, scale: float = 1.2) -> tuple[Tensor, RotaryTables]:
    """Queries ``[B, H, D]`` after RoPE by fp64 tables with a factor, as YaRN has one, and the tables in fp32."""
    if not form.width:
        return q, form
    pairs = form.width // 2
    angle = positions.double()[:, None] * 1e4 ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    turned = q.clone()
    first = slice(0, form.width, 2) if form.interleaved else slice(0, pairs)
    second = slice(1, form.width, 2) if form.interleaved else slice(pairs, form.width)
    turned[..., first] = q[..., first] * cos[:, None] - q[..., second] * sin[:, None]
    turned[..., second] = q[..., second] * cos[:, None] + q[..., first] * sin[:, None]
    columns = [x.repeat_interleave(form.column_step, 1)[:, None].float() for x in (cos, sin)]
    return turned, replace(form, cos=columns[0].to(DEVICE), sin=columns[1].to(DEVICE))


def written_out(gate: AttnGate, q: Tensor, lengths: list[int]) -> Tensor:
    """Of queries ``[B, H, D]`` before RoPE: a token alone is what every pooling makes of it."""
    config, found = gate.config, q.repeat(1, 1, len(gate.config.q_pooling))
    if gate.q_weight is not None:
        found = found.reshape(len(q), gate.mask_heads, 1, -1) @ gate.q_weight.double()
        found = found[:, :, 0]
    if config.qk_norm:
        found = found / (found.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gate.q_norm.weight.double()
    if gate.inv_freq is None:
        return found
    position = torch.tensor([(max(n, 1) - 1) // config.q_size * config.q_size for n in lengths], dtype=torch.float64)
    angle = (position[:, None] * gate.inv_freq.double())[:, None]
    first, second = gate.pairing.split(found)
    return torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), -1)


def held_to_fp64(gate: AttnGate, dim: int, form: RotaryTables, lengths: list[int], heads_apart: bool = False) -> None:
    q = torch.randn(len(lengths), H, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    turned, tables = rotated(q, form, (torch.tensor(lengths) - 1).clamp(min=0))
    given = turned.float().to(DEVICE)
    if heads_apart:
        given = given.transpose(0, 1).contiguous().transpose(0, 1)
    exact = written_out(gate, q, lengths).detach()
    counted = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    found = gate_queries(given, tables, gate.to(DEVICE), lengths=counted).cpu()
    # fp32, and angles of up to 3,000 radians, which fp32 has to 1e-4.
    bound = (2e-4 if gate.config.rope else 1e-5) * float(exact.abs().max())
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=bound)


@pytest.mark.parametrize("name", FORMS)
def test_queries_of_every_form_of_gate_are_those_of_fp64(name: str) -> None:
    held_to_fp64(make(FORMS[name], 32), 32, RotaryTables(width=32), [1, 64, 3001])


@pytest.mark.parametrize("name", ROTATIONS)
@pytest.mark.parametrize("share", ["query_head", "kv_group"])
def test_every_rotation_is_undone_and_taken_over(name: str, share: str) -> None:
    dim, form = ROTATIONS[name]
    pairing = Pairing(form.width, form.interleaved) if form.width else None
    gate = make(AttnGateConfig(share=share), dim, pairing)
    held_to_fp64(gate, dim, form, [65, 7, 3001], heads_apart=True)


@pytest.mark.parametrize("options", [{"rope": False}, {"qk_norm": False}, {"gate_dim": 24}], ids=str)
def test_gates_without_a_part_or_of_another_width_do_so_too(options: dict) -> None:
    held_to_fp64(make(AttnGateConfig(**options), 32), 32, RotaryTables(width=32), [65, 3001])


@pytest.mark.parametrize("share", ["query_head", "kv_group"])
def test_many_sequences_get_what_each_gets_alone(share: str) -> None:
    lengths = [1 + 83 * n % 3001 for n in range(37)]
    held_to_fp64(make(AttnGateConfig(share=share), 72), 72, replace(ROTATIONS["halves"][1], width=72), lengths)


def test_sequences_of_one_length_need_no_tensor_of_lengths() -> None:
    gate = make(AttnGateConfig(share="kv_group"), 32).to(DEVICE)
    q = torch.randn(3, H, 32, device=DEVICE)
    lengths = torch.full((3,), 777, dtype=torch.int32, device=DEVICE)
    found = gate_queries(q, RotaryTables(), gate, tokens=777)
    assert torch.equal(found, gate_queries(q, RotaryTables(), gate, lengths=lengths))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_queries_in_half_precision_are_read_as_they_are(dtype: torch.dtype) -> None:
    gate = make(AttnGateConfig(), 32).to(DEVICE)
    q = torch.randn(2, H, 32, device=DEVICE).to(dtype)
    found = gate_queries(q, RotaryTables(), gate, tokens=300)
    assert torch.equal(found, gate_queries(q.float(), RotaryTables(), gate, tokens=300))


def test_arguments_that_do_not_fit_are_refused() -> None:
    gate, q = make(AttnGateConfig(share="kv_group"), 32).to(DEVICE), torch.zeros(2, H, 32, device=DEVICE)
    tables = RotaryTables(*torch.zeros(2, 3, 1, 32, device=DEVICE), 32)
    odd = torch.zeros(2, H, 64, device=DEVICE)[..., ::2]
    for given, rotary, options, reason in (
        (q[0], RotaryTables(), {}, r"q must be \[B, H, D\] with a multiple of 2 heads"),
        (q[:, :5], RotaryTables(), {}, "with a multiple of 2 heads"),
        (q, tables, {}, r"rotary tables must be \[1 or 2, 1, columns\]"),
        (q, RotaryTables(), {"lengths": torch.zeros(3, dtype=torch.int32, device=DEVICE)}, "lengths"),
        (odd, RotaryTables(), {}, "channels are adjacent"),
    ):
        with pytest.raises(ValueError, match=reason):
            gate_queries(given, rotary, gate, tokens=64, **options)
