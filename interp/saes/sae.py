"""What every sparse autoencoder is: an encoder to non-negative features, a linear decoder, and a loss.

    features = encode(x)                              # [*batch, d_sae], >= 0
    output   = features @ W_dec + b_dec (+ x @ W_skip)

A transcoder is the same thing with another target than its input. An architecture is a subclass that says how features
come from pre-activations and what it is trained on; `interp.saes.architectures` makes and initialises them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, TypedDict

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from interp.model.sites import SITE_DIMS, Site
from interp.saes.losses import Loss


class Shared(TypedDict, total=False):
    """Keyword arguments that every architecture takes; see `SAE`."""

    d_out: int | None
    skip: bool
    apply_b_dec_to_input: bool
    site: str | None
    target_site: str | None
    metadata: dict[str, Any] | None


class SAE(nn.Module, ABC):
    """A sparse autoencoder, or a transcoder, in float32. Its parameters are zero until initialised or loaded.

    Args:
        d_in: width of the input.
        d_sae: number of features.
        d_out: width of the target; the input's by default.
        skip: add a linear map of the input to the output (a skip transcoder).
        apply_b_dec_to_input: encode `x - b_dec` instead of x. Not for transcoders.
        site: where the input is read; `hook_z` and other sites with heads are read with the heads concatenated.
        target_site: what is predicted; None: the input.
        metadata: JSON-able facts about its making.

    Raises:
        ValueError: if a width is not positive, or b_dec cannot be subtracted from the input.
    """

    architecture: ClassVar[str]
    feature_vectors: ClassVar[tuple[str, ...]] = ("b_enc",)
    """The encoder's parameters of shape [d_sae]."""

    W_enc: Float[nn.Parameter, "d_in d_sae"]
    b_enc: Float[nn.Parameter, " d_sae"]
    W_dec: Float[nn.Parameter, "d_sae d_out"]
    b_dec: Float[nn.Parameter, " d_out"]
    W_skip: Float[nn.Parameter, "d_in d_out"] | None

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        d_out: int | None = None,
        skip: bool = False,
        apply_b_dec_to_input: bool = True,
        site: str | None = None,
        target_site: str | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        d_out = d_in if d_out is None else d_out
        if min(d_in, d_sae, d_out) < 1:
            raise ValueError(f"d_in={d_in}, d_sae={d_sae} and d_out={d_out} must be 1 or more")
        if apply_b_dec_to_input and (d_out != d_in or target_site is not None):
            raise ValueError("a transcoder has no b_dec to subtract from its input; give apply_b_dec_to_input=False")
        self.apply_b_dec_to_input = apply_b_dec_to_input
        self.site = site
        self.target_site = target_site
        self.metadata = dict(metadata or {})
        self.W_enc = nn.Parameter(torch.zeros(d_in, d_sae))
        for name in self.feature_vectors:
            self.register_parameter(name, nn.Parameter(torch.zeros(d_sae)))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_out))
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        self.W_skip = nn.Parameter(torch.zeros(d_in, d_out)) if skip else None

    @property
    def d_in(self) -> int:
        """Width of the input."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.W_enc.shape[1]

    @property
    def d_out(self) -> int:
        """Width of the output."""
        return self.W_dec.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.W_enc.dtype

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.W_enc.device

    def settings(self) -> dict[str, Any]:
        """JSON-able keyword arguments that build it again, without weights, `site`, `target_site` and `metadata`."""
        return {
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "d_out": self.d_out,
            "skip": self.W_skip is not None,
            "apply_b_dec_to_input": self.apply_b_dec_to_input,
        }

    def extra_repr(self) -> str:
        """What `repr` shows: sites and settings."""
        shown = {"site": self.site, "target_site": self.target_site, **self.settings()}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items() if value not in (None, False))

    def encoder_input(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """What W_enc multiplies: x, or x - b_dec.

        Raises:
            ValueError: if x has another width, dtype or device than the encoder.
        """
        self.check_input(x)
        return x - self.b_dec if self.apply_b_dec_to_input else x

    def check_input(self, x: Float[Tensor, "*batch d_in"]) -> None:
        """Raises ValueError if x has another width, dtype or device than the encoder."""
        if x.shape[-1] != self.d_in:
            raise ValueError(f"the input is {x.shape[-1]} wide and the encoder {self.d_in} (site {self.site!r})")
        if x.device != self.device or (x.dtype != self.dtype and not torch.is_autocast_enabled(x.device.type)):
            mine = f"{self.dtype} on {self.device}"
            raise ValueError(f"the input is {x.dtype} on {x.device} and the SAE {mine}; move one with .to(...)")

    def pre_activations(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """What the activation function is applied to (of a gated SAE: of its gate)."""
        return self.encoder_input(x) @ self.W_enc + self.b_enc

    @abstractmethod
    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Feature activations, 0 or more; each token's depend on that token alone."""

    def decode(
        self, features: Float[Tensor, "*batch d_sae"], x: Float[Tensor, "*batch d_in"] | None = None
    ) -> Float[Tensor, "*batch d_out"]:
        """The output of these features.

        Raises:
            ValueError: if there is a skip connection and its input x is not given.
        """
        return self.add_skip(features @ self.W_dec + self.b_dec, x)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """The reconstruction of x, or of its target."""
        return self.decode(self.encode(x), x)

    @abstractmethod
    def loss(
        self,
        x: Float[Tensor, "*batch d_in"],
        target: Float[Tensor, "*batch d_out"] | None = None,
        *,
        dead: Bool[Tensor, " d_sae"] | None = None,
    ) -> Loss:
        """What training minimises on these tokens.

        Args:
            x: the input; all axes but the last are tokens.
            target: what to predict; x itself by default, except in a transcoder.
            dead: features to bring back to life, where the architecture can.
        """

    def add_skip(
        self, output: Float[Tensor, "*batch d_out"], x: Float[Tensor, "*batch d_in"] | None
    ) -> Float[Tensor, "*batch d_out"]:
        """The output with the skip connection's part, if there is one."""
        if self.W_skip is None:
            return output
        if x is None:
            raise ValueError("this SAE has a skip connection; give decode the input too: decode(features, x)")
        return output + x @ self.W_skip

    def tokens(
        self, x: Float[Tensor, "*batch d_in"], target: Float[Tensor, "*batch d_out"] | None
    ) -> tuple[Float[Tensor, "token d_in"], Float[Tensor, "token d_out"]]:
        """Input and target of `loss` with one axis of tokens.

        Raises:
            ValueError: if there is no token, or the target is missing or not one vector of d_out a token.
        """
        if target is None:
            if self.target_site is not None or self.d_out != self.d_in:
                raise ValueError(f"a transcoder needs a target ({self.target_site}); give loss(x, target)")
            target = x
        if target.shape != (*x.shape[:-1], self.d_out):
            raise ValueError(f"the target is {list(target.shape)}; it must be {[*x.shape[:-1], self.d_out]}")
        if not target.numel():
            raise ValueError(f"the input is {list(x.shape)}: there is no token to take the mean loss of")
        return x.reshape(-1, x.shape[-1]), target.reshape(-1, self.d_out)


def to_rows(site: str, activation: Tensor) -> Float[Tensor, "batch pos d_in"]:
    """A model's activation as an SAE reads it: heads concatenated where the site has heads.

    Raises:
        ValueError: if the site is a pattern or scores, which are not one vector a token.
    """
    dims = SITE_DIMS[Site.parse(site).kind]
    if dims[1] != "position":
        raise ValueError(f"{site} has axes {', '.join(dims)}: it is not one vector a token, so an SAE cannot read it")
    return activation.flatten(-2) if "head" in dims else activation


def from_rows(site: str, rows: Float[Tensor, "batch pos d_in"], like: Tensor) -> Tensor:
    """The inverse of `to_rows`: rows in the shape of the model's own activation.

    Raises:
        ValueError: if the shapes do not fit.
    """
    if to_rows(site, like).shape != rows.shape:
        raise ValueError(f"{site} is {list(like.shape)}, which {list(rows.shape)} does not fit")
    return rows.reshape(like.shape)
