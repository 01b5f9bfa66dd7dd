"""Training: the schedule, resampling, the log, resuming after kills, and what the SAE has learned."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file

import interp
from interp.patching.writing import only_writer
from interp.saes import checkpoint, make
from interp.saes.activations import Buffer
from interp.saes.checkpoint import FILE, Checkpoint, read_checkpoint, write_checkpoint
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
    assert resample(sae, optimiser, dead, x, x, batch_size=3, seed=0).tolist() == [3, 4]
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
    assert not len(resample(sae, optimiser, none, torch.ones(5, 4), torch.ones(5, 4), batch_size=5, seed=0))
    assert not len(resample(sae, optimiser, some, torch.zeros(5, 4), torch.zeros(5, 4), batch_size=5, seed=0))


def test_tokens_are_drawn_by_the_square_of_their_squared_error() -> None:
    """Of two tokens with squared errors 1 and 2, the second comes four times as often."""
    x = torch.tensor([[1.0, 0], [0, 2**0.5]])
    dead, found = torch.tensor([True, False]), []
    for seed in range(300):
        sae = make("relu", 2, 2)
        torch.nn.init.constant_(sae.b_enc, -100)
        resample(sae, torch.optim.Adam(sae.parameters()), dead, x, x, batch_size=2, seed=seed)
        found.append(float(sae.W_dec[0, 1].detach()))
    assert sum(found) / 300 == pytest.approx(0.8, abs=0.07)


def test_a_resampled_jumprelu_has_the_threshold_of_a_new_one() -> None:
    sae = make("jumprelu", 4, 3)
    torch.nn.init.constant_(sae.threshold, 5.0)
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    resample(sae, torch.optim.Adam(sae.parameters()), torch.tensor([False, True, False]), x, x, batch_size=6, seed=0)
    assert sae.threshold.tolist() == pytest.approx([5, 0.01, 5])


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


def test_a_transcoder_learns_its_target(model: interp.Model, tmp_path: Path) -> None:
    sae = train(
        model,
        "blocks.1.ln2.hook_normalized",
        text(),
        target="blocks.1.hook_mlp_out",
        out=tmp_path,
        **small(settings={"skip": True}, learning_rate=0.01),
    )
    _, cache = model.run_with_cache(text())
    x, target = (cache[name].flatten(0, 1) for name in ("blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"))
    error = (sae(x) - target).detach().square().sum() / (target - target.mean(0)).square().sum()
    assert float(error) < 0.6
    logged = [float(row["explained_variance"]) for row in read_curve(tmp_path / "log.csv")[-10:]]
    assert float(1 - error) == pytest.approx(sum(logged) / 10, abs=0.05)
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
        ({"architecture": "tok"}, "'tok' is not an architecture"),
        ({"l1": 1.0}, "topk has no setting 'l1'"),
        ({"k": 400}, r"k=400 is outside 1\.\.384"),
        ({"log_every": 0}, "log_every=0; give 1 or more"),
        ({"positions": slice(16, 20)}, r"names no position; positions run 0\.\.15"),
        ({"mask": torch.zeros(8, 16, dtype=torch.bool)}, r"the mask marks \(8, 16\) tokens; the text has \(40, 16\)"),
    ],
)
def test_bad_numbers_are_refused_before_the_text_is_read(
    model: interp.Model, options: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Buffer, "_refill", lambda self: pytest.fail("the buffer was filled"))
    with pytest.raises(ValueError, match=message):
        train(model, SITES[0], text(), **small(**options))


def test_text_without_a_batch_is_refused(model: interp.Model) -> None:
    with pytest.raises(ValueError, match="every token of the text is left out"):
        train(model, SITES[0], text(), **small(skip_tokens=range(61)))
    with pytest.raises(ValueError, match="the text has less than the 64 tokens of a batch"):
        train(model, SITES[0], iter([text()[:3]]), **small())


def test_a_name_for_many_sites_is_refused(model: interp.Model) -> None:
    with pytest.raises(ValueError, match=r"'z' stands for 3 sites, e\.g\. blocks\.0\.attn\.hook_z: name one"):
        train(model, "z", text(), **small())
    with pytest.raises(ValueError, match=r"named twice in blocks\.1\.attn\.hook_z, blocks\.1\.attn\.hook_z"):
        train(model, [SITES[0]] * 2, text(), **small())


# What is written and shown


def test_a_second_training_in_the_folder_is_refused(
    model: interp.Model, trained: tuple[Path, dict[str, interp.saes.SAE]]
) -> None:
    before = (trained[0] / "log.csv").read_bytes()
    with only_writer(trained[0]), pytest.raises(BlockingIOError, match="another job is writing to this folder"):
        train(model, SITES, text(), out=trained[0], **small())
    assert (trained[0] / "log.csv").read_bytes() == before


def test_another_log_is_not_overwritten(model: interp.Model, tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("day,what\n1,rain\n")
    with pytest.raises(ValueError, match=r"log\.csv is not the log of a training"):
        train(model, SITES[0], text(), out=tmp_path, **small(n_tokens=64))
    assert (tmp_path / "log.csv").read_text() == "day,what\n1,rain\n"


def test_the_bar_shows_l0_explained_variance_and_dead(model: interp.Model, capsys: pytest.CaptureFixture[str]) -> None:
    train(model, SITES[0], text(), progress=True, **small(n_tokens=640))
    shown = capsys.readouterr().err
    assert "640/640" in shown
    assert re.search(r"L0=4\.0, EV=-?0\.\d{3}, dead=\d+\.\d%", shown)


def test_tensorboard_gets_the_curve_where_it_is_installed(
    model: interp.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Board:
        made: ClassVar[list[Board]] = []

        def __init__(self, folder: str, purge_step: int) -> None:
            self.folder, self.purge_step, self.closed = folder, purge_step, False
            self.scalars: list[tuple[str, float, int]] = []
            self.made.append(self)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.scalars.append((name, value, step))

        def close(self) -> None:
            self.closed = True

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Board))
    train(model, SITES[0], text(), out=tmp_path, **small(n_tokens=128))
    (board,) = Board.made
    assert (board.folder, board.purge_step, board.closed) == (str(tmp_path / "tensorboard"), 1, True)
    curve = read_curve(tmp_path / "log.csv")
    found = [(value, step) for name, value, step in board.scalars if name == f"{SITES[0]}/explained_variance"]
    assert found == [(float(row["explained_variance"]), int(row["step"])) for row in curve]
    assert len(board.scalars) == 2 * 9


# Kills


def test_a_kill_in_mid_write_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(Checkpoint(3, {}, {}, {"a": torch.ones(2)}), tmp_path)

    def killed(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"torn")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(Checkpoint(4, {}, {}, {"a": torch.zeros(2)}), tmp_path)
    found = read_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, found.tensors["a"].tolist()) == (3, [1, 1])


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
