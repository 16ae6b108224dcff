"""The passes of speculative decoding: which draft tokens are fed when, and what verifies them.

Pass 0 feeds the prompt and the first draft tokens. The logits after the prompt's last token verify
the first draft token, those after a draft token the next one. The last token of a draft is never
fed, since nothing is asked after it. Pure numbers; knows nothing about models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

CHUNKS = (8, 16, 32, 64)
"""Draft tokens fed per pass, as long as all agree: more at a time, the longer they do."""


@dataclass(frozen=True)
class DraftSchedule:
    """The draft of each row of a batch, and the passes that verify it.

    Attributes:
        drafts: Draft tokens by row; empty for a row without a draft.
        bounds: Pass p feeds the draft tokens from `bounds[p]` up to `bounds[p + 1]`.
    """

    drafts: tuple[tuple[int, ...], ...]
    bounds: tuple[int, ...]

    @classmethod
    def of(cls, drafts: Sequence[Sequence[int]]) -> "DraftSchedule":
        """Return the passes for these drafts, one a row."""
        longest = max(max(len(draft) - 1, 0) for draft in drafts)
        bounds = [0]
        for size in (*CHUNKS, longest):
            if bounds[-1] < longest:
                bounds.append(min(bounds[-1] + size, longest))
        return cls(tuple(map(tuple, drafts)), tuple(bounds))

    @property
    def passes(self) -> int:
        """The number of passes, the prompt's included."""
        return max(len(self.bounds) - 1, 1)

    def first_fed(self, number: int) -> int:
        """Return the index of the first draft token that pass `number` feeds."""
        return self.bounds[min(number, len(self.bounds) - 1)]

    def fed(self, row: int, number: int) -> tuple[int, ...]:
        """Return the draft tokens of a row that pass `number` feeds."""
        return self.drafts[row][:-1][self.first_fed(number) : self.first_fed(number + 1)]

    def offsets(self, number: int) -> list[int]:
        """Return where each row's tokens begin in a pass that feeds all rows' drafts alone."""
        counts = [len(self.fed(row, number)) for row in range(len(self.drafts))]
        return [0, *accumulate(counts)][:-1]

    def logits_needed(self, row: int, number: int) -> int:
        """Return how many of a row's logits pass `number` needs: those of its last tokens."""
        fed = len(self.fed(row, number)) if number < self.passes else 0
        return fed + (number == 0)  # the prompt's last token verifies, too

    def verified(self, row: int, number: int) -> tuple[int, ...]:
        """Return the draft tokens that those logits verify."""
        first = self.first_fed(number) + (number > 0)
        return self.drafts[row][first : first + self.logits_needed(row, number)]
