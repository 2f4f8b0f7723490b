"""What the plug-in takes from vLLM's layers: rotations, pages as its kernels write them, backends by name."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import engines  # noqa: F401  # skips where there is no vLLM
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attention
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from seerattn import BlockIndices
from seerattn.selection.decode_blocks import DecodeBlocks
from seerattn.selection.selector import RotaryTables
from seerattn.vllm import cuda
from seerattn.vllm.backend import GatedImpl
from seerattn.vllm.cpu import Impl
from seerattn.vllm.pages import Known, Pages
from seerattn.vllm.plugin import register
from seerattn.vllm.rotation import Rotation, prove_rotation, unrotate
from seerattn.vllm.rows import Part
from seerattn.vllm.steps import Steps

# vLLM has warnings of its own.
pytestmark = pytest.mark.filterwarnings("ignore")

LENGTH, D = 4096, 64
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 512,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
}


@pytest.fixture(autouse=True)
def config():
    config = VllmConfig()
    with set_current_vllm_config(config):
        yield config


def rotary(kind: str = "default", dtype: torch.dtype = torch.float32, **more) -> Rotation:
    rope = ROPES[kind]
    length = rope.get("original_max_position_embeddings", LENGTH) if kind == "yarn" else LENGTH
    module = get_rope(D, length, rope_parameters=rope, dtype=dtype, **more)
    return Rotation(module, module.rotary_dim, not module.is_neox_style)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", list(ROPES))
def test_frequencies_read_off_a_table_are_those_of_transformers(kind: str, dtype: torch.dtype) -> None:
    model = LlamaConfig(rope_parameters=ROPES[kind], head_dim=D, max_position_embeddings=LENGTH)
    expected = LlamaRotaryEmbedding(model).inv_freq
    found = rotary(kind, dtype).frequencies(D)
    # Both round in fp32, in another order; the table once more.
    torch.testing.assert_close(found, expected, rtol=4 * torch.finfo(torch.float32).eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", list(ROPES))
def test_vectors_that_transformers_rotated_are_undone_by_the_tables_of_vllm(kind: str, dtype: torch.dtype) -> None:
    model = LlamaConfig(rope_parameters=ROPES[kind], head_dim=D, max_position_embeddings=LENGTH)
    torch.manual_seed(0)
    x, start = torch.randn(1, 3, 50, D, dtype=torch.float64), 2500
    cos, sin = LlamaRotaryEmbedding(model)(x, start + torch.arange(50)[None])
    turned = apply_rotary_pos_emb(x, x, cos, sin)[0].to(dtype)
    found = unrotate(rotary(kind, dtype).tables(LENGTH, x.device))(turned, start)
    # The angle itself is rounded in fp32 at positions of 2500.
    bound = x.abs().max() * (2 * torch.finfo(dtype).eps + 2500 * torch.finfo(torch.float32).eps)
    assert (found - x).abs().max() < bound


@pytest.mark.parametrize("interleaved", [False, True])
def test_part_of_the_channels_is_undone_and_the_others_stay(interleaved: bool) -> None:
    rope = ROPES["default"] | {"partial_rotary_factor": 0.5}
    module = get_rope(D, LENGTH, is_neox_style=not interleaved, rope_parameters=rope, dtype=torch.float32)
    found = Rotation(module, module.rotary_dim, interleaved)
    x = torch.randn(20, 2 * D)
    turned = module.forward_native(torch.arange(7, 27), x.clone(), x.clone())[0]
    back = unrotate(found.tables(LENGTH, x.device))(turned.view(20, 2, D).transpose(0, 1)[None], 7)
    torch.testing.assert_close(back[0].transpose(0, 1).flatten(1), x, atol=1e-5, rtol=0)
    assert found.frequencies(D)[D // 4 :].eq(0).all() and found.frequencies(D)[: D // 4].gt(0).all()
    assert not torch.allclose(turned, x) and torch.equal(
        turned.view(20, 2, D)[..., D // 2 :], x.view(20, 2, D)[..., D // 2 :]
    )


class Around(nn.Module):
    """The module around an attention layer; ``attended`` gets what reaches attention."""

    def __init__(self, attended: list, spoil=None, rotates: bool = True) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(32, 2 * D), nn.Linear(32, D)
        self.rotary_emb = rotary().module
        self.attended, self.spoil, self.rotates = attended, spoil, rotates

    def forward(self, positions: Tensor, hidden_states: Tensor) -> None:
        q, k = self.q(hidden_states), self.k(hidden_states)
        if self.rotates:
            q, k = self.rotary_emb(positions, q, k)
        self.attended.append((q, k) if self.spoil is None else self.spoil(q, k))


def proven(config, **how) -> Rotation | None:
    attended: list[tuple[Tensor, Tensor]] = []
    text = SimpleNamespace(hidden_size=32, rope_parameters=how.pop("rope", ROPES["default"]))
    told = SimpleNamespace(model_config=SimpleNamespace(hf_text_config=text, max_model_len=LENGTH))
    for name in ("compilation_config", "parallel_config"):
        setattr(told, name, getattr(config, name))
    return prove_rotation(Around(attended, **how), "model.layers.0.attn", told, torch.float32, attended)


def test_rotation_is_proven_on_the_layer_itself(config) -> None:
    found = proven(config)
    assert (found.width, found.interleaved) == (D, False)
    # Models hold a rotary module in layers that do not use it.
    assert proven(config, rotates=False) is None


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ({"spoil": lambda q, k: (q * 1.01, k)}, "must go to attention as their rotary module leaves them"),
        ({"spoil": lambda q, k: (q, k.flip(0))}, "must go to attention as their rotary module leaves them"),
        ({"rope": {"rope_type": "longrope"}}, "depends on the position of a token alone, got longrope"),
        ({"rope": {"rope_type": "dynamic"}}, "depends on the position of a token alone, got dynamic"),
    ],
    ids=["scaled behind it", "moved behind it", "longrope", "dynamic"],
)
def test_rotation_that_cannot_be_undone_is_refused(config, how: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        proven(config, **how)


def test_module_that_rotates_by_other_tables_than_it_shows_is_refused(config, monkeypatch) -> None:
    true = Rotation.tables

    def later(self: Rotation, tokens: int, device: torch.device) -> RotaryTables:
        found = true(self, tokens, device)
        return replace(found, cos=found.cos.roll(1, 1), sin=found.sin.roll(1, 1))

    monkeypatch.setattr(Rotation, "tables", later)
    with pytest.raises(ValueError, match="must rotate by its tables"):
        proven(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("isa", "page"), [("vec", 64), ("vec", 128), ("vec16", 16)])
def test_pages_are_read_as_they_were_written_whatever_order_kernels_keep(
    isa: str, page: int, dtype: torch.dtype
) -> None:
    current_platform.import_kernels()
    impl, heads, numbers = object.__new__(Impl), 3, [4, 1, 6]
    impl.attn_type, impl.kv_cache_dtype = "decoder", "auto"
    layer = SimpleNamespace(isa=isa, _k_scale_float=1.0, _v_scale_float=1.0)
    torch.manual_seed(0)
    tokens = 2 * page + 5
    key, value = torch.randn(2, tokens, heads, D).to(dtype).unbind(0)
    cache = torch.full((8, heads, page, 2 * D), torch.nan, dtype=dtype)
    slots = torch.tensor([numbers[at // page] * page + at % page for at in range(tokens)])
    impl.do_kv_cache_update(layer, key, value, cache, slots)
    k, v = (x[:, :, :tokens] for x in impl.read_pages(layer, cache, torch.tensor(numbers)))
    assert torch.equal(k, key.transpose(0, 1)[None]) and torch.equal(v, value.transpose(0, 1)[None])


def test_flash_attention_attends_to_pages_as_to_keys_that_were_gathered() -> None:
    """The layout that vLLM describes, on the CPU: this class was not run in an engine."""
    page, heads, kv_heads, numbers = 16, 4, 2, [4, 1, 6, 2, 9]
    impl = object.__new__(cuda.Impl)
    impl.head_size = D
    torch.manual_seed(0)
    q, cache = torch.randn(30, heads, D), torch.randn(10, kv_heads, page, 2 * D)
    pages = Pages(numbers, torch.tensor(numbers))
    part = Part(0, 30, 45, 100, pages, Known(0, False), None)
    mask = torch.rand(1, heads, 2, 3) < 0.5
    mask[..., 0, 1] = mask[..., 1, 2] = True
    blocks = BlockIndices.from_mask(mask, block_q=32, block_k=32, q_start=45, q_len=30)
    logits = {"scale": 0.2, "softcap": None, "sinks": None}
    k, v = torch.cat([cache[number] for number in numbers], 1)[:, :75].split(D, dim=-1)
    for found, expected in zip(impl.read_pages(None, cache, pages.tensor), (k, v)):
        assert torch.equal(found[0, :, :75], expected)
    found = impl.attend(q, None, cache, part, blocks, logits)
    # Written out: every query sees its own blocks, up to itself.
    at, keys = torch.arange(45, 75), torch.arange(75)
    seen = mask[0][:, at // 32 - 1][..., keys // 32] & (keys <= at[:, None])
    groups = (x.repeat_interleave(2, 0).double() for x in (k, v))
    expected = attention(q.transpose(0, 1).double(), *groups, attn_mask=seen, scale=0.2)
    torch.testing.assert_close(found.transpose(0, 1).double(), expected, atol=1e-5, rtol=0)


def test_flash_attention_decodes_from_pages_as_a_backend_that_gathers_them() -> None:
    page, heads, kv_heads, lengths = 16, 4, 2, [70, 33]
    impl, plain = object.__new__(cuda.Impl), object.__new__(cuda.Impl)
    impl.head_size = plain.head_size = D
    plain.gate = SimpleNamespace(form=SimpleNamespace(k_size=8))
    torch.manual_seed(0)
    q, cache = torch.randn(2, heads, D), torch.randn(12, kv_heads, page, 2 * D)
    tables = torch.randperm(12)[:10].view(2, 5).int()
    steps = Steps([], torch.arange(2), torch.tensor(lengths).int(), tables)
    mask = torch.tensor([[[True, False, True], [True, True, True]], [[False, True, False], [True, True, False]]])
    blocks = DecodeBlocks.from_mask(mask, block_k=32)
    logits = {"scale": 0.2, "softcap": None, "sinks": None}
    found = impl.attend_tokens(q, None, cache, steps, blocks, logits)
    gathered = GatedImpl.attend_tokens(plain, q, None, cache, steps, blocks, logits)
    for row, length in enumerate(lengths):
        k, v = torch.cat([cache[number] for number in tables[row].tolist()], 1)[:, :length].double().split(D, dim=-1)
        seen = mask[row].repeat_interleave(32, 1)[:, :length].repeat_interleave(2, 0)[:, None]
        groups = (x.repeat_interleave(2, 0) for x in (k, v))
        expected = attention(q[row, :, None].double(), *groups, attn_mask=seen, scale=0.2)[:, 0]
        for out in (found, gathered):
            torch.testing.assert_close(out[row].double(), expected, atol=1e-5, rtol=0)


def test_backend_that_cannot_have_gates_is_refused_where_they_are_asked_for_and_is_its_own_without(config) -> None:
    register()
    register()
    member = AttentionBackendEnum.FLEX_ATTENTION
    found = member.get_class()
    assert f"{found.__module__}.{found.__qualname__}" == member.value
    assert found.get_impl_cls().__module__ == found.__module__
    config.additional_config = {"seerattn": {"gates": "g"}}
    with pytest.raises(ValueError, match=r"must be CPU_ATTN or FLASH_ATTN .*, got FLEX_ATTENTION"):
        found.get_impl_cls()
