"""Attention moved between keys, against loops over rows."""

import pytest
import torch

from interp.sinks.move import boost_logits, interpolate_pattern, move_mass

B, H, T = 2, 3, 7


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def pattern(generator):
    scores = 2 * torch.randn(B, H, T, T, generator=generator, dtype=torch.float64)
    return scores.masked_fill(~causal(), -torch.inf).softmax(-1).float()


def causal(n_queries=T, n_keys=T):
    return torch.ones(n_queries, n_keys, dtype=torch.bool).tril(n_keys - n_queries)


def two_sets(generator, n_heads):
    drawn = torch.randint(0, 3, (B, n_heads, T), generator=generator)
    drawn[..., :2] = torch.tensor([0, 1])  # in reach of nearly every row
    return drawn == 0, drawn == 1


def moved_by_loop(pattern, donors, receivers, fraction):
    new = pattern.double().clone()
    n_batch, n_heads, n_queries, _ = pattern.shape
    for b in range(n_batch):
        for h in range(n_heads):
            gives = donors[b, h % donors.shape[1]].tolist()
            gets = receivers[b, h % receivers.shape[1]].tolist()
            for q in range(n_queries):
                row = pattern[b, h, q].double().tolist()
                share = fraction if isinstance(fraction, float) else float(fraction[b, h, q])
                given = sum(a * share for a, is_donor in zip(row, gives, strict=True) if is_donor)
                total = sum(a for a, is_receiver in zip(row, gets, strict=True) if is_receiver)
                if given == 0 or total == 0:
                    continue
                for k, a in enumerate(row):
                    new[b, h, q, k] = a * (1 - share) if gives[k] else a + given * a / total if gets[k] else a
    return new


@pytest.mark.parametrize("n_heads", [1, H])
@pytest.mark.parametrize("fraction", [0.3, 1.0, "one a row"])
def test_it_is_the_loop_over_rows(pattern, generator, n_heads, fraction):
    donors, receivers = two_sets(generator, n_heads)
    if fraction == "one a row":
        fraction = torch.rand(B, H, T, generator=generator).masked_fill(
            torch.rand(B, H, T, generator=generator) < 0.5, 0
        )
    new = move_mass(pattern, donors, receivers, fraction)
    torch.testing.assert_close(new.double(), moved_by_loop(pattern, donors, receivers, fraction), atol=1e-6, rtol=0)
    torch.testing.assert_close(new.sum(-1), torch.ones(B, H, T), atol=1e-6, rtol=0)
    assert not torch.allclose(new, pattern, atol=1e-3)
    if isinstance(fraction, torch.Tensor):
        assert torch.equal(new[fraction == 0], pattern[fraction == 0])


def test_a_fraction_of_one_leaves_donors_nothing(pattern):
    donors = torch.zeros(B, 1, T, dtype=torch.bool)
    donors[:, :, 0] = True
    new = move_mass(pattern, donors, ~donors, 1.0)
    assert not bool(new[:, :, 1:, 0].any())
    # The first row can only attend to itself: there is nobody to give to.
    assert torch.equal(new[:, :, 0], pattern[:, :, 0])


def test_what_is_not_defined_changes_nothing(pattern, generator):
    donors, receivers = two_sets(generator, 1)
    nobody = torch.zeros_like(donors)
    for result in (
        move_mass(pattern, donors, receivers, 0.0),
        move_mass(pattern, nobody, receivers, 0.7),
        move_mass(pattern, donors, nobody, 0.7),
    ):
        assert torch.equal(result, pattern)


def test_rows_that_sum_to_less_keep_their_sum(pattern, generator):
    # As with learned sink logits, and as with padded rows, which are all 0.
    sums = torch.rand(B, H, T, generator=generator)
    sums[:, :, 0] = 0
    donors, receivers = two_sets(generator, H)
    new = move_mass(pattern * sums[..., None], donors, receivers, 0.8)
    torch.testing.assert_close(new.sum(-1), sums, atol=1e-6, rtol=0)


