"""Chat with scripted input: who answers, what is shown, what is kept."""

import io
import json
import random
import signal
from dataclasses import replace

import pytest
from rich.console import Console

from ray_abliterate.cli import chat
from ray_abliterate.cli.chat_session import stop_on_interrupt
from ray_abliterate.cli.chat_view import STOPPED, ColumnView, LineView, ScrollView, open_view
from ray_abliterate.errors import ChatError, TrialNotFound
from ray_abliterate.replica.messages import TrialSetup
from ray_abliterate.replica.replica import Replica
from ray_abliterate.search.plan import Plan

CAKE, STONE = "tell me about the cake", "about the stone"


class Typed(io.StringIO):
    """Lines that somebody types."""

    def isatty(self):
        return True


class Pieces(list):
    """Collects what it is called with, and never stops the answer."""

    def __call__(self, text):
        self.append(text)
        return False


def talk(run, *lines, mode="one", typed=False, terminal=False, width=100, save=None, seed=0):
    output = io.StringIO()
    console = Console(file=output, width=width, force_terminal=terminal, color_system=None)
    source = (Typed if typed else io.StringIO)("".join(f"{x}\n" for x in lines))
    options = chat.ChatOptions(mode, tokens=4, save=save)
    chat.converse(run.directory, run.trial, options, console, source, random.Random(seed))
    return output.getvalue()


@pytest.fixture(scope="module")
def run(planted_copy):
    """A run with a second trial, which changes nothing."""
    planted_copy.directory.append_trial(replace(planted_copy.trial, number=1, plan=Plan.nothing()))
    return planted_copy


@pytest.fixture
def asked(monkeypatch):
    """What `Replica.respond` was asked: plan and turns."""
    calls = []
    respond = Replica.respond

    def spy(self, turns, plan, *rest):
        calls.append((plan, [turn["content"] for turn in turns]))
        return respond(self, turns, plan, *rest)

    monkeypatch.setattr(Replica, "respond", spy)
    return calls


@pytest.fixture(scope="module")
def replica(run):
    return Replica(run.directory.read_recipe(), str(run.model), {})


# Tokens as they come


@pytest.mark.parametrize("limit", [1, 2, 8])
@pytest.mark.parametrize("question", [CAKE, STONE])
def test_what_is_streamed_is_what_reply_gives(run, replica, question, limit):
    setup = TrialSetup(run.directory.directions())
    turns = [{"role": "user", "content": question}]
    for plan in (Plan.nothing(), run.trial.plan):
        pieces = Pieces()
        whole = replica.respond(turns, plan, setup, limit)
        assert replica.respond(turns, plan, setup, limit, pieces) == whole
        assert "".join(pieces) == whole != ""


def test_the_pieces_come_token_by_token(replica):
    model, pieces = replica.model, Pieces()
    ends, model.padded._module.generation_config.eos_token_id = model.end_tokens, None
    model.padded._ends = ()
    try:
        turns = [{"role": "user", "content": CAKE}]
        whole = model.reply(turns, 6)
        assert model.reply(turns, 6, pieces) == whole
        assert len(pieces) == 6
        cut = model.reply(turns, 6, lambda _: True)
    finally:
        model.padded._module.generation_config.eos_token_id = list(ends)
        model.padded._ends = ends
    assert cut == pieces[0] != whole


def test_an_answer_is_shown_while_it_is_written():
    output = io.StringIO()
    view = ScrollView(Console(file=output, color_system=None))
    with view.answers(["original", "trial 0"]):
        view.add_text(0, " of")
        assert output.getvalue() == "original: of"
        view.add_text(0, " course")
        view.finish(0, " of course not", stopped=False)
        assert output.getvalue() == "original: of course not\n"
        view.finish(1, "", stopped=True)
    assert output.getvalue().endswith(f"trial 0: (no text) {STOPPED}\n")


def test_columns_show_the_end_of_a_long_answer_while_it_is_written_and_all_of_it_after():
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=100, height=12, color_system=None)
    view = ColumnView(console)
    text = "\n".join(f"line {i}" for i in range(40))
    with view.answers(["original", "trial 0"]):
        view.add_text(0, text)
        view._live.refresh()
        shown = output.getvalue()
        assert "line 39" in shown and "line 3 " not in shown
        view.finish(0, text, stopped=False)
        view.finish(1, "sure", stopped=False)
    last = output.getvalue()[len(shown) :]
    assert "line 3 " in last and "line 39" in last


# Who answers


def test_only_the_edited_model_answers_unless_told(run):
    assert talk(run, CAKE) == "sure\n"


def test_both_models_answer_each_line(run):
    assert talk(run, STONE, CAKE, mode="compare").splitlines() == [
        "original: sure", "trial 0: sure", "original: sorry", "trial 0: sure",
    ]  # fmt: skip


