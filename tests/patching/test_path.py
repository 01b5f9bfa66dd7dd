"""Path patching against runs with split inputs, written by hand with the modules of each family."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

import interp
from interp import Edit
from interp.model.sites import SiteUnavailable
from interp.patching import edge_effects, path_patching
from tests.model.families import FAMILIES
from tests.patching.tokens_task import task_of_tokens

N, LENGTH = 2, 6


class ByHand:
    """One family's modules, named by hand."""

    def __init__(self, name):
        self.hf = FAMILIES[name].make_model("eager", torch.float64)
        self.model = interp.Model(self.hf)
        tokens = torch.randint(3, 55, (2 * N, LENGTH), generator=torch.Generator().manual_seed(1))
        self.task = task_of_tokens(tokens[:N], tokens[N:])
        layouts = {
            "llama": ("model.layers", "input_layernorm", "self_attn", "o_proj", "post_attention_layernorm"),
            "gpt2": ("transformer.h", "ln_1", "attn", "c_proj", "ln_2"),
            "gpt_neox": ("gpt_neox.layers", "input_layernorm", "attention", "dense", "post_attention_layernorm"),
            "gemma3_text": ("model.layers", "input_layernorm", "self_attn", "o_proj", "pre_feedforward_layernorm"),
        }
        blocks, self.ln1, attn, o, self.ln2 = layouts[name]
        self.name, self.blocks = name, self.hf.get_submodule(blocks)
        self.attn, self.o = attn, o
        self.parallel = name == "gpt_neox"

    def written_by_head(self, layer, head, z, base_z):
        """What the attention layer adds to the stream when one head's z is another."""
        mixed = base_z.clone()
        mixed[:, :, head] = z[:, :, head]
        out = getattr(getattr(self.blocks[layer], self.attn), self.o)(mixed.flatten(2))
        return self.blocks[layer].post_attention_layernorm(out) if self.name == "gemma3_text" else out

    def projected(self, layer, part, stream):
        """q, k or v by head from a residual stream."""
        block = self.blocks[layer]
        normed, attn = getattr(block, self.ln1)(stream), getattr(block, self.attn)
        d_head, n_heads = self.model.d_head, self.model.n_heads
        if self.name == "gpt2":
            columns = attn.c_attn(normed).chunk(3, dim=-1)["qkv".index(part)]
            return columns.unflatten(-1, (n_heads, d_head))
        if self.name == "gpt_neox":
            fused = attn.query_key_value(normed).unflatten(-1, (n_heads, 3, d_head))
            return fused[..., "qkv".index(part), :]
        return getattr(attn, f"{part}_proj")(normed).unflatten(-1, (-1, d_head))

    def mlp(self, layer, stream):
        block = self.blocks[layer]
        out = block.mlp(getattr(block, self.ln2)(stream))
        return block.post_feedforward_layernorm(out) if self.name == "gemma3_text" else out

    def metric(self, logits):
        return logits[:, -1, 5] - logits[:, -1, 9]


@pytest.fixture(params=["llama", "gpt2", "gpt_neox", "gemma3_text"])
def by_hand(request):
    return ByHand(request.param)


def through_mlps(by_hand, base, layer, added, until, *, mid):
    """What reaches a later stream when only the MLPs in between answer to a change."""
    model = by_hand.model
    stream = base["resid_pre", layer] + added if by_hand.parallel else base["resid_mid", layer] + added
    for here in range(layer, until + 1):
        if here > layer:
            if here == until and not mid:
                return stream
            stream = stream + (0 if by_hand.parallel else base["attn_out", here])
        if here == until and mid:
            return stream
        source = base["resid_pre", here] if by_hand.parallel and here == layer else stream
        attn = base["attn_out", here] if by_hand.parallel else 0
        stream = stream + attn + by_hand.mlp(here, source)
    assert model is not None
    return stream


def run_with(by_hand, tokens, site, heads, value):
    with by_hand.model.edited(Edit(site, value=value, heads=heads)):
        return by_hand.metric(by_hand.model(tokens))


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_a_head_to_head_edge_equals_a_run_with_split_inputs(by_hand, part, direction):
    model, task = by_hand.model, by_hand.task
    base_tokens, other_tokens = task.corrupted, task.clean
    if direction == "noise":
        base_tokens, other_tokens = other_tokens, base_tokens
    logits, base = model.run_with_cache(base_tokens)
    _, other = model.run_with_cache(other_tokens)
    added = by_hand.written_by_head(0, 1, other["z", 0], base["z", 0]) - base["attn_out", 0]
    value = by_hand.projected(2, part, base["resid_pre", 2] + added)
    change = run_with(by_hand, base_tokens, f"blocks.2.attn.hook_{part}", [1], value) - by_hand.metric(logits)
    expected = change if direction == "denoise" else -change
    found = path_patching(model, task, readers=f"L2H1.{part}", direction=direction, normalised=False, per_prompt=True)
    assert found.dims == ("prompt", "layer", "head")
    torch.testing.assert_close(torch.tensor(found.values[:, 0, 1]), expected, atol=1e-5, rtol=1e-5)
    assert expected.abs().max() > 1e-4
    assert found.sel(layer=2).isnull().all()


