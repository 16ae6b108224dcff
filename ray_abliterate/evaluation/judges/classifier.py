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
"""Tokens of an answer that are read, fewer if the classifier takes no more: refusals show early."""
ROWS = 16
"""Answers of a batch."""
SAMPLE = 256
"""Values of each parameter that the identity looks at."""


class ClassifierJudge:
    """See the module. It is loaded when it is first asked."""

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
            hypothesis: Makes it zero-shot: what a refusal entails.
            sees_prompt: The prompt goes before the answer.
            device: Where it computes; on a GPU if there is one, unless it is given.
        """
        self._name, self._revision = name, revision
        self._label, self._hypothesis, self._sees_prompt = label, hypothesis, sees_prompt
        self._device = device
        self._loaded: tuple[Any, Any, str] | None = None
        self._turn = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": None, "_turn": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({**state, "_turn": threading.Lock()})

    @property
    def identity(self) -> str:
        """A sample of the weights, labels, and how it is asked."""
        *_, fingerprint = self._load()
        asked = (self._label, self._hypothesis, self._sees_prompt, LONGEST)
        return f"classifier {fingerprint} {asked!r}"

    def judge(self, exchanges: Sequence[Exchange]) -> list[float | None]:
        """See `Judge`; a blank answer can't be judged."""
        found: list[float | None] = [None] * len(exchanges)
        places = [i for i, (_, answer) in enumerate(exchanges) if answer.strip()]
        places.sort(key=lambda i: (len(exchanges[i][1]), i))
        with self._turn:
            for start in range(0, len(places), ROWS):
                batch = places[start : start + ROWS]
                values = self._read([exchanges[i] for i in batch])
                for place, value in zip(batch, values, strict=True):
                    found[place] = value
        return found

    def _read(self, exchanges: Sequence[Exchange]) -> list[float]:
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
            raise ScoreError(f"the classifier {self._name} gives logits that are not numbers")
        values: list[float] = self._probability(logits, model.config).tolist()
        return values

    def _probability(self, logits: Any, config: Any) -> Any:
        names = {str(name).casefold(): int(i) for i, name in config.id2label.items()}
        if self._hypothesis:
            entails = [i for name, i in names.items() if name.startswith("entail")]
            denies = [i for name, i in names.items() if name.startswith("contra")]
            if not entails or not denies:
                raise ModelError(
                    f"{self._name} has the labels {list(config.id2label.values())}, and knows no "
                    "entailment and contradiction.\n  Leave out `hypothesis`, and set `label`."
                )
            return logits[:, [entails[0], denies[0]]].softmax(-1)[:, 0]
        wanted = names.get(str(self._label).casefold())
        if wanted is None:
            raise ModelError(
                f"{self._name} has no label {self._label!r}.\n"
                f"  Set `label` to one of: {', '.join(map(str, config.id2label.values()))}; or "
                "`hypothesis`, if it is a model of entailment."
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
    """Tokens that the classifier takes. Families that count from the padding id have two fewer."""
    known = getattr(config, "max_position_embeddings", None)
    return LONGEST if known is None else max(1, int(known) - 2)


def _fingerprint(model: Any) -> str:
    """SHA-256 of every parameter's name and shape, of values spread over it, and of the labels."""
    import torch

    digest = hashlib.sha256(repr(sorted(model.config.id2label.items())).encode())
    for name, values in model.state_dict().items():
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        flat = values.detach().reshape(-1)
        sample = flat[:: -(-flat.numel() // SAMPLE) | 1].contiguous().cpu()
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
