"""Published gates of the official implementation, against the published formula written out."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_model, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM

import seerattn
from seerattn import AttnGateConfig, Threshold, TopK, load_official_gates
from seerattn.hf.state import layer_states
from seerattn.selection.selector import AttentionContext

HEADS, KV_HEADS, DIM, LAYERS, BLOCK = 4, 2, 32, 2, 64
LAYOUTS = {
    "published": {"seerattn_gate_type": "Qavg_Kmaxminavg", "seerattn_gate_hidden_size": 32},
    "first-version": {"seerattn_gate_type": "Qavg_Kmaxmin", "seerattn_gate_hidden_size": 32},
    "double": {"seerattn_gate_type": "Qavg_Kavg", "seerattn_gate_hidden_size": 32, "seerattn_gate_force_double": True},
    "two-q-poolings": {"seerattn_gate_type": "Qmaxavg_Kminavg", "seerattn_gate_hidden_size": 32},
    "narrow": {"seerattn_gate_type": "Qavg_Kmaxminavg", "seerattn_gate_hidden_size": 16},
}


def has_q_linear(layout: str) -> bool:
    return layout in ("double", "two-q-poolings", "narrow")


def write(folder: Path, layout: str, dtype: torch.dtype = torch.float32, **fields) -> dict[str, Tensor]:
    """A folder as published, with random weights."""
    values = LAYOUTS[layout]
    model = {"hidden_size": 64, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": DIM}
    config = model | {"num_hidden_layers": LAYERS, "base_model": "tiny", "model_type": "llama"} | values | fields
    (folder / "config.json").write_text(json.dumps(config))
    q_part, k_part = values["seerattn_gate_type"][1:].split("_K")
    width = values["seerattn_gate_hidden_size"]
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}.self_attn.attn_gate.mask_linear"
        shape = (KV_HEADS if has_q_linear(layout) else HEADS, len(k_part) // 3 * DIM, width)
        weights[f"{prefix}_k.weight"] = torch.randn(shape, generator=generator).to(dtype)
        if has_q_linear(layout):
            shape = (HEADS, len(q_part) // 3 * DIM, width)
            weights[f"{prefix}_q.weight"] = torch.randn(shape, generator=generator).to(dtype)
    torch.save(weights, folder / "attn_gate_weights.pth")
    return weights


def pool(x: Tensor, names: str) -> Tensor:
    """Pools ``[B, S, H, D]`` over blocks with ceil mode, names concatenated in their order."""
    parts = []
    for start in range(0, len(names), 3):
        blocks = x.split(BLOCK, dim=1)
        kind = names[start : start + 3]
        reduce = {"avg": lambda b: b.mean(1), "max": lambda b: b.amax(1), "min": lambda b: b.amin(1)}[kind]
        parts.append(torch.stack([reduce(b) for b in blocks], 1))
    return torch.cat(parts, -1)


def rotate(x: Tensor) -> Tensor:
    """Llama's rotation of ``[B, N, H, DG]`` at the token position of each block's first token."""
    width = x.shape[-1]
    frequency = 10000.0 ** (-torch.arange(0, width, 2).float() / width)
    angle = torch.arange(0, x.shape[1] * BLOCK, BLOCK)[:, None] * frequency
    cos, sin = (torch.cat((f(angle), f(angle)), -1)[None, :, None] for f in (torch.cos, torch.sin))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def published_scores(layout: str, weights: dict[str, Tensor], layer: int, q: Tensor, k: Tensor) -> Tensor:
    """Causal block scores ``[B, H, N, N]`` from ``q [B, S, H, D]`` and ``k [B, S, HKV, D]`` before RoPE."""
    q_names, k_names = LAYOUTS[layout]["seerattn_gate_type"][1:].split("_K")
    prefix = f"model.layers.{layer}.self_attn.attn_gate.mask_linear"
    q, k = pool(q, q_names), pool(k, k_names)
    k_weight = weights[f"{prefix}_k.weight"].float()
    if has_q_linear(layout):
        q = torch.einsum("bnhi,hio->bnho", q, weights[f"{prefix}_q.weight"].float())
        k = torch.einsum("bnhi,hio->bnho", k, k_weight).repeat_interleave(HEADS // KV_HEADS, 2)
    else:
        k = torch.einsum("bnhi,hio->bnho", k.repeat_interleave(HEADS // KV_HEADS, 2), k_weight)
    scores = torch.einsum("bnho,bmho->bhnm", rotate(q), rotate(k)) / q.shape[-1] ** 0.5
    return scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_block_scores_match_the_published_formula(tmp_path: Path, layout: str, dtype: torch.dtype) -> None:
    weights = write(tmp_path, layout, dtype)
    model = load_official_gates(tmp_path, tiny_model("llama"))
    generator = torch.Generator().manual_seed(2)
    q, k = (torch.randn(2, 300, heads, DIM, generator=generator) for heads in (HEADS, KV_HEADS))
    for state in layer_states(model):
        scores = state.gate(q.transpose(1, 2), k.transpose(1, 2))
        expected = published_scores(layout, weights, state.layer, q, k)
        seen = expected.isfinite()
        assert torch.equal(scores.isfinite(), seen)
        assert (scores - expected)[seen].abs().max() < 1e-5 * expected[seen].abs().max()


def test_published_gates_see_the_projections_of_the_model(tmp_path: Path) -> None:
    weights = write(tmp_path, "published", seerattn_sparsity_method="nz_ratio", seerattn_nz_ratio=0.5)
    model = load_official_gates(tmp_path, tiny_model("llama"), impl="reference")
    projected, scores = {}, {}
    for side in "qk":
        layer = model.get_base_model().model.layers[0].self_attn
        getattr(layer, f"{side}_proj").register_forward_hook(lambda m, a, out, s=side: projected.update({s: out}))
    state = layer_states(model)[0]
    select = type(state.selector).select

    def watch(selector, q: Tensor, k: Tensor, context: AttentionContext):
        if context.layer == 0:
            scores["got"] = selector.gate(context.unrotate(q, 0), context.unrotate(k, 0))
        return select(selector, q, k, context)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(state.selector), "select", watch)
        model(input_ids=tokens(1, 300))
    q, k = (projected[side].unflatten(-1, (-1, DIM)) for side in "qk")
    expected = published_scores("published", weights, 0, q, k)
    seen = expected.isfinite()
    assert (scores["got"] - expected)[seen].abs().max() < 1e-4 * expected[seen].abs().max()


def test_configuration_and_selection_are_read(tmp_path: Path) -> None:
    write(tmp_path, "published", seerattn_threshold=2e-3)
    gates = load_official_gates(tmp_path)
    assert gates.config == AttnGateConfig.paper(gate_dim=32)
    assert gates.base_model == "tiny"
    assert gates.policy == Threshold(threshold=2e-3, sink_blocks=0, last_rows_dense=2)
    write(
        tmp_path,
        "published",
        seerattn_sparsity_method="nz_ratio",
        seerattn_nz_ratio=0.1,
        seerattn_last_block_dense=False,
    )
    assert load_official_gates(tmp_path).policy == TopK(density=0.1, sink_blocks=0)
    write(tmp_path, "published")
    assert load_official_gates(tmp_path).policy is None


def test_read_gates_save_and_load_as_our_own(tmp_path: Path) -> None:
    write(tmp_path, "published", seerattn_threshold=0.2)
    tiny_model("llama").save_pretrained(tmp_path / "base")
    plain, other = (AutoModelForCausalLM.from_pretrained(tmp_path / "base") for _ in range(2))
    ids = tokens(1, 300)
    dense = plain(input_ids=ids).logits
    model = load_official_gates(tmp_path, plain, impl="reference")
    model.save_pretrained(tmp_path / "own")
    again = seerattn.attach(other, tmp_path / "own", impl="reference")
    assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)
    assert not torch.equal(model(input_ids=ids).logits, dense)


def spoil(name: str, folder: Path) -> None:
    path = folder / "attn_gate_weights.pth"
    weights = torch.load(path, weights_only=True)
    first = next(iter(weights))
    if name == "missing":
        del weights[first]
    elif name == "extra":
        weights["model.layers.9.self_attn.attn_gate.mask_linear_k.weight"] = torch.zeros(1)
    elif name == "shape":
        weights[first] = weights[first][:, :-1]
    elif name == "not-tensors":
        weights = [1, 2]
    torch.save(weights, path)
    if name == "truncated":
        path.write_bytes(path.read_bytes()[:500])
    elif name == "code":
        torch.save(F.relu, path)
    elif name == "no-weights":
        path.unlink()
    elif name == "no-config":
        (folder / "config.json").unlink()
    elif name == "gate-type":
        write(folder, "published")
        values = json.loads((folder / "config.json").read_text()) | {"seerattn_gate_type": "Qsum_Kavg"}
        (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing", "1 missing"),
        ("extra", "1 unknown"),
        ("shape", "mask_linear_k.weight must be"),
        ("not-tensors", "dictionary of tensors"),
        ("truncated", "whole file of plain tensors"),
        ("code", "whole file of plain tensors"),
        ("no-weights", "must hold attn_gate_weights.pth"),
        ("no-config", "must be a folder with config.json"),
        ("gate-type", "must look like"),
    ],
)
def test_reading_rejects_what_is_not_whole(tmp_path: Path, name: str, reason: str) -> None:
    write(tmp_path, "published")
    spoil(name, tmp_path)
    with pytest.raises(ValueError, match=reason):
        load_official_gates(tmp_path)


def test_gates_of_the_hub_are_those_of_the_folder_that_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = tmp_path / "hub" / "prefill"
    hub.mkdir(parents=True)
    weights = write(hub, "published")
    asked = []

    def download(name: str, file: str, *, subfolder: str | None, revision: str | None) -> str:
        asked.append((name, file, subfolder, revision))
        return str(tmp_path / "hub" / subfolder / file)

    monkeypatch.setattr("seerattn.hf.config.hf_hub_download", download)
    model = load_official_gates("SeerAttention/some-gates", tiny_model("llama"), subfolder="prefill", revision="v1")
    assert asked == [("SeerAttention/some-gates", f, "prefill", "v1") for f in ("config.json", "attn_gate_weights.pth")]
    for state in layer_states(model):
        key = f"model.layers.{state.layer}.self_attn.attn_gate.mask_linear_k.weight"
        assert torch.equal(state.gate.k_weight, weights[key])
    by_folder = load_official_gates(tmp_path / "hub", subfolder="prefill")
    assert torch.equal(by_folder.weights[1]["k_weight"], weights[key]) and len(asked) == 2


def test_a_name_that_is_neither_folder_nor_repository_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(name: str, file: str, **options) -> str:
        raise OSError("no network")

    monkeypatch.setattr("seerattn.hf.config.hf_hub_download", download)
    with pytest.raises(ValueError, match="gates must be a folder or the name of gates on the Hub, got"):
        load_official_gates(tmp_path / "nowhere")


def test_loading_rejects_another_model(tmp_path: Path) -> None:
    write(tmp_path, "published")
    model = tiny_model("llama", num_hidden_layers=3)
    with pytest.raises(ValueError, match="gates must belong to the model"):
        load_official_gates(tmp_path, model)
    assert model.config._attn_implementation == "sdpa" and not layer_states(model)
