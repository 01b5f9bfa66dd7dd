"""Features of an SAE in a report: the numbers are those of `interp.saes`, survive a file, and are drawn as they are."""

from __future__ import annotations

import html
import json
import re

import numpy as np
import pytest
import torch
import xarray as xr

import interp
from interp import saes
from interp.metrics import METRICS
from interp.report import head_study, read
from interp.report.sae_section import POLYSEMANTIC, effect_table, head_columns, sae_section
from interp.report.sae_study import by_effect, exact_effects, packed, sae_choices, sae_variables, unpacked
from interp.report.writing import write_json, write_netcdf
from interp.saes.sae import SAE
from tests.conftest import tiny_llama_hf
from tests.saes.shaken import transcoder, z_sae

PAIRS = [(" Mary", " John"), (" Tom", " James"), (" Alice", " Bob"), (" Kate", " Anna")]
ATTRS = {"metric": "logit_diff"}
"""What the section takes from the whole study."""


@pytest.fixture(scope="module")
def model(tiny_tokenizer) -> interp.Model:
    return interp.load(tiny_llama_hf(len(tiny_tokenizer)), tokenizer=tiny_tokenizer, name="tiny-llama")


@pytest.fixture(scope="module")
def task(model):
    prompt = "When{} and{} went to the store,{} gave a drink to"
    return interp.tasks.from_pairs(
        model,
        [
            {"clean": prompt.format(io, s, s), "corrupted": prompt.format(io, s, io), "answer": io, "wrong": s}
            for io, s in PAIRS
        ],
    )


@pytest.fixture(scope="module")
def sae(model) -> SAE:
    return z_sae(model, 1)


