"""The closed forms of AtP*'s query and key fixes against softmaxes patched one key at a time."""

import pytest
import torch

from interp.patching.query_key_fix import keys_fixed, rows_fixed

BATCH, HEADS, LENGTH = 2, 3, 7


def random(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def causal(window=None):
    allowed = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    return allowed if window is None else allowed.triu(1 - window)


def softmax(scores, sinks):
    if sinks is None:
        shares = scores.softmax(-1)
    else:
        column = sinks[:, None, None].expand(*scores.shape[:-1], 1)
        shares = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    return shares.nan_to_num(0.0)


def one_key_at_a_time(scores, new_scores, gradient, sinks):
    before = softmax(scores, sinks)
    effects = []
    for key in range(scores.shape[-1]):
        patched = scores.clone()
        patched[..., key] = new_scores[..., key]
        effects.append(((softmax(patched, sinks) - before) * gradient).sum((-2, -1)))
    return torch.stack(effects, -1)


MASKS = {
    "causal": causal(),
    "window": causal(window=3),
    "bidirectional": torch.ones(LENGTH, LENGTH, dtype=torch.bool),
    "a row with nothing": causal() & (torch.arange(LENGTH) != 2)[:, None],
}


@pytest.mark.parametrize("scale", [0.01, 1.0, 12.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_both_fixes_equal_patched_softmaxes(scale, with_sinks, mask):
    shape = (BATCH, HEADS, LENGTH, LENGTH)
    scores, new_scores = (random(*shape, seed=seed, scale=scale).masked_fill(~mask, -torch.inf) for seed in (1, 2))
    gradient = random(*shape, seed=3)
    sinks = random(HEADS, seed=4, scale=scale) if with_sinks else None
    rows = ((softmax(new_scores, sinks) - softmax(scores, sinks)) * gradient).sum(-1)
    torch.testing.assert_close(rows_fixed(scores, new_scores, gradient, sinks), rows, atol=1e-10, rtol=0)
    keys = one_key_at_a_time(scores, new_scores, gradient, sinks)
    assert float(keys.abs().max()) > 1e-3 * min(scale, 1)
    torch.testing.assert_close(keys_fixed(scores, new_scores, gradient, sinks), keys, atol=1e-10, rtol=0)


@pytest.mark.parametrize("saturation", [20.0, 60.0, 300.0])
def test_a_saturated_head_is_computed_in_float32_as_well_as_in_float64(saturation):
    shape = (BATCH, HEADS, LENGTH, LENGTH)
    scores = random(*shape, seed=1)
    scores[..., 2] += saturation
    # The key that has everything loses it, or almost, or gains more still.
    new_scores = scores + random(*shape, seed=2)
    new_scores[0, ..., 2] -= saturation
    new_scores[1, ..., 2] += saturation
    scores, new_scores = (one.masked_fill(~causal(), -torch.inf) for one in (scores, new_scores))
    gradient = random(*shape, seed=3)
    exact = one_key_at_a_time(scores, new_scores, gradient, None)
    single = keys_fixed(scores.float(), new_scores.float(), gradient.float())
    # Scores of some hundreds are themselves known to one part in ten million only.
    torch.testing.assert_close(single.double(), exact, atol=2e-7 * saturation, rtol=1e-5)


def test_both_fixes_are_the_gradient_for_small_changes():
    shape = (BATCH, HEADS, LENGTH, LENGTH)
    scores = random(*shape, seed=1).masked_fill(~causal(), -torch.inf).requires_grad_()
    gradient = random(*shape, seed=3)
    (slope,) = torch.autograd.grad((scores.softmax(-1) * gradient).sum(), scores)
    scores = scores.detach()
    direction = random(*shape, seed=2)
    for step in (1e-4, 1e-6):
        first_order = step * direction * slope
        rows = rows_fixed(scores, scores + step * direction, gradient)
        keys = keys_fixed(scores, scores + step * direction, gradient)
        torch.testing.assert_close(rows, first_order.sum(-1), atol=20 * step**2, rtol=0)
        torch.testing.assert_close(keys, first_order.sum(-2), atol=20 * step**2, rtol=0)


def test_unchanged_scores_have_exactly_no_effect_and_half_precision_is_widened():
    scores = random(BATCH, HEADS, LENGTH, LENGTH).masked_fill(~causal(), -torch.inf)
    gradient = random(BATCH, HEADS, LENGTH, LENGTH, seed=3)
    assert not keys_fixed(scores, scores, gradient).any()
    assert not rows_fixed(scores, scores, gradient).any()
    half = keys_fixed(scores.bfloat16(), (scores + 1).bfloat16(), gradient.bfloat16())
    assert half.dtype == torch.float32


def test_scores_that_are_not_contiguous_give_the_same():
    shape = (BATCH, LENGTH, LENGTH, HEADS)
    scores, new_scores, gradient = (random(*shape, seed=seed).permute(0, 3, 1, 2) for seed in (1, 2, 3))
    torch.testing.assert_close(
        keys_fixed(scores, new_scores, gradient),
        keys_fixed(scores.contiguous(), new_scores.contiguous(), gradient.contiguous()),
    )
