"""Tokens of many answers that are chosen for and attended to at once: each gets what it gets alone.

Triton's interpreter takes a tenth of a second a row, so only two tests run the kernel; in the others a written-out
choice stands for it. What a request gets alone comes from the torch modules, in `generate`.
"""

from functools import partial

import pytest
import torch
from batched_model import BLOCK, GATE, config, greedy, prompts
from batched_model import alone as generated
from tiny_models import tiny_model
from torch import Tensor, nn
from written_choice import written_out, written_queries

import seerattn
from seerattn import KeepAll, TokenBudget, TopK, TopP, gate_decode
from seerattn.gate_decode import GateDecoder
from seerattn.hf import batching, paged, paged_decode, pages, state
from seerattn.hf.pages import Pages
from seerattn.ops.decode_attention import decode_attention
from seerattn.ops.decode_select import KeyTable

triton_one = pytest.importorskip("seerattn.ops.decode_select.triton_one")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted where there is no GPU alone")

# Every answer finishes a block.
LAYERS, NEW, SECONDS = 2, 34, 60
KERNEL = triton_one.select_blocks
FEW = TokenBudget(tokens=3 * BLOCK)
# Some end with a block or a token behind one.
LENGTHS = (1, 37, 129, 300, 65, 256)


@pytest.fixture(autouse=True)
def fused_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "GateDecoder", partial(GateDecoder, impl="triton"))
    # transformers does so twice a batch, which takes longer than these models.
    monkeypatch.setattr("gc.collect", lambda *_: 0)
    monkeypatch.setattr(triton_one, "select_blocks", written_out)
    monkeypatch.setattr(gate_decode, "gate_queries", written_queries)


def alone(gated: nn.Module, prompt: list[int], new: int = NEW) -> list[int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GateDecoder, "_runs_fused", lambda *_, **__: False)
        return generated(gated, prompt, new)


def model(name: str = "llama", policy=None, decode_policy=FEW, impl: str = "reference") -> nn.Module:
    # The kernels have no fp64.
    gated = seerattn.attach(tiny_model(name, torch.float32), GATE, policy, impl=impl).eval()
    seerattn.set_policy(gated, policy, decode_policy=decode_policy)
    return gated


def run(gated: nn.Module, asked: list[list[int]], new: int = NEW, **options) -> list[list[int]]:
    found = gated.generate_batch(asked, greedy(new), config(**{"max_batch_tokens": 4096} | options))
    assert [output.error for output in found.values()] == [None] * len(asked)
    return [output.generated_tokens for output in found.values()]