def test_trials_are_switched_within_the_session(run):
    lines = CAKE, "/trial 1", CAKE, "/trial 0", CAKE, "/base", CAKE
    assert talk(run, *lines).splitlines() == ["sure", "sorry", "sure", "sorry"]


def test_the_switched_trial_is_compared_under_its_name(run):
    text = talk(run, "/compare", "/trial 1", CAKE)
    assert text.splitlines() == ["original: sorry", "trial 1: sorry"]


def test_each_model_goes_on_with_its_own_conversation(run, asked):
    talk(run, CAKE, "/base", CAKE, "/trial 0", STONE, "/compare", STONE)
    assert asked[2] == (run.trial.plan, [CAKE, "sure", STONE])
    assert asked[3] == (Plan.nothing(), [CAKE, "sorry", STONE])
    assert asked[4] == (run.trial.plan, [CAKE, "sure", STONE, "sure", STONE])


def test_reset_starts_every_conversation_over(run, asked):
    talk(run, CAKE, "/base", CAKE, "/reset", STONE, "/trial 0", STONE)
    assert [turns for _, turns in asked[2:]] == [[STONE], [STONE]]
    assert asked[2][0] == Plan.nothing()


def test_commands_and_blank_lines_are_not_answered(run, asked):
    text = talk(run, "/help", "", "/dance", "/trial x", "/trial 7", "/quit", CAKE, typed=True)
    assert asked == []
    assert "/dance is not a command" in text
    assert "/trial x: 'x' is not the number" in text
    assert "has no trial 7" in text
    assert text.count(chat.HELP) == 3


def test_trials_lists_the_frontier(run):
    text = talk(run, "/trials", typed=True)
    assert "Frontier" in text and "keyword-rate" in text.split("Frontier")[1]


def test_where_nobody_types_a_wrong_command_ends_the_chat(run, asked):
    with pytest.raises(TrialNotFound, match="no trial 7"):
        talk(run, "/trial 7", CAKE)
    with pytest.raises(ChatError, match="/dance is not a command"):
        talk(run, "/dance", CAKE)
    assert asked == []


# Blind


def test_a_blind_pair_is_both_models_without_names(run):
    for seed in range(8):
        text = talk(run, CAKE, mode="blind", seed=seed)
        assert sorted(line[3:] for line in text.splitlines()) == ["sorry", "sure"]
        assert [line[:3] for line in text.splitlines()] == ["A: ", "B: "]


def test_the_order_is_drawn_at_random_and_kept_until_it_is_revealed(run):
    first = {talk(run, CAKE, mode="blind", seed=seed).splitlines()[0] for seed in range(8)}
    assert first == {"A: sorry", "A: sure"}
    lines = talk(run, *[CAKE] * 6, mode="blind").splitlines()
    assert len(set(lines)) == 2
    lines = talk(run, *[CAKE, "/reveal"] * 12, mode="blind").splitlines()
    assert len(set(lines)) == 4


def test_reveal_tells_who_was_who_and_counts_the_votes(run):
    asks = ["/blind"]
    for vote in ("/a", "/a", "/b", "/same", "/same"):
        asks += [CAKE, vote]
    text = talk(run, *asks, CAKE, "/reveal", typed=True)
    before, after = text.split("A was ", 1)
    assert "trial 0 2" not in before and "original 1" not in before
    a_is_trial = "A: sure" in before
    assert after.startswith("original" if not a_is_trial else "trial 0")
    mine, other = (2, 1) if a_is_trial else (1, 2)
    assert f"votes: trial 0 {mine}, original {other}, the same 2" in after
    assert f"preferred in {mine} of 3 (95 % interval" in after


def test_a_later_vote_replaces_the_first_and_none_counts_before_an_answer(run):
    text = talk(run, "/a", "/blind", "/a", CAKE, "/a", "/same", "/reveal", "/b", typed=True)
    assert text.count("there are no two blind answers to vote on") == 3
    assert "votes: trial 0 0, original 0, the same 1\n" in text


def test_votes_are_counted_when_a_typed_chat_ends(run):
    text = talk(run, CAKE, "/same", mode="blind", typed=True)
    assert text.endswith("votes: trial 0 0, original 0, the same 1\n")


def test_nothing_is_revealed_that_was_not_hidden(run):
    assert "nothing is hidden" in talk(run, CAKE, "/reveal", mode="compare", typed=True)


# What is shown


def test_the_greeting_names_model_trial_and_both_scores(run):
    text = talk(run, mode="compare", typed=True)
    assert f"{run.model}: original and trial 0" in text
    assert "keyword-rate: 0 0/4" in text
    assert "(original: 1 4/4" in text


