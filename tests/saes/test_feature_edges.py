import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

import interp
from interp.saes.architectures import make
from interp.saes.feature_circuits import feature_circuit
from interp.saes.feature_edges import METRIC, feature_edges
from interp.saes.feature_effects import ERROR, feature_effects
from interp.saes.sae import SAE, from_rows, to_rows
from interp.saes.splice import site_width
from interp.tasks import Task
from interp.zoo.wired import N_WORDS
from tests.model.families import FAMILIES
from tests.patching.tokens_task import task_of_tokens

Z0, Z1, Z2 = (f"blocks.{layer}.attn.hook_z" for layer in range(3))
ATTN0, MLP0 = "blocks.0.hook_attn_out", "blocks.0.hook_mlp_out"
TASK = task_of_tokens(
    torch.tensor([[5, 9, 3, 17, 8], [7, 4, 4, 11, 30], [1, 2, 3, 4, 5]]),
    torch.tensor([[5, 12, 3, 17, 8], [7, 4, 21, 10, 30], [1, 2, 33, 4, 5]]),
)


def model_of(family: str) -> interp.Model:
    return interp.Model(FAMILIES[family].make_model(dtype=torch.float64))


def sae_at(model: interp.Model, site: str, architecture: str = "relu", d_sae: int = 6, **settings) -> SAE:
    """An SAE with random weights that leaves a large error, in float64."""
    width = site_width(model, interp.Site.parse(site))
    settings = {"k": 3} | settings if architecture == "topk" else settings
    sae = make(architecture, width, d_sae, seed=len(site) + int(site[7]), site=site, **settings).double()
    with torch.no_grad():
        sae.b_dec.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
        sae.b_enc.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    return sae


def saes_at(model: interp.Model, *sites: str) -> list[SAE]:
    return [sae_at(model, site, "topk" if number % 2 else "relu") for number, site in enumerate(sites)]


def everything(effects: xr.DataArray) -> xr.DataArray:
    return feature_circuit(effects, n=effects.size)


def dense(edges: xr.DataArray) -> dict[tuple, float]:
    """Weights by ((site, feature, position) upstream, the same downstream)."""
    columns = [
        [edges[f"{side}_{part}"].values.tolist() for part in ("site", "feature", "position")]
        for side in ("upstream", "downstream")
    ]
    upstream, downstream = (zip(*parts, strict=True) for parts in columns)
    return dict(zip(zip(upstream, downstream, strict=True), edges.values.tolist(), strict=True))


def of_node(effects: xr.DataArray) -> dict[tuple[str, int, int], float]:
    names = list(zip(effects["site"].values.tolist(), effects["feature"].values.tolist(), strict=True))
    return {(*name, at): float(effects[at, node]) for node, name in enumerate(names) for at in range(len(effects))}


PUBLISHED = ["blocks.0.hook_resid_pre", ATTN0, MLP0, "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]


@pytest.mark.parametrize(
    ("family", "method", "sites"),
    [
        ("llama", "attribution", [Z0, Z1, Z2]),
        ("llama", "relp", [Z0, MLP0, Z1]),
        ("llama", "attribution", PUBLISHED),
        ("llama", "attribution", ["blocks.0.hook_resid_mid", "blocks.1.mlp.hook_post", Z2]),
        ("gpt_neox", "relp", PUBLISHED),
        ("gemma2", "attribution", [Z0, "blocks.1.attn.hook_v", "blocks.1.hook_attn_out"]),
        ("bloom", "attribution", [Z0, MLP0, Z1]),
    ],
)
def test_edges_from_a_node_add_up_to_its_effect(family: str, method: str, sites: list[str]) -> None:
    model = model_of(family)
    saes = saes_at(model, *sites)
    effects = feature_effects(model, TASK, saes, method=method)
    edges = dense(feature_edges(model, TASK, saes, everything(effects), method=method))
    total = dict.fromkeys(of_node(effects), 0.0)
    for (upstream, _), weight in edges.items():
        total[upstream] += weight
    expected = of_node(effects)
    largest = max(map(abs, expected.values()))
    assert list(total.values()) == pytest.approx(list(expected.values()), rel=1e-5, abs=1e-6 * largest)
    between = sum(abs(weight) for (_, (site, *_)), weight in edges.items() if site != METRIC)
    assert between > 0.01 * sum(map(abs, edges.values()))


def gradient_at(model: interp.Model, site: str) -> Tensor:
    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1, 5] - logits[:, -1, 9]

    _, _, gradients = model.run_with_gradients(TASK.clean, metric, site)
    return to_rows(site, gradients[site])


