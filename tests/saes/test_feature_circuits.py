import numpy as np
import pytest
import torch
import xarray as xr

import interp
from interp.saes.architectures import make
from interp.saes.feature_circuits import feature_circuit, feature_faithfulness, nodes_of
from interp.saes.feature_effects import ERROR, feature_effects
from interp.saes.sae import SAE, from_rows, to_rows
from interp.zoo.wired import N_WORDS
from tests.model.families import FAMILIES
from tests.patching.tokens_task import task_of_tokens

Z0, Z1 = "blocks.0.attn.hook_z", "blocks.1.attn.hook_z"
TASK = task_of_tokens(
    torch.tensor([[5, 9, 3, 17, 8, 2], [7, 4, 4, 11, 30, 6]]),
    torch.tensor([[5, 12, 3, 17, 8, 2], [7, 4, 21, 10, 30, 6]]),
)


def planted(model: interp.Model, site: str, *, wired: int, distractors: list[int], seed: int) -> tuple[SAE, list[int]]:
    """An SAE with a feature for each word that a wired head copies, and others for what distracting heads write.

    Of each distractor two features stand for each direction of a random basis, one a sign. The order is random.

    Returns:
        (the SAE, the feature of each word).
    """
    generator = torch.Generator().manual_seed(seed)
    width, d_head = model.n_heads * model.d_head, model.d_head
    rows = [torch.eye(width)[wired * d_head : wired * d_head + N_WORDS]]
    for head in distractors:
        basis = torch.zeros(d_head, width)
        rotation = torch.linalg.qr(torch.randn(d_head, d_head, generator=generator)).Q
        basis[:, head * d_head : (head + 1) * d_head] = rotation
        rows += [basis, -basis]
    directions = torch.cat(rows)
    order = torch.randperm(len(directions), generator=generator)
    sae = make("relu", width, len(directions), site=site)
    with torch.no_grad():
        sae.W_dec.copy_(directions[order])
        sae.W_enc.copy_(sae.W_dec.T)
    return sae, order.argsort()[:N_WORDS].tolist()


@pytest.fixture(scope="module")
def induction() -> interp.Model:
    return interp.zoo.load("induction")


@pytest.fixture(scope="module")
def task() -> interp.tasks.Task:
    return interp.zoo.task("induction", n=6)


@pytest.fixture(scope="module")
def planted_saes(induction) -> tuple[list[SAE], list[int], list[int]]:
    first, previous = planted(induction, Z0, wired=2, distractors=[0, 3], seed=1)
    second, copied = planted(induction, Z1, wired=1, distractors=[0, 2], seed=2)
    return [first, second], previous, copied


def wired_nodes(task, previous: list[int], copied: list[int]) -> set[tuple[str, int, int]]:
    """What the algorithm says: at the end, which words are copied; and that the word before is the one looked for.

    The second only where clean and corrupted differ in it.
    """
    end = len(task.clean_ids[0]) - 1
    nodes = set()
    for row, (clean, corrupted) in enumerate(zip(task.clean_ids, task.corrupted_ids, strict=True)):
        nodes |= {(Z1, copied[word], end) for word in (int(task.answers[row, 0]), int(task.wrong[row, 0]))}
        if clean[-1] == corrupted[-1]:
            nodes |= {
                (Z0, previous[clean[-1]], at + 1)
                for at in range(end - 1)
                if (clean[at] == clean[-1]) != (corrupted[at] == clean[-1])
            }
    return nodes


@pytest.mark.parametrize("method", ["attribution", "ig", "relp"])
def test_the_circuit_of_a_wired_model_is_found(induction, task, planted_saes, method: str) -> None:
    saes, previous, copied = planted_saes
    expected = wired_nodes(task, previous, copied)
    assert {site for site, _, _ in expected} == {Z0, Z1}
    effects = feature_effects(induction, task, saes, method=method, steps=3, normalised=True)
    assert set(nodes_of(feature_circuit(effects, n=len(expected)))) == expected
    if method == "ig":  # at the clean run itself attention is near its limit, and small effects look smaller
        assert set(nodes_of(feature_circuit(effects, threshold=3e-3))) == expected


