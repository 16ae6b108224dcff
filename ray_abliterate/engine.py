"""The evaluation engine: logits and greedy answers of fixed batches of prompts, nothing twice.

What the base model computes for a batch is learned once (`learning`): the hidden states below any
edit, the keys and values of those layers, and the answers. A trial then starts at its first edited
block, and checks the base model's answer as a draft, many tokens a pass, before it goes on token by
token: greedy verification (Leviathan et al. 2023, arXiv 2211.17192, at temperature 0), so the
tokens are the ones of plain greedy decoding. Knows nothing about prompts or markers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ray_abliterate.packed import PackedModel, Pass, Shared, Slab
from ray_abliterate.scoring import AnswerWatch
from ray_abliterate.shared_prefix import WORTHWHILE_TOKENS, common_length

DRAFT_CHUNKS = (8, 16, 32, 64)
"""Draft tokens checked per pass, as long as all agree: more at a time, the longer they do."""
COMPACT_BELOW = 0.75
"""Rows are moved together when so few of the slab's are live: a copy costs about what attention
over dead rows costs in a step or two."""

Row = Sequence[int]


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


@dataclass
class _Learned:
    """What the base model computed in one pass: inputs of some blocks."""

    states: dict[int, Tensor] = field(default_factory=dict)

    def below(self, untouched: int) -> int:
        """The highest block that can be started at when so many are untouched."""
        return max((layer for layer in self.states if layer <= untouched), default=0)


@dataclass
class Batch:
    """Rows that are computed together, and what is known of them.

    Attributes:
        rows: Token ids, at least one each.
        prefix: How many tokens all begin with that are computed once.
        passes: What the base model computed, by pass.
        keys: Its keys by layer, `"row position (head channel)"`, for prompts and drafts.
        values: Its values.
        drafts: Its answers.
    """

    rows: list[Row]
    prefix: int = 0
    passes: dict[Any, _Learned] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    drafts: list[list[int]] | None = None

    @property
    def bytes(self) -> int:
        """Memory of what is known."""
        kept = [t for learned in self.passes.values() for t in learned.states.values()]
        kept += [*self.keys.values(), *self.values.values()]
        return sum(t.numel() * t.element_size() for t in kept)


@dataclass(frozen=True)
class Written:
    """One answer: its tokens, the end token among them, and whether it was cut short."""

    tokens: list[int]
    stopped: bool


class Engine:
    """Runs batches through one model."""

    def __init__(
        self,
        model: PackedModel,
        end_tokens: Sequence[int],
        text_stream: Callable[[], Any],
        kept_layers: Sequence[int],
    ) -> None:
        """
        Args:
            model: The model.
            end_tokens: Tokens that end an answer.
            text_stream: Makes a reader of one answer's tokens (`push(tokens)` gives new text).
            kept_layers: Blocks whose inputs are kept of the base model, by memory.
        """
        self.techniques = Techniques()
        self.untouched = 0
        """Blocks, from the first, that are the base model's now."""
        self._model = model
        self._ends = frozenset(end_tokens)
        self._text_stream = text_stream
        self._kept = tuple(kept_layers)
        self._learning = False

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

    def logits(self, batch: Batch, last: Sequence[int]) -> list[Tensor]:
        """Raw logits of each row's last so many tokens, `"token vocab"`."""
        slab = self._slab(batch, 0)
        found = self._prompt_pass(batch, slab, last, "logits")
        return list(found.split(list(last)))

    def answer(
        self, batch: Batch, limit: int, watch: AnswerWatch | None, indices: Sequence[int]
    ) -> list[Written]:
        """Greedy answers.

        Args:
            batch: The prompts.
            limit: Tokens of an answer at most.
            watch: May end answers early.
            indices: What the watch calls each row.
        """
        plan = _Chunks.of(batch, self.techniques.drafts and not self._learning)
        slab = self._slab(batch, limit)
        writing = _Writing(batch, limit, watch, indices, self._ends, self._text_stream)
        writing.heeds = self.techniques.early_exit
        self._lend(batch, slab)
        self._check_drafts(batch, slab, plan, writing)
        slab.keep(torch.arange(len(batch.rows), device=self._model.device))
        self._write_on(slab, writing)
        answers = writing.answers()
        if self._learning:
            self._learn_answers(batch, [a.tokens for a in answers], limit)
        return answers

    # Passes

    def _slab(self, batch: Batch, limit: int) -> Slab:
        """Room for the rows, and one more for the beginning they share."""
        return Slab(len(batch.rows) + 1, max(map(len, batch.rows)) + limit)

    def _prompt_pass(
        self, batch: Batch, slab: Slab, last: Sequence[int], name: Any, more: Sequence[Row] = ()
    ) -> Tensor:
        """Prompts, with the first tokens of a draft each, from the start."""
        drafts = more or [()] * len(batch.rows)
        rows = [[*row, *draft] for row, draft in zip(batch.rows, drafts, strict=True)]
        ids: list[int] = []
        places: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        spare, prefix = len(rows), batch.prefix
        if prefix:
            ids += rows[0][:prefix]
            places += [spare] * prefix
            positions += range(prefix)
        for index, (row, count) in enumerate(zip(rows, last, strict=True)):
            ids += row[prefix:]
            places += [index] * (len(row) - prefix)
            positions += range(prefix, len(row))
            wanted += range(len(ids) - count, len(ids))
        chosen = None if batch.drafts is None or more else self._without_drafts(batch)
        shared = self._shared(batch)
        return self._run(batch, slab, name, ids, places, positions, wanted, shared, chosen)

    def _without_drafts(self, batch: Batch) -> Tensor:
        """The prompts' tokens in the pass that was learned with the first draft tokens."""
        chosen, begin = list(range(batch.prefix)), batch.prefix
        for row, draft in zip(batch.rows, _Chunks.of(batch, True).more(0), strict=True):
            chosen += range(begin, begin + len(row) - batch.prefix)
            begin += len(row) - batch.prefix + len(draft)
        return torch.tensor(chosen, device=self._model.device)

    def _shared(self, batch: Batch) -> Shared | None:
        if not batch.prefix:
            return None
        count, device = len(batch.rows), self._model.device
        return Shared(
            batch.prefix,
            torch.full((count,), count, device=device),
            torch.arange(count, device=device),
        )

    def _run(
        self,
        batch: Batch,
        slab: Slab,
        name: Any,
        ids: Sequence[int],
        places: Sequence[int],
        positions: Sequence[int],
        wanted: Sequence[int],
        shared: Shared | None = None,
        chosen: Tensor | None = None,
    ) -> Tensor:
        """One pass, begun as high as it may be; `chosen` are the tokens of the learned pass that
        these are."""
        learned = batch.passes.get(name)
        start, states = 0, None
        if learned is not None and self.techniques.layer_reuse and not self._learning:
            start = learned.below(self.untouched)
            if start:
                states = learned.states[start]
                states = states if chosen is None else states.index_select(0, chosen)
        tensors = (torch.tensor(v, device=self._model.device) for v in (ids, places, positions))
        at = torch.tensor(wanted, device=self._model.device)
        given = Pass(*tensors, at, start, states, shared)
        record = self._kept if self._learning and name is not None else ()
        logits, inputs = self._model.run(given, slab, record)
        if record:
            batch.passes[name] = _Learned(inputs)
        return logits

    # Drafts

    def _learn_answers(self, batch: Batch, answers: list[list[int]], limit: int) -> None:
        """Run the prompts with their answers once more, in the passes that trials will make."""
        batch.drafts = answers
        slab = self._slab(batch, limit)
        plan = _Chunks.of(batch, self.techniques.drafts)
        self._prompt_pass(batch, slab, plan.last(0), "answer 0", plan.more(0))
        for chunk in range(1, plan.count):
            self._chunk_pass(batch, slab, plan, chunk, range(len(batch.rows)))
        top = max(self._kept, default=0)
        used = max(len(row) + len(draft) for row, draft in zip(batch.rows, answers, strict=True))
        for layer in range(top):
            batch.keys[layer] = slab.keys[layer][:, :used].clone()
            batch.values[layer] = slab.values[layer][:, :used].clone()

    def _lend(self, batch: Batch, slab: Slab) -> None:
        """Give a slab the base model's keys and values below the first edited block."""
        learned = batch.passes.get("answer 0")
        if learned is None or not self.techniques.layer_reuse or self._learning:
            return
        for layer in range(learned.below(self.untouched)):
            known = batch.keys[layer], batch.values[layer]
            for own, base in zip(slab.layer(layer, *(k[0] for k in known)), known, strict=True):
                used = min(own.shape[1], base.shape[1])
                own[:, :used] = base[:, :used]

    def _check_drafts(
        self, batch: Batch, slab: Slab, plan: "_Chunks", writing: "_Writing"
    ) -> None:
        """The prompt pass, and as many draft passes as rows agree with their drafts."""
        more = plan.more(0) if any(plan.drafts) else ()
        logits = self._prompt_pass(batch, slab, plan.last(0), "answer 0", more)
        live = list(range(len(batch.rows)))
        for chunk in range(plan.count):
            if chunk:
                logits = self._chunk_pass(batch, slab, plan, chunk, live)
            said = logits.argmax(-1).tolist()
            going, at = [], 0
            for row in live:
                count = plan.checked(row, chunk)
                agreed = writing.take(row, said[at : at + count], plan.draft(row, chunk))
                at += count
                if agreed and plan.checked(row, chunk + 1):
                    going.append(row)
            live = going
            if not live or writing.done:
                return

    def _chunk_pass(
        self, batch: Batch, slab: Slab, plan: "_Chunks", chunk: int, live: Sequence[int]
    ) -> Tensor:
        """The next tokens of the drafts of some rows."""
        ids, places, positions, chosen = [], [], [], []
        for row in range(len(batch.rows)):
            fed = plan.fed(row, chunk)
            if row not in live:
                continue
            start = len(batch.rows[row]) + plan.begin(chunk)
            chosen += range(plan.offset(row, chunk), plan.offset(row, chunk) + len(fed))
            ids += fed
            places += [row] * len(fed)
            positions += range(start, start + len(fed))
        wanted = range(len(ids))
        at = torch.tensor(chosen, device=self._model.device)
        return self._run(
            batch, slab, f"answer {chunk}", ids, places, positions, wanted, chosen=at
        )

    # Token by token

    def _write_on(self, slab: Slab, writing: "_Writing") -> None:
        """Greedy decoding of what is live; rows leave as they end."""
        device = self._model.device
        places = list(range(slab.rows))
        """The slab's row of each row of the batch."""
        while live := writing.live():
            if len(live) < COMPACT_BELOW * slab.rows:
                slab.keep(torch.tensor([places[row] for row in live], device=device))
                places = [live.index(row) if row in live else -1 for row in range(len(places))]
            ids = torch.tensor([writing.last(row) for row in live], device=device)
            rows = torch.tensor([places[row] for row in live], device=device)
            positions = torch.tensor([writing.length(row) - 1 for row in live], device=device)
            every = torch.arange(len(live), device=device)
            logits, _ = self._model.run(Pass(ids, rows, positions, every), slab)
            for row, token in zip(live, logits.argmax(-1).tolist(), strict=True):
                writing.take(row, [token], [])


