"""Rotary position embeddings applied late: keys go into the cache unrotated and are rotated when they are attended to.

For every family whose attention is handed `position_embeddings` (cos, sin) by the stack of blocks, and for any way of
scaling or mixing them, because the family's own modules do the work:

1. the stack's rotary module is asked for cos and sin of all columns of the cache, not of the new tokens only;
2. each attention module is handed the identity (cos 1, sin 0) instead, so that the cache gets k as it is before rotary,
after QK-norm;
3. q and k are rotated with the family's function where the attention function receives them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.model.anatomy import FAMILIES, UnsupportedModel
from interp.model.attention import AttentionTap, attention_taps
from interp.model.tower import Tower, modeling_module

PositionsOfKeys = Callable[[Tensor], Tensor | None]
"""From the positions of the new tokens, as the model counts them, to those of all keys; None: leave this pass alone."""


def check_rotary(tower: Tower) -> None:
    """See that a model rotates q and k in the way that is known here.

    Raises:
        UnsupportedModel: if it does not.
    """
    family = getattr(tower.config, "model_type", "?")
    rotates = isinstance(getattr(tower.stack, "rotary_emb", None), nn.Module)
    if not rotates or modeling_module(tower.blocks[0].attn, "apply_rotary_pos_emb") is None:
        raise UnsupportedModel(
            f"{family} has no rotary position embeddings of its stack of blocks: positions cannot be counted in a cache"
        )
    if not tower.uses_attention_interface or family not in FAMILIES:
        raise UnsupportedModel(f"it is not known how {family} rotates q and k inside its attention")


@contextmanager
def rotated_late(tower: Tower, positions_of_keys: PositionsOfKeys) -> Iterator[None]:
    """Rotate q and all keys inside attention by the positions that are given, in this thread.

    Queries are the last of the keys. Sites `rot_q` and `rot_k` that are read or edited inside this context are the
    rotated ones.
    """
    late = _Late(tower, positions_of_keys)
    modules = [block.attn for block in tower.blocks]
    rotary = tower.stack.get_submodule("rotary_emb")
    with ExitStack() as stack:
        hooks = [(rotary, late.before_rotary)] + [(attn, late.before_attention) for attn in modules]
        for module, fn in hooks:
            stack.callback(module.register_forward_pre_hook(fn, with_kwargs=True).remove)
        taps = [
            (attn, AttentionTap(kind, partial(late.rotate, attn))) for attn in modules for kind in ("rot_q", "rot_k")
        ]
        stack.enter_context(attention_taps(taps))
        yield


class _Late:
    """Cos and sin on their way from the rotary module to q and k."""

    def __init__(self, tower: Tower, positions_of_keys: PositionsOfKeys) -> None:
        self._positions_of_keys = positions_of_keys
        self._owner = threading.get_ident()
        self._late = False
        self._rotation: tuple[Tensor, Tensor] | None = None
        self._n_new = 0

    def before_rotary(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Ask for the positions of all keys."""
        if threading.get_ident() != self._owner:
            return None
        new = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        positions = self._positions_of_keys(new)
        self._late, self._n_new = positions is not None, new.shape[-1]
        if positions is None:
            return None
        if "position_ids" in kwargs:
            return args, kwargs | {"position_ids": positions}
        return (args[0], positions, *args[2:]), kwargs

    def before_attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Keep cos and sin back, and hand on the identity."""
        if threading.get_ident() != self._owner or not self._late:
            return None
        cos, sin = kwargs["position_embeddings"]
        # SmolLM3 has layers without rotary; they are handed cos and sin all the same.
        self._rotation = (cos, sin) if getattr(module, "use_rope", True) else None
        identity = torch.ones_like(cos[:, -self._n_new :]), torch.zeros_like(sin[:, -self._n_new :])
        return args, kwargs | {"position_embeddings": identity}

    def rotate(
        self, attn: nn.Module, states: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"] | None:
        """Queries or all keys, rotated; None in a pass or layer that is left alone."""
        if not self._late or self._rotation is None:
            return None
        n_positions = states.shape[1]
        cos, sin = (one[:, -n_positions:] for one in self._rotation)
        # Phi and StableLM cut the rotated part of a head off before the function, other families inside it.
        n_rotated = getattr(attn, "rotary_ndims", None) or states.shape[-1]
        apply = modeling_module(attn, "apply_rotary_pos_emb")
        assert apply is not None
        # The function rotates q and k together; the second has no heads here.
        rotated, _ = apply(states[..., :n_rotated], states[:, :, :0, :n_rotated], cos, sin, unsqueeze_dim=2)
        return torch.cat([rotated, states[..., n_rotated:]], dim=-1)
