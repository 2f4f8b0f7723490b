import numpy as np
import pytest
import torch

from seerattn.data.windows import Window, cut_windows
from seerattn.eval.choice import DENSE, Choice, at_density
from seerattn.eval.maps import observe_maps
from seerattn.eval.tasks.map_recall import MapRecallJob, RecallMeter
from seerattn.hf.eval_model import EvalModel
from seerattn.hf.state import layer_states
from seerattn.methods.gate import Gate
from seerattn.methods.method import Method, SelectorAt, Selectors
from seerattn.methods.oracle import Oracle, OracleSelector
from seerattn.methods.streaming import Streaming
from seerattn.results.file import ResultsFile, read_results
from seerattn.results.maps import BlockMaps
from seerattn.selection.block_indices import BlockIndices
from seerattn.selection.policies import TopK
from seerattn.selection.selector import AttentionContext

CONTEXT = 333


@pytest.fixture(scope="module")
def windows(documents) -> list[Window]:
    return cut_windows(documents, context=CONTEXT, count=1, bos_token_id=1)


@pytest.fixture(scope="module")
def probabilities(model, windows) -> dict[int, torch.Tensor]:
    """fp64 attention probabilities of the unpatched model, ``[documents, H, T, T]`` of each layer."""
    plain = model.model.double()
    implementation = plain.config._attn_implementation
    plain.set_attn_implementation("eager")
    with torch.no_grad():
        out = plain(input_ids=torch.tensor([w.input_ids for w in windows]), output_attentions=True)
    plain.set_attn_implementation(implementation)
    plain.float()
    return dict(enumerate(out.attentions))


