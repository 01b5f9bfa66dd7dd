import pytest
import torch
from torch import Tensor

import interp
from interp.patching import attribution_patching, integrated_gradients, relevance_patching
from interp.saes.architectures import make
from interp.saes.feature_effects import ERROR, feature_effects, place
from interp.saes.sae import SAE, from_rows, to_rows
from interp.saes.splice import features_of, spliced
from interp.tasks import Task
from tests.model.families import FAMILIES
from tests.patching.tokens_task import task_of_tokens

Z0, Z1 = "blocks.0.attn.hook_z", "blocks.1.attn.hook_z"
TASK = task_of_tokens(
    torch.tensor([[5, 9, 3, 17, 8, 2], [7, 4, 4, 11, 30, 6], [1, 2, 3, 4, 5, 6]]),
    torch.tensor([[5, 12, 3, 17, 8, 2], [7, 4, 21, 10, 30, 6], [1, 2, 33, 4, 5, 6]]),
)


def sae_at(model: interp.Model, site: str, architecture: str = "relu", d_sae: int = 30, **settings) -> SAE:
    """An SAE with random weights that leaves a large error."""
    _, cache = model.run_with_cache(TASK.clean, site)
    settings = {"k": 4} | settings if architecture == "topk" else settings
    sae = make(architecture, to_rows(site, cache[site]).shape[-1], d_sae, seed=len(site), site=site, **settings)
    with torch.no_grad():
        sae.b_dec.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    return sae


@pytest.fixture
def llama() -> interp.Model:
    return interp.Model(FAMILIES["llama"].make_model())


@pytest.fixture(scope="module")
def induction() -> interp.Model:
    return interp.zoo.load("induction")


def at_site(effects, site: str):
    return effects.isel(node=effects["site"].values == site)


@pytest.mark.parametrize(
    ("family", "method"),
    [("llama", "attribution"), ("llama", "relp"), ("llama", "ig"), ("gpt_neox", "relp"), ("gemma2", "attribution")],
)
def test_nodes_of_a_position_add_up_to_the_estimate_for_the_site(family: str, method: str) -> None:
    model = interp.Model(FAMILIES[family].make_model())
    site_wide = {"by": ("layer", "position"), "site": "z", "direction": "noise", "normalised": False}
    expected = {
        "attribution": lambda: attribution_patching(model, TASK, **site_wide),
        "ig": lambda: integrated_gradients(model, TASK, steps=2, rule="left", path="activation", **site_wide),
        "relp": lambda: relevance_patching(model, TASK, **site_wide),
    }[method]()
    saes = [sae_at(model, Z1, "topk"), sae_at(model, Z0)]
    found = feature_effects(model, TASK, saes, method=method, steps=2, rule="left", batch_size=2)
    assert found.dims == ("position", "node")
    for layer, site in enumerate([Z0, Z1]):
        total, whole = at_site(found, site).sum("node").values, expected.sel(layer=layer).values
        assert total == pytest.approx(whole, rel=1e-3, abs=1e-6)
    assert abs(expected).max() > 1e-4


def test_without_positions_effects_are_summed_over_them(llama: interp.Model) -> None:
    saes = [sae_at(llama, Z0), sae_at(llama, Z1)]
    found = feature_effects(llama, TASK, saes, by_position=False)
    apart = feature_effects(llama, TASK, saes)
    assert found.dims == ("node",)
    assert found.values == pytest.approx(apart.sum("position").values, abs=1e-6)
    shares = feature_effects(llama, TASK, saes, by_position=False, normalised=True)
    gap = found.attrs["metric_clean"] - found.attrs["metric_corrupted"]
    assert shares.values == pytest.approx(found.values / gap, rel=1e-4, abs=1e-7)


def test_prompts_of_several_lengths_are_averaged(llama: interp.Model) -> None:
    sae = sae_at(llama, Z0)
    shorter = task_of_tokens(torch.tensor([[3, 8, 1]]), torch.tensor([[3, 9, 1]]))
    both = Task(
        **{
            name: getattr(TASK, name) + getattr(shorter, name)
            for name in ("clean_ids", "corrupted_ids", "clean_text", "corrupted_text", "str_tokens")
        },
        corrupted_str_tokens=TASK.corrupted_str_tokens + shorter.corrupted_str_tokens,
        answers=torch.full((4, 1), 5),
        wrong=torch.full((4, 1), 9),
        positions={"END": torch.tensor([5, 5, 5, 2])},
        metric="logit_diff",
        name="tokens",
        index=torch.arange(4),
    )
    long, short = (feature_effects(llama, task, sae, by_position=False) for task in (TASK, shorter))
    found = feature_effects(llama, both, sae, by_position=False)
    assert found.values == pytest.approx((3 * long.values + short.values) / 4, abs=1e-6)
    with pytest.raises(ValueError, match="length"):
        feature_effects(llama, both, sae)


