from __future__ import annotations

import json
import logging
import sys

import pytest
import torch
from safetensors import safe_open

from interp import heads, zoo
from interp.zoo.training import train_regression

N = 20_000


def structure(model: zoo.regression.RegressionTransformer):
    return heads.kq_ov(*(weight.detach() for weight in (model.W_Q, model.W_K, model.W_V, model.W_O)))


def omega_and_mu(model: zoo.regression.RegressionTransformer) -> tuple[torch.Tensor, torch.Tensor]:
    found = structure(model)
    return torch.from_numpy(found["omega"].values), torch.from_numpy(found["mu"].values)


@pytest.fixture(scope="module")
def prompts():
    return zoo.regression.draw(N, torch.Generator().manual_seed(5))


@torch.no_grad()
def predictions(model, prompts):
    return model(prompts.x, prompts.y, prompts.x_query)


def test_prompts_are_regressions_with_the_variances_they_say(prompts):
    assert prompts.x.shape == (N, 40, 5)
    assert float(prompts.x.var()) == pytest.approx(1, abs=0.01)
    assert float(prompts.y.var()) == pytest.approx(1.1, abs=0.03)
    solved = torch.linalg.lstsq(prompts.x, prompts.y[..., None])
    error = (prompts.x @ solved.solution)[..., 0] - prompts.y
    assert float(error.square().sum() / (N * (40 - 5))) == pytest.approx(0.1, abs=0.002)
    assert float(solved.solution.square().sum(1).mean()) == pytest.approx(1, abs=0.05)
    answer = torch.einsum("pd,pd->p", prompts.x_query, solved.solution[..., 0])
    assert float((answer - prompts.y_query).square().mean()) == pytest.approx(0.1 * (1 + 5 / 34), abs=0.005)


@torch.no_grad()
def test_a_forward_pass_is_the_plain_attention_of_the_query_to_the_examples(prompts):
    model = zoo.regression.load(2)
    for row in range(3):
        z = torch.cat([prompts.x[row], prompts.y[row, :, None]], dim=1)
        query = torch.cat([prompts.x_query[row], torch.zeros(1)])
        out = torch.zeros(6)
        for head in range(2):
            scores = z @ model.W_K[head] @ (query @ model.W_Q[head]) / 6**0.5
            out += scores.softmax(0) @ z @ model.W_V[head] @ model.W_O[head]
        assert float(out[-1]) == pytest.approx(float(predictions(model, prompts)[row]), abs=1e-5)
        assert (out[:-1] == 0).all()


@pytest.mark.parametrize("n_heads", [1, 2])
def test_key_query_forms_are_multiples_of_the_identity_and_outputs_one_entry(n_heads):
    found = structure(zoo.regression.load(n_heads))
    assert (found["identity_share"] > 0.99).all()
    assert (found["off_diagonal_share"] < 0.005).all()
    assert (found["last_share"] < 0.005).all()
    assert (found["mu_share"] > 0.99).all()


def test_two_heads_are_a_positive_and_a_negative_one_of_equal_size_that_add_up_to_nothing():
    found = structure(zoo.regression.load(2))
    assert sorted(found["sign"].values) == ["negative", "positive"]
    one, other = found["omega"].values
    assert one == pytest.approx(-other, rel=0.05)
    assert abs(found["zero_sum_gap"]) < 0.02 * abs(found["mu"]).max()
    # Each head's μ has the sign of its ω: both add to the slope.
    assert (found["omega"] * found["mu"] > 0).all()
    assert abs(structure(zoo.regression.load(1))["zero_sum_gap"]) > 1


def test_two_heads_regress_better_than_one(prompts):
    errors = [float((predictions(zoo.regression.load(n), prompts) - prompts.y_query).square().mean()) for n in (1, 2)]
    assert errors[1] < 0.65 * errors[0]
    assert errors[0] < 0.45  # predicting 0 has an error of 1.1


