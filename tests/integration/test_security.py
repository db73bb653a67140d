"""What a job shows to others: ports, pickles, secrets. A whole job is run once and looked at from outside."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors import safe_open

from slipstream.rollout.model_loader import load_policy
from slipstream.trainer.errors import ConfigError
from slipstream.trainer.run_folder import resolve_job
from tests.processes import exposed, listening_sockets
from tests.tiny_models import tiny_model

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("conf", "drafter", "experiments", "kernels", "rollout", "trainer")
SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_ThisIsNoTokenButItLooksLikeOne12",
    "RAY_AUTH_TOKEN": "feedfacefeedfacefeedfacefeedfacefeedfacefeedfacefeedfacefeedface",
}
JOB = [
    "experiment=quickstart_short",
    "algo.num_steps=2",
    "data.task.num_train=8",
    "sampling.max_new_tokens=128",
    "checkpoint.every_steps=1",
    "proof.every_steps=0",
    "run.name=seen",
]
DEADLINE_S = 400.0


@dataclass(frozen=True)
class Seen:
    """A finished job. output: of the command; ray_dir: Ray's own files; listening: (program, address) of every
    listening TCP socket of the job's processes at any time."""

    run_dir: Path
    output: str
    ray_dir: Path
    listening: set[tuple[str, str]]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    folder = tmp_path_factory.mktemp("seen")
    ray_dir = Path(tempfile.mkdtemp(prefix="slip"))  # short: Ray's sockets lie below it
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    environment |= SECRETS | {"RAY_TMPDIR": str(ray_dir), "RAY_USAGE_STATS_ENABLED": "0"}
    code = "import sys; from slipstream.trainer.main import main; sys.exit(main())"
    listening: set[tuple[str, str]] = set()
    try:
        with open(folder / "output", "wb") as output:
            job = subprocess.Popen(
                [sys.executable, "-c", code, "train", *JOB], cwd=folder, env=environment, stdout=output, stderr=output
            )
        deadline = time.monotonic() + DEADLINE_S
        try:
            while job.poll() is None and time.monotonic() < deadline:
                listening |= listening_sockets(job.pid)
                time.sleep(0.2)
        finally:
            job.kill()
            job.wait(20)
        text = (folder / "output").read_text()
        assert job.returncode == 0, text
        yield Seen(folder / "runs" / "seen", text, ray_dir, listening)
    finally:
        shutil.rmtree(ray_dir, ignore_errors=True)


@pytest.mark.slow  # a whole job
def test_every_socket_of_a_local_job_is_on_loopback(seen: Seen) -> None:
    programs = {title for title, _ in seen.listening}
    assert any("gcs_server" in title for title in programs), "Ray's own servers were not seen"
    assert any("StreamingWorker" in title for title in programs), "the workers' servers were not seen"
    assert exposed(seen.listening) == []


@pytest.mark.slow  # a whole job
def test_no_secret_is_written_anywhere(seen: Seen) -> None:
    files = [path for folder in (seen.run_dir, seen.ray_dir) for path in folder.rglob("*") if path.is_file()]
    assert any("wandb" in path.parts for path in files)
    assert any(path.name.startswith("raylet") for path in files), "Ray's logs were not looked at"
    for path in files:
        content = path.read_bytes()
        told = [name for name, value in SECRETS.items() if value.encode() in content]
        assert told == [], f"{path} holds {told}"
    assert not [name for name, value in SECRETS.items() if value in seen.output]


@pytest.mark.slow  # a whole job
def test_a_checkpoint_holds_no_format_that_can_run_code(seen: Seen) -> None:
    files = [path for path in seen.run_dir.joinpath("checkpoints").rglob("*") if path.is_file()]
    assert sum(path.suffix == ".safetensors" for path in files) == 4
    for path in files:
        assert path.suffix in (".safetensors", ".json", ".jinja") or path.name == "COMPLETE", path
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as tensors:
                assert len(tensors.keys()) > 0
        else:
            path.read_text(encoding="utf-8")
        if path.suffix == ".json" or path.name == "COMPLETE":
            json.loads(path.read_text(encoding="utf-8"))
    assert {path.suffix for path in seen.run_dir.joinpath("history").iterdir()} == {".log"}


FORBIDDEN_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {"torch.load", "torch.save", "torch.jit.load", "pd.read_pickle", "pandas.read_pickle", "yaml.load"}
FORBIDDEN_ARGUMENTS = {
    ("allow_pickle", True),
    ("weights_only", False),
    ("safe_serialization", False),
    ("use_safetensors", False),
    ("trust_remote_code", True),
}
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def dangers(text: str) -> list[str]:
    """What a file's code could use to run what a file or another machine says."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = {(node.module or "").partition(".")[0], *(alias.name for alias in node.names)}
            found += sorted(names & FORBIDDEN_MODULES)
            found += [f"torch.{one.name}" for one in node.names if f"{node.module}.{one.name}" in FORBIDDEN_CALLS]
        elif isinstance(node, ast.Call):
            if (called := ast.unparse(node.func)) in FORBIDDEN_CALLS:
                found.append(called)
            values = [(one.arg, one.value.value) for one in node.keywords if isinstance(one.value, ast.Constant)]
            found += [f"{name}={value}" for name, value in values if (name, value) in FORBIDDEN_ARGUMENTS]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_is_unpickled(path: Path) -> None:
    assert dangers(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "import numpy, dill as d",
        "from joblib import load",
        "from ray import cloudpickle",
        "from torch import load",
        "def f(path):\n    return torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
    ],
)
def test_the_search_for_pickles_finds_them(text: str) -> None:
    assert dangers(text)


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple:
        return Path.touch, (self.proof,)


def test_weights_in_a_pickle_are_refused_unread(tmp_path: Path) -> None:
    tiny_model("qwen3").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "proof")))
    with pytest.raises(OSError, match="safetensors"):
        load_policy(tmp_path / "model")
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize(
    ("override", "key", "secret"),
    [
        ("+engine.extra_args.api_key=Tr0ub4dor", "engine.extra_args.api_key", "Tr0ub4dor"),
        ("+engine.extra_args.deep={x:[a,hf_abcdefghijklmnopqrst]}", "engine.extra_args.deep.x[1]", "hf_abcdefgh"),
        ("tracking.tags=[a,'https://me:passphrase@example.org']", "tracking.tags[1]", "passphrase"),
        ("tracking.group=token-value-of-the-environment", "tracking.group", "token-value"),
    ],
)
def test_a_secret_in_the_settings_is_refused_and_not_shown(
    override: str, key: str, secret: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "token-value-of-the-environment")
    with pytest.raises(ConfigError) as caught:
        resolve_job(["experiment=quickstart_short", override], None, None)
    text = str(caught.value)
    assert text.startswith(f"{key}: its value, not shown here, looks like a secret")
    assert secret not in text


def test_ordinary_settings_are_no_secrets() -> None:
    resolve_job(["experiment=quickstart_short", "+engine.extra_args.max_tokens=5", "run.name=token"], None, None)
