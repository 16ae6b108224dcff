"""The evaluation engine: logits and greedy answers of fixed batches of prompts, nothing twice.

What the base model computes for a batch is learned once (`learning`): the hidden states below any
edit, the keys and values of those layers, and the answers. A trial then starts at its first edited
block, and checks the base model's answer as a draft, many tokens a pass, before it goes on token by
token: greedy verification (Leviathan et al. 2023, arXiv 2211.17192, at temperature 0), so the
tokens are the ones of plain greedy decoding. Several trials share a pass as *copies* of the batch,
each with an edit of its own (`ablation/virtual_edits.py`). Knows nothing about prompts or markers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import record_function

from ray_abliterate.model.component_outputs import Places
from ray_abliterate.model.engine.batch import (
    Batch,
    Row,
    Tokens,
    draft_tokens,
    on_device,
    prompt_tokens,
)
from ray_abliterate.model.engine.decoder import Decoder
from ray_abliterate.model.engine.draft_schedule import DraftPlan
from ray_abliterate.model.engine.generation_state import TextFormat, Writing, Written
from ray_abliterate.model.engine.kv_cache import Slab
from ray_abliterate.model.engine.packed_model import PackedModel
from ray_abliterate.model.prefix_cache import WORTHWHILE_TOKENS, common_length
from ray_abliterate.search.score import AnswerWatch

PROMPTS, DRAFTS = "prompts", "drafts"
"""Names of the stages in a profile."""
FIRST = "drafts 0"
"""Name of the pass that feeds prompts with the first draft tokens."""


@dataclass(frozen=True)
class Techniques:
    """What the engine may do to be fast. All give the same answers; off for measurements only."""

    shared_prefix: bool = True
    """Tokens that all prompts begin with are computed once per pass."""
    layer_reuse: bool = True
    """Blocks below the first edited one are not run for tokens that the base model has seen."""
    drafts: bool = True
    """The base model's answer is checked as a draft."""
    early_exit: bool = True
    """Answers end when they are decided."""
    recorded_steps: bool = True
    """Steps on a GPU are recorded once and replayed."""


