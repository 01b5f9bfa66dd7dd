"""Activations on disk: the model's own, resumable, random access, and refusals of what is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import interp
from interp.model import Site
from interp.patching.writing import only_writer
from interp.saes import activation_cache
from interp.saes.activation_cache import MANIFEST, ActivationCache, cache_activations
from interp.saes.training import train
from tests.saes.training_processes import SITES, small, text, tiny

CHOICES = {"chunk_tokens": 64, "shard_tokens": 128, "positions": slice(1, None), "skip_tokens": [5]}


@pytest.fixture(scope="module")
def model() -> interp.Model:
    return tiny()


@pytest.fixture(scope="module")
def cache(model: interp.Model, tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    return cache_activations(model, SITES, text(), tmp_path_factory.mktemp("cache"), n_tokens=500, **CHOICES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_the_models_activations(model: interp.Model, tmp_path: Path, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    cache = cache_activations(model, SITES, text(), tmp_path, n_tokens=300, dtype=name, **CHOICES)
    tokens, origins = cache.tokens(), cache.origins()
    assert 300 <= cache.n_rows == len(origins) < 300 + 128
    assert not bool((tokens[origins[:, 0], origins[:, 1]] == 5).any())
    assert int(origins[:, 1].min()) == 1
    _, seen = model.run_with_cache(tokens, SITES)
    order = torch.randperm(cache.n_rows, generator=torch.Generator().manual_seed(0))[:99]
    for site in SITES:
        rows = interp.saes.to_rows(site, seen[site])[origins[order, 0], origins[order, 1]]
        found = cache.rows(site, order)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, rows.to(dtype).float(), atol=1e-5, rtol=1e-2 if dtype.itemsize == 2 else 1e-5)


def test_killed_half_way_it_goes_on(
    model: interp.Model, cache: ActivationCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between a shard and its entry in the manifest: the same call ends in the same files."""
    whole, count = activation_cache._add_shard, []

    def killed(folder: Path, *args: object) -> None:
        if len(count) == 2:
            (folder / ".shard-00002.safetensors.part").write_bytes(b"torn")
            (folder / "shard-00002.safetensors").write_bytes(b"whole, but in no manifest")
            raise KeyboardInterrupt
        count.append(1)
        whole(folder, *args)

    monkeypatch.setattr(activation_cache, "_add_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        cache_activations(model, SITES, text(), tmp_path, n_tokens=500, **CHOICES)
    assert len(ActivationCache(tmp_path).manifest["shards"]) == 2
    monkeypatch.undo()
    again = cache_activations(model, SITES, text(), tmp_path, n_tokens=500, **CHOICES)
    names = sorted(path.name for path in cache.folder.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert all((tmp_path / name).read_bytes() == (cache.folder / name).read_bytes() for name in names)
    assert again.n_rows == cache.n_rows


def test_batches_hold_every_row_once_an_epoch(cache: ActivationCache) -> None:
    site = Site.parse(SITES[0])
    everything = cache.rows(site, torch.arange(cache.n_rows))
    served = cache.batches([site], batch_size=50, seed=0, device=torch.device("cpu"))
    n = cache.n_rows // 50
    epochs = [torch.cat([served.next_batch()[site] for _ in range(n)]) for _ in range(2)]
    for epoch in epochs:
        # Equal rows (equal tokens at the start of sequences) may come as often as they are there.
        rows, which = torch.cat([everything, epoch]).unique(dim=0, return_inverse=True)
        held, seen = (
            which[part].bincount(minlength=len(rows)) for part in (slice(0, cache.n_rows), slice(cache.n_rows, None))
        )
        assert bool((seen <= held).all())
        assert int(seen.sum()) == n * 50
    assert not torch.equal(*epochs)
    fresh = cache.batches([site], batch_size=50, seed=0, device=torch.device("cpu"))
    fresh.restore({"n_served": torch.tensor(n)})
    assert torch.equal(fresh.next_batch()[site], epochs[1][:50])


def test_an_sae_trains_on_it(model: interp.Model, cache: ActivationCache, tmp_path: Path) -> None:
    sae = train(model, SITES[0], cache, out=tmp_path, **small(n_tokens=1280))
    assert sae.metadata["text"] == cache.text
    with pytest.raises(ValueError, match="choose them there"):
        train(model, SITES[0], cache, **small(skip_tokens=[3]))
    with pytest.raises(ValueError, match=r"holds no blocks\.0\.attn\.hook_z; it holds"):
        train(model, "blocks.0.attn.hook_z", cache, **small())
    with pytest.raises(ValueError, match="a batch is 5000"):
        train(model, SITES[0], cache, **small(batch_size=5000))


def test_another_cache_in_the_folder_is_refused(model: interp.Model, cache: ActivationCache) -> None:
    with pytest.raises(ValueError, match="was begun with sites="):
        cache_activations(model, SITES[0], text(), cache.folder, n_tokens=500, **CHOICES)
    with pytest.raises(ValueError, match="dtype='int8'; it is one of float32"):
        cache_activations(model, SITES, text(), cache.folder, n_tokens=500, dtype="int8")


def test_the_text_is_read_once(model: interp.Model, tmp_path: Path) -> None:
    """Unlike in training: a second time it would only fill the disk."""
    cache = cache_activations(model, SITES[0], text(), tmp_path, n_tokens=10_000, chunk_tokens=64, shard_tokens=128)
    assert cache.n_rows == text().numel()
    rows = sorted(map(tuple, cache.tokens().tolist()))
    assert rows == sorted(map(tuple, text().tolist()))


def test_the_cache_of_another_model_is_refused(model: interp.Model, cache: ActivationCache) -> None:
    other = tiny()
    with torch.no_grad():
        other.hf.model.layers[0].self_attn.o_proj.weight[-1, -1] += 1
    with pytest.raises(ValueError, match=r"holds activations of tiny \(\w+\); tiny has other weights"):
        train(other, SITES[0], cache, **small())
    with pytest.raises(ValueError, match="was begun with weights="):
        cache_activations(other, SITES, text(), cache.folder, n_tokens=500, **CHOICES)


def test_caches_of_other_tokens_have_other_names(model: interp.Model, tmp_path: Path) -> None:
    """As many tokens of the same text, but not the same: a training begun on one must not go on with the other."""
    chosen = {"first": slice(0, -1), "last": slice(1, None)}
    made = [
        cache_activations(model, SITES[0], text(), tmp_path / name, n_tokens=600, positions=positions)
        for name, positions in chosen.items()
    ]
    assert made[0].n_rows == made[1].n_rows == 600
    assert made[0].text != made[1].text


def test_what_would_be_nothing_is_refused(model: interp.Model, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="n_tokens=0; give 1 at least"):
        cache_activations(model, SITES, text(), tmp_path, n_tokens=0)
    with pytest.raises(ValueError, match="all 640 tokens of a shard are left out: check mask"):
        cache_activations(model, SITES, text(), tmp_path, n_tokens=100, skip_tokens=range(61))
    with pytest.raises(ValueError, match=r"the mask marks \(8, 16\) tokens; the text has \(40, 16\)"):
        cache_activations(model, SITES, text(), tmp_path, n_tokens=100, mask=torch.zeros(8, 16, dtype=torch.bool))


def test_numbers_too_large_for_the_type_are_refused(tmp_path: Path) -> None:
    large = tiny()
    with torch.no_grad():
        large.hf.model.embed_tokens.weight *= 1e8
    site = "blocks.0.hook_resid_pre"
    with pytest.raises(FloatingPointError, match=r"blocks\.0\.hook_resid_pre has values beyond torch\.float16"):
        cache_activations(large, site, text(), tmp_path, n_tokens=100, dtype="float16")
    assert cache_activations(large, site, text(), tmp_path / "wide", n_tokens=100, dtype="bfloat16").n_rows == 640


def test_a_second_writer_is_refused(model: interp.Model, cache: ActivationCache) -> None:
    before = (cache.folder / MANIFEST).read_bytes()
    with only_writer(cache.folder), pytest.raises(BlockingIOError, match="another job is writing to this folder"):
        cache_activations(model, SITES, text(), cache.folder, n_tokens=600, **CHOICES)
    assert (cache.folder / MANIFEST).read_bytes() == before


def test_rows_out_of_range_are_refused(cache: ActivationCache) -> None:
    with pytest.raises(ValueError, match=rf"rows run 0\.\.{cache.n_rows - 1}; -1\.\.2 were asked for"):
        cache.rows(SITES[0], torch.tensor([-1, 2]))


def test_damage_is_named(model: interp.Model, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no activations"):
        ActivationCache(tmp_path)
    cache_activations(model, SITES[0], text(), tmp_path, n_tokens=100, **CHOICES)
    shard = tmp_path / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"shard shard-00000\.safetensors has \d+ bytes, not \d+"):
        ActivationCache(tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps({**manifest, "version": 2}))
    with pytest.raises(ValueError, match=r"format 'interp\.activations' version 2, not"):
        ActivationCache(tmp_path)
