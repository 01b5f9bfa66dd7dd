"""Where the nodes of a layered graph stand and how its edges run, for drawings.

1. Nodes keep their row. Within a row they are ordered and placed by barycentres: each is drawn to the mean place of its
   neighbours, sweep after sweep, and neighbours in a row keep a distance.
2. An edge that spans rows is routed by the cheapest way over a grid: straight where it can be, around the nodes of the
   rows between, beside earlier edges of the same node, so that these form a loose bundle, and never on top of one.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.optimize import isotonic_regression

Link: TypeAlias = tuple[str, str, float]
"""Lower node, upper node, weight."""
Place: TypeAlias = tuple[float, float]

_SWEEPS = 24
_CELLS = 16
"""Grid columns a unit of width."""
_MARGIN = 0.12
"""Room between a node and a line that passes it."""
_BLOCKED, _TAKEN, _BESIDE, _BUNDLED = 40.0, 0.4, 0.04, 0.08
"""Cost of a cell at a node, of one that has a line, of one beside it; what is saved beside a line of the same node."""
_STRAIGHT, _UPRIGHT = 1.0, 0.2
"""Cost of shifting sideways: of its square for each unit of height, and of itself."""
_SOFT = 0.5
"""Cost of a cell close to a node."""
_EASINGS = 3
_PARALLEL = 0.14
"""How far lines between the same two nodes bulge apart."""
_POINTS_A_ROW = 8
"""Points of a line between two rows."""


def place(
    rows: Mapping[str, float], links: Sequence[Link], width: float, columns: Mapping[str, float]
) -> dict[str, Place]:
    """Places of nodes: heights as given, x chosen so that linked nodes stand near each other.

    Args:
        rows: the height of each node.
        links: who is linked to whom, and how strongly.
        width: x runs from 0 to this.
        columns: where each node stands at first, 0..width; order of those that no link tells apart.
    """
    names = list(rows)
    index = {name: at for at, name in enumerate(names)}
    height = np.array([rows[name] for name in names])
    pull = np.zeros((len(names), len(names)))
    for lower, upper, weight in links:
        near = weight / (1 + abs(height[index[upper]] - height[index[lower]]))
        pull[index[lower], index[upper]] += near
        pull[index[upper], index[lower]] += near
    x = np.array([columns[name] for name in names], dtype=float)
    levels = [np.flatnonzero(height == one) for one in np.unique(height)]
    for sweep in range(_SWEEPS):
        for level in levels if sweep % 2 == 0 else levels[::-1]:
            total = pull[level].sum(1)
            wanted = np.divide(pull[level] @ x, total, out=x[level].copy(), where=total > 0)
            x[level] = _apart(wanted, width)
    if np.ptp(x) > 0:
        x = (x - x.min()) / np.ptp(x) * width
    return {name: (float(x[at]), float(height[at])) for at, name in enumerate(names)}


def _apart(wanted: Float[ndarray, " node"], width: float) -> Float[ndarray, " node"]:
    """The places nearest to those wanted, in their order, that keep a distance and lie within the width."""
    n = len(wanted)
    # A row of few nodes spreads more than it must: lines from below then pass between them.
    distance = min(max(1.0, width / (n + 2)), width / max(n - 1, 1))
    order = np.argsort(wanted, kind="stable")
    offsets = distance * np.arange(n)
    fitted = isotonic_regression(wanted[order] - offsets).x
    placed = np.empty(n)
    placed[order] = np.clip(fitted, 0, width - offsets[-1]) + offsets
    return placed


def n_crossings(places: Mapping[str, Place], links: Sequence[Link]) -> int:
    """How many pairs of links cross if all are drawn straight."""
    ends = np.array([[*places[lower], *places[upper]] for lower, upper, _ in links]).reshape(-1, 4)
    x0, y0, x1, y1 = ends.T
    slope = (x1 - x0) / (y1 - y0)
    low, high = np.maximum(y0[:, None], y0[None]), np.minimum(y1[:, None], y1[None])
    at_low, at_high = (x0[:, None] + (y - y0[:, None]) * slope[:, None] for y in (low, high))
    gap_low, gap_high = at_low - at_low.T, at_high - at_high.T
    crossing = (low < high) & (gap_low * gap_high < -1e-12)
    return int(crossing.sum()) // 2


def route(
    places: Mapping[str, Place], links: Sequence[Link], width: float, half_widths: Mapping[str, float]
) -> list[Float[ndarray, "point 2"]]:
    """The line of each link, as points from its lower to its upper end, around the nodes between them.

    The strongest links are routed first and run straightest.

    Args:
        places: where nodes stand.
        links: lower node, upper node, strength.
        width: x runs from 0 to this.
        half_widths: how far each node reaches to either side.
    """
    heights = np.unique([y for _, y in places.values()])
    grid = np.linspace(-0.6, width + 0.6, int((width + 1.2) * _CELLS) + 1)
    blocked = np.zeros((len(heights), len(grid)))
    for name, (x, y) in places.items():
        beyond = np.abs(grid - x) - half_widths[name]
        soft = _SOFT * np.exp(-np.square(beyond / _MARGIN))
        blocked[np.searchsorted(heights, y)] += np.where(beyond < 0, _BLOCKED, soft)
    lines: dict[int, Float[ndarray, "point 2"]] = {}
    bends = {step: _bend(grid[:, None] - grid[None, :], step) for step in np.diff(heights).round(6).tolist()}
    taken = np.zeros_like(blocked)
    saved: dict[str, Float[ndarray, "row cell"]] = defaultdict(lambda: np.zeros_like(blocked))
    n_parallel: Counter[tuple[str, str]] = Counter()
    for at in sorted(range(len(links)), key=lambda at: -links[at][2]):
        lower, upper, _ = links[at]
        first, last = np.searchsorted(heights, [places[lower][1], places[upper][1]])
        rows = np.arange(first + 1, last)
        costs = (blocked + taken - saved[lower])[rows]
        columns = _cheapest(costs, heights[first : last + 1], grid, places[lower][0], places[upper][0], bends)
        for shift in (-2, -1, 0, 1, 2):
            beside = np.clip(columns + shift, 0, len(grid) - 1)
            taken[rows, beside] += _BESIDE if shift else _TAKEN
            saved[lower][rows, beside] = _BUNDLED + _BESIDE
        way = _eased(grid[columns], blocked[rows], grid, places[lower][0], places[upper][0])
        across = np.concatenate([[places[lower][0]], way, [places[upper][0]]])
        lines[at] = _smooth(across, heights[first : last + 1])
        if not len(rows):
            before = n_parallel[lower, upper]
            side = (before + 1) // 2 * (1 if before % 2 else -1)  # 0, 1, −1, 2, −2, ...
            lines[at][:, 0] += side * _PARALLEL * np.sin(np.linspace(0, np.pi, len(lines[at])))
            n_parallel[lower, upper] += 1
    return [lines[at] for at in range(len(links))]


def _cheapest(
    costs: Float[ndarray, "row cell"],
    heights: Float[ndarray, " height"],
    grid: Float[ndarray, " cell"],
    start: float,
    end: float,
    bends: Mapping[float, Float[ndarray, "cell cell"]],
) -> Int[ndarray, " row"]:
    """The cell in each row between two nodes on the cheapest way: cost of cells, and of shifts from row to row."""
    if not len(costs):
        return np.empty(0, dtype=int)
    steps = np.diff(heights).round(6).tolist()
    total = costs[0] + _bend(grid - start, steps[0])
    came_from = []
    for row in range(1, len(costs)):
        through = total[:, None] + bends[steps[row]]
        best = through.argmin(0)
        came_from.append(best)
        total = through[best, np.arange(len(grid))] + costs[row]
    columns = [int((total + _bend(grid - end, steps[-1])).argmin())]
    for best in reversed(came_from):
        columns.append(int(best[columns[-1]]))
    return np.array(columns[::-1])


def _eased(
    way: Float[ndarray, " row"],
    blocked: Float[ndarray, "row cell"],
    grid: Float[ndarray, " cell"],
    start: float,
    end: float,
) -> Float[ndarray, " row"]:
    """The way with its small kinks smoothed out wherever no node stands in the way."""
    for _ in range(_EASINGS):
        around = np.concatenate([[start], way, [end]])
        eased = 0.5 * way + 0.25 * (around[:-2] + around[2:])
        cells = np.searchsorted(grid, eased).clip(0, len(grid) - 1)
        way = np.where(blocked[np.arange(len(way)), cells] < _SOFT, eased, way)
    return way


def _bend(shift: Float[ndarray, "..."], step: float) -> Float[ndarray, "..."]:
    """What it costs to shift so far sideways within a step upwards."""
    return _STRAIGHT * np.square(shift) / step + _UPRIGHT * np.abs(shift)


def _smooth(x: Float[ndarray, " row"], y: Float[ndarray, " row"]) -> Float[ndarray, "point 2"]:
    """A cubic through points of rising height, upright at both ends."""
    slope = np.zeros(len(x))
    if len(x) > 2:
        slope[1:-1] = (x[2:] - x[:-2]) / (y[2:] - y[:-2])
    share = np.linspace(0, 1, _POINTS_A_ROW, endpoint=False)[None, :]
    step = np.diff(y)[:, None]
    h00, h10 = (1 + 2 * share) * (1 - share) ** 2, share * (1 - share) ** 2
    h01, h11 = share**2 * (3 - 2 * share), share**2 * (share - 1)
    points = h00 * x[:-1, None] + h10 * step * slope[:-1, None] + h01 * x[1:, None] + h11 * step * slope[1:, None]
    xs, ys = points.ravel(), (y[:-1, None] + share * step).ravel()
    return np.stack([np.append(xs, x[-1]), np.append(ys, y[-1])], axis=1)
