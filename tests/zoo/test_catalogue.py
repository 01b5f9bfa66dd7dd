from __future__ import annotations

from pathlib import Path

import pytest
import torch

import interp
from interp import metrics, zoo
from interp.tasks import accuracy

WEIGHTS = Path(zoo.__file__).parent / "weights"
WIRED = ("induction", "duplicate", "llama_induction")
TRAINED = ("induction_2l", "ioi_small")
SEEING = ("colours", "digits")


def test_every_model_is_named_with_a_line():
    assert set(zoo.MODELS) == {*WIRED, *TRAINED, *SEEING}
    assert all(line and "\n" not in line for line in zoo.MODELS.values())
    assert interp.zoo is zoo


@pytest.mark.parametrize("name", WIRED)
def test_wired_models_do_their_task_without_fail(name):
    model = zoo.load(name)
    found = accuracy(model, zoo.task(name, n=64, seed=1))
    assert found.prompt_rank.sel(run="clean").max() == 0
    assert found.prompt_accuracy.sel(run="corrupted").max() == 0
    assert found.prompt_metric.sel(run="clean").min() > 9
    assert found.prompt_metric.sel(run="corrupted").max() < -9


@pytest.mark.parametrize("name", TRAINED)
def test_trained_models_do_their_task(name):
    model = zoo.load(name)
    found = accuracy(model, zoo.task(name, n=128, seed=1))
    assert found.top1.sel(run="clean", statistic="mean") > 0.95
    assert found.accuracy.sel(run="corrupted", statistic="mean") < 0.05
    assert float(found.gap.sel(statistic="mean")) > 5


@pytest.mark.parametrize("name", [*WIRED, *TRAINED])
def test_loading_is_deterministic_and_leaves_the_random_state_alone(name):
    state = torch.get_rng_state()
    one, other = zoo.load(name), zoo.load(name)
    assert torch.equal(torch.get_rng_state(), state)
    weights = other.hf.state_dict()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in one.hf.state_dict().items())
    assert one.dtype == torch.float32
    assert not one.hf.training
    assert all(parameter.requires_grad for parameter in one.hf.parameters())


@pytest.mark.parametrize("name", [*WIRED, *TRAINED])
def test_tasks_are_reproducible_and_aligned(name):
    one, again, other = zoo.task(name, n=16, seed=3), zoo.task(name, n=16, seed=3), zoo.task(name, n=16, seed=4)
    assert one.clean_ids == again.clean_ids
    assert one.corrupted_ids == again.corrupted_ids
    assert one.clean_ids != other.clean_ids
    assert len(one) == 16
    assert (one.positions["END"] == one.clean.shape[1] - 1).all()
    assert len(set(one.clean_ids)) == 16


@pytest.mark.parametrize("name", [*WIRED, *TRAINED])
def test_the_tokenizer_reads_the_task_as_it_is_written(name):
    model, task = zoo.load(name), zoo.task(name, n=4)
    assert torch.equal(model.to_tokens(task.clean_text), task.clean)
    assert torch.equal(model.to_tokens(task.corrupted_text), task.corrupted)
    assert tuple(model.to_str_tokens(task.clean[0])) == task.str_tokens[0]
    last = model(task.clean_text)[:, -1]
    assert metrics.logit_diff(last, task.answers, task.wrong).min() > 0


@pytest.mark.parametrize("name", ["induction", "induction_2l"])
def test_the_key_positions_of_induction_hold_what_they_say(name):
    task = zoo.task(name, n=32)
    rows = torch.arange(len(task))
    at = {key: task.clean[rows, where] for key, where in task.positions.items()}
    assert torch.equal(at["END"], at["A"])
    assert torch.equal(at["B"], task.answers[:, 0])
    assert torch.equal(at["D"], task.wrong[:, 0])
    exchanged = ({"END": "C"}, {"A": "C", "C": "A"}, {"B": "D", "D": "B"})
    for row in range(len(task)):
        expected = task.clean[row].clone()
        for key, other in exchanged[row % 3].items():
            expected[task.positions[key][row]] = at[other][row]
        assert torch.equal(task.corrupted[row], expected)


def test_the_successor_is_the_next_letter_and_after_the_last_comes_the_first():
    task = zoo.task("llama_induction", n=200)
    letters = [task.str_tokens[row][int(task.positions["B"][row])] for row in range(len(task))]
    answers = zoo.load("llama_induction").to_str_tokens(task.answers[:, 0])
    successors = dict(zip(letters, answers, strict=True))
    assert successors["a"] == "b"
    assert successors["w"] == "a"
    assert all(ord(answer) - ord(letter) in (1, ord("a") - ord("w")) for letter, answer in successors.items())


@pytest.mark.parametrize("name", ["duplicate", "ioi_small"])
def test_the_names_of_ioi_stand_where_the_key_positions_say(name):
    task = zoo.task(name, n=32)
    rows = torch.arange(len(task))
    at = {key: task.clean[rows, where] for key, where in task.positions.items()}
    assert torch.equal(at["IO"], task.answers[:, 0])
    assert torch.equal(at["S1"], task.wrong[:, 0])
    assert torch.equal(at["S2"], at["S1"])
    assert len(set((task.positions["IO"] < task.positions["S1"]).tolist())) == 2
    repeated = task.corrupted[rows, task.positions["S2+1" if name == "duplicate" else "S2"]]
    assert torch.equal(repeated, at["IO"])


def test_weights_are_safetensors_and_small():
    files = [path for path in WEIGHTS.iterdir() if not path.name.startswith(".")]
    assert {path.name for path in files} == {f"{name}.safetensors" for name in (*TRAINED, "digits", "regression")}
    assert sum(path.stat().st_size for path in files) < 5e6


@pytest.mark.parametrize(
    ("name", "hint"), [("inductoin", "did you mean 'induction'"), ("zzz", "there are induction, duplicate")]
)
def test_an_unknown_name_is_an_error_of_one_line_with_near_names(name, hint):
    for call in (zoo.load, zoo.task, zoo.edges):
        with pytest.raises(ValueError, match=f"no model '{name}' in the zoo; {hint}") as caught:
            call(name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_model_has_no_known_circuit(name):
    with pytest.raises(ValueError, match=f"'{name}' is a trained model: its circuit is not known for certain"):
        zoo.edges(name)


def test_a_task_needs_a_prompt():
    with pytest.raises(ValueError, match="n=0; a task has at least one prompt pair"):
        zoo.task("induction", n=0)
