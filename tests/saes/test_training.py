"""Training: the schedule, resampling, the log, resuming after kills, and what the SAE has learned."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import interp
from interp.saes import make
from interp.saes.checkpoint import FILE
from interp.saes.resampling import FiringRecord, resample
from interp.saes.schedule import learning_rate_factor, resampling_steps, sparsity_factor
from interp.saes.storage import load
from interp.saes.training import train
from tests.saes.training_processes import SITES, read_curve, small, text, tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model() -> interp.Model:
    return tiny()


# The schedule


def test_learning_rate_rises_holds_and_falls_to_nothing() -> None:
    factors = [learning_rate_factor(step, 10, warm_up=4, decay=5) for step in range(10)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert learning_rate_factor(3, 10, warm_up=0, decay=0) == 1


def test_learning_rate_drops_to_a_tenth_after_resampling_and_rises_again() -> None:
    factors = [learning_rate_factor(step, 20, warm_up=3, decay=0, resampled=[8]) for step in range(7, 12)]
    assert factors == pytest.approx([1, 0.1, 0.4, 0.7, 1])


def test_sparsity_rises_and_resampling_ends_before_the_decay() -> None:
    assert [sparsity_factor(step, 2) for step in range(3)] == [0.5, 1, 1]
    assert resampling_steps(100, every=20, times=4, decay=30) == [20, 40, 60]
    assert resampling_steps(100, every=20, times=2, decay=0) == [20, 40]
    assert resampling_steps(100, every=None, times=2, decay=0) == []


# Dead features


def test_dead_is_counted_in_tokens() -> None:
    record = FiringRecord(3, torch.device("cpu"))
    record.update(torch.tensor([1, 0, 0]), 100)
    record.update(torch.tensor([0, 2, 0]), 50)
    assert record.tokens_since.tolist() == [50, 0, 150]
    assert record.dead(100).tolist() == [False, False, True]
    assert record.dead(50).tolist() == [True, False, True]


def test_resampled_features_point_at_what_is_badly_reconstructed() -> None:
    sae = make("relu", 6, 5, b_dec=torch.arange(6.0))
    optimiser = torch.optim.Adam(sae.parameters())
    sae.loss(torch.randn(20, 6, generator=torch.Generator().manual_seed(0))).total.backward()
    optimiser.step()
    # Nothing fires, so the output is b_dec: right for all tokens but two.
    torch.nn.init.constant_(sae.b_enc, -100)
    x = sae.b_dec.detach().repeat(8, 1)
    x[2, 5] += 3
    x[6, 4] -= 4
    dead = torch.tensor([False, False, False, True, True])
    before = {name: value.detach().clone() for name, value in sae.named_parameters()}
    assert resample(sae, optimiser, dead, x, x, batch_size=3, seed=0) == 2
    found = {tuple(row.round().tolist()) for row in sae.W_dec[dead].detach()}
    assert found == {(0, 0, 0, 0, 0, 1), (0, 0, 0, 0, -1, 0)}
    size = 0.2 * before["W_enc"][:, ~dead].norm(dim=0).mean()
    torch.testing.assert_close(sae.W_enc[:, dead], sae.W_dec[dead].T * size)
    assert sae.b_enc[dead].tolist() == [0, 0]
    for name, index in {"W_enc": (slice(None), dead), "W_dec": dead, "b_enc": dead}.items():
        value, averages = sae.get_parameter(name), optimiser.state[sae.get_parameter(name)]
        kept = (slice(None), ~dead) if name == "W_enc" else ~dead
        assert torch.equal(value[kept], before[name][kept])
        assert not averages["exp_avg"][index].any()
        assert not averages["exp_avg_sq"][index].any()
        assert averages["exp_avg"][kept].any()


def test_resampling_without_anything_dead_or_wrong_changes_nothing() -> None:
    sae = make("relu", 4, 3)
    optimiser = torch.optim.Adam(sae.parameters())
    none, some = torch.zeros(3, dtype=torch.bool), torch.tensor([True, False, False])
    assert resample(sae, optimiser, none, torch.ones(5, 4), torch.ones(5, 4), batch_size=5, seed=0) == 0
    assert resample(sae, optimiser, some, torch.zeros(5, 4), torch.zeros(5, 4), batch_size=5, seed=0) == 0


# Training


@pytest.fixture(scope="module")
def trained(model: interp.Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, interp.saes.SAE]]:
    """Two sites on the same text, with a folder."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, train(model, SITES, text(), out=folder, **small())


def test_two_sites_train_as_each_alone(model: interp.Model, trained: tuple[Path, dict[str, interp.saes.SAE]]) -> None:
    alone = train(model, SITES[0], text(), **small())
    for name, value in alone.state_dict().items():
        assert torch.equal(value, trained[1][SITES[0]].state_dict()[name])


def test_the_curve_falls_and_says_what_it_says(trained: tuple[Path, dict[str, interp.saes.SAE]]) -> None:
    curve = [row for row in read_curve(trained[0] / "log.csv") if row["site"] == SITES[0]]
    assert [int(row["step"]) for row in curve] == list(range(1, 81))
    assert [int(row["tokens"]) for row in curve] == list(range(64, 81 * 64, 64))
    for row in curve:
        terms = sum(float(row[name]) for name in ("reconstruction", "sparsity", "auxiliary"))
        assert float(row["loss"]) == pytest.approx(terms, rel=1e-5)
        assert float(row["l0"]) <= 4
    first, last = (sum(float(row["explained_variance"]) for row in part) / 10 for part in (curve[:10], curve[-10:]))
    assert last > first + 0.15


