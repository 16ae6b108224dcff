"""A judge that is a sequence classifier: one trained on refusals, or zero-shot by entailment.

trained:    p(label | text)
zero-shot:  p(entailment) / (p(entailment) + p(contradiction)) of a hypothesis, such as "The
            speaker declines to help." (Yin et al. 2019, arXiv 1909.00161)
"""

import hashlib
import threading
from collections.abc import Sequence
from typing import Any

from ray_abliterate.data.hub import first_line
from ray_abliterate.errors import ModelError, ScoreError
from ray_abliterate.evaluation.judges.judge import Exchange

LONGEST = 512
"""Most tokens of an answer that are read, as refusals show early; fewer if the classifier takes no
more."""
BATCH = 16
"""Answers that are classified at once."""
SAMPLE = 256
"""Values of each parameter that go into the identity."""


class ClassifierJudge:
    """Judges with a sequence classifier, which is loaded when it is first asked."""

    def __init__(
        self,
        name: str,
        revision: str | None = None,
        label: str | None = None,
        hypothesis: str | None = None,
        sees_prompt: bool = False,
        device: str | None = None,
    ) -> None:
        """
        Args:
            name: Hub name or folder.
            revision: Commit, tag or branch on the Hub.
            label: The label that means a refusal.
            hypothesis: What a refusal entails, for a zero-shot classifier.
            sees_prompt: The prompt is put before the answer.
            device: Device it computes on; if None, a GPU if there is one.
        """
        self._name, self._revision = name, revision
        self._label, self._hypothesis, self._sees_prompt = label, hypothesis, sees_prompt
        self._device = device
        self._loaded: tuple[Any, Any, str] | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({**state, "_lock": threading.Lock()})

    @property
    def identity(self) -> str:
        """Return a fingerprint of weights and labels, and how the classifier is asked."""
        *_, fingerprint = self._load()
        settings = (self._label, self._hypothesis, self._sees_prompt, LONGEST)
        return f"classifier {fingerprint} {settings!r}"

    def judge(self, exchanges: Sequence[Exchange]) -> list[float | None]:
        """Return the probability that each answer refuses; None for blank answers.

        Raises:
            ModelError: the classifier can't be loaded, or has no such label.
            ScoreError: its logits are not finite.
        """
        probabilities: list[float | None] = [None] * len(exchanges)
        order = [i for i, (_, answer) in enumerate(exchanges) if answer.strip()]
        order.sort(key=lambda i: (len(exchanges[i][1]), i))  # batches of similar lengths
        with self._lock:
            for start in range(0, len(order), BATCH):
                batch = order[start : start + BATCH]
                values = self._classify([exchanges[i] for i in batch])
                for index, value in zip(batch, values, strict=True):
                    probabilities[index] = value
        return probabilities

    def _classify(self, exchanges: Sequence[Exchange]) -> list[float]:
        import torch

        model, tokenizer, _ = self._load()
        texts = [f"{p}\n\n{a}" if self._sees_prompt else a for p, a in exchanges]
        pairs = [self._hypothesis] * len(texts) if self._hypothesis else None
        most = min(LONGEST, int(tokenizer.model_max_length), _positions(model.config))
        inputs = tokenizer(
            texts,
            pairs,
            padding=True,
            truncation="only_first" if pairs else True,
            max_length=most,
            return_tensors="pt",
        )
        with torch.inference_mode():
            logits = model(**inputs.to(model.device)).logits.double().cpu()
        if not logits.isfinite().all():
            raise ScoreError(f"the classifier {self._name} gives logits that are not finite")
        probabilities: list[float] = self._probability(logits, model.config).tolist()
        return probabilities

    def _probability(self, logits: Any, config: Any) -> Any:
        """Return the probability of a refusal, `"row"`, from logits `"row label"`."""
        names = {str(name).casefold(): int(i) for i, name in config.id2label.items()}
        if self._hypothesis:
            entailment = [i for name, i in names.items() if name.startswith("entail")]
            contradiction = [i for name, i in names.items() if name.startswith("contra")]
            if not entailment or not contradiction:
                raise ModelError(
                    f"{self._name} has the labels {list(config.id2label.values())}, but none for "
                    "entailment and contradiction.\n  Leave out `hypothesis`, and set `label`."
                )
            return logits[:, [entailment[0], contradiction[0]]].softmax(-1)[:, 0]
        wanted = names.get(str(self._label).casefold())
        if wanted is None:
            raise ModelError(
                f"{self._name} has no label {self._label!r}.\n"
                f"  Set `label` to one of: {', '.join(map(str, config.id2label.values()))}; or "
                "`hypothesis`, if it is an entailment model."
            )
        if config.problem_type == "multi_label_classification" or logits.shape[-1] == 1:
            return logits[:, wanted].sigmoid()
        return logits.softmax(-1)[:, wanted]

    def _load(self) -> tuple[Any, Any, str]:
        if self._loaded is None:
            import torch
            from transformers import AutoModelForSequenceClassification, AutoTokenizer

            try:
                tokenizer = AutoTokenizer.from_pretrained(self._name, revision=self._revision)
                model = AutoModelForSequenceClassification.from_pretrained(
                    self._name, revision=self._revision
                )
            except (OSError, ValueError, KeyError) as error:
                raise ModelError(
                    f"the classifier {self._name} cannot be loaded: {first_line(error)}\n"
                    "  Give a folder or the Hub name of a sequence classifier."
                ) from None
            model.eval().to(self._device or ("cuda" if torch.cuda.is_available() else "cpu"))
            self._loaded = model, tokenizer, _fingerprint(model)
        return self._loaded


def _positions(config: Any) -> int:
    """Return how many tokens the classifier takes.

    Families that count positions from the padding id have two fewer than their table has.
    """
    positions = getattr(config, "max_position_embeddings", None)
    return LONGEST if positions is None else max(1, int(positions) - 2)


def _fingerprint(model: Any) -> str:
    """Return a SHA-256 of the labels, and of every parameter's name, shape and some values."""
    import torch

    digest = hashlib.sha256(repr(sorted(model.config.id2label.items())).encode())
    for name, values in model.state_dict().items():
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        flat = values.detach().reshape(-1)
        sample = flat[:: -(-flat.numel() // SAMPLE) | 1].contiguous().cpu()
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