def maps_of(p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Target and mass ``[documents, H, 6, 6]`` by loops over tiles."""
    blocks = -(-CONTEXT // 64)
    target, mass = torch.zeros(2, *p.shape[:2], blocks, blocks, dtype=torch.float64)
    for i in range(blocks):
        for j in range(i + 1):
            tile = p[:, :, i * 64 : (i + 1) * 64, j * 64 : (j + 1) * 64]
            target[:, :, i, j], mass[:, :, i, j] = tile.amax((2, 3)), tile.sum(3).mean(2)
    return target / target.sum(-1, keepdim=True), mass


def job_of(windows: list[Window]) -> MapRecallJob:
    return MapRecallJob("recall", "t", CONTEXT, [w.input_ids for w in windows], windows=windows)


def at(model: EvalModel, densities: tuple[float, ...], *methods: Method) -> list[Choice]:
    return [at_density(model, method, density) for method in methods for density in densities]


def test_recall_matches_fp64_maps_of_the_unpatched_model(model, windows, probabilities, tmp_path) -> None:
    choices = [DENSE, *at(model, (0.7, 0.5), Oracle(), Oracle(target="sum:1"), Streaming())]
    file = ResultsFile(tmp_path / "r.jsonl")
    rows = job_of(windows).measure(model, choices, file, batch=3)
    written = read_results([file.path])
    assert len(rows) == 6 * 2 and len(written) == 6 * 2 * 3
    assert {row.line for row in rows} == {"oracle", "oracle sum:1", "streaming"}
    # Of 21 causal blocks of 6 rows, 2 a row are 11, 3 are 15.
    keep = {0.7: 3, 0.5: 2}
    for row in rows:
        values = []
        for p in probabilities.values():
            target, mass = maps_of(p)
            chosen = torch.zeros_like(target, dtype=torch.bool)
            for i in range(6):
                forced = {0, i}
                for b in range(target.shape[0]):
                    for h in range(target.shape[1]):
                        order = range(i, -1, -1)
                        if row.line != "streaming":
                            best = target if row.line == "oracle" else mass
                            order = sorted(order, key=lambda j, b=b, h=h, i=i, best=best: -float(best[b, h, i, j]))
                        free = [j for j in order if j not in forced]
                        kept = sorted(forced) + free[: keep[row.density] - len(forced)]
                        chosen[b, h, i, kept] = True
            found = target if row.what == "target_recall" else mass
            values.append((found * chosen).sum((-1, -2)) / 6)
        expected = torch.stack(values, 1)
        per_document = expected.mean((1, 2)).numpy()
        # fp32 probabilities.
        assert row.value == pytest.approx(per_document.mean(), abs=2e-6)
        assert row.stderr == pytest.approx(per_document.std(ddof=1) / 2, abs=2e-6)
        for layer in (0, 1):
            one = next(
                r
                for r in written
                if (r.what, r.line, r.density, r.cell.get("layer")) == (row.what, row.line, row.density, layer)
            )
            assert one.samples["heads"] == pytest.approx(expected[:, layer].mean(0).tolist(), abs=2e-6)


def test_recall_of_gates_matches_their_choice_on_fp64_maps(model, gate_folders, windows, probabilities) -> None:
    for folder in gate_folders:
        choice = at_density(model, Gate(gates=folder), 0.7)
        masks: dict[int, torch.Tensor] = {}
        choose = choice.selector_at
        model.observe(
            windows,
            lambda q, k, context, m=masks, c=choose: m.update(
                {context.layer: c(context.layer).select(q, k, context).to_mask()}
            ),
            batch=len(windows),
        )
        rows = job_of(windows).measure(model, [choice], ResultsFile(None))
        for row, kind in zip(rows, (0, 1)):
            held = []
            for layer, p in probabilities.items():
                true_map, mask = maps_of(p)[kind], masks[layer]
                # A KV group of two heads shares its blocks.
                mask = torch.stack([mask[:, h * mask.shape[1] // 4] for h in range(4)], 1)
                held.append(float((true_map * mask).sum((-1, -2)).mean() / 6))
            assert row.value == pytest.approx(np.mean(held), abs=2e-6)
            assert row.realised_density == pytest.approx(15 / 21)


def test_recall_grows_with_density_up_to_one_and_no_gate_beats_the_oracle(model, gate_folders, windows) -> None:
    paper = next(folder for folder in gate_folders if folder.name == "paper")
    choices = at(model, (1.0, 0.7, 0.5), Oracle(), Gate(gates=paper), Streaming())
    rows = job_of(windows).measure(model, choices, ResultsFile(None))
    target = {(r.line, r.density): r.value for r in rows if r.what == "target_recall"}
    for name in ("oracle", "paper", "streaming"):
        assert target[name, 1.0] == pytest.approx(1.0, abs=1e-6)
        assert target[name, 1.0] > target[name, 0.7] > target[name, 0.5]
        assert target[name, 0.7] <= target["oracle", 0.7]
    assert target["streaming", 0.7] < target["oracle", 0.7]


def test_finished_cells_are_not_measured_again(model, windows, monkeypatch, tmp_path) -> None:
    path, job = tmp_path / "r.jsonl", job_of(windows)
    first = job.measure(model, at(model, (0.5,), Oracle()), ResultsFile(path))
    seen = []
    monkeypatch.setattr(RecallMeter, "see", lambda *_: seen.append(1))
    assert job.measure(model, at(model, (0.5,), Oracle()), ResultsFile(path)) == first
    assert not seen and not layer_states(model.model)


def test_methods_of_other_blocks_have_maps_of_their_own_in_one_measurement(model, windows) -> None:
    wide, fine = Streaming(), Streaming(block_q=32, block_k=32)
    together = job_of(windows).measure(model, at(model, (0.5,), wide, fine), ResultsFile(None))
    alone = [job_of(windows).measure(model, at(model, (0.5,), method), ResultsFile(None)) for method in (wide, fine)]
    assert [row.line for row in together[::2]] == ["streaming", "streaming 32"]
    assert [row.value for row in together] == [row.value for rows in alone for row in rows]


def test_saved_maps_hold_the_true_map_the_gates_map_and_the_choice(
    model, gate_folders, windows, probabilities, tmp_path
) -> None:
    for folder in gate_folders:
        choice = at_density(model, Gate(gates=folder), 0.7)
        observe_maps(model, choice, windows[0], [(1, 3), (0, 0)]).save(tmp_path / "maps.npz")
        maps = BlockMaps.load(tmp_path / "maps.npz")
        assert maps.heads == [(1, 3), (0, 0)] and maps.gates == folder.name and maps.density == 0.7
        for i, (layer, head) in enumerate(maps.heads):
            expected = maps_of(probabilities[layer])[0][0, head]
            assert np.abs(maps.target[i] - expected.numpy()).max() < 2e-6
        assert maps.chosen.sum((1, 2)).tolist() == [15, 15]
        assert maps.forced.sum() == 11 and maps.chosen[:, maps.forced].all()
        # Top-k keeps the block that the gate's map ranks first among those it decides on.
        best = maps.gate[:, 2:].argmax(-1)
        assert np.take_along_axis(maps.chosen[:, 2:], best[..., None], -1).all()
        assert maps.gate[:, 2:].sum(-1) == pytest.approx(1.0, abs=1e-5)
        assert not maps.gate[:, maps.forced].any()
    assert [p.name for p in tmp_path.iterdir()] == ["maps.npz"]


def test_saved_maps_hold_the_blocks_that_every_method_keeps(model, gate_folders, windows, tmp_path) -> None:
    made: list[BlockIndices] = []

    class Reusing:
        """Keeps in every layer what it chose in the first, of which no map is asked."""

        def select(self, q: torch.Tensor, k: torch.Tensor, context: AttentionContext) -> BlockIndices:
            made.append(OracleSelector(TopK(density=0.7)).select(q, k, context))
            return made[0]

    def at(_: float) -> SelectorAt:
        made.clear()
        selector = Reusing()
        return lambda layer: selector

    reusing = Choice(Streaming(name="reusing"), Selectors(at, 0, 1))
    nothing = Choice(Streaming(name="nothing"), Selectors(lambda _: lambda _: None, 0, 1))
    gates = at_density(model, Gate(gates=gate_folders[0]), 0.7)
    compared = [at_density(model, Streaming(), 0.7), gates, reusing, nothing]
    observe_maps(model, gates, windows[0], [(1, 3), (1, 0)], compared).save(tmp_path / "maps.npz")
    maps = BlockMaps.load(tmp_path / "maps.npz")
    assert maps.systems == ["streaming", f"gates: {gate_folders[0].name}", "reusing", "nothing"]
    causal, age = np.tril(np.ones((6, 6), dtype=bool)), np.arange(6)[:, None] - np.arange(6)
    # 15 of 21 blocks, as many as of the gates: the first and the newest two of each row.
    assert np.array_equal(maps.kept[0], np.stack([causal & ((age < 2) | (np.arange(6) == 0))] * 2))
    assert np.array_equal(maps.kept[1], maps.chosen)
    below, own = (blocks.to_mask()[0, [3, 0]].numpy() for blocks in made)
    assert np.array_equal(maps.kept[2], below) and not np.array_equal(below, own)
    # A layer without a selector is dense.
    assert np.array_equal(maps.kept[3], np.stack([causal] * 2))


def test_maps_reject_heads_that_do_not_exist_and_other_files(model, gate_folders, windows, tmp_path) -> None:
    choice = at_density(model, Gate(gates=gate_folders[0]), 0.7)
    for heads in ([(2, 0)], [(0, 4)], [(0, -1)]):
        with pytest.raises(ValueError, match="heads"):
            observe_maps(model, choice, windows[0], heads)
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04 nonsense")
    with pytest.raises(ValueError, match="maps"):
        BlockMaps.load(tmp_path / "x.npz")
