"""Every user mistake is one line that helps; every right input arrives unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slipstream.conf.describe import all_keys, allowed, default_tree
from slipstream.conf.schema import ProofConfig, Settings
from slipstream.trainer.config import check_paths, load_settings, validate
from slipstream.trainer.errors import ConfigError

# What was typed, and words that the one line must hold.
MISTAKES = [
    (["engine.max_lve_requests=3"], ["engine.max_lve_requests=3", "nearest: engine.max_live_requests"]),
    (["num_steps=3"], ["num_steps=3", "nearest: algo.num_steps"]),
    (["+unknown=1"], ["+unknown=1", "allowed keys and groups: experiment_name, run, model", "nearest:"]),
    (["+engine.unknown=1"], ["engine.unknown", "allowed keys of engine: name, max_live_requests"]),
    (["++x=1"], ["++x=1", "there is no key 'x'", "nearest:"]),
    (["algo.num_steps=abc"], ["algo.num_steps=abc", "allowed: an integer of at least 1"]),
    (["algo.num_steps=2.5"], ["algo.num_steps=2.5", "allowed: an integer of at least 1"]),
    (["algo.num_steps=2.0"], ["algo.num_steps=2.0", "allowed: an integer"]),
    (["algo.num_steps=true"], ["algo.num_steps=true", "allowed: an integer"]),
    (["algo.num_steps=null"], ["algo.num_steps=null", "allowed: an integer"]),
    (["algo.num_steps="], ["algo.num_steps=", "allowed: an integer"]),
    (["algo.learning_rate=nan"], ["algo.learning_rate=nan", "allowed: a number above 0"]),
    (["algo.learning_rate=-1"], ["algo.learning_rate=-1", "allowed: a number above 0"]),
    (["cluster.num_workers=0"], ["cluster.num_workers=0", "allowed: an integer of at least 1"]),
    (["data.task.max_level=9"], ["data.task.max_level=9", "of at least 1 and at most 6"]),
    (["run.exist=replce"], ["run.exist=replce", "fail, resume, replace", "nearest: run.exist=replace"]),
    (["run.name=3"], ["run.name=3", "allowed: text", "quotes"]),
    (["run.name=../other"], ["run.name=../other", "allowed: text that matches"]),
    (["sampling=5"], ["sampling=5", "a section with the keys num_samples_per_prompt"]),
    (["sampling={top_k: 0, foo: 2}"], ["sampling.foo=2", "allowed keys of sampling: num_samples_per_prompt"]),
    (["tracking.tags=[1]"], ["tracking.tags[0]=1", "a list [a, b] of text"]),
    (["drafter=sufix"], ["drafter=sufix", "ngram, off, suffix", "nearest: drafter=suffix"]),
    (["drafter=null"], ["drafter=null", "ngram, off, suffix"]),
    (["drafter=[off]"], ["drafter=[off]", "ngram, off, suffix"]),
    (["experiment=quikstart"], ["experiment=quikstart", "nearest: experiment=quickstart"]),
    (["+experiment=quickstart"], ["+experiment=quickstart", "allowed: experiment=quickstart"]),
    (["+algo.num_steps=3"], ["in the configuration already", "allowed: algo.num_steps=3"]),
    (["engin=torch"], ["engin=torch", "nearest: engine"]),
    (["engine@x=torch"], ["engine@x=torch", "allowed"]),
    (["hydra.run.dir=x"], ["hydra.run.dir", "nearest: run.dir"]),
    (["foo"], ["foo: ", "allowed: KEY=VALUE or GROUP=CHOICE"]),
    (["a=[1"], ["a=[1: ", "allowed: KEY=VALUE or GROUP=CHOICE"]),
    ([""], ["an empty override", "allowed: KEY=VALUE or GROUP=CHOICE"]),
    (["algo.num_steps=1,2"], ["algo.num_steps=1,2", "KEY=[a,b]"]),
    (["~engine.name"], ["~engine.name", "cannot be deleted", "engine.name=..."]),
    (["~engine"], ["~engine", "cannot be deleted"]),
    (["run.name=${foo.bar}"], ["run.name", "'foo.bar' not found"]),
    (["run.name=${oc.env:SLIPSTREAM_NO_SUCH_VARIABLE}"], ["run.name", "SLIPSTREAM_NO_SUCH_VARIABLE"]),
    (["data=parquet"], ["data.train_path is null"]),
    (["data.train_path=x.parquet"], ["data.train_path=x.parquet", "data=parquet"]),
    (["reward.function=a.b"], ["reward.function=a.b", "reward.rule=custom"]),
    (["reward.rule=custom"], ["reward.function is null"]),
    (["sampling.num_samples_per_prompt=1"], ["sampling.num_samples_per_prompt=1", "at least 2"]),
    (["sampling.top_p=0.9"], ["sampling.top_p=0.9", "top_p=1"]),
    (["algo.num_updates_per_step=3"], ["algo.num_updates_per_step=3", "128 samples"]),
    (["algo.max_staleness_steps=-1"], ["algo.max_staleness_steps=-1", "allowed: an integer of at least 0"]),
    (["algo.in_flight=abort"], ["algo.in_flight=abort", "allowed: continue, recompute, drain"]),
    (["algo.advantage=gae"], ["algo.advantage=gae", "allowed: grpo, dr_grpo, rloo, reinforce_pp_baseline"]),
    (["algo=dappo"], ["algo=dappo", "nearest: algo=dapo"]),
    (["data=parquet", "data.train_path=a/b", "evaluation.every_steps=2"], ["data.validation_path is null"]),
    (["evaluation.at_start=true"], ["evaluation.at_start=true", "every_steps of at least 1"]),
    (["engine.max_forward_tokens=8"], ["engine.max_forward_tokens=8", "engine.max_live_requests=64"]),
    (["data.task.min_level=4", "data.task.max_level=2"], ["data.task.min_level=4", "data.task.max_level=2"]),
]


@pytest.mark.parametrize(("overrides", "words"), MISTAKES, ids=lambda value: " ".join(value)[:40])
def test_a_mistake_is_one_helpful_line(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(overrides)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_without_overrides_the_settings_are_the_schemas_defaults() -> None:
    assert load_settings([]) == Settings()


def test_every_key_of_the_schema_can_be_overridden_with_its_default() -> None:
    overrides = []
    for key in all_keys():
        value: Any = default_tree()
        for part in key.split("."):
            value = value[part]
        if isinstance(value, int | float | str):
            overrides.append(f'{key}="{value}"' if isinstance(value, str) else f"{key}={value}")
    assert len(overrides) > 50
    assert load_settings(overrides) == Settings()


def test_every_key_can_be_described() -> None:
    for key in all_keys():
        assert allowed(key)


@pytest.mark.parametrize(
    ("overrides", "key", "expected"),
    [
        (["algo.learning_rate=1"], "algo.learning_rate", 1.0),
        (["algo.learning_rate=1e-6"], "algo.learning_rate", 1e-6),
        (["algo.num_steps=3", "algo.num_steps=5"], "algo.num_steps", 5),
        (["++algo.num_steps=5"], "algo.num_steps", 5),
        (["drafter=ngram", "drafter=off"], "drafter.name", "off"),
        (["drafter.name=off"], "drafter.name", "off"),
        (["budget=off"], "budget.name", "off"),
        (["drafter=ngram"], "drafter.max_draft_tokens", 8),
        (["drafter.max_draft_tokens=3", "drafter=ngram"], "drafter.max_draft_tokens", 3),
        (["tracking.tags=[a,b]"], "tracking.tags", ["a", "b"]),
        (["run.name=${experiment_name}-x", "experiment=quickstart"], "run.name", "quickstart-x"),
        (["+engine.extra_args.foo=1"], "engine.extra_args", {"foo": 1}),
        (["engine.extra_args.foo=[1,a]"], "engine.extra_args", {"foo": [1, "a"]}),
        (["sampling={max_new_tokens: 7}"], "sampling.max_new_tokens", 7),
        (["experiment=quickstart", "experiment=null"], "experiment_name", "custom"),
        (["experiment=quickstart_short"], "data.task.num_train", 16),
        (["experiment=quickstart_short", "algo.num_steps=2"], "algo.num_steps", 2),
        (["model.path=~/m"], "model.path", str(Path.home() / "m")),
        (["cluster=existing"], "cluster.address", "auto"),
        (["tracking=disabled"], "tracking.mode", "disabled"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_right_input_arrives(overrides: list[str], key: str, expected: object) -> None:
    value: object = load_settings(overrides)
    for part in key.split("."):
        value = getattr(value, part)
    assert value == expected
    assert type(value) is type(expected)


def test_saved_settings_are_the_base_and_survive_json() -> None:
    saved = load_settings(["experiment=quickstart_short", "drafter=ngram"]).model_dump(mode="json")
    assert load_settings([], base=saved).model_dump(mode="json") == saved
    again = load_settings(["algo.num_steps=9", "budget=off"], base=saved)
    assert (again.drafter.name, again.budget.name, again.algo.num_steps) == ("ngram", "off", 9)
    assert again.experiment_name == "quickstart_short"


def test_several_mistakes_are_counted() -> None:
    with pytest.raises(ConfigError, match="and 1 more"):
        validate({"algo": {"num_steps": 0, "warmup_steps": -1}})


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / "experiment" / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return folder


def test_a_folder_of_ones_own_adds_choices(tmp_path: Path) -> None:
    text = '# @package _global_\ndefaults:\n  - override /drafter: "off"\n  - override /data: parquet\n'
    text += "data: {train_path: ~/x.parquet}\n"
    settings = load_settings(["experiment=mine"], config_dir=write(tmp_path, "mine", text))
    assert settings.drafter.name == "off"
    assert settings.data.train_path == str(Path.home() / "x.parquet")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("# @package _global_\nalgo:\n  num_stepz: 3\n", "nearest: algo.num_steps"),
        ("# @package _global_\ndefaults:\n  - override /drafter: ngrm\n", "drafter/ngrm"),
        ("algo:\n  num_steps: 3\n", "# @package _global_"),
        ("a: [1\n", "mine.yaml"),
    ],
    ids=["unknown key", "unknown choice", "no package line", "torn YAML"],
)
def test_mistakes_in_a_file_are_one_line_too(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(["experiment=mine"], config_dir=write(tmp_path, "mine", text))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_choice_cannot_hide_a_shipped_one(tmp_path: Path) -> None:
    folder = write(tmp_path, "quickstart", "# @package _global_\nalgo: {num_steps: 3}\n")
    with pytest.raises(ConfigError, match="same name"):
        load_settings(["experiment=quickstart"], config_dir=folder)
    with pytest.raises(ConfigError, match="no such folder"):
        load_settings([], config_dir=tmp_path / "nowhere")


def paths_of(**changes: object) -> Settings:
    tree = {"run": {"dir": "."}, "model": {"path": "org/name"}}
    return validate(tree | changes)


def test_hub_ids_are_not_paths() -> None:
    check_paths(paths_of(data={"source": "parquet", "train_path": "org/name"}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"path": "/no/such/model"}}, ["model.path=/no/such/model", "no such folder"]),
        ({"model": {"path": "no_such_model"}}, ["model.path=no_such_model", "org/name"]),
        ({"model": {"path": "."}}, ["model.path=.", "config.json"]),
        ({"model": {"path": "builtin:chain_sm"}}, ["builtin:chain_sm", "nearest: builtin:chain_sum"]),
        ({"data": {"source": "parquet", "train_path": "a/b.parquet"}}, ["data.train_path=a/b.parquet"]),
        (
            {"data": {"source": "parquet", "train_path": "org/name", "validation_path": "./x"}},
            ["data.validation_path=./x", "no such file"],
        ),
        ({"run": {"dir": "/dev/null/runs"}}, ["run.dir=/dev/null/runs", "/dev/null is a file"]),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_bad_path_is_found_before_anything_starts(
    changes: dict[str, object], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        check_paths(paths_of(**changes))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_bad_paths_are_one_line_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        check_paths(paths_of(model={"path": "./m"}, run={"dir": "/dev/null/x"}))
    lines = str(caught.value).splitlines()
    assert [line.partition("=")[0] for line in lines] == ["model.path", "run.dir"]


def test_the_built_in_policy_is_found_by_name() -> None:
    check_paths(validate({}))


def test_proof_steps_begin_with_the_first_one() -> None:
    assert list(ProofConfig(every_steps=8, first_step=8).steps(32)) == [8, 16, 24, 32]
    assert list(ProofConfig(every_steps=2, first_step=3).steps(6)) == [3, 5]
    assert list(ProofConfig().steps(32)) == []
