"""Multiple choice: attributions add up to the logits, effects are path patching's, and projections are exact."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import interp
from interp.circuits.graph import Graph
from interp.circuits.multiple_choice import answer_attribution, head_subspace, low_rank_metric, output_nodes
from interp.metrics import logit_diff
from interp.patching.activation import activation_patching
from interp.patching.path import path_patching
from tests.model.families import FAMILIES
from tests.patching.tokens_task import task_of_tokens

LETTERS = (3, 5, 7, 9)
N_PROMPTS, LENGTH = 6, 7


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request):
    return interp.load(FAMILIES[request.param].make_model("sdpa"))


@pytest.fixture(scope="module")
def llama():
    return interp.load(FAMILIES["llama"].make_model("sdpa"))


def choice_task(model, n=N_PROMPTS, seed=0):
    """Random prompts, each with another of the four letters as its answer."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(10, model.d_vocab, (n, LENGTH), generator=generator)
    corrupted = clean.clone()
    corrupted[:, 2] = 10 + (corrupted[:, 2] - 9) % (model.d_vocab - 10)
    right = [LETTERS[row % 4] for row in range(n)]
    return replace(
        task_of_tokens(clean, corrupted),
        answers=torch.tensor(right)[:, None],
        wrong=torch.tensor([[letter for letter in LETTERS if letter != answer] for answer in right]),
        positions={
            "END": torch.full((n,), LENGTH - 1),
            "A": torch.arange(n) % LENGTH,
            "B": torch.arange(n) * 3 % LENGTH,
        },
    )


# Attribution


def test_attributions_add_up_to_the_centred_logits(model):
    task = choice_task(model)
    found = answer_attribution(model, task, batch_size=4)
    letters = model(task.clean)[:, -1, list(LETTERS)]
    centred = letters - letters.mean(-1, keepdim=True)
    np.testing.assert_allclose(found["effect"].sum("node"), centred, atol=2e-5)
    np.testing.assert_allclose(found["effect"].sum("answer"), 0, atol=1e-5)
    assert found.attrs["sum_error"] < 1e-5
    assert found["node"].values.tolist() == [*Graph.of(model).writers, "bias"]
    assert found["right"].values.tolist() == [str(LETTERS[row % 4]) for row in range(N_PROMPTS)]


def test_a_heads_attribution_is_its_output_through_the_frozen_norm(llama):
    task = choice_task(llama)
    found = answer_attribution(llama, task)
    _, cache = llama.run_with_cache(task.clean, ["result", "resid_post"])
    last = cache["resid_post", llama.n_layers - 1][:, -1]
    scale = llama.final_norm(last) / last  # RMSNorm: gain / scale, entry by entry
    unembedding = llama.W_U[:, list(LETTERS)]
    effect = torch.einsum("pd,dl->pl", cache["result", 1][:, -1, 2] * scale, unembedding)
    np.testing.assert_allclose(found["effect"].sel(node="L1H2"), effect - effect.mean(-1, keepdim=True), atol=1e-5)


def test_effect_on_the_right_answer_is_picked_by_prompt(llama):
    task = choice_task(llama)
    found = answer_attribution(llama, task)
    by_hand = [found["effect"].values[row, :, LETTERS.index(LETTERS[row % 4])] for row in range(N_PROMPTS)]
    np.testing.assert_allclose(found["on_right"], np.mean(by_hand, axis=0), atol=1e-6)
    assert bool((found["low"] <= found["on_right"] + 1e-6).all())
    assert bool((found["on_right"] <= found["high"] + 1e-6).all())


def test_attribution_refuses_answers_that_differ_between_prompts(llama):
    task = choice_task(llama)
    wrong = task.wrong.clone()
    wrong[1, 0] = 11
    with pytest.raises(ValueError, match="prompt 0 has not the same possible answers"):
        answer_attribution(llama, replace(task, wrong=wrong))


def test_output_nodes_are_total_and_direct_effects(llama):
    task = choice_task(llama, n=2)
    found = output_nodes(llama, task)
    total = activation_patching(llama, task, site="z", by=("layer", "head"), direction="noise")
    direct = path_patching(llama, task, readers="logits", site="mlp_out", by=("layer",), direction="noise")
    for layer in range(llama.n_layers):
        assert float(found["direct"].sel(node=f"mlp{layer}")) == pytest.approx(float(direct[layer]), abs=1e-6)
        for head in range(llama.n_heads):
            value = float(found["total"].sel(node=f"L{layer}H{head}"))
            assert value == pytest.approx(float(total[layer, head]), abs=1e-6)
    np.testing.assert_allclose(found["indirect"], found["total"] - found["direct"], atol=1e-6)
    # Nothing comes after the last MLP, so that all its effect is direct.
    assert abs(float(found["indirect"].sel(node=f"mlp{llama.n_layers - 1}"))) < 1e-5


