"""VAR: attention on sink tokens handed to the image, in the heads that look at the image.

In every chosen layer, for the tokens after the image and those generated:

1. sink tokens are those with φ ≥ τ in the stream that enters the layer, image tokens or not (`interp.sinks.phi`);
2. a head is image-centric for a query if it puts at least `min_image_mass` on the image, and at least ρ of that on
   image tokens that are no sinks;
3. there, `recycle_fraction` of the attention on all sinks goes to the image tokens that are no sinks, in proportion to
   what they have (`move_mass`).

The sinks of a prompt are kept while tokens are decoded after it, and found anew for the next one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.model import Model, Site
from interp.model.hooks import Run, Tap, tapped
from interp.sinks.dimensions import Dimensions, dimension_indices, phi
from interp.sinks.mask import default_threshold
from interp.sinks.move import move_mass
from interp.sinks.prefill import PromptKeys, columns, first_key

RECYCLE_FRACTION = 0.6
RHO = 0.5
MIN_IMAGE_MASS = 0.2


@contextmanager
def redistributed(
    model: Model,
    image_positions: Bool[Tensor, "prompt pos"],
    sink_dims: Dimensions,
    *,
    recycle_fraction: float = RECYCLE_FRACTION,
    tau_rel: float | None = None,
    rho: float = RHO,
    min_image_mass: float = MIN_IMAGE_MASS,
    layers: Sequence[int] | None = None,
) -> Iterator[None]:
    """Visual attention redistribution on every run inside the context, in this thread; also on `generate`.

    Decoding with a KV cache gives what whole passes without one give. Prompts of a batch do not touch each other.
    Computes the pattern of the chosen layers in plain PyTorch; what changes nothing is left to the model's own
    attention, bit for bit. A cache that drops keys from the middle is not served.

    Args:
        model: the model.
        image_positions: which tokens of the prompts are image patches, as many columns as the prompts' input has
            (padding included, never marked). Any segment will do for a language model. Only tokens of the prompts can
            be sinks. Beam search repeats the rows.
        sink_dims: the model's sink dimensions (`interp.sinks.sink_dimensions`).
        recycle_fraction: share of the sinks' attention that is given away. The paper keeps 1 − 0.6 of it; its released
            code keeps 0.6.
        tau_rel: φ / √d_model from which a token is a sink; by default what `interp.sinks.mask` takes: the paper's
            τ = 20 (0.3125 at width 4096), at most 0.9.
        rho: least share of a head's attention on the image that falls on non-sinks. (The released code bounds
            the share of the sinks instead.)
        min_image_mass: least attention of a head on the image.
        layers: where to act; None: all but 0, 1 and the last.

    Raises:
        ValueError: before any run, for a number out of range, no image or no sink dimension; in a run, if the prompts
            do not fit `image_positions`.
        SiteUnavailable: if the attention of this family cannot be edited.

    Source: Kang et al. 2025 (arXiv 2503.03321). Checked against loops over heads and queries in
    tests/sinks/test_redistribution.py.
    """
    for name, share in (("recycle_fraction", recycle_fraction), ("rho", rho), ("min_image_mass", min_image_mass)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} is {share:g}; it is a share between 0 and 1")
    if not bool(image_positions.any()):
        raise ValueError("image_positions marks no token: there is nothing to give attention to")
    dims = dimension_indices(sink_dims, model.d_model)
    if not len(dims):
        raise ValueError("sink_dims is empty; without sink dimensions there are no sinks to take attention from")
    rule = _Rule(
        image=image_positions,
        dims=dims,
        tau=(default_threshold("phi_rel", model.d_model) if tau_rel is None else tau_rel) * model.d_model**0.5,
        rho=rho,
        min_image_mass=min_image_mass,
        recycle_fraction=recycle_fraction,
    )
    taps = []
    for layer in _layers(model, layers):
        at_layer = _AtLayer(rule)
        taps += [Tap(Site("resid_pre", layer), at_layer.find_sinks), Tap(Site("pattern", layer), at_layer.edit)]
    with tapped(model.anatomy, taps):
        yield


def redistribute(
    pattern: Float[Tensor, "batch head query key"],
    image: Bool[Tensor, "batch key"],
    sinks: Bool[Tensor, "batch key"],
    queries: Bool[Tensor, "batch query"],
    *,
    recycle_fraction: float = RECYCLE_FRACTION,
    rho: float = RHO,
    min_image_mass: float = MIN_IMAGE_MASS,
) -> Float[Tensor, "batch head query key"]:
    """The pattern with attention moved from sinks to the rest of the image, where `image_centric` says so.

    Args:
        pattern: attention after softmax.
        image: keys that are image patches.
        sinks: keys that are sinks, image patches or not.
        queries: rows that may be edited.
        recycle_fraction: as for `redistributed`.
        rho: as for `redistributed`.
        min_image_mass: as for `redistributed`.
    """
    chosen = image_centric(pattern, image, sinks, rho=rho, min_image_mass=min_image_mass) & queries[:, None]
    return move_mass(pattern, sinks[:, None], (image & ~sinks)[:, None], recycle_fraction * chosen.float())


def image_centric(
    pattern: Float[Tensor, "batch head query key"],
    image: Bool[Tensor, "batch key"],
    sinks: Bool[Tensor, "batch key"],
    *,
    rho: float = RHO,
    min_image_mass: float = MIN_IMAGE_MASS,
) -> Bool[Tensor, "batch head query"]:
    """Where a head looks at the image: mass on it ≥ `min_image_mass`, at least `rho` of it on image tokens, not sinks.

    Without any mass on the image a head is not image-centric, whatever the bounds.
    """
    wide = pattern.to(torch.promote_types(pattern.dtype, torch.float32))
    on_image = (wide * image[:, None, None]).sum(-1)
    on_rest = (wide * (image & ~sinks)[:, None, None]).sum(-1)
    return (on_image > 0) & (on_image >= min_image_mass) & (on_rest >= rho * on_image)


@dataclass(frozen=True)
class _Rule:
    """What `redistributed` was told."""

    image: Bool[Tensor, "prompt pos"]
    dims: Tensor
    tau: float
    rho: float
    min_image_mass: float
    recycle_fraction: float

    def image_of(self, batch: int, run: Run) -> Bool[Tensor, "batch pos"]:
        """The image positions of each row of a batch.

        Raises:
            ValueError: if these are other prompts.
        """
        n_prompts = len(self.image)
        if batch == n_prompts:
            return self.image
        if run.decoding and batch % n_prompts == 0:
            return self.image.repeat_interleave(batch // n_prompts, dim=0)
        raise ValueError(f"image_positions has {n_prompts} prompts, and this run {batch}")


@dataclass
class _AtLayer:
    """The taps of one layer, and the sinks that they found."""

    rule: _Rule
    sinks: PromptKeys = field(default_factory=PromptKeys)

    def find_sinks(self, resid: Tensor, run: Run) -> None:
        if run.n_past:
            return
        image = self.rule.image_of(len(resid), run).to(resid.device)
        length = image.shape[1]
        if resid.shape[1] < length:
            raise ValueError(f"image_positions has {length} columns, and the prompt {resid.shape[1]} tokens")
        is_sink = phi(resid[:, :length], self.rule.dims) >= self.rule.tau
        if run.n_padding is not None:
            is_token = torch.arange(length, device=resid.device) >= run.n_padding[:, None].to(resid.device)
            if bool((image & ~is_token).any()):
                raise ValueError("image_positions marks padding; its columns are those of the padded input")
            is_sink &= is_token
        self.sinks.find(is_sink[:, None])

    def edit(self, pattern: Tensor, run: Run) -> Tensor | None:
        image = self.rule.image_of(len(pattern), run).to(pattern.device)
        is_text_after = (image.cumsum(-1) > 0) & ~image
        new = redistribute(
            pattern,
            columns(image, first_key(run, pattern), pattern.shape[3]),
            self.sinks.on_keys(run, pattern)[:, 0],
            columns(is_text_after, run.n_past, pattern.shape[2], beyond=image.any(-1)),
            recycle_fraction=self.rule.recycle_fraction,
            rho=self.rule.rho,
            min_image_mass=self.rule.min_image_mass,
        )
        return None if torch.equal(new, pattern) else new


def _layers(model: Model, layers: Sequence[int] | None) -> list[int]:
    """The layers to act in, checked.

    Raises:
        ValueError: if one does not exist, or none is left.
    """
    chosen = list(range(2, model.n_layers - 1) if layers is None else layers)
    for layer in chosen:
        if not 0 <= layer < model.n_layers:
            raise ValueError(f"layer {layer} is out of range; layers run 0..{model.n_layers - 1}")
    if not chosen:
        raise ValueError(
            f"all layers but 0, 1 and the last are none in a model of {model.n_layers} layers: name them by `layers`"
            if layers is None
            else "layers is empty: name the layers to act in"
        )
    return sorted(set(chosen))