def parts_of(sae: SAE, cache) -> tuple[Tensor, Tensor]:
    """Features and error on the activations of a run."""
    x = to_rows(sae.site, cache[sae.site])
    target = sae.target_site or sae.site
    features = sae.encode(x).detach()
    return features, to_rows(target, cache[target]) - sae.decode(features, x).detach()


def directions_of(model: interp.Model, sae: SAE, feature: int, position: int) -> Tensor:
    """What a node loses, as a change of the activation that its SAE stands for."""
    sites = [sae.site, sae.target_site or sae.site]
    (clean, clean_error), (other, other_error) = (
        parts_of(sae, model.run_with_cache(tokens, sites)[1]) for tokens in (TASK.clean, TASK.corrupted)
    )
    lost = clean_error - other_error
    if feature != ERROR:
        lost = (clean - other)[..., feature, None] * sae.W_dec[feature].detach()
    return lost * (torch.arange(lost.shape[1]) == position)[:, None]


def by_finite_differences(
    model: interp.Model, up: tuple[SAE, int, int], down: tuple[SAE, int, int], frozen: list[SAE], step: float = 1e-4
) -> float:
    """(∂m/∂d)(∂d/∂u)(loss of u) from runs in which u is moved a little and SAEs on the way stay as they were."""
    sae, feature, position = down
    start, end = (one.target_site or one.site for one in (up[0], sae))
    lost = directions_of(model, *up)
    held = [one.target_site or one.site for one in frozen]
    _, clean = model.run_with_cache(TASK.clean, [start, end, *held])

    def moved(by: float) -> tuple[Tensor, Tensor]:
        value = from_rows(start, to_rows(start, clean[start]) + by * lost, clean[start])
        edits = [interp.Edit(start, value=value), *(interp.Edit(site, value=clean[site]) for site in held)]
        with model.edited(edits):
            return parts_of(sae, model.run_with_cache(TASK.clean, list({sae.site, end}))[1])

    (more, more_error), (less, less_error) = moved(step), moved(-step)
    gradient = gradient_at(model, end)[:, position]
    if feature == ERROR:
        change = (more_error - less_error)[:, position]
    else:
        change = (more - less)[:, position, feature, None] * sae.W_dec[feature].detach()
    return float((gradient * change).sum(-1).mean()) / (2 * step)


def one_of_each_kind(weights: dict[tuple, float], start: str, end: str) -> list[tuple]:
    """Random edges between two sites: from a feature or an error, to a feature or an error."""
    here = [edge for edge in weights if (edge[0][0], edge[1][0]) == (start, end)]
    order = np.random.default_rng(0).permutation(len(here))
    kinds = {(here[at][0][1] == ERROR, here[at][1][1] == ERROR): here[at] for at in order}
    assert len(kinds) == 4
    return list(kinds.values())


@pytest.mark.parametrize("sites", [[Z0, MLP0, Z1, Z2], PUBLISHED[1:]])
def test_an_edge_is_the_slope_of_a_run_with_all_saes_on_the_way_frozen(sites: list[str]) -> None:
    model = model_of("gpt2")  # of which nothing is computed in float32
    saes = saes_at(model, *sites)
    weights = dense(feature_edges(model, TASK, saes, everything(feature_effects(model, TASK, saes))))
    pairs = {(up[0], down[0]) for up, down in weights if down[0] != METRIC}
    for start, end in pairs:
        first, second = sites.index(start), sites.index(end)
        for up, down in one_of_each_kind(weights, start, end):
            ends = (saes[first], *up[1:]), (saes[second], *down[1:])
            expected = by_finite_differences(model, *ends, frozen=saes[first + 1 : second])
            assert weights[up, down] == pytest.approx(expected, rel=1e-4, abs=1e-10)


