"""Sinks in a report: the numbers are those of `interp.sinks`, survive a file, and are drawn as they are."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import xarray as xr

import interp
from interp import sinks
from interp.heads import attention_received
from interp.report import head_study, read
from interp.report.sink_files import check_sink_target, sink_numbers, write_sinks
from interp.report.sink_section import dimensions_sentence, dormant_table, lives_table, sink_section, spans
from interp.report.sink_study import calibration_texts, largest_birth, sink_variables, texts_of
from interp.report.writing import write_json, write_netcdf
from interp.tasks.corpus import natural_text
from tests.conftest import tiny_llama_hf
from tests.model.families import FAMILIES
from tests.patching.tokens_task import task_of_tokens

PLANTED = 5
TEXTS = torch.randint(5, 50, (6, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def colours():
    """A model with a sink wired into it, and its task."""
    model = interp.zoo.load("colours")
    return model, interp.zoo.picture_task(model, n=6)


@pytest.fixture(scope="module")
def study(colours):
    model, task = colours
    return xr.Dataset(sink_variables(model, task.clean, source="pictures", task=task, few=5, progress=False))


def without_figures(section):
    """The text of a section: JSON keeps no float32, in which figures would differ."""
    return re.sub("<script.*?</script>", "", "".join(section.parts))


def planted(model):
    """A dimension of the first token that lives in the first two of three layers."""
    edits = [interp.Edit(f"blocks.{layer}.hook_resid_post", value=value, positions=[0], neurons=[PLANTED])
             for layer, value in ((0, 5000.0), (1, -6000.0), (2, 0.1))]  # fmt: skip
    return model.edited(edits)


def test_numbers_are_those_of_the_functions(colours, study):
    model, task = colours
    few = task.clean[:5]
    dimensions = sinks.sink_dimensions(model, task.clean, min_sequences=1)
    assert study["sink_dimensions"].values.tolist() == dimensions.values.tolist() != []
    where = sinks.mask(model, few, dimensions=dimensions)
    rate, checks = sinks.sink_rate(model, few), sinks.sink_checks(model, few, sinks=where)
    dormant = sinks.dormant_heads(model, few, sinks=where)
    for name, expected in (
        ("sink_rate", rate["rate_by_head"].isel(position=0)),
        ("sink_rate_by_layer", rate["rate_by_layer"].isel(position=0)),
        ("sink_hidden", rate["hidden_sinks"]),
        ("sink_value_norm_ratio", checks["value_norm_ratio"]),
        ("sink_cosine", checks["sink_cosine"]),
        ("sink_mass", dormant["sink_mass"]),
        ("sink_dormant", dormant["dormant"]),
        ("sink_task_received", attention_received(model, task.clean).isel(position=0).mean("prompt")),
    ):
        np.testing.assert_allclose(study[name].values, expected.values, err_msg=name)
    done = sinks.intervene(model, few, dimensions, study["sink_perplexity"].attrs["layer"])
    np.testing.assert_allclose(study["sink_perplexity"].values, done["perplexity"].values)
    assert (study["sink_perplexity_low"] <= study["sink_perplexity"] + 1e-9).all()
    assert (study["sink_perplexity_high"] >= study["sink_perplexity"] - 1e-9).all()


def test_every_number_said_is_in_the_page(study):
    page = "".join(map(str, sink_section(study).parts))
    assert f"The first token is a sink of {float(study['sink_rate'].mean()):.0f}% of heads" in page
    assert f"{study['sink_perplexity'].values[1]:.1f}" in page
    assert f"{int(study['sink_rests'].sum())} of {study['sink_rests'].size} heads rest on sinks" in page
    assert "pictures: 6 texts of 12 tokens" in page
    assert "[1,1]" in study["sink_task_label"].values.tolist()


@pytest.mark.parametrize("ending", ["nc", "json"])
def test_the_page_after_a_file_is_the_same(study, tmp_path, ending):
    path = tmp_path / f"study.{ending}"
    (write_netcdf if ending == "nc" else write_json)(study, path)
    assert without_figures(sink_section(read(path))) == without_figures(sink_section(study))


def test_a_planted_dimension_is_found_with_its_life(tiny_llama):
    with planted(tiny_llama):
        found = xr.Dataset(sink_variables(tiny_llama, TEXTS, source="ids", progress=False))
    assert spans(found)[0][:2] == (PLANTED, 0)
    assert spans(found)[0][2] == 2
    table = lives_table(found)
    assert table["gone after block"] == ["2"]
    assert table["largest |x|"] == ["6,000"]
    assert "5 (67% of layers)" in dimensions_sentence(found)
    page = "".join(map(str, sink_section(found).parts))
    assert "born 0" in page
    assert "gone 2" in page


def test_the_intervention_is_where_the_largest_life_begins():
    peaks = np.array([[1.0, 300, 9000], [900, 1, 9000], [800, 1, 9000], [1, 5000, 9000]])
    massive = xr.Dataset(
        {
            "peak": (("layer", "massive_dimension"), peaks),
            "position": (("layer", "prompt", "rank"), np.array([[[0], [0]], [[4], [4]], [[0], [0]], [[2], [2]]])),
            "span_dimension": ("span", [9, 8, 7, 9]),
            "born": ("span", [0, 0, 1, 3]),
            "erased": ("span", [1.0, np.nan, 3.0, np.nan]),
        },
        coords={"massive_dimension": [7, 9, 8], "layer": range(4), "rank": [0]},
    )
    assert largest_birth(massive, [7, 9]) == (3, 2)
    assert largest_birth(massive, [7]) == (1, 4)
    assert largest_birth(massive, []) is None


def test_a_model_without_massive_activations(tiny_llama, tmp_path):
    found = xr.Dataset(
        sink_variables(tiny_llama, TEXTS, source="ids", task=task_of_tokens(TEXTS[:3], TEXTS[3:]), progress=False)
    )
    assert "No dimension of this model is massive" in dimensions_sentence(found)
    assert "sink_perplexity" not in found
    assert found["sink_mass"].attrs["sinks"] == "the first token"
    write_netcdf(found, tmp_path / "study.nc")
    again = sink_section(read(tmp_path / "study.nc"))
    assert again.parts == sink_section(found).parts
    assert "are dormant" in "".join(map(str, again.parts))


def test_dormant_heads_are_listed_by_what_they_rest_on(study):
    made_up = study.copy(deep=True)
    made_up["sink_dormant"][1, 3] = made_up["sink_dormant"][0, 2] = True
    made_up["sink_mass"][1, 3], made_up["sink_mass"][0, 2] = 0.99, 0.85
    table = dormant_table(made_up)
    assert table["head"] == ["L1H3", "L0H2"]
    assert table["attention on sinks"] == pytest.approx([0.99, 0.85])
    assert table["median of the layer"][0] == pytest.approx(float(np.median(study["sink_output_norm"].values[1])))


def test_attention_that_cannot_be_read_is_said_and_the_rest_is_there():
    model = interp.Model(FAMILIES["gptj"].make_model("eager", torch.float32))
    with planted(model):
        task = task_of_tokens(TEXTS[:3], TEXTS[3:])
        found = xr.Dataset(sink_variables(model, TEXTS, source="ids", task=task, progress=False))
    assert "sink_rate" not in found
    assert "sink_perplexity" in found
    page = "".join(map(str, sink_section(found).parts))
    assert "attention cannot be read: blocks.0.attn" in page


def test_texts_are_natural_where_the_model_can_read_them(colours, tiny_tokenizer):
    model, task = colours
    texts, source = calibration_texts(model, task, 0)
    assert source == "the task's prompts"
    assert torch.equal(texts, task.clean)
    reads = interp.load(tiny_llama_hf(len(tiny_tokenizer)), tokenizer=tiny_tokenizer)
    texts, source = calibration_texts(reads, task, 0)
    assert source.startswith("natural text")
    assert torch.equal(texts, natural_text(reads, *texts.shape, 0))


def test_a_text_is_cut_into_rows(tiny_tokenizer):
    model = interp.load(tiny_llama_hf(len(tiny_tokenizer)), tokenizer=tiny_tokenizer)
    text = "Mary and John went to the store" * 4
    ids = model.to_tokens(text)[0]
    rows = texts_of(model, text, 3, 5)
    assert torch.equal(rows.reshape(-1), ids[:15])
    with pytest.raises(ValueError, match=f"the text has {len(ids)} tokens; give 500"):
        texts_of(model, text, 3, 500)


def test_an_interrupted_study_takes_the_part_from_where_it_was_kept(colours, tmp_path, monkeypatch):
    model, task = colours

    def study():
        return head_study(
            model, task, n_interventions=2, n_maps=2, sinks=True, keep_parts=tmp_path / "parts", progress=False
        )

    first = study()
    monkeypatch.setattr("interp.report.study.sink_variables", None)
    again = study()
    assert [name for name in first.data_vars if str(name).startswith("sink_")]
    assert "".join(sink_section(again).parts) == "".join(sink_section(first).parts)


def test_sinks_as_files(tiny_llama, tmp_path):
    with planted(tiny_llama):
        found = sink_numbers(tiny_llama, TEXTS, source="ids", epsilon=0.3, command="interp sinks", progress=False)
    assert found["sink_rate"].attrs["n_prompts"] == len(TEXTS)
    page = write_sinks(found, tmp_path / "sinks.html").read_text()
    assert "Attention sinks of" in page
    assert "interp sinks" in page
    stored = read(write_sinks(found, tmp_path / "sinks.json"))
    np.testing.assert_allclose(stored["sink_mass"].values, found["sink_mass"].values)
    with pytest.raises(ValueError, match="must end in"):
        check_sink_target(tmp_path / "sinks.csv")
