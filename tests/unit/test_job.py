"""How a job may end: whatever an actor said, the job says it in one line."""

from __future__ import annotations

import pytest

from slipstream.rollout.actors import PoolTimeout
from slipstream.rollout.engine import EngineError
from slipstream.trainer.errors import ClusterError, SlipstreamError, StalledError
from slipstream.trainer.job import MAX_LINE, _errors_as_lines


@pytest.mark.parametrize(("raised", "expected"), [(EngineError, ClusterError), (PoolTimeout, StalledError)])
def test_what_an_actor_said_becomes_one_line(raised: type[EngineError], expected: type[SlipstreamError]) -> None:
    said = "weights: \x1b[36mray::Learner.weights()\x1b[39m died\n\tpid: 3\n" + "and more " * MAX_LINE
    with pytest.raises(expected) as error, _errors_as_lines():
        raise raised(said)
    assert str(error.value).startswith("weights: ray::Learner.weights() died pid: 3 and more and")
    assert len(str(error.value)) == MAX_LINE
