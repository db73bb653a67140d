"""The drafter index bench: its corpora are what they claim, its decoding is the engine's, and every arm and figure it
names is there, with a peer and without."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slipstream.drafter import suffix, suffix_native
from slipstream.drafter.base import DraftBatch, HistoryRecord, LiveBatch, Price, Ragged
from slipstream.drafter.suffix import SuffixDrafter
from slipstream.experiments.drafter_index import build_arctic, record
from slipstream.experiments.drafter_index.acceptance import Arm, decode_steps, from_recording
from slipstream.experiments.drafter_index.arctic import ArcticDrafter, Peer, find_arctic
from slipstream.experiments.drafter_index.corpus import VOCAB, make_corpus
from slipstream.experiments.drafter_index.decode import decode
from slipstream.experiments.drafter_index.recorded import QUICKSTART, Recording, load_recording
from slipstream.experiments.drafter_index.run import add_arguments, compare, run
from slipstream.kernels.dispatch import KernelError
from slipstream.trainer.config import load_settings
from slipstream.trainer.errors import ConfigError

RATES = {
    "insert_tokens_per_s",
    "freeze_tokens_per_s",
    "extend_tokens_per_s",
    "step_us_256",
    "step_us_1024",
    "bytes_per_token",
}
ARMS = {
    "suffix",
    "suffix_unpriced",
    "suffix_prompt_only",
    "suffix_decay_0.8",
    "suffix_decay_1",
    "ngram",
    "last_epoch_only",
    "global_scope",
    "global_scope_unpriced",
}
PLAIN_ARMS = {"suffix_4_prompts", "suffix_reference_4_prompts"}
PEER_ARMS = {"arctic", "arctic_deep"}
CORPORA = {"synthetic", "quickstart", "quickstart_cold"}


class FakeDraft:
    """What the peer's speculate returns."""

    def __init__(self, token_ids: list[int]) -> None:
        self.token_ids, self.match_len = token_ids, 1


class FakeTree:
    """Remembers sequences; the newest continuation of one token of context."""

    def __init__(self, max_tree_depth: int) -> None:
        self.tokens: dict[int, list[int]] = {}

    def extend_ndarray(self, sequence: int, tokens: np.ndarray) -> None:
        self.tokens.setdefault(sequence, []).extend(tokens.tolist())


class FakeCache:
    """The peer's cache in a dictionary, as strict as the peer about what is open."""

    def __init__(self, max_tree_depth: int) -> None:
        self.texts: dict[Any, list[int]] = {}
        self.open: set[Any] = set()

    @property
    def cached_requests(self) -> Any:
        return self.texts.keys()

    def start_request(self, name: Any, prompt: np.ndarray) -> None:
        assert name not in self.open
        assert prompt.dtype == np.int32
        self.open.add(name)
        self.texts[name] = []

    def stop_request(self, name: Any) -> None:
        self.open.remove(name)

    def add_active_response(self, name: Any, tokens: Any) -> None:
        assert name in self.open
        self.texts[name].extend(list(tokens))

    def evict_cached_response(self, name: Any) -> None:
        del self.texts[name]

    def speculate(self, name: Any, context: np.ndarray, **limits: Any) -> FakeDraft:
        assert name in self.open
        for text in reversed(self.texts.values()):
            if context[-1] in text[:-1]:
                start = text.index(context[-1]) + 1
                return FakeDraft(text[start : start + limits["max_spec_tokens"]])
        return FakeDraft([])


class Oracle:
    """Proposes the right tokens, or wrong ones after the first `right`; notes what it was told."""

    name = "oracle"

    def __init__(self, texts: dict[int, list[int]], right: int) -> None:
        self.texts, self.right = texts, right
        self.given: dict[int, list[int]] = {}
        self.ended: list[tuple[int, bool]] = []

    def begin(self, uid: int, prompt_id: str, prompt: np.ndarray) -> None:
        self.given[uid] = []

    def propose(self, batch: LiveBatch, price: Price, out: DraftBatch) -> None:
        for row, uid in enumerate(batch.uids.tolist()):
            at, limit = len(self.given[uid]), int(price.max_draft[row])
            assert batch.num_generated[row] == at
            assert limit < batch.num_remaining[row]
            assert out.count[row] == 0
            draft = (self.texts[uid][at : at + self.right] + [99] * limit)[:limit]
            out.tokens[row, : len(draft)] = draft
            out.count[row] = len(draft)

    def extend(self, batch: LiveBatch, accepted: Ragged) -> None:
        for row, uid in enumerate(batch.uids.tolist()):
            self.given[uid] += accepted.row(row).tolist()

    def end(self, uid: int, finished: bool) -> None:
        self.ended.append((uid, finished))

    def calibrate(self, probabilities: np.ndarray) -> None:
        pass

    def publish(self, step: int, records: list[HistoryRecord]) -> None:
        pass


