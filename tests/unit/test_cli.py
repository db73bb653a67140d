"""The command: what it prints, what it exits with, which folder it chooses and what it does not import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from slipstream import experiments
from slipstream.experiments import bench
from slipstream.trainer.config import load_settings
from slipstream.trainer.errors import ConfigError
from slipstream.trainer.main import main
from slipstream.trainer.run_folder import NEWEST, Job, open_run_dir, resolve_job

Output = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def more_benches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose benches are found beside the shipped ones."""
    folder = tmp_path_factory.mktemp("more_benches")
    monkeypatch.setattr(experiments, "__path__", [*experiments.__path__, str(folder)])
    return folder


def write_bench(folder: Path, name: str, code: str) -> None:
    (folder / name).mkdir()
    (folder / name / "run.py").write_text(code, encoding="utf-8")


def start(*overrides: str, resume: str | None = None) -> Job:
    """What `slipstream train` does up to the moment the job would run."""
    job = resolve_job(overrides, resume, None)
    open_run_dir(job)
    return job


def saved(job: Job) -> dict[str, Any]:
    return json.loads((job.run_dir / "settings.json").read_text(encoding="utf-8"))


def test_a_dry_run_prints_the_plan_and_touches_nothing(capsys: Output, empty_folder: Path) -> None:
    assert main(["train", "experiment=quickstart", "--dry-run", "algo.num_steps=8"]) == 0
    assert "8 steps = 32 prompts = 256 samples" in capsys.readouterr().out
    assert list(empty_folder.iterdir()) == []


def test_a_dry_run_needs_neither_torch_nor_ray() -> None:
    code = (
        "import sys\n"
        "from slipstream.trainer.main import main\n"
        "assert not {'hydra', 'pydantic'} & set(sys.modules)\n"
        "assert main(['train', 'experiment=quickstart', '--dry-run']) == 0\n"
        "assert main(['bench']) == 0\n"
        "heavy = {'torch', 'ray', 'transformers', 'wandb', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "algo.num_stepz=1"], "nearest: algo.num_steps"),
        (["train", "--dryrun"], "--dryrun"),
        (["trian"], "nearest: train"),
        (["bench", "no_such_bench_at_all"], "no such bench"),
        (["train", "--resume", "nowhere"], "--resume nowhere: it holds no settings.json"),
        (["train", "--resume", "experiment=quickstart"], "no run of experiment 'quickstart' under runs"),
        (["train", "model.path=./none", "--dry-run"], "model.path=./none"),
        (["train", "--config-dir", "none"], "--config-dir none"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(argv: list[str], words: str, capsys: Output) -> None:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("slipstream: ")
    assert words in captured.err


@pytest.mark.parametrize("argv", [[], ["--help"], ["help"]])
def test_help_shows_commands_and_three_examples(argv: list[str], capsys: Output) -> None:
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert text.partition("examples:")[2].count("  slipstream ") == 3
    for command in ("train", "bench", "sft", "data"):
        assert f"\n  {command} " in text


def test_train_help_is_not_an_error(capsys: Output) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "--help"])
    assert caught.value.code == 0
    assert "--dry-run" in capsys.readouterr().out


def test_version_and_config_are_printed(capsys: Output) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("slipstream 0.")
    assert main(["train", "experiment=quickstart_short", "--print-config", "run.name=x"]) == 0
    text = capsys.readouterr().out
    assert "experiment_name: quickstart_short\n" in text
    assert "  num_steps: 20\n" in text


def test_ctrl_c_is_one_line_and_130(more_benches: Path, capsys: Output) -> None:
    code = '"""Who interrupts?"""\ndef add_arguments(parser): pass\ndef run(args): raise KeyboardInterrupt\n'
    write_bench(more_benches, "endless", code)
    assert main(["bench", "endless"]) == 130
    assert capsys.readouterr().err == "slipstream: interrupted\n"


