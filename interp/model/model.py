"""`Model`: a hooked view of a live transformers model. It owns no weights and leaves the model as it found it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.model import tokens as tokenisation
from interp.model.cache import Cache
from interp.model.capture import Positions, capture_taps
from interp.model.edit import Edit
from interp.model.finite import check_finite
from interp.model.forward import forward
from interp.model.gradient_run import forward_on_path, gradients_at
from interp.model.head_path import head_cut, last_block_replaced
from interp.model.hook_point import Hook, hook_tap
from interp.model.hooks import Tap, left_padding, tapped
from interp.model.images import ImageBook
from interp.model.inputs import Prompts, pad_id, prepare_inputs
from interp.model.points import available_sites, explain_absence
from interp.model.processor import encode_with_pictures
from interp.model.sites import HEAD_KINDS, Site, SitePattern, select_sites
from interp.model.tower import Tower, resolve
from interp.model.weights import Weights


class Model:
    """A hooked view of a Hugging Face transformer.

    Outside a call the wrapped module is exactly as it was: no hook left, the same attention implementation, the same
    training and `requires_grad` flags, also after an exception. Every call here runs without gradients, except
    `run_with_gradients`.

    Args:
        hf: a live transformers model; used as it is, never copied.
        tokenizer: its tokenizer, for methods that take text.
        processor: the processor of a model that sees, for prompts with pictures; or its image processor alone.
        name: how results and reports call the model; the config's name by default.

    Raises:
        UnsupportedModel: if the parts of the model cannot be told apart.
    """

    def __init__(self, hf: Any, tokenizer: Any = None, *, processor: Any = None, name: str | None = None) -> None:
        self.hf = hf
        self.tokenizer: Any = getattr(processor, "tokenizer", None) if tokenizer is None else tokenizer
        self.processor = processor
        self.anatomy = resolve(hf)
        self.name = name or getattr(hf.config, "_name_or_path", "") or self.anatomy.family
        self.sites: list[Site] = available_sites(self.anatomy)
        self._known_sites = frozenset(self.sites)
        self._arguments = set(inspect.signature(hf.forward).parameters)
        self.images = ImageBook(hf, self._arguments)

    def __repr__(self) -> str:
        return (
            f"Model({self.name}: {self.anatomy.family}, {self.n_layers} layers, {self.n_heads} heads"
            + (f" ({self.n_kv_heads} key/value)" if self.n_kv_heads != self.n_heads else "")
            + f", d_model {self.d_model}, {self.dtype}, {self.device})"
        )

    @property
    def tower(self) -> Tower:
        """The stack of blocks that produces the output."""
        return self.anatomy.text

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return self.tower.n_layers

    @property
    def n_heads(self) -> int:
        """Query heads a layer."""
        return self.tower.n_heads

    @property
    def n_kv_heads(self) -> int:
        """Key/value heads a layer; fewer than `n_heads` under grouped-query attention."""
        return self.tower.n_kv_heads

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.tower.d_model

    @property
    def d_head(self) -> int:
        """Width of a head."""
        return self.tower.d_head

    @property
    def d_mlp(self) -> int:
        """Neurons a layer (columns of `mlp.hook_post`)."""
        return int(self.weights.of_block("W_out", 0).shape[0])

    @property
    def d_vocab(self) -> int:
        """Rows of the token embedding."""
        return int(self.weights.W_E.shape[0])

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the embedding."""
        return next(self.hf.parameters()).device

    @cached_property
    def _heads_by_kind(self) -> dict[str, int]:
        return {prefix + kind: self.n_heads_at(kind, prefix) for prefix in self.anatomy.towers for kind in HEAD_KINDS}

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the parameters."""
        return next(parameter.dtype for parameter in self.hf.parameters() if parameter.is_floating_point())

    def n_heads_at(self, kind: str, tower: str = "") -> int:
        """Length of the head axis of a kind of site: key/value heads for k, v and rot_k, query heads otherwise."""
        sizes = self.anatomy.towers[tower]
        return sizes.n_kv_heads if kind in ("k", "v", "rot_k") else sizes.n_heads

    def site_names(self, pattern: SitePattern = "*") -> list[Site]:
        """Names of the sites that a pattern selects, in computation order.

        Args:
            pattern: full name, short form ("z"), shell pattern ("blocks.*.attn.hook_z"), a list of these, or a
                function.

        Raises:
            SiteUnavailable: if this model does not have the site that is named.
            ValueError: if the pattern matches nothing; near names are offered.
        """
        if isinstance(pattern, Site) and pattern in self._known_sites:
            return [pattern]
        try:
            return select_sites(pattern, self.sites)
        except ValueError:
            explain_absence(self.anatomy, pattern)
            raise

    # Text and tokens

    def to_tokens(
        self, text: str | Sequence[str], *, prepend_bos: bool | None = None, images: Sequence[Any] | None = None
    ) -> Int[Tensor, "batch pos"]:
        """Token ids of one or several texts of equal length, as the model's own tokenizer makes them.

        Args:
            text: one text or several.
            prepend_bos: None: a BOS only where the tokenizer adds one; True or False: with exactly one, or without.
            images: pictures (PIL) for one text with an image token for each, or one list of them for each of several
                texts. A piece of a picture becomes an id beyond the vocabulary, which every call here understands.

        Raises:
            ValueError: if the texts differ in length: padded ids would be read as tokens later. Calls on the model take
                the texts themselves, pad and mask them.
        """
        texts = [text] if isinstance(text, str) else list(text)
        pictures = [()] * len(texts) if images is None else [images] if isinstance(text, str) else images
        rows = [self._encode(one, shown, prepend_bos) for one, shown in zip(texts, pictures, strict=True)]
        return tokenisation.stacked(rows, self.device)

    def to_str_tokens(self, prompt: str | Sequence[int] | Int[Tensor, "..."]) -> list[str]:
        """The text of each token of one prompt: `["When", " Mary", " and"]`; `[row,column]` for a piece of an image."""
        if isinstance(prompt, str):
            prompt = self._encode(prompt)
        ids = tokenisation.ids_of_one(prompt)
        pieces = self.images.labels(ids)
        return [pieces.get(at) or tokenisation.decode_each(self._tokenizer, [one])[0] for at, one in enumerate(ids)]

    def to_single_token(self, text: str) -> int:
        """The id of a text that is exactly one token.

        Raises:
            ValueError: if it is several; the message shows them.
        """
        return tokenisation.single_token(self._tokenizer, text)

    def _encode(self, text: str, pictures: Sequence[Any] = (), prepend_bos: bool | None = None) -> list[int]:
        if not pictures:
            return tokenisation.encode(self._tokenizer, text, prepend_bos=prepend_bos)
        ids = encode_with_pictures(self.processor, self._tokenizer, self.images, text, pictures)
        return tokenisation.with_bos(self._tokenizer, ids, prepend_bos)

    @property
    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer: pass one to load, or give token ids")
        return self.tokenizer

    # Calls

    @torch.no_grad()
    def __call__(self, prompts: Prompts, *, logits_to_keep: int = 0) -> Float[Tensor, "batch *kept d_vocab"]:
        """Logits (the last hidden state for a model without a language-model head).

        Args:
            prompts: text, texts, token ids ([pos] or [batch, pos]), lists of ids, or a mapping of inputs as
                transformers takes them. Prompts of different length are padded on the left; every number equals that of
                the prompt alone.
            logits_to_keep: 0 for all positions, k for the last k only (cheaper: the others are not computed).

        Raises:
            FloatingPointError: if the output is not finite; the message names the first site where that happens.
        """
        inputs = self._inputs(prompts)
        logits = self._forward(inputs, logits_to_keep)
        check_finite(logits, self.anatomy, self.sites, lambda: self._forward(inputs, 1))
        return logits

    @torch.no_grad()
    def run_with_cache(
        self,
        prompts: Prompts,
        sites: SitePattern = "*",
        *,
        positions: Positions = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        logits_to_keep: int = 0,
    ) -> tuple[Float[Tensor, "batch *kept d_vocab"], Cache]:
        """Logits and the activations of the sites asked for; nothing else is kept.

        Args:
            prompts: as for a plain call.
            sites: name, short form, pattern, list or function; "*" is every site, scores and head results included.
            positions: keep these positions only (query positions for scores and pattern), in this order.
            device: move each activation there as it is taken.
            dtype: cast each activation as it is taken.
            logits_to_keep: as for a plain call.

        Returns:
            (logits, cache).
        """
        inputs = self._inputs(prompts)
        store: dict[Site, Tensor] = {}
        taps = capture_taps(self.site_names(sites), store, positions=positions, device=device, dtype=dtype)
        with tapped(self.anatomy, taps):
            logits = self._forward(inputs, logits_to_keep)
        check_finite(logits, self.anatomy, self.sites, lambda: self._forward(inputs, 1))
        return logits, Cache(store, left_padding(inputs.get("attention_mask")))

    @torch.no_grad()
    def run_with_hooks(
        self, prompts: Prompts, fwd_hooks: Sequence[tuple[SitePattern, Hook]] = (), *, logits_to_keep: int = 0
    ) -> Float[Tensor, "batch *kept d_vocab"]:
        """Logits of a run in which functions see, and may change, activations; TransformerLens's meaning.

        Args:
            prompts: as for a plain call.
            fwd_hooks: pairs (site, function). The function gets the activation and a `HookPoint`; what it returns
                replaces the activation. It may also change the activation in place and return None.
            logits_to_keep: as for a plain call.
        """
        inputs = self._inputs(prompts)
        with self.hooks(fwd_hooks):
            return self._forward(inputs, logits_to_keep)

    @contextmanager
    def hooks(self, fwd_hooks: Sequence[tuple[SitePattern, Hook]]) -> Iterator[None]:
        """`run_with_hooks` as a context: the functions act on every run inside it, in this thread."""
        taps = [Tap(site, hook_tap(fn, site)) for pattern, fn in fwd_hooks for site in self.site_names(pattern)]
        with tapped(self.anatomy, taps):
            yield

    @contextmanager
    def edited(self, edits: Edit | Sequence[Edit]) -> Iterator[None]:
        """Apply edits to every run inside the context, in this thread; also to `generate` with a KV cache.

        Positions count from the start of each prompt (padding left out), through decoded tokens too. Contexts nest:
        inner edits see what outer ones did.

        Raises:
            ValueError: before any run, if an edit names a site, layer or head that does not exist.
        """
        taps = [tap for edit in ([edits] if isinstance(edits, Edit) else edits) for tap in self.edit_taps(edit)]
        with tapped(self.anatomy, taps):
            yield

    def edit_taps(self, edit: Edit) -> list[Tap]:
        """The taps that carry out an edit on this model, checked: what engines that batch edits build on."""
        return edit.taps(self.site_names(edit.site), self._heads_by_kind)

    @torch.no_grad()
    def last_logits(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch d_vocab"]:
        """Logits at the last position of prompts of equal length; the others are not computed. No check for NaN."""
        return self._forward({"input_ids": tokens.to(self.device)}, 1)[:, -1]

    @torch.no_grad()
    def logits_from_resid(
        self, resid: Float[Tensor, "row d_model"], columns: Int[Tensor, " column"] | None = None
    ) -> Float[Tensor, "row column"]:
        """Logits of residual streams after the last block, by the model's own way from there (norm, scale, soft-cap).

        Args:
            resid: what the last block returns, one row a prediction.
            columns: token ids: only their logits are computed, in this order. None: all.
        """
        first_token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        with last_block_replaced(self.tower, resid), head_cut(self.hf, columns) as is_cut:
            logits = self._forward({"input_ids": first_token}, 0).reshape(len(resid), -1)
        return logits if columns is None or is_cut else logits[:, columns.to(logits.device)]

    def run_with_gradients(
        self,
        prompts: Prompts,
        metric: Callable[[Tensor], Tensor],
        sites: SitePattern,
        *,
        logits_to_keep: int = 0,
    ) -> tuple[Tensor, Cache, Cache]:
        """Activations and the gradients of a metric at many sites, in one forward and one backward pass.

        Parameters receive no gradient, whatever their `requires_grad` says.

        Args:
            prompts: as for a plain call.
            metric: from logits to one value a prompt [batch] (or a scalar). Values are summed before the backward pass,
                so that each prompt gets the gradient of its own value.
            sites: name, short form, pattern, list or function.
            logits_to_keep: as for a plain call.

        Returns:
            (metric values, activations, gradients), the caches with equal shapes.

        Raises:
            FloatingPointError: if the output is not finite; the message names the first site where that happens.
        """
        inputs = self._inputs(prompts)
        logits, on_path = self._forward_on_path(inputs, sites, logits_to_keep)
        with torch.enable_grad():
            values = metric(logits)
            kept, gradients = gradients_at(values, on_path)
        padding = left_padding(inputs.get("attention_mask"))
        return values.detach(), Cache(kept, padding), Cache(gradients, padding)

    def run_on_path(
        self, prompts: Prompts, sites: SitePattern, *, logits_to_keep: int = 0
    ) -> tuple[Tensor, dict[Site, Tensor]]:
        """Logits, and activations as nodes of the autograd graph that leads to them.

        For several backward passes through one forward pass; `run_with_gradients` is the usual single one. The graph
        lives as long as the logits.

        Args:
            prompts: as for a plain call.
            sites: name, short form, pattern, list or function.
            logits_to_keep: as for a plain call.
        """
        return self._forward_on_path(self._inputs(prompts), sites, logits_to_keep)

    @torch.no_grad()
    def generate(
        self, prompt: Prompts, *, max_new_tokens: int = 20, do_sample: bool = False, **options: Any
    ) -> str | Tensor:
        """Continue a prompt with transformers' `generate`; edits and hooks in force apply to every step.

        Returns:
            The whole text for a prompt given as text, token ids otherwise.
        """
        inputs = self._inputs(prompt)
        inputs.pop("position_ids", None)
        inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
        options.setdefault("pad_token_id", pad_id(self.tokenizer))
        shown = self.images.expand(inputs)
        output = self.hf.generate(**shown, max_new_tokens=max_new_tokens, do_sample=do_sample, **options)
        ids = output if isinstance(output, Tensor) else output.sequences
        ids[:, : inputs["input_ids"].shape[1]] = inputs["input_ids"]
        return self._tokenizer.decode(ids[0], skip_special_tokens=True) if isinstance(prompt, str) else ids

    # Inside a call

    def _inputs(self, prompts: Prompts) -> dict[str, Any]:
        with_position_ids = "position_ids" in self._arguments
        return prepare_inputs(prompts, self.tokenizer, self.device, with_position_ids=with_position_ids)

    def _forward(self, inputs: Mapping[str, Any], logits_to_keep: int) -> Tensor:
        return forward(self.hf, self._arguments, self.images.expand(inputs), logits_to_keep)

    def _forward_on_path(
        self, inputs: Mapping[str, Any], sites: SitePattern, logits_to_keep: int
    ) -> tuple[Tensor, dict[Site, Tensor]]:
        def run() -> Tensor:
            logits = self._forward(inputs, logits_to_keep)
            check_finite(logits, self.anatomy, self.sites, lambda: self._forward(inputs, 1))
            return logits

        return forward_on_path(self.anatomy, self.site_names(sites), run)

    # Weights

    @cached_property
    def weights(self) -> Weights:
        """Per-head weight matrices, embedding and unembedding; also reached as `model.W_Q` and so on."""
        return Weights(self.hf, self.tower)

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith(("W_", "b_")) and name in Weights.NAMES:
            return getattr(self.weights, name)
        raise AttributeError(f"Model has no attribute {name!r}")

    @torch.no_grad()
    def final_norm(self, resid: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """The norm after the last block, applied to any residual stream (the stream itself where there is none)."""
        return resid if self.tower.ln_final is None else self.tower.ln_final(resid)

    @torch.no_grad()
    def unembed(self, normed: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_vocab"]:
        """Logits of a normed residual stream, with the family's logit scale and soft-cap."""
        return self.weights.unembed(normed)
