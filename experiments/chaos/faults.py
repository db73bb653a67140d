"""The kinds of faults, each done for real and from outside, and the seeded schedule of them.

Invariants: the schedule is a function of (seed, number of faults, kinds); a fault meets a process of the bench's own
job or Ray only, or its disk; what `Scene.repair` undoes is what an operator would: it frees the disk, and ends the
process that hangs.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from slipstream.drafter.shared_folder import MEMORY, PREFIX
from slipstream.experiments.chaos.processes import command_line, descendants, send, wait_for_call
from slipstream.experiments.chaos.small_disk import SmallDisk
from slipstream.experiments.chaos.train_process import TrainProcess
from slipstream.experiments.chaos.two_nodes import TwoNodes

CALL_TIMEOUT_S = 10.0
"""How long the moment that a fault waits for may be in coming; then it strikes at once."""
ROOMS = (0, 1 << 20, 4 << 20)
"""Bytes left on a full disk: none, too little for the policy, enough for it and too little for the optimiser."""
MAX_DELAY_S = 1.0
NODE_AWAY_S = 5.0


@dataclass(slots=True)
class Scene:
    """What faults meet. hang_file: asks the reward function to hang; notes: what the fault found, for the record."""

    job: TrainProcess
    nodes: TwoNodes
    disk: SmallDisk
    hang_file: Path
    notes: list[str] = field(default_factory=list)
    _repairs: list[Callable[[], object]] = field(default_factory=list)

    def later(self, repair: Callable[[], object]) -> None:
        """Something for `repair`."""
        self._repairs.append(repair)

    def repair(self) -> None:
        """Undoes what does not go away by itself."""
        while self._repairs:
            self._repairs.pop()()

    def strike(self, pids: list[int], number: signal.Signals, rng: random.Random) -> None:
        """Sends a signal to one of `pids`."""
        victim = rng.choice(pids) if pids else None
        title = "" if victim is None else command_line(victim)
        if victim is None or not send(victim, number):
            self.notes.append("nobody was there")
            return
        # A driver's command line is long, and holds a path of this machine.
        self.notes.append(f"{number.name} to {title if title.startswith('ray::') else 'the process'}")
        if number == signal.SIGSTOP:
            self.later(lambda: send(victim, signal.SIGKILL))

    def strike_in(self, pids: list[int], call: str, number: signal.Signals, rng: random.Random) -> None:
        """Sends a signal to the first of `pids` that is in the method `call`, to any of them if none gets there."""
        victim = wait_for_call(pids, call, CALL_TIMEOUT_S)
        if victim is None:
            self.notes.append(f"no call of {call} was seen")
        self.strike(pids if victim is None else [victim], number, rng)


@dataclass(frozen=True, slots=True)
class Fault:
    """One line of the schedule. at_step: not before this step is finished; delay_s: from then on; seed: its own."""

    kind: str
    at_step: int
    delay_s: float
    seed: int


def make_schedule(seed: int, num_faults: int, first_step: int, gap: int, kinds: list[str]) -> list[Fault]:
    """Every kind once as far as they fit, then each as often as its weight in WEIGHTS says; shuffled, `gap` apart."""
    rng = random.Random(seed)
    drawn = rng.sample(kinds, min(num_faults, len(kinds)))
    deck = [kind for kind in kinds for _ in range(WEIGHTS.get(kind, 1))]
    while len(drawn) < num_faults:
        drawn += rng.sample(deck, min(num_faults - len(drawn), len(deck)))
    rng.shuffle(drawn)
    return [
        Fault(kind, first_step + gap * i, rng.uniform(0.0, MAX_DELAY_S), rng.randrange(2**31))
        for i, kind in enumerate(drawn)
    ]


def inject(fault: Fault, scene: Scene) -> None:
    """Does it."""
    scene.notes.clear()
    KINDS[fault.kind](scene, random.Random(fault.seed))


def _kill_worker(scene: Scene, rng: random.Random) -> None:
    scene.strike(scene.nodes.actors("Worker"), signal.SIGKILL, rng)


def _hang_worker(scene: Scene, rng: random.Random) -> None:
    scene.strike(scene.nodes.actors("Worker"), signal.SIGSTOP, rng)


def _kill_learner(scene: Scene, rng: random.Random) -> None:
    scene.strike_in(scene.nodes.actors("Learner"), rng.choice(("update", "save")), signal.SIGKILL, rng)


def _kill_driver(scene: Scene, rng: random.Random) -> None:
    scene.strike([scene.job.pid], signal.SIGKILL, rng)


def _terminate_driver(scene: Scene, rng: random.Random) -> None:
    scene.strike([scene.job.pid], signal.SIGTERM, rng)


def _kill_node(scene: Scene, rng: random.Random) -> None:
    """The node comes back by itself, as one that was restarted: the job may wait for it, or stop meanwhile."""
    scene.nodes.kill_second()
    scene.notes.append("the second raylet and everything on it")
    time.sleep(NODE_AWAY_S)
    scene.nodes.start_second()


def _kill_history_builder(scene: Scene, rng: random.Random) -> None:
    """The worker that builds its node's shared index, while the window rolls."""
    own = set(descendants(scene.nodes.roots))
    owners = [int(path.name.removeprefix(PREFIX).partition("-")[0]) for path in MEMORY.glob(f"{PREFIX}*")]
    scene.strike_in([pid for pid in owners if pid in own], "publish", signal.SIGKILL, rng)