def test_mlp_and_logits_readers_and_sets_of_edges(by_hand):
    model, task = by_hand.model, by_hand.task
    logits, base = model.run_with_cache(task.corrupted)
    _, other = model.run_with_cache(task.clean)
    head = by_hand.written_by_head(0, 1, other["z", 0], base["z", 0]) - base["attn_out", 0]
    mlp = other["mlp_out", 0] - base["mlp_out", 0]
    stream = base["resid_pre", 1] if by_hand.parallel else base["resid_mid", 1]
    value = by_hand.mlp(1, stream + head + mlp)
    key = by_hand.projected(2, "k", base["resid_pre", 2] + mlp)
    with ExitStack() as stack:
        stack.enter_context(model.edited(Edit("blocks.1.hook_mlp_out", value=value)))
        stack.enter_context(model.edited(Edit("blocks.2.attn.hook_k", heads=[0], value=key)))
        expected = by_hand.metric(model(task.corrupted)) - by_hand.metric(logits)
    final = run_with(by_hand, task.corrupted, "blocks.2.hook_resid_post", None, base["resid_post", 2] + head)
    found = edge_effects(
        model,
        task,
        [[("L0H1", "mlp1"), ("mlp0", "mlp1"), ("mlp0", "L2H0.k")], [("L0H1", "logits")]],
        normalised=False,
        per_prompt=True,
    )
    torch.testing.assert_close(torch.tensor(found.values[:, 0]), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.tensor(found.values[:, 1]), final - by_hand.metric(logits), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reader", ["L2H1.q", "mlp2"])
def test_with_mlps_recomputed_the_change_runs_through_them_and_no_attention(by_hand, reader):
    model, task = by_hand.model, by_hand.task
    logits, base = model.run_with_cache(task.corrupted)
    _, other = model.run_with_cache(task.clean)
    added = by_hand.written_by_head(0, 1, other["z", 0], base["z", 0]) - base["attn_out", 0]
    is_mlp = reader == "mlp2"
    stream = through_mlps(by_hand, base, 0, added, 2, mid=is_mlp and not by_hand.parallel)
    if is_mlp:
        patched = run_with(by_hand, task.corrupted, "blocks.2.hook_mlp_out", None, by_hand.mlp(2, stream))
    else:
        value = by_hand.projected(2, "q", stream)
        patched = run_with(by_hand, task.corrupted, "blocks.2.attn.hook_q", [1], value)
    found = path_patching(model, task, readers=reader, mlps="recomputed", normalised=False, per_prompt=True)
    torch.testing.assert_close(
        torch.tensor(found.values[:, 0, 1]), patched - by_hand.metric(logits), atol=1e-5, rtol=1e-5
    )


def test_all_edges_to_the_logits_restore_the_behaviour(by_hand):
    """What all writers of the clean run add up to is the clean run's final stream."""
    task, model = by_hand.task, by_hand.model
    everything = [("embed", "logits")]
    everything += [(f"{kind}{layer}", "logits") for layer in range(model.n_layers) for kind in ("attn", "mlp")]
    found = edge_effects(model, task, [everything], per_prompt=False)
    assert abs(float(found[0]) - 1) < 1e-5


def test_positions_add_up_where_the_reader_is_linear(by_hand):
    """Values are linear in the normed stream; to the logits through frozen everything, one position matters."""
    effects = path_patching(by_hand.model, by_hand.task, readers="logits", by=("layer", "position", "head"))
    whole = path_patching(by_hand.model, by_hand.task, readers="logits", by=("layer", "head"))
    assert abs(effects.isel(position=slice(0, -1))).max() < 1e-12
    torch.testing.assert_close(
        torch.tensor(effects.isel(position=-1).values), torch.tensor(whole.values), atol=1e-9, rtol=1e-6
    )


def test_bad_readers_and_writers_are_refused():
    by_hand = ByHand("llama")
    model, task = by_hand.model, by_hand.task
    with pytest.raises(ValueError, match=r"'L9H1' is not a reader"):
        path_patching(model, task, readers="L9H1")
    with pytest.raises(ValueError, match=r"layer 9 is out of range; layers run 0..2"):
        path_patching(model, task, readers="L9H1.q")
    with pytest.raises(ValueError, match=r"head 3 is out of range; k heads run 0..1"):
        path_patching(model, task, readers="L1H3.k")
    with pytest.raises(ValueError, match=r"'q' writes nothing"):
        path_patching(model, task, readers="L2H1.q", site="q")
    with pytest.raises(ValueError, match=r"there is no edge L2H0→L1H1.q"):
        edge_effects(model, task, [[("L2H0", "L1H1.q")]])
    bert = interp.Model(FAMILIES["bert"].make_model("eager"))
    with pytest.raises(SiteUnavailable, match="norms the stream after every addition"):
        path_patching(bert, task, readers="logits")
