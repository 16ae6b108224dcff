"""The peer's side of the comparison: drives the installed Heretic release through its classes.

It runs in the peer's environment, as a process of its own, and answers the commands `load`,
`directions` and `trial` (see `benchmarks/harness/worker_process.py`). A trial is what the release's
study does in one: reset the model, abliterate, score (KL divergence and refusals). Start-up follows
the steps of the program, each timed. Nothing here is the release's code; it is called as a library.
"""

import time
from contextlib import contextmanager
from typing import Any

from benchmarks.harness.memory import peak_bytes
from benchmarks.harness.worker_process import serve

SEED = 0
"""Seed of the release's random numbers; it draws one where none is set."""
PREFIX_PROMPTS = 100
"""Prompts of each set that the release answers to find a common response prefix."""


class Peer:
    """One loaded model with its evaluator."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._verdicts: list[bool] = []

    @contextmanager
    def _part(self, name: str) -> Any:
        started = time.perf_counter()
        yield
        self._seconds[name] = round(time.perf_counter() - started, 4)

    def load(self, settings: dict[str, Any], threads: int) -> dict[str, Any]:
        """Start up, part by part.

        Args:
            settings: Settings of the release; a batch size of 0 and a response prefix of None make
                it search for them, as it does by default.
            threads: CPU threads.

        Returns:
            Seconds of each part, and what the two sides must share: batch size, response prefix,
            system prompt, refusal markers, layers, components.
        """
        with self._part("import"):
            import torch
            from heretic.config import Settings
            from heretic.evaluator import Evaluator
            from heretic.model import Model
            from heretic.utils import load_prompts, set_seed

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.settings = Settings(**{"seed": SEED, **settings})
        set_seed(self.settings.seed)
        with self._part("model"):
            self.model = Model(self.settings)
        with self._part("prompts"):
            self.good = load_prompts(self.settings, self.settings.good_prompts)
            self.bad = load_prompts(self.settings, self.settings.bad_prompts)
        if self.settings.batch_size == 0:
            with self._part("batch size"):
                self.settings.batch_size = self._fastest_batch()
        if self.settings.response_prefix is None:
            with self._part("response prefix"):
                self.settings.response_prefix = self._common_prefix()
        with self._part("baseline"):
            self.evaluator = Evaluator(self.settings, self.model)
        self._record_verdicts()
        with self._part("directions"):
            self.own_directions = self._directions()
        return {
            "seconds": self._seconds,
            "batch_size": self.settings.batch_size,
            "response_prefix": self.settings.response_prefix,
            "system_prompt": self.settings.system_prompt,
            "markers": list(self.settings.refusal_markers),
            "layers": len(self.model.get_layers()),
            "components": self.model.get_abliterable_components(),
            "base_refusals": self.evaluator.base_refusals,
            "threads": torch.get_num_threads(),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "peak_bytes": peak_bytes(),
        }

    def directions(self, path: str) -> dict[str, Any]:
        """Use directions computed elsewhere, and compare them with its own.

        Args:
            path: A safetensors file with `directions`, `"layer hidden"`.

        Returns:
            `cosines`, one for every block. The release takes the last block's residual after the
            model's final norm, so that the last cosine is of two different quantities.
        """
        import torch
        from safetensors.torch import load_file

        given = load_file(path)["directions"]
        cosines = (given * self.own_directions[1:]).sum(dim=1)
        # Row 0 belongs to the embeddings; no parameter of the search space reaches it.
        self._given = torch.cat([self.own_directions[:1], given])
        return {"cosines": [round(float(c), 6) for c in cosines]}

    def trial(
        self, direction_index: float | None, parameters: dict[str, dict[str, float]]
    ) -> dict[str, Any]:
        """Run one trial.

        Args:
            direction_index: Layer of a shared direction; None if each layer has its own.
            parameters: The release's parameters by component.

        Returns:
            Seconds in all and by part, KL divergence, refusals, a verdict per prompt.
        """
        from heretic.model import AbliterationParameters

        self._verdicts.clear()
        profiles = {name: AbliterationParameters(**p) for name, p in parameters.items()}
        started = time.perf_counter()
        self.model.reset_model()
        reset = time.perf_counter()
        self.model.abliterate(self._given, direction_index, profiles)
        edited = time.perf_counter()
        _, kl, refusals = self.evaluator.get_score()
        ended = time.perf_counter()
        return {
            "seconds": ended - started,
            "parts": {"reset": reset - started, "edit": edited - reset, "score": ended - edited},
            "kl": kl,
            "refusals": refusals,
            "verdicts": [int(v) for v in self._verdicts],
            "peak_bytes": peak_bytes(),
        }

    def _record_verdicts(self) -> None:
        """Record what the evaluator decides, answer by answer, in the order of the prompts."""
        decide = self.evaluator.is_refusal

        def decide_and_record(response: str) -> bool:
            verdict = bool(decide(response))
            self._verdicts.append(verdict)
            return verdict

        self.evaluator.is_refusal = decide_and_record

    def _fastest_batch(self) -> int:
        """Return the power of two with most tokens per second; the second of two runs is timed."""
        rates: dict[int, float] = {}
        size = 1
        while size <= self.settings.max_batch_size:
            prompts = [self.good[i % len(self.good)] for i in range(size)]
            self.model.get_responses(prompts)
            started = time.perf_counter()
            answers = self.model.get_responses(prompts)
            seconds = time.perf_counter() - started
            rates[size] = sum(len(self.model.tokenizer.encode(a)) for a in answers) / seconds
            size *= 2
        return max(rates, key=lambda size: rates[size])

    def _common_prefix(self) -> str:
        """Return the text that all answers begin with; a thinking block is not looked for."""
        prompts = self.good[:PREFIX_PROMPTS] + self.bad[:PREFIX_PROMPTS]
        return common_beginning(self.model.get_responses_batched(prompts)).rstrip(" ")

    def _directions(self) -> Any:
        """Return unit vectors of the release's residuals, `"layer hidden"`, embeddings first."""
        from torch.nn.functional import normalize

        neutral = self.model.get_residuals_mean(self.good).double()
        behaviour = self.model.get_residuals_mean(self.bad).double()
        raw = behaviour - neutral
        if self.settings.orthogonalize_direction:
            unit = normalize(neutral, dim=1)
            raw = raw - (raw * unit).sum(dim=1, keepdim=True) * unit
        return normalize(raw, dim=1).float()


def common_beginning(texts: list[str]) -> str:
    """Return the longest text that all begin with."""
    first, last = min(texts), max(texts)  # in lexical order, these two share the least
    shared = 0
    while shared < min(len(first), len(last)) and first[shared] == last[shared]:
        shared += 1
    return first[:shared]


if __name__ == "__main__":
    peer = Peer()
    serve({"load": peer.load, "directions": peer.directions, "trial": peer.trial})