def test_edges_into_and_out_of_a_transcoder() -> None:
    """It reads one site and stands for another; its error depends on both."""
    model = model_of("gpt2")
    source = "blocks.1.ln2.hook_normalized"
    transcoder = sae_at(model, source, target_site="blocks.1.hook_mlp_out", apply_b_dec_to_input=False)
    saes = [sae_at(model, Z0), transcoder, sae_at(model, Z2)]
    effects = feature_effects(model, TASK, saes)
    weights = dense(feature_edges(model, TASK, saes, everything(effects)))
    for start, end in ((0, 1), (1, 2), (0, 2)):
        for up, down in one_of_each_kind(weights, saes[start].site, saes[end].site):
            ends = (saes[start], *up[1:]), (saes[end], *down[1:])
            expected = by_finite_differences(model, *ends, frozen=saes[start + 1 : end])
            assert weights[up, down] == pytest.approx(expected, rel=1e-4, abs=1e-10)


def pairs_of_sites(edges: xr.DataArray) -> set[tuple[str, str]]:
    return set(zip(edges["upstream_site"].values.tolist(), edges["downstream_site"].values.tolist(), strict=True))


def test_parallel_attention_has_no_edge_to_the_mlp_of_its_block() -> None:
    attn1 = "blocks.1.hook_attn_out"
    expected = {(one, two) for one in (ATTN0, MLP0, attn1) for two in (METRIC, attn1) if one != two}
    for family, more in (("gpt_neox", set()), ("gptj", set()), ("llama", {(ATTN0, MLP0)})):
        model = model_of(family)
        saes = saes_at(model, ATTN0, MLP0, attn1)
        found = feature_edges(model, TASK, saes, everything(feature_effects(model, TASK, saes)))
        assert pairs_of_sites(found) == expected | more


def test_only_ways_that_there_are_give_edges() -> None:
    """Positions look back only, MLPs at their own position; behind a whole stream that is an SAE's, nothing is seen."""
    model = model_of("llama")
    stream = "blocks.0.hook_resid_post"
    saes = saes_at(model, ATTN0, MLP0, stream, Z1)
    found = feature_edges(model, TASK, saes, everything(feature_effects(model, TASK, saes)))
    assert pairs_of_sites(found) == {
        (ATTN0, MLP0),
        (ATTN0, stream),
        (MLP0, stream),
        (stream, Z1),
        (stream, METRIC),
        (Z1, METRIC),
    }
    places = {
        (up[0], down[0]): {(one[2], two[2]) for one, two in dense(found) if (one[0], two[0]) == (up[0], down[0])}
        for up, down in dense(found)
    }
    same = {(at, at) for at in range(1, 5)}
    assert places[ATTN0, MLP0] == places[MLP0, stream] == same | {(0, 0)}
    assert places[stream, Z1] <= {(one, two) for one in range(5) for two in range(one, 5)}
    assert places[stream, Z1] > same
    assert places[Z1, METRIC] <= {(one, 4) for one in range(5)}


def test_features_that_no_clean_prompt_activates_have_no_edges_into_them() -> None:
    model = model_of("llama")
    saes = saes_at(model, Z0, Z1)
    active = parts_of(saes[1], model.run_with_cache(TASK.clean, Z1)[1])[0].gt(0).any(0)
    assert not bool(active.all())
    found = dense(feature_edges(model, TASK, saes, everything(feature_effects(model, TASK, saes))))
    entered = {down[1:] for _, down in found if down[0] == Z1 and down[1] != ERROR}
    assert entered == {(feature, at) for at, feature in active.nonzero().tolist()}


def test_a_circuit_of_some_nodes_has_the_edges_between_them() -> None:
    model = model_of("llama")
    saes = saes_at(model, Z0, MLP0, Z1)
    effects = feature_effects(model, TASK, saes)
    whole = dense(feature_edges(model, TASK, saes, everything(effects)))
    circuit = feature_circuit(effects, n=12)
    kept = {node for node, yes in of_node(circuit).items() if yes}
    found = feature_edges(model, TASK, saes, circuit, batch_size=2)
    expected = {
        (up, down): weight for (up, down), weight in whole.items() if up in kept and down in kept | {(METRIC, 0, 4)}
    }
    assert dense(found) == pytest.approx(expected, rel=1e-5, abs=1e-10)
    assert (np.diff(abs(found.values)) <= 0).all()
    assert found["upstream_label"].values.tolist() == [
        TASK.position_labels[at] for at in found["upstream_position"].values
    ]
    assert found.attrs["n_nodes"] == 12