def test_a_new_run_is_named_after_experiment_and_time_and_keeps_its_settings() -> None:
    job = resolve_job(["experiment=quickstart"], None, None, now=datetime(2026, 1, 31, 12, 0, 5))
    assert job.run_dir == Path("runs/quickstart-20260131-120005")
    open_run_dir(job)
    assert saved(job)["run"] == {"name": job.run_dir.name, "dir": "runs", "seed": 0, "exist": "fail"}
    assert load_settings([], base=saved(job)) == job.settings
    twin = resolve_job(["experiment=quickstart"], None, None, now=datetime(2026, 1, 31, 12, 0, 5))
    assert twin.run_dir == Path("runs/quickstart-20260131-120005-2")


def test_an_existing_run_is_kept_unless_told_otherwise() -> None:
    first = start("run.name=a")
    (first.run_dir / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"runs/a exists already; allowed: run\.exist=resume"):
        start("run.name=a")
    again = start("run.name=a", "run.exist=resume")
    assert again.resume
    assert (again.run_dir / "metrics.jsonl").exists()
    fresh = start("run.name=a", "run.exist=replace", "run.seed=3")
    assert not fresh.resume
    assert not (fresh.run_dir / "metrics.jsonl").exists()
    assert saved(fresh)["run"]["seed"] == 3


def test_a_run_appears_with_its_settings_and_an_empty_folder_is_no_run(empty_folder: Path) -> None:
    (empty_folder / "runs" / "a").mkdir(parents=True)
    job = start("run.name=a")
    assert saved(job)["run"]["name"] == "a"
    assert [path.name for path in (empty_folder / "runs").iterdir()] == ["a"]
    # Another job took the name after this one had looked: neither is mixed into the other.
    late = resolve_job(["run.name=b"], None, None)
    start("run.name=b")
    with pytest.raises(ConfigError, match=r"runs/b cannot be written \(Directory not empty\)"):
        open_run_dir(late)
    assert [path.name for path in sorted((empty_folder / "runs").iterdir())] == ["a", "b"]


def test_resume_of_a_run_that_does_not_exist_yet_starts_it() -> None:
    assert not start("run.name=a", "run.exist=resume").resume


def test_replace_never_deletes_what_is_not_a_run(empty_folder: Path) -> None:
    precious = empty_folder / "runs" / "a" / "thesis.tex"
    precious.parent.mkdir(parents=True)
    precious.touch()
    with pytest.raises(ConfigError, match="not a run folder"):
        start("run.name=a", "run.exist=replace")
    assert precious.exists()


def test_a_resumed_run_starts_from_its_own_settings() -> None:
    first = start("experiment=quickstart_short", "algo.num_steps=3", "drafter=ngram")
    again = start("algo.num_steps=9", resume=str(first.run_dir))
    assert again.resume
    assert again.run_dir == first.run_dir
    settings = again.settings
    assert (settings.experiment_name, settings.algo.num_steps, settings.drafter.name) == (
        "quickstart_short",
        9,
        "ngram",
    )


def test_the_newest_run_of_the_experiment_is_resumed() -> None:
    wanted = start("experiment=quickstart_short", "run.name=old", "algo.num_steps=3")
    other = start("experiment=quickstart", "run.name=other")
    newest = start("experiment=quickstart_short", "run.name=new", "algo.num_steps=3")
    for age_s, job in enumerate((newest, other, wanted)):
        time_s = 1_700_000_000 - age_s
        os.utime(job.run_dir / "settings.json", (time_s, time_s))
    again = resolve_job(["experiment=quickstart_short"], NEWEST, None)
    assert again.run_dir == newest.run_dir
    assert again.settings.algo.num_steps == 3, "the experiment's 4 steps must not undo what was typed at the start"


