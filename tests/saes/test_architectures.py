"""Every architecture against closed forms and finite differences, and against what all of them promise."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from interp.saes.architectures import ARCHITECTURES, make
from interp.saes.decoder import normalise_decoder, remove_parallel_gradient
from interp.saes.jumprelu import JumpReLUSAE, jump_relu, step
from interp.saes.matryoshka import MatryoshkaSAE
from interp.saes.sae import SAE
from interp.saes.topk import BatchTopKSAE, TopKFamily, TopKSAE

EACH = pytest.mark.parametrize("architecture", list(ARCHITECTURES))
D_IN, D_SAE, N_TOKENS = 4, 9, 11
SELECTING = ("batch_topk", "matryoshka")
"""They select over the batch in training, so that a token's code is another at inference."""
KINDS: dict[str, dict[str, Any]] = {
    "autoencoder": {},
    "skip transcoder": {"d_out": 3, "skip": True, "target_site": "blocks.0.hook_mlp_out"},
}
ALL = pytest.mark.parametrize("kind", list(KINDS))
DEAD = torch.arange(D_SAE) % 3 == 0

Values = Mapping[str, Tensor]


def random_sae(architecture: str, kind: str = "autoencoder", **settings: Any) -> SAE:
    """float64, every parameter random, decoder norms not 1."""
    if issubclass(ARCHITECTURES[architecture], TopKFamily):
        settings = {"k": 3, "k_aux": 2, "auxk_coefficient": 0.5, **settings}
    sae = make(architecture, D_IN, D_SAE, **settings, **KINDS[kind]).double().eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        if isinstance(sae, JumpReLUSAE):
            sae.threshold.abs_()
    return sae


def batch(sae: SAE) -> tuple[Tensor, Tensor]:
    """Inputs and targets."""
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(N_TOKENS, sae.d_in, generator=generator, dtype=torch.float64)
    if sae.target_site is None:
        return x, x
    return x, torch.randn(N_TOKENS, sae.d_out, generator=generator, dtype=torch.float64)


def largest(scores: Tensor, k: int) -> Tensor:
    """1 where an entry is among the k largest of its row."""
    rank = (scores[..., None, :] > scores[..., :, None]).sum(-1)
    return (rank < k).to(scores.dtype)


