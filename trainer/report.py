"""report.html: one page about one job, readable years later on any machine.

Invariants
- The page is one file and asks the network for nothing: pictures are inside, there is no script.
- It is made from the run folder alone (settings.json, metrics.jsonl, rollouts.jsonl), at any time, also of
  a job that was killed; lines torn by a crash are counted on the page.
- Everything that came from outside is escaped.
"""

from __future__ import annotations

import base64
import html
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from slipstream.rollout.acceptance import RELIABILITY_KEYS
from slipstream.trainer import report_plots as plots
from slipstream.trainer.errors import SlipstreamError
from slipstream.trainer.progress import (
    Record,
    first_and_last_reward,
    format_seconds,
    proof_records,
    proof_totals,
)
from slipstream.trainer.timeline_plots import line_of_counts, timeline_figure
from slipstream.trainer.tracking import METRICS_FILE, ROLLOUTS_FILE, read_jsonl, scan_jsonl

REPORT_FILE = "report.html"
SETTINGS_FILE = "settings.json"


@dataclass(frozen=True, slots=True)
class RunData:
    """What a run folder holds.

    records: of metrics.jsonl; lengths: [rollouts, 2] int64 of (step, response tokens); settings: {} without a
    file; last_step: (response tokens, accepted draft tokens by source) of every rollout of the last step.
    """

    name: str
    records: list[dict[str, Any]]
    lengths: np.ndarray
    settings: dict[str, Any]
    num_bad_lines: int
    last_step: list[tuple[int, dict[str, int]]] = field(default_factory=list)

    @property
    def drafting(self) -> bool:
        """Whether the job was set to draft."""
        return "off" not in (self.setting("drafter", "name"), self.setting("budget", "name"))

    def setting(self, section: str, key: str) -> Any:
        """One setting, or None in a folder without it."""
        return self.settings.get(section, {}).get(key)


@dataclass(frozen=True, slots=True)
class Picture:
    """A section of the page; figure: None when the job has no such data, then `text` says so."""

    title: str
    text: str
    figure: Figure | None