def test_receivers_with_next_to_nothing_do_not_overflow():
    pattern = torch.tensor([1 - 3e-38, 1e-38, 2e-38])[None, None, None]
    donors = torch.tensor([[[True, False, False]]])
    new = move_mass(pattern, donors, ~donors, 1.0)
    torch.testing.assert_close(new[0, 0, 0], torch.tensor([0, 1 / 3, 2 / 3]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_is_kept_and_the_arithmetic_is_float32(pattern, generator, dtype):
    donors, receivers = two_sets(generator, 1)
    given = pattern.to(dtype)
    for change in (
        lambda one: move_mass(one, donors, receivers, 0.3),
        lambda one: interpolate_pattern(one, causal().expand(B, 1, T, T), 0.3, target="uniform"),
        lambda one: boost_logits(one, donors, 0.7),
    ):
        new = change(given)
        wide = change(given.float() if dtype != torch.float64 else given)
        assert new.dtype == dtype
        assert torch.equal(new, wide.to(dtype))


def test_the_pattern_given_is_not_modified(pattern, generator):
    before = pattern.clone()
    donors, receivers = two_sets(generator, 1)
    move_mass(pattern, donors, receivers, 0.5)
    interpolate_pattern(pattern, causal().expand(B, 1, T, T), 0.5)
    boost_logits(pattern, donors, 0.5)
    assert torch.equal(pattern, before)


def test_mistakes_are_named(pattern):
    first = torch.arange(T).expand(B, 1, T) == 2
    with pytest.raises(ValueError, match="key 2 is donor and receiver"):
        move_mass(pattern, first, first, 0.5)
    with pytest.raises(ValueError, match=r"fraction is 1\.5; it is a share between 0 and 1"):
        move_mass(pattern, first, ~first, 1.5)
    with pytest.raises(ValueError, match=r"fraction is -0\.5"):
        move_mass(pattern, first, ~first, torch.full((B, H, T), -0.5))
    allowed = causal().expand(B, 1, T, T)
    unchecked = getattr(interpolate_pattern, "__wrapped__", interpolate_pattern)  # behind the shape checks
    with pytest.raises(ValueError, match="target='mean'; it is one of identity, uniform, sink"):
        unchecked(pattern, allowed, 0.5, target="mean")
    with pytest.raises(ValueError, match="target='sink' needs sinks"):
        interpolate_pattern(pattern, allowed, 0.5, target="sink")
    with pytest.raises(ValueError, match="target='uniform' takes no sinks"):
        interpolate_pattern(pattern, allowed, 0.5, target="uniform", sinks=first)


@pytest.mark.parametrize("target", ["identity", "uniform", "sink"])
@pytest.mark.parametrize("n_queries", [T, 2])
def test_interpolation_is_the_loop_over_rows(pattern, generator, target, n_queries):
    pattern = 0.9 * pattern[:, :, -n_queries:]
    allowed = causal(n_queries).expand(B, 1, n_queries, T)
    sinks = torch.zeros(B, 1, T, dtype=torch.bool)
    sinks[0, 0, [1, 3]] = True  # rows 0 of the first prompt and all rows of the second have no sink
    share = torch.rand(B, H, n_queries, generator=generator)
    new = interpolate_pattern(pattern, allowed, share, target=target, sinks=sinks if target == "sink" else None)
    for b in range(B):
        for q in range(n_queries):
            own = T - n_queries + q
            keys = {"identity": [own], "uniform": list(range(own + 1))}.get(target)
            keys = [k for k in (1, 3) if b == 0 and k <= own] if keys is None else keys
            for h in range(H):
                u = float(share[b, h, q]) if keys else 0
                expected = (1 - u) * pattern[b, h, q]
                expected[keys] += u * 0.9 / max(1, len(keys))
                torch.testing.assert_close(new[b, h, q], expected, atol=1e-6, rtol=0)


def test_interpolation_at_its_ends(pattern):
    allowed = causal().expand(B, 1, T, T)
    assert torch.equal(interpolate_pattern(pattern, allowed, 0.0), pattern)
    torch.testing.assert_close(interpolate_pattern(pattern, allowed, 1.0), torch.eye(T).expand(B, H, T, T))


def test_boosted_scores():
    scores = torch.tensor([2.0, -2.0, 0.0, 1.0, -torch.inf])[None, None, None]
    keys = torch.tensor([True, True, True, False, True])[None, None]
    boosted = boost_logits(scores, keys, 0.7)
    torch.testing.assert_close(boosted[0, 0, 0], torch.tensor([3.4, -0.6, 0.0, 1.0, -torch.inf]))
    assert torch.equal(boost_logits(scores, keys, 0.0), scores)
