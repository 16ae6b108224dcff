"""Who talks in a chat, in what order, and what was said. Knows no terminals."""

import json
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ray_abliterate.cli.chat_view import View
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
    """A model that answers."""

    name: str
    plan: Plan

    @classmethod
    def of(cls, trial: Trial) -> "Speaker":
        """The model that a trial's plan makes."""
        return cls(f"trial {trial.number}", trial.plan)


BASE = Speaker(ORIGINAL, Plan.nothing())


@dataclass(frozen=True)
class Vote:
    """Which of two models answered better; neither if None."""

    pair: frozenset[str]
    winner: str | None


@dataclass
class Session:
    """Who talks, and what was said.

    Attributes:
        edited: The trial's model, of those that answer or could.
        seats: Who answers, in order.
        turns: The conversation of each model, by its name.
        said: Every answer, as rows of a transcript.
        votes: One per question that was voted on, by the question's number.
    """

    directory: RunDirectory
    replica: Replica
    setup: TrialSetup
    tokens: int
    edited: Speaker
    mode: Mode
    rng: random.Random
    seats: tuple[Speaker, ...] = ()
    turns: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    said: list[dict[str, object]] = field(default_factory=list)
    questions: int = 0
    votes: dict[int, Vote] = field(default_factory=dict)
    written: set[Path] = field(default_factory=set)

    def seat(self, mode: Mode, alone: Speaker | None = None) -> None:
        """Choose who answers; of a blind pair both begin anew, in a new order."""
        self.mode = mode
        self.seats = (alone or self.edited,) if mode == "one" else (BASE, self.edited)
        if mode == "blind":
            self.seats = tuple(self.rng.sample(self.seats, 2))
            for speaker in self.seats:
                self.turns.pop(speaker.name, None)

    @property
    def who(self) -> str:
        """Who answers, in words."""
        if self.mode == "blind":
            return f"{ORIGINAL} and {self.edited.name}, as A and B in an order drawn at random"
        return " and ".join(self.names)

    @property
    def names(self) -> list[str]:
        """What the answers stand under."""
        if self.mode == "blind":
            return list(LABELS)
        return [speaker.name for speaker in self.seats]

    def ask(self, question: str, view: View) -> None:
        """Let each model answer; Ctrl-C ends one answer, which stays as far as it came."""
        self.questions += 1
        with view.answers(self.names):
            for place, speaker in enumerate(self.seats):
                self._answer(place, speaker, question, view)

    def _answer(self, place: int, speaker: Speaker, question: str, view: View) -> None:
        asked = [*self.turns.get(speaker.name, []), {"role": "user", "content": question}]
        with stopping() as is_stopped:

            def piece(text: str) -> bool:
                view.piece(place, text)
                return is_stopped()

            answer = self.replica.respond(asked, speaker.plan, self.setup, self.tokens, piece)
            stopped = is_stopped()
        view.end(place, answer, stopped)
        self.turns[speaker.name] = [*asked, {"role": "assistant", "content": answer}]
        row = {"number": self.questions, "question": question, "model": speaker.name}
        blind = {"label": LABELS[place]} if self.mode == "blind" else {}
        self.said.append({**row, **blind, "answer": answer, "stopped": stopped})

    def vote(self, place: int | None) -> str:
        """Note which of the last two blind answers was better.

        Raises:
            ChatError: there are no two.
        """
        answered = all(speaker.name in self.turns for speaker in self.seats)
        if self.mode != "blind" or not answered:
            raise ChatError("there are no two blind answers to vote on; begin with /blind, and ask")
        winner = None if place is None else self.seats[place].name
        self.votes[self.questions] = Vote(frozenset(s.name for s in self.seats), winner)
        return "noted; /reveal counts the votes"

    def reveal(self) -> str:
        """Who was who, and the votes; a new order is drawn.

        Raises:
            ChatError: nothing is hidden.
        """
        if self.mode != "blind":
            raise ChatError("nothing is hidden; /blind begins a blind comparison")
        pairs = zip(LABELS, self.seats, strict=True)
        who = ", ".join(f"{label} was {speaker.name}" for label, speaker in pairs)
        self.seat("blind")
        return "\n".join([who, *self.tally(), "Both begin anew, in a new order."])

    def tally(self) -> list[str]:
        """The votes, a line for each trial that was compared with the original."""
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
        """Write every answer as a line of JSON; a file of somebody else's is left alone.

        Raises:
            ChatError: it is there already, or cannot be written.
        """
        if path not in self.written:
            refuse_taken(path)
        models = {"base": self.directory.read_recipe().model.name, "run": self.directory.path.name}
        lines = []
        for row in self.said:
            vote = self.votes.get(int(str(row["number"]))) if "label" in row else None
            voted = {"preferred": vote.winner} if vote else {}
            lines.append(json.dumps({**models, **row, **voted}, ensure_ascii=False) + "\n")
        try:
            write_atomically(path, "".join(lines).encode())
        except OSError as error:
            raise ChatError(f"{path} cannot be written ({error.strerror})") from None
        self.written.add(path)
        return f"{len(lines)} answers written to {path}"


@contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Ctrl-C in this block asks for a stop, at the next token; a second one is as ever."""
    asked = False

    def ask(_signal: int, _frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


def refuse_taken(path: Path) -> None:
    """Make sure that a transcript overwrites nothing.

    Raises:
        ChatError: the file is there already.
    """
    if path.exists():
        raise ChatError(f"{path} is there already; save the transcript under another name")