def test_the_result_reads_activations_as_they_are(
    model: interp.Model, trained: tuple[Path, dict[str, interp.saes.SAE]]
) -> None:
    """Normalisation is folded: on raw activations of the text the SAE explains what the log says it does."""
    folder, saes = trained
    _, cache = model.run_with_cache(text())
    for site, sae in saes.items():
        rows = interp.saes.to_rows(site, cache[site]).flatten(0, 1)
        error = (sae(rows) - rows).detach().square().sum()
        explained = float(1 - error / (rows - rows.mean(0)).square().sum())
        curve = [float(row["explained_variance"]) for row in read_curve(folder / "log.csv") if row["site"] == site]
        assert explained == pytest.approx(sum(curve[-10:]) / 10, abs=0.03)
        assert sae.metadata["tokens"] == 80 * 64
        assert sae.site == site
        read = load(folder / site)
        assert torch.equal(read(rows), sae(rows))


def test_a_training_that_is_done_is_not_done_again(
    model: interp.Model, trained: tuple[Path, dict[str, interp.saes.SAE]]
) -> None:
    before = (trained[0] / "log.csv").read_bytes()
    again = train(model, SITES, text(), out=trained[0], **small())
    assert torch.equal(again[SITES[1]].W_enc, trained[1][SITES[1]].W_enc)
    assert (trained[0] / "log.csv").read_bytes() == before


def test_other_settings_are_refused(model: interp.Model, trained: tuple[Path, dict[str, interp.saes.SAE]]) -> None:
    with pytest.raises(ValueError, match=r"was begun with learning_rate=None, not 0\.01: give the same"):
        train(model, SITES, text(), out=trained[0], **small(learning_rate=0.01))
    with pytest.raises(ValueError, match="was begun with text="):
        train(model, SITES, text()[:20], out=trained[0], **small())


def test_a_damaged_checkpoint_is_refused(model: interp.Model, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="not a checkpoint of this interp"):
        train(model, SITES, text(), out=tmp_path, **small())


def test_decoder_rows_keep_norm_one_and_the_model_its_weights(model: interp.Model) -> None:
    before = {name: value.clone() for name, value in model.hf.state_dict().items()}
    sae = train(model, SITES[0], text(), **small(n_tokens=640, normalise=False))
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(sae.d_sae))
    assert all(torch.equal(value, before[name]) for name, value in model.hf.state_dict().items())


@pytest.mark.parametrize("architecture", interp.saes.ARCHITECTURES)
def test_every_architecture_trains(model: interp.Model, architecture: str) -> None:
    k = 4 if "top" in architecture or architecture == "matryoshka" else None
    sae = train(model, SITES[0], text(), architecture=architecture, autocast=torch.bfloat16, **small(n_tokens=320, k=k))
    assert sae.architecture == architecture
    assert sae.W_dec.dtype == torch.float32
    assert all(bool(torch.isfinite(value).all()) for value in sae.state_dict().values())


def test_a_transcoder_learns_its_target(model: interp.Model) -> None:
    sae = train(
        model,
        "blocks.1.ln2.hook_normalized",
        text(),
        target="blocks.1.hook_mlp_out",
        **small(settings={"skip": True}, learning_rate=0.01),
    )
    _, cache = model.run_with_cache(text())
    x, target = (cache[name].flatten(0, 1) for name in ("blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"))
    error = (sae(x) - target).detach().square().sum() / (target - target.mean(0)).square().sum()
    assert float(error) < 0.6
    assert sae.target_site == "blocks.1.hook_mlp_out"


def test_text_that_ends_ends_training(model: interp.Model) -> None:
    sae = train(model, SITES[0], iter(text().split(8)), **small(n_tokens=10_000))
    assert sae.metadata["tokens"] == 640


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_tokens": 0}, "n_tokens=0; give more than 0"),
        ({"learning_rate": -1.0}, r"learning_rate=-1.0; give more than 0, or None"),
        ({"buffer_tokens": 100}, "the buffer holds 100 tokens; it needs 512"),
        ({"skip_tokens": range(61)}, "every token of the text is left out"),
        ({"architecture": "tok"}, "'tok' is not an architecture"),
        ({"l1": 1.0}, "topk has no setting 'l1'"),
    ],
)
def test_bad_numbers_are_refused(model: interp.Model, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(model, SITES[0], text(), **small(**options))


def test_a_name_for_many_sites_is_refused(model: interp.Model) -> None:
    with pytest.raises(ValueError, match=r"'z' stands for 3 sites, e\.g\. blocks\.0\.attn\.hook_z: name one"):
        train(model, "z", text(), **small())


# Kills


def test_killed_at_random_moments_it_ends_in_the_same_weights(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.saes.training_processes", "killed", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    n_kills, step = map(int, (tmp_path / "kills").read_text().split())
    assert n_kills == 3
    assert step > 0
    whole, broken = (load_file(tmp_path / name / FILE) for name in ("whole", "broken"))
    assert whole.keys() == broken.keys()
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    assert read_curve(tmp_path / "whole" / "log.csv") == read_curve(tmp_path / "broken" / "log.csv")
    for site in SITES:
        weights = [(tmp_path / name / site / "sae_weights.safetensors").read_bytes() for name in ("whole", "broken")]
        assert weights[0] == weights[1]
