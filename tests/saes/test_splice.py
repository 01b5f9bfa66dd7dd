import pytest
import torch
from torch import Tensor

import interp
from interp.saes.relu import ReLUSAE
from interp.saes.sae import SAE, to_rows
from interp.saes.splice import features_of, replaced, sites_of, spliced
from tests.model.families import FAMILIES

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
TOKENS = torch.tensor([[5, 9, 3, 17, 8, 2], [7, 4, 4, 11, 30, 6]])


def sae_at(site: str, d_in: int, d_sae: int = 24, *, target: str | None = None, d_out: int | None = None) -> SAE:
    """An SAE with random weights that leaves a large error."""
    sae = ReLUSAE(d_in, d_sae, d_out=d_out, site=site, target_site=target, apply_b_dec_to_input=target is None)
    generator = torch.Generator().manual_seed(len(site) + d_in)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 5)
    return sae


@pytest.fixture(params=["llama", "gpt2"])
def model(request) -> interp.Model:
    return interp.Model(FAMILIES[request.param].make_model())


@pytest.fixture
def llama() -> interp.Model:
    return interp.Model(FAMILIES["llama"].make_model())


def width(model: interp.Model, site: str) -> int:
    _, cache = model.run_with_cache(TOKENS, site)
    return to_rows(site, cache[site]).shape[-1]


def by_hand(model: interp.Model, sae: SAE, tokens: Tensor = TOKENS) -> tuple[Tensor, Tensor]:
    """(activation at its target, reconstruction) of an unchanged run, by the ReLU formula written out."""
    target = sae.target_site or sae.site
    _, cache = model.run_with_cache(tokens, [sae.site, target])
    x = cache[sae.site].reshape(*tokens.shape, -1)
    shift = 0 if sae.target_site else sae.b_dec
    features = ((x - shift) @ sae.W_enc + sae.b_enc).clamp(min=0)
    return cache[target], (features @ sae.W_dec + sae.b_dec).reshape(cache[target].shape).detach()


@pytest.mark.parametrize("kind", ["z", "v", "q", "mlp_post", "resid_mid", "resid_post", "attn_out", "mlp_out", "ln1"])
def test_a_splice_is_an_edit_of_the_reconstruction(model: interp.Model, kind: str) -> None:
    site = interp.Site(kind, 1)
    sae = sae_at(site, width(model, site))
    _, reconstruction = by_hand(model, sae)
    with model.edited(interp.Edit(site, value=reconstruction)):
        expected = model(TOKENS)
    with spliced(model, sae), torch.no_grad():
        _, cache = model.run_with_cache(TOKENS, site)
        torch.testing.assert_close(cache[site], reconstruction, **TOLERANCE)
        found = model(TOKENS)
    torch.testing.assert_close(found, expected, **TOLERANCE)
    assert (found - model(TOKENS)).abs().max() > 0.05


def test_a_transcoder_predicts_its_target_from_the_input_of_the_same_run(model: interp.Model) -> None:
    source, target = interp.Site("ln2", 1), interp.Site("mlp_out", 1)
    transcoder = sae_at(source, model.d_model, target=target, d_out=model.d_model)
    first = sae_at("blocks.0.attn.hook_z", width(model, "blocks.0.attn.hook_z"))
    assert sites_of(model, transcoder) == (source, target)
    with spliced(model, first):
        _, reconstruction = by_hand(model, transcoder)
        with model.edited(interp.Edit(target, value=reconstruction)):
            expected = model(TOKENS)
    with spliced(model, [transcoder, first]):
        torch.testing.assert_close(model(TOKENS), expected, **TOLERANCE)


def test_a_transcoder_of_two_widths(llama: interp.Model) -> None:
    source, target = "blocks.1.hook_resid_mid", "blocks.1.mlp.hook_post"
    transcoder = sae_at(source, llama.d_model, target=target, d_out=llama.d_mlp)
    _, reconstruction = by_hand(llama, transcoder)
    with llama.edited(interp.Edit(target, value=reconstruction)):
        expected = llama(TOKENS)
    with spliced(llama, transcoder):
        torch.testing.assert_close(llama(TOKENS), expected, **TOLERANCE)