def responses(texts: dict[int, list[int]], step: int = 0) -> list[HistoryRecord]:
    return [HistoryRecord("p", step, uid, np.array(tokens, np.int32)) for uid, tokens in texts.items()]


def test_the_corpus_is_reproducible() -> None:
    one, two, other = (make_corpus(3, 2, 1, 100, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.rollouts, two.rollouts)
    assert (one.rollouts != other.rollouts).any()
    assert one.rollouts.shape == (3, 2, 100)
    assert one.held_out.shape == (3, 1, 100)
    assert 0 <= one.rollouts.min() <= one.rollouts.max() < VOCAB


def test_a_corpus_is_visits_of_every_prompt_and_texts_to_decode() -> None:
    corpus = make_corpus(2, 6, 3, 20)
    visits = list(corpus.visits())
    assert [(step, len(records)) for step, records in visits] == [(0, 8), (1, 4)]
    records = [record for _, of_step in visits for record in of_step]
    texts = corpus.texts(2)
    assert len({record.uid for record in records + texts}) == 12 + 4
    assert [text.prompt_id for text in texts] == ["0", "0", "1", "1"]
    np.testing.assert_array_equal(texts[3].tokens, corpus.held_out[1, 1])


def test_decoding_gives_each_text_once_and_counts_as_the_engine_does() -> None:
    texts = {5: list(range(10)), 6: [1, 2, 3], 7: list(range(20, 27))}
    oracle = Oracle(texts, right=2)
    done = decode(oracle, responses(texts), width=4)
    assert oracle.given == texts
    assert oracle.ended == [(6, True), (7, True), (5, True)]
    # Two right tokens and one more in each round; a draft is cut to what max_tokens leaves.
    assert done.rounds.tolist() == [4, 1, 3]
    assert done.drafted.tolist() == [11, 4, 11]
    assert done.accepted.tolist() == [6, 2, 4]
    assert len(done.step_us) == 1
    stopped = Oracle(texts, right=0)
    assert decode(stopped, responses(texts), width=4, max_steps=2).rounds.tolist() == [2, 2, 2]
    assert stopped.ended == [(5, False), (6, False), (7, False)]


def test_a_recording_comes_back_whole_or_not_at_all(tmp_path: Path) -> None:
    records = [*responses({3: [1, 2], 2**60: [4]}), *responses({9: [2**16 - 1]}, step=4)]
    path = tmp_path / "r.npz"
    Recording({"p": np.array([7, 8], np.int32), "q": np.zeros(0, np.int32)}, records).save(path)
    back = load_recording(path)
    assert [prompt.tolist() for prompt in back.prompts.values()] == [[7, 8], []]
    assert [(r.prompt_id, r.step, r.uid, r.tokens.tolist()) for r in back.records] == [
        (r.prompt_id, r.step, r.uid, r.tokens.tolist()) for r in records
    ]
    assert [(step, len(group)) for step, group in back.by_step()] == [(0, 2), (4, 1)]
    path.write_bytes(path.read_bytes()[:-40])
    for broken in (path, tmp_path / "none.npz"):
        with pytest.raises(ConfigError, match=r"drafter_index\.record"):
            load_recording(broken)
    with pytest.raises(ValueError, match="no tokens"):
        Recording({}, records)
    with pytest.raises(ValueError, match="twice"):
        Recording(back.prompts, [records[0], records[0]])
    with pytest.raises(ValueError, match="order"):
        Recording(back.prompts, records[::-1])


def test_a_run_folder_becomes_a_recording(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = load_settings(["experiment=quickstart_short", "data.task.num_train=2", "data.task.num_validation=1"])
    saved = settings.model_dump(mode="json")
    (tmp_path / "settings.json").write_text(json.dumps(saved), encoding="utf-8")
    prompt_id, out = record.training_prompts(saved)[1].prompt_id, tmp_path / "out.npz"

    def record_rows(prompt_id: str) -> int:
        rows = [
            {"step": 1, "uid": uid, "prompt_id": prompt_id, "tokens": [1, uid], "finish": finish}
            for uid, finish in ((4, "stop"), (5, "error"), (6, "length"))
        ]
        (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return record.main(["--run", str(tmp_path), "--out", str(out)])

    assert record_rows(prompt_id) == 0
    back = load_recording(out)
    assert [(r.prompt_id, r.uid, r.tokens.tolist()) for r in back.records] == [
        (prompt_id, 4, [1, 4]),
        (prompt_id, 6, [1, 6]),
    ]
    assert record_rows("unknown") == 2
    assert record.main(["--run", str(tmp_path / "none"), "--out", str(out)]) == 2
    assert record.main(["--run", str(tmp_path), "--out", str(tmp_path / "none" / "out.npz")]) == 2
    assert capsys.readouterr().err.count("\n") == 3


def test_the_shipped_recording_is_a_whole_quickstart() -> None:
    shipped = load_recording(QUICKSTART)
    settings = load_settings(["experiment=quickstart"])
    assert QUICKSTART.stat().st_size < 1_500_000
    steps = [step for step, _ in shipped.by_step()]
    assert steps == list(range(1, settings.algo.num_steps + 1))
    samples = settings.algo.num_prompts_per_step * settings.sampling.num_samples_per_prompt
    assert len(shipped.records) == len(steps) * samples
    prompts = {prompt.prompt_id: prompt.tokens.tolist() for prompt in record.training_prompts(settings.model_dump())}
    assert {name: tokens.tolist() for name, tokens in shipped.prompts.items()} == prompts


def test_a_recorded_step_is_decoded_after_the_steps_before_it() -> None:
    text = [3, 1, 4, 1, 5, 9, 2, 6]
    records = [*responses({1: text}, step=1), *responses({2: text, 3: text}, step=2)]
    material = from_recording(Recording({"p": np.zeros(0, np.int32)}, records), "job")
    arms = {"kept": Arm(lambda: SuffixDrafter(min_match=1)), "scope": Arm(SuffixDrafter, one_scope=True)}
    for arm in arms.values():
        totals = decode_steps(arm, material, width=8)
        assert totals["job_cold"][[0, 2]].tolist() == [8, 0]
        # From its first token on, the second visit is the first one's text.
        rounds, _, accepted = totals["job"].tolist()
        assert rounds + accepted == 2 * len(text)
        assert rounds <= 6


def test_the_peers_calls_stand_behind_our_protocol() -> None:
    peer = Peer(FakeCache, FakeTree)
    drafter = ArcticDrafter(peer)
    drafter.publish(0, responses({-1: [1, 2, 3, 4, 5]}))
    done = decode(drafter, responses({0: [1, 2, 3, 4, 5]}, step=1), width=8, max_tokens=20)
    assert done.rounds.tolist() == [2]
    assert done.accepted.tolist() == [3]
    assert len(drafter.step_us) == 2
    drafter.forget_ended()
    assert list(drafter._cache.texts.values()) == [[1, 2, 3, 4, 5]]
    decode(drafter, responses({0: [1, 7]}, step=1), width=8)
    drafter.publish(1, responses({0: [1, 7]}, step=1))
    assert list(drafter._cache.texts.values()) == [[1, 2, 3, 4, 5], [1, 7]]


@pytest.fixture
def small() -> list[str]:
    """Options of a bench that takes seconds."""
    return ["--prompts", "5", "--samples", "8", "--length", "256", "--steps", "8", "--rounds", "1"]


@pytest.fixture
def short_recording(tmp_path: Path) -> Path:
    """Three epochs of the shipped recording's first five prompts, two samples a visit."""
    shipped = load_recording(QUICKSTART)
    names = list(dict.fromkeys(one.prompt_id for one in shipped.records))[:5]
    kept = [
        one
        for step, group in shipped.by_step()
        if step <= 48
        for name in names
        for one in [one for one in group if one.prompt_id == name][:2]
    ]
    path = tmp_path / "short.npz"
    Recording(shipped.prompts, kept).save(path)
    return path


def answer(options: list[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    result: dict[str, Any] = run(parser.parse_args(options))
    return result


def test_the_bench_answers_without_the_peer(
    small: list[str], short_recording: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "arctic_inference.suffix_decoding", None)
    result = answer([*small, "--recorded", str(short_recording), "--arctic", str(tmp_path / "none")])
    assert all(result[key] > 0 for key in RATES)
    assert len(result["step_wall_us"]) == 6
    for key in ("accepted_per_round", "drafted_per_round"):
        assert result[key].keys() == CORPORA
        assert all(arms.keys() == ARMS | PLAIN_ARMS for arms in result[key].values())
    accepted, drafted = result["accepted_per_round"], result["drafted_per_round"]
    for name in ("synthetic", "quickstart"):
        assert accepted[name]["suffix"] > max(accepted[name]["ngram"], accepted[name]["last_epoch_only"])
        assert drafted[name]["suffix_unpriced"] > drafted[name]["suffix"]
        assert accepted[name]["global_scope"] != accepted[name]["suffix"]
        assert accepted[name]["suffix_reference_4_prompts"] != accepted[name]["suffix_4_prompts"]
        assert accepted[name]["suffix_4_prompts"] != accepted[name]["suffix"]
    assert accepted["quickstart"]["suffix"] > 2 * accepted["quickstart_cold"]["suffix"]
    assert result["vs_arctic_insert"] is result["vs_arctic_insert_and_freeze"] is result["vs_arctic_step"] is None
    assert "\n" not in result["vs_arctic_reason"]
    assert f"`{build_arctic.COMMAND} --out {tmp_path / 'none'}`" in result["vs_arctic_reason"]


def test_the_bench_answers_with_the_peer(
    small: list[str], short_recording: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "slipstream.experiments.drafter_index.run.find_arctic", lambda folder: (Peer(FakeCache, FakeTree), None)
    )
    result = answer([*small, "--recorded", str(short_recording), "--baseline-prompts", "2"])
    for arms in result["accepted_per_round"].values():
        assert arms.keys() > ARMS | PEER_ARMS
        assert arms["arctic"] > 0
    assert result["vs_arctic_reason"] is None
    assert result["arctic"].keys() == {"depth_24", "depth_64"}
    assert all(one["insert_tokens_per_s"] > 0 and one["step_us_256"] > 0 for one in result["arctic"].values())
    assert result["vs_arctic_insert"] > result["vs_arctic_insert_and_freeze"] > 0
    assert result["vs_arctic_step"] > 0


def test_the_peer_is_compared_where_it_is_fastest() -> None:
    ours = {"insert_tokens_per_s": 60.0, "freeze_tokens_per_s": 30.0, "step_us_256": 2.0}
    theirs = {
        "shallow": {"insert_tokens_per_s": 10.0, "step_us_256": 8.0},
        "deep": {"insert_tokens_per_s": 5.0, "step_us_256": 6.0},
    }
    assert compare(ours, theirs) == pytest.approx(
        {"vs_arctic_insert": 6.0, "vs_arctic_insert_and_freeze": 2.0, "vs_arctic_step": 3.0}
    )


def test_the_built_peer_is_found_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "arctic_inference"]:
        monkeypatch.delitem(sys.modules, name)
    package = tmp_path / build_arctic.SUFFIX_DECODING
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").write_text("SuffixDecodingCache = 'cache'\n", encoding="utf-8")
    (package / "_C.py").write_text("SuffixTree = 'tree'\n", encoding="utf-8")
    before = list(sys.path)
    assert find_arctic(tmp_path) == (("cache", "tree"), None)
    assert sys.path == before
    for name in [name for name in sys.modules if name.partition(".")[0] == "arctic_inference"]:
        del sys.modules[name]


def test_a_failing_build_of_the_peer_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build_arctic, "TOOLS", ("--no-such-option",))
    out = tmp_path / "out"
    out.mkdir()
    (out / "kept").touch()
    assert build_arctic.main(["--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("slipstream: ")
    assert error.count("\n") == 1
    assert (out / "kept").exists()


def test_an_index_asked_for_by_name_is_used_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert SuffixDrafter().index_name == SuffixDrafter(index="native").index_name == "native"
    assert SuffixDrafter(index="reference").index_name == "reference"
    with pytest.raises(ValueError, match="allowed: auto, native, reference"):
        SuffixDrafter(index="natve")  # type: ignore[arg-type]
    monkeypatch.setattr(suffix_native, "_native", None)
    monkeypatch.setattr(suffix, "NATIVE_ERROR", "not built")
    with pytest.raises(KernelError, match="index=native"):
        SuffixDrafter(index="native")
    auto = SuffixDrafter()
    assert (auto.index_name, auto.index_reason) == ("reference", "not built")
