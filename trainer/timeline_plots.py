"""A picture of one batch: live requests over time, and a line per rollout with its drafts coloured by source.

Invariants: as in report_plots: plain numbers in, nothing left out; every rollout has a line, and every colour of the
legend is also a place in its line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from slipstream.drafter.base import SOURCE_NAMES

COLOURS = ("#c3cad1", "#8a4fa3", "#d9650f", "#1f5fa8", "#2b8c5a", "#b8860b")
"""By index of SOURCE_NAMES; "none" is a pass that gained the model's own token alone."""


@dataclass(frozen=True, slots=True)
class Line:
    """One rollout. times: end of each of its forward passes; sources: index into SOURCE_NAMES of what it accepted.

    starts_at_zero: the first pass began at 0; otherwise it is taken to have lasted as long as the second.
    """

    times: list[float]
    sources: list[int]
    starts_at_zero: bool = False

    @property
    def begin(self) -> float:
        """When the first pass began."""
        if self.starts_at_zero:
            return 0.0
        lasted = self.times[1] - self.times[0] if len(self.times) > 1 else self.times[0]
        return max(self.times[0] - lasted, 0.0)


def line_of_counts(num_tokens: int, by_source: Mapping[str, int]) -> Line:
    """A rollout of which only totals are known: its own tokens first, then what it accepted, source by source."""
    counts = [(i, by_source.get(name, 0)) for i, name in enumerate(SOURCE_NAMES)]
    counts[0] = (0, max(num_tokens - sum(by_source.values()), 0))
    used = [(source, count) for source, count in counts if count]
    ends = np.cumsum([count for _, count in used]).astype(float).tolist()
    return Line(ends, [source for source, _ in used], starts_at_zero=True)


def timeline_figure(lines: Sequence[Line], x_label: str = "seconds", title: str = "") -> Figure:
    """Above: how many requests are live; below: a line per rollout, the longest at the bottom."""
    figure = Figure(figsize=(6.6, 4.4), dpi=150, layout="constrained")
    live, rows = figure.subplots(2, 1, sharex=True, height_ratios=[1, 2])
    ordered = sorted((line for line in lines if line.times), key=lambda line: line.times[-1])
    ends = np.array([line.times[-1] for line in ordered])
    times, counts = live_counts(ordered)
    live.step(times, counts, where="post", color="#1f5fa8")
    live.set_ylabel("live requests")
    live.set_ylim(bottom=0)
    used = _draw(rows, ordered)
    rows.set_ylabel("rollouts")
    rows.set_xlabel(x_label)
    rows.set_xlim(0, float(ends.max()) * 1.02 if len(ends) else 1.0)
    rows.set_ylim(len(ordered), -1)
    rows.set_yticks([])
    for axes in (live, rows):
        axes.spines[["top", "right"]].set_visible(False)
    for source in used:
        rows.plot([], [], color=COLOURS[source], linewidth=3, label=source_label(source))
    # Above the axes, beside the title: inside, it would hide a batch whose requests stay live to the end.
    place = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0.2}
    live.legend(*rows.get_legend_handles_labels(), frameon=False, fontsize=8, ncols=3, **place)
    if title:
        live.set_title(title, fontsize=10, loc="left")
    return figure


def live_counts(lines: Sequence[Line]) -> tuple[np.ndarray, np.ndarray]:
    """(times, live lines from then on): a line is live from the beginning of its first pass to the end of its last."""
    starts, ends = np.sort([line.begin for line in lines]), np.sort([line.times[-1] for line in lines])
    times = np.unique(np.concatenate([[0.0], starts, ends]))
    return times, np.searchsorted(starts, times, side="right") - np.searchsorted(ends, times, side="right")


def source_label(source: int) -> str:
    """How the legend calls a source."""
    name = SOURCE_NAMES[source]
    return "no draft accepted" if name == "none" else f"from {name}"


def _draw(axes: Axes, lines: Sequence[Line]) -> list[int]:
    """One segment per pass; the sources that occur."""
    segments, colours, used = [], [], set()
    for row, line in enumerate(lines):
        starts = [line.begin, *line.times[:-1]]
        segments += [[(a, row), (b, row)] for a, b in zip(starts, line.times, strict=True)]
        colours += [COLOURS[source] for source in line.sources]
        used.update(line.sources)
    width = float(np.clip(120 / max(1, len(lines)), 0.6, 5.0))
    axes.add_collection(LineCollection(segments, colors=colours, linewidths=width))
    return sorted(used)


def save_png(figure: Figure, path: str) -> None:
    """Writes the figure."""
    FigureCanvasAgg(figure).print_png(path)