def write_report(run_dir: Path) -> Path:
    """Writes run_dir/report.html and returns its path; an older report is replaced in one go.

    Raises SlipstreamError when the folder holds no metrics record or the page cannot be written.
    """
    run_dir = Path(run_dir)
    data = read_run(run_dir)
    path = run_dir / REPORT_FILE
    temporary = path.with_name(f".{REPORT_FILE}.tmp")
    try:
        temporary.write_text(_page(data), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise SlipstreamError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def read_run(run_dir: Path) -> RunData:
    """Reads a run folder; raises SlipstreamError when it holds no metrics record."""
    records, num_bad = read_jsonl(run_dir / METRICS_FILE)
    records = [record for record in records if isinstance(record.get("step"), int)]
    if not records:
        raise SlipstreamError(f"{run_dir / METRICS_FILE} holds no finished step; is {run_dir} a run folder?")
    rollouts, num_torn = scan_jsonl(
        run_dir / ROLLOUTS_FILE, lambda record: (record.get("step"), record.get("num_tokens"), record.get("spec"))
    )
    known = [
        (step, tokens, spec) for step, tokens, spec in rollouts if isinstance(step, int) and isinstance(tokens, int)
    ]
    pairs = [(step, tokens) for step, tokens, _ in known]
    last = max((step for step, _ in pairs), default=0)
    specs = [(tokens, spec) for step, tokens, spec in known if step == last and isinstance(spec, dict)]
    try:
        settings = json.loads((run_dir / SETTINGS_FILE).read_bytes())
    except (OSError, ValueError):
        settings = {}
    return RunData(
        name=run_dir.resolve().name,
        records=records,
        lengths=np.asarray(pairs, np.int64).reshape(-1, 2),
        settings=settings if isinstance(settings, dict) else {},
        num_bad_lines=num_bad + num_torn + len(rollouts) - len(pairs),
        last_step=[(tokens, dict(spec.get("by_source") or {})) for tokens, spec in specs],
    )


def pictures(data: RunData) -> list[Picture]:
    """The pictures in the order of the page; their texts are the alternative texts too."""
    return [_reward(data), _rollout_time(data), _lengths(data), _accepted(data), _reliability(data), _sources(data)]


def key_figures(data: RunData) -> list[tuple[str, str]]:
    """(name, value) rows of the table."""
    records = data.records
    rows = [("Steps", f"{len(records):,}")]
    ends = first_and_last_reward(records)
    if ends:
        first, last, count = ends
        steps = "step" if count == 1 else f"{count} steps"
        rows.append((f"Mean reward, first → last {steps}", f"{first:.3f} → {last:.3f}"))
    rollout_s, step_s = _total(records, "timing_s/gen"), _total(records, "timing_s/step")
    share = f" ({rollout_s / step_s:.0%} of {format_seconds(step_s)})" if step_s else ""
    rows.append(("Time in rollouts", format_seconds(rollout_s) + share))
    throughput = [value for _, value in _points(records, "perf/throughput")]
    if throughput:
        rows.append(("Median throughput of the rollout phase", f"{np.median(throughput):,.0f} tokens/s"))
    drafted, accepted = _total(records, "das/drafted"), _total(records, "das/accepted")
    if drafted:
        rows.append(("Draft tokens accepted", f"{accepted:,.0f} of {drafted:,.0f} ({accepted / drafted:.0%})"))
    rows.extend(_proof_rows(records))
    left_out = _total(records, "das/samples_left_out")
    rows.append(("Samples left out", f"{left_out:,.0f}"))
    if data.num_bad_lines:
        rows.append(("Unreadable lines in the records (torn by a crash)", f"{data.num_bad_lines:,}"))
    return rows


def _proof_rows(records: Sequence[Record]) -> list[tuple[str, str]]:
    """What the replays without speculation showed."""
    totals = proof_totals(records)
    if totals.num_replays == 0:
        return [("Proof replays", "none")]
    return [
        (
            f"Rollout time with → without speculation, {totals.num_replays} replays",
            f"{totals.on_s:.2f} s → {totals.off_s:.2f} s ({totals.ratio:.2f}×)",
        ),
        ("Tokens compared in replays", f"{totals.tokens_compared:,}"),
        ("Tokens that differed", f"{totals.tokens_different:,}"),
    ]


def _reward(data: RunData) -> Picture:
    points = _points(data.records, "critic/rewards/mean")
    ends = first_and_last_reward(data.records)
    if not points or ends is None:
        return Picture("Reward", "No step has a mean reward.", None)
    first, last, count = ends
    text = f"Mean reward per step: {first:.2f} over the first {count}, {last:.2f} over the last {count} steps."
    return Picture("Reward", text, plots.reward_figure(points))


def _rollout_time(data: RunData) -> Picture:
    title = "Rollout time per step"
    points = _points(data.records, "timing_s/gen")
    if not points:
        return Picture(title, "No step has a rollout time.", None)
    proofs = proof_records(data.records)
    on = [(float(record["step"]), float(record["proof/gen_on_s"])) for record in proofs]
    off = [(float(record["step"]), float(record["proof/gen_off_s"])) for record in proofs]
    totals = proof_totals(data.records)
    median = float(np.median([value for _, value in points]))
    how = "with speculation" if data.drafting else "(drafting off)"
    text = f"Rollout time per step, median {median:.2f} s {how}. "
    if proofs:
        steps = "one step" if len(proofs) == 1 else f"{len(proofs)} steps"
        text += (
            f"The same requests of {steps} were replayed both ways: without speculation they took "
            f"{totals.ratio:.2f} times as long; {totals.tokens_different:,} of {totals.tokens_compared:,} "
            "tokens differed."
        )
    else:
        text += "No step was replayed without speculation."
    return Picture(title, text, plots.rollout_time_figure(points, on, off, data.drafting))


def _lengths(data: RunData) -> Picture:
    title = "Response lengths"
    groups = _first_and_last_epoch(data)
    if not groups:
        return Picture(title, f"The run folder has no readable {ROLLOUTS_FILE}.", None)
    cap = data.setting("sampling", "max_new_tokens")
    described = [
        f"{label}: median {np.median(values):,.0f}, 99th percentile {np.percentile(values, 99):,.0f}, "
        f"longest {values.max():,} tokens"
        for label, values in groups.items()
    ]
    text = f"How long responses are, as shares of the rollouts on a logarithmic axis. {'; '.join(described)}."
    return Picture(title, text, plots.length_figure(groups, cap if isinstance(cap, int) else None))


def _accepted(data: RunData) -> Picture:
    title = "Accepted draft tokens per round"
    points = _points(data.records, "das/accepted_per_round")
    if not data.drafting or not points:
        return Picture(title, "This job ran with drafting off.", None)
    first, last = points[0][1], points[-1][1]
    text = (
        f"Draft tokens accepted per forward round of a request: {first:.2f} in the first step, {last:.2f} in the last."
    )
    return Picture(title, text, plots.accepted_figure(points))


def _reliability(data: RunData) -> Picture:
    title = "Does the drafter know what will be accepted?"
    points = []
    for key in RELIABILITY_KEYS:
        shares = dict(_points(data.records, f"drafter/reliability/{key}"))
        tokens = dict(_points(data.records, f"drafter/reliability_tokens/{key}"))
        total = sum(tokens.values())
        if total:
            accepted = sum(shares[step] * tokens[step] for step in tokens if step in shares)
            points.append((int(key) / 100, accepted / total, total))
    if not points:
        return Picture(title, "No draft token carried an estimate.", None)
    total = sum(tokens for *_, tokens in points)
    error = sum(abs(estimate - share) * tokens for estimate, share, tokens in points) / total
    text = (
        f"{total:,.0f} draft tokens by their estimated probability of being accepted together with all before them; "
        f"estimates and outcomes differ by {error:.3f} on average."
    )
    return Picture(title, text, plots.reliability_figure(points))


def _sources(data: RunData) -> Picture:
    title = "Where the tokens of the last step came from"
    lines = [line_of_counts(tokens, by_source) for tokens, by_source in data.last_step if tokens > 0]
    if not data.drafting or not lines:
        return Picture(title, "The last step has no rollouts with drafts.", None)
    total = sum(tokens for tokens, _ in data.last_step)
    accepted = sum(sum(by_source.values()) for _, by_source in data.last_step)
    text = (
        f"A line per rollout of the last step, as long as its response: {accepted / total:.0%} of the {total:,} tokens "
        "were accepted drafts, coloured by source; the curve counts the rollouts that are at least as long."
    )
    return Picture(title, text, timeline_figure(lines, "response tokens"))


def _first_and_last_epoch(data: RunData) -> dict[str, np.ndarray]:
    """Response lengths of the first and the last epoch; one entry when there is one epoch."""
    if not len(data.lengths):
        return {}
    epoch_of = {record["step"]: record.get("training/epoch") for record in data.records}
    epochs = np.array([epoch_of.get(int(step)) for step in data.lengths[:, 0]], dtype=np.float64)
    tokens = data.lengths[:, 1]
    known = epochs[np.isfinite(epochs)]
    if not len(known) or known.min() == known.max():
        return {"all rollouts": tokens}
    return {"first epoch": tokens[epochs == known.min()], "last epoch": tokens[epochs == known.max()]}


def _points(records: Sequence[Record], key: str) -> list[plots.Point]:
    """(step, value) of every record with a finite value."""
    found = [(float(record["step"]), record.get(key)) for record in records]
    return [(step, float(value)) for step, value in found if value is not None and math.isfinite(value)]


def _total(records: Sequence[Record], key: str) -> float:
    """Sum over the records that have the key."""
    return sum(value for _, value in _points(records, key))


def _page(data: RunData) -> str:
    """The whole page."""
    title = html.escape(data.name)
    model = html.escape(str(data.setting("model", "path") or "unknown model"))
    experiment = html.escape(str(data.settings.get("experiment_name", "unknown experiment")))
    rows = "\n".join(
        f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(value)}</td></tr>'
        for name, value in key_figures(data)
    )
    sections = "\n".join(_section(picture) for picture in pictures(data))
    settings = html.escape(json.dumps(data.settings, indent=2, sort_keys=True))
    if not data.settings:
        settings = f"The run folder has no readable {SETTINGS_FILE}."
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} · Slipstream</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<header>
<p class="brand">Slipstream report</p>
<h1>{title}</h1>
<p>{experiment} · {model}</p>
</header>
<h2>Key figures</h2>
<table>
{rows}
</table>
<div class="pictures">
{sections}
</div>
<details>
<summary>Settings</summary>
<pre>{settings}</pre>
</details>
</main>
</body>
</html>
"""


def _section(picture: Picture) -> str:
    """A picture with its text, or the text alone."""
    title, text = html.escape(picture.title), html.escape(picture.text)
    if picture.figure is None:
        return f"<section><h2>{title}</h2><p>{text}</p></section>"
    encoded = base64.b64encode(plots.png(picture.figure)).decode()
    return (
        f"<section><h2>{title}</h2><figure>"
        f'<img src="data:image/png;base64,{encoded}" alt="{text}">'
        f"<figcaption>{text}</figcaption></figure></section>"
    )


_STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #f4f6f8; color: #27313b; font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { margin: 0; font-size: 1.7rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 0 0 .6rem; }
header p { margin: .2rem 0 1.6rem; color: #4d5a67; overflow-wrap: anywhere; }
header .brand { margin: 0; color: #1f5fa8; font-weight: 600; letter-spacing: .02em; }
table { border-collapse: collapse; width: 100%; background: #fff; border-radius: .5rem; margin-bottom:
1.5rem; } th, td { padding: .45rem .9rem; text-align: left; border-bottom: 1px solid #e7ebef;
vertical-align: top; } th { font-weight: 400; color: #4d5a67; } td { font-variant-numeric: tabular-nums;
font-weight: 600; } tr:last-child > * { border-bottom: 0; } .pictures { display: grid; gap: 1.25rem;
grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); } section, details { background:
#fff; border-radius: .5rem; padding: 1rem 1.1rem; } section p { margin: 0; color: #4d5a67; } figure {
margin: 0; } img { width: 100%; height: auto; display: block; } figcaption { margin-top: .6rem; font-size:
.9rem; color: #4d5a67; } details { margin-top: 1.25rem; } summary { cursor: pointer; font-weight: 600; } pre
{ overflow-x: auto; font-size: .85rem; line-height: 1.45; }
"""
