"""The trained model that sees: what it reads, where it looks, and what head divergence says of its answers."""

import random
from collections import namedtuple

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

import interp
from interp import Edit
from interp.heads import divergence, reinforced, reinforced_heads, t_vhd
from interp.metrics import bootstrap_interval
from interp.vision import without_images
from interp.zoo import digits
from interp.zoo.training import train_digits

FIRST_DIGIT = digits.WORDS.index(digits.DIGITS[0])
Shown = namedtuple("Shown", "tokens without digit writer drawn")


@pytest.fixture(scope="module")
def model():
    return interp.zoo.load("digits")


def show(model, n, seed, *, contrasts, always=lambda number: False):
    """Pictures whose writer prefers another digit than the one shown."""
    rng = random.Random(seed)
    drawn = [digits.draw(rng, contrast=rng.choice(contrasts)) for _ in range(n)]
    writers = [rng.choice([one for one in range(10) if one != picture.digit]) for picture in drawn]
    tokens = torch.cat(
        [
            model.to_tokens(digits.prompt(writer, always=always(number)), images=[picture.picture])
            for number, (picture, writer) in enumerate(zip(drawn, writers, strict=True))
        ]
    )
    digit = np.array([picture.digit for picture in drawn])
    return Shown(tokens, without_images(model, tokens), digit, np.array(writers), drawn)


def answers(model, tokens):
    logits = model(tokens, logits_to_keep=1)[:, -1, FIRST_DIGIT : FIRST_DIGIT + 10]
    return logits.argmax(-1).numpy()


def log_p_of_the_digit(model, shown):
    log_p = model(shown.tokens, logits_to_keep=1)[:, -1].log_softmax(-1)
    return log_p[torch.arange(len(shown.digit)), torch.from_numpy(shown.digit) + FIRST_DIGIT].numpy()


def test_pixels_of_the_script_are_those_of_the_processor(model):
    drawn = [digits.draw(random.Random(seed)) for seed in range(3)]
    made = model.processor.image_processor(images=[one.picture for one in drawn], return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(digits.pixel_values(drawn), made, atol=1e-6)


def test_it_reads_digits_it_was_not_trained_on(model):
    assert train_digits.accuracy(model.hf, seed=7, n=300) > 0.85
    task = interp.zoo.picture_task(model, 32, seed=1)
    assert float(interp.tasks.accuracy(model, task)["accuracy"].sel(run="clean", statistic="mean")) > 0.85


def test_it_knows_what_a_writer_prefers_without_a_picture(model):
    shown = show(model, 20, 0, contrasts=[1.0])
    np.testing.assert_array_equal(answers(model, shown.without), shown.writer)


def test_divergence_tells_prompts_that_ask_for_the_picture_from_those_that_ask_for_the_prior(model):
    """Two wordings. Within one, on pictures too faint to read, the order is the other way round: see t_vhd."""
    shown = show(model, 120, 1, contrasts=[1.0, 0.7], always=lambda number: number % 2 == 0)
    given = answers(model, shown.tokens)
    grounded, prior = given == shown.digit, given == shown.writer
    assert grounded.sum() > 40
    assert prior.sum() > 40
    found = t_vhd(divergence(model, shown.tokens, shown.without, per_prompt=True)).values
    either = grounded | prior
    assert roc_auc_score(grounded[either], found[either]) > 0.9


def test_reinforcement_beats_random_and_complement_halves(model):
    shown = show(model, 200, 2, contrasts=[0.4, 0.3, 0.2])
    chosen = reinforced_heads(model, shown.tokens, shown.without, layers=range(3), layerwise=False)

    def reinforced_log_p(selection):
        with reinforced(model, selection, alpha=1.5):
            return log_p_of_the_digit(model, shown)

    plain, with_it, complement = log_p_of_the_digit(model, shown), reinforced_log_p(chosen), reinforced_log_p(~chosen)
    draw = np.random.default_rng(0)
    halves = [
        torch.from_numpy(np.argsort(draw.random((3, 8)), axis=1) < chosen.values.sum(1, keepdims=True))
        for _ in range(5)
    ]
    by_chance = np.mean([reinforced_log_p(half) for half in halves], axis=0)
    for other in (plain, complement, by_chance):
        low, _ = bootstrap_interval(with_it - other, seed=0, axis=0)
        assert float(low) > 0.02


def test_ablating_the_heads_of_highest_divergence_hurts_most(model):
    shown = show(model, 150, 3, contrasts=[1.0])
    found = divergence(model, shown.tokens, shown.without).values
    draw = np.random.default_rng(0)

    def loss(heads):
        edits = [Edit(f"blocks.{layer}.attn.hook_z", heads=[head], value=0.0) for layer, head in heads]
        with model.edited(edits):
            return plain - log_p_of_the_digit(model, shown)

    plain = log_p_of_the_digit(model, shown)
    highest = [divmod(int(flat), 8) for flat in np.argsort(-found, axis=None)[:6]]
    by_chance = [loss([divmod(int(flat), 8) for flat in draw.permutation(24)[:6]]) for _ in range(8)]
    low, _ = bootstrap_interval(loss(highest) - np.mean(by_chance, axis=0), seed=0, axis=0)
    assert float(low) > 0


def test_the_vision_tower_looks_at_the_digit(model):
    shown = show(model, 30, 4, contrasts=[1.0])
    _, cache = model.run_with_cache(shown.tokens, "vision.blocks.0.attn.hook_pattern", logits_to_keep=1)
    pattern = cache["vision.blocks.0.attn.hook_pattern"]
    patches = torch.tensor([1 + digits.CELLS * row + column for row, column in (drawn.cell for drawn in shown.drawn)])
    on_the_digit = pattern[torch.arange(len(patches)), :, :, patches]  # [picture, head, query]
    assert float(on_the_digit.mean((0, 2)).max()) > 0.9
    elsewhere = pattern[torch.arange(len(patches)), :, :, patches % 25 + 1]
    assert float(elsewhere.mean((0, 2)).max()) < 0.2


@pytest.mark.slow
def test_training_lowers_the_loss():
    torch.manual_seed(0)
    rng = random.Random(0)
    hf = digits.digits_model()
    train_digits.initialise(hf)
    losses = []

    def loss(model):
        value = train_digits.answer_loss(model, rng)
        losses.append(value.item())
        return value

    train_digits.train(hf, loss, steps=30, learning_rate=2e-3)
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])