@pytest.mark.parametrize("ablation", ["resample", "mean"])
def test_the_wired_circuit_is_all_that_is_needed(induction, task, planted_saes, ablation: str) -> None:
    """The mean takes away what a pair shares too, such as the word before B: then the last layer's nodes alone."""
    saes, previous, copied = planted_saes
    expected = wired_nodes(task, previous, copied)
    if ablation == "mean":
        saes, expected = saes[1:], {node for node in expected if node[0] == Z1}
    effects = feature_effects(induction, task, saes)
    sizes = [0, len(expected), effects.size]
    found = feature_faithfulness(induction, task, saes, effects, sizes, ablation=ablation, n_random=2)
    assert found["faithfulness"].values == pytest.approx([0, 1, 1], abs=0.01)
    assert found["completeness"].values == pytest.approx([1, 0, 0], abs=0.01)
    assert (found["random"].sel(size=len(expected)).values < 0.5).all()


def random_saes(model: interp.Model) -> list[SAE]:
    """SAEs that leave a large error; of a model with grouped keys and values."""
    _, cache = model.run_with_cache(TASK.clean, Z0)
    width = to_rows(Z0, cache[Z0]).shape[-1]
    return [make("topk", width, 30, seed=seed, k=5, site=site) for seed, site in enumerate((Z0, Z1))]


@pytest.fixture
def llama() -> interp.Model:
    return interp.Model(FAMILIES["llama"].make_model())


@pytest.mark.parametrize("by_position", [True, False])
@pytest.mark.parametrize("errors", ["nodes", "keep", "remove"])
def test_everything_carries_all_and_nothing_none(llama, errors: str, by_position: bool) -> None:
    saes = random_saes(llama)
    effects = feature_effects(llama, TASK, saes, by_position=by_position)
    n = effects.size - (0 if errors == "nodes" else 2 * (6 if by_position else 1))
    found = feature_faithfulness(llama, TASK, saes, effects, [n, 0], errors=errors, n_random=0, batch_size=1)
    assert found["size"].values.tolist() == [0, n]
    assert float(found["faithfulness"][0]) == 0
    assert float(found["completeness"][1]) == pytest.approx(0, abs=1e-4)
    whole = float(found["faithfulness"][1])
    if errors == "remove":
        assert abs(whole - 1) > 0.01
    else:
        assert whole == pytest.approx(1, abs=1e-3)


def metric_of(logits: torch.Tensor) -> float:
    return float((logits[:, -1, 5] - logits[:, -1, 9]).double().mean())


@pytest.mark.parametrize("ablation", ["mean", "resample", "zero"])
def test_a_circuit_is_run_as_an_edit_by_hand(llama, ablation: str) -> None:
    sae = random_saes(llama)[1]
    effects = feature_effects(llama, TASK, sae)
    kept = torch.from_numpy(feature_circuit(effects, n=20).values)

    def parts(tokens: torch.Tensor) -> torch.Tensor:
        _, cache = llama.run_with_cache(tokens, Z1)
        rows = to_rows(Z1, cache[Z1])
        features = sae.encode(rows)
        return torch.cat([features, rows - features @ sae.W_dec - sae.b_dec], dim=-1).detach()

    other = parts(TASK.corrupted)
    other = {"mean": other.mean(0, keepdim=True), "resample": other, "zero": torch.zeros_like(other)}[ablation]

    def metric_with(kept: torch.Tensor) -> float:
        wide = torch.cat([kept[:, :-1], kept[:, -1:].expand(-1, sae.d_in)], dim=-1)
        mixed = torch.where(wide, parts(TASK.clean), other)
        rows = (mixed[..., : sae.d_sae] @ sae.W_dec + sae.b_dec + mixed[..., sae.d_sae :]).detach()
        _, cache = llama.run_with_cache(TASK.clean, Z1)
        with llama.edited(interp.Edit(Z1, value=from_rows(Z1, rows, cache[Z1]))), torch.no_grad():
            return metric_of(llama(TASK.clean))

    found = feature_faithfulness(llama, TASK, sae, effects, [20], ablation=ablation, n_random=0)
    with torch.no_grad():
        whole, empty = metric_of(llama(TASK.clean)), metric_with(torch.zeros_like(kept))
    assert found.attrs["metric_model"] == pytest.approx(whole, abs=1e-5)
    assert found.attrs["metric_empty"] == pytest.approx(empty, abs=1e-5)
    assert found["metric"].values == pytest.approx([metric_with(kept)], abs=1e-5)
    assert found["metric_complement"].values == pytest.approx([metric_with(~kept)], abs=1e-5)
    share = (metric_with(kept) - empty) / (whole - empty)
    assert found["faithfulness"].values == pytest.approx([share], rel=1e-2, abs=1e-2)


