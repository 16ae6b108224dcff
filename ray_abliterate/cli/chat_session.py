"""Keep a chat's speakers, their conversations, the transcript and the votes.

Knows nothing about terminals.
"""

import json
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ray_abliterate.cli.chat_view import ChatView
from ray_abliterate.data.atomic_files import write_atomically
from ray_abliterate.errors import ChatError
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.replica.messages import TrialSetup
from ray_abliterate.replica.replica import Replica
from ray_abliterate.search.frontier import Trial
from ray_abliterate.search.plan import Plan
from ray_abliterate.search.score import wilson

ORIGINAL = "original"
LABELS = "AB"

Mode = Literal["one", "compare", "blind"]


@dataclass(frozen=True)
class Speaker:
    """A model that answers in a chat, named for people."""

    name: str
    plan: Plan

    @classmethod
    def of(cls, trial: Trial) -> "Speaker":
        """Return the speaker whose weights a trial's plan edits."""
        return cls(f"trial {trial.number}", trial.plan)


BASE = Speaker(ORIGINAL, Plan.nothing())


@dataclass(frozen=True)
class Vote:
    """A vote on which of two models answered better; for neither if `winner` is None."""

    pair: frozenset[str]
    winner: str | None


@dataclass
class ChatSession:
    """A chat: who answers, each speaker's conversation, and the transcript.

    Attributes:
        tokens: Longest answer, in tokens.
        edited: The speaker of the trial, whether it answers now or not.
        speakers: Those that answer now, in order.
        conversations: Each speaker's messages so far, by its name.
        transcript: A row for each answer.
        questions: How many were asked.
        votes: By number of the question.
        saved_files: Files that this session wrote, and may write again.
    """

    directory: RunDirectory
    replica: Replica
    setup: TrialSetup
    tokens: int
    edited: Speaker
    mode: Mode
    rng: random.Random
    speakers: tuple[Speaker, ...] = ()
    conversations: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    transcript: list[dict[str, object]] = field(default_factory=list)
    questions: int = 0
    votes: dict[int, Vote] = field(default_factory=dict)
    saved_files: set[Path] = field(default_factory=set)

    def choose_speakers(self, mode: Mode, alone: Speaker | None = None) -> None:
        """Choose who answers; a blind pair starts over, in a new random order.

        Args:
            mode: One speaker, both by name, or both as A and B.
            alone: The speaker in mode `one`; the edited model if None.
        """
        self.mode = mode
        self.speakers = (alone or self.edited,) if mode == "one" else (BASE, self.edited)
        if mode == "blind":
            self.speakers = tuple(self.rng.sample(self.speakers, 2))
            for speaker in self.speakers:
                self.conversations.pop(speaker.name, None)

    @property
    def speakers_text(self) -> str:
        """The speakers that answer now, as a phrase."""
        if self.mode == "blind":
            return f"{ORIGINAL} and {self.edited.name}, as A and B in a random order"
        return " and ".join(self.names)

    @property
    def names(self) -> list[str]:
        """The names that answers are shown under: A and B while the speakers are hidden."""
        if self.mode == "blind":
            return list(LABELS)
        return [speaker.name for speaker in self.speakers]

    def ask(self, question: str, view: ChatView) -> None:
        """Let each speaker answer; Ctrl-C ends one answer, and what came of it stays."""
        self.questions += 1
        with view.answers(self.names):
            for place, speaker in enumerate(self.speakers):
                self._answer(place, speaker, question, view)

    def _answer(self, place: int, speaker: Speaker, question: str, view: ChatView) -> None:
        messages = [*self.conversations.get(speaker.name, [])]
        messages.append({"role": "user", "content": question})
        with stop_on_interrupt() as is_stopped:

            def add_text(text: str) -> bool:
                view.add_text(place, text)
                return is_stopped()

            answer = self.replica.respond(messages, speaker.plan, self.setup, self.tokens, add_text)
            stopped = is_stopped()
        view.finish(place, answer, stopped)
        self.conversations[speaker.name] = [*messages, {"role": "assistant", "content": answer}]
        row = {"number": self.questions, "question": question, "model": speaker.name}
        blind = {"label": LABELS[place]} if self.mode == "blind" else {}
        self.transcript.append({**row, **blind, "answer": answer, "stopped": stopped})

    def vote(self, place: int | None) -> str:
        """Record which of the last two blind answers was better.

        Args:
            place: Index of the better one; None if they are equally good.

        Raises:
            ChatError: there are no two blind answers.
        """
        answered = all(speaker.name in self.conversations for speaker in self.speakers)
        if self.mode != "blind" or not answered:
            raise ChatError("there are no two blind answers to vote on; start with /blind, and ask")
        winner = None if place is None else self.speakers[place].name
        self.votes[self.questions] = Vote(frozenset(s.name for s in self.speakers), winner)
        return "Recorded; /reveal counts the votes."

    def reveal(self) -> str:
        """Return who was A and B, and the votes; then draw a new order.

        Raises:
            ChatError: the speakers are not hidden.
        """
        if self.mode != "blind":
            raise ChatError("nothing is hidden; /blind starts a blind comparison")
        pairs = zip(LABELS, self.speakers, strict=True)
        names = ", ".join(f"{label} was {speaker.name}" for label, speaker in pairs)
        self.choose_speakers("blind")
        return "\n".join([names, *self.tally(), "Both start over, in a new order."])

    def tally(self) -> list[str]:
        """Return the votes: a line for each trial that was compared with the original.

        The interval is Wilson's, of the share of votes for either.
        """
        lines = []
        for pair in dict.fromkeys(vote.pair for vote in self.votes.values()):
            counts = Counter(vote.winner for vote in self.votes.values() if vote.pair == pair)
            (name,) = pair - {ORIGINAL}
            line = f"votes: {name} {counts[name]}, {ORIGINAL} {counts[ORIGINAL]}"
            line += f", the same {counts[None]}"
            if decided := counts[name] + counts[ORIGINAL]:
                low, high = wilson(counts[name], decided)
                line += f"; {name} is preferred in {counts[name]} of {decided}"
                line += f" (95 % interval {100 * low:.0f} to {100 * high:.0f} %)"
            lines.append(line)
        return lines

    def save(self, path: Path) -> str:
        """Write every answer as a line of JSON, over no file but this session's own.

        Raises:
            ChatError: the file exists already, or cannot be written.
        """
        if path not in self.saved_files:
            refuse_existing(path)
        models = {"base": self.directory.read_recipe().model.name, "run": self.directory.path.name}
        lines = []
        for row in self.transcript:
            vote = self.votes.get(int(str(row["number"]))) if "label" in row else None
            voted = {"preferred": vote.winner} if vote else {}
            lines.append(json.dumps({**models, **row, **voted}, ensure_ascii=False) + "\n")
        try:
            write_atomically(path, "".join(lines).encode())
        except OSError as error:
            raise ChatError(f"{path} cannot be written ({error.strerror})") from None
        self.saved_files.add(path)
        return f"Wrote {len(lines)} answers to {path}."


@contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C in this block into a request to stop at the next token.

    The block gets a function that returns whether a stop was requested. A second Ctrl-C interrupts.
    """
    requested = False

    def request(_signal: int, _frame: object) -> None:
        nonlocal requested
        if requested:
            raise KeyboardInterrupt
        requested = True

    before = signal.signal(signal.SIGINT, request)
    try:
        yield lambda: requested
    finally:
        signal.signal(signal.SIGINT, before)


def refuse_existing(path: Path) -> None:
    """Make sure that a transcript overwrites nothing.

    Raises:
        ChatError: the file exists already.
    """
    if path.exists():
        raise ChatError(f"{path} already exists; save the transcript under another name")
