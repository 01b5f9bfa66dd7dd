"""Which heads of a vision transformer have alike patterns: a few features of each head, two coordinates, clusters."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from interp.model import Model
from interp.patching.labels import model_provenance
from interp.vision.khop import between_patches, grid_hops, khop_strength
from interp.vision.patch_grid import Images, PatchGrid
from interp.vision.tower_attention import by_layer_and_image

if TYPE_CHECKING:
    import plotly.graph_objects as go

COLOURS = ("#2166ac", "#b2182b", "#1b7837", "#e08214", "#762a83", "#8a94a3", "#0f7c84", "#a6611a")


def pattern_features(
    model: Model, images: Images, *, batch_size: int | None = None, progress: bool | None = None
) -> xr.DataArray:
    """What the pattern of each head looks like, in a few numbers, averaged over patches and images.

    * `hop_k`: attention to the ring of patches k steps away, CLS and registers left out (`khop_profile`);
    * `entropy`: of the rows of patches over all tokens, as a share of ln(number of tokens);
    * `prefix`: attention of patches to CLS and registers;
    * `sink`: the most that any one token receives, averaged over the patches that attend;
    * `previous`: attention of a patch to the one before it in the order of tokens.

    Costs one forward pass an image, and each layer's patterns.

    Args:
        model: a vision model, or one that sees and reads.
        images: a mapping with `pixel_values`, or token ids with images in them.
        batch_size: images a forward pass; 8 by default.
        progress: show a progress bar; None: in a terminal or notebook only.

    Returns:
        DataArray [layer, head, feature].

    Raises:
        ValueError: if there is no vision transformer or no image.
    """
    started = time.perf_counter()
    found, grid = by_layer_and_image(model, images, _features, batch_size=batch_size, progress=progress)
    n_hops = max(grid.n_rows, grid.n_columns)
    values = found.nanmean(1)
    return xr.DataArray(
        values.numpy(),
        dims=("layer", "head", "feature"),
        coords={
            "layer": range(values.shape[0]),
            "head": range(values.shape[1]),
            "feature": [*(f"hop_{hop}" for hop in range(n_hops)), "entropy", "prefix", "sink", "previous"],
        },
        name="feature",
        attrs={
            **model_provenance(model),
            "method": "pattern_features",
            "n_images": found.shape[1],
            "seconds": time.perf_counter() - started,
        },
    )


def cluster_heads(features: xr.DataArray, *, n_clusters: int = 4, seed: int = 0) -> xr.Dataset:
    """Heads on a plane, and in clusters: features standardised, two principal components, k-means on these.

    Args:
        features: [layer, head, feature], such as those of `pattern_features`; any others will do.
        n_clusters: how many clusters.
        seed: of k-means.

    Returns:
        Dataset of `coordinate` [layer, head, axis], `cluster` [layer, head] (0 = the largest), `loading`
        [axis, feature] and `explained` [axis], the share of the variance of the standardised features.

    Raises:
        ValueError: for another shape, features that are NaN or the same for all heads, or more clusters than heads.
    """
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    if features.dims != ("layer", "head", "feature"):
        raise ValueError(f"features have the axes {features.dims}; they must be layer, head, feature")
    if features.sizes["feature"] < 2:
        raise ValueError("a plane takes two features at least")
    if bool(features.isnull().any()):
        undefined = [str(one) for one in features["feature"].values if bool(features.sel(feature=one).isnull().any())]
        raise ValueError(f"features {', '.join(undefined)} are NaN for some heads; leave them out")
    rows = features.values.reshape(-1, features.sizes["feature"]).astype(np.float64)
    standardised = StandardScaler().fit_transform(rows)
    if not standardised.any():
        raise ValueError("all heads have the same features; there is nothing to tell them apart by")
    plane = PCA(n_components=2, svd_solver="full")
    coordinates = plane.fit_transform(standardised)
    dataset = on_a_plane(features, coordinates, n_clusters=n_clusters, seed=seed)
    dataset.attrs["method"] = "cluster_heads"
    return dataset.assign(
        loading=(("axis", "feature"), plane.components_), explained=("axis", plane.explained_variance_ratio_)
    ).assign_coords(feature=features["feature"].values)


def on_a_plane(heads: xr.DataArray, coordinates: NDArray[np.float64], *, n_clusters: int, seed: int) -> xr.Dataset:
    """Coordinates and k-means clusters of heads, labelled.

    Args:
        heads: what the coordinates are made of, with axes `layer` and `head` first.
        coordinates: [head of any layer, axis].
        n_clusters: how many clusters.
        seed: of k-means.

    Raises:
        ValueError: for no clusters or more than there are different heads.
    """
    from sklearn.cluster import KMeans

    n_different = len(np.unique(coordinates.round(9), axis=0))  # alike up to rounding is the same
    if not 1 <= n_clusters <= n_different:
        raise ValueError(f"n_clusters={n_clusters}; there are {n_different} heads that differ")
    labels = KMeans(n_clusters, n_init=10, random_state=seed).fit(coordinates).labels_
    sizes = np.bincount(labels, minlength=n_clusters)
    by_size = np.argsort(np.argsort(-sizes, kind="stable"), kind="stable")
    shape = (heads.sizes["layer"], heads.sizes["head"])
    return xr.Dataset(
        {
            "coordinate": (("layer", "head", "axis"), coordinates.reshape(*shape, -1)),
            "cluster": (("layer", "head"), by_size[labels].reshape(shape)),
        },
        coords={"layer": heads["layer"].values, "head": heads["head"].values, "axis": [0, 1]},
        attrs={**heads.attrs, "n_clusters": n_clusters, "seed": seed},
    )


def draw_clusters(clusters: xr.Dataset, *, title: str = "") -> go.Figure:
    """Heads as points, one colour a cluster; hovering names the head.

    Args:
        clusters: what `cluster_heads` or `pattern_codes` returned.
        title: over the figure; by default it says how many heads fall into how many clusters.
    """
    import plotly.graph_objects as go

    n_clusters = int(clusters.attrs["n_clusters"])
    figure = go.Figure()
    for number in range(n_clusters):
        inside = np.argwhere(clusters["cluster"].values == number)
        points = clusters["coordinate"].values[tuple(inside.T)]
        names = [f"L{clusters['layer'].values[row]}H{clusters['head'].values[column]}" for row, column in inside]
        figure.add_trace(
            go.Scatter(
                x=points[:, 0],
                y=points[:, 1],
                mode="markers",
                name=f"cluster {number} ({len(names)})",
                marker={"size": 8, "color": COLOURS[number % len(COLOURS)], "opacity": 0.8},
                customdata=names,
                hovertemplate="%{customdata}<br>%{x:.2f}, %{y:.2f}<extra></extra>",
            )
        )
    n_heads = clusters["cluster"].size
    axes = _axis_titles(clusters)
    figure.update_layout(
        title=title or f"{n_heads} heads in {n_clusters} clusters of alike patterns",
        xaxis_title=axes[0],
        yaxis_title=axes[1],
        template="simple_white",
        height=440,
        width=640,
    )
    return figure


def _axis_titles(clusters: xr.Dataset) -> list[str]:
    if "explained" not in clusters:
        return ["code 1", "code 2"]
    return [f"component {number + 1} ({share:.0%})" for number, share in enumerate(clusters["explained"].values)]


def _features(patterns: Float[Tensor, "image head query key"], grid: PatchGrid) -> Float[Tensor, "image head feature"]:
    rows = patterns[..., grid.n_prefix :, :]
    hops, _ = khop_strength(between_patches(patterns, grid), grid_hops(grid))
    entropy = torch.special.entr(rows).sum(-1).mean(-1) / torch.log(torch.tensor(float(rows.shape[-1])))
    prefix = rows[..., : grid.n_prefix].sum(-1).mean(-1)
    sink = rows.mean(-2).amax(-1)
    previous = rows[..., grid.n_prefix :].diagonal(-1, dim1=-2, dim2=-1).mean(-1)
    return torch.cat([hops, torch.stack([entropy, prefix, sink, previous], dim=-1)], dim=-1)