@pytest.fixture(scope="module")
def texts(model) -> torch.Tensor:
    return torch.randint(3, model.d_vocab, (8, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def few_texts(texts):
    """A little text instead of a lot."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("interp.report.sae_study.calibration_texts", lambda *_, **__: (texts, "words at random"))
        patch.setattr("interp.report.sae_study.EVALUATED", 5)
        yield


@pytest.fixture(scope="module")
def study(model, task, sae, few_texts) -> xr.Dataset:
    return xr.Dataset(sae_variables(model, task, sae, n_features=3, seed=1, progress=False), attrs=ATTRS)


def said(section) -> str:
    """What a section says, without figures and tags."""
    markup = re.sub("<script.*?</script>", "", "".join(section.parts))
    return html.unescape(re.sub("<[^>]*>", "", markup))


def test_features_are_those_of_largest_effect(model, task, sae, study):
    effects = saes.feature_effects(model, task, sae, method="relp", by_position=False).values[:-1]
    largest = np.argsort(-np.abs(effects))
    assert unpacked(study, "sae_shown")["feature"].values.tolist() == largest[:3].tolist()
    listed = unpacked(study, "sae_effects")
    assert listed["feature"].values.tolist() == largest[:12].tolist()
    table = effect_table(listed, [])
    assert table["feature"] == [str(one) for one in largest[:12]]
    assert table["estimate"] == pytest.approx(effects[largest[:12]].tolist(), rel=1e-4)
    assert float(listed["all"] - listed["error"]) == pytest.approx(effects.sum(), rel=1e-3)


def test_exact_effects_are_those_of_a_changed_activation(model, task, sae):
    """One feature's part of z is added by hand, where its activation differs."""
    site = "blocks.1.attn.hook_z"
    clean, corrupted = (sae.encode(model.run_with_cache(ids, site)[1][site].flatten(-2))
                        for ids in (task.clean, task.corrupted))  # fmt: skip
    found = exact_effects(model, task, sae, [7, 3], progress=False)
    before = METRICS["logit_diff"](model(task.clean)[:, -1], task.answers, task.wrong)
    for row, feature in enumerate((7, 3)):
        change = (corrupted - clean)[..., feature, None] * sae.W_dec[feature]

        def add(z, hook, change=change):
            return z + change.reshape(z.shape)

        logits = model.run_with_hooks(task.clean, [(site, add)])[:, -1]
        expected = before - METRICS["logit_diff"](logits, task.answers, task.wrong)
        np.testing.assert_allclose(found[row], expected.detach().numpy(), atol=1e-5)
    assert np.abs(found).max() > 1e-4


def test_numbers_are_those_of_the_functions(model, task, sae, study, texts):
    evaluation = unpacked(study, "sae_evaluation")
    expected = saes.evaluate(model, sae, texts[:5], progress=False)
    for name in ("ce", "kl", "l0", "explained_variance", "dead_share", "firing_rate"):
        np.testing.assert_allclose(evaluation[name].values, expected[name].values, err_msg=name)
    heads, direct = unpacked(study, "sae_heads"), saes.head_features(model, sae)
    for name in ("feature", "share", "n_largest", "n_directions"):
        np.testing.assert_allclose(heads[name].values, direct[name].values[0], err_msg=name)
    np.testing.assert_allclose(heads["rate"].values, expected["firing_rate"].values[heads["feature"].values])
    shown = unpacked(study, "sae_shown")
    features = shown["feature"].values.tolist()
    contexts = saes.feature_contexts(model, sae, texts, features, n_top=10, per_interval=3, seed=1)
    np.testing.assert_allclose(
        shown["activation"].isel(context=slice(10)).values, contexts["activation"].values[:, :10]
    )
    on = saes.features_of(model, task.clean[:1], sae)[0][:, features].T
    np.testing.assert_allclose(shown["prompt_activation"].values[:, 0], on.numpy(), atol=1e-6)
    for feature in features:
        mine = shown.sel(feature=feature)
        reads = saes.feature_attribution(model, sae, task.clean[0], feature, positions=int(mine["prompt_at"]))
        np.testing.assert_allclose(mine["prompt_source"].values, reads["attribution"].values[0, 0], atol=1e-6)


def test_every_number_said_is_in_the_section(study):
    section = sae_section(study)
    text = said(section)
    evaluation, effects = unpacked(study, "sae_evaluation"), unpacked(study, "sae_effects")
    assert f"{float(evaluation['l0']):.1f} features are on in a token (L0)" in text
    assert f"explained variance {float(evaluation['explained_variance']):.3f}".replace("-", "−") in text
    for value in (*evaluation["ce"].values, *evaluation["kl"].values[1:], *effects["exact"].values):
        assert f"{float(value):.3f}".replace("-", "−") in text
    assert "40 tokens" not in text
    assert f"on {5 * 16} tokens of words at random" in text
    assert POLYSEMANTIC in text
    for feature in unpacked(study, "sae_shown")["feature"].values:
        assert f'id="feature-{feature}"' in "".join(section.parts)


def test_a_cell_of_the_heads_table_says_feature_share_and_token(study):
    heads = unpacked(study, "sae_heads")
    columns = head_columns(heads, [int(heads["feature"][2, 1])])
    assert columns["head"] == ["L1H0", "L1H1", "L1H2", "L1H3"]
    assert columns["directions"] == heads["n_directions"].values.tolist()
    cell = columns["2"][2]
    feature, share = int(heads["feature"][2, 1]), float(heads["share"][2, 1])
    assert f'<a href="#feature-{feature}">{feature}</a>' in cell
    assert f"{share:.0%}" in cell
    assert html.escape(str(heads["fired"].values[2, 1])) in cell
    never = heads.assign(rate=heads["rate"] * 0)
    assert "†" in head_columns(never, [])["1"][0]
    assert "†" not in head_columns(never.assign(rate=never["rate"] + 1), [])["1"][0]


@pytest.mark.parametrize("ending", ["nc", "json"])
def test_the_section_after_a_file_is_the_same(study, tmp_path, ending):
    path = tmp_path / f"study.{ending}"
    (write_netcdf if ending == "nc" else write_json)(study, path)
    assert said(sae_section(read(path))) == said(sae_section(study))


def test_packing_keeps_everything():
    found = xr.Dataset(
        {"a": (("x", "y"), np.arange(6).reshape(2, 3), {"unit": "nats"}), "one": ((), 2.5)},
        coords={"x": ["p", "q"], "label": ("y", ["<", "&", "\n"])},
        attrs={"n": 3, "said": "so"},
    )
    study = xr.Dataset({**packed("sae_a", found), **packed("sae_b", found * 2), "a": ("x", [1, 2])})
    xr.testing.assert_identical(unpacked(study, "sae_a"), found)
    np.testing.assert_array_equal(unpacked(study, "sae_b")["a"].values, 2 * found["a"].values)


def test_features_asked_for_are_shown_whatever_their_effect(model, task, sae, few_texts):
    study = xr.Dataset(sae_variables(model, task, sae, features=[20, 5], progress=False), attrs=ATTRS)
    assert unpacked(study, "sae_shown")["feature"].values.tolist() == [20, 5]
    assert {20, 5} <= set(unpacked(study, "sae_effects")["feature"].values.tolist())
    assert "the features asked for" in said(sae_section(study))


def test_features_without_an_effect_are_not_ranked():
    nodes = {"feature": ("node", [0, 1, 2, -1])}
    effects = xr.DataArray([[1.0, 0, -3, 9], [1, 0, 0, 9]], dims=("position", "node"), coords=nodes)
    assert by_effect(effects) == [2, 0]


def test_an_sae_without_heads_has_no_table_of_heads(model, task, few_texts):
    study = xr.Dataset(sae_variables(model, task, transcoder(model, 1), progress=False), attrs=ATTRS)
    text = said(sae_section(study))
    assert "sae_heads" not in study
    assert POLYSEMANTIC not in text
    assert "blocks.1.ln2.hook_normalized → blocks.1.hook_mlp_out" in text
    assert "largest head" not in text


def test_token_text_is_escaped(study):
    changed = study.copy(deep=True)
    for name in ("sae_effects_fired", "sae_heads_fired", "sae_shown_prompt_token", "sae_shown_token"):
        changed[name] = changed[name].copy(data=np.full(changed[name].shape, "<b>&\n", dtype=object))
    page = "".join(sae_section(changed).parts)
    assert "<b>" not in page
    assert "&lt;b&gt;&amp;⏎" in page


def test_bad_requests_are_refused_before_any_run(model, task, sae, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a forward pass was run")

    monkeypatch.setattr(model.hf, "forward", refuse)
    for wrong, message in (
        ({"features": 24}, "feature 24 is out of range"),
        ({"n_features": 0}, "n_features=0; the SAE has 24 features"),
    ):
        with pytest.raises(ValueError, match=message):
            head_study(model, task, sae=sae, **wrong)
    narrow = saes.make("topk", 8, 16, k=2, site="blocks.1.attn.hook_z")
    with pytest.raises(ValueError, match="the SAE reads vectors of width 8"):
        head_study(model, task, sae=narrow)


def test_parts_of_another_sae_or_of_other_features_are_not_taken(model, sae):
    first = json.dumps(sae_choices(sae, None, 4))
    assert json.dumps(sae_choices(z_sae(model, 1), None, 4)) == first
    other = z_sae(model, 1)
    other.W_dec[5, 3] += 1e-3
    assert json.dumps(sae_choices(other, None, 4)) != first
    assert json.dumps(sae_choices(sae, [3], 4)) != first
    assert json.dumps(sae_choices(sae, None, 5)) != first
