"""The whole way, from a model and a task to a file, on tiny random models; and SmolLM2 with very few prompts."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch

import interp
from interp.model import Edit
from interp.report import head_study, head_table, html_page, read, write_study
from interp.report.figures import head_label
from interp.report.head_report import check_format
from interp.report.measures import extreme_heads
from interp.report.study import aligned_prompts, with_interval, written_tokens
from tests.report.synthetic import synthetic_study

PAIRS = [
    (" Mary", " John", "store"), (" Tom", " James", "park"), (" Alice", " Bob", "school"), (" Kate", " Anna", "store"),
]  # fmt: skip


def small_task(model, n=4):
    """Name the one who is not repeated; prompts of one length."""
    return interp.tasks.from_pairs(
        model,
        [
            {
                "clean": f"When{io} and{s} went to the {place},{s} gave a drink to",
                "corrupted": f"When{io} and{s} went to the {place},{io} gave a drink to",
                "answer": io,
                "wrong": s,
            }
            for io, s, place in PAIRS[:n]
        ],
    )


@pytest.fixture(scope="module")
def study(tiny_module_model):
    return head_study(
        tiny_module_model,
        small_task(tiny_module_model),
        n_interventions=3,
        n_maps=2,
        command="interp report",
        progress=False,
    )


@pytest.fixture(scope="module")
def tiny_module_model(tiny_tokenizer):
    from tests.conftest import tiny_llama_hf

    return interp.load(tiny_llama_hf(len(tiny_tokenizer)), tokenizer=tiny_tokenizer, name="tiny-llama")


def test_study_says_how_it_was_made(study):
    attrs = study.attrs
    assert (attrs["model"], attrs["task"], attrs["metric"]) == ("tiny-llama", "pairs", "logit_diff")
    assert set(json.loads(attrs["seconds"])) >= {"behaviour", "heads", "positions", "backup"}
    assert {"interp", "torch", "transformers", "python", "hardware", "date", "command", "seed"} <= set(attrs)


def test_study_counts_the_prompts_of_every_part(study):
    assert study.sizes["prompt"] == 4
    assert study["importance_resample"].attrs["n_prompts"] == 3
    assert study["patch_resid_pre"].attrs["n_prompts"] == 2


def test_head_importance_is_that_of_a_plain_hook(study, tiny_module_model):
    """Zero ablation of one head by run_with_hooks, prompt by prompt."""
    model, task = tiny_module_model, small_task(tiny_module_model)[:3]

    def difference(logits):
        rows = torch.arange(3)
        return logits[rows, -1, task.answers[:, 0]] - logits[rows, -1, task.wrong[:, 0]]

    def silence(z, hook):
        z[:, :, 2] = 0

    ablated = model.run_with_hooks(task.clean, [("blocks.1.attn.hook_z", silence)])
    expected = float((difference(model(task.clean)) - difference(ablated)).mean())
    assert float(study["importance_zero"].sel(layer=1, head=2)) == pytest.approx(expected, abs=1e-4)
    low, high = (float(study[f"importance_zero_{end}"].sel(layer=1, head=2)) for end in ("low", "high"))
    assert low <= expected <= high


def test_position_maps_end_in_the_clean_run(study):
    """Patching the stream at the last position of the last layer restores what that position holds: everything."""
    maps = study["patch_resid_pre"]
    assert maps.dims == ("layer", "position")
    # Layer 0, the position of the second name, holds all that differs.
    assert float(maps[0].max()) == pytest.approx(1, abs=1e-4)
    position = int(maps[0].values.argmax())
    assert float(abs(maps[0].drop_isel(position=position)).max()) == pytest.approx(0, abs=1e-5)


def test_value_and_pattern_patches_share_the_units_of_importance(study, tiny_module_model):
    model, task = tiny_module_model, small_task(tiny_module_model)[:2]
    exact = interp.patching.activation_patching(
        model, task, site="v", by=("layer", "head"), direction="noise", normalised=False, progress=False
    )
    assert study["patch_value"].dims == ("layer", "kv_head")
    np.testing.assert_allclose(study["patch_value"].values, exact.values, atol=1e-5)


def test_backup_is_the_direct_effect_with_the_writer_replaced(study, tiny_module_model):
    model, task = tiny_module_model, small_task(tiny_module_model)
    layer, head = extreme_heads(study["direct"], 1, 0)[0]
    assert study["direct_before"].attrs["ablated"] == head_label(layer, head)
    _, corrupted = model.run_with_cache(task.corrupted, "z")
    edit = Edit(f"blocks.{layer}.attn.hook_z", heads=[head], value=corrupted["z", layer])
    with model.edited(edit):
        after = interp.heads.direct_logit_attribution(model, task)["effect"]
    np.testing.assert_allclose(study["direct_after"].values, after.values, atol=1e-5)
    earlier = study["direct_after"].values[:layer] - study["direct_before"].values[:layer]
    assert np.abs(earlier[:layer]).max(initial=0) < np.abs(after.values).max()


def test_written_tokens_are_those_of_the_head_alone(tiny_module_model):
    """By hand for RMSNorm: z W_O · gain / rms(stream) W_U."""
    model = tiny_module_model
    ids = model.to_tokens("When Mary and John went to")
    _, cache = model.run_with_cache(ids)
    stream = cache["resid_post", 2][0, -1]
    norm = model.hf.model.norm
    scale = (stream.square().mean() + norm.variance_epsilon).rsqrt()
    logits = (cache["z", 1][0, -1, 3] @ model.W_O[1, 3]) * norm.weight * scale @ model.W_U
    highest, lowest = written_tokens(model, ids, 1, 3)
    assert highest == model.to_str_tokens(logits.topk(5).indices)
    assert lowest == model.to_str_tokens(logits.topk(5, largest=False).indices)


def test_model_comes_back_as_it_was(tiny_module_model, study):
    hooks = [module for module in tiny_module_model.hf.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert hooks == []


def test_prompts_of_the_largest_alignment_are_taken(tiny_module_model):
    short, long = ("When Mary and John went to", "After Mary and John went to the store"), ("Mary went to the", "store")
    texts = [long[0], *short, long[0] + " store", short[0]]
    pairs = [
        {"clean": text, "corrupted": text.replace("Mary", "Kate"), "answer": " Tom", "wrong": " Bob"} for text in texts
    ]
    task = interp.tasks.from_pairs(tiny_module_model, pairs)
    lengths = [len(ids) for ids in aligned_prompts(task, 8).clean_ids]
    assert len(set(lengths)) == 1
    assert len(lengths) == max(map([len(ids) for ids in task.clean_ids].count, [len(ids) for ids in task.clean_ids]))
    assert len(aligned_prompts(task, 1)) == 1


def test_interval_surrounds_the_mean(tiny_module_model):
    task = small_task(tiny_module_model)
    effects = interp.patching.activation_patching(
        tiny_module_model, task, site="z", by=("layer",), direction="noise", per_prompt=True, progress=False
    )
    found = with_interval("e", effects, seed=0)
    np.testing.assert_allclose(found["e"].values, effects.values.mean(0), rtol=1e-6)
    assert (found["e_low"].values <= found["e"].values).all()
    assert (found["e"].values <= found["e_high"].values).all()
    assert found["e"].attrs["n_prompts"] == 4


def test_formats_reload_to_equal_numbers(tmp_path, study):
    paths = {name: write_study(study, tmp_path / f"x.{name}", format=name) for name in ("nc", "json", "csv")}
    from_nc, from_json = read(paths["nc"]), read(paths["json"])
    frame = pd.read_csv(paths["csv"], index_col="name", keep_default_na=True)
    for name in ("importance_resample", "direct", "patch_pattern", "entropy"):
        expected = study[name].values
        np.testing.assert_array_equal(from_nc[name].values, expected)
        np.testing.assert_array_equal(from_json[name].values.astype(expected.dtype), expected)
        np.testing.assert_array_equal(frame[name].to_numpy().astype(expected.dtype), expected.ravel())
    assert list(frame.index[:5]) == ["L0H0", "L0H1", "L0H2", "L0H3", "L1H0"]


def test_page_of_a_study_read_back_is_the_same_page(tmp_path, study):
    path = write_study(study, tmp_path / "x.nc", format="nc")
    assert html_page(read(path)) == html_page(study)


def test_report_is_written_in_the_format_of_its_name(tmp_path, tiny_llama, study, monkeypatch):
    asked = {}

    def kept(model, task, **options):
        asked.update(options)
        return study.assign_attrs(command=options["command"])

    monkeypatch.setattr("interp.report.head_report.head_study", kept)
    path = interp.report.heads(tiny_llama, small_task(tiny_llama), tmp_path / "x.html", n_maps=2, seed=5)
    text = path.read_text()
    assert text.startswith("<!doctype html>")
    assert "tiny-llama prefers the right answer in" in text
    assert "interp.report.heads(model, pairs," in text
    assert (asked["n_maps"], asked["n_interventions"], asked["seed"]) == (2, 6, 5)


def test_one_seed_gives_one_study(tiny_llama, study):
    again = head_study(tiny_llama, small_task(tiny_llama), n_interventions=3, n_maps=2, progress=False)
    assert again.drop_attrs(deep=True).identical(study.drop_attrs(deep=True))


def test_task_without_wrong_answers_leaves_direct_effects_out(tiny_gpt2):
    pairs = [
        {"clean": f"When{io} and John went to", "corrupted": f"When{s} and John went to", "answer": io}
        for io, s, _ in PAIRS
    ]
    task = interp.tasks.from_pairs(tiny_gpt2, pairs, metric="log_prob")
    study = head_study(tiny_gpt2, task, n_interventions=2, n_maps=2, progress=False)
    assert "direct" not in study
    assert "Which heads write the answer" not in html_page(study)
    assert "log-probability of the answer" in html_page(study)


def test_bad_requests_are_refused_before_anything_runs(tmp_path, tiny_llama):
    task = small_task(tiny_llama)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        interp.report.heads(tiny_llama, task, tmp_path / "no" / "x.html")
    with pytest.raises(ValueError, match="'pdf' is no format of a report; there are html, csv, json, nc"):
        interp.report.heads(tiny_llama, task, tmp_path / "x.pdf")
    with pytest.raises(ValueError, match="at least 2 prompts"):
        interp.report.heads(tiny_llama, task[:1], tmp_path / "x.html")
    assert list(tmp_path.iterdir()) == []
    assert check_format("nc") == "nc"


def test_table_has_one_row_a_head():
    study = synthetic_study()
    frame = head_table(study)
    assert len(frame) == study.sizes["layer"] * study.sizes["head"]
    assert frame.loc["L3H2", "direct"] == float(study["direct"].sel(layer=3, head=2))


@pytest.mark.model
@pytest.mark.slow
def test_smollm2_on_ioi(tmp_path, smollm2):
    """The smallest report there is: the behaviour holds, and the page opens with it."""
    task = interp.tasks.ioi(smollm2, n=4)
    study = head_study(smollm2, task, n_interventions=2, n_maps=2, progress=False)
    assert int(study["correct"].sum()) >= 3
    induction = study["induction"].values
    assert head_label(*np.unravel_index(induction.argmax(), induction.shape)) == "L18H6"
    path = write_study(study, tmp_path / "ioi.html", format="html")
    assert path.stat().st_size < 8e6
    assert "smollm2-135m prefers the right answer in" in path.read_text()