class Calls:
    """What was read at once: lists by the keys of their rows, and how often each part of a step ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lists: list[tuple] = []
        self.chosen = self.read = self.alone = self.tables = 0
        self.groups: list[list[int]] = []
        choose, read, attend, table = triton_one.select_blocks, Pages.read, paged_decode.attend_to, KeyTable.of

        def choose_(*args, **kwargs):
            self.chosen += 1
            return choose(*args, **kwargs)

        def read_(pages, rows, q, blocks, impl, logits):
            self.read += 1
            self.groups.append(rows.lengths.tolist())
            for row, tokens in enumerate(rows.lengths.tolist()):
                self._note(tokens, blocks.indices[row], blocks.counts[row])
            return read(pages, rows, q, blocks, impl, logits)

        def attend_(q, k, v, blocks, running, logits):
            self.alone += 1
            self._note(k.shape[2], blocks.indices[0], blocks.counts[0])
            return attend(q, k, v, blocks, running, logits)

        def table_(*args, **kwargs):
            self.tables += 1
            return table(*args, **kwargs)

        monkeypatch.setattr(triton_one, "select_blocks", choose_)
        monkeypatch.setattr(Pages, "read", read_)
        monkeypatch.setattr(paged_decode, "attend_to", attend_)
        monkeypatch.setattr(KeyTable, "of", table_)

    def _note(self, tokens: int, indices: Tensor, counts: Tensor) -> None:
        for row, count in zip(indices.tolist(), counts.tolist()):
            assert set(row[count:]) <= {-1}
            self.lists.append((tokens, tuple(row[:count])))


@pytest.mark.parametrize("budget", [64, 4096], ids=["in chunks", "at once"])
@pytest.mark.parametrize(
    ("name", "policy", "few"),
    [("llama", None, FEW), ("llama", TopK(density=0.5, rule="row_share"), TopK(density=0.3)), ("glm", None, FEW)],
    ids=["budget", "share", "interleaved"],
)
def test_rows_that_are_decoded_at_once_give_the_tokens_of_each_alone(
    name: str, policy, few, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gated, asked = model(name, policy, few), prompts(LENGTHS)
    with seerattn.policy(gated, policy):
        dense = [alone(gated, prompt, NEW) for prompt in asked]
    with seerattn.record_density(gated) as single:
        expected = [alone(gated, prompt, NEW) for prompt in asked]
    calls = Calls(monkeypatch)
    with seerattn.record_density(gated) as together:
        assert run(gated, asked, max_batch_tokens=budget) == expected != dense
    for layer, density in single.decode.by_head().items():
        assert torch.equal(together.decode.by_head()[layer], density)
    assert single.decode.mean() < 0.9 and not calls.alone
    assert sum(map(len, calls.groups)) == LAYERS * len(asked) * (NEW - 1) + LAYERS


@pytest.mark.parametrize("few", [FEW, TopK(density=0.3)], ids=["budget", "share"])
def test_lists_are_those_that_each_row_gets_by_itself(few, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_one, "select_blocks", KERNEL)
    gated, new, found = model(decode_policy=few), 5, []
    # The first row finishes a block on its way, the second one has none yet.
    asked = prompts((62, 20, 129, 300))
    for way in ("modules", "alone", "together"):
        with monkeypatch.context() as patch:
            calls = Calls(patch)
            if way != "together":
                patch.setattr(paged, "decode_together", lambda *_: [])
            if way == "modules":
                patch.setattr(GateDecoder, "_runs_fused", lambda *_, **__: False)
            answers = run(gated, asked, new)
            assert bool(calls.read) == (way == "together") != bool(calls.alone)
            found.append((answers, sorted(calls.lists)))
    assert found[0] == found[1] == found[2]
    assert len({blocks for _, blocks in found[0][1]}) > 10


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_step_takes_one_choice_and_one_attention_a_layer_for_any_number_of_rows(
    impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_one, "select_blocks", KERNEL)
    gated, new, counts = model(impl=impl), 3, []
    for lengths in ((130,), (130, 70, 200, 40, 97)):
        asked = prompts(lengths)
        expected = [alone(gated, prompt, new) for prompt in asked]
        with monkeypatch.context() as patch:
            calls = Calls(patch)
            assert run(gated, asked, new) == expected
        counts.append((calls.chosen, calls.read, calls.alone))
    assert counts == [(LAYERS * (new - 1), LAYERS * (new - 1), 0)] * 2


def test_keys_are_gathered_and_told_anew_only_where_a_block_is_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    gated, asked, gathered = model(policy=KeepAll()), prompts((100, 100)), 0
    asked[1] = asked[1][::-1]
    gather = Pages.row

    def row(pages: Pages, number: int) -> tuple[Tensor, Tensor]:
        nonlocal gathered
        gathered += 1
        return gather(pages, number)

    calls = Calls(monkeypatch)
    monkeypatch.setattr(Pages, "row", row)
    run(gated, asked, new=80)
    # 101 to 179 keys: the 129th and the 161st token are the first ones behind a block.
    assert gathered == LAYERS * 2 * 2 and calls.tables == LAYERS * 3
    assert calls.read == LAYERS * 79


def test_rows_of_other_policies_are_groups_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    gated, asked = model(), prompts((130, 201, 97, 260))
    policies = [FEW, TopK(density=0.2), FEW, None]
    manager = gated.init_continuous_batching(greedy(), config(max_batch_tokens=4096))
    expected, densities, meters = [], [], []
    for number, prompt in enumerate(asked):
        meters.append(seerattn.DensityMeter())
        # Two share what runs.
        if policies[number] == FEW:
            batching.count_for(manager, f"{number}", meters[-1])
        with seerattn.policy(gated, None, decode_policy=policies[number]), seerattn.record_density(gated) as meter:
            expected.append(alone(gated, prompt, NEW))
            if policies[number] != FEW:
                batching.count_for(manager, f"{number}", meters[-1])
        densities.append(meter.decode.mean() if meter.decode.layers else None)
    calls = Calls(monkeypatch)
    for number, prompt in enumerate(asked):
        manager.add_request(prompt, request_id=f"{number}", max_new_tokens=NEW)
    manager.start()
    found = {}
    while len(found) < len(asked):
        output = manager.get_result(timeout=SECONDS)
        assert output.error is None
        found[output.request_id] = output.generated_tokens
    manager.stop()
    assert [found[f"{number}"] for number in range(len(asked))] == expected
    assert [meter.decode.mean() if meter.decode.layers else None for meter in meters] == densities
    assert {len(group) for group in calls.groups} == {1, 2} and not calls.alone


@pytest.mark.parametrize("budget", [64, 4096], ids=["in chunks", "at once"])
def test_a_row_that_fails_among_others_fails_its_request_alone(
    budget: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gated, good, bad = model(), prompts((37, 130, 300)), prompts((222,))[0]
    with seerattn.record_density(gated) as single:
        expected = [alone(gated, prompt, NEW) for prompt in good]
    make = GateDecoder._gate_keys

    def make_or_fail(decoder, k, context, blocks):
        # The first token behind a block, in the second layer: the first one has kept and counted it.
        if k.shape[2] == 225 and context.layer == 1:
            raise ArithmeticError("no gate keys today")
        return make(decoder, k, context, blocks)

    monkeypatch.setattr(GateDecoder, "_gate_keys", make_or_fail)
    for place in (0, 3):
        asked = [*good[:place], bad, *good[place:]]
        manager = gated.init_continuous_batching(greedy(NEW), config(max_batch_tokens=budget))
        meters = [seerattn.DensityMeter() for _ in asked]
        for number, (prompt, meter) in enumerate(zip(asked, meters)):
            batching.count_for(manager, f"{number}", meter)
            manager.add_request(prompt, request_id=f"{number}", max_new_tokens=NEW)
        manager.start()
        outputs = {output.request_id: output for output in (manager.get_result(timeout=SECONDS) for _ in asked)}
        manager.stop()
        failed = outputs.pop(f"{place}")
        assert "no gate keys today" in failed.error and len(failed.generated_tokens) == 3
        found = [outputs[name] for name in sorted(outputs)]
        assert [output.generated_tokens for output in found] == expected
        del meters[place]
        blocks = [sum(-(-(len(prompt) + n) // BLOCK) for n in range(1, NEW)) for prompt in good]
        densities = torch.stack([meter.decode.by_head()[1] for meter in meters])
        whole = (densities * torch.tensor(blocks, dtype=torch.float64)[:, None]).sum(0) / sum(blocks)
        assert torch.allclose(whole, single.decode.by_head()[1])
    assert sum("failed together" in record.getMessage() for record in caplog.records) == 2


def test_auto_leaves_rows_dense_that_would_read_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seerattn.hf.dense_steps.prefer_dense_decode", lambda **_: False)
    gated, asked = model(impl="auto"), prompts((40, 70, 200, 260))
    with seerattn.record_density(gated) as single:
        expected = [alone(gated, prompt, NEW) for prompt in asked]
    calls = Calls(monkeypatch)
    with seerattn.record_density(gated) as together:
        assert run(gated, asked) == expected
    assert torch.equal(together.decode.by_head()[1], single.decode.by_head()[1])
    # A budget of three blocks reads all of 96 keys.
    assert min(min(group) for group in calls.groups) == 97 and not calls.alone


@pytest.mark.parametrize("dense_from", [0, 775, 10**9], ids=["always", "when many keys are read", "never"])
def test_rows_that_auto_decodes_dense_read_all_keys_at_once(dense_from: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for, read = [], []

    def rule(**asked) -> bool:
        asked_for.append(asked)
        return asked["keys"] >= dense_from

    def attend(q, k, v, *, impl, blocks, lengths, **call):
        read.append((blocks is None, lengths.tolist()))
        return decode_attention(q, k, v, impl="reference", blocks=blocks, lengths=lengths, **call)

    monkeypatch.setattr("seerattn.hf.dense_steps.prefer_dense_decode", rule)
    # As on a GPU.
    monkeypatch.setattr(pages, "preferred", lambda *_: "triton")
    monkeypatch.setattr(pages, "refusal", lambda *_, **__: None)
    monkeypatch.setattr(pages, "decode_attention", attend)
    gated, asked = model(impl="auto"), prompts((40, 200, 260, 300))
    with seerattn.record_density(gated) as meter:
        found = run(gated, asked, 8)
    if dense_from != 775:
        with seerattn.policy(gated, None, decode_policy=FEW if dense_from else None, impl="reference"):
            assert found == [alone(gated, prompt, 8) for prompt in asked]
    # That of 40 tokens would read everything, which is known without the rule; the others have 763 keys at first.
    whole = [len(lengths) for is_whole, lengths in read if is_whole]
    expected = [4 if 763 + 3 * step >= dense_from else 1 for step in range(7)]
    assert whole == [number for number in expected for _ in range(LAYERS)]
    assert {one["keys"] for one in asked_for} == {763 + 3 * step for step in range(7)}
    assert {one["shape"].batch for one in asked_for} == {3} and (meter.decode.mean() == 1.0) == (dense_from == 0)


def test_requests_that_share_a_beginning_are_decoded_as_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    gated, prompt = model(policy=TopK(density=0.5, rule="row_share")), prompts((200,))[0]
    asked = [prompt, prompt, prompt[:130] + prompts((70,), seed=9)[0], prompt]
    expected = [alone(gated, one, NEW) for one in asked]
    calls = Calls(monkeypatch)
    assert run(gated, asked[:1]) == expected[:1]
    assert run(gated, asked, max_batch_tokens=256) == expected
    assert not calls.alone


def test_requests_that_make_room_for_others_are_decoded_as_if_they_had_not(monkeypatch: pytest.MonkeyPatch) -> None:
    gated, asked, found = model(policy=KeepAll()), prompts((200, 180, 190, 100)), []
    for is_alone in (True, False):
        with monkeypatch.context() as patch:
            if is_alone:
                patch.setattr(GateDecoder, "_runs_fused", lambda *_, **__: False)
            found.append(run(gated, asked, 60, num_blocks=18, allow_block_sharing=False, max_batch_tokens=128))
    assert found[0] == found[1]


def test_what_the_kernel_does_not_serve_is_decoded_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = prompts((130, 200))
    calls = Calls(monkeypatch)
    # On a CPU "auto" is the modules, and a kernel that is named refuses.
    for impl, policy in (("auto", FEW), ("auto", TopP(p=0.5)), ("triton", TopP(p=0.5))):
        monkeypatch.setattr(state, "GateDecoder", partial(GateDecoder, impl=impl))
        gated = model(decode_policy=policy)
        if impl == "triton":
            found = gated.generate_batch(asked, greedy(4), config())
            assert all("serves TopK and TokenBudget alone" in output.error for output in found.values())
        else:
            expected = [alone(gated, prompt, 4) for prompt in asked]
            assert run(gated, asked, 4) == expected
    assert not calls.read and not calls.chosen and calls.alone


def test_a_text_too_long_for_the_kernel_leaves_the_others_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "GateDecoder", partial(GateDecoder, impl="auto"))
    # As on a GPU, for texts of up to eight blocks.
    monkeypatch.setattr(
        GateDecoder, "_runs_fused", lambda self, device, windows, **_: windows // self.gate.config.key_subblocks < 8
    )
    gated, asked = model(), prompts((130, 300, 200))
    expected = [alone(gated, prompt, 4) for prompt in asked]
    calls = Calls(monkeypatch)
    assert run(gated, asked, 4) == expected
    assert {tuple(group) for group in calls.groups} == {(131 + n, 201 + n) for n in range(3)}
    assert calls.alone == LAYERS * 3
