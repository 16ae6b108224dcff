"""The thin trial: no GPU, no model. It asks the pool to evaluate one plan.

Imports little, because Tune starts a process for each trial slot.
"""

import json
from typing import Any

import ray
from ray import tune

from ray_abliterate.cluster.actor_call import call_actor, start_actor_call
from ray_abliterate.cluster.pool_actor import PoolActor
from ray_abliterate.cluster.remote_errors import one_line_reason, unwrap
from ray_abliterate.errors import RayAbliterateError
from ray_abliterate.replica.messages import Evaluation
from ray_abliterate.search.frontier import ERROR, REPLICA, SCORES, SECONDS, SHARED
from ray_abliterate.search.plan import Plan


class PlanTrial(tune.Trainable):  # type: ignore[misc]
    """One slot of the search. Tune reuses its process for one plan after the other."""

    def setup(
        self, config: dict[str, Any], pool: Any = None, setup: Any = None, per_pass: int = 1
    ) -> None:
        """Store the handles, and wait until the other slots are there.

        Tune would otherwise give the first slot's process all plans that come while the others
        are still starting, and stop those.

        Args:
            config: The parameters of the first plan, and the plan itself.
            pool: Handle of a `PoolActor`.
            setup: Ray's reference to the run's `TrialSetup`, in a list.
            per_pass: Plans that may share a pass.
        """
        self._pool, self._setup, self._per_pass, self._config = pool, setup, per_pass, config
        call_actor(pool, PoolActor.wait_for_slots)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next plan; the process stays."""
        self._config = new_config
        return True

    def step(self) -> dict[str, Any]:
        """Evaluate the plan. An error is a result too, so that the process lives on."""
        plan = Plan.from_json(self._config["plan"])
        try:
            reference = start_actor_call(
                self._pool, PoolActor.evaluate_trial, plan, self._setup, self._per_pass
            )
            evaluation: Evaluation = unwrap(reference)
        except (RayAbliterateError, ray.exceptions.RayTaskError) as error:
            return {ERROR: one_line_reason(error), "done": True}
        if evaluation.answers:
            call_actor(self._pool, PoolActor.store_answers, self.trial_id, evaluation.answers)
        return {
            **evaluation.scorecard.metrics(),
            SCORES: json.dumps(evaluation.scorecard.to_list()),
            SECONDS: round(evaluation.seconds, 3),
            SHARED: evaluation.shared,
            REPLICA: evaluation.replica,
            "done": True,
        }

    def save_checkpoint(self, _directory: str) -> None:
        """Save nothing: a trial has no state."""

    def load_checkpoint(self, _checkpoint: Any) -> None:
        """Load nothing: a trial has no state."""
