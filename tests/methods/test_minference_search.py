"""The search against fp64 re-computation, on attention whose pattern is planted, and on models."""

import hashlib
import json
import math
from dataclasses import replace

import pytest
import torch
from tiny_corpus import tiny_tokenizer
from tiny_models import tiny_model

from seerattn.data.windows import cut_windows, digest
from seerattn.hf.capture import AttentionCall
from seerattn.hf.eval_model import EvalModel
from seerattn.methods.head_rules import describe_model
from seerattn.methods.minference import MInference
from seerattn.methods.minference.patterns import Estimate, HeadRule
from seerattn.methods.minference.search import (
    PAPER_SPACE,
    REPOSITORY_LINES,
    MInferenceSearch,
    draw_windows,
    fit_scales,
    read_official,
    recalled_mass,
)
from seerattn.methods.minference.search import _PaperSearch as PaperSearch
from seerattn.methods.minference.search import _RepositorySearch as RepositorySearch
from seerattn.selection import AttentionContext

SEARCH = MInferenceSearch(density=0.3, context=400, windows=2, block_q=32, block_k=32)
REPOSITORY = replace(SEARCH, variant="repository", density=None)
D = 64


def probabilities(q, k, scale: float, softcap=None, sinks=None) -> torch.Tensor:
    """Causal attention, fp64 ``[H, T, T]``."""
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = (q.double() @ k.transpose(-1, -2) * scale)[0]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    tokens = logits.shape[-1]
    logits = logits.masked_fill(torch.ones(tokens, tokens, dtype=torch.bool).triu(1), -torch.inf)
    if sinks is not None:
        logits = torch.cat((logits, sinks.double().view(-1, 1, 1).expand(-1, tokens, 1)), -1)
    return logits.softmax(-1)[..., :tokens]


def call_of(q, k, seed: int = 0, **logits) -> AttentionCall:
    """The call of a layer, with random values and the output of dense attention."""
    v = torch.randn(k.shape, generator=torch.Generator().manual_seed(seed))
    values = v.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    out = (probabilities(q, k, D**-0.5, **logits) @ values[0])[None].transpose(1, 2).float()
    context = AttentionContext(0, D**-0.5, **{"softcap": None} | logits, unrotate=lambda x, start: x)
    return AttentionCall(q, k, v, out, context)


def random_call(tokens: int = 400, **logits) -> AttentionCall:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, tokens, D, generator=generator) for heads in (4, 2))
    return call_of(q * 3, k, **logits)