@dataclass(frozen=True)
class _Chunks:
    """Which draft tokens are fed in which pass.

    Pass 0 feeds the prompt and the first draft tokens. The logits of a row's last prompt token
    check its first draft token, those of a draft token the next one. The last token of a draft is
    never fed: nothing is asked after it.
    """

    drafts: tuple[tuple[int, ...], ...]
    bounds: tuple[int, ...]

    @classmethod
    def of(cls, batch: Batch, used: bool) -> "_Chunks":
        drafts = batch.drafts if used and batch.drafts else [[] for _ in batch.rows]
        longest = max(max(len(draft) - 1, 0) for draft in drafts)
        bounds = [0]
        for size in DRAFT_CHUNKS:
            if bounds[-1] < longest:
                bounds.append(min(bounds[-1] + size, longest))
        if bounds[-1] < longest:
            bounds.append(longest)
        return cls(tuple(map(tuple, drafts)), tuple(bounds))

    @property
    def count(self) -> int:
        """Passes, the prompt's included."""
        return max(len(self.bounds) - 1, 1)

    def begin(self, chunk: int) -> int:
        """Draft tokens fed before."""
        return self.bounds[min(chunk, len(self.bounds) - 1)]

    def fed(self, row: int, chunk: int) -> tuple[int, ...]:
        """Draft tokens of a row that are fed in a pass."""
        return self.drafts[row][:-1][self.begin(chunk) : self.begin(chunk + 1)]

    def offset(self, row: int, chunk: int) -> int:
        """Tokens of the rows before it in a pass over all rows."""
        return sum(len(self.fed(other, chunk)) for other in range(row))

    def more(self, chunk: int) -> list[tuple[int, ...]]:
        """Draft tokens of all rows that are fed in a pass."""
        return [self.fed(row, chunk) for row in range(len(self.drafts))]

    def checked(self, row: int, chunk: int) -> int:
        """Logits wanted of a row in a pass."""
        fed = len(self.fed(row, chunk)) if chunk < self.count else 0
        return fed + (chunk == 0)

    def last(self, chunk: int) -> list[int]:
        """Logits wanted of each row in a pass."""
        return [self.checked(row, chunk) for row in range(len(self.drafts))]

    def draft(self, row: int, chunk: int) -> tuple[int, ...]:
        """The draft tokens that a pass checks."""
        first = self.begin(chunk) + (chunk > 0)
        return self.drafts[row][first : first + self.checked(row, chunk)]