@pytest.mark.parametrize("n_heads", [1, 2])
def test_the_kernel_predictor_says_what_the_transformer_says(n_heads, prompts):
    model = zoo.regression.load(n_heads)
    said, expected = zoo.regression.kernel_predictor(prompts, *omega_and_mu(model)), predictions(model, prompts)
    assert float((said - expected).norm() / expected.norm()) < 0.03
    assert float(torch.corrcoef(torch.stack([said, expected]))[0, 1]) > 0.999


def test_the_kernel_predictor_is_its_formula(prompts):
    omega, mu = torch.tensor([0.4, -0.1]), torch.tensor([1.5, 2.0])
    few = zoo.regression.Prompts(*(part[:2] for part in prompts))
    for row, said in enumerate(zoo.regression.kernel_predictor(few, omega, mu)):
        scores = few.x[row] @ few.x_query[row]
        expected = sum(mu[h] * (omega[h] * scores).softmax(0) @ few.y[row] for h in range(2))
        assert float(said) == pytest.approx(float(expected), abs=1e-5)


def test_the_mu_that_were_learned_are_the_best_for_their_omega(prompts):
    omega, mu = omega_and_mu(zoo.regression.load(2))
    best = zoo.regression.optimal_mu(omega)
    torch.testing.assert_close(mu, best, rtol=0.02, atol=0)
    # It minimises the expected loss: no other direction is downhill.
    loss = torch.func.grad(lambda one: zoo.regression.expected_loss(omega, one))(best)
    assert float(loss.abs().max()) < 1e-4
    # The formula is one of small ω: the larger one of a single head leaves it 8 % off.
    omega, mu = omega_and_mu(zoo.regression.load(1))
    torch.testing.assert_close(mu, zoo.regression.optimal_mu(omega), rtol=0.1, atol=0)


def test_the_expected_loss_is_near_what_is_measured_where_omega_is_small(prompts):
    omega = torch.tensor([0.1, -0.1])
    for mu in (zoo.regression.optimal_mu(omega), torch.tensor([1.0, -1.0])):
        measured = (zoo.regression.kernel_predictor(prompts, omega, mu) - prompts.y_query).square().mean()
        assert float(zoo.regression.expected_loss(omega, mu)) == pytest.approx(float(measured), rel=0.1)


def test_loading_is_deterministic_and_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    one, other = zoo.regression.load(2), zoo.regression.load(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert not one.training
    with pytest.raises(ValueError, match="n_heads=3; weights ship for 1 and 2 heads"):
        zoo.regression.load(3)


def test_training_reproduces_lowers_the_error_and_writes_what_load_reads(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "interp")
    files = [tmp_path / "one.safetensors", tmp_path / "other.safetensors"]
    for file in files:
        monkeypatch.setattr(sys, "argv", ["train", "--out", str(file), "--steps", "80"])
        train_regression.main()
    assert files[0].read_bytes() == files[1].read_bytes()
    with safe_open(files[0], "pt") as file:
        notes = json.loads(file.metadata()["training"])
        shapes = {key: file.get_tensor(key).shape for key in file.keys()}  # noqa: SIM118, safetensors has no iterator
    assert all(error < 1 for error in notes["mean_squared_error"].values())  # predicting 0 has an error of 1.1
    assert shapes == {key: tensor.shape for key, tensor in zoo.regression.untrained().state_dict().items()}


def test_the_error_that_the_weights_were_saved_with_is_theirs():
    with safe_open(zoo.trained.WEIGHTS / "regression.safetensors", "pt") as file:
        notes = json.loads(file.metadata()["training"])
    with torch.no_grad():
        for n_heads, saved in notes["mean_squared_error"].items():
            generator = torch.Generator().manual_seed(notes["seed"] + 1)
            error = train_regression.mean_squared_error(zoo.regression.load(int(n_heads)), generator, n=20_000)
            assert float(error) == pytest.approx(saved, abs=2e-4)
