"""ACT, against loops over heads and rows in hooks."""

import pytest
import torch
import xarray as xr

from interp import Model
from interp.sinks.calibration import calibrated, column_scores, hidden_sink_keys
from tests.model.families import FAMILIES
from tests.sinks.planted import N_HEADS, N_LAYERS, generated, planted_llama, step_by_step

PROMPTS = torch.tensor([[1, 20, 30, 31, 9, 33, 34, 35, 40, 41, 42, 43], [22, 23, 1, 50, 51, 52, 9, 53, 54, 43, 44, 45]])
LENGTH = PROMPTS.shape[1]
HEADS = torch.zeros(N_LAYERS, N_HEADS, dtype=torch.bool)
HEADS[1, [0, 2]] = HEADS[2, 1] = HEADS[3] = True
ALPHA = 2.5
TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def model():
    return planted_llama()


def sinks_by_loop(pattern, n, alpha=ALPHA, keep=(0,)):
    """Hidden sinks of one head: pattern [query, key], of which the first n rows and columns are the prompt."""
    scores = [sum(float(pattern[i, k]) for i in range(k, n)) / (n - k) for k in range(n)]
    return [k for k in range(n) if k not in keep and scores[k] > alpha / n]


def loop(heads, n, beta=0.4, keep=(0,), edited=None):
    """ACT of one unpadded prompt of n tokens by hooks, row by row, whatever its length by now."""

    def edit(pattern, hook):
        for h in heads[hook.layer()].nonzero()[:, 0].tolist():
            at = sinks_by_loop(pattern[0, h], n, keep=keep)
            for q in range(pattern.shape[2]):
                row = pattern[0, h, q].tolist()
                freed = (1 - beta) * sum(row[k] for k in at)
                others = sum(a for k, a in enumerate(row) if k not in at)
                if freed == 0 or others == 0:
                    continue
                if edited is not None:
                    edited.add((h, q))
                pattern[0, h, q] = torch.tensor(
                    [beta * a if k in at else a + freed * a / others for k, a in enumerate(row)]
                )

    return [(f"blocks.{layer}.attn.hook_pattern", edit) for layer in range(len(heads))]


@pytest.mark.parametrize("keep", [(0,), (), (0, 4)])
@pytest.mark.parametrize("row", [0, 1])
def test_it_is_the_loop_over_heads_and_rows(model, row, keep):
    tokens = PROMPTS[[row]]
    expected = model.run_with_hooks(tokens, loop(HEADS, LENGTH, keep=keep))
    with calibrated(model, HEADS, alpha=ALPHA, keep=keep):
        torch.testing.assert_close(model(tokens), expected, **TOLERANCE)
    assert not torch.allclose(model(tokens), expected, atol=1e-3)


def test_edited_rows_are_exactly_those_of_the_chosen_heads(model):
    heads = torch.zeros_like(HEADS)
    heads[2, [1, 3]] = True
    _, plain = model.run_with_cache(PROMPTS, "pattern")
    with calibrated(model, heads, alpha=ALPHA):
        _, after = model.run_with_cache(PROMPTS, "pattern")
    expected = set()
    for row in range(2):
        model.run_with_hooks(PROMPTS[[row]], loop(heads, LENGTH, edited=(one := set())))
        expected |= {(row, h, q) for h, q in one}
    changed = {tuple(one) for one in (plain["pattern", 2] != after["pattern", 2]).any(-1).nonzero().tolist()}
    assert changed == expected
    assert len(expected) > 4
    torch.testing.assert_close(after["pattern", 2].sum(-1), torch.ones(2, N_HEADS, LENGTH), atol=1e-6, rtol=0)


def test_the_first_token_receives(model):
    heads = torch.zeros_like(HEADS)
    heads[2] = True
    _, plain = model.run_with_cache(PROMPTS[[0]], "pattern")
    with calibrated(model, heads, alpha=ALPHA, beta=0.0):
        _, after = model.run_with_cache(PROMPTS[[0]], "pattern")
    before, now = plain["pattern", 2][0], after["pattern", 2][0]
    n_sinks = 0
    for h in range(N_HEADS):
        for k in sinks_by_loop(before[h], LENGTH):
            n_sinks += 1
            rows = (before[h, :, k] > 0) & (before[h, :, 0] > 1e-6)
            rows[:k] = False
            assert not bool(now[h, rows, k].any()), "beta = 0 leaves a hidden sink nothing"
            assert bool((now[h, rows, 0] > before[h, rows, 0]).all())
    assert n_sinks


def test_what_changes_nothing_is_bit_equal(model):
    plain = model(PROMPTS)
    for options in ({"beta": 1.0}, {"alpha": float(LENGTH)}, {"theta": 1.0}, {"alpha": ALPHA, "keep": range(LENGTH)}):
        with calibrated(model, HEADS, **options):
            assert torch.equal(model(PROMPTS), plain), options
    with calibrated(model, torch.zeros_like(HEADS), alpha=ALPHA):
        assert torch.equal(model(PROMPTS), plain)


def test_a_batch_is_each_prompt_alone_also_with_padding(model):
    ragged = [PROMPTS[0].tolist(), PROMPTS[1, 3:].tolist()]
    with calibrated(model, HEADS, alpha=ALPHA):
        together = model(ragged)
        continued = generated(model, ragged, 4)[1]
        for row, ids in enumerate(ragged):
            alone = torch.tensor([ids])
            torch.testing.assert_close(together[[row], -len(ids) :], model(alone), **TOLERANCE)
            torch.testing.assert_close(continued[[row]], generated(model, alone, 4)[1], **TOLERANCE)