def test_the_error_kept_leaves_the_run_and_only_a_changed_feature_shows(model: interp.Model) -> None:
    site = interp.Site("z", 1)
    sae = sae_at(site, width(model, site))
    with spliced(model, sae, keep_error=True):
        untouched = model(TOKENS)
    torch.testing.assert_close(untouched, model(TOKENS), **TOLERANCE)
    seen, features = [], features_of(model, TOKENS, sae)
    chosen = int(features.sum((0, 1)).argmax())

    def without_it(where: interp.Site, features: Tensor) -> Tensor:
        seen.append(where)
        changed = features.clone()
        changed[..., chosen] = 0
        return changed

    own, _ = by_hand(model, sae)
    removed = features[..., [chosen]] * sae.W_dec[chosen].detach()
    with model.edited(interp.Edit(site, value=own - removed.reshape(own.shape))):
        expected = model(TOKENS)
    with spliced(model, sae, keep_error=True, features=without_it):
        torch.testing.assert_close(model(TOKENS), expected, **TOLERANCE)
    assert seen == [site]
    assert removed.abs().max() > 0.05


def test_an_intervention_may_write_into_the_features(llama: interp.Model) -> None:
    """The error that is kept is that of the untouched features all the same."""
    sae = sae_at("blocks.1.attn.hook_z", 48)
    chosen = int(features_of(llama, TOKENS, sae).sum((0, 1)).argmax())

    def in_place(where: interp.Site, features: Tensor) -> Tensor:
        features[..., chosen] = 0
        return features

    def aside(where: interp.Site, features: Tensor) -> Tensor:
        return features.index_fill(-1, torch.tensor([chosen]), 0)

    logits = []
    for change in (in_place, aside):
        with spliced(llama, sae, keep_error=True, features=change):
            logits.append(llama(TOKENS))
    assert torch.equal(*logits)
    assert (logits[0] - llama(TOKENS)).abs().max() > 0.01


def test_an_error_is_added_as_it_was_changed(model: interp.Model) -> None:
    site = interp.Site("z", 1)
    sae = sae_at(site, width(model, site))
    own, reconstruction = by_hand(model, sae)
    with model.edited(interp.Edit(site, value=own + (own - reconstruction))):
        expected = model(TOKENS)
    with spliced(model, sae, errors=lambda where, error: 2 * error):
        torch.testing.assert_close(model(TOKENS), expected, **TOLERANCE)


@pytest.mark.parametrize("kind", ["z", "resid_mid", "mlp_out"])
@pytest.mark.parametrize("keep_error", [False, True])
def test_gradients_flow_through_the_features(kind: str, keep_error: bool) -> None:
    """Against finite differences of a run in which the error is a constant (Llama's norms are float32 in any dtype)."""
    model = interp.Model(FAMILIES["gpt2"].make_model())
    site, before = interp.Site(kind, 1), "blocks.0.hook_resid_post"
    sae = sae_at(site, width(model, site)).double()
    model = interp.Model(model.hf.double())
    own, reconstruction = by_hand(model, sae)
    error = own - reconstruction if keep_error else torch.zeros_like(own)
    direction = torch.randn(model.d_model, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1, 4] - logits[:, -1, 9]

    with spliced(model, sae, keep_error=keep_error):
        _, _, gradients = model.run_with_gradients(TOKENS, metric, [before, site])
    values = []
    for step in (1e-5, -1e-5):
        edits = [interp.Edit(before, add=step * direction), interp.Edit(site, add=error)]
        with model.edited(edits[0]), spliced(model, sae), model.edited(edits[1]):
            values.append(metric(model(TOKENS)))
    expected = (values[0] - values[1]) / 2e-5
    torch.testing.assert_close((gradients[before] @ direction).sum(-1), expected, rtol=1e-5, atol=1e-7)
    assert gradients[site].abs().max() > 0
    assert all(parameter.grad is None for parameter in sae.parameters())