def test_without_positions_weights_are_summed_over_both_ends() -> None:
    model = model_of("llama")
    saes = saes_at(model, Z0, Z1)
    apart = feature_edges(model, TASK, saes, everything(feature_effects(model, TASK, saes)))
    summed: dict[tuple, float] = {}
    for (up, down), weight in dense(apart).items():
        summed[*up[:2], *down[:2]] = summed.get((*up[:2], *down[:2]), 0.0) + weight
    effects = feature_effects(model, TASK, saes, by_position=False)
    found = feature_edges(model, TASK, saes, everything(effects), normalised=True)
    sides = [
        found[f"{side}_{part}"].values.tolist() for side in ("upstream", "downstream") for part in ("site", "feature")
    ]
    gap = found.attrs["metric_clean"] - found.attrs["metric_corrupted"]
    assert dict(zip(zip(*sides, strict=True), (found.values * gap).tolist(), strict=True)) == pytest.approx(
        summed, rel=1e-4, abs=1e-9
    )
    assert "upstream_position" not in found.coords


def several_lengths() -> Task:
    shorter = task_of_tokens(torch.tensor([[3, 8, 1]]), torch.tensor([[3, 9, 1]]))
    names = ("clean_ids", "corrupted_ids", "clean_text", "corrupted_text", "str_tokens", "corrupted_str_tokens")
    return Task(
        **{name: getattr(TASK, name) + getattr(shorter, name) for name in names},
        answers=torch.full((4, 1), 5),
        wrong=torch.full((4, 1), 9),
        positions={"END": torch.tensor([4, 4, 4, 2])},
        metric="logit_diff",
        name="tokens",
        index=torch.arange(4),
    )


def test_prompts_of_several_lengths_are_averaged() -> None:
    model = model_of("llama")
    saes = saes_at(model, Z0, Z1)
    effects = feature_effects(model, several_lengths(), saes, by_position=False, patch="zero")
    edges = feature_edges(model, several_lengths(), saes, everything(effects), patch="zero")
    names = list(zip(effects["site"].values.tolist(), effects["feature"].values.tolist(), strict=True))
    sides = zip(edges["upstream_site"].values.tolist(), edges["upstream_feature"].values.tolist(), strict=True)
    total = dict.fromkeys(names, 0.0)
    for name, weight in zip(sides, edges.values.tolist(), strict=True):
        total[name] += weight
    assert list(total.values()) == pytest.approx(effects.values.tolist(), rel=1e-4, abs=1e-8)


def test_integrated_gradients_are_those_of_the_later_node() -> None:
    """Of one prompt: an edge is a share of the later node's effect, by whatever gradient that is found."""
    model, task = model_of("llama"), TASK[:1]
    saes = saes_at(model, Z0, Z1)
    ig = {"method": "ig", "steps": 3}
    plain, averaged = (feature_effects(model, task, saes, **settings) for settings in ({}, ig))
    circuit = everything(plain)
    of_plain, of_averaged = of_node(plain), of_node(averaged)
    found = dense(feature_edges(model, task, saes, circuit, **ig))
    compared = 0
    for (up, down), weight in dense(feature_edges(model, task, saes, circuit)).items():
        if down[0] == METRIC:
            assert found[up, down] == pytest.approx(weight, rel=1e-5, abs=1e-12)
        elif down[1] != ERROR:
            assert found[up, down] * of_plain[down] == pytest.approx(weight * of_averaged[down], rel=1e-3, abs=1e-14)
            compared += abs(of_averaged[down] / (of_plain[down] or np.nan) - 1) > 0.01
    assert compared > 20


def planted(model: interp.Model, site: str, *, wired: int, distractors: list[int], seed: int) -> tuple[SAE, list[int]]:
    """An SAE with a feature for each word that a wired head copies, and others for what distracting heads write.

    Returns:
        (the SAE, the feature of each word).
    """
    generator = torch.Generator().manual_seed(seed)
    width, d_head = model.n_heads * model.d_head, model.d_head
    rows = [torch.eye(width)[wired * d_head : wired * d_head + N_WORDS]]
    for head in distractors:
        basis = torch.eye(width)[head * d_head : (head + 1) * d_head]
        rows += [basis, -basis]
    directions = torch.cat(rows)
    order = torch.randperm(len(directions), generator=generator)
    sae = make("relu", width, len(directions), site=site)
    with torch.no_grad():
        sae.W_dec.copy_(directions[order])
        sae.W_enc.copy_(sae.W_dec.T)
    return sae, order.argsort()[:N_WORDS].tolist()


