"""Hard-concrete gates against closed forms and against many draws."""

import math

import pytest
import torch

from interp.circuits.hard_concrete import log_alpha_of, median_gates, open_probability, sampled_gates

PARAMETERS = torch.tensor([-6.0, -2.0, -0.5, 0.0, 0.7, 2.0, 6.0], dtype=torch.float64)
N_DRAWS = 200_000


@pytest.fixture(scope="module")
def draws():
    many = PARAMETERS.expand(N_DRAWS, -1)
    return sampled_gates(many, torch.Generator().manual_seed(0))


def test_gates_are_drawn_from_the_logistic_distribution_they_come_from(draws):
    """z < x is logit u < β·logit((x − γ)/(ζ − γ)) − log_alpha, with the constants of the paper written out."""
    for x in (0.05, 0.3, 0.5, 0.9):
        stretched = (x + 0.1) / 1.2
        bound = 2 / 3 * math.log(stretched / (1 - stretched)) - PARAMETERS
        # Five standard errors of a share of 200,000 draws.
        torch.testing.assert_close((draws < x).double().mean(0), bound.sigmoid(), rtol=0, atol=0.006)
    assert float(draws.min()) == 0
    assert float(draws.max()) == 1


def test_open_probability_is_the_share_of_draws_above_zero(draws):
    torch.testing.assert_close((draws > 0).double().mean(0), open_probability(PARAMETERS), rtol=0, atol=0.006)
    # At log_alpha = 0 the gate is open when u > 1 / (1 + 11^(2/3)).
    assert float(open_probability(torch.zeros(()))) == pytest.approx(1 - 1 / (1 + 11 ** (2 / 3)), rel=1e-6)


def test_median_gate_is_the_median_of_draws(draws):
    torch.testing.assert_close(draws.median(0).values, median_gates(PARAMETERS), rtol=0, atol=0.02)
    assert median_gates(PARAMETERS)[[0, 3, 6]].tolist() == [0, pytest.approx(0.5), 1]


def test_gradient_of_a_draw_is_its_slope():
    """Also that it is 0 where the draw is cut off at 0 or 1."""

    def drawn(log_alpha):
        return sampled_gates(log_alpha, torch.Generator().manual_seed(3))

    log_alpha = PARAMETERS.repeat(20).requires_grad_()
    gates = drawn(log_alpha)
    (gradient,) = torch.autograd.grad(gates.sum(), [log_alpha])
    with torch.no_grad():
        slope = (drawn(log_alpha + 1e-6) - drawn(log_alpha - 1e-6)) / 2e-6
    torch.testing.assert_close(gradient, slope, rtol=1e-6, atol=1e-8)
    is_cut_off = (gates == 0) | (gates == 1)
    assert 20 < int(is_cut_off.sum()) < 120
    assert bool((gradient[is_cut_off] == 0).all())
    assert bool((gradient[~is_cut_off] > 0).all())


@pytest.mark.parametrize("probability", [0.001, 0.5, 0.98])
def test_a_probability_and_its_parameter(probability):
    found = open_probability(torch.tensor(log_alpha_of(probability), dtype=torch.float64))
    assert float(found) == pytest.approx(probability, rel=1e-12)


def test_draws_follow_the_generator_and_leave_the_global_one_alone():
    state = torch.random.get_rng_state()
    one, again, other = (sampled_gates(PARAMETERS, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(state, torch.random.get_rng_state())
    assert one.dtype == torch.float64
    assert bool(sampled_gates(torch.full((100_000,), 1e-3), torch.Generator()).isfinite().all())
