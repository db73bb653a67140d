"""The pictures of a report, as matplotlib figures without any global state.

Invariants
- Every function takes plain numbers and draws what it is given: no smoothing without the raw points beside
  it, time axes start at 0, and nothing is left out because it looks bad.
- Colours are told apart by readers with colour-vision deficiency and are never the only difference between
  marks.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

BLUE, ORANGE, GREY, INK = "#1f5fa8", "#d9650f", "#8a94a0", "#27313b"
SIZE_INCHES = (6.6, 3.7)
DPI = 150
MAX_BINS = 40

Point = tuple[float, float]
"""(step, value)"""


def reward_figure(points: Sequence[Point]) -> Figure:
    """Mean reward of each step, and its moving average over a tenth of the job (3 to 25 steps)."""
    figure, axes = _axes("step", "mean reward")
    steps, rewards = _columns(points)
    axes.plot(steps, rewards, "o", color=GREY, markersize=_marker_size(steps), label="step")
    if len(steps) > 1:
        width = moving_average_width(len(steps))
        axes.plot(
            steps,
            moving_average(rewards, width),
            color=BLUE,
            linewidth=2.2,
            label=f"mean of the last {width} steps",
        )
    _legend(axes)
    return figure


def rollout_time_figure(
    with_s: Sequence[Point], proof_on_s: Sequence[Point], proof_off_s: Sequence[Point], drafting: bool
) -> Figure:
    """Rollout seconds of each step; on proof steps also the same requests without speculation.

    A bar joins the two timings of one replay and carries their ratio.
    """
    figure, axes = _axes("step", "rollout seconds")
    steps, seconds = _columns(with_s)
    label = "with speculation" if drafting else "drafting off"
    axes.plot(steps, seconds, "o-", color=BLUE, linewidth=1.6, markersize=_marker_size(steps), label=label)
    if proof_off_s:
        on_steps, on = _columns(proof_on_s)
        _, off = _columns(proof_off_s)
        axes.vlines(on_steps, on, off, color=GREY, linewidth=1.4, zorder=1)
        axes.plot(on_steps, on, "o", color=BLUE, markersize=8, markerfacecolor="white", label="replay, with")
        axes.plot(on_steps, off, "D", color=ORANGE, markersize=7, label="replay, without speculation")
        for step, ratio, top in zip(on_steps, off / on, np.maximum(on, off), strict=True):
            axes.annotate(
                f"{ratio:.2f}×",
                (step, top),
                (0, 8),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                color=INK,
            )
    axes.set_ylim(bottom=0, top=axes.get_ylim()[1] * 1.12)
    _legend(axes)
    return figure


def length_figure(lengths: Mapping[str, np.ndarray], cap_tokens: int | None) -> Figure:
    """Histogram of response lengths on a logarithmic axis of shares, so that the tail shows.

    lengths: label to [n] token counts, one or two of them; the last one's p50, p99 and maximum are marked.
    Shares, not counts: the last epoch of a job may be cut short. cap_tokens: sampling.max_new_tokens, drawn
    when the axis reaches it.
    """
    figure, axes = _axes("response length (tokens)", "share of rollouts")
    longest = max(int(values.max()) for values in lengths.values())
    # Whole-token bins: a fraction of a token would give a comb of empty and double bins.
    width = max(1, int(np.ceil((longest + 1) / MAX_BINS)))
    bins = [float(edge) for edge in range(0, longest + width + 1, width)]
    styles = [(GREY, 0.45), (BLUE, 0.55)][-len(lengths) :]
    for (label, values), (colour, alpha) in zip(lengths.items(), styles, strict=True):
        shares = np.full(len(values), 1 / len(values))
        axes.hist(values, bins, weights=shares, color=colour, alpha=alpha, label=f"{label} (n={len(values):,})")
        axes.hist(values, bins, weights=shares, color=colour, histtype="step", linewidth=1.4)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    axes.set_ylim(bottom=0.7 / max(len(values) for values in lengths.values()), top=2)
    axes.set_xlim(0, bins[-1])
    _mark_quantiles(axes, list(lengths.values())[-1])
    if cap_tokens is not None and cap_tokens <= bins[-1]:
        axes.axvline(cap_tokens, color=ORANGE, linewidth=1.2, label=f"limit {cap_tokens:,}")
    _legend(axes)
    return figure


def accepted_figure(points: Sequence[Point]) -> Figure:
    """Accepted draft tokens per forward round of a request, step by step."""
    figure, axes = _axes("step", "accepted draft tokens per round")
    steps, accepted = _columns(points)
    axes.plot(steps, accepted, "o-", color=BLUE, linewidth=1.8, markersize=_marker_size(steps))
    axes.set_ylim(bottom=0, top=max(float(accepted.max()) * 1.15, 0.5))
    return figure


def reliability_figure(points: Sequence[tuple[float, float, float]]) -> Figure:
    """(estimate, share accepted, tokens) of each tenth, beside a perfect estimate's diagonal; areas show tokens."""
    figure, axes = _axes("estimated probability of acceptance", "share accepted")
    axes.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1.2, label="estimate = share")
    estimate, share, tokens = np.array(points).T
    axes.plot(estimate, share, "-", color=BLUE, linewidth=1.6)
    axes.scatter(estimate, share, s=20 + 180 * tokens / tokens.max(), color=BLUE, label="draft tokens", zorder=3)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    _legend(axes)
    return figure


def moving_average_width(num_steps: int) -> int:
    """Steps in the moving average of a job of this many steps: a tenth, at least 3 and at most 25."""
    return min(num_steps, max(3, min(25, num_steps // 10)))


def moving_average(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of the last `width` values at each place; of all so far where there are fewer."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _axes(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    """A quiet pair of axes: two spines, a light grid, integer ticks for steps and tokens."""
    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK)
    axes.grid(axis="y", color="#e3e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _mark_quantiles(axes: Axes, values: np.ndarray) -> None:
    """Lines at the median, the 99th percentile and the maximum, labelled above the bars at two heights."""
    p50, p99 = np.percentile(values, [50, 99])
    marks = [
        (f"p50 {p50:,.0f}", p50),
        (f"p99 {p99:,.0f}", p99),
        (f"max {values.max():,}", float(values.max())),
    ]
    right = axes.get_xlim()[1]
    for (text, position), height in zip(marks, (0.985, 0.985, 0.915), strict=True):
        axes.axvline(position, ymax=height, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
        side = "right" if position > 0.75 * right else "left"
        axes.annotate(
            text,
            (position, height),
            (-4 if side == "right" else 4, 0),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            ha=side,
            va="top",
            fontsize=9,
            color=INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
        )


def _columns(points: Sequence[Point]) -> tuple[np.ndarray, np.ndarray]:
    """Points as two float64 arrays."""
    array = np.asarray(points, np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _marker_size(steps: np.ndarray) -> float:
    """Points large enough to see in a short job and small enough not to smear in a long one."""
    return float(np.clip(90 / max(1, len(steps)), 1.5, 5.0))


def _legend(axes: Axes) -> None:
    """Above the plot, where it hides no data."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, frameon=False, fontsize=9, borderaxespad=0.2)
