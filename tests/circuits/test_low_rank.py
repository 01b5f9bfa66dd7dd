"""A head's principal directions against the covariance, and projected runs against plain hooks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import interp
from interp.circuits.low_rank import _principal, head_subspace, low_rank_metric
from interp.metrics import logit_diff
from interp.model import Site
from tests.circuits.choices import LENGTH, choice_task
from tests.model.families import FAMILIES


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request):
    return interp.load(FAMILIES[request.param].make_model("sdpa"))


@pytest.fixture(scope="module")
def llama():
    return interp.load(FAMILIES["llama"].make_model("sdpa"))


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
        ("L0H0", [llama.d_head + 1], {}, "of 0.."),
        ("L0H0", [1], {"part": "z"}, "one of q, k, v"),
        ("L0H0", [1], {"positions": ["C"]}, "not a key position"),
        ("L0H0", [1], {"positions": []}, "positions is empty"),
        ("L0H0", [], {}, "at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            low_rank_metric(llama, task, head, ranks, **more)


def test_many_vectors_take_no_more_room_than_they_do(llama):
    """Thousands of keys: an orthogonal basis of all of them would be of their number squared."""
    vectors = torch.randn(20_000, llama.d_head, generator=torch.Generator().manual_seed(0))
    space = _principal(Site("k", 0), 0, vectors * torch.arange(1, llama.d_head + 1), "L0H0.k")
    assert space.directions.shape == (llama.d_head, llama.d_head)
    torch.testing.assert_close(space.directions @ space.directions.T, torch.eye(llama.d_head), atol=1e-5, rtol=0)
    largest = space.directions.abs().argmax(-1).tolist()
    assert largest == list(range(llama.d_head - 1, -1, -1))


def test_vectors_that_are_all_the_same_have_no_shares_of_variance(llama):
    task = choice_task(llama)
    same = replace(task, clean_ids=(task.clean_ids[0],) * len(task))
    space = head_subspace(llama, same, "L0H0")
    assert bool(space.variance.isnan().all())
    vectors = torch.ones(3, llama.d_head)
    torch.testing.assert_close(space.projected(vectors, 0), space.mean.expand(3, -1))


def test_a_float64_model_stays_float64():
    model = interp.load(FAMILIES["llama"].make_model("sdpa", torch.float64))
    task = choice_task(model)
    space = head_subspace(model, task, "L1H0")
    assert space.directions.dtype == torch.float64
    _, cache = model.run_with_cache(task.clean, "q")
    queries = cache["q", 1][:, -1, 0]
    torch.testing.assert_close(space.projected(queries, model.d_head), queries, atol=1e-13, rtol=0)