def some_effects() -> xr.DataArray:
    """Two positions, two SAEs of two and one features."""
    values = np.array([[0.3, -0.2, 0.05, 0.0, 0.4], [-0.5, 0.1, 0.2, 0.01, 0.02]])
    coords = {"site": ("node", [Z0] * 3 + [Z1] * 2), "feature": ("node", [0, 1, ERROR, 0, ERROR])}
    return xr.DataArray(values, dims=("position", "node"), coords={"position": [0, 1], "node": range(5), **coords})


@pytest.mark.usefixtures("unchecked")
def test_nodes_are_chosen_by_magnitude() -> None:
    effects = some_effects()
    assert nodes_of(feature_circuit(effects, n=3)) == [(Z0, 0, 0), (Z1, ERROR, 0), (Z0, 0, 1)]
    assert nodes_of(feature_circuit(effects, n=2, errors="remove")) == [(Z0, 0, 0), (Z0, 0, 1)]
    with_errors = nodes_of(feature_circuit(effects, n=1, errors="keep"))
    assert with_errors == [(Z0, ERROR, 0), (Z1, ERROR, 0), (Z0, 0, 1), (Z0, ERROR, 1), (Z1, ERROR, 1)]
    assert len(nodes_of(feature_circuit(effects))) == 5  # 0.1 is not above the threshold of 0.1
    summed = feature_circuit(effects.sum("position"), n=1)
    assert nodes_of(summed) == [(Z1, ERROR, None)]
    with pytest.raises(ValueError, match=r"n=7 is outside 0\.\.6"):
        feature_circuit(effects, n=7, errors="remove")
    with pytest.raises(ValueError, match="errors='drop'"):
        feature_circuit(effects, errors="drop")


def test_random_circuits_come_from_the_seed(llama) -> None:
    saes = random_saes(llama)
    effects = feature_effects(llama, TASK, saes)
    one, again, other = (
        feature_faithfulness(llama, TASK, saes, effects, [10], n_random=2, seed=seed, batch_size=2)["random"].values
        for seed in (0, 0, 1)
    )
    assert one.shape == (2, 1)
    assert (one == again).all()
    assert (one != other).any()
    assert len(np.unique(one)) == 2


@pytest.mark.usefixtures("unchecked")
def test_wrong_input_is_refused_before_any_run(llama) -> None:
    saes = random_saes(llama)
    effects = feature_effects(llama, TASK, saes)
    with pytest.raises(ValueError, match="nodes are of other SAEs"):
        feature_faithfulness(llama, TASK, saes[0], effects, [1])
    with pytest.raises(ValueError, match="ablation='median'"):
        feature_faithfulness(llama, TASK, saes, effects, [1], ablation="median")
    with pytest.raises(ValueError, match="outside"):
        feature_faithfulness(llama, TASK, saes, effects, [10**6])
    shorter = task_of_tokens(torch.tensor([[3, 8, 1]]), torch.tensor([[3, 9, 1]]))
    with pytest.raises(ValueError, match="prompts of 6 tokens; the task has prompts of 3"):
        feature_faithfulness(llama, shorter, saes, effects, [1])