@pytest.mark.parametrize(
    "override",
    [
        "run.seed=1",
        "data.task.seed=1",
        "sampling.temperature=0.5",
        "experiment=quickstart",
        "algo.learning_rate=0.5",
        "algo.correction.weights=token",
        "reward.rule=math",
    ],
)
def test_what_a_run_computes_cannot_change_on_resume(override: str) -> None:
    first = start("experiment=quickstart_short", "run.name=a")
    with pytest.raises(ConfigError) as caught:
        start(override, resume=str(first.run_dir))
    assert override.partition("=")[0] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_refused_resume_names_every_differing_key_with_both_values() -> None:
    first = start("experiment=quickstart_short", "run.name=a", "algo.kl_coef=0.1", "algo.num_steps=3")
    changes = ["run.seed=7", "algo.kl_coef=0.25", "model.dtype=bfloat16", "cluster.num_workers=1", "algo.num_steps=9"]
    for resume in (lambda: start(*changes, resume="runs/a"), lambda: start("run.exist=resume", *changes, *same(first))):
        with pytest.raises(ConfigError) as caught:
            resume()
        text = str(caught.value)
        assert text.startswith(
            "algo.kl_coef=0.25 (was 0.1), model.dtype=bfloat16 (was float32), run.seed=7 (was 0): runs/a was started"
        )
        assert "cluster" not in text, "how many workers there are changes no token"
        assert "num_steps" not in text, "a constant learning rate does not know the last step"
    assert saved(first)["run"]["seed"] == 0, "nothing is written by a resume that is refused"


def same(job: Job) -> list[str]:
    return ["experiment=quickstart_short", f"run.name={job.run_dir.name}"]


@pytest.mark.parametrize(
    "override",
    [
        "run.dir=runs",
        "cluster.num_workers=3",
        "tracking=disabled",
        "checkpoint.keep_best=2",
        "drafter=off",
        "budget=fixed",
        "engine.max_live_requests=3",
        "evaluation.every_steps=2",
        "proof.every_steps=1",
        "watchdog.timeout_s=7",
        "reward.timeout_s=7",
    ],
)
def test_what_a_run_does_not_depend_on_may_change_on_resume(override: str) -> None:
    first = start("experiment=quickstart_short", "run.name=a")
    assert start(override, resume=str(first.run_dir)).resume


def test_more_steps_are_another_run_where_the_learning_rate_falls_towards_the_last() -> None:
    start("experiment=quickstart_short", "run.name=a", "algo.schedule=cosine", "algo.num_steps=3")
    with pytest.raises(ConfigError, match=r"^algo\.num_steps=9 \(was 3\): runs/a was started otherwise"):
        start("algo.num_steps=9", resume="runs/a")


def test_broken_saved_settings_are_one_line() -> None:
    job = start("run.name=a")
    (job.run_dir / "settings.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"settings\.json: cannot be read"):
        start(resume="runs/a")


def test_benches_are_listed_with_their_questions(capsys: Output) -> None:
    assert main(["bench"]) == 0
    text = capsys.readouterr().out
    for name, question in bench.find_benches().items():
        assert name in text
        assert question
        assert question in text


def test_a_bench_is_run_printed_and_written_with_its_circumstances(
    empty_folder: Path, more_benches: Path, capsys: Output
) -> None:
    write_bench(
        more_benches,
        "double",
        '"""What is twice a number?"""\n'
        "def add_arguments(parser):\n    parser.add_argument('--number', type=int, default=2)\n"
        "def run(args):\n    return {'twice': 2 * args.number, 'parts': {'half': args.number / 2}}\n",
    )
    assert bench.find_benches()["double"] == "What is twice a number?"
    assert main(["bench", "double", "--number", "21", "--json", "out.json"]) == 0
    assert "twice       42" in capsys.readouterr().out
    record = json.loads((empty_folder / "out.json").read_text(encoding="utf-8"))
    assert set(record) == {"name", "result", "hardware", "commit", "command", "date", "versions"}
    assert record["result"] == {"twice": 42, "parts": {"half": 10.5}}
    assert record["command"] == "slipstream bench double --number 21 --json out.json"
    assert record["hardware"]["cores"] == len(os.sched_getaffinity(0))
    assert record["versions"]["torch"].startswith("2.")
    assert main(["bench", "double", "--json", "no/such/out.json"]) == 2
    assert main(["bench", "dubble"]) == 2
    assert "nearest: double" in capsys.readouterr().err
