"""Kascade: the programme against all choices, similarity by loops, and layers that reuse what their anchor chose."""

import itertools
from pathlib import Path

import pytest
import torch
from baseline_calls import CONTEXT, calls
from tiny_corpus import tiny_tokenizer
from tiny_models import tiny_model, tokens

from seerattn import attach, detach
from seerattn.data.windows import cut_windows
from seerattn.hf.eval_model import EvalModel
from seerattn.methods.head_rules import HeadRules
from seerattn.methods.kascade import Kascade
from seerattn.methods.kascade.layers import AnchorSelector, Lists, ReuseSelector, group_mass
from seerattn.methods.kascade.search import KascadeSearch, best_anchors, similarities
from seerattn.selection import TopK


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_programme_finds_the_best_of_all_choices(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    alike = torch.rand(7, 7, generator=generator, dtype=torch.float64).triu().fill_diagonal_(1.0).tolist()

    def value(anchors) -> float:
        return sum(alike[max(a for a in anchors if a <= b)][b] for b in range(7))

    choices = [(0, *others) for others in itertools.combinations(range(1, 7), count - 1)]
    found = best_anchors(alike, count)
    assert len(found) == count and value(found) == pytest.approx(max(map(value, choices)))


def test_similarity_is_the_mass_in_the_blocks_of_another_over_that_in_its_own() -> None:
    mass = torch.rand(3, 2, 9, 9, generator=torch.Generator().manual_seed(0)).tril()
    mass = mass / mass.sum(-1, keepdim=True)
    found = similarities(mass, TopK(density=0.4))
    # Of 45 blocks in 9 rows, 2 a row are 17 and 3 are 24: 17 is nearest to 18.
    for a, b, h, g in itertools.product(range(3), range(3), range(2), range(2)):
        held = own = 0.0
        for row in range(9):

            def best(values, row=row) -> set[int]:
                kept = {0, row}
                for j in sorted(range(row + 1), key=lambda j: -float(values[j])):
                    if len(kept) >= 2:
                        break
                    kept.add(j)
                return kept

            held += sum(float(mass[b, h, row, j]) for j in best(mass[a, g, row]))
            own += sum(float(mass[b, h, row, j]) for j in best(mass[b, h, row]))
        assert float(found[a, b, h, g]) == pytest.approx(held / own if a <= b else 0.0, abs=1e-6)


def test_a_layer_takes_the_blocks_of_the_heads_of_its_anchor_call_by_call() -> None:
    lists = Lists()
    anchor, reuse = AnchorSelector(TopK(density=0.3), lists, 32, 32), ReuseSelector(lists, (1, 0))
    first, second = calls(333, 333), calls(200, 200, seed=1)
    for _ in range(2):  # two forwards
        chosen = [anchor.select(*call, CONTEXT).to_mask() for call in (first, second)]
        for call, mask in zip((first, second), chosen):
            assert torch.equal(reuse.select(*call, CONTEXT).to_mask(), mask[:, [1, 0]])
    with pytest.raises(ValueError, match="layer 1"):
        reuse.select(*first, CONTEXT)
    mass = group_mass(*first, CONTEXT, block_q=32, block_k=32)
    assert mass.shape == (1, 2, 11, 11) and torch.allclose(mass.sum(-1), torch.ones(1, 2, 11), atol=1e-5)


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> Path:
    """A search over the tiny model with one anchor and no dense layer."""
    model = EvalModel(tiny_model("llama"), tiny_tokenizer(), name="tiny")
    ids = [tokens(1, 1100)[0].tolist(), tokens(1, 1200)[0].tolist()]
    rules = KascadeSearch(context=1024, anchors=1, dense=0, windows=2, block_q=32, block_k=32).run(model, ids)
    assert len(cut_windows(ids, context=1024, count=None, bos_token_id=1)) == 2
    path = tmp_path_factory.mktemp("plan") / "kascade.json"
    rules.save(path)
    return path


def test_a_searched_plan_runs_with_every_block_as_the_dense_model(plan: Path) -> None:
    model, method = tiny_model("llama"), Kascade(plan=plan)
    assert method.block_sizes == (32, 32) and {rule.anchor for rule in method.layers.values()} == {0}
    ids = tokens(2, 333)
    mask = torch.ones_like(ids)
    mask[1, :110] = 0
    try:
        with torch.no_grad():
            dense = model(input_ids=ids[:1]).logits
            attach(model, method.selectors().at(1.0), impl="reference")
            assert torch.allclose(model(input_ids=ids[:1]).logits, dense, atol=1e-4)
            attach(model, method.selectors().at(0.3), impl="reference")
            together = model(input_ids=ids.masked_fill(mask == 0, 0), attention_mask=mask).logits
            alone = model(input_ids=ids[1:, 110:]).logits
    finally:
        detach(model)
    assert torch.allclose(together[1:, 110:], alone, atol=1e-4) and not torch.allclose(together[:1], dense, atol=1e-2)


def test_plans_without_an_anchor_for_every_head_are_refused(plan: Path, tmp_path: Path) -> None:
    rules = HeadRules.load(plan)
    for damage in ({}, {"anchor": 1, "head": 0}, {"anchor": 0}):
        broken = HeadRules("kascade", rules.model, [[damage] * 4, rules.rules[1]], rules.made)
        broken.save(tmp_path / "plan.json")
        with pytest.raises(ValueError, match="anchor"):
            _ = Kascade(plan=tmp_path / "plan.json").layers
