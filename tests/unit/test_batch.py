"""Both layouts of a micro-batch hold what the samples hold."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from slipstream.trainer.batch import TrainSample, pack, pad, split_updates


def make(shapes: list[tuple[int, int]]) -> list[TrainSample]:
    """Sample i has 1 as prompt, 2 + i as response, -i as log-probabilities and i as advantage."""
    return [
        TrainSample(np.full(p, 1, np.int32), np.full(r, 2 + i, np.int32), np.full(r, -float(i), np.float32), float(i))
        for i, (p, r) in enumerate(shapes)
    ]


shapes_lists = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30)), min_size=1, max_size=12)


@given(shapes_lists, st.randoms(use_true_random=False))
def test_padded_rows(shapes: list[tuple[int, int]], rng: object) -> None:
    order = list(range(len(shapes)))
    rng.shuffle(order)  # type: ignore[attr-defined]
    batch = pad(make(shapes), order)
    assert batch.rows.order == order
    for row, i in enumerate(order):
        prompt, response = shapes[i]
        mask = batch.rows.mask[row]
        assert mask.sum() == response
        assert mask.argmax() == batch.rows.first[row] == prompt - 1
        assert set(batch.targets[row][mask]) == {2 + i}
        assert batch.attention[row].sum() == prompt + response
        assert set(batch.rows.old_logp[row][mask]) == {-float(i)}
        assert batch.rows.advantages[row, 0] == i
        assert batch.input_ids[row, : prompt + response].tolist() == [1] * prompt + [2 + i] * response


@given(shapes_lists, st.randoms(use_true_random=False))
def test_packed_rows(shapes: list[tuple[int, int]], rng: object) -> None:
    order = list(range(len(shapes)))
    rng.shuffle(order)  # type: ignore[attr-defined]
    batch = pack(make(shapes), order)
    assert batch.lengths == tuple(sum(shapes[i]) for i in order)
    assert batch.input_ids.shape == batch.position_ids.shape == (1, sum(batch.lengths))
    assert batch.position_ids[0].tolist() == [position for length in batch.lengths for position in range(length)]
    # What a position predicts is the next token of its own sequence.
    assert (batch.input_ids[0, batch.predicting + 1] == batch.targets).all()
    assert (batch.position_ids[0, batch.predicting + 1] > 0).all()
    for row, i in enumerate(order):
        mask = batch.rows.mask[row]
        assert mask.sum() == shapes[i][1]
        assert batch.rows.first[row] == 0
        assert set(batch.targets[batch.place[row][mask]]) == {2 + i}
        assert set(batch.rows.old_logp[row][mask]) == {-float(i)}
        assert batch.rows.advantages[row, 0] == i
    used = np.concatenate([batch.place[row][batch.rows.mask[row]] for row in range(len(order))])
    assert sorted(used.tolist()) == list(range(len(batch.targets)))


def test_left_out_tokens_are_masked_in_both_layouts() -> None:
    sample = make([(2, 3)])[0]
    kept = TrainSample(
        sample.prompt,
        sample.response,
        sample.logprobs,
        1.0,
        proximal=np.float32([-1, -2, -3]),
        weights=np.float32([1, 2, 1]),
        keep=np.array([True, False, True]),
    )
    for batch, first in ((pad([kept], [0]), 1), (pack([kept], [0]), 0)):
        here = slice(first, first + 3)
        assert batch.rows.mask[0, here].tolist() == [True, False, True]
        assert batch.rows.mask.sum() == 2
        assert batch.rows.old_logp[0, here].tolist() == [-1, -2, -3]
        assert batch.rows.weights[0, here].tolist() == [1, 2, 1]


def test_a_micro_batch_of_nothing_counts_for_nothing() -> None:
    for batch in (pad([], []), pack([], [])):
        assert batch.input_ids.size == 2
        assert not batch.rows.mask.any()
        assert batch.rows.order == []


def test_updates_split_interleaved() -> None:
    assert [part.tolist() for part in split_updates(5, 2)] == [[0, 2, 4], [1, 3]]
    assert split_updates(1, 4)[0].tolist() == [0]