def closed_form(sae: SAE, p: Values, frozen: Values, x: Tensor, y: Tensor) -> Tensor:
    """The loss written out; what the loss holds constant comes from `frozen`."""
    centred = x - p["b_dec"] if sae.apply_b_dec_to_input else x
    projected, norms = centred @ p["W_enc"], p["W_dec"].pow(2).sum(1).sqrt()
    skip = x @ p["W_skip"] if "W_skip" in p else 0.0
    n = len(x)

    def error(features: Tensor) -> Tensor:
        return y - (features @ p["W_dec"] + p["b_dec"] + skip)

    if sae.architecture == "gated":
        gate = projected + p["b_gate"]
        magnitude = projected * torch.exp(p["r_mag"]) + p["b_mag"]
        features = torch.where((gate > 0) & (magnitude > 0), magnitude, 0.0)
        opened = gate.clamp(min=0)
        frozen_skip = x @ frozen["W_skip"] if "W_skip" in p else 0.0
        auxiliary = y - (opened @ frozen["W_dec"] + frozen["b_dec"] + frozen_skip)
        return ((error(features) ** 2).sum() + sae.l1 * (opened * norms).sum() + (auxiliary**2).sum()) / n
    pre = projected + p["b_enc"]
    if sae.architecture == "relu":
        features = pre.clamp(min=0)
        return ((error(features) ** 2).sum() + sae.l1 * (features * norms).sum()) / n
    if sae.architecture == "jumprelu":
        active = (pre > p["threshold"]).double()
        features = pre * active
        l0 = active.sum() / n
        penalty = {
            ("step", False): l0,
            ("step", True): ((l0 / (sae.target_l0 or 1.0)) - 1) ** 2,
            ("tanh", False): torch.tanh(sae.tanh_scale * features * norms).sum() / n,
        }[sae.sparsity, sae.target_l0 is not None]
        below = ((p["threshold"] - pre).clamp(min=0) * norms)[:, DEAD].sum() / n
        return (error(features) ** 2).sum() / n + sae.coefficient * penalty + sae.dead_coefficient * below
    if sae.architecture == "topk":
        features = largest(pre, sae.k) * pre.clamp(min=0)
    else:
        features = (largest(pre.flatten(), sae.k * n) * pre.flatten().clamp(min=0)).view_as(pre)
    widths = sae.widths if sae.architecture == "matryoshka" else (D_SAE,)
    total = sum((error(features * (torch.arange(D_SAE) < width)) ** 2).sum() for width in widths)
    dead_features = largest(pre.masked_fill(~DEAD, -torch.inf), sae.k_aux) * pre.clamp(min=0)
    if p is frozen:
        frozen["error"] = error(features)
    return (total + sae.auxk_coefficient * ((dead_features @ p["W_dec"] - frozen["error"]) ** 2).sum()) / n


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "relu": ("relu", {"l1": 0.7}),
    "gated": ("gated", {"l1": 0.7}),
    "topk": ("topk", {}),
    "batch_topk": ("batch_topk", {}),
    "matryoshka": ("matryoshka", {"widths": [2, 5, D_SAE]}),
    "jumprelu step": ("jumprelu", {"coefficient": 0.6, "dead_coefficient": 0.3}),
    "jumprelu target": ("jumprelu", {"target_l0": 2.0, "dead_coefficient": 0.3}),
    "jumprelu tanh": ("jumprelu", {"sparsity": "tanh", "coefficient": 0.6, "dead_coefficient": 0.3}),
}


@pytest.mark.parametrize("case", list(CASES))
@ALL
def test_loss_and_gradients_equal_closed_form_and_finite_differences(case: str, kind: str) -> None:
    architecture, settings = CASES[case]
    sae = random_sae(architecture, kind, **settings)
    x, y = batch(sae)
    values = {name: one.detach().clone() for name, one in sae.named_parameters()}
    frozen = dict(values)
    closed_form(sae, frozen, frozen, x, y)
    loss = sae.loss(x, y, dead=DEAD)
    torch.testing.assert_close(loss.total.detach(), closed_form(sae, values, frozen, x, y))
    loss.total.backward()
    for name, parameter in sae.named_parameters():
        if name == "threshold":
            continue  # no difference quotient shows an estimate; see below
        assert parameter.grad is not None, name
        slopes = finite_differences(
            lambda one, name=name: closed_form(sae, {**values, name: one}, frozen, x, y), values[name]
        )
        torch.testing.assert_close(
            parameter.grad, slopes, rtol=1e-6, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )


def finite_differences(function: Callable[[Tensor], Tensor], at: Tensor, size: float = 1e-6) -> Tensor:
    slopes = torch.zeros_like(at)
    for index in range(at.numel()):
        shift = torch.zeros_like(at)
        shift.view(-1)[index] = size
        slopes.view(-1)[index] = (function(at + shift) - function(at - shift)) / (2 * size)
    return slopes