def test_a_wide_terminal_shows_the_answers_side_by_side(run):
    text = talk(run, CAKE, mode="compare", typed=True, terminal=True)
    assert any("sorry" in line and "sure" in line for line in text.splitlines())


def test_a_phone_shows_them_one_after_the_other(run):
    text = talk(run, CAKE, mode="compare", typed=True, terminal=True, width=40)
    assert "original: sorry\ntrial 0: sure\n" in text


def test_a_pipe_gets_one_line_for_each_answer():
    output = io.StringIO()
    view = open_view(Console(file=output, width=20), interactive=False, answers=1)
    with view.answers(["trial 0"]):
        view.add_text(0, "more")
        view.finish(0, "\nmore than\ntwenty characters, C:\\n\n", stopped=False)
    assert output.getvalue() == "more than\\ntwenty characters, C:\\\\n\n"


@pytest.mark.parametrize("view", [LineView, ScrollView, ColumnView])
def test_an_answer_cannot_steer_the_terminal(view):
    output = io.StringIO()
    shown = view(Console(file=output, width=100))
    with shown.answers(["original"]):
        shown.add_text(0, "\x1b[2Jboo\r[bold]")
        shown.finish(0, "\x1b[2Jboo\r[bold]", stopped=False)
    assert "\x1b" not in output.getvalue() and "\r" not in output.getvalue()
    assert "boo" in output.getvalue()
    assert "[bold]" in output.getvalue()


def test_only_a_terminal_is_prompted():
    for source, prompt in ((Typed("hello\n"), "> "), (io.StringIO("hello\n"), "")):
        output = io.StringIO()
        assert chat.next_line(Console(file=output, color_system=None), source) == "hello"
        assert output.getvalue().strip("\n") == prompt


# Ctrl-C


def test_ctrl_c_ends_one_answer_at_the_next_token_and_not_the_chat(run, monkeypatch):
    show = ScrollView.add_text
    presses = iter([True])

    def pressed(self, place, text):
        for _ in presses:
            signal.raise_signal(signal.SIGINT)
        show(self, place, text)

    monkeypatch.setattr(ScrollView, "add_text", pressed)
    text = talk(run, CAKE, CAKE, mode="compare", typed=True)
    assert text.count(STOPPED) == 1
    assert f"original: sorry {STOPPED}\n" in text
    assert text.count("trial 0: sure\n") == 2


def test_a_second_ctrl_c_is_not_held_back_and_the_handler_is_put_back():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop_on_interrupt() as is_stopped:
        assert not is_stopped()
        signal.raise_signal(signal.SIGINT)
        assert is_stopped()
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_at_the_prompt_ends_the_chat(run):
    class Interrupted(io.StringIO):
        def readline(self, *_):
            raise KeyboardInterrupt

    console = Console(file=io.StringIO())
    chat.converse(run.directory, run.trial, chat.ChatOptions(), console, Interrupted())


# Transcripts


def test_nothing_is_written_unless_it_is_asked_for(run, tmp_path, monkeypatch):
    before = sorted(run.directory.path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    talk(run, CAKE)
    assert sorted(run.directory.path.rglob("*")) == before
    assert list(tmp_path.iterdir()) == []


def test_a_transcript_has_every_answer_and_the_vote(run, tmp_path):
    file = tmp_path / "said.jsonl"
    talk(run, CAKE, "/blind", CAKE, "/same", save=file)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["model"] for row in rows[:1]] == ["trial 0"]
    assert {row["model"]: row["answer"] for row in rows[1:]} == {
        "original": "sorry", "trial 0": "sure",
    }  # fmt: skip
    assert {row["label"] for row in rows[1:]} == {"A", "B"}
    assert all(row["question"] == CAKE and not row["stopped"] for row in rows)
    assert "preferred" not in rows[0] and rows[1]["preferred"] is None


def test_a_transcript_can_be_saved_again_and_overwrites_nothing_else(run, tmp_path):
    file, other = tmp_path / "said.jsonl", tmp_path / "other.jsonl"
    other.write_text("mine")
    lines = CAKE, f"/save {file}", CAKE, f"/save {file}", f"/save {other}"
    text = talk(run, *lines, typed=True)
    assert len(file.read_text().splitlines()) == 2
    assert f"{other} already exists" in text
    assert other.read_text() == "mine"


def test_a_transcript_that_would_overwrite_something_is_refused_before_the_model_is_loaded(
    run, tmp_path, monkeypatch
):
    monkeypatch.setattr(chat, "Replica", None)
    (tmp_path / "said.jsonl").write_text("mine")
    with pytest.raises(ChatError, match="already exists"):
        talk(run, CAKE, save=tmp_path / "said.jsonl")