# Low rank


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_all_directions_change_nothing_and_none_is_the_mean(model, part):
    task = choice_task(model)
    positions = None if part == "q" else ["A", "B"]
    found = low_rank_metric(model, task, "L1H2", [0, 1, model.d_head], part=part, positions=positions, batch_size=4)
    plain = logit_diff(model(task.clean)[:, -1], task.answers, task.wrong)
    assert found.attrs["metric_plain"] == pytest.approx(float(plain.mean()), abs=1e-5)
    assert float(found["metric"].sel(rank=model.d_head)) == pytest.approx(float(plain.mean()), abs=1e-5)
    assert float(found["kl"].sel(rank=model.d_head)) == pytest.approx(0, abs=1e-5)
    by_hand = _mean_replaced(model, task, part, positions)
    assert float(found["metric"].sel(rank=0)) == pytest.approx(by_hand, abs=1e-5)
    assert abs(by_hand - float(plain.mean())) > 1e-4
    assert found["variance"].values[0] == 0
    assert found["variance"].values[-1] == pytest.approx(1)


def _mean_replaced(model, task, part, positions):
    """The metric with the head's vectors at these places replaced by their mean, by a plain hook."""
    index = 2 * model.n_heads_at(part) // model.n_heads
    where = torch.zeros(len(task), LENGTH, dtype=torch.bool)
    for name in positions or ["END"]:
        where[torch.arange(len(task)), task.positions[name]] = True
    name = f"blocks.1.attn.hook_{part}"
    _, cache = model.run_with_cache(task.clean, name)
    mean = cache[name][:, :, index][where].mean(0)

    def replaced(activation, hook):
        activation = activation.clone()
        activation[:, :, index][where] = mean
        return activation

    logits = model.run_with_hooks(task.clean, fwd_hooks=[(name, replaced)])[:, -1]
    return float(logit_diff(logits, task.answers, task.wrong).mean())


def test_subspace_is_the_principal_components(llama):
    task = choice_task(llama, n=12)
    space = head_subspace(llama, task, "L0H3", part="k", batch_size=5)
    _, cache = llama.run_with_cache(task.clean, "k")
    vectors = cache["k", 0][:, :, 3 * llama.n_kv_heads // llama.n_heads].reshape(-1, llama.d_head)
    torch.testing.assert_close(space.mean, vectors.mean(0))
    values = torch.linalg.eigvalsh(torch.cov(vectors.T)).flip(0)
    torch.testing.assert_close(space.variance, values / values.sum(), atol=1e-5, rtol=1e-4)
    projected = space.projected(vectors, 2)
    assert torch.linalg.matrix_rank(projected - space.mean, atol=1e-4) == 2
    torch.testing.assert_close(space.projected(projected, 2), projected, atol=1e-5, rtol=1e-5)
    left = (vectors - projected).square().sum() / (vectors - space.mean).square().sum()
    assert float(left) == pytest.approx(1 - float(space.variance[:2].sum()), abs=1e-5)


def test_as_many_directions_as_prompts_less_one_are_all_that_their_queries_use(llama):
    task = choice_task(llama, n=3)
    found = low_rank_metric(llama, task, "L1H0", [2])
    assert float(found["metric"][0]) == pytest.approx(found.attrs["metric_plain"], abs=1e-5)


def test_directions_fitted_elsewhere_are_used_here(llama):
    task, other = choice_task(llama), choice_task(llama, n=9, seed=1)
    held_out = low_rank_metric(llama, task, "L1H0", [1, llama.d_head], fit=other)
    assert float(held_out["metric"][1]) == pytest.approx(held_out.attrs["metric_plain"], abs=1e-5)
    space = head_subspace(llama, other, "L1H0")
    where = torch.zeros(len(task), LENGTH, dtype=torch.bool)
    where[:, -1] = True
    with llama.edited(space.edit(where, 1)):
        metric = logit_diff(llama(task.clean)[:, -1], task.answers, task.wrong).mean()
    assert float(held_out["metric"][0]) == pytest.approx(float(metric), abs=1e-6)


def test_low_rank_refuses_before_any_run(llama):
    task = choice_task(llama)
    for head, ranks, more, message in (
        ("mlp0", [1], {}, "not a head"),
        ("L0H99", [1], {}, "out of range"),
        ("L0H0", [llama.d_head + 1], {}, "ranks run 0.."),
        ("L0H0", [1], {"part": "z"}, "one of q, k, v"),
        ("L0H0", [1], {"positions": ["C"]}, "not a key position"),
    ):
        with pytest.raises(ValueError, match=message):
            low_rank_metric(llama, task, head, ranks, **more)