@pytest.mark.parametrize("target_l0", [None, 2.0])
def test_threshold_gradients_of_jump_relu_are_the_published_estimate(target_l0: float | None) -> None:
    """Eqs. 11 and 12 of Rajamanoharan et al. 2024, token by token and feature by feature."""
    bandwidth, coefficient = 0.8, 0.6
    sae = random_sae("jumprelu", bandwidth=bandwidth, coefficient=coefficient, target_l0=target_l0)
    x, y = batch(sae)
    sae.loss(x, y).total.backward()
    gradient = sae.threshold.grad
    assert gradient is not None
    sae.requires_grad_(False)
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    error = y - sae(x)
    l0 = (pre > sae.threshold).double().sum() / N_TOKENS
    slope_of_l0 = coefficient * (1.0 if target_l0 is None else float(2 * (l0 / target_l0 - 1) / target_l0))
    expected = torch.zeros(D_SAE, dtype=torch.float64)
    n_near = 0
    for token in range(N_TOKENS):
        for feature in range(D_SAE):
            threshold = float(sae.threshold[feature])
            if abs(float(pre[token, feature]) - threshold) < bandwidth / 2:
                n_near += 1
                slope_of_feature = float(-2 * error[token] @ sae.W_dec[feature]) / N_TOKENS
                expected[feature] += -threshold / bandwidth * slope_of_feature
                expected[feature] += -1 / bandwidth * slope_of_l0 / N_TOKENS
    assert n_near > 5
    torch.testing.assert_close(gradient, expected)


def test_the_estimate_is_the_slope_of_the_expected_loss() -> None:
    """Over many pre-activations of even density, the estimate equals the slope of the mean that it stands for."""
    pre = torch.linspace(-1, 2, 300_001, dtype=torch.float64)[:, None]
    threshold = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    (jump_relu(pre, threshold, 0.1).mean() + 3 * step(pre, threshold, 0.1).mean()).backward()
    # The mean of p 1[p > t] over [-1, 2] has slope -t / 3, that of 1[p > t] has slope -1 / 3.
    assert threshold.grad is not None
    assert threshold.grad.item() == pytest.approx(-0.5 / 3 - 1, rel=1e-3)


@EACH
@ALL
def test_contract(architecture: str, kind: str) -> None:
    """Shapes, dtype, sign, linear decoding, tokens that do not see each other, and terms that add up."""
    sae = random_sae(architecture, kind)
    if architecture in SELECTING:
        sae.threshold.fill_(0.5)
    sae = sae.float()
    x, y = (one.float() for one in batch(sae))
    features = sae.encode(x)
    assert features.dtype == sae.dtype == torch.float32
    assert features.shape == (N_TOKENS, D_SAE)
    assert (features >= 0).all()
    assert 0 < (features > 0).float().mean() < 1
    assert sae.pre_activations(x).shape == features.shape
    assert torch.equal(sae(x), sae.decode(features, x))
    torch.testing.assert_close(sae.encode(x[:3].view(3, 1, D_IN)), features[:3, None])
    zero = torch.zeros_like(features)
    origin = sae.decode(zero, x)
    torch.testing.assert_close(
        sae.decode(2 * features, x) - origin, 2 * (sae.decode(features, x) - origin), atol=1e-4, rtol=1e-4
    )
    loss = sae.loss(x.view(1, N_TOKENS, D_IN), y.view(1, N_TOKENS, sae.d_out), dead=DEAD)
    torch.testing.assert_close(loss.total, loss.reconstruction + loss.sparsity + loss.auxiliary)
    assert loss.features.shape == (N_TOKENS, D_SAE)
    assert torch.equal(loss.counts, (loss.features > 0).sum(0))
    torch.testing.assert_close(loss.output, sae.decode(loss.features, x).detach())
    if architecture not in SELECTING:
        torch.testing.assert_close(loss.features, features.detach())
        torch.testing.assert_close(loss.reconstruction, (sae(x) - y).square().sum(-1).mean())
    assert not loss.features.requires_grad
    assert not loss.output.requires_grad


@EACH
@ALL
def test_settings_build_it_again(architecture: str, kind: str) -> None:
    sae = random_sae(architecture, kind)
    again = ARCHITECTURES[architecture](**json.loads(json.dumps(sae.settings())), target_site=sae.target_site).double()
    assert again.settings() == sae.settings()
    again.load_state_dict(sae.state_dict())
    x, y = batch(sae)
    assert torch.equal(again(x), sae(x))
    assert torch.equal(again.eval().loss(x, y, dead=DEAD).total, sae.loss(x, y, dead=DEAD).total)


