"""Multiple choice: attributions add up to the logits, attention is what was planted, roles are worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr

import interp
from interp.circuits.graph import Graph
from interp.circuits.multiple_choice import answer_attribution, letter_attention, output_roles
from interp.circuits.steering import row_edits
from tests.circuits.choices import LETTERS, N_PROMPTS, choice_task, labelled_task
from tests.model.families import FAMILIES


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request):
    return interp.load(FAMILIES[request.param].make_model("sdpa"))


@pytest.fixture(scope="module")
def llama():
    return interp.load(FAMILIES["llama"].make_model("sdpa"))


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
    wrong[1, 0] = 11  # 3 in all others
    with pytest.raises(ValueError, match=r"prompt 1 has the possible answers \[5, 7, 9, 11\], prompt 0 \[3, 5, 7, 9\]"):
        answer_attribution(llama, replace(task, wrong=wrong))


# Attention to labels


def test_attention_is_by_answer_wherever_its_label_stands(model):
    task = labelled_task(model)
    planted = {
        "L0H0": ["RIGHT"],
        "L1H1": ["FIVE"],
        "L1H2": [f"LABEL{number}" for number in range(1, 5)],
        "L0H2": ["END"],
    }
    edits = [edit for head, onto in planted.items() for edit in row_edits(model, task, [head], onto)]
    with model.edited(edits):
        found = letter_attention(model, task)
    right = np.array([str(answer) for answer in task.answers[:, 0].tolist()])
    assert found["right"].values.tolist() == right.tolist()
    answers = found["answer"].values
    expected = {
        "L0H0": right[:, None] == answers,
        "L1H1": np.broadcast_to(answers == "5", (len(task), 4)),
        "L1H2": np.full((len(task), 4), 0.25),
        "L0H2": np.zeros((len(task), 4)),
    }
    for head, by_answer in expected.items():
        np.testing.assert_allclose(found["attention"].sel(node=head), by_answer, atol=1e-6)
    for head in ("L0H0", "L1H1", "L0H2"):  # all attention on one token: whatever the length of its value
        np.testing.assert_allclose(found["value_weighted"].sel(node=head), expected[head], atol=1e-6)
    shares = found["value_weighted"].sel(node="L1H2")
    np.testing.assert_allclose(shares.sum("answer"), 1, atol=1e-5)
    assert float(shares.std()) > 1e-3


def test_value_weighted_attention_by_brute_force(model):
    task = labelled_task(model)
    found = letter_attention(model, task, batch_size=4)
    _, cache = model.run_with_cache(task.clean, ["pattern", "v"])
    layer, head = 1, 2
    value = cache["v", layer][:, :, head * model.n_kv_heads // model.n_heads]
    written = cache["pattern", layer][:, head, -1, :, None] * (value @ model.W_O[layer, head])
    lengths = written.norm(dim=-1)
    for row in range(len(task)):
        for letter in LETTERS:
            share = float(lengths[row, task.clean_ids[row].index(letter)] / lengths[row].sum())
            own = float(found["value_weighted"].sel(node="L1H2", answer=str(letter))[row])
            assert own == pytest.approx(share, abs=1e-5)


def test_a_label_may_be_written_otherwise_than_the_answer(llama):
    task = labelled_task(llama)
    found = letter_attention(llama, task)
    # Other tokens, of the same text but for the space before it.
    shifted = [[30 + LETTERS.index(token) if token in LETTERS else token for token in row] for row in task.clean_ids]
    texts = tuple(
        tuple(f" {LETTERS[token - 30]}" if old in LETTERS else text for token, old, text in zip(*row, strict=True))
        for row in zip(shifted, task.clean_ids, task.str_tokens, strict=True)
    )
    other = replace(task, clean_ids=tuple(map(tuple, shifted)), str_tokens=texts)
    where = {name: places for name, places in task.positions.items() if name.startswith("LABEL")}
    attention = letter_attention(llama, other, labels=list(where))
    _, cache = llama.run_with_cache(other.clean, "pattern")
    for row in range(len(task)):
        place = task.clean_ids[row].index(7)
        expected = float(cache["pattern", 1][row, 0, -1, place])
        assert float(attention["attention"].sel(node="L1H0", answer="7")[row]) == pytest.approx(expected, abs=1e-6)
    assert attention["answer"].equals(found["answer"])


def test_attention_refuses_labels_that_are_not_the_answers(llama):
    task = labelled_task(llama)
    with pytest.raises(ValueError, match="not a key position"):
        letter_attention(llama, task, labels=["LABEL5"])
    with pytest.raises(ValueError, match=r"prompt 0: the labels are .* has to be one of them"):
        letter_attention(llama, task, labels=["LABEL1", "LABEL2", "LABEL3", "LABEL3"])
    with pytest.raises(ValueError, match="prompt 0: the labels are"):
        letter_attention(llama, task, labels=["LABEL1", "LABEL2"])


# Roles

RIGHT = ["A", "B", "C", "D", "A"]


def planted(shares, low, right=RIGHT):
    """Attention and attribution of heads, by hand: shares [node, prompt, answer]."""
    nodes, answers = [f"L0H{number}" for number in range(len(shares))], list("ABCD")
    coords = {"prompt": range(len(right)), "node": nodes, "answer": answers, "right": ("prompt", right)}
    dims = ("prompt", "node", "answer")
    shares = np.moveaxis(np.array(shares, dtype=float), 0, 1)
    attention = xr.Dataset({"attention": (dims, shares), "value_weighted": (dims, shares)}, coords=coords)
    effect = np.zeros((len(right), len(shares[0]) + 1, 4))
    bounds = {name: ("node", [*(value + shift for value in low), 0.0]) for name, shift in BOUNDS.items()}
    attribution = xr.Dataset({"effect": (dims, effect), **bounds}, coords={**coords, "node": [*nodes, "mlp0"]})
    return attribution, attention


BOUNDS = {"low": 0.0, "on_right": 1.0, "high": 2.0}


def rows(share):
    """The same share of attention by answer in every prompt, or by whether the answer is right."""
    return [[share(answer == right, answer) for answer in "ABCD"] for right in RIGHT]


def test_roles_by_hand():
    shares = [
        rows(lambda is_right, answer: 0.63 if is_right else 0.03),  # 0.72 on labels, 7/8 of it on the right one
        rows(lambda is_right, answer: 0.6 if answer == "C" else 0.1),
        rows(lambda is_right, answer: 0.2),
        rows(lambda is_right, answer: 0.01),
        rows(lambda is_right, answer: 0.01),
        rows(lambda is_right, answer: {"A": 0.4, "B": 0.4}.get(answer, 0.0)),  # two of four
        rows(lambda is_right, answer: 0.63 if is_right else 0.03),
        rows(lambda is_right, answer: np.nan),
    ]
    found = output_roles(*planted(shares, low=[1.0, -1.0, -1.0, 1.0, -1.0, 1.0, -1.0, -1.0]))
    assert found["role"].values.tolist() == [
        "correct letter", "single letter", "uniform", "amplification", "", "", "", "",
    ]  # fmt: skip
    np.testing.assert_allclose(found["on_labels"][:6], [0.72, 0.9, 0.8, 0.04, 0.04, 0.8])
    np.testing.assert_allclose(found["to_right"][:3], [7 / 8, (1 / 9 + 1 / 9 + 6 / 9 + 1 / 9) / 4, 1 / 4])
    np.testing.assert_allclose(found["to_one"][:3], [1 / 24, 6 / 9, 1 / 4])
    assert found["one"].values[1] == "C"
    np.testing.assert_allclose(found["evenness"][[2, 5]], [1, 1 / 2])
    assert bool(found.sel(node="L0H7")[["on_labels", "to_right", "to_one", "evenness"]].to_array().isnull().all())
    assert found["one"].values[7] == ""
    assert found["on_right"].values.tolist() == [2.0, 0.0, 0.0, 2.0, 0.0, 2.0, 0.0, 0.0]


def test_an_answer_that_is_right_more_often_counts_no_more():
    """The head looks at A if A is right, else evenly: A is right twice as often as the others."""
    shares = [[[1.0, 0, 0, 0] if right == "A" else [0.25] * 4 for right in RIGHT]]
    found = output_roles(*planted(shares, low=[1.0]))
    np.testing.assert_allclose(found["to_right"], (1 + 3 * 0.25) / 4)
    np.testing.assert_allclose(found["to_one"], max((0.25 * 3) / 3, (2 * 0 + 2 * 0.25) / 4))


def test_roles_of_planted_heads_in_a_model(llama):
    task = labelled_task(llama, n=8)
    edits = row_edits(llama, task, ["L1H1"], ["FIVE"]) + row_edits(llama, task, ["L0H0"], ["RIGHT"])
    with llama.edited(edits):
        found = output_roles(answer_attribution(llama, task), letter_attention(llama, task))
    one = found.sel(node="L1H1")
    assert (str(one["role"].values), str(one["one"].values)) == ("single letter", "5")
    right = found.sel(node="L0H0")
    assert float(right["to_right"]) == pytest.approx(1)
    assert str(right["role"].values) == ("correct letter" if float(right["low"]) > 0 else "")


def test_roles_refuse():
    attribution, attention = planted([rows(lambda is_right, answer: 0.2)], low=[1.0])
    with pytest.raises(ValueError, match="differ in 'right'"):
        output_roles(attribution, attention.assign_coords(right=("prompt", RIGHT[::-1])))
    shares = [[[0.25] * 4] * 2]
    with pytest.raises(ValueError, match="the same answer is right"):
        output_roles(*planted(shares, low=[1.0], right=["B", "B"]))
