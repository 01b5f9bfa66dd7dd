"""One SAE in training: a step against one made by hand, dead features, scales, and numbers that are refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import interp
from interp.model import Site
from interp.saes.learner import Learner
from interp.saes.recipe import Recipe


def recipe(**options: object) -> Recipe:
    settings: dict[str, object] = {
        "architecture": "topk",
        "settings": {"k": 2},
        "expansion": 3,
        "d_sae": None,
        "n_tokens": 50 * 64,
        "batch_size": 64,
        "learning_rate": 0.01,
        "warm_up": 0,
        "decay": 0,
        "sparsity_warm_up": 0,
        "clip": None,
        "unit_decoder": True,
        "normalise": False,
        "dead_after_tokens": 10**6,
        "resample_every": 3,
        "resample_times": 4,
        "autocast": None,
        "seed": 0,
    }
    return Recipe(**settings | options)


X, Y = Site("z", 0), Site("mlp_out", 0)


def rows(seed: int = 0) -> dict[Site, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {X: 3 * torch.randn(64, 6, generator=generator) + 1, Y: torch.randn(64, 5, generator=generator) / 10}


def learner(target: Site | None = None, **options: object) -> Learner:
    made = Learner(X, target, recipe(**options), {X: 6, Y: 5}, torch.device("cpu"))
    made.start(rows())
    return made


def test_a_step_projects_the_decoders_gradient_then_moves_then_normalises() -> None:
    made = learner()
    sae = copy.deepcopy(made.sae)
    optimiser = torch.optim.Adam(sae.parameters(), lr=0.01, foreach=False)
    for step in range(3):
        made.step(step, rows(step))
        optimiser.zero_grad()
        sae.loss(rows(step)[X]).total.backward()
        with torch.no_grad():
            along = (sae.W_dec.grad * sae.W_dec).sum(-1, keepdim=True)
            assert float(along.abs().max()) > 0.01
            sae.W_dec.grad -= along * sae.W_dec
            optimiser.step()
            sae.W_dec /= sae.W_dec.norm(dim=-1, keepdim=True)
    for name, value in sae.named_parameters():
        torch.testing.assert_close(made.sae.get_parameter(name), value, atol=1e-6, rtol=1e-5)


def test_gradients_are_cut_and_the_penalty_warms_up() -> None:
    cut = learner(clip=0.5)
    cut.step(0, rows())
    assert float(torch.stack([one.grad.norm() for one in cut.parameters]).norm()) == pytest.approx(0.5, rel=1e-4)
    options = {"architecture": "relu", "unit_decoder": False}
    warm, half = (learner(**options, settings={"l1": l1}, sparsity_warm_up=n) for l1, n in ((8.0, 4), (2.0, 0)))
    for one in (warm, half):
        one.step(0, rows())
    torch.testing.assert_close(warm.sae.W_enc.grad, half.sae.W_enc.grad)


def test_features_are_dead_after_tokens_of_all_processes_and_begin_anew_when_resampled() -> None:
    made = learner(dead_after_tokens=150)
    with torch.no_grad():
        made.sae.W_enc[:, 4] = 0
        made.sae.b_enc[4] = -100
    for step in range(3):
        made.step(step, rows(step))
        assert int(made.firing.tokens_since[4]) == 64 * (step + 1)
        assert bool(made.dead[4]) == (step == 2)
    made.firing.tokens_since[7] = 130
    assert made.resample(3, rows()) == 1
    # A window of silence was resampled; one that has been silent for less is as dead as before.
    assert made.firing.tokens_since[[4, 7]].tolist() == [0, 130]
    assert made.learning_rate(3) == 0.01
    made.recipe = recipe(warm_up=10)
    assert made.learning_rate(3) == pytest.approx(0.001)


@pytest.mark.parametrize("target", [None, Y])
def test_activations_are_scaled_to_a_mean_norm_of_the_root_of_their_width(target: Site | None) -> None:
    made = learner(target, normalise=True)
    x, y = made._pair(rows())
    assert float(x.norm(dim=-1).mean()) == pytest.approx(6**0.5, rel=1e-5)
    assert float(y.norm(dim=-1).mean()) == pytest.approx((6 if target is None else 5) ** 0.5, rel=1e-5)
    torch.testing.assert_close(made.sae.b_dec, y.mean(0))
    for step in range(5):
        made.step(step, rows(step))
    found = made.finished({})
    size = float(rows()[target or X].norm(dim=-1).mean()) / y.shape[1] ** 0.5
    torch.testing.assert_close(found(rows()[X]), made.sae(x) * size)
    torch.testing.assert_close(found.encode(rows()[X]), made.sae.encode(x))


@pytest.mark.parametrize("architecture", ["batch_topk", "jumprelu"])
def test_thresholds_keep_their_meaning_when_the_scale_is_folded(architecture: str) -> None:
    made = learner(architecture=architecture, settings={"k": 2} if architecture == "batch_topk" else {}, normalise=True)
    for step in range(5):
        made.step(step, rows(step))
    found = made.finished({})
    features = made.sae.encode(made._pair(rows())[0])
    assert 0 < int((features > 0).sum()) < features.numel()
    torch.testing.assert_close(found.encode(rows()[X]), features)


def test_thresholds_do_not_fall_below_nothing() -> None:
    made = learner(architecture="jumprelu", settings={"target_l0": 17.0}, learning_rate=0.02)
    for step in range(20):
        made.step(step, rows(step))
        assert float(made.sae.threshold.detach().min()) >= 0
    assert float(made.sae.threshold.detach().min()) == 0


@pytest.mark.parametrize("architecture", interp.saes.ARCHITECTURES)
def test_every_term_of_the_loss_is_float32_under_autocast(architecture: str) -> None:
    settings = {} if architecture in ("relu", "gated", "jumprelu") else {"k": 2}
    made = learner(architecture=architecture, settings=settings, autocast="bfloat16", dead_after_tokens=1)
    loss = made.step(0, rows())
    assert {one.dtype for one in loss[:6]} == {torch.float32}


def test_in_a_short_training_features_are_dead_sooner() -> None:
    """After the usual ten million tokens none would ever be."""
    assert recipe(dead_after_tokens=None, n_tokens=2_000_000).dead_after == 200_000
    assert recipe(dead_after_tokens=None, n_tokens=10**9).dead_after == 10**7
    assert recipe(dead_after_tokens=70).dead_after == 70


@pytest.mark.usefixtures("unchecked")
def test_whole_numbers_of_any_type_are_the_same() -> None:
    assert repr(recipe(seed=np.int64(3), n_tokens=np.int32(64))) == repr(recipe(seed=3, n_tokens=64))
    with pytest.raises(ValueError, match=r"n_tokens=2000\.0; give a whole number"):
        recipe(n_tokens=2e3)
    with pytest.raises(ValueError, match=r"widths=.* give a plain number, text or list, as files can hold"):
        recipe(settings={"widths": torch.tensor([1, 2])})
    with pytest.raises(ValueError, match=r"autocast=float64; give torch\.bfloat16"):
        recipe(autocast="float64")