@EACH
def test_a_seed_makes_the_same_one(architecture: str) -> None:
    b_dec = torch.arange(6.0)
    settings = {"k": 2} if issubclass(ARCHITECTURES[architecture], TopKFamily) else {}
    first, second, other = (
        make(architecture, 6, 20, seed=seed, b_dec=b_dec, site="blocks.0.hook_attn_out", **settings)
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.W_dec, other.W_dec)
    torch.testing.assert_close(first.W_dec.norm(dim=1), torch.ones(20))
    assert torch.equal(first.W_enc, first.W_dec.T)
    assert torch.equal(first.b_dec, b_dec)
    assert (first.d_in, first.d_sae, first.d_out, first.site) == (6, 20, 6, "blocks.0.hook_attn_out")
    first.loss(torch.randn(5, 6)).total.backward()


def test_a_new_transcoder_has_directions_of_its_own() -> None:
    made = make("topk", 6, 20, k=2, target_site="blocks.0.hook_mlp_out")
    assert not made.apply_b_dec_to_input
    torch.testing.assert_close(made.W_enc.norm(dim=0), torch.ones(20))
    torch.testing.assert_close(made.W_dec.norm(dim=1), torch.ones(20))
    assert not torch.equal(made.W_enc, made.W_dec.T)


@EACH
@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_trains_too(architecture: str, kind: str, dtype: torch.dtype) -> None:
    sae = random_sae(architecture, kind).float()
    x, y = (one.to(dtype) for one in batch(sae))
    with torch.autocast("cpu", torch.bfloat16):
        loss = sae.loss(x, y, dead=DEAD)
    loss.total.backward()
    exact = sae.loss(x.float(), y.float(), dead=DEAD).total
    assert loss.total.item() == pytest.approx(exact.item(), rel=0.1)
    assert all(one.grad is not None and one.grad.isfinite().all() for one in sae.parameters())
    assert all(one.grad is not None and one.grad.dtype == torch.float32 for one in sae.parameters())


def test_batch_top_k_threshold_follows_the_smallest_activation_kept() -> None:
    sae = make("batch_topk", D_IN, D_SAE, k=2, threshold_rate=0.25)
    assert isinstance(sae, BatchTopKSAE)
    x = torch.randn(2, N_TOKENS, D_IN, generator=torch.Generator().manual_seed(0))
    smallest = [sae.pre_activations(one).flatten().sort(descending=True).values[2 * N_TOKENS - 1].item() for one in x]
    assert torch.equal(sae.encode(x), sae.pre_activations(x).relu())
    sae.loss(x[0])
    assert sae.threshold.item() == pytest.approx(smallest[0])
    sae.loss(x[1])
    after = 0.75 * smallest[0] + 0.25 * smallest[1]
    assert sae.threshold.item() == pytest.approx(after)
    sae.eval().loss(x[0])
    assert sae.threshold.item() == pytest.approx(after)
    pre_activations = sae.pre_activations(x)
    assert torch.equal(sae.encode(x), torch.where(pre_activations > after, pre_activations, 0.0))
    with torch.no_grad():
        sae.b_enc.fill_(-100.0)
    sae.train().loss(x[0])
    assert sae.threshold.item() == pytest.approx(after)
    assert "threshold" in sae.state_dict()


def test_matryoshka_prefixes_are_autoencoders_of_their_own() -> None:
    sae = random_sae("matryoshka", widths=[2, 5, D_SAE])
    assert isinstance(sae, MatryoshkaSAE)
    x, _ = batch(sae)
    features = sae.encode(x)
    for width, output in zip((2, 5, D_SAE), sae.prefix_outputs(features, x), strict=True):
        torch.testing.assert_close(output, sae.decode(features * (torch.arange(D_SAE) < width)))


def test_top_k_keeps_no_negative_activations() -> None:
    sae = random_sae("topk")
    with torch.no_grad():
        sae.b_enc.fill_(-100.0)
    x, _ = batch(sae)
    assert not sae.encode(x).any()
    assert not sae.loss(x).counts.any()