@pytest.mark.parametrize("method", ["attribution", "ig", "relp"])
def test_the_edges_of_a_wired_model_are_found(method: str) -> None:
    """The strongest lead from the previous word, where it is the one looked for, to the word that the end copies."""
    model = interp.zoo.load("induction")
    task = interp.zoo.task("induction", n=6)
    first, previous = planted(model, Z0, wired=2, distractors=[0, 3], seed=1)
    second, copied = planted(model, Z1, wired=1, distractors=[0, 2], seed=2)
    saes, end = [first, second], len(task.clean_ids[0]) - 1
    settings = {"method": method, "steps": 3}
    effects = feature_effects(model, task, saes, **settings)
    found = dense(feature_edges(model, task, saes, feature_circuit(effects, n=40), **settings))
    between = {edge: weight for edge, weight in found.items() if edge[1][0] == Z1}
    expected = set()
    for row, (clean, corrupted) in enumerate(zip(task.clean_ids, task.corrupted_ids, strict=True)):
        if clean[-1] == corrupted[-1]:  # else the words before are the same, and another one is looked for
            looked_for = {at + 1 for at in range(end - 1) if (clean[at] == clean[-1]) != (corrupted[at] == clean[-1])}
            answers = (int(task.answers[row, 0]), int(task.wrong[row, 0]))
            expected |= {
                ((Z0, previous[clean[-1]], at), (Z1, copied[word], end))
                for at in looked_for
                for word in answers
                if clean[at] == word
            }
    assert len(expected) > 2
    strongest = sorted(between, key=lambda edge: -abs(between[edge]))[: len(expected)]
    assert set(strongest) == expected
    assert all(between[edge] > 0 for edge in strongest)


def test_the_model_and_the_saes_are_left_as_found() -> None:
    model = model_of("llama")
    saes = saes_at(model, Z0, Z1)
    circuit = feature_circuit(feature_effects(model, TASK, saes, method="relp"), n=10)
    before = model(TASK.clean)
    one, two = (feature_edges(model, TASK, saes, circuit, method="relp", progress=False) for _ in range(2))
    assert torch.equal(model(TASK.clean), before)
    assert one.equals(two)
    assert all(parameter.grad is None and parameter.requires_grad for sae in saes for parameter in sae.parameters())
    assert (one.attrs["method"], one.attrs["rules"], one.attrs["n_prompts"]) == ("relp", "relp", 3)
    model.hf.requires_grad_(False)
    assert feature_edges(model, TASK, saes, circuit, method="relp").equals(one)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.2)])
def test_saes_in_float32_in_a_model_of_another_dtype(dtype: torch.dtype, tolerance: float) -> None:
    exact_model = model_of("llama")
    saes = [sae_at(exact_model, site).float() for site in (Z0, Z1)]
    circuit = feature_circuit(feature_effects(exact_model, TASK, saes), n=10)
    exact = dense(feature_edges(exact_model, TASK, saes, circuit))
    model = interp.Model(FAMILIES["llama"].make_model(dtype=dtype))
    found = dense(feature_edges(model, TASK, saes, circuit))
    largest = max(map(abs, exact.values()))
    for edge, weight in exact.items():
        assert found.get(edge, 0.0) == pytest.approx(weight, rel=tolerance, abs=tolerance * largest)


@pytest.mark.usefixtures("unchecked")
def test_wrong_input_is_refused_before_any_run() -> None:
    model = model_of("llama")
    saes = saes_at(model, Z0, Z1)
    effects = feature_effects(model, TASK, saes)
    circuit = feature_circuit(effects, n=5)
    with pytest.raises(ValueError, match=r"circuit holds float\d+: give the kept nodes, feature_circuit"):
        feature_edges(model, TASK, saes, effects)
    with pytest.raises(ValueError, match="nodes are of other SAEs"):
        feature_edges(model, TASK, saes[:1], circuit)
    with pytest.raises(ValueError, match="the circuit has no nodes"):
        feature_edges(model, TASK, saes, feature_circuit(effects, n=0))
    with pytest.raises(ValueError, match="prompts of 5 tokens; the task has prompts of 3"):
        feature_edges(model, several_lengths()[3:], saes, circuit)
    with pytest.raises(ValueError, match="method='atp'"):
        feature_edges(model, TASK, saes, circuit, method="atp")
    with pytest.raises(ValueError, match="the metric 'accuracy' has no gradient"):
        feature_edges(model, TASK, saes, circuit, metric="accuracy")
