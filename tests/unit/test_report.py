"""The report of a run folder: self-contained, truthful about what is missing, and safe with hostile names."""

from __future__ import annotations

import base64
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slipstream.conf.schema import Settings
from slipstream.trainer.errors import SlipstreamError
from slipstream.trainer.report import key_figures, pictures, read_run, write_report
from slipstream.trainer.report_plots import moving_average, moving_average_width, rollout_time_figure

PNG = b"\x89PNG\r\n\x1a\n"


class Page(HTMLParser):
    """Collects what the tests look at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def spec(sample: int) -> dict[str, Any]:
    return {"by_source": {"history": 2 * sample} if sample else {}}


def make_run(
    run_dir: Path,
    num_steps: int,
    proof_steps: tuple[int, ...] = (),
    drafting: bool = True,
    num_epochs: int = 2,
) -> Path:
    """A run folder as a job leaves it, with a metrics line torn at the end."""
    run_dir.mkdir(parents=True, exist_ok=True)
    settings = Settings().model_dump()
    settings["drafter"]["name"] = "suffix" if drafting else "off"
    settings["experiment_name"] = "<script>alert(1)</script>"
    (run_dir / "settings.json").write_text(json.dumps(settings))
    metrics, rollouts = [], []
    for step in range(1, num_steps + 1):
        record: dict[str, Any] = {
            "step": step,
            "training/epoch": (step - 1) * num_epochs // num_steps,
            "critic/rewards/mean": step / num_steps,
            "timing_s/gen": 2.0,
            "timing_s/step": 4.0,
            "perf/throughput": 1000.0 * step,
            "das/samples_left_out": 1,
        }
        if drafting:
            record |= {"das/accepted_per_round": 0.5 * step, "das/drafted": 100, "das/accepted": 60}
            record |= {"drafter/reliability/15": 0.2, "drafter/reliability_tokens/15": 30}
            record |= {"drafter/reliability/85": step / num_steps, "drafter/reliability_tokens/85": 70}
        if step in proof_steps:
            record |= {
                "proof/gen_on_s": 2.0,
                "proof/gen_off_s": 5.0,
                "proof/tokens_compared": 700,
                "proof/tokens_different": 0,
            }
        metrics.append(json.dumps(record))
        rollouts.extend(
            json.dumps({"step": step, "num_tokens": 10 * step + sample, "tokens": [1], "spec": spec(sample)})
            for sample in range(4)
        )
    (run_dir / "metrics.jsonl").write_text("\n".join(metrics) + '\n{"step": 99, "crit')
    (run_dir / "rollouts.jsonl").write_text("\n".join(rollouts) + "\n")
    return run_dir


def test_the_page_is_one_self_contained_file_with_its_pictures(tmp_path: Path) -> None:
    path = write_report(make_run(tmp_path / "run", 12, proof_steps=(6, 12)))
    assert path == tmp_path / "run" / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    images = page.all("img")
    assert len(images) == 6
    for image in images:
        source = image["src"] or ""
        assert source.startswith("data:image/png;base64,")
        assert base64.b64decode(source.split(",", 1)[1]).startswith(PNG)
        assert len(image["alt"] or "") > 20
    assert not page.all("script")
    assert not page.all("link")
    assert all("href" not in attributes for _, attributes in page.tags)
    assert "<script>alert(1)</script>" in page.text, "names from outside are shown as text"
    assert any("viewport" in (meta.get("name") or "") for meta in page.all("meta"))
    assert page.all("details")
    assert '"max_new_tokens": 512' in page.text
    assert sorted(item.name for item in path.parent.iterdir()) == [
        "metrics.jsonl",
        "report.html",
        "rollouts.jsonl",
        "settings.json",
    ]


def test_key_figures_are_the_records_numbers(tmp_path: Path) -> None:
    rows = dict(key_figures(read_run(make_run(tmp_path, 10, proof_steps=(5, 10)))))
    assert rows == {
        "Steps": "10",
        "Mean reward, first → last 3 steps": "0.200 → 0.900",
        "Time in rollouts": "20s (50% of 40s)",
        "Median throughput of the rollout phase": "5,500 tokens/s",
        "Draft tokens accepted": "600 of 1,000 (60%)",
        "Rollout time with → without speculation, 2 replays": "4.00 s → 10.00 s (2.50×)",
        "Tokens compared in replays": "1,400",
        "Tokens that differed": "0",
        "Samples left out": "10",
        "Unreadable lines in the records (torn by a crash)": "1",
    }


def test_the_pictures_hold_the_data(tmp_path: Path) -> None:
    reward, times, lengths, accepted, reliability, sources = pictures(
        read_run(make_run(tmp_path, 10, proof_steps=(5, 10)))
    )
    assert reward.figure is not None
    dots, average = reward.figure.axes[0].lines
    np.testing.assert_allclose(dots.get_ydata(), np.arange(1, 11) / 10)
    assert list(average.get_ydata())[2] == pytest.approx(0.2)
    assert times.figure is not None
    lines = {line.get_label(): line for line in times.figure.axes[0].lines}
    np.testing.assert_allclose(lines["replay, without speculation"].get_xydata(), [[5, 5], [10, 5]])
    assert [text.get_text() for text in times.figure.axes[0].texts] == ["2.50×", "2.50×"]
    assert "2.50 times as long; 0 of 1,400 tokens differed" in times.text
    assert lengths.figure is not None
    labels = [text.get_text() for text in lengths.figure.axes[0].get_legend().get_texts()]
    assert labels == ["first epoch (n=20)", "last epoch (n=20)"]
    assert "last epoch: median 82, 99th percentile 103, longest 103 tokens" in lengths.text
    assert accepted.figure is not None
    assert accepted.figure.axes[0].lines[0].get_ydata()[-1] == 5.0
    assert reliability.figure is not None
    np.testing.assert_allclose(reliability.figure.axes[0].lines[1].get_xydata(), [[0.15, 0.2], [0.85, 0.55]])
    assert "1,000 draft tokens" in reliability.text
    assert "0.225 on average" in reliability.text
    assert sources.figure is not None
    live, rows = sources.figure.axes
    ends = sorted(path.vertices[-1][0] for path in rows.collections[0].get_paths())
    last = read_run(tmp_path).last_step
    assert ends[-1] == max(tokens for tokens, _ in last)
    assert live.lines[0].get_ydata()[0] == len(last)
    assert [text.get_text() for text in live.get_legend().get_texts()] == ["no draft accepted", "from history"]


@pytest.mark.parametrize("num_steps", [1, 2])
def test_short_jobs(tmp_path: Path, num_steps: int) -> None:
    page = Page(write_report(make_run(tmp_path, num_steps, num_epochs=1)).read_text(encoding="utf-8"))
    assert len(page.all("img")) == 6
    assert "all rollouts: median" in page.text
    assert "No step was replayed without speculation." in page.text


def test_drafting_off(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path, 4, drafting=False)).read_text(encoding="utf-8"))
    assert len(page.all("img")) == 3
    assert "This job ran with drafting off." in page.text
    assert "No draft token carried an estimate." in page.text
    assert "(drafting off)" in page.text


def test_missing_parts_are_said_on_the_page(tmp_path: Path) -> None:
    make_run(tmp_path, 3)
    (tmp_path / "settings.json").unlink()
    (tmp_path / "rollouts.jsonl").write_text('{"step": 1, "num_tokens": null}\n')
    text = Page(write_report(tmp_path).read_text(encoding="utf-8")).text
    assert "The run folder has no readable rollouts.jsonl." in text
    assert "The run folder has no readable settings.json." in text
    assert dict(key_figures(read_run(tmp_path)))["Unreadable lines in the records (torn by a crash)"] == "2"


def test_a_step_without_reward_is_no_point(tmp_path: Path) -> None:
    make_run(tmp_path, 1)
    with (tmp_path / "metrics.jsonl").open("w") as file:
        file.write('{"step": 1, "critic/rewards/mean": null, "timing_s/gen": 1.0}\n')
    reward = pictures(read_run(tmp_path))[0]
    assert reward.figure is None
    assert reward.text == "No step has a mean reward."


def test_a_folder_that_is_no_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SlipstreamError, match=r"metrics\.jsonl holds no finished step"):
        write_report(tmp_path)


def test_a_slowdown_is_drawn_as_one() -> None:
    figure = rollout_time_figure([(1, 2.0)], [(1, 2.0)], [(1, 1.0)], drafting=True)
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.50×"]
    assert figure.axes[0].get_ylim()[0] == 0


def test_moving_average() -> None:
    np.testing.assert_allclose(moving_average(np.array([1.0, 3, 5, 7]), 2), [1, 2, 4, 6])
    assert [moving_average_width(num) for num in (1, 2, 10, 100, 1000)] == [1, 2, 3, 10, 25]
    assert math.isclose(moving_average(np.array([4.0]), 3)[0], 4.0)
