"""The evaluation engine: logits and greedy answers of fixed batches of prompts, nothing twice.

What the base model computes for a batch is learned once (`learning`): the hidden states below any
edit, the keys and values of those layers, and the answers. A trial then starts at its first edited
block, and verifies the base model's answer as a draft, many tokens a pass, before it goes on token
by token. That is speculative decoding at temperature 0 (Leviathan et al. 2023, arXiv 2211.17192),
so the tokens are those of plain greedy decoding. Several trials share a pass as *copies* of the
batch, each with an edit of its own (`ablation/virtual_edits.py`). Knows nothing about prompts or
markers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import record_function

from ray_abliterate.model.component_outputs import ComponentModules
from ray_abliterate.model.engine.batch import (
    Batch,
    BatchRow,
    PassTokens,
    draft_tokens,
    prompt_tokens,
    to_device,
)
from ray_abliterate.model.engine.decoder import Decoder
from ray_abliterate.model.engine.draft_schedule import DraftSchedule
from ray_abliterate.model.engine.generation_state import (
    GeneratedTokens,
    GenerationState,
    TextDecoder,
)
from ray_abliterate.model.engine.kv_cache import KVCache
from ray_abliterate.model.engine.packed_model import PackedModel
from ray_abliterate.model.prefix_cache import WORTHWHILE_TOKENS, common_length
from ray_abliterate.model.text_model import AnswerObserver

PROMPTS, DRAFTS = "prompts", "drafts"
"""Names of the stages in a profile."""
FIRST_PASS = "drafts 0"
"""Name of the pass that feeds prompts with the first draft tokens."""


@dataclass(frozen=True)
class Techniques:
    """What makes the engine fast. Every technique gives the same answers; measurements switch one
    off at a time, and store its name.

    Attributes:
        shared_prefix: Tokens that all prompts begin with are computed once per pass.
        layer_reuse: Blocks below the first edited one are not run for tokens that the base model
            has seen.
        drafts: Speculative decoding: the base model's answer is verified as a draft.
        early_exit: Answers end as soon as the observer knows enough.
        recorded_steps: Decode steps on a GPU are recorded once as CUDA graphs and replayed.
    """

    shared_prefix: bool = True
    layer_reuse: bool = True
    drafts: bool = True
    early_exit: bool = True
    recorded_steps: bool = True


class Engine:
    """Runs batches of prompts through one model.

    Attributes:
        model: Runs the packed passes.
        decoder: Writes answers token by token.
        techniques: What the engine may do to be fast.
        untouched: Blocks, from the first, that are the base model's now.
        stored_blocks: Blocks whose inputs are stored of the base model; by memory, every k-th.
        speculative: Whether speculative decoding pays on this device.
        windows: Attention windows that packed passes have met, and serve.
        kv_bytes_per_token: Bytes of the keys and values of one token, all layers; 0 until a pass
            was run.
    """

    def __init__(
        self,
        model: PackedModel,
        end_tokens: Sequence[int],
        text: TextDecoder,
        blocks: int,
    ) -> None:
        """
        Args:
            model: Runs the packed passes.
            end_tokens: Tokens that end an answer.
            text: Turns tokens into text.
            blocks: The number of the model's blocks.
        """
        self.model = model
        self.decoder = Decoder(model)
        self.techniques = Techniques()
        self.untouched = 0
        self.stored_blocks: Sequence[int] = range(1, blocks)
        self.speculative = True
        self.windows: set[int] = set()
        self.kv_bytes_per_token = 0
        self._ends = frozenset(end_tokens)
        self._text = text
        self._blocks = blocks
        self._learning = False

    def batch(self, rows: Sequence[BatchRow]) -> Batch:
        """Return rows as a batch, with the beginning that they share."""
        shared = common_length(rows) if self.techniques.shared_prefix else 0
        return Batch(list(rows), shared if shared >= WORTHWHILE_TOKENS else 0)

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Remember what the model computes inside the block, in which it must be the base model."""
        self._learning = True
        try:
            yield
        finally:
            self._learning = False

    @torch.inference_mode()
    def logits(
        self, batch: Batch, last: Sequence[int], edits: Sequence[int] = (0,)
    ) -> list[list[Tensor]]:
        """Return raw logits by edit and row, each `"token vocab"`.

        Args:
            batch: The rows.
            last: How many logits of each row: those of its last tokens.
            edits: Numbers of the edits that share the pass.
        """
        kv_cache = self._new_kv_cache(batch, len(edits), 0)
        no_drafts = DraftSchedule.of([()] * len(batch.rows))
        flat = self._prompt_pass(batch, kv_cache, f"last {last}", no_drafts, last, edits)
        self.windows |= kv_cache.windows
        if not self.kv_bytes_per_token:
            self.kv_bytes_per_token = kv_cache.bytes // (kv_cache.rows * kv_cache.positions)
        parts = torch.split(flat, list(last) * len(edits))  # (copy * row) of (token, vocab)
        rows = len(last)
        return [list(parts[i * rows : (i + 1) * rows]) for i in range(len(edits))]

    def residuals(self, batch: Batch, components: ComponentModules = ()) -> Tensor:
        """Return every block's output at each row's last token, `"row layer hidden"`, float32.

        The outputs of `components` come after those of the blocks.
        """
        kv_cache = self._new_kv_cache(batch, 1, 0)
        no_drafts = DraftSchedule.of([()] * len(batch.rows))
        tokens = prompt_tokens(batch, no_drafts, no_drafts, [1] * len(batch.rows), 1)
        packed = tokens.as_pass(self.model.device, (0,))
        return self.model.residuals(packed, kv_cache, components)

    @torch.inference_mode()
    def answer(
        self,
        batch: Batch,
        limit: int,
        observers: Sequence[AnswerObserver | None],
        indices: Sequence[int],
        edits: Sequence[int] = (0,),
    ) -> list[list[GeneratedTokens]]:
        """Return greedy answers by edit and row.

        Args:
            batch: The prompts.
            limit: The most tokens of an answer.
            observers: Read along, and may stop answers early; one for each edit.
            indices: The number that an observer knows each row by.
            edits: Numbers of the edits that share the passes.
        """
        states = self._begin(limit, observers, indices)
        if not any(state.unfinished_rows() for state in states):
            return [state.answers() for state in states]
        if self._reuse_answers(batch, states):
            return [state.answers() for state in states]
        states = self._begin(limit, observers, indices)
        kv_cache = self._new_kv_cache(batch, len(edits), limit)
        self._fill_kv_cache(batch, kv_cache, len(edits))
        self._verify_drafts(batch, kv_cache, states, edits)
        if self._learning:
            self._store_kv(batch, kv_cache)
        self.decoder.decode(batch, kv_cache, states, edits, self.techniques.recorded_steps)
        if self._learning:
            batch.answers = states[0].answers()
            if self.speculative:
                self._learn_drafts(batch, states[0].tokens, limit)
        return [state.answers() for state in states]

    def _begin(
        self, limit: int, observers: Sequence[AnswerObserver | None], indices: Sequence[int]
    ) -> list[GenerationState]:
        """Return empty answers of each copy; observers begin anew."""
        return [
            GenerationState(
                indices,
                limit,
                self._ends,
                observer if self.techniques.early_exit else None,
                self._text,
            )
            for observer in observers
        ]

    def _reuse_answers(self, batch: Batch, states: Sequence[GenerationState]) -> bool:
        """Replay the base model's answers into `states`, if no block is edited.

        Returns:
            Whether they are all that is asked for. If not, `states` must be begun anew.
        """
        unedited = self.untouched >= self._blocks and self.techniques.layer_reuse
        if batch.answers is None or not unedited or self._learning:
            return False
        for state in states:
            for row, answer in enumerate(batch.answers):
                state.accept(row, answer.tokens, answer.tokens)
        return not any(state.unfinished_rows() for state in states)

    # Passes

    def _new_kv_cache(self, batch: Batch, copies: int, limit: int) -> KVCache:
        """Return room for the rows of all copies, and behind them for each copy's shared prefix."""
        rows, positions = copies * (len(batch.rows) + 1), max(map(len, batch.rows)) + limit
        return self.decoder.new_kv_cache(rows, positions)

    def _prompt_pass(
        self,
        batch: Batch,
        kv_cache: KVCache,
        name: str,
        schedule: DraftSchedule,
        logits: Sequence[int],
        edits: Sequence[int],
    ) -> Tensor:
        """Run the prompts from the start, with the draft tokens that the first pass feeds.

        Returns:
            Logits of each row's last `logits[row]` tokens, `"token vocab"`, copy by copy.
        """
        learned = batch.drafts if batch.drafts and name == FIRST_PASS else None
        base_schedule = DraftSchedule.of(learned) if learned else schedule
        tokens = prompt_tokens(batch, schedule, base_schedule, logits, len(edits))
        return self._run(batch, kv_cache, name, tokens, edits)

    def _run(
        self, batch: Batch, kv_cache: KVCache, name: str, tokens: PassTokens, edits: Sequence[int]
    ) -> Tensor:
        """Run one pass from the highest block that it may start at."""
        start, states = 0, None
        if self.techniques.layer_reuse and not self._learning:
            start = batch.first_block(name, self.untouched)
        if start:
            states = batch.states[name][start]  # (base token, hidden)
            if tokens.base_tokens != list(range(len(states))):
                states = states.index_select(0, to_device(tokens.base_tokens, states.device))
        packed = tokens.as_pass(self.model.device, edits, start, states)
        drafts_only = name.startswith("drafts") and name != FIRST_PASS
        with record_function(DRAFTS if drafts_only else PROMPTS):
            record = self.stored_blocks if self._learning else ()
            logits, inputs = self.model.run(packed, kv_cache, record)
        if self._learning:
            batch.states[name] = inputs
        return logits

    # Speculative decoding

    def _schedule(self, batch: Batch) -> DraftSchedule:
        used = self.techniques.drafts and not self._learning and batch.drafts is not None
        return DraftSchedule.of(batch.drafts if used and batch.drafts else [()] * len(batch.rows))

    def _verify_drafts(
        self,
        batch: Batch,
        kv_cache: KVCache,
        states: Sequence[GenerationState],
        edits: Sequence[int],
    ) -> None:
        """Run the prompt pass, and draft passes as long as any row agrees with its draft."""
        schedule, count = self._schedule(batch), len(batch.rows)
        first_logits = [schedule.logits_needed(row, 0) for row in range(count)]
        logits = self._prompt_pass(batch, kv_cache, FIRST_PASS, schedule, first_logits, edits)
        places = list(range(count * len(edits)))  # rows of all copies that are still verified
        for number in range(schedule.passes):
            if number:
                tokens = draft_tokens(batch, number, schedule, places)
                logits = self._run(batch, kv_cache, f"drafts {number}", tokens, edits)
            chosen, agreed, at = logits.argmax(-1).tolist(), [], 0  # chosen: [token of the pass]
            for place in places:
                copy, row = divmod(place, count)
                end = at + schedule.logits_needed(row, number)
                if not number:
                    states[copy].observe_first_logits(row, logits[at])
                if states[copy].accept(row, chosen[at:end], schedule.verified(row, number)):
                    agreed.append(place)
                at = end
            live = {
                copy * count + row
                for copy, state in enumerate(states)
                for row in state.unfinished_rows()
            }
            places = [
                place
                for place in agreed
                if place in live and schedule.logits_needed(place % count, number + 1)
            ]
            if not places:
                return

    def _learn_drafts(self, batch: Batch, answers: list[list[int]], limit: int) -> None:
        """Run the prompts with their answers once more, in the passes that trials will make."""
        batch.drafts = answers
        schedule, kv_cache = DraftSchedule.of(answers), self._new_kv_cache(batch, 1, limit)
        rows = range(len(batch.rows))
        first_logits = [schedule.logits_needed(row, 0) for row in rows]
        self._prompt_pass(batch, kv_cache, FIRST_PASS, schedule, first_logits, (0,))
        for number in range(1, schedule.passes):
            places = [row for row in rows if schedule.fed(row, number)]
            tokens = draft_tokens(batch, number, schedule, places)
            self._run(batch, kv_cache, f"drafts {number}", tokens, (0,))
        self._store_kv(batch, kv_cache)

    def _store_kv(self, batch: Batch, kv_cache: KVCache) -> None:
        """Store keys and values below the highest block that trials start at."""
        batch.store_kv(kv_cache, max(self.stored_blocks, default=0))

    def _fill_kv_cache(self, batch: Batch, kv_cache: KVCache, copies: int) -> None:
        """Fill a KV cache with the base model's keys and values below the first edited block."""
        if self.techniques.layer_reuse and not self._learning:
            batch.fill_kv_cache(kv_cache, batch.first_block(FIRST_PASS, self.untouched), copies)