class _Writing:
    """Answers that are being written: tokens so far, and who is still at it."""

    def __init__(
        self,
        batch: Batch,
        limit: int,
        watch: AnswerWatch | None,
        indices: Sequence[int],
        ends: frozenset[int],
        text_stream: Callable[[], Any],
    ) -> None:
        self.heeds = True
        self._limit, self._watch, self._indices, self._ends = limit, watch, indices, ends
        self._prompts = [len(row) for row in batch.rows]
        self._tokens: list[list[int]] = [[] for _ in batch.rows]
        self._streams = [text_stream() for _ in batch.rows] if watch else []
        self._ended = [False] * len(batch.rows)
        self._stopped = [False] * len(batch.rows)

    @property
    def done(self) -> bool:
        """Nobody writes any more."""
        return all(self._ended)

    def live(self) -> list[int]:
        """Rows that go on."""
        if self.heeds and self._watch is not None and self._watch.enough():
            for row, ended in enumerate(self._ended):
                self._stopped[row] |= not ended
            self._ended = [True] * len(self._ended)
        return [row for row, ended in enumerate(self._ended) if not ended]

    def last(self, row: int) -> int:
        """The newest token."""
        return self._tokens[row][-1]

    def length(self, row: int) -> int:
        """Tokens of prompt and answer."""
        return self._prompts[row] + len(self._tokens[row])

    def take(self, row: int, said: Sequence[int], draft: Sequence[int]) -> bool:
        """Add what the model says as long as it is what the draft has, and the first that is not.

        Returns:
            The whole draft was right, and the row goes on.
        """
        for place, token in enumerate(said):
            self._add(row, token)
            if self._ended[row]:
                return False
            if place >= len(draft) or token != draft[place]:
                return False
        return bool(said)

    def _add(self, row: int, token: int) -> None:
        tokens = self._tokens[row]
        tokens.append(token)
        self._ended[row] = token in self._ends or len(tokens) == self._limit
        if self._watch is None or self._ended[row]:
            return
        text = self._streams[row].push(token)
        if text and self._watch.read(self._indices[row], text) and self.heeds:
            self._ended[row] = self._stopped[row] = True

    def answers(self) -> list[Written]:
        """What was written."""
        return [Written(t, s) for t, s in zip(self._tokens, self._stopped, strict=True)]
