import sys
from typing import Any

import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor

import interp
from interp.saes import evaluate, make
from interp.saes.baselines import baselines, pca, random_decoder

SITE = "blocks.1.attn.hook_z"


@pytest.fixture
def activations() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(300, 12, generator=generator) @ torch.randn(12, 12, generator=generator) + 3


@pytest.mark.parametrize("k", [1, 4, 12])
def test_pca_is_scikit_learns_projection(activations: Tensor, k: int) -> None:
    sae = pca(activations, k, site=SITE)
    fitted = PCA(k).fit(activations.double().numpy())
    expected = torch.from_numpy(fitted.inverse_transform(fitted.transform(activations.double().numpy()))).float()
    torch.testing.assert_close(sae(activations).detach(), expected, rtol=1e-4, atol=1e-4)
    features = sae.encode(activations)
    assert (features >= 0).all()
    assert ((features > 0).sum(-1) == k).all()
    assert (sae.site, sae.d_sae) == (SITE, 2 * k)


def test_pca_explains_what_its_eigenvalues_say(activations: Tensor) -> None:
    error = (activations - pca(activations, 3)(activations)).square().sum().item()
    singular = torch.linalg.svdvals(activations - activations.mean(0))
    assert error == pytest.approx(float(singular[3:].square().sum()), rel=1e-4)


def test_the_factor_of_a_random_decoder_is_the_best_one(activations: Tensor) -> None:
    sae = random_decoder(activations, 4, 40, seed=2)
    assert ((sae.encode(activations) > 0).sum(-1) == 4).all()
    directions = torch.nn.functional.normalize(sae.W_dec, dim=-1)
    torch.testing.assert_close(sae.W_enc, directions.T)
    centred = activations - activations.mean(0)
    parts = centred @ directions.T
    largest = parts.topk(4, dim=-1).indices
    found = torch.zeros_like(parts).scatter(-1, largest, parts.gather(-1, largest)) @ directions
    factor = torch.linalg.lstsq(found.flatten()[:, None], centred.flatten()[:, None]).solution.item()
    torch.testing.assert_close(sae(activations), factor * found + activations.mean(0), rtol=1e-4, atol=1e-4)
    assert 0 < factor < 1


def test_random_directions_are_those_of_the_seed(activations: Tensor) -> None:
    first, again, other = (random_decoder(activations, 4, 40, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.W_dec, again.W_dec)
    assert not torch.equal(first.W_dec, other.W_dec)


def test_baselines_have_the_l0_of_the_sae_and_are_evaluated_like_it() -> None:
    model, tokens = interp.zoo.load("ioi_small"), interp.zoo.task("ioi_small").clean[:6]
    sae = make("topk", 64, 256, k=8, site=SITE)
    found = baselines(model, sae, tokens)
    results = {name: evaluate(model, one, tokens) for name, one in found.items()}
    assert {name: float(result["l0"]) for name, result in results.items()} == {"pca": 8, "random": 8}
    assert results["pca"].attrs["sae"] == "PCA of rank 8"
    _, cache = model.run_with_cache(tokens, SITE)
    rows = cache[SITE].flatten(2).flatten(0, 1).double()
    variance = torch.linalg.eigvalsh((rows - rows.mean(0)).T @ (rows - rows.mean(0))).flip(0)
    assert float(results["pca"]["explained_variance"]) == pytest.approx(float(variance[:8].sum() / variance.sum()))
    assert results["pca"]["explained_variance"] > results["random"]["explained_variance"] > 0
    assert results["pca"]["kl_recovered"][0] > results["random"]["kl_recovered"][0] > 0
    assert baselines(model, sae, tokens, k=3)["random"].settings()["k"] == 3
    exclude = torch.zeros_like(tokens, dtype=torch.bool)
    exclude[:, 0] = exclude[2] = True
    partly = baselines(model, sae, tokens, exclude=exclude, batch_size=2)["pca"]
    torch.testing.assert_close(
        partly.b_dec.double(), rows.unflatten(0, tokens.shape)[~exclude].mean(0), check_dtype=True, rtol=1e-5, atol=1e-6
    )


def test_baselines_of_a_transcoder_reconstruct_its_target() -> None:
    model, tokens = interp.zoo.load("ioi_small"), interp.zoo.task("ioi_small").clean[:6]
    target = "blocks.1.hook_mlp_out"
    transcoder = make("topk", 64, 40, k=5, site="blocks.1.ln2.hook_normalized", target_site=target)
    for sae in baselines(model, transcoder, tokens).values():
        assert (sae.site, sae.target_site) == (target, None)
        assert float(evaluate(model, sae, tokens)["l0"]) == 5


@pytest.mark.parametrize(("k", "message"), [(0, "outside 1..12"), (13, "outside 1..12, the number of dimensions")])
def test_a_rank_that_is_none_is_refused(activations: Tensor, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pca(activations, k)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 65}, "k=65 is outside 1..64"),
        ({"exclude": torch.zeros(1, 3, dtype=torch.bool)}, "a bool for each token"),
        ({"exclude": torch.ones(6, 20, dtype=torch.bool)}, "0 token has no variance"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_baselines_refuse_before_any_run(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["interp.saes.baselines"], "gather", None)
    model, sae = interp.zoo.load("ioi_small"), make("topk", 64, 256, k=8, site=SITE)
    with pytest.raises(ValueError, match=message):
        baselines(model, sae, torch.zeros(6, 20, dtype=torch.long), **options)


def test_one_token_has_no_variance(activations: Tensor) -> None:
    with pytest.raises(ValueError, match="1 token has no variance"):
        random_decoder(activations[:1], 2, 4)