def test_an_orthogonal_dictionary_gives_the_effects_of_neurons(llama: interp.Model) -> None:
    """Feature j is the positive part of neuron j, and feature d + j the negative one."""
    site, width = "blocks.1.mlp.hook_post", llama.d_mlp
    sae = make("relu", width, 2 * width, site=site)
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([torch.eye(width), -torch.eye(width)]))
        sae.W_enc.copy_(sae.W_dec.T)
    found = feature_effects(llama, TASK, sae)
    neurons = attribution_patching(
        llama, TASK, site="mlp_post", by=("layer", "position", "neuron"), direction="noise", normalised=False
    ).sel(layer=1)
    of_features = found.isel(node=slice(0, 2 * width)).values.reshape(6, 2, width).sum(1)
    assert of_features == pytest.approx(neurons.values, rel=1e-3, abs=1e-6)
    assert abs(found.isel(node=-1)).max() < 1e-6
    assert abs(neurons).max() > 1e-4


def metric_of(task: Task, logits: Tensor) -> float:
    last, rows = logits[:, -1], torch.arange(len(task))
    return float((last[rows, task.answers[:, 0]] - last[rows, task.wrong[:, 0]]).double().mean())


def one_run_a_node(model: interp.Model, task: Task, sae: SAE, patch: str, position: int) -> list[float]:
    """Effects at a position by brute force: the clean run with one feature, or the error, as in the patch."""
    features = features_of(model, task.corrupted, sae).detach()
    _, cache = model.run_with_cache(task.corrupted, sae.site)
    error = to_rows(sae.site, cache[sae.site]) - sae.decode(features).detach()
    scale = 1.0 if patch == "corrupted" else 0.0
    effects = []
    for node in range(sae.d_sae + 1):

        def features_with(site: str, found: Tensor, node: int = node) -> Tensor:
            changed = found.clone()
            if node < sae.d_sae:
                changed[:, position, node] = scale * features[:, position, node]
            return changed

        def error_with(site: str, found: Tensor, node: int = node) -> Tensor:
            changed = found.clone()
            if node == sae.d_sae:
                changed[:, position] = scale * error[:, position]
            return changed

        with spliced(model, sae, features=features_with, errors=error_with), torch.no_grad():
            effects.append(-metric_of(task, model(task.clean)))
    clean = metric_of(task, model(task.clean))
    return [clean + effect for effect in effects]


@pytest.mark.parametrize("method", ["attribution", "ig", "relp"])
@pytest.mark.parametrize("patch", ["corrupted", "zero"])
def test_where_the_model_is_linear_effects_are_exact(induction: interp.Model, patch: str, method: str) -> None:
    """Behind the last layer's z of the wired model comes nothing but linear maps, and a norm that is the identity."""
    task = interp.zoo.task("induction", n=6)
    sae = sae_at_z1(induction)
    found = feature_effects(induction, task, sae, method=method, patch=patch, steps=2)
    end = len(task.clean_ids[0]) - 1
    exact = one_run_a_node(induction, task, sae, patch, end)
    assert found.sel(position=end).values == pytest.approx(exact, abs=2e-3)
    assert max(map(abs, exact)) > 0.5
    assert found["feature"].values[-1] == ERROR
    assert abs(found.sel(position=slice(0, end - 1))).max() == 0


def sae_at_z1(model: interp.Model) -> SAE:
    return make("relu", model.n_heads * model.d_head, 16, seed=3, site=Z1)


def test_integrated_gradients_add_up_to_the_exact_effect_of_the_site(llama: interp.Model) -> None:
    sae = sae_at(llama, Z0, "topk")
    _, cache = llama.run_with_cache(TASK.corrupted, Z0)
    with llama.edited(interp.Edit(Z0, value=cache[Z0])), torch.no_grad():
        patched = metric_of(TASK, llama(TASK.clean))
    exact = metric_of(TASK, llama(TASK.clean)) - patched
    found = feature_effects(llama, TASK, sae, method="ig", steps=8, rule="gauss-legendre")
    plain = feature_effects(llama, TASK, sae)
    assert float(found.sum()) == pytest.approx(exact, rel=1e-4, abs=2e-6)
    assert abs(float(plain.sum()) - exact) > 10 * abs(float(found.sum()) - exact)
    assert (found.attrs["forward_passes"], found.attrs["backward_passes"]) == (10, 8)
    assert (plain.attrs["forward_passes"], plain.attrs["backward_passes"]) == (2, 1)


