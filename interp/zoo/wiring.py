"""Setting a transformer's weights by hand: a residual stream of named parts, and norms that leave it as it is.

Real norms divide by a length that depends on everything in the stream, so that every writer would matter a little to
every reader. Here one direction of the embedding, the anchor, is so much longer than all the rest that the length is
the same for every stream up to a share of about 1e-5; the gains of the norm undo it. A reader then sees the stream as
it was written, and the anchor as the constant 1. Where the norm also takes off the mean (LayerNorm), a second anchor
and a direction that nobody reads keep the mean at zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

ANCHOR = 256.0
"""Length of the anchor; what is written to the stream is of length 1."""


class Stream:
    """Named parts of a residual stream; `stream["token"]` is their slice.

    "one" (the anchor, which readers see as 1) comes first; "unread" is what the named parts leave of d_model.

    Args:
        d_model: width of the stream.
        centred: whether the norm takes off the mean.
        sizes: dimensions of each part.
    """

    def __init__(self, d_model: int, *, centred: bool, sizes: Mapping[str, int]) -> None:
        self.d_model, self.centred = d_model, centred
        reserved = {"one": 1} | ({"minus": 1, "balance": 1} if centred else {})
        rest = d_model - sum(reserved.values()) - sum(sizes.values())
        if rest < 0:
            raise ValueError(f"d_model={d_model} is {-rest} dimensions too few for these parts: {dict(sizes)}")
        self.parts: dict[str, slice] = {}
        begin = 0
        for name, size in {**reserved, **sizes, "unread": rest}.items():
            self.parts[name] = slice(begin, begin + size)
            begin += size

    def __getitem__(self, part: str) -> slice:
        return self.parts[part]

    def size(self, part: str) -> int:
        """Dimensions of a part."""
        return self.parts[part].stop - self.parts[part].start

    def balance(self, written: Float[Tensor, "row d_model"]) -> None:
        """Make the mean of what each row writes zero, if the norm takes off the mean."""
        if self.centred:
            written[:, self["balance"]] = 0
            written[:, self["balance"]] = -written.sum(dim=1, keepdim=True)

    @property
    def gains(self) -> Float[Tensor, " d_model"]:
        """Gains with which the norm is the identity, save on the anchor, which becomes 1."""
        length = ANCHOR * ((2 if self.centred else 1) / self.d_model) ** 0.5
        gains = torch.full((self.d_model,), length)
        gains[self["one"]] = length / ANCHOR
        if self.centred:
            gains[self["minus"]] = gains[self["balance"]] = 0.0
        return gains


@dataclass(frozen=True)
class Block:
    """Views of a block's weights, by head, in one orientation for every architecture; writing to them sets the model's.

    A head's scores are q·k: the model's own factor 1/√d_head is taken out of `q` by `scale_queries`.
    """

    q: Float[Tensor, "head d_model d_head"]
    k: Float[Tensor, "kv_head d_model d_head"]
    v: Float[Tensor, "kv_head d_model d_head"]
    o: Float[Tensor, "head d_head d_model"]
    mlp_in: Float[Tensor, "d_model d_mlp"]
    """What opens the neurons: the gate of a gated MLP."""
    mlp_up: Float[Tensor, "d_model d_mlp"] | None
    """The other input of a gated MLP."""
    mlp_out: Float[Tensor, "d_mlp d_model"]

    @property
    def written(self) -> list[Float[Tensor, "row d_model"]]:
        """Everything that writes to the stream, one row a direction of its input."""
        return [*self.o, self.mlp_out]


def gpt2_blocks(hf: Any) -> list[Block]:
    """The blocks of a GPT-2."""
    d_head = hf.config.n_embd // hf.config.n_head

    def block(module: Any) -> Block:
        q, k, v = (
            part.unflatten(1, (-1, d_head)).transpose(0, 1) for part in module.attn.c_attn.weight.chunk(3, dim=1)
        )
        out = module.attn.c_proj.weight.unflatten(0, (-1, d_head))
        return Block(q, k, v, out, module.mlp.c_fc.weight, None, module.mlp.c_proj.weight)

    return [block(module) for module in hf.transformer.h]


def llama_blocks(stack: Any) -> list[Block]:
    """The blocks of a Llama, from the module that owns them."""
    d_head = stack.config.head_dim

    def block(module: Any) -> Block:
        attention, mlp = module.self_attn, module.mlp
        q, k, v = (
            projection.weight.unflatten(0, (-1, d_head)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        out = attention.o_proj.weight.T.unflatten(0, (-1, d_head))
        return Block(q, k, v, out, mlp.gate_proj.weight.T, mlp.up_proj.weight.T, mlp.down_proj.weight.T)

    return [block(module) for module in stack.layers]


def blank(hf: Any, stream: Stream) -> None:
    """All weights zero, except that norms are the identity on the stream."""
    for name, parameter in hf.named_parameters():
        is_gain = name.endswith("weight") and ("ln_" in name or "norm" in name)
        parameter.copy_(stream.gains if is_gain else torch.zeros_like(parameter))


def embed_words(
    tokens: Float[Tensor, "token d_model"], stream: Stream, positions: Float[Tensor, "position d_model"] | None = None
) -> None:
    """Each token is a direction of the part "token", and the anchor; each learned position one of "position"."""
    tokens[:, stream["token"]] = torch.eye(len(tokens))
    stream.balance(tokens)
    tokens[:, stream["one"]] = ANCHOR
    if stream.centred:
        tokens[:, stream["minus"]] = -ANCHOR
    if positions is not None:
        positions[:, stream["position"]] = torch.eye(len(positions))
        stream.balance(positions)


def distract(
    block: Block, stream: Stream, generator: torch.Generator, *, heads: list[int], kv_heads: list[int]
) -> None:
    """Give heads random weights: they read the whole stream and write where nobody but their like reads.

    Query and output of `heads`, key and value of `kv_heads`: in a group that shares a key/value head, a query head
    next to a wired one reads what that one wired.
    """
    unread = stream["unread"]

    def normal(view: Tensor, scale: float) -> None:
        view.copy_(torch.randn(view.shape, generator=generator) * scale)

    for head in heads:
        normal(block.q[head], 0.3)
        normal(block.o[head][:, unread], _unread_scale(stream))
    for head in kv_heads:
        normal(block.k[head], 0.3)
        normal(block.v[head], 0.3)


def distract_mlp(block: Block, stream: Stream, generator: torch.Generator) -> None:
    """Give an MLP random weights: it reads the whole stream and writes where nobody but distractors read."""
    for view in (block.mlp_in, block.mlp_up):
        if view is not None:
            view.copy_(torch.randn(view.shape, generator=generator) * 0.3)
    written = block.mlp_out[:, stream["unread"]]
    written.copy_(torch.randn(written.shape, generator=generator) * _unread_scale(stream))


def _unread_scale(stream: Stream) -> float:
    """What distractors write is shorter than what the circuit does, however many directions are unread."""
    return float(0.3 / stream.size("unread") ** 0.5)


def finish(blocks: list[Block], stream: Stream) -> None:
    """Take the attention's own scale out of the queries, and balance what is written."""
    for block in blocks:
        block.q.mul_(block.q.shape[-1] ** 0.5)
        for written in block.written:
            stream.balance(written)
