"""Recursive direct feature attribution: a feature of a `hook_z` SAE down to embeddings, MLPs and earlier features.

With attention patterns and norm scales frozen at the values of the run, everything between features is linear:

1. The pre-activation is constant + Σ_s Σ_h A^h_ts (w^h · v^h_s), with v^h_s = norm(x_s) W_V^h + b_V^h; so each source
   position s has one direction in the residual stream, and x_s adds its dot product with it.
2. x_s = embed + Σ (attn_out + mlp_out) over the earlier layers: every one of these is a term.
3. Where an earlier layer has an SAE on z, its attn_out splits into features, error and biases; where it has a
   transcoder (or an SAE on mlp_out), so does its mlp_out.
4. The features of step 3 that matter most are affine functions of their own z, and are taken through 1-3 again.

The leaves, biases included, add up to the pre-activation; nothing is dropped: what is not listed by name is one leaf
"other". What a feature's attention pattern or a norm's scale depends on is not explained.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.heads.norms import LinearNorm
from interp.heads.patterns import pattern
from interp.heads.weights import check_linear, norm_of
from interp.model import Cache, Model, Site, UnsupportedModel
from interp.model.edit import resolve_columns
from interp.patching.labels import model_provenance
from interp.saes.attribution import affine_parts, encoder_rows, prompt_ids, token_strings
from interp.saes.head_share import layer_of_z
from interp.saes.sae import SAE, to_rows
from interp.saes.splice import sites_of

TOLERANCE = 0.02
"""A sum that misses the pre-activation by more than this share of its largest term: a model that is not understood."""

COLUMNS = (
    "node", "parent", "depth", "kind", "layer", "position", "token", "feature", "activation", "contribution", "leaf",
)  # fmt: skip


@torch.no_grad()
def recursive_attribution(
    model: Model,
    sae: SAE,
    prompt: str | Sequence[int] | Int[Tensor, "..."],
    feature: int,
    *,
    position: int = -1,
    upstream: Sequence[SAE] = (),
    depth: int = 2,
    beam: int = 5,
    keep: int = 10,
) -> pd.DataFrame:
    """A tree of what a feature's pre-activation is made of, exact with patterns and norm scales frozen.

    Costs two forward passes with all layers' streams and patterns up to the SAE's layer, then one product of
    [position, d_sae] for each upstream SAE and expanded feature.

    Args:
        model: the model.
        sae: an SAE that reads a `hook_z`.
        prompt: one prompt, as text or token ids.
        feature: of that SAE.
        position: target position, negative from the end.
        upstream: SAEs on `hook_z` and transcoders or SAEs of `mlp_out` in earlier layers, one a layer and part. A layer
            without one is a leaf, "attn2@5" or "mlp2@5". Those of later layers are not used.
        depth: how often features are expanded, the target itself included: 1 lists what it reads directly.
        beam: features expanded at each further step, those with the largest contributions in the whole step.
        keep: terms of each expanded feature that are listed by name; the others are one leaf, "other".

    Returns:
        One row a node, index `id`, the target first: `node` ("L5.f123@7" a feature of attention layer 5 at position 7,
        "mlp2.f4@3" one of a transcoder, "error L5@3", "error mlp2@3", "skip mlp2@3", "embed@3", "mlp2@3", "attn2@3",
        "bias", "other"), `parent` (-1 at the root), `contribution` to the target's pre-activation (signed, weights
        along the path multiplied), `activation` of a feature, and whether it is a `leaf`. The contributions of the
        leaves sum to the root's; those of a node's children to its own. attrs holds provenance and `sum_error`.

    Raises:
        UnsupportedModel: for post-norm models, and if the terms do not add up in this model.
        ValueError: if an SAE reads another site, or a feature or position is out of range.

    Source: Kissane et al. 2024 (arXiv 2406.17759), recursive DFA; the norm's scale and gain, attention weights and
    biases, which their released helpers leave out, are kept. Checked against direct pre-activations and ablations under
    frozen patterns and scales in tests/saes/test_recursive.py.
    """
    started = time.perf_counter()
    check_linear(model)
    layer = layer_of_z(sites_of(model, sae)[0])
    chosen = resolve_columns(feature, sae.d_sae, "feature")[0]
    for name, value, least in (("depth", depth, 1), ("beam", beam, 0), ("keep", keep, 0)):
        if value < least:
            raise ValueError(f"{name}={value}; it must be {least} or more")
    parts = _by_part(model, upstream)
    ids = prompt_ids(model, prompt)
    target = resolve_columns(position, len(ids), "position")[0]
    run = _Run(model, ids, layer, {part: one for part, one in parts.items() if part[1] < layer})
    tree = _tree(run, _root(run, sae, layer, target, chosen), depth=depth, beam=beam, keep=keep)
    labels = token_strings(model, ids)
    tree["token"] = [labels[one] if one >= 0 else "" for one in tree["position"]]
    sum_error = abs(float(tree.loc[tree["leaf"], "contribution"].sum() - tree["contribution"].iloc[0]))
    if sum_error > TOLERANCE * float(tree["contribution"].abs().max()):
        raise UnsupportedModel(
            f"the terms miss the pre-activation by {sum_error:.2g}: the residual stream or the values of "
            f"{model.anatomy.family} hold something that this does not know of"
        )
    attrs: dict[Hashable, Any] = dict(model_provenance(model).items())
    tree.attrs = attrs | {
        "method": "recursive_attribution",
        "layer": layer,
        "depth": depth,
        "beam": beam,
        "keep": keep,
        "sum_error": sum_error,
        "seconds": time.perf_counter() - started,
    }
    return tree[list(COLUMNS)]


def tree_text(tree: pd.DataFrame) -> str:
    """The tree as indented lines, the children of a node by the size of their contributions."""
    children = dict(iter(tree.groupby("parent")))

    def lines(node: int, indent: int) -> Iterator[str]:
        row = tree.loc[node]
        token = f" {row['token']!r}" if row["position"] >= 0 else ""
        yield f"{'  ' * indent}{row['contribution']:+.4f}  {row['node']}{token}"
        if node in children:
            for child in children[node]["contribution"].abs().sort_values(ascending=False, kind="stable").index:
                yield from lines(child, indent + 1)

    return "\n".join(line for root in children[-1].index for line in lines(root, 0))


@dataclass(frozen=True)
class _Term:
    """Something that adds to a node: a leaf, or a feature that can be expanded."""

    kind: str
    name: str
    value: float
    layer: int = -1
    position: int = -1
    feature: int = -1
    activation: float = float("nan")
    weight: float = 0.0
    """Of a feature that can be expanded: contribution = weight x activation."""


@dataclass(frozen=True)
class _Reader:
    """A number that is affine in z of one layer and position: what is expanded."""

    term: _Term
    direction: Float[Tensor, "head d_head"]
    constant: float


@dataclass
class _Run:
    """What stays frozen, read once."""

    model: Model
    ids: Int[Tensor, " pos"]
    last_layer: int
    saes: dict[tuple[str, int], SAE]
    """By part ("z" or "mlp_out") and layer."""
    cache: Cache = field(init=False)
    patterns: Float[Tensor, "layer head query key"] = field(init=False)
    norms: dict[tuple[str, int], tuple[LinearNorm, Tensor]] = field(default_factory=dict)
    features: dict[tuple[str, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layers = range(self.last_layer + 1)
        kinds = ("resid_pre", "z", "attn_out", "mlp_out")
        inputs = [sites_of(self.model, sae)[0] for sae in self.saes.values()]
        sites = ["hook_embed", *inputs, *(Site(kind, layer) for kind in kinds for layer in layers)]
        self.cache = self.model.run_with_cache(self.ids[None], sites, dtype=torch.float32, logits_to_keep=1)[1]
        found = pattern(self.model, self.ids[None], layers, range(self.model.n_heads))
        self.patterns = torch.from_numpy(found.values).to(self.model.device)

    def at(self, kind: str, layer: int) -> Float[Tensor, "pos d"]:
        """An activation of the run as an SAE reads it."""
        site = Site(kind, layer)
        return to_rows(site, self.cache[site])[0].to(self.model.device)

    def norm(self, role: str, layer: int) -> tuple[LinearNorm, Float[Tensor, "pos 1"]]:
        """The norm before ("ln1") or after ("attn_post") a layer's attention, and its scales in this run."""
        if (role, layer) not in self.norms:
            linear = norm_of(self.model, getattr(self.model.tower.blocks[layer], role))
            x = self.at("resid_pre", layer) if role == "ln1" else self.projected(layer)
            self.norms[role, layer] = (linear, linear.inverse_scale(x.to(linear.gain.device)).to(self.model.device))
        return self.norms[role, layer]

    def projected(self, layer: int) -> Float[Tensor, "pos d_model"]:
        """Z W_O + b_O, before a norm after attention."""
        return self.at("z", layer) @ self.weight("W_O", layer).flatten(0, 1) + self.weight("b_O", layer)

    def weight(self, name: str, layer: int) -> Tensor:
        """A weight of one block in float32, key/value heads repeated for their query heads."""
        found = self.model.weights.of_block(name, layer).float().to(self.model.device)
        return found.repeat_interleave(self.model.n_heads // len(found), dim=0) if name in ("W_V", "b_V") else found

    def split(self, part: str, layer: int) -> tuple[Float[Tensor, "pos feature"], Float[Tensor, "pos d_out"]]:
        """(features of the SAE of a part, what its reconstruction misses), for all positions."""
        if (part, layer) not in self.features:
            sae = self.saes[part, layer]
            x = self.input_of(sae)
            found = sae.encode(x)
            output = sae.decode(found, x).to(self.model.device)
            self.features[part, layer] = (found.to(self.model.device), self.at(part, layer) - output)
        return self.features[part, layer]

    def input_of(self, sae: SAE) -> Float[Tensor, "pos d_in"]:
        """What an SAE reads in this run."""
        site = sites_of(self.model, sae)[0]
        return to_rows(site, self.cache[site])[0].to(sae.device)


def _by_part(model: Model, saes: Sequence[SAE]) -> dict[tuple[str, int], SAE]:
    found: dict[tuple[str, int], SAE] = {}
    for sae in saes:
        source, target = sites_of(model, sae)
        if target.tower or target.layer is None or target.kind not in ("z", "mlp_out"):
            raise ValueError(f"upstream takes SAEs of hook_z and what predicts hook_mlp_out; one belongs to {target}")
        if target.kind == "z" and source != target:
            raise ValueError(f"a transcoder from {source} to {target} cannot be expanded; give an SAE on {target}")
        if (target.kind, target.layer) in found:
            raise ValueError(f"two upstream SAEs belong to {target}; give one")
        found[target.kind, target.layer] = sae
    return found


def _root(run: _Run, sae: SAE, layer: int, position: int, feature: int) -> _Reader:
    rows, constants = encoder_rows(sae, [feature])
    x = run.input_of(sae)
    pre, activation = (float(values[position, feature]) for values in (sae.pre_activations(x), sae.encode(x)))
    name = f"L{layer}.f{feature}@{position}"
    term = _Term("feature", name, pre, layer, position, feature, activation, 1.0)
    direction = rows[0].unflatten(0, (run.model.n_heads, run.model.d_head)).to(run.model.device)
    return _Reader(term, direction, float(constants[0]))


def _reader(run: _Run, term: _Term) -> _Reader:
    """A feature of an upstream SAE as an affine function of its z, times the weight of its path."""
    sae = run.saes["z", term.layer]
    x = run.input_of(sae)[[term.position]]
    rows, constants = affine_parts(sae.encode, x, [(0, term.feature)])
    direction = rows[0].unflatten(0, (run.model.n_heads, run.model.d_head)).to(run.model.device)
    return _Reader(term, direction * term.weight, float(constants[0]) * term.weight)


def _tree(run: _Run, root: _Reader, *, depth: int, beam: int, keep: int) -> pd.DataFrame:
    rows: list[dict[str, Any]] = [_row(root.term, parent=-1, depth=0, leaf=False)]
    frontier = [(0, root)]
    for level in range(1, depth + 1):
        terms = [(parent, term) for parent, reader in frontier for term in _terms(run, reader)]
        expandable = [index for index, (_, term) in enumerate(terms) if term.kind == "feature"]
        ranked = sorted(expandable, key=lambda index: -abs(terms[index][1].value))
        expanded = set(ranked[:beam]) if level < depth else set()
        following = []
        for parent, _ in frontier:
            mine = [index for index, (owner, _) in enumerate(terms) if owner == parent]
            shown, other = _shown(terms, mine, expanded, keep)
            for index in shown:
                if index in expanded:
                    following.append((len(rows), _reader(run, terms[index][1])))
                rows.append(_row(terms[index][1], parent=parent, depth=level, leaf=index not in expanded))
            if other is not None:
                rows.append(_row(other, parent=parent, depth=level, leaf=True))
        frontier = following
    frame = pd.DataFrame(rows)
    frame.index.name = "id"
    return frame


def _shown(
    terms: Sequence[tuple[int, _Term]], mine: Sequence[int], expanded: set[int], keep: int
) -> tuple[list[int], _Term | None]:
    """Which terms of a node are listed, by size, and the sum of the others: bias and what is expanded always are."""
    by_size = sorted(mine, key=lambda index: -abs(terms[index][1].value))
    always = {index for index in mine if index in expanded or terms[index][1].kind == "bias"}
    free = [index for index in by_size if index not in always]
    listed = always | set(free[:keep])
    others = [terms[index][1].value for index in free[keep:]]
    rest = (
        _Term("other", f"other ({len(others)} terms)", float(torch.tensor(others).double().sum())) if others else None
    )
    return [index for index in by_size if index in listed], rest


def _row(term: _Term, *, parent: int, depth: int, leaf: bool) -> dict[str, Any]:
    return {
        "node": term.name,
        "parent": parent,
        "depth": depth,
        "kind": term.kind,
        "layer": term.layer,
        "position": term.position,
        "feature": term.feature,
        "activation": term.activation,
        "contribution": term.value,
        "leaf": leaf,
    }


def _terms(run: _Run, reader: _Reader) -> list[_Term]:
    """Everything that a reader's value is made of; the values sum to it."""
    layer, position = reader.term.layer, reader.term.position
    attention = run.patterns[layer][:, position]
    norm, inverse = run.norm("ln1", layer)
    normed = torch.einsum("hd,hmd->hm", reader.direction, run.weight("W_V", layer))
    stream = inverse * (attention.T @ norm.transposed(normed))
    by_value_bias = normed @ norm.bias + (reader.direction * run.weight("b_V", layer)).sum(-1)
    bias = reader.constant + float((attention.sum(-1) * by_value_bias).sum())
    found = _leaves("embed", "embed@{}", -1, (stream * run.cache["embed"][0].to(stream.device)).sum(-1))
    for below in range(layer):
        for terms, constant in (_attention(run, below, stream), _mlp(run, below, stream)):
            found += terms
            bias += constant
    return [*found, _Term("bias", "bias", bias)]


def _attention(run: _Run, layer: int, stream: Float[Tensor, "pos d_model"]) -> tuple[list[_Term], float]:
    """(what a layer's attention adds along one direction a position, its biases)."""
    if ("z", layer) not in run.saes:
        return _leaves("attn", f"attn{layer}@{{}}", layer, (stream * run.at("attn_out", layer)).sum(-1)), 0.0
    post, inverse = run.norm("attn_post", layer)
    scaled = stream * run.model.tower.residual_multiplier
    written = inverse * post.transposed(scaled)
    constant = float((scaled @ post.bias).sum() + (written @ run.weight("b_O", layer)).sum())
    along_z = written @ run.weight("W_O", layer).flatten(0, 1).T
    terms, of_decoder = _through(run, "z", layer, along_z, f"L{layer}.", f"L{layer}")
    return terms, constant + of_decoder


def _mlp(run: _Run, layer: int, stream: Float[Tensor, "pos d_model"]) -> tuple[list[_Term], float]:
    """(what a layer's MLP adds along one direction a position, biases of its transcoder)."""
    name = f"mlp{layer}"
    if ("mlp_out", layer) not in run.saes:
        return _leaves("mlp", f"{name}@{{}}", layer, (stream * run.at("mlp_out", layer)).sum(-1)), 0.0
    terms, constant = _through(run, "mlp_out", layer, stream, f"{name}.", name)
    sae = run.saes["mlp_out", layer]
    if sae.W_skip is not None:
        skipped = (run.input_of(sae) @ sae.W_skip).to(stream.device)
        terms += _leaves("skip", f"skip {name}@{{}}", layer, (stream * skipped).sum(-1))
    return terms, constant


def _through(
    run: _Run, part: str, layer: int, along: Float[Tensor, "pos d_out"], prefix: str, name: str
) -> tuple[list[_Term], float]:
    """(features and errors of an SAE along one direction a position, its decoder bias along them)."""
    sae = run.saes[part, layer]
    features, error = run.split(part, layer)
    weights = along @ sae.W_dec.detach().to(along.device).T
    kind = "feature" if part == "z" else "mlp_feature"
    reached = (features != 0) & (weights != 0)
    terms = [
        _Term(kind, f"{prefix}f{one}@{position}", value * weight, layer, position, one, value, weight)
        for (position, one), value, weight in zip(
            reached.nonzero().tolist(), features[reached].tolist(), weights[reached].tolist(), strict=True
        )
    ]
    terms += _leaves("error", f"error {name}@{{}}", layer, (along * error).sum(-1))
    return terms, float((along @ sae.b_dec.detach().to(along.device)).sum())


def _leaves(kind: str, name: str, layer: int, values: Float[Tensor, " pos"]) -> list[_Term]:
    # Exactly 0 is what attention does not reach.
    return [_Term(kind, name.format(at), value, layer, at) for at, value in enumerate(values.tolist()) if value]