def test_through_features_later_errors_are_constants(llama: interp.Model) -> None:
    """Against a finite difference of a run in which the error of the later SAE is that of the clean run."""
    saes = [sae_at(llama, Z0), sae_at(llama, Z1)]
    found = feature_effects(llama, TASK, saes, through="features", patch="zero")
    plain = feature_effects(llama, TASK, saes, patch="zero")
    _, cache = llama.run_with_cache(TASK.clean, Z1)
    later = to_rows(Z1, cache[Z1])
    constant = (later - saes[1](later)).detach()
    active = features_of(llama, TASK.clean, saes[0])
    feature = int(active.sum((0, 1)).argmax())

    def metric_with(step: float) -> float:
        def features(site: str, here: Tensor) -> Tensor:
            changed = here.clone()
            changed[..., feature] *= 1 + step * (site == Z0)
            return changed

        def errors(site: str, here: Tensor) -> Tensor:
            return constant if site == Z1 else here

        with spliced(llama, saes, features=features, errors=errors), torch.no_grad():
            return metric_of(TASK, llama(TASK.clean))

    slope = (metric_with(1e-2) - metric_with(-1e-2)) / 2e-2
    assert float(found.isel(node=feature).sum()) == pytest.approx(slope, rel=2e-2, abs=1e-6)
    assert abs(float(plain.isel(node=feature).sum()) - slope) > 0.05 * abs(slope)
    assert at_site(found, Z1).values == pytest.approx(at_site(plain, Z1).values, abs=1e-6)


def test_a_transcoder_has_the_effects_of_its_target(llama: interp.Model) -> None:
    source, target = "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"
    sae = make("relu", llama.d_model, 20, site=source, target_site=target)
    found = feature_effects(llama, TASK, sae)
    whole = attribution_patching(llama, TASK, site="mlp_out", direction="noise", normalised=False).sel(layer=1)
    assert found.sum("node").values == pytest.approx(whole.values, rel=1e-3, abs=1e-6)
    assert set(found["site"].values) == {source}


def test_the_model_and_the_saes_are_left_as_found(llama: interp.Model) -> None:
    saes = [sae_at(llama, Z0), sae_at(llama, Z1)]
    before = llama(TASK.clean)
    one, two = (feature_effects(llama, TASK, saes, method="relp", through="features") for _ in range(2))
    assert torch.equal(llama(TASK.clean), before)
    assert (one.values == two.values).all()
    assert all(parameter.grad is None and parameter.requires_grad for sae in saes for parameter in sae.parameters())
    assert one.attrs["rules"] == "relp"
    assert one.attrs["n_prompts"] == 3


@pytest.mark.parametrize("method", ["attribution", "ig"])
def test_saes_in_float32_in_a_model_of_another_dtype(llama: interp.Model, method: str) -> None:
    sae = sae_at(llama, Z0)
    expected = feature_effects(llama, TASK, sae, method=method, steps=2)
    double = interp.Model(FAMILIES["llama"].make_model(dtype=torch.float64))
    found = feature_effects(double, TASK, sae, method=method, steps=2)
    assert found.values == pytest.approx(expected.values, rel=1e-3, abs=1e-6)


@pytest.mark.usefixtures("unchecked")
def test_wrong_choices_are_refused(llama: interp.Model) -> None:
    sae = sae_at(llama, Z0)
    with pytest.raises(ValueError, match=r"method='atp'; it is one of attribution, ig, relp"):
        feature_effects(llama, TASK, sae, method="atp")
    with pytest.raises(ValueError, match="patch='mean'"):
        feature_effects(llama, TASK, sae, patch="mean")
    with pytest.raises(ValueError, match="through='error'"):
        feature_effects(llama, TASK, sae, through="error")
    with pytest.raises(ValueError, match="no SAEs"):
        feature_effects(llama, TASK, [])
    with pytest.raises(ValueError, match=r"two SAEs share the site blocks\.0\.attn\.hook_z"):
        feature_effects(llama, TASK, [sae, sae])
    with pytest.raises(ValueError, match="steps=0"):
        feature_effects(llama, TASK, sae, method="ig", steps=0)


def test_saes_are_placed_in_the_order_of_the_model(llama: interp.Model) -> None:
    saes = [sae_at(llama, Z1), sae_at(llama, Z0)]
    placed = place(llama, saes)
    assert [str(one.source) for one in placed] == [Z0, Z1]
    _, cache = llama.run_with_cache(TASK.clean, Z0)
    rows = to_rows(Z0, cache[Z0])
    assert torch.equal(from_rows(Z0, rows, cache[Z0]), cache[Z0])