def test_auxk_pulls_on_dead_features_only() -> None:
    """Its gradients, with those of the rest of the loss taken away."""
    sae = random_sae("topk")
    assert isinstance(sae, TopKSAE)
    x, _ = batch(sae)
    sae.loss(x, dead=DEAD).auxiliary.backward()
    assert sae.W_dec.grad is not None
    assert sae.b_enc.grad is not None
    assert not sae.W_dec.grad[~DEAD].any()
    assert not sae.b_enc.grad[~DEAD].any()
    assert sae.W_dec.grad[DEAD].any()
    assert sae.loss(x, dead=torch.zeros(D_SAE, dtype=torch.bool)).auxiliary == 0


def test_decoder_norms_are_kept_and_gradients_projected() -> None:
    sae = random_sae("relu")
    x, _ = batch(sae)
    direction = sae.W_dec.detach() / sae.W_dec.detach().norm(dim=1, keepdim=True)
    sae.loss(x).total.backward()
    assert sae.W_dec.grad is not None
    before = sae.W_dec.grad.clone()
    remove_parallel_gradient(sae)
    torch.testing.assert_close((sae.W_dec.grad * direction).sum(1), torch.zeros(D_SAE, dtype=torch.float64))
    parallel = (before * direction).sum(1, keepdim=True) * direction
    torch.testing.assert_close(sae.W_dec.grad + parallel, before)
    normalise_decoder(sae)
    torch.testing.assert_close(sae.W_dec.detach(), direction)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make("topkk", 4, 8), "'topkk' is not an architecture; choose one of relu"),
        (lambda: make("topk", 4, 8, l1=1.0), "topk has no setting 'l1'; it has k, "),
        (lambda: make("topk", 4, 8, k=9), r"k=9 is outside 1\.\.8"),
        (lambda: make("topk", 4, 8, k=2, k_aux=0), "k_aux=0 must be 1 or more"),
        (lambda: make("batch_topk", 4, 8, k=2, threshold_rate=0.0), "threshold_rate=0.0 is a share"),
        (lambda: make("relu", 4, 8, b_dec=torch.ones(1)), r"b_dec is \[1\]; it must be \[4\]"),
        (lambda: make("relu", 0, 8), "d_in=0"),
        (lambda: make("matryoshka", 4, 8, k=2, widths=[4, 2, 8]), "must ascend"),
        (lambda: make("matryoshka", 4, 8, k=2, widths=[4, 7]), "d_sae=8"),
        (lambda: make("matryoshka", 4, 8, k=2, widths=[]), r"widths=\[\] must ascend"),
        (lambda: make("jumprelu", 4, 8, sparsity="tanh", target_l0=3.0), "goes with sparsity='step'"),
        (lambda: make("jumprelu", 4, 8, bandwidth=0.0), "must be positive"),
        (lambda: make("relu", 4, 8, d_out=5, apply_b_dec_to_input=True), "give apply_b_dec_to_input=False"),
        (lambda: make("relu", 4, 8)(torch.zeros(2, 5)), "the input is 5 wide and the encoder 4"),
        (lambda: make("topk", 4, 8, k=2).loss(torch.zeros(2, 4).double()), "the input is torch.float64"),
        (lambda: make("relu", 4, 8, d_out=5).loss(torch.zeros(2, 4)), "needs a target"),
        (lambda: make("relu", 4, 8, d_out=5).loss(torch.zeros(2, 4), torch.zeros(2, 4)), r"it must be \[2, 5\]"),
        (lambda: make("relu", 4, 8, skip=True).decode(torch.zeros(2, 8)), "give decode the input too"),
    ],
)
def test_bad_input_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_an_unknown_penalty_is_refused() -> None:
    """By the class, or before it where annotations are checked at run time."""
    with pytest.raises((ValueError, TypeError), match="'step'"):
        make("jumprelu", 4, 8, sparsity="l1")