class Engine:
    """Runs batches through one model."""

    def __init__(
        self,
        model: PackedModel,
        end_tokens: Sequence[int],
        text: TextFormat,
        blocks: int,
    ) -> None:
        """
        Args:
            model: The model.
            end_tokens: Tokens that end an answer.
            text: Turns tokens into text.
            blocks: How many the model has.
        """
        self.techniques = Techniques()
        self.untouched = 0
        """Blocks, from the first, that are the base model's now."""
        self.model = model
        self._ends = frozenset(end_tokens)
        self._text = text
        self.kept: Sequence[int] = range(1, blocks)
        """Blocks whose inputs are kept of the base model; by memory, every k-th."""
        self._learning = False
        self._blocks = blocks
        self.drafts = True
        """Drafts pay on this device."""
        self.decoder = Decoder(model)
        self.windows: set[int] = set()
        """Attention windows that the packed passes know of."""
        self.kept_bytes = 0
        """Keys and values of one token, all layers."""

    def batch(self, rows: Sequence[Row]) -> Batch:
        """Rows as a batch, with the beginning they share."""
        shared = common_length(rows) if self.techniques.shared_prefix else 0
        return Batch(list(rows), shared if shared >= WORTHWHILE_TOKENS else 0)

    @contextmanager
    def learning(self) -> Iterator[None]:
        """The model is the base model in this block: remember what it computes."""
        self._learning = True
        try:
            yield
        finally:
            self._learning = False

    @torch.inference_mode()
    def logits(
        self, batch: Batch, last: Sequence[int], edits: Sequence[int] = (0,)
    ) -> list[list[Tensor]]:
        """Raw logits of each row's last so many tokens, `"token vocab"`, for each edit."""
        slab = self._slab(batch, len(edits), 0)
        plan = DraftPlan.of([()] * len(batch.rows))
        found = self._prompt_pass(batch, slab, f"last {last}", plan, last, edits)
        self.windows |= slab.windows
        self.kept_bytes = self.kept_bytes or slab.bytes // (slab.rows * slab.positions)
        parts = torch.split(found, list(last) * len(edits))
        count = len(last)
        return [list(parts[i * count : (i + 1) * count]) for i in range(len(edits))]

    def residuals(self, batch: Batch, more: Places = ()) -> Tensor:
        """Every block's output at each row's last token, `"row layer hidden"`, float32; `more`
        modules' outputs come after them."""
        slab, plan = self._slab(batch, 1, 0), DraftPlan.of([()] * len(batch.rows))
        tokens = prompt_tokens(batch, plan, plan, [1] * len(batch.rows), 1)
        return self.model.residuals(tokens.given(self.model.device, (0,)), slab, more)

    @torch.inference_mode()
    def answer(
        self,
        batch: Batch,
        limit: int,
        watches: Sequence[AnswerWatch | None],
        indices: Sequence[int],
        edits: Sequence[int] = (0,),
    ) -> list[list[Written]]:
        """Greedy answers, for each edit.

        Args:
            batch: The prompts.
            limit: Tokens of an answer at most.
            watches: May end answers early; one for each edit.
            indices: What a watch calls each row.
            edits: Numbers of the edits that share the passes.
        """
        writings = self._writings(limit, watches, indices)
        if not any(writing.live() for writing in writings):
            return [writing.answers() for writing in writings]
        if self._said_before(batch, writings):
            return [writing.answers() for writing in writings]
        writings = self._writings(limit, watches, indices)
        slab = self._slab(batch, len(edits), limit)
        self._lend(batch, slab, len(edits))
        self._check_drafts(batch, slab, writings, edits)
        if self._learning:
            self._keep_keys(batch, slab)
        self.decoder.write_on(batch, slab, writings, edits, self.techniques.recorded_steps)
        if self._learning:
            batch.answers = writings[0].answers()
            if self.drafts:
                self._learn_drafts(batch, writings[0].tokens, limit)
        return [writing.answers() for writing in writings]

    def _writings(
        self, limit: int, watches: Sequence[AnswerWatch | None], indices: Sequence[int]
    ) -> list[Writing]:
        heeded = [w if self.techniques.early_exit else None for w in watches]
        return [Writing(indices, limit, self._ends, w, self._text) for w in heeded]

    def _said_before(self, batch: Batch, writings: Sequence[Writing]) -> bool:
        """Whether nothing is edited, and the base model's answers, as far as they were written,
        are all that is asked for."""
        untouched = self.untouched >= self._blocks and self.techniques.layer_reuse
        if batch.answers is None or not untouched or self._learning:
            return False
        for writing in writings:
            for row, answer in enumerate(batch.answers):
                writing.take(row, answer.tokens, answer.tokens)
        return not any(writing.live() for writing in writings)

    # Passes

    def _slab(self, batch: Batch, copies: int, limit: int) -> Slab:
        """Room for the rows of all copies, and then for the beginning that each copy's share."""
        return self.decoder.slab(copies * (len(batch.rows) + 1), max(map(len, batch.rows)) + limit)

    def _prompt_pass(
        self,
        batch: Batch,
        slab: Slab,
        name: str,
        plan: DraftPlan,
        wanted: Sequence[int],
        edits: Sequence[int],
    ) -> Tensor:
        """Prompts from the start, with the draft tokens that the first pass feeds."""
        learned = batch.drafts if batch.drafts and name == FIRST else None
        known = DraftPlan.of(learned) if learned else plan
        tokens = prompt_tokens(batch, plan, known, wanted, len(edits))
        return self._run(batch, slab, name, tokens, edits)

    def _run(
        self, batch: Batch, slab: Slab, name: str, tokens: Tokens, edits: Sequence[int]
    ) -> Tensor:
        """One pass, begun as high as it may be."""
        start, states = 0, None
        if self.techniques.layer_reuse and not self._learning:
            start = batch.start(name, self.untouched)
        if start:
            states = batch.states[name][start]
            if tokens.chosen != list(range(len(states))):
                states = states.index_select(0, on_device(tokens.chosen, states.device))
        given = tokens.given(self.model.device, edits, start, states)
        drafted = name.startswith("drafts") and name != FIRST
        with record_function(DRAFTS if drafted else PROMPTS):
            logits, inputs = self.model.run(given, slab, self.kept if self._learning else ())
        if self._learning:
            batch.states[name] = inputs
        return logits

    # Drafts

    def _drafts(self, batch: Batch) -> DraftPlan:
        used = self.techniques.drafts and not self._learning and batch.drafts is not None
        return DraftPlan.of(batch.drafts if used and batch.drafts else [()] * len(batch.rows))

    def _check_drafts(
        self, batch: Batch, slab: Slab, writings: Sequence[Writing], edits: Sequence[int]
    ) -> None:
        """The prompt pass, and as many draft passes as rows agree with their drafts."""
        plan, count = self._drafts(batch), len(batch.rows)
        wanted = [plan.wanted(row, 0) for row in range(count)]
        logits = self._prompt_pass(batch, slab, FIRST, plan, wanted, edits)
        going = list(range(count * len(edits)))
        for number in range(plan.passes):
            if number:
                logits = self._draft_pass(batch, slab, number, plan, going, edits)
            said, agreed, at = logits.argmax(-1).tolist(), [], 0
            for place in going:
                copy, row = divmod(place, count)
                end = at + plan.wanted(row, number)
                if not number:
                    writings[copy].open(row, logits[at])
                if writings[copy].take(row, said[at:end], plan.checked(row, number)):
                    agreed.append(place)
                at = end
            live = {copy * count + row for copy, w in enumerate(writings) for row in w.live()}
            going = [p for p in agreed if p in live and plan.wanted(p % count, number + 1)]
            if not going:
                return

    def _draft_pass(
        self,
        batch: Batch,
        slab: Slab,
        number: int,
        plan: DraftPlan,
        going: Sequence[int],
        edits: Sequence[int],
    ) -> Tensor:
        """The next draft tokens of the rows that agree so far."""
        tokens = draft_tokens(batch, number, plan, going)
        return self._run(batch, slab, f"drafts {number}", tokens, edits)

    def _learn_drafts(self, batch: Batch, answers: list[list[int]], limit: int) -> None:
        """Run the prompts with their answers once more, in the passes that trials will make."""
        batch.drafts = answers
        plan, slab = DraftPlan.of(answers), self._slab(batch, 1, limit)
        every = range(len(batch.rows))
        wanted = [plan.wanted(row, 0) for row in every]
        self._prompt_pass(batch, slab, FIRST, plan, wanted, (0,))
        for number in range(1, plan.passes):
            going = [row for row in every if plan.fed(row, number)]
            self._draft_pass(batch, slab, number, plan, going, (0,))
        self._keep_keys(batch, slab)

    def _keep_keys(self, batch: Batch, slab: Slab) -> None:
        """Below the highest block that trials start at."""
        batch.keep_keys(slab, max(self.kept, default=0))

    def _lend(self, batch: Batch, slab: Slab, copies: int) -> None:
        """Give a slab the base model's keys and values below the first edited block."""
        if self.techniques.layer_reuse and not self._learning:
            batch.lend_keys(slab, batch.start(FIRST, self.untouched), copies)