def _kill_history_writer(scene: Scene, rng: random.Random) -> None:
    """The driver, at the moment when the history on disk grows."""
    folder = scene.job.run_dir / "history"

    def size() -> int:
        return sum(path.stat().st_size for path in folder.glob("*.log"))

    before, deadline = size(), time.monotonic() + CALL_TIMEOUT_S
    while size() == before and time.monotonic() < deadline:
        time.sleep(0.0002)
    scene.strike([scene.job.pid], signal.SIGKILL, rng)


def _cut_weights_sending(scene: Scene, rng: random.Random) -> None:
    scene.strike_in(scene.nodes.actors("Learner"), "weights", signal.SIGKILL, rng)


def _cut_weights_receiving(scene: Scene, rng: random.Random) -> None:
    scene.strike_in(scene.nodes.actors("Worker"), "commit_policy", signal.SIGKILL, rng)


def _fill_disk(scene: Scene, rng: random.Random) -> None:
    room = rng.choice(ROOMS)
    scene.disk.fill(room, [scene.job.pid, *scene.nodes.actors("Learner")])
    scene.notes.append(f"{room} bytes left")
    scene.later(scene.disk.free)


def _hang_reward(scene: Scene, rng: random.Random) -> None:
    scene.hang_file.touch()
    scene.later(lambda: _take_back(scene))


def _take_back(scene: Scene) -> None:
    """Asks no longer for a hang; by now a call has taken it."""
    if scene.hang_file.exists():
        scene.hang_file.unlink()
        scene.notes.append("no call hung")


def _kill_reward(scene: Scene, rng: random.Random) -> None:
    pids = [pid for pid in descendants([scene.job.pid]) if "reward_process" in command_line(pid)]
    scene.strike(pids, signal.SIGKILL, rng)


KINDS: dict[str, Callable[[Scene, random.Random], None]] = {
    "kill_worker": _kill_worker,
    "kill_learner": _kill_learner,
    "kill_driver": _kill_driver,
    "terminate_driver": _terminate_driver,
    "kill_node": _kill_node,
    "kill_history_builder": _kill_history_builder,
    "kill_history_writer": _kill_history_writer,
    "hang_worker": _hang_worker,
    "disk_full": _fill_disk,
    "cut_weights_sending": _cut_weights_sending,
    "cut_weights_receiving": _cut_weights_receiving,
    "hang_reward": _hang_reward,
    "kill_reward": _kill_reward,
}
WEIGHTS = {"kill_worker": 4, "kill_learner": 3, "kill_driver": 3, "kill_node": 3, "hang_reward": 3, "disk_full": 3}
"""How often a kind comes in one round of the schedule after the first, where not once."""
KILLS_DRIVER = ("kill_driver", "kill_history_writer")
"""Kinds after which no line can be said."""
