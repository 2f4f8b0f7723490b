"""What runs belongs to a model, to one context of it, or to one forward; copies are independent."""

import asyncio
import copy
import io
import pickle
import threading
from collections.abc import Callable
from contextvars import copy_context

import pytest
import torch
from tiny_models import tiny_model, tokens
from torch import Tensor, nn

import seerattn
from seerattn import AttentionContext, AttnGateConfig, BlockIndices, KeepAll, TokenBudget, TopK
from seerattn.hf.state import layer_states
from seerattn.training.objective import Objective

GATE = AttnGateConfig(block_q=32, block_k=32, query_subblocks=2, key_subblocks=2, init="normal")
SPARSE, NARROW = TopK(density=0.4, rule="row_share", sink_blocks=0), TokenBudget(tokens=32, sink_blocks=0)
IDS = tokens(2, 130)
Reach = Callable[[nn.Module], nn.Module]


class Streaming:
    """A selector of a module, so that it can be pickled."""

    def select(self, q: Tensor, k: Tensor, context: AttentionContext) -> BlockIndices:
        sizes = {"q_len": q.shape[2], "k_len": k.shape[2], "block_q": 32, "block_k": 32}
        mask = torch.eye(-(-k.shape[2] // 32), dtype=torch.bool).expand(q.shape[0], k.shape[1], -1, -1)
        return BlockIndices.from_mask(mask, block_q=32, block_k=32, q_len=sizes["q_len"])


def gated() -> nn.Module:
    return seerattn.attach(tiny_model("llama", torch.float64), GATE, SPARSE, impl="reference").eval()


def selected() -> nn.Module:
    return seerattn.attach(tiny_model("llama", torch.float64), Streaming(), impl="reference")


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("make", [gated, selected])
def test_copy_computes_the_same_and_is_independent(make: Callable[[], nn.Module], copied: Reach) -> None:
    model = make()
    expected = logits(model)
    twin = copied(model)
    assert torch.equal(logits(twin), expected)
    states = [{id(s): s for s in layer_states(m)} for m in (model, twin)]
    assert len(states[0]) == 2 and not states[0].keys() & states[1].keys()
    seerattn.set_policy(twin, None)
    dense = logits(tiny_model("llama", torch.float64))
    assert torch.equal(logits(twin), dense) and torch.equal(logits(model), expected)
    assert not torch.equal(dense, expected)
    if make is gated:
        with torch.no_grad():
            for state in layer_states(twin):
                state.gate.k_weight.zero_()
        seerattn.set_policy(twin, SPARSE)
        assert not torch.equal(logits(twin), expected)
    seerattn.detach(model)
    assert torch.equal(logits(model), dense) and len(layer_states(twin)) == 2


def test_policy_of_a_context_ends_with_it_and_leaves_the_saved_one() -> None:
    model = gated()
    saved, expected = model.active_peft_config.policy, {}
    for policy in (SPARSE, NARROW, KeepAll(), None):
        seerattn.set_policy(model, policy)
        expected[policy] = logits(model)
    seerattn.set_policy(model, SPARSE)
    with seerattn.policy(model, NARROW):
        assert torch.equal(logits(model), expected[NARROW])
        with seerattn.policy(model, None):
            assert torch.equal(logits(model), expected[None])
        with pytest.raises(RuntimeError, match="stop"), seerattn.policy(model, KeepAll()):
            assert torch.equal(logits(model), expected[KeepAll()])
            raise RuntimeError("stop")
        assert torch.equal(logits(model), expected[NARROW])
    assert torch.equal(logits(model), expected[SPARSE]) and model.active_peft_config.policy == saved


def test_policy_of_a_context_is_that_of_one_model() -> None:
    one, other = gated(), gated()
    expected = logits(other)
    with seerattn.policy(one, None):
        assert torch.equal(logits(other), expected) and not torch.equal(logits(one), expected)


def test_threads_and_tasks_run_by_their_own_policies_and_count_their_own_blocks() -> None:
    model = gated()
    expected, densities = {}, {}
    for policy in (SPARSE, NARROW, KeepAll()):
        with seerattn.policy(model, policy), seerattn.record_density(model) as meter:
            expected[policy], densities[policy] = logits(model), meter.mean()
    together, failures = threading.Barrier(3), []

    def request(policy) -> None:
        try:
            with seerattn.policy(model, policy), seerattn.record_density(model) as meter:
                for _ in range(4):
                    together.wait()
                    assert torch.equal(logits(model), expected[policy])
                assert meter.mean() == densities[policy]
        except BaseException as error:  # shown below, in the thread of the test
            failures.append(error)
            together.abort()

    threads = [threading.Thread(target=request, args=(policy,)) for policy in expected]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not failures

    async def task(policy) -> Tensor:
        with seerattn.policy(model, policy):
            await asyncio.sleep(0)
            return logits(model)

    async def tasks() -> list[Tensor]:
        return await asyncio.gather(*(task(policy) for policy in expected))

    assert all(torch.equal(a, b) for a, b in zip(asyncio.run(tasks()), expected.values()))
    with seerattn.policy(model, NARROW), seerattn.record_density(model) as meter:
        found = []
        context = copy_context()
        thread = threading.Thread(target=lambda: context.run(lambda: found.append(logits(model))))
        thread.start()
        thread.join()
    assert torch.equal(found[0], expected[NARROW]) and meter.mean() == densities[NARROW]


def test_forward_ends_by_the_policy_that_it_began_with() -> None:
    model = gated()
    expected = logits(model)
    seerattn.set_policy(model, NARROW)
    narrow = logits(model)
    seerattn.set_policy(model, SPARSE)
    hook = model.get_base_model().model.layers[0].register_forward_hook(lambda *_: seerattn.set_policy(model, NARROW))
    assert torch.equal(logits(model), expected)
    hook.remove()
    assert torch.equal(logits(model), narrow)


def test_layer_that_runs_again_in_the_backward_pass_has_the_policy_of_its_forward() -> None:
    """Gradient checkpointing runs it where no context is, as the threads of autograd do on a GPU."""
    model = gated().train()
    model.requires_grad_(False)
    weights = [layer.mlp.up_proj.weight.requires_grad_() for layer in model.get_base_model().model.layers]
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            Objective(model).set_checkpointing(True)
        with seerattn.policy(model, NARROW):
            loss = model(input_ids=IDS, use_cache=False).logits.square().mean()
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
        gradients.append([weight.grad.clone() for weight in weights])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (0.5, "policy must be a policy"),
        (TopK(density=[[0.5] * 4]), "density must be one number, or one a head of every layer"),
        (TopK(density=[[0.5] * 3] * 2), "density must be one number, or one a head of every layer"),
    ],
)
def test_policy_that_does_not_fit_is_refused_where_it_is_given(policy, reason: str) -> None:
    model = gated()
    expected = logits(model)
    with pytest.raises(ValueError, match=reason):
        seerattn.set_policy(model, policy)
    with pytest.raises(ValueError, match=reason), seerattn.policy(model, policy):
        pass
    fresh = tiny_model("llama", torch.float64)
    with pytest.raises(ValueError, match=reason):
        seerattn.attach(fresh, GATE, policy)
    assert torch.equal(logits(model), expected)
    assert not layer_states(fresh) and fresh.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="must have gates"), seerattn.policy(fresh, SPARSE):
        pass
