"""Our side of the comparison: a replica in a process of its own.

It answers the commands `load`, `trial`, `switch` and `machine` (see
`benchmarks/harness/worker_process.py`).
"""

import time
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness.memory import peak_bytes
from benchmarks.harness.worker_process import serve
from benchmarks.versus_heretic.comparison_setup import KL, RATE

if TYPE_CHECKING:
    from ray_abliterate.directions.residuals.residual_set import Residuals
    from ray_abliterate.replica.messages import Evaluation

EXTRACTION_BATCH = 32
"""Prompts of a forward pass when directions are computed."""


class OurReplica:
    """One replica, and the directions that its trials share."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def _part(self, name: str) -> Any:
        started = time.perf_counter()
        yield
        self._seconds[name] = round(time.perf_counter() - started, 4)

    def load(
        self, recipe: dict[str, Any], prompts: dict[str, list[str]], system: str, **options: Any
    ) -> dict[str, Any]:
        """Start up, part by part.

        Args:
            recipe: The recipe's values.
            prompts: Prompts by set: `behaviour`, `neutral` and one for each scorer.
            system: System prompt of all prompts.
            **options: `threads`; `directions`, a file that directions are read from, or are written
                to if it is not there.

        Returns:
            Seconds of each part; what the base model does; the model's shape, and the work of a
            trial.
        """
        with self._part("import"):
            import torch

            from ray_abliterate.data.prompts import Prompt, PromptSet
            from ray_abliterate.recipe import Recipe
            from ray_abliterate.replica.replica import Replica
            from ray_abliterate.search.plan import Plan
        sets = {
            name: PromptSet(name, tuple(Prompt(user, system) for user in users))
            for name, users in prompts.items()
        }
        self.recipe = Recipe.model_validate(recipe)
        self.sets = sets
        with self._part("model"):
            scored = {name: sets[name] for name in (RATE, KL)}
            name, threads = self.recipe.model.name, int(options["threads"])
            self.replica = Replica(self.recipe, name, scored, threads=threads)
        with self._part("directions"):
            self._load_directions(Path(options["directions"]))
        with self._part("baseline"):
            base = self.replica.evaluate(Plan.nothing(), self.setup)
        return {
            "seconds": self._seconds,
            "layers": self.replica.describe().shape.layers,
            "hidden": self.replica.describe().shape.hidden,
            "components": list(self.replica.describe().shape.components),
            "base_refusals": sum(self._verdicts()),
            "base_answer_tokens": self._answer_tokens(),
            "base_scores": base.scorecard.to_list(),
            "dtype": self.replica.describe().dtype,
            "threads": torch.get_num_threads(),
            "techniques": _enabled_techniques(self.replica.model),
            "peak_bytes": peak_bytes(),
            **self._work(),
        }

    def trial(self, plans: list[str], off: list[str] | None = None) -> dict[str, Any]:
        """Run one pass: a trial, or several in shared passes.

        Args:
            plans: One JSON text for each trial.
            off: Techniques that are switched off for this pass.

        Returns:
            Seconds of the pass; for each trial KL divergence, refusals as the peer counts them
            (a marker, or nothing written), and where known each prompt's verdict.
        """
        from ray_abliterate.search.plan import Plan

        read = [Plan.from_json(text) for text in plans]
        with self._without(off or []):
            started = time.perf_counter()
            evaluations: list[Evaluation | Exception]
            if len(read) == 1:
                evaluations = [self.replica.evaluate(read[0], self.setup)]
            else:
                evaluations = self.replica.evaluate_in_shared_passes(read, self.setup)
            seconds = time.perf_counter() - started
        trials = [self._scores(evaluation) for evaluation in evaluations]
        if len(read) == 1:
            trials[0] |= {"verdicts": self._verdicts(), "answer_tokens": self._answer_tokens()}
            trials[0]["refusals"] = sum(trials[0]["verdicts"])
        return {"seconds": seconds, "trials": trials, "peak_bytes": peak_bytes()}

    def switch(self, plan: str, rounds: int) -> dict[str, Any]:
        """Return the seconds of each round to apply a plan to the weights, and to restore them."""
        from ray_abliterate.search.plan import Plan

        read, applying, restoring = Plan.from_json(plan), [], []
        for _ in range(rounds):
            started = time.perf_counter()
            with self.replica.cache.edited(read, self.setup.directions):
                applying.append(time.perf_counter() - started)
                started = time.perf_counter()
            restoring.append(time.perf_counter() - started)
        return {"apply": applying, "restore": restoring}

    def machine(self, rows: list[int], rounds: int = 3) -> dict[str, Any]:
        """Return FLOP per second of the model's own linear layers by rows, and bytes per second."""
        import torch

        from benchmarks.harness.device_rates import measure_bandwidth, measure_flop_rate

        weights = [
            part.weight
            for part in self.replica.model.module.modules()
            if isinstance(part, torch.nn.Linear)
        ]
        with torch.inference_mode():
            rates = {n: max(measure_flop_rate(weights, n) for _ in range(rounds)) for n in rows}
        return {"flop_per_s": rates, "bytes_per_s": measure_bandwidth(weights[0].device, rounds)}

    def _load_directions(self, file: Path) -> None:
        """Read the directions from a file; compute them and write it if it is not there."""
        from ray_abliterate.directions.compute import directions_from_residuals
        from ray_abliterate.directions.directions import Directions
        from ray_abliterate.replica.messages import TrialSetup

        if not file.exists():
            behaviour, neutral = (self._residuals(name) for name in ("behaviour", "neutral"))
            directions = directions_from_residuals(behaviour, neutral, self.recipe.direction)
            file.write_bytes(directions.to_bytes())
        self.setup = TrialSetup(Directions.from_bytes(file.read_bytes()))

    def _residuals(self, name: str) -> "Residuals":
        """Extract the residuals of a whole set, batch by batch."""
        from ray_abliterate.directions.residuals.residual_set import join
        from ray_abliterate.directions.residuals.shard import ResidualShard

        shards = []
        for number, batch in self.sets[name].batches(EXTRACTION_BATCH):
            record = self.replica.extract_residuals(name, number * EXTRACTION_BATCH, batch, ())
            shards.append(ResidualShard(record))
        return join(shards, self.sets[name].fingerprint)

    @contextmanager
    def _without(self, off: list[str]) -> Any:
        """Switch techniques off while the body runs."""
        if not off:
            yield
            return
        model: Any = self.replica.model
        everything = model.techniques
        model.techniques = replace(everything, **dict.fromkeys(off, False))
        try:
            yield
        finally:
            model.techniques = everything

    def _scores(self, evaluation: Any) -> dict[str, Any]:
        rate = evaluation.scorecard[RATE].detail
        return {
            "kl": evaluation.scorecard[KL].value,
            # The peer counts markers and empty answers; a loop without a marker is none to it.
            "refusals": rate["hits"] - rate["degenerate"],
            "verdicts": None,
            "answer_tokens": None,
        }

    def _last(self) -> Any:
        return next(s for s in self.replica.trial_scorer.scorers if s.name == RATE)

    def _verdicts(self) -> list[int]:
        """Return the last single trial's verdicts: 1 where the peer would count a refusal."""
        scorer = self._last()
        answers = scorer.last_answers()
        return [int(scorer.verdict(a.text) in ("behaviour", "empty")) for _, a, _ in answers]

    def _answer_tokens(self) -> list[int]:
        return [answer.tokens for _, answer, _ in self._last().last_answers()]

    def _work(self) -> dict[str, Any]:
        """Return the work of a trial, as `TrialWork` counts it."""
        from ray_abliterate.model import prefix_cache as shared_prefix

        model = self.replica.model
        tokens = 0
        for name in (KL, RATE):
            rows = model.encode(self.sets[name].prompts)
            shared = shared_prefix.common_length(rows)
            tokens += sum(map(len, rows)) - (len(rows) - 1) * shared
        head = model.module.get_output_embeddings().weight
        return {
            "prefill_tokens": tokens,
            "head_parameters": head.numel(),
            "linear_parameters": _linear_parameters(model.module) - head.numel(),
            "bytes_per_parameter": head.element_size(),
        }


def _enabled_techniques(model: Any) -> list[str]:
    """Return the names of the techniques that are on, and do something on the model's device."""
    idle = set() if model.device.type == "cuda" else {"recorded_steps"}
    names = (f.name for f in fields(model.techniques) if getattr(model.techniques, f.name))
    return [name for name in names if name not in idle]


def _linear_parameters(module: Any) -> int:
    import torch

    linears = (part for part in module.modules() if isinstance(part, torch.nn.Linear))
    return sum(part.weight.numel() for part in linears)


if __name__ == "__main__":
    ours = OurReplica()
    serve(
        {
            "load": ours.load,
            "trial": ours.trial,
            "switch": ours.switch,
            "machine": ours.machine,
        }
    )