def test_consecutive_prompts_do_not_see_each_other(model):
    with calibrated(model, HEADS, alpha=ALPHA):
        generated(model, PROMPTS[[0]], 3)
        second = generated(model, PROMPTS[[1]], 3)[1]
    with calibrated(model, HEADS, alpha=ALPHA):
        torch.testing.assert_close(second, generated(model, PROMPTS[[1]], 3)[1], **TOLERANCE)


@pytest.mark.parametrize("row", [0, 1])
def test_decoding_keeps_the_sinks_of_the_prompt(model, row):
    tokens = PROMPTS[[row]]
    with model.hooks(loop(HEADS, LENGTH)):
        expected = step_by_step(model, tokens, 6)
    with calibrated(model, HEADS, alpha=ALPHA):
        cached = generated(model, tokens, 6)
    with calibrated(model, HEADS, alpha=ALPHA, prompt_length=LENGTH):
        uncached = generated(model, tokens, 6, use_cache=False)
    for sequences, logits in (cached, uncached):
        assert torch.equal(sequences, expected[0])
        torch.testing.assert_close(logits, expected[1], **TOLERANCE)
    assert not torch.allclose(generated(model, tokens, 6)[1], expected[1], atol=1e-3)


def test_decoded_rows_sum_to_one(model):
    # The released code sets the first entry of the first row to 1, which in decoding is the only row.
    sums = []
    with calibrated(model, HEADS, alpha=ALPHA):
        hook = ("pattern", lambda pattern, hook: sums.append(pattern.sum(-1).flatten()))
        with model.hooks([hook]):
            generated(model, PROMPTS, 4)
    torch.testing.assert_close(torch.cat(sums), torch.ones(len(torch.cat(sums))), atol=1e-6, rtol=0)


@pytest.mark.parametrize("cache", ["static", "dynamic"])
@pytest.mark.parametrize("name", ["mistral", "gpt_oss", "gpt2", "llava"])
def test_every_family_decodes_with_a_cache_as_without(name, cache):
    family = FAMILIES[name]
    model = Model(family.make_model(family.implementations[-1]))
    inputs = family.make_inputs()
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    options = {"alpha": 1.05, "prompt_length": inputs["input_ids"].shape[1]}
    heads = torch.ones(model.n_layers, model.n_heads, dtype=torch.bool)
    with calibrated(model, heads, **options):
        cached = generated(model, inputs, 5, cache_implementation=cache)
        uncached = generated(model, inputs, 5, use_cache=False)
    torch.testing.assert_close(cached[1], uncached[1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(generated(model, inputs, 5)[1], cached[1], atol=1e-3)


def test_column_scores_count_the_rows_that_may_attend():
    pattern = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0], [0, 0.25, 0.75, 0], [0, 0, 0.5, 0.5]])[None, None]
    allowed = torch.zeros(1, 1, 4, 4, dtype=torch.bool)  # one column of padding, a window of two
    for q in (1, 2, 3):
        allowed[0, 0, q, max(1, q - 1) : q + 1] = True
    scores = column_scores(pattern, allowed)
    torch.testing.assert_close(scores[0, 0], torch.tensor([torch.nan, 0.625, 0.625, 0.5]), equal_nan=True)
    keep = torch.tensor([[False, True, False, False]])
    # Three tokens: the threshold is alpha / 3.
    assert hidden_sink_keys(scores, keep, alpha=1.8)[0, 0].tolist() == [False, False, True, False]
    assert hidden_sink_keys(scores, keep, alpha=1.4)[0, 0].tolist() == [False, False, True, True]
    assert hidden_sink_keys(scores, keep, theta=0.6)[0, 0].tolist() == [False, False, True, False]


def test_heads_may_be_labelled(model):
    with calibrated(model, HEADS, alpha=ALPHA):
        expected = model(PROMPTS)
    labelled = xr.DataArray(HEADS.T.numpy(), dims=("head", "layer"))
    with calibrated(model, labelled, alpha=ALPHA):
        assert torch.equal(model(PROMPTS), expected)


def test_a_cache_from_outside_is_refused(model):
    with torch.no_grad():
        cache = model.hf(PROMPTS, use_cache=True).past_key_values
    with calibrated(model, HEADS), pytest.raises(ValueError, match="run the prompt inside the context"):
        model.hf(torch.tensor([[5], [6]]), past_key_values=cache)


def test_mistakes_are_named(model):
    def refused(message, heads=HEADS, **options):
        with pytest.raises(ValueError, match=message), calibrated(model, heads, **options):
            pass

    refused(r"beta is 1\.4; it is a share", beta=1.4)
    refused("alpha and theta must be above 0", alpha=0.0)
    refused("positions count from the first token", keep=(-1,))
    refused("a prompt has at least one token", prompt_length=0)
    refused(r"must be torch\.bool of \[layer, head\] = \(5, 4\)", heads=HEADS[:3])
    refused(r"heads is torch\.int64", heads=xr.DataArray(HEADS.long().numpy(), dims=("layer", "head")))
    with (
        calibrated(model, HEADS, prompt_length=20),
        pytest.raises(ValueError, match="prompt_length is 20, and the prompt has 12"),
    ):
        model(PROMPTS)
    assert model.hf.config._attn_implementation == "sdpa"