def planted(tokens: int = 1024, block: int = 32) -> AttentionCall:
    """Four heads: first columns and a window; columns; diagonals; blocks that only their own query blocks find.

    In the first three neighbouring keys cancel, so that the mean of a block says nothing about it.
    """
    generator = torch.Generator().manual_seed(5)

    def directions(*shape: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(*shape, D, generator=generator), dim=-1)

    def hot(places: torch.Tensor, channel: int, head: int) -> None:
        k[0, head, places, channel] = 1.0
        k[0, head, (places + 1) % tokens, channel] -= 1.0

    q, k = torch.zeros(1, 4, tokens, D), torch.zeros(1, 4, tokens, D)
    place = torch.arange(tokens)
    angles = place[:, None] / torch.logspace(0.5, 1.3, 16)
    near = torch.cat((angles.cos(), angles.sin()), -1) / 4
    k[0, 0, :, :32] = q[0, 0, :, :32] = near
    hot(torch.arange(0, 32, 2), 40, 0)
    q[0, 0, :, 40] = 1.0
    # The last queries point at far keys, which misleads what trusts them for all queries.
    hot(2 * torch.randperm(350, generator=generator)[:60] + 200, 50, 0)
    q[0, 0, -64:] = 0
    q[0, 0, -64:, 50] = 1.0
    hot((torch.tensor([[3], [9], [15], [21]]) * block + torch.arange(0, 20, 2)).flatten(), 0, 1)
    q[0, 1, :, 0] = 1.0
    k[0, 2] = directions(tokens // 2).repeat_interleave(2, 0) * torch.tensor([1.0, -1.0]).repeat(tokens // 2)[:, None]
    q[0, 2, 391:] = k[0, 2, :-391]
    topics = directions(tokens // block)
    k[0, 3] = topics.repeat_interleave(block, 0)
    seen = [int(torch.randint(row + 1, (1,), generator=generator)) for row in range(tokens // block)]
    q[0, 3] = topics[seen].repeat_interleave(block, 0)
    return call_of(q * 12 * D**0.5, k)


def rules_of(search, call: AttentionCall) -> list[HeadRule]:
    search.see(call)
    return search.rules(call.layer)


def test_paper_search_finds_the_planted_patterns() -> None:
    found = rules_of(PaperSearch(replace(SEARCH, density=0.2)), planted())
    assert [rule.pattern for rule in found] == ["a_shape", "vertical_slash", "vertical_slash", "block_sparse"]
    columns, diagonals = found[1], found[2]
    assert columns.columns > columns.offsets and diagonals.columns < diagonals.offsets


def test_repository_search_finds_them_and_makes_all_of_them_vertical_slash() -> None:
    best = recalled_mass(planted()).argmax(0).tolist()
    assert best[1] == 4 and 1 <= best[2] <= 4 and best[3] == 5
    found = rules_of(RepositorySearch(replace(REPOSITORY, context=1024)), planted())
    assert {rule.pattern for rule in found} == {"vertical_slash"}
    assert (found[1].columns, found[1].offsets) == (3500, 100)
    assert (found[3].columns, found[3].offsets) == (1000, 6096)
    assert {rule.scale for rule in found} == {1024 / 30_000}


@pytest.mark.parametrize(("candidate", "sizes"), [(0, (100, 800)), (2, (100, 750)), (5, (1000, 6096))])
def test_repository_search_rewrites_its_winners(candidate, sizes) -> None:
    search = RepositorySearch(replace(REPOSITORY, context=60_000))
    recall = torch.zeros(6, 2, dtype=torch.float64)
    recall[candidate] = 0.5
    # Among equals the first counts.
    recall[:, 1] = 0.7
    search._recalls[0] = [recall]
    assert search.rules(0) == [HeadRule("vertical_slash", *sizes), HeadRule("vertical_slash", 100, 800)]


def masked_output(call: AttentionCall, mask: torch.Tensor, block: int) -> torch.Tensor:
    """fp64 attention over the kept blocks, ``[H, T, D]``."""
    tokens, group = call.query.shape[2], call.query.shape[1] // call.key.shape[1]
    p = probabilities(call.query, call.key, call.scale, call.softcap)
    p = p * mask[0].repeat_interleave(block, -1).repeat_interleave(block, -2)[..., :tokens, :tokens]
    return p / p.sum(-1, keepdim=True) @ call.value.double().repeat_interleave(group, 1)[0]


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_paper_search_takes_the_candidate_of_least_error_at_the_target_density(softcap) -> None:
    call = random_call(softcap=softcap)
    context = AttentionContext(0, call.scale, softcap, lambda x, start: x)
    estimate = Estimate.of(call.query, call.key, context, block_q=32, block_k=32)
    dense = probabilities(call.query, call.key, call.scale, softcap)
    dense = dense @ call.value.double().repeat_interleave(2, 1)[0]
    errors = []
    for candidate in PAPER_SPACE:
        scales = fit_scales(estimate, candidate, 0.3)
        mask = estimate.mask([replace(candidate, scale=scale) for scale in scales])
        errors.append((masked_output(call, mask, 32) - dense).flatten(1).norm(dim=1))
    errors = torch.stack(errors)
    found = [PAPER_SPACE.index(replace(rule, scale=1.0)) for rule in rules_of(PaperSearch(SEARCH), call)]
    # Candidates that keep the same blocks are equal but for rounding.
    assert (errors[found, range(4)] <= errors.amin(0) * (1 + 1e-5)).all()
    assert (errors.amax(0) > errors.amin(0) * 1.005).all()


@pytest.mark.parametrize("candidate", PAPER_SPACE, ids=lambda rule: f"{rule.pattern}-{rule.columns}")
@pytest.mark.parametrize("density", [0.2, 0.55, 0.97])
def test_fitted_scales_realise_the_nearest_density_that_a_scale_can(candidate, density) -> None:
    call = random_call(700)
    context = AttentionContext(0, call.scale, None, lambda x, start: x)
    estimate = Estimate.of(call.query, call.key, context, block_q=32, block_k=32)

    def realised(scales: list[float]) -> torch.Tensor:
        mask = estimate.mask([replace(candidate, scale=scale) for scale in scales])
        return mask[0].sum((-1, -2)).double() / estimate.causal.sum()

    off = (realised(fit_scales(estimate, candidate, density)) - density).abs()
    grid = torch.stack([realised([2.0 ** (x / 40)] * 4) for x in range(-520, 120)])
    assert (off <= (grid - density).abs().amin(0) + 1e-12).all()


def test_search_rejects_a_density_below_the_forced_blocks() -> None:
    with pytest.raises(ValueError, match="density"):
        PaperSearch(replace(SEARCH, density=0.1)).see(random_call())


def test_several_windows_average_errors_and_the_logarithms_of_scales() -> None:
    first, second = random_call(400), random_call(500)
    alone = []
    for call in (first, second):
        search = PaperSearch(SEARCH)
        search.see(call)
        alone.append((search._errors[0][0], search._log_scales[0][0]))
    both = PaperSearch(SEARCH)
    both.see(first)
    both.see(second)
    errors, log_scales = ((alone[0][i] + alone[1][i]) / 2 for i in range(2))
    for head, rule in enumerate(both.rules(0)):
        best = int(errors[:, head].argmin())
        assert replace(rule, scale=1.0) == PAPER_SPACE[best]
        assert rule.scale == pytest.approx(math.exp(float(log_scales[best, head])), rel=1e-5)


@pytest.mark.parametrize("variant", ["plain", "softcap", "sinks"])
def test_recalled_mass_matches_fp64_masks_of_tokens(variant) -> None:
    logits = {"softcap": 2.0} if variant == "softcap" else {}
    logits |= {"sinks": torch.tensor([1.0, -1.0, 0.5, 2.0])} if variant == "sinks" else {}
    call = random_call(601, **logits)
    found, tokens = recalled_mass(call), 601
    scale, place = tokens / 30_000, torch.arange(tokens)
    p = probabilities(call.query, call.key, call.scale, **logits)
    distance, causal = place[:, None] - place, place[:, None] >= place
    late = p[:, int(2500 * scale) :]
    expected = torch.zeros(6, 4, dtype=torch.float64)
    for head in range(4):
        last = p[head, -64:]
        vertical = last.sum(0)
        slash = torch.stack([last[distance[-64:] == offset].sum() for offset in range(tokens)])
        for i, rule in enumerate(REPOSITORY_LINES):
            sizes = [math.ceil(size * scale) for size in (rule.columns, rule.offsets)]
            if rule.pattern == "a_shape":
                columns, offsets = (set(range(size)) for size in sizes)
            else:
                forced = math.ceil(30 * scale)
                columns, offsets = (
                    set(sorted(range(tokens), key=lambda x, s=scores: (x >= forced, -float(s[x])))[:size])
                    for scores, size in ((vertical, sizes[0]), (slash, sizes[1]))
                )
            kept = (
                torch.tensor([j in columns for j in range(tokens)])
                | torch.tensor([o in offsets for o in range(tokens)])[distance.clamp(min=0)]
            )
            expected[i, head] = (late[head] * (kept & causal)[-late.shape[1] :]).sum() / late.shape[1]
        blocks = -(-tokens // 32)
        means = [
            torch.stack([x[h].double()[b * 32 : (b + 1) * 32].mean(0) for b in range(blocks)])
            for x, h in ((call.query[0], head), (call.key[0], head // 2))
        ]
        score = (means[0] @ means[1].T).masked_fill(torch.ones(blocks, blocks).triu(1) > 0, -torch.inf)
        kept = torch.zeros(blocks, blocks, dtype=torch.bool)
        kept.scatter_(-1, score.topk(blocks // 8, dim=-1).indices, True)
        kept = kept.repeat_interleave(32, 0).repeat_interleave(32, 1)[:tokens, :tokens] & causal
        expected[5, head] = (late[head] * kept[-late.shape[1] :]).sum() / late.shape[1]
    # fp32 logits of this size are off by less than 1e-5, and so are their shares.
    assert torch.allclose(found, expected, rtol=2e-5, atol=0)


def test_recalled_mass_in_strips_matches_one_piece(monkeypatch) -> None:
    call = random_call(500)
    whole = recalled_mass(call)
    monkeypatch.setattr("seerattn.methods.minference.search._STRIP_ELEMENTS", {"cpu": 4 * 500 * 77})
    assert torch.allclose(whole, recalled_mass(call), rtol=1e-6)


@pytest.mark.parametrize("variant", ["paper", "repository"])
def test_search_of_a_model_reports_the_density_that_its_plan_realises(variant, model, documents, tmp_path) -> None:
    search = SEARCH if variant == "paper" else REPOSITORY
    steps = []

    def progress(description: str, total: int):
        steps.append((description, total))
        return steps.append

    plan = search.run(model, documents, progress=progress)
    assert steps == [("searching", 2), 1, 1, ("measuring density", 2), 1, 1]
    assert plan.model == describe_model(model.model.config)
    assert [len(heads) for heads in plan.rules] == [4, 4]
    found = plan.made["found"]
    options = {"variant": variant, "density": 0.3 if variant == "paper" else None, "context": 400, "windows": 2}
    options |= {"seed": 0, "block_q": 32, "block_k": 32, "data": digest(documents), "dtype": "float32"}
    assert {name: value for name, value in plan.made.items() if name != "found"} == options
    assert search.made(model, documents) == options
    plan.save(tmp_path / "plan.json")
    method = MInference(plan=tmp_path / "plan.json", block_q=32, block_k=32)
    method.check_model(model.model.config)
    at, densities = method.selectors().at(1.0), []
    windows = draw_windows(cut_windows(documents, context=400, count=None, bos_token_id=1), 2, 0)
    model.observe(
        windows, lambda q, k, context: densities.append(at(context.layer).select(q, k, context).density().mean())
    )
    assert len(densities) == 4
    assert found["density"] == pytest.approx(float(torch.stack(densities).mean()), abs=1e-6)
    assert sum(found["heads"].values()) == 8
    assert 0 < found["token_density"] <= found["density"] <= 1
    if variant == "paper":
        assert found["density"] == pytest.approx(0.3, abs=0.03)
        assert search.run(model, documents) == plan


def test_search_leaves_out_sliding_window_layers_and_leaves_the_model_as_it_was(documents, tmp_path) -> None:
    model = tiny_model("gemma2")
    ids = torch.tensor([documents[0][:400]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
    plan = replace(SEARCH, windows=1).run(EvalModel(model, tiny_tokenizer(), name="hybrid"), documents)
    assert [len(heads) for heads in plan.rules] == [0, 4]
    plan.save(tmp_path / "plan.json")
    assert MInference(plan=tmp_path / "plan.json").selectors().at(1.0)(0) is None
    with torch.no_grad():
        assert torch.equal(before, model(input_ids=ids).logits)


def test_windows_are_drawn_by_the_seed(documents) -> None:
    windows = cut_windows(documents, context=60, count=None)
    drawn = [draw_windows(windows, 5, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(window in windows for window in drawn[2]) and len(set(map(id, drawn[2]))) == 5
    for count in (0, len(windows) + 1):
        with pytest.raises(ValueError, match="windows"):
            draw_windows(windows, count, 0)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"variant": "fast"}, "variant"),
        ({"variant": "repository"}, "density"),
        ({"density": 1.0}, "density"),
        ({"density": 0.0}, "density"),
        ({"windows": 0}, "windows"),
        ({"block_k": 48}, "block_k"),
        ({"official": "none.json"}, "official"),
    ],
)
def test_search_rejects_what_no_search_can_do(values, named) -> None:
    with pytest.raises(ValueError, match=named):
        replace(SEARCH, **values)


def test_search_of_the_paper_scales_candidates_to_a_fifth_where_nothing_is_said() -> None:
    assert MInferenceSearch().density == 0.2 and MInferenceSearch(variant="repository").density is None


MODEL = {"layers": 2, "heads": 3, "kv_heads": 3, "head_dim": 32}
OFFICIAL = [
    {"0": ["vertical_and_slash", 1000, 6096, 0.33], "1": ["stream_llm", 100, 800, 0.9], "2": ["block_sparse", 8, 1, 1]},
    {str(head): ["vertical_and_slash", 3500, 100, 1.0] for head in range(3)},
]


def test_official_plan_is_read_as_rules(tmp_path) -> None:
    path = tmp_path / "Some_Model.json"
    path.write_text(json.dumps(OFFICIAL))
    plan = read_official(path, MODEL)
    first = [
        HeadRule("vertical_slash", 1000, 6096),
        HeadRule("a_shape", 100, 800),
        HeadRule("block_sparse", tokens=6400),
    ]
    assert [[HeadRule.from_dict(rule) for rule in heads] for heads in plan.rules] == [
        first,
        [HeadRule("vertical_slash", 3500, 100)] * 3,
    ]
    assert (plan.method, plan.model) == ("minference", MODEL)
    content = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    assert plan.made == {"variant": "official", "source": "Some_Model.json", "content": content}
    search = MInferenceSearch(official=path)
    assert not search.needs_text
    other = tiny_model("llama", num_attention_heads=3, num_key_value_heads=3, hidden_size=96)
    model = EvalModel(other, tiny_tokenizer(), name="tiny")
    assert search.run(model, []) == plan and search.made(model, []) == plan.made


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(OFFICIAL[:1]), "1 of 3"),
        (json.dumps([OFFICIAL[0], {"0": OFFICIAL[1]["0"]}]), "layers"),
        (json.dumps([{"0": OFFICIAL[1]["0"]}] * 2), "2 of 1"),
        (json.dumps([OFFICIAL[0], {"0": ["dense", 1, 1, 1]}]), "'dense'"),
        (json.dumps([OFFICIAL[0], {"0": ["stream_llm", 100, 800]}]), "official plan"),
        (json.dumps([OFFICIAL[0], {"0": ["stream_llm", "many", 800, 1]}]), "columns"),
        (json.dumps([OFFICIAL[0], {"one": ["stream_llm", 100, 800, 1]}]), "official plan"),
        (json.dumps({"layers": 3}), "official plan"),
        ("[]", "0 of 0"),
        ("[{", "official plan"),
    ],
)
def test_official_plan_rejects_other_models_and_other_files(tmp_path, text, message) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_official(tmp_path / "plan.json", MODEL)
