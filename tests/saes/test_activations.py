"""Reading activations: one forward pass that stops early, masks, the mixing buffer, and text in all its forms."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch
import xarray as xr

import interp
from interp.model import Site
from interp.saes import text as text_room
from interp.saes.activations import Buffer, digest_of_model, gather, keeper
from interp.saes.text import Chunk, Text, open_text
from interp.tasks import corpus
from tests.model.families import FAMILIES
from tests.saes.training_processes import text, tiny

Z, RESID = Site("z", 1), Site("resid_pre", 2)


@pytest.fixture(scope="module")
def model() -> interp.Model:
    return tiny()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_gathered_activations_are_the_models_and_nothing_after_them_is_run(name: str) -> None:
    model = interp.Model(FAMILIES[name].make_model())
    sites = [Site("z", 0), Site("mlp_out", 1)]
    tokens = text()[:3, :8]
    _, cache = model.run_with_cache(tokens, sites)
    ran: list[int] = []
    handle = model.tower.blocks[2].module.register_forward_pre_hook(lambda *_: ran.append(1))
    found = gather(model, tokens, sites)
    handle.remove()
    assert not ran
    assert torch.equal(found[sites[0]], cache[sites[0]].flatten(-2))
    assert torch.equal(found[sites[1]], cache[sites[1]])
    # Stopping half-way leaves no hook and no changed attention behind.
    assert torch.equal(model(tokens), interp.Model(FAMILIES[name].make_model())(tokens))


def test_bad_weights_are_named(model: interp.Model) -> None:
    broken = tiny()
    torch.nn.init.constant_(broken.hf.model.layers[1].self_attn.v_proj.weight, float("nan"))
    with pytest.raises(FloatingPointError, match=r"blocks\.1\.attn\.hook_z is NaN or infinite"):
        gather(broken, text()[:1], [RESID, Z])


# Masks


def of_ids(tokens: torch.Tensor) -> Text:
    return open_text(tiny(), tokens, length=9, chunk_tokens=64, seed=1)


def kept(text: Text, chunk: Chunk, sites: list[Site], **options: object) -> torch.Tensor:
    choices = {"mask": None, "skip_tokens": [], "positions": slice(None), **options}
    return keeper(text, sites, **choices)(chunk)


def test_positions_and_ids_are_left_out() -> None:
    tokens = torch.tensor([[1, 5, 0, 7], [1, 6, 5, 0]])
    whole, chunk = of_ids(tokens), Chunk(tokens, None)
    assert kept(whole, chunk, [Z]).all()
    assert kept(whole, chunk, [Z], skip_tokens=[0, 1]).tolist() == [
        [False, True, False, True],
        [False, True, True, False],
    ]
    assert kept(whole, Chunk(tokens.int(), None), [Z], skip_tokens=[5]).sum() == 6
    assert kept(whole, chunk, [Z], positions=slice(1, None))[:, 0].tolist() == [False, False]
    assert kept(whole, chunk, [Z], positions=slice(2, 3)).nonzero().tolist() == [[0, 2], [1, 2]]
    assert kept(whole, chunk, [Z], positions=slice(-1, None)).nonzero().tolist() == [[0, 3], [1, 3]]
    with pytest.raises(ValueError, match=r"slice\(4, None, None\) names no position; positions run 0\.\.3"):
        kept(whole, chunk, [Z], positions=slice(4, None))


def test_a_mask_leaves_out_what_is_marked_in_the_layer_of_any_site() -> None:
    marks = torch.zeros(3, 4, 5, dtype=torch.bool)
    marks[1, 0, 2] = marks[2, 3, 4] = marks[0, :, :] = True
    mask = xr.DataArray(marks.numpy(), dims=("layer", "prompt", "position"), coords={"layer": range(3)})
    tokens, rows = torch.ones(4, 5, dtype=torch.long), torch.tensor([3, 0])
    whole, chunk = of_ids(tokens), Chunk(tokens[rows], rows)
    assert (~kept(whole, chunk, [Z], mask=mask)).nonzero().tolist() == [[1, 2]]
    assert (~kept(whole, chunk, [Z, RESID], mask=mask)).nonzero().tolist() == [[0, 4], [1, 2]]
    assert (~kept(whole, chunk, [Z], mask=marks[2])).nonzero().tolist() == [[0, 4]]
    assert (~kept(whole, chunk, [Z], mask=lambda ids: ids == 7)).sum() == 0
    with pytest.raises(ValueError, match=r"the mask has no layer 2; it has \[0, 1\]"):
        kept(whole, chunk, [RESID], mask=mask[:2])
    with pytest.raises(ValueError, match="the mask has no layer for hook_embed"):
        kept(whole, chunk, [Site.parse("hook_embed")], mask=mask)


@pytest.mark.parametrize("shape", [(4, 4), (2, 5), (5, 5)])
def test_a_mask_of_another_text_is_refused_before_anything_is_read(shape: tuple[int, int]) -> None:
    """Also one with more rows than the text, or as many as a chunk has: rows would be of other sequences."""
    tokens, mask = torch.ones(4, 5, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"the mask marks .* tokens; the text has \(4, 5\)"):
        keeper(of_ids(tokens), [Z], mask=mask, skip_tokens=[], positions=slice(None))
    stream = open_text(tiny(), iter([tokens]), length=9, chunk_tokens=10, seed=0)
    with pytest.raises(ValueError, match="a mask of all tokens needs text given as token ids"):
        keeper(stream, [Z], mask=mask, skip_tokens=[], positions=slice(None))
    with pytest.raises(ValueError, match="the mask marks"):
        kept(stream, Chunk(tokens[:2], None), [Z], mask=lambda ids: mask[:1])


def test_the_mask_of_sinks_fits(model: interp.Model) -> None:
    tokens = text()[:4]
    sinks = interp.sinks.mask(model, tokens, "norm", threshold=1.2)
    chunk = Chunk(tokens, torch.arange(4))
    expected = ~torch.from_numpy(sinks.sel(layer=1).values)
    assert not expected.all()
    assert torch.equal(kept(of_ids(tokens), chunk, [Z], mask=sinks), expected)


def test_models_are_told_apart_by_every_weight(model: interp.Model) -> None:
    same, other = tiny(), tiny()
    assert digest_of_model(model) == digest_of_model(same)
    with torch.no_grad():
        other.hf.model.layers[1].mlp.down_proj.weight[-1, -1] += 1e-3
    assert digest_of_model(other) != digest_of_model(same)
    assert digest_of_model(interp.Model(same.hf.bfloat16())) != digest_of_model(model)
    # Weights that are elsewhere, as accelerate leaves them, are known by name.
    assert digest_of_model(interp.Model(other.hf.to("meta"))) != digest_of_model(model)


# The buffer


def buffer(model: interp.Model, tokens: torch.Tensor, **options: object) -> Buffer:
    opened = open_text(model, tokens, length=9, chunk_tokens=64, seed=1)
    settings = {"capacity": 256, "batch_size": 32, "seed": 2, "device": torch.device("cpu")}
    keep = keeper(opened, [Z], mask=None, skip_tokens=[], positions=options.pop("positions", slice(1, None)))
    return Buffer(model, opened, [Z, RESID], keep=keep, **settings | options)


def test_every_kept_token_is_served_once_an_epoch_in_a_mixed_order(model: interp.Model) -> None:
    tokens = text()
    found = gather(model, tokens, [Z, RESID])
    rows = {site: values[:, 1:].flatten(0, 1) for site, values in found.items()}
    served = buffer(model, tokens)
    batches = [served.next_batch() for _ in range(16)]
    # 40 x 15 = 600 tokens an epoch: 512 of them and no token twice, unless the buffer has gone on to the next epoch.
    z, resid = (torch.cat([batch[site] for batch in batches if batch]) for site in (Z, RESID))
    origin = torch.cdist(z, rows[Z]).argmin(-1)
    torch.testing.assert_close(z, rows[Z][origin], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(resid, rows[RESID][origin], atol=1e-4, rtol=1e-4)
    counts = torch.bincount(origin, minlength=600)
    assert int(counts.max()) <= 2
    assert int((counts > 0).sum()) >= 470
    # Neighbours in a batch come from far apart.
    assert float(((origin[1:] - origin[:-1]).abs() < 15).float().mean()) < 0.15


def test_text_that_ends_is_served_whole_but_for_the_last_part(model: interp.Model) -> None:
    tokens = text()[:20]
    opened = open_text(model, iter(tokens.split(7)), length=9, chunk_tokens=64, seed=1)
    ends = Buffer(
        model,
        opened,
        [Z],
        keep=keeper(opened, [Z], mask=None, skip_tokens=[], positions=slice(None)),
        capacity=256,
        batch_size=48,
        seed=0,
        device=model.device,
    )
    batches = list(itertools.takewhile(lambda batch: batch is not None, iter(ends.next_batch, 0)))
    assert len(batches) == 320 // 48


def test_where_little_is_kept_the_buffer_is_filled_until_it_is_full_enough(model: interp.Model) -> None:
    """Once around the text is 40 rows, less than two batches: the text has not ended for all that."""
    served = buffer(model, text(), positions=slice(-1, None))
    last = gather(model, text(), [Z])[Z][:, -1]
    for _ in range(6):
        batch = served.next_batch()
        assert batch is not None
        assert float(torch.cdist(batch[Z], last).amin(-1).max()) < 0.02
    assert served.widths() == {Z: 48, RESID: 32}


@pytest.mark.parametrize("after", [0, 3, 7])
def test_a_restored_buffer_serves_what_the_first_would_have(model: interp.Model, after: int) -> None:
    first, second = buffer(model, text()), buffer(model, text())
    first.sample(5, 0)
    for _ in range(after):
        first.next_batch()
    second.restore({name: value.clone() for name, value in first.state().items()})
    for _ in range(20):
        expected, found = first.next_batch(), second.next_batch()
        assert expected is not None
        assert found is not None
        assert all(torch.equal(expected[site], found[site]) for site in (Z, RESID))
    assert torch.equal(first.sample(9, 4)[Z], second.sample(9, 4)[Z])


def test_a_buffer_too_small_is_refused(model: interp.Model) -> None:
    with pytest.raises(ValueError, match="the buffer holds 200 tokens; it needs 256 for batches of 32"):
        buffer(model, text(), capacity=200)


# Text


def test_token_ids_come_in_a_new_order_every_epoch_from_any_chunk_on(model: interp.Model) -> None:
    opened = open_text(model, text(), length=9, chunk_tokens=12 * 16, seed=3)
    chunks = list(itertools.islice(opened.chunks_from(0), 8))
    assert [len(chunk.tokens) for chunk in chunks] == [12, 12, 12, 4] * 2
    epochs = [torch.cat([chunk.rows for chunk in part if chunk.rows is not None]) for part in (chunks[:4], chunks[4:])]
    assert all(sorted(rows.tolist()) == list(range(40)) for rows in epochs)
    assert not torch.equal(*epochs)
    for start in (1, 4, 6):
        again = next(opened.chunks_from(start))
        assert torch.equal(again.tokens, chunks[start].tokens)


def test_a_folder_of_text_is_one_stream_read_again_and_again(tiny_llama: interp.Model, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text(" the boy runs" * 20)
    (tmp_path / "a.txt").write_text(" Mary and John went" * 20)
    opened = open_text(tiny_llama, tmp_path, length=10, chunk_tokens=30, seed=0)
    stream = torch.cat([tiny_llama.to_tokens((tmp_path / name).read_text())[0] for name in ("a.txt", "b.txt")])
    n_rows = len(stream) // 10
    rows = torch.cat([chunk.tokens for chunk in itertools.islice(opened.chunks_from(0), n_rows // 3 + 1)])
    assert torch.equal(rows[:n_rows], stream[: n_rows * 10].view(-1, 10))
    assert torch.equal(rows[n_rows], stream[:10])
    assert torch.equal(next(opened.chunks_from(2)).tokens, rows[6:9])


def test_a_large_file_is_read_in_pieces_and_known_by_its_size(
    tiny_llama: interp.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.txt"
    file.write_text(" Mary and John went\n" * 30)
    whole = open_text(tiny_llama, file, length=10, chunk_tokens=30, seed=0, repeat=False)
    rows = [chunk.tokens for chunk in whole.chunks_from(0)]
    longest: list[int] = []
    read = tiny_llama.to_tokens
    monkeypatch.setattr(text_room, "PIECE", 50)
    monkeypatch.setattr(tiny_llama, "to_tokens", lambda one: longest.append(len(one)) or read(one))
    pieces = [chunk.tokens for chunk in whole.chunks_from(0)]
    assert max(longest) <= 80
    assert torch.equal(torch.cat(pieces)[:1], torch.cat(rows)[:1])
    file.write_text(" Mary and John went\n" * 31)
    assert open_text(tiny_llama, file, length=10, chunk_tokens=30, seed=0).name != whole.name


def test_text_that_is_read_once_ends(model: interp.Model) -> None:
    opened = open_text(model, text(), length=9, chunk_tokens=12 * 16, seed=3, repeat=False)
    assert [len(chunk.tokens) for chunk in opened.chunks_from(1)] == [12, 12, 4]
    assert list(opened.chunks_from(4)) == []


def test_an_iterable_is_known_by_what_it_begins_with(model: interp.Model) -> None:
    """So that a generator half consumed is not taken for the one that a training began with."""
    names = [open_text(model, iter(text()[n:].split(4)), length=9, chunk_tokens=64, seed=0).name for n in (0, 0, 4)]
    assert names[0] == names[1] != names[2]


def test_natural_text_is_all_there_is(tiny_llama: interp.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    passages = [f" Mary and John went to the {word}" for word in ("store", "park", "house")]
    monkeypatch.setattr(corpus, "_passages", lambda n_characters, seed: iter(passages))
    opened = open_text(tiny_llama, "natural", length=4, chunk_tokens=8, seed=0)
    rows = torch.cat([chunk.tokens for chunk in itertools.islice(opened.chunks_from(0), 2)])
    assert sorted(rows.tolist()) == sorted(tiny_llama.to_tokens(one)[0, :4].tolist() for one in passages)


@pytest.mark.usefixtures("unchecked")
def test_text_that_is_nothing_is_refused(model: interp.Model, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the text has shape \(0, 4\)"):
        open_text(model, torch.zeros(0, 4, dtype=torch.long), length=4, chunk_tokens=4, seed=0)
    with pytest.raises(ValueError, match="the text holds nothing"):
        open_text(model, iter([]), length=4, chunk_tokens=4, seed=0)
    with pytest.raises(ValueError, match="length=1; a row of text has 2 tokens or more"):
        open_text(model, "natural", length=1, chunk_tokens=4, seed=0)
    with pytest.raises(ValueError, match=r"torch.float32; token ids are \[sequence, pos\]"):
        open_text(model, torch.zeros(2, 4), length=4, chunk_tokens=4, seed=0)
    with pytest.raises(ValueError, match="the text is an iterable of str; give tensors of token ids"):
        open_text(model, ["Mary went to the store"], length=4, chunk_tokens=4, seed=0)


def test_without_datasets_a_name_is_refused_in_one_line(model: interp.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="'books' is neither 'natural' nor a folder of"):
        open_text(model, "books", length=4, chunk_tokens=4, seed=0)