def test_a_site_written_in_place_can_be_spliced_under_gradients() -> None:
    """An SAE that encodes x itself keeps x for the backward pass, while the block's own tensor is written over."""
    model = interp.Model(FAMILIES["gpt2"].make_model())
    sae = sae_at("blocks.1.hook_resid_mid", model.d_model)
    with torch.no_grad():
        sae.b_enc.sub_(sae.b_dec @ sae.W_enc)
    gradients = []
    for shifted in (False, True):
        sae.apply_b_dec_to_input = shifted
        with spliced(model, sae):
            _, _, found = model.run_with_gradients(TOKENS, lambda logits: logits[:, -1, 4], "blocks.0.hook_resid_post")
        gradients.append(found["resid_post", 0])
        with torch.no_grad():
            sae.b_enc.add_(sae.b_dec @ sae.W_enc)
    torch.testing.assert_close(*gradients, **TOLERANCE)


@pytest.mark.parametrize("source", ["blocks.1.hook_resid_mid", "blocks.1.ln2.hook_normalized"])
def test_a_transcoder_reads_what_was_there_when_its_context_began(model: interp.Model, source: str) -> None:
    transcoder = sae_at(source, model.d_model, target="blocks.1.hook_mlp_out", d_out=model.d_model)
    _, reconstruction = by_hand(model, transcoder)
    edit = interp.Edit(source, add=3.0)
    with spliced(model, transcoder), model.edited(edit):
        _, cache = model.run_with_cache(TOKENS, "mlp_out")
    torch.testing.assert_close(cache["mlp_out", 1], reconstruction, **TOLERANCE)
    with model.edited(edit):
        _, reconstruction = by_hand(model, transcoder)
        with spliced(model, transcoder):
            _, cache = model.run_with_cache(TOKENS, "mlp_out")
    torch.testing.assert_close(cache["mlp_out", 1], reconstruction, **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_sae_computes_in_its_own_dtype(dtype: torch.dtype) -> None:
    model = interp.Model(FAMILIES["llama"].make_model(dtype=dtype))
    site = "blocks.1.attn.hook_z"
    sae = sae_at(site, 48)
    _, own = model.run_with_cache(TOKENS, site)
    with spliced(model, sae):
        logits, cache = model.run_with_cache(TOKENS, site)
    expected = sae(own[site].flatten(2).float()).detach().to(dtype)
    assert logits.dtype == cache[site].dtype == dtype
    assert torch.equal(cache[site].flatten(2), expected)


def test_generation_with_a_cache_is_the_run_without_one(tiny_llama: interp.Model) -> None:
    sae = sae_at("blocks.1.attn.hook_z", width(tiny_llama, "blocks.1.attn.hook_z"))
    transcoder = sae_at("blocks.1.ln2.hook_normalized", 32, target="blocks.1.hook_mlp_out", d_out=32)
    tokens = TOKENS
    with spliced(tiny_llama, [sae, transcoder]):
        generated = tiny_llama.generate(TOKENS, max_new_tokens=6, min_new_tokens=6)
        for _ in range(6):
            logits = tiny_llama(tokens)[:, -1]
            logits[:, 0] = -torch.inf  # min_new_tokens forbids the end of text
            tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(generated, tokens)
    assert not torch.equal(generated, tiny_llama.generate(TOKENS, max_new_tokens=6, min_new_tokens=6))


def test_prompts_padded_and_batched_are_each_alone(tiny_llama: interp.Model) -> None:
    sae = sae_at("blocks.1.attn.hook_z", 32)
    prompts = [[5, 9, 3, 17], [7, 4], [2, 8, 1]]
    with spliced(tiny_llama, sae):
        together = tiny_llama(prompts)[:, -1]
        alone = torch.cat([tiny_llama([one])[:, -1] for one in prompts])
    torch.testing.assert_close(together, alone, **TOLERANCE)
    features = features_of(tiny_llama, prompts, sae)
    for row, prompt in enumerate(prompts):
        padding = 4 - len(prompt)
        assert features[row, :padding].isnan().all()
        torch.testing.assert_close(features[row, padding:], features_of(tiny_llama, [prompt], sae)[0], **TOLERANCE)


def test_features_are_those_of_the_run_as_it_is_changed(llama: interp.Model) -> None:
    site = "blocks.1.attn.hook_z"
    sae = sae_at(site, width(llama, site))
    with llama.edited(interp.Edit(site, value=0.0)):
        found = features_of(llama, TOKENS, sae)
    torch.testing.assert_close(found, (sae.b_enc - sae.b_dec @ sae.W_enc).relu().expand_as(found).detach(), **TOLERANCE)


def test_excluded_tokens_keep_their_own_activation(tiny_llama: interp.Model) -> None:
    site = "blocks.1.attn.hook_z"
    sae = sae_at(site, 32)
    own, reconstruction = by_hand(tiny_llama, sae)
    exclude = torch.zeros(TOKENS.shape, dtype=torch.bool)
    exclude[:, 0] = exclude[1, 3] = True
    expected = torch.where(exclude[..., None, None], own, reconstruction)
    with spliced(tiny_llama, sae, exclude=exclude):
        _, cache = tiny_llama.run_with_cache(TOKENS, site)
        generated = tiny_llama.generate(TOKENS, max_new_tokens=3, min_new_tokens=3)
        with pytest.raises(ValueError, match=r"`exclude` has shape \(2, 6\); the run has \(2, 4\) tokens"):
            tiny_llama(TOKENS[:, :4])
    assert torch.equal(cache[site][exclude], own[exclude])
    torch.testing.assert_close(cache[site], expected, **TOLERANCE)
    longer = torch.nn.functional.pad(exclude, (0, 2))
    with spliced(tiny_llama, sae, exclude=longer):
        again = tiny_llama(generated[:, :-1])[:, -1]
    assert torch.equal(again[:, 1:].argmax(-1) + 1, generated[:, -1])
    vector = torch.arange(32.0)
    with replaced(tiny_llama, interp.Site.parse(site), vector, exclude=exclude):
        _, cache = tiny_llama.run_with_cache(TOKENS, site)
    assert torch.equal(cache[site][exclude], own[exclude])
    assert (cache[site][~exclude].flatten(1) == vector).all()


def test_an_exclusion_may_reach_into_what_is_generated(tiny_llama: interp.Model) -> None:
    sae = sae_at("blocks.1.attn.hook_z", 32)
    exclude = torch.zeros(2, 8, dtype=torch.bool)
    exclude[:, 6] = True
    with spliced(tiny_llama, sae, exclude=exclude):
        generated = tiny_llama.generate(TOKENS, max_new_tokens=3, min_new_tokens=3)
        again = tiny_llama(generated[:, :8])
    assert torch.equal(again[:, 5:, 1:].argmax(-1) + 1, generated[:, 6:])


def test_the_model_is_left_as_found(llama: interp.Model) -> None:
    before = llama(TOKENS)
    sae = sae_at("blocks.1.attn.hook_z", width(llama, "blocks.1.attn.hook_z"))
    with pytest.raises(KeyboardInterrupt), spliced(llama, sae):
        raise KeyboardInterrupt
    assert torch.equal(llama(TOKENS), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llama.hf.modules())


@pytest.mark.parametrize(
    ("saes", "message"),
    [
        ([ReLUSAE(8, 4)], "does not say where it reads"),
        ([sae_at("blocks.0.attn.hook_pattern", 9)], "has no vector a token"),
        ([sae_at("blocks.0.attn.hook_z", 32)], "reads vectors of width 32; blocks.0.attn.hook_z of .* has 48"),
        ([sae_at("z", 48)], "names 3: give the layer"),
        ([sae_at("blocks.1.attn.hook_z", 48)] * 2, "two SAEs replace blocks.1.attn.hook_z"),
        (
            [sae_at("blocks.1.hook_mlp_out", 32, target="blocks.1.ln2.hook_normalized")],
            "which is computed before its input",
        ),
        ([sae_at("blocks.0.attn.hook_v", 48)], "has 24"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_any_run(llama: interp.Model, saes: list[SAE], message: str) -> None:
    with pytest.raises(ValueError, match=message), spliced(llama, saes):
        pass


def test_features_of_another_shape_are_refused(llama: interp.Model) -> None:
    sae = sae_at("blocks.1.attn.hook_z", 48)
    with (
        spliced(llama, sae, features=lambda site, features: features[..., :3]),
        pytest.raises(ValueError, match="shape"),
    ):
        llama(TOKENS)
