"""Stages of path patching: exactly the wired heads of hand-wired models, and path patching's own scores."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from interp import zoo
from interp.circuits.evaluate import measured
from interp.circuits.graph import Graph
from interp.circuits.staged import _largest, circuit_of_stages, staged_path_patching
from interp.patching import path_patching

WIRED = {
    "induction": {"logits": {"L1H1"}, "1.k": {"L0H2"}},
    "duplicate": {"logits": {"L2H0"}, "1.q": {"L1H2"}, "2.k": {"L0H1"}, "2.v": {"L0H1"}},
    # The MLP between L1H1 and the logits is followed; L1H0.k is the key of L1H1's group.
    "llama_induction": {"logits": {"L1H1"}, "1.k": {"L0H3"}},
}
MLPS = {"induction": "frozen", "duplicate": "frozen", "llama_induction": "recomputed"}


@pytest.fixture(scope="module", params=WIRED)
def wired(request):
    name = request.param
    model, task = zoo.load(name), zoo.task(name, n=3)
    return name, model, task, staged_path_patching(model, task, share=1.0, threshold=0.05, mlps=MLPS[name])


def kept_by_path(stages):
    found = {}
    for path in stages["path"].values:
        for layer, head in np.argwhere(stages["kept"].sel(path=path).values):
            found.setdefault(str(path), set()).add(f"L{layer}H{head}")
    return found


def test_stages_are_the_wired_heads_and_no_others(wired):
    name, _, _, stages = wired
    assert kept_by_path(stages) == WIRED[name]


def test_every_score_is_path_patchings_own(wired):
    name, model, task, stages = wired
    for path in stages["path"].values:
        readers = str(stages["readers"].sel(path=path).values).split(", ")
        own = path_patching(model, task, readers=readers, direction="noise", mlps=MLPS[name])
        np.testing.assert_array_equal(stages["score"].sel(path=path), own)


def test_readers_are_the_heads_of_the_stage_before(wired):
    name, _, _, stages = wired
    readers = dict(zip(stages["path"].values.tolist(), stages["readers"].values.tolist(), strict=True))
    expected = {
        "induction": {"logits": "logits", "1.q": "L1H1.q", "1.k": "L1H1.k", "1.v": "L1H1.v"},
        "llama_induction": {"logits": "logits", "1.q": "L1H1.q", "1.k": "L1H0.k", "1.v": "L1H0.v"},
        "duplicate": {"logits": "logits"}
        | {f"1.{part}": f"L2H0.{part}" for part in "qkv"}
        | {f"2.{part}": f"L1H2.{part}" for part in "qkv"},
    }
    assert readers == expected[name]
    stage = dict(zip(stages["path"].values.tolist(), stages["stage"].values.tolist(), strict=True))
    assert stage == {path: 1 if path == "logits" else 1 + int(path[0]) for path in readers}
    assert stages["part"].values.tolist() == [path.rpartition(".")[2] for path in readers]


def test_the_circuit_is_the_wired_one_between_heads(wired):
    name, model, _, stages = wired
    circuit = circuit_of_stages(model, stages)
    wired_edges = {edge for edge in zoo.edges(name) if edge[0].startswith("L") and not edge[1].startswith("mlp")}
    if name == "llama_induction":
        wired_edges.add(("L1H1", "logits"))  # the way through the MLP
    assert set(circuit.edges) == wired_edges
    for writer, reader in circuit.edges:
        path = next(one for one in stages["path"].values if reader in str(stages["readers"].sel(path=one).values))
        layer, head = int(writer[1]), int(writer[3])
        score = stages["score"].sel(path=path, layer=layer, head=head)
        assert circuit.score_of(writer, reader) == pytest.approx(float(score))


def test_with_what_is_never_judged_the_circuit_does_the_task(wired):
    _, model, task, stages = wired
    heads, whole = (circuit_of_stages(model, stages, whole=one) for one in (False, True))
    values, _ = measured(model, task, Graph.of(model), [heads.mask, whole.mask])
    alone, together = values["faithfulness"].mean(1).tolist()
    assert abs(alone) < 1e-3
    assert together == pytest.approx(1, abs=1e-3)
    graph = Graph.of(model)
    for writer, reader in np.argwhere(whole.mask & ~heads.mask):
        name, read_by = graph.writers[writer], {graph.writers[node] for node in np.flatnonzero(graph.feeds[reader])}
        assert not name.startswith("L") or (name in heads.heads and graph.readers[reader].startswith("mlp"))
        heads_read = {node for node in read_by if node.startswith("L")}
        assert not heads_read or heads_read & set(heads.heads)


def test_an_edge_of_two_paths_has_the_larger_score_and_stays_kept():
    model, task = zoo.load("duplicate"), zoo.task("duplicate", n=2)
    stages = staged_path_patching(model, task, share=1.0, threshold=0.05)
    first = stages.isel(path=[0])
    again = first.assign(score=-2 * first["score"], kept=~first["kept"] & False)
    circuit = circuit_of_stages(model, xr.concat([stages, again], "path"))
    assert circuit.score_of("L2H0", "logits") == pytest.approx(-2 * float(first["score"][0, 2, 0]))
    assert circuit.edges == circuit_of_stages(model, stages).edges


def test_a_step_keeps_the_largest_magnitudes_above_the_threshold():
    score = np.array([[0.3, -0.5, 0.02], [0.3, np.nan, 0.004]])
    assert np.argwhere(_largest(score, 2, 0.01)).tolist() == [[0, 0], [0, 1]]  # of equal ones the earlier
    assert np.argwhere(_largest(score, 6, 0.01)).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0]]
    assert not _largest(score, 6, 0.6).any()


def test_share_stages_and_parts_are_limits():
    model, task = zoo.load("duplicate"), zoo.task("duplicate", n=2)
    stages = staged_path_patching(model, task, share=0.01, parts=["q"], max_stages=2)
    assert stages["path"].values.tolist() == ["logits", "1.q"]
    assert stages["kept"].sum(["layer", "head"]).values.tolist() == [1, 1]
    assert stages.attrs["n_top"] == 1
    again = staged_path_patching(model, task, share=0.01, parts=["q"], max_stages=2)
    np.testing.assert_array_equal(stages["score"], again["score"])


def test_stages_survive_a_file(tmp_path):
    model, task = zoo.load("induction"), zoo.task("induction", n=3)
    stages = staged_path_patching(model, task, share=1.0, threshold=0.05)
    stages.to_netcdf(tmp_path / "stages.nc")
    with xr.open_dataset(tmp_path / "stages.nc") as read:
        assert circuit_of_stages(model, read).edges == circuit_of_stages(model, stages).edges
        assert read.attrs["method"] == "staged_path_patching"


def test_bad_choices_are_refused_before_any_run():
    model, task = zoo.load("induction"), zoo.task("induction", n=1)
    for more, message in (
        ({"share": 0.0}, "above 0 and at most 1"),
        ({"threshold": 0.0}, "above 0"),
        ({"parts": ["z"]}, "one of q, k, v"),
        ({"max_stages": 0}, "at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            staged_path_patching(model, task, **more)
    stages = staged_path_patching(model, task, max_stages=1)
    with pytest.raises(ValueError, match="2 × 4 heads"):
        circuit_of_stages(zoo.load("duplicate"), stages)
