"""The stage graph: stages in a row, edges between neighbours, arcs for tensors that skip stages."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autopipe.formatting import format_bytes, format_bytes_short, format_count

from .svg import CHARACTER, escape, figure, fit, label, number, rect, tag, title

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from autopipe.planning.plan_parts import Crossing
    from autopipe.planning.plans import Plan

    from .page_data import PageData

FROM_CALLER = -1
"""Source of a `Bundle` that the caller sends; sorts before all stages."""

WIDTH = 1176.0
NARROW, WIDE, GAP, CALLER, HEIGHT, LANE = 85.0, 190.0, 54.0, 54.0, 116.0, 21.0
MOST = 24
"""The largest number of arcs above the stages, and below: the largest ones. The table has all."""


@dataclass(frozen=True)
class Bundle:
    """Tensors with the same source and the same targets.

    Attributes:
        source: stage index, or `FROM_CALLER`.
        targets: stage indices.
        crossings: the tensors.
    """

    source: int
    targets: tuple[int, ...]
    crossings: tuple[Crossing, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors, each counted once."""
        return sum(c.nbytes for c in self.crossings)

    @property
    def direct(self) -> bool:
        """Whether its only target is the next stage."""
        return self.targets == (self.source + 1,)

    def words(self, width: float) -> str:
        """A label that fits about `width` units in a small font."""
        size = format_bytes_short(self.nbytes)
        if len(self.crossings) > 1:
            return f"{len(self.crossings)} tensors  {size}"
        free = width - (len(size) + 2) * 10.5 * CHARACTER
        return f"{fit(self.crossings[0].name, free, 10.5)}  {size}"

    def __str__(self) -> str:
        names = [
            f"{c.name}  {c.tensor_type}  {format_bytes(c.nbytes)}" for c in self.crossings[:12]
        ]
        if len(self.crossings) > 12:
            names.append(f"… {len(self.crossings) - 12} more: see the table")
        where = "caller" if self.source == FROM_CALLER else f"stage {self.source}"
        ends = ", ".join(str(k) for k in self.targets)
        return "\n".join([f"{where} → stage {ends}: {format_bytes(self.nbytes)}", *names])


def bundles(crossings: Sequence[Crossing]) -> tuple[Bundle, ...]:
    """Group tensors by source and targets, in that order.

    Args:
        crossings: a plan's boundary tensors; those without targets are left out.
    """
    found: dict[tuple[int, tuple[int, ...]], list[Crossing]] = {}
    for c in crossings:
        if c.targets:
            source = FROM_CALLER if c.source is None else c.source
            found.setdefault((source, tuple(sorted(c.targets))), []).append(c)
    return tuple(Bundle(*ends, tuple(cs)) for ends, cs in sorted(found.items()))


def lanes(arcs: Sequence[Bundle]) -> dict[Bundle, int]:
    """Assign arcs to lanes so that no two arcs of a lane overlap.

    Returns:
        A lane for each arc; 0 is nearest to the stages. Short arcs get the nearest lanes.
    """
    lanes_used: list[list[tuple[int, int]]] = []
    found = {}
    for arc in sorted(arcs, key=lambda a: (max(a.targets) - a.source, a.source)):
        first, last = arc.source, max(arc.targets)
        fits = (all(last <= a or b <= first for a, b in lane) for lane in lanes_used)
        lane = next((i for i, free in enumerate(fits) if free), len(lanes_used))
        if lane == len(lanes_used):
            lanes_used.append([])
        lanes_used[lane].append((first, last))
        found[arc] = lane
    return found


def stage_graph(facts: PageData) -> tuple[str, int]:
    """Draw the stage graph.

    Returns:
        The drawing, and the number of arcs that it leaves out.
    """
    plan = facts.plan
    above = bundles([c for c in plan.crossings if c.kind != "parameter"])
    direct = [b for b in above if b.direct]
    over = _largest([b for b in above if not b.direct])
    shared = bundles([c for c in plan.crossings if c.kind == "parameter"])
    under = _largest(shared)
    high, low = lanes(over), lanes(under)
    layout = _Layout(
        K=len(plan.stages),
        caller=any(c.source is None for c in plan.crossings),
        top=LANE * (max(high.values(), default=-1) + 1) + 22,
    )
    bottom = layout.top + HEIGHT + LANE * (max(low.values(), default=-1) + 1) + 14
    most = max((b.nbytes for b in (*above, *shared)), default=1) or 1
    parts = [
        *(_edge(layout, b, most) for b in direct),
        *_arcs(layout, high, most, layout.top, -1.0, "arc"),
        *_arcs(layout, low, most, layout.top + HEIGHT, 1.0, "arc shared"),
        *([_caller(layout)] if layout.caller else []),
        *(_box(plan, k, layout) for k in range(layout.K)),
    ]
    left_out = len(above) - len(direct) - len(over) + len(shared) - len(under)
    words = f"{layout.K} stages in a row; {len(plan.crossings)} tensors pass between them."
    svg = figure(
        "graph", "Stages and what passes between them", words, layout.width, bottom, *parts
    )
    return svg, left_out


@dataclass(frozen=True)
class _Layout:
    K: int
    caller: bool
    top: float

    @property
    def left(self) -> float:
        return CALLER + GAP + 2 if self.caller else 2.0

    @property
    def box(self) -> float:
        free = (WIDTH - self.left - (self.K - 1) * GAP - 2) / self.K
        return min(max(free, NARROW), WIDE)

    @property
    def width(self) -> float:
        return max(WIDTH, self.left + self.K * self.box + (self.K - 1) * GAP + 2)

    def x(self, stage: int) -> float:
        return self.left + stage * (self.box + GAP) if stage >= 0 else 2.0

    def wide(self, stage: int) -> float:
        return self.box if stage >= 0 else CALLER


