"""Where the actors of a job run: a Ray placement group with one bundle for each of them, or Ray's own choice.

Invariants
- All bundles are reserved before the first actor starts, or nothing is: a job that does not fit says within the
  deadline what it lacks, and leaves nothing reserved.
- An actor that is started again under its name takes its bundle again; when the bundle's node is gone, Ray reserves
  the bundle elsewhere as soon as there is room, and the actor waits for that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from slipstream.rollout.actors import PoolError, PoolTimeout

PlacementStrategy = Literal["none", "pack", "spread", "strict_spread"]
"""Ray's strategies: on as few nodes as possible, over as many as possible, and no two bundles on one node."""


class Placement:
    """A reservation by actor names. Bundles: resources of each, as {"CPU": 1.0, "GPU": 0.0}."""

    def __init__(
        self, strategy: PlacementStrategy, bundles: Mapping[str, Mapping[str, float]], timeout_s: float
    ) -> None:
        """Raises PoolTimeout with what is missing when the cluster has no room within timeout_s."""
        self._names, self._group = list(bundles), None
        if strategy == "none":
            return
        needed = [{name: amount for name, amount in one.items() if amount} for one in bundles.values()]
        try:
            self._group = placement_group(needed, strategy=strategy.upper())
            placed = self._group.wait(timeout_s)
        except (RayError, ValueError) as error:
            raise PoolError(f"cluster.placement={strategy}: {' '.join(str(error).split())[:300]}") from error
        if not placed:
            self.remove()
            raise PoolTimeout(
                f"cluster.placement={strategy}: no room for {len(needed)} actors within {timeout_s:g} s: "
                + missing(strategy, needed, ray.nodes(), ray.available_resources())
            )

    def options(self, name: str) -> dict[str, Any]:
        """Ray's options for the actor of that name; an actor that has no bundle goes where Ray finds room."""
        if self._group is None or name not in self._names:
            return {}
        place = PlacementGroupSchedulingStrategy(self._group, self._names.index(name))
        return {"scheduling_strategy": place}

    def remove(self) -> None:
        """Gives the reservation back, and ends what runs in it."""
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None


def missing(
    strategy: PlacementStrategy,
    bundles: list[dict[str, float]],
    nodes: list[dict[str, Any]],
    available: Mapping[str, float],
) -> str:
    """What a cluster lacks for the bundles, in words. nodes: as ray.nodes() gives them; available: of all of them."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    totals = {name: sum(bundle.get(name, 0.0) for bundle in bundles) for name in ("CPU", "GPU")}
    parts = [
        f"they need {total:g} {name}s, {available.get(name, 0.0):g} are free"
        for name, total in totals.items()
        if total > available.get(name, 0.0) + 1e-9
    ]
    fitting = [node for node in alive if any(_fits(bundle, node) for bundle in bundles)]
    if strategy == "strict_spread" and len(fitting) < len(bundles):
        parts.append(f"they need {len(bundles)} nodes, one each, {len(fitting)} of {len(alive)} nodes are large enough")
    too_large = next((bundle for bundle in bundles if not any(_fits(bundle, node) for node in alive)), None)
    if too_large is not None:
        parts.append(f"no node has {' and '.join(f'{amount:g} {name}s' for name, amount in too_large.items())}")
    return "; ".join(parts) or "enough is free in total, but not in pieces that fit; allowed: another cluster.placement"


def _fits(bundle: Mapping[str, float], node: Mapping[str, float]) -> bool:
    return all(node.get(name, 0.0) + 1e-9 >= amount for name, amount in bundle.items())
