"""The thin trial: no GPU, no model; asks the pool for the evaluation of one plan.

Imports little, because Tune starts a process for each trial slot.
"""

import json
from typing import Any

import ray
from ray import tune

from ray_abliterate.cluster.remote_errors import reason, unwrap
from ray_abliterate.errors import RayAbliterateError
from ray_abliterate.replica.messages import Evaluation
from ray_abliterate.search.plan import Plan

SCORES, SECONDS, ERROR, SHARED, REPLICA = "scores", "seconds", "error", "shared", "replica"
"""Keys of a trial's result; its attributes in the journal have the same names."""


class PlanTrial(tune.Trainable):  # type: ignore[misc]
    """One slot of the search. Tune reuses it for one plan after the other."""

    def setup(
        self, config: dict[str, Any], pool: Any = None, setup: Any = None, together: int = 1
    ) -> None:
        """Keep the handles, and wait until the other slots are there.

        Tune would otherwise give the first slot's process all plans that come while the others
        are still starting, and stop those.
        """
        self._pool, self._setup, self._point = pool, setup, config
        self._together = together
        ray.get(pool.join.remote())

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next point; the process stays."""
        self._point = new_config
        return True

    def step(self) -> dict[str, Any]:
        """Evaluate. What goes wrong with a plan is reported, so that the process lives on."""
        plan = Plan.from_json(self._point["plan"])
        try:
            evaluation: Evaluation = unwrap(
                self._pool.trial.remote(plan, self._setup, self._together)
            )
        except (RayAbliterateError, ray.exceptions.RayTaskError) as error:
            return {ERROR: reason(error), "done": True}
        if evaluation.answers:
            ray.get(self._pool.keep.remote(self.trial_id, evaluation.answers))
        return {
            **evaluation.scorecard.metrics(),
            SCORES: json.dumps(evaluation.scorecard.to_list()),
            SECONDS: round(evaluation.seconds, 3),
            SHARED: evaluation.shared,
            REPLICA: evaluation.replica,
            "done": True,
        }

    def save_checkpoint(self, _directory: str) -> None:
        """Nothing to keep."""

    def load_checkpoint(self, _checkpoint: Any) -> None:
        """Nothing to take up."""
