"""The generated task: problems that can be checked, splits that cannot leak, lengths with a long tail."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.conf.schema import TaskConfig
from slipstream.trainer.data.chain_sum import (
    KEYS,
    LEVEL_STEPS,
    MAX_TOTAL,
    SLIP_SIZES,
    ChainSum,
    draw_problem,
    level_counts,
    make_problems,
    make_rows,
    stream_problems,
    worked_with_slips,
)
from slipstream.trainer.errors import DataError


def test_surface_form() -> None:
    problem = ChainSum(7, (5, -2, 9))
    assert problem.question == "=7 a+5 b-2 c+9"
    assert problem.answer == "a+5=12\nb-2=10\nc+9=19\n#### 19"
    assert problem.result == "19"
    assert problem.level == 2


@given(seed=st.integers(0, 2**32 - 1), num_steps=st.integers(1, len(KEYS)))
@settings(max_examples=60, deadline=None)
def test_answer_follows_from_the_question(seed: int, num_steps: int) -> None:
    problem = draw_problem(np.random.default_rng(seed), num_steps)
    start, *terms = problem.question.split(" ")
    total = int(start.removeprefix("="))
    *lines, final = problem.answer.split("\n")
    assert len(lines) == len(terms) == num_steps
    for key, term, line in zip(KEYS, terms, lines, strict=False):
        assert re.fullmatch(rf"{key}[+-][1-9]", term)
        total += int(term[1:])
        assert 0 <= total <= MAX_TOTAL
        assert line == f"{term}={total}"
    assert final == f"#### {total}" == f"#### {problem.result}"


def test_slips_are_single_wrong_sums_that_the_chain_goes_on_from() -> None:
    rng = np.random.default_rng(0)
    num_sums = num_slips = 0
    for _ in range(200):
        problem = draw_problem(rng, 12)
        assert worked_with_slips(problem, rng, 0.0) == problem.answer
        *lines, final = worked_with_slips(problem, rng, 0.2).split("\n")
        total = problem.start
        for line, term in zip(lines, problem.terms, strict=True):
            stated = int(line.split("=")[1])
            assert 0 <= stated <= MAX_TOTAL
            assert stated - total - term in (0, *SLIP_SIZES)
            num_sums += 1
            num_slips += stated != total + term
            total = stated
        assert final == f"#### {total}"
    assert 0.13 < num_slips / num_sums <= 0.21


@pytest.mark.parametrize("seed", range(6))
def test_small_sets_hold_every_level_and_a_long_tail(seed: int) -> None:
    problems = make_problems(TaskConfig(seed=seed), "train")
    lengths = [len(problem.answer) + 1 for problem in problems]
    assert {problem.level for problem in problems} == set(LEVEL_STEPS)
    p50, p99 = np.percentile(lengths, [50, 99])
    assert p99 / p50 >= 4
    assert max(lengths) <= 400, "an honest answer has to fit into the 512 tokens of a response"


def test_splits_never_overlap_across_seeds_and_sizes() -> None:
    train: set[str] = set()
    validation: set[str] = set()
    for seed, size in ((0, 64), (1, 400), (2, 900)):
        task = TaskConfig(num_train=size, num_validation=size, seed=seed)
        train |= {problem.question for problem in make_problems(task, "train")}
        validation |= {problem.question for problem in make_problems(task, "validation")}
    assert not train & validation
    stream = stream_problems(seed=0)
    assert all(next(stream).split == "train" for _ in range(300))


def test_sets_are_distinct_and_a_function_of_the_seed() -> None:
    task = TaskConfig(num_train=300, seed=3)
    questions = [problem.question for problem in make_problems(task, "train")]
    assert len(set(questions)) == 300
    assert questions == [problem.question for problem in make_problems(task, "train")]
    other = make_problems(TaskConfig(num_train=300, seed=4), "train")
    assert questions != [problem.question for problem in other]


def test_validation_does_not_depend_on_the_size_of_train() -> None:
    small, large = TaskConfig(num_train=8), TaskConfig(num_train=500)
    assert make_problems(small, "validation") == make_problems(large, "validation")


@given(
    num=st.integers(1, 3000),
    levels=st.tuples(st.integers(1, 6), st.integers(1, 6)).map(lambda pair: (min(pair), max(pair))),
)
def test_level_counts_add_up(num: int, levels: tuple[int, int]) -> None:
    counts = level_counts(num, *levels)
    assert sum(counts.values()) == num
    assert list(counts) == list(range(levels[0], levels[1] + 1))
    if num >= len(counts):
        assert min(counts.values()) >= 1


def test_levels_are_limited_on_request() -> None:
    problems = make_problems(TaskConfig(num_train=40, min_level=2, max_level=3), "train")
    assert {problem.level for problem in problems} == {2, 3}


def test_exhausted_level_is_one_line() -> None:
    with pytest.raises(DataError, match=r"data\.task\.num_validation=9000: level 1 .*max_level") as error:
        make_problems(TaskConfig(num_validation=9000, max_level=1), "validation")
    assert "\n" not in str(error.value)


def test_rows_are_verl_rows() -> None:
    rows = make_rows(TaskConfig(num_train=16), "train")
    assert [row["extra_info"]["index"] for row in rows] == list(range(16))
    row = rows[0]
    assert row["data_source"] == "slipstream/chain_sum"
    assert row["ability"] == "arithmetic"
    assert [message["role"] for message in row["prompt"]] == ["user"]
    assert row["reward_model"]["style"] == "exact"
    assert row["extra_info"]["answer"].endswith(f"#### {row['reward_model']['ground_truth']}")
    assert row["extra_info"]["split"] == "train"