def _largest(arcs: Sequence[Bundle]) -> list[Bundle]:
    return sorted(arcs, key=lambda b: -b.nbytes)[:MOST]


def _caller(layout: _Layout) -> str:
    middle = layout.top + HEIGHT / 2
    return rect(2, layout.top, CALLER, HEIGHT, "caller") + label(
        2 + CALLER / 2, middle + 4, "caller", "small", "middle"
    )


def _box(plan: Plan, k: int, layout: _Layout) -> str:
    stage, x, y, w = plan.stages[k], layout.x(k), layout.top, layout.box
    share = plan.share_of_work(k)
    largest = max(s.seconds for s in plan.stages)
    names = len(stage.parameters)
    lines = [
        f"{stage.calls} call{'s' * (stage.calls != 1)}",
        format_bytes(stage.parameter_bytes) if names else "no parameters",
        f"{format_count(stage.flops)}FLOP" if stage.flops >= 1000 else f"{stage.flops} FLOP",
    ]
    text = [label(x + 9, y + 56 + 15 * i, fit(t, w - 14, 11), "small") for i, t in enumerate(lines)]
    full = stage.seconds / largest * (w - 18) if largest else 0.0
    words = (
        f"stage {k} on {stage.planned_device}, {stage.modules}:"
        f" {', '.join(lines)}, {names} parameters"
    )
    return tag(
        "g",
        title(words + ("" if share is None else f", {share:.1%} of the work")),
        rect(x, y, w, HEIGHT, "box"),
        label(x + 9, y + 21, f"stage {k}", "strong"),
        label(x + 9, y + 37, fit(stage.planned_device, w - 14, 11), "small faint"),
        *text,
        rect(x + 9, y + HEIGHT - 17, w - 18, 7, "track"),
        rect(x + 9, y + HEIGHT - 17, full, 7, "load"),
        class_="stage",
        data_stage=k,
    )


def _edge(layout: _Layout, bundle: Bundle, most: int) -> str:
    start = layout.x(bundle.source) + layout.wide(bundle.source)
    end, y = layout.x(bundle.targets[0]), layout.top + HEIGHT / 2
    n, middle = len(bundle.crossings), (start + end - 4) / 2
    return tag(
        "g",
        title(bundle),
        tag("path", d=f"M{number(start)} {number(y)}H{number(end - 6)}", class_="line",
            stroke_width=_thick(bundle, most)),
        _head(end, y, 1, 0),
        label(middle, y - 8, format_bytes_short(bundle.nbytes), "tiny", "middle"),
        label(middle, y + 17, f"{n} tensors" if n > 1 else "", "tiny faint", "middle"),
        class_="edge",
        data_from=bundle.source,
        data_to=bundle.targets[0],
    )  # fmt: skip


def _arcs(
    layout: _Layout, lane: dict[Bundle, int], most: int, base: float, sign: float, class_: str
) -> Iterator[str]:
    """Arcs from `base` (an edge of the boxes), upwards (-1) or downwards (1), in their lanes."""
    ports = _ports(layout, lane)
    for arc, at in sorted(lane.items(), key=lambda pair: -pair[1]):
        y = base + sign * (14 + LANE * at)
        start, *ends = (ports[arc, k] for k in (arc.source, *arc.targets))
        last, r = max(ends), 7.0
        path = (
            f"M{number(start)} {number(base)}V{number(y - sign * r)}"
            f"Q{number(start)} {number(y)} {number(start + r)} {number(y)}H{number(last - r)}"
            f"Q{number(last)} {number(y)} {number(last)} {number(y - sign * r)}"
            f"V{number(base + sign * 6)}"
        )
        path += "".join(
            f"M{number(x)} {number(y)}V{number(base + sign * 6)}" for x in ends if x < last
        )
        width, words = min(last - start - 20, 300), -4.0 if sign < 0 else 12.0
        yield tag(
            "g",
            title(arc),
            tag("path", d=path, class_="line", stroke_width=_thick(arc, most)),
            *(_head(x, base, 0, -sign) for x in ends),
            tag("text", escape(arc.words(width)), x=start + 10, y=y + words, class_="tiny halo"),
            class_=class_,
            data_from=arc.source,
            data_to=" ".join(map(str, arc.targets)),
        )


def _ports(layout: _Layout, lane: dict[Bundle, int]) -> dict[tuple[Bundle, int], float]:
    """x of each arc's ends at its stages; arriving arcs to the left, so that few lines cross."""
    found = {}
    for k in range(-1, layout.K):
        arriving = sorted((a for a in lane if k in a.targets), key=lambda a: lane[a])
        leaving = sorted((a for a in lane if a.source == k), key=lambda a: -lane[a])
        ends = [*arriving, *leaving]
        for i, arc in enumerate(ends):
            found[arc, k] = layout.x(k) + layout.wide(k) * (i + 1) / (len(ends) + 1)
    return found


def _thick(bundle: Bundle, most: int) -> float:
    return 1.2 + 2.0 * math.sqrt(bundle.nbytes / most)


def _head(x: float, y: float, dx: float, dy: float) -> str:
    """The head of an arrow that ends at (x, y) and points in direction (dx, dy)."""
    a, b = x - 8 * dx, y - 8 * dy
    points = [(x, y), (a - 4 * dy, b + 4 * dx), (a + 4 * dy, b - 4 * dx)]
    return tag(
        "path",
        d="M" + "L".join(f"{number(u)} {number(v)}" for u, v in points) + "Z",
        class_="head",
    )
