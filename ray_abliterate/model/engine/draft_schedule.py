"""Which tokens of a draft go through the model in which pass, and which logits check them.

Pass 0 feeds the prompt and the first draft tokens. The logits after the prompt's last token check
the first draft token, those after a draft token the next one. The last token of a draft is never
fed: nothing is asked after it. Pure numbers; knows nothing about models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

CHUNKS = (8, 16, 32, 64)
"""Draft tokens fed per pass, as long as all agree: more at a time, the longer they do."""


@dataclass(frozen=True)
class DraftPlan:
    """The draft of each row of a batch, and the passes that check it.

    Attributes:
        drafts: Draft tokens by row; empty for none.
        bounds: Pass p feeds the draft tokens from `bounds[p]` up to `bounds[p + 1]`.
    """

    drafts: tuple[tuple[int, ...], ...]
    bounds: tuple[int, ...]

    @classmethod
    def of(cls, drafts: Sequence[Sequence[int]]) -> "DraftPlan":
        """The passes for these drafts."""
        longest = max(max(len(draft) - 1, 0) for draft in drafts)
        bounds = [0]
        for size in (*CHUNKS, longest):
            if bounds[-1] < longest:
                bounds.append(min(bounds[-1] + size, longest))
        return cls(tuple(map(tuple, drafts)), tuple(bounds))

    @property
    def passes(self) -> int:
        """How many, the prompt's included."""
        return max(len(self.bounds) - 1, 1)

    def begin(self, number: int) -> int:
        """Draft tokens fed before a pass."""
        return self.bounds[min(number, len(self.bounds) - 1)]

    def fed(self, row: int, number: int) -> tuple[int, ...]:
        """Draft tokens of a row that a pass feeds."""
        return self.drafts[row][:-1][self.begin(number) : self.begin(number + 1)]

    def offsets(self, number: int) -> list[int]:
        """Where each row's tokens begin in a pass that feeds all rows' drafts only."""
        counts = [len(self.fed(row, number)) for row in range(len(self.drafts))]
        return [0, *accumulate(counts)][:-1]

    def wanted(self, row: int, number: int) -> int:
        """Logits wanted of a row in a pass: its last ones."""
        fed = len(self.fed(row, number)) if number < self.passes else 0
        return fed + (number == 0)

    def checked(self, row: int, number: int) -> tuple[int, ...]:
        """The draft tokens that these logits check."""
        first = self.begin(number) + (number > 0)
        return self.drafts[row][first : first + self.wanted(row, number)]
