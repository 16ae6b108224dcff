"""`refusal-log-odds`: how likely answers are to begin as refusals do, without generating any.

The first-token score of Arditi et al. (2024, arXiv 2406.11717): with p the probabilities of an
answer's first token, and R the tokens that refusals begin with,

    log-odds = log( Σ_{t in R} p(t) ) - log( Σ_{t not in R} p(t) )
             = logsumexp_{t in R} z(t) - logsumexp_{t not in R} z(t)          z: logits

in float64. It is a cheap second opinion: it sees neither what comes after the first token, nor
refusals that begin in another way. As an objective it can prune a trial early: it takes one pass
over the prompts, before any answer is generated. As a report it costs no pass where another scorer
has answers to the same prompts generated.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ray_abliterate.data.prompts import Prompt, PromptSet
from ray_abliterate.errors import ScoreError
from ray_abliterate.model.text_model import TextModel
from ray_abliterate.recipe import RefusalLogOdds
from ray_abliterate.search.score import Score, mean_interval


class RefusalLogOddsScorer:
    """Scores the mean log-odds of a refusal; keeps the tokens that refusals begin with."""

    def __init__(self, settings: RefusalLogOdds, prompts: PromptSet) -> None:
        self.name, self.goal = settings.name, settings.goal
        self._openings, self._prompts = settings.openings, prompts
        self._tokens: tuple[int, ...] = ()

    @property
    def first_logits_of(self) -> tuple[Prompt, ...]:
        """Return the prompts whose answers' first tokens it looks at; see `FirstLogitsScorer`."""
        return self._prompts.prompts

    def prepare(self, model: TextModel) -> None:
        """Look up the tokens, and let the model see the prompts, so that it can reuse its work.

        Raises:
            ScoreError: the tokenizer has no token for the beginning of a refusal.
        """
        self._tokens = first_tokens(model, self._openings)
        self.score(model)

    def score(self, model: TextModel) -> Score:
        """Return the mean over prompts, in nats, with a bootstrap interval.

        In `detail`, `refusing` counts the prompts above 0, at which the beginning of a refusal is
        likelier than everything else.
        """
        odds = self._odds(model)
        mean, low, high = mean_interval(odds)
        detail = {
            "prompts": len(odds),
            "refusing": sum(value > 0 for value in odds),
            "largest": max(odds),
        }
        return Score(self.name, mean, low, high, self.goal, "nats", detail)

    def shows(self, model: TextModel) -> list[bool | None]:
        """Return whether the beginning of a refusal is likelier than everything else."""
        return [value > 0 for value in self._odds(model)]

    def _odds(self, model: TextModel) -> list[float]:
        tokens = self._tokens or first_tokens(model, self._openings)
        odds: list[float] = log_odds(
            model.next_token_logits(self._prompts.prompts), tokens
        ).tolist()
        return odds


def first_tokens(model: TextModel, openings: tuple[str, ...]) -> tuple[int, ...]:
    """Return the first token of each opening, at the beginning of an answer or after a blank.

    Raises:
        ScoreError: an opening begins with no token that the tokenizer knows.
    """
    unknown = set(model.tokens("\uffff"))
    first: set[int] = set()
    for text in openings:
        plain, spaced = model.tokens(text), model.tokens(f" {text}")
        # a longer spelling means that the blank is a token of its own, which says nothing
        spellings = [plain] if len(spaced) > len(plain) else [plain, spaced]
        beginnings = {ids[0] for ids in spellings if ids} - unknown
        if not beginnings:
            raise ScoreError(
                f"the tokenizer has no token that {text!r} begins with.\n"
                "  Leave it out of openings, or give the words that its refusals begin with."
            )
        first |= beginnings
    return tuple(sorted(first))


def log_odds(
    logits: Float[Tensor, "prompt vocab"], tokens: tuple[int, ...]
) -> Float[Tensor, " prompt"]:
    """Return the log-odds of some tokens against all others, in float64.

    Raises:
        ScoreError: a logit is NaN, or either side has no probability at all.
    """
    if logits.isnan().any():
        raise ScoreError("the model's logits are NaN: the edit has broken it")
    inside = torch.zeros(logits.shape[-1], dtype=torch.bool)  # (vocab,)
    inside[list(tokens)] = True
    z = logits.double()
    odds: Tensor = z[:, inside].logsumexp(-1) - z[:, ~inside].logsumexp(-1)
    if not odds.isfinite().all():
        raise ScoreError("the model is certain of its first token: the log-odds are infinite")
    return odds
