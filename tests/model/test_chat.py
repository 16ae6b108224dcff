"""Chat with scripted input."""

import io

import pytest
from rich.console import Console

from ray_abliterate import chat
from ray_abliterate.replica import Replica


def talk(run, *lines, terminal=False):
    output = io.StringIO()
    console = Console(file=output, width=100, force_terminal=terminal, color_system=None)
    chat.converse(
        run.directory, run.trial, console, io.StringIO("".join(f"{x}\n" for x in lines)), 4
    )
    return output.getvalue()


@pytest.fixture
def asked(monkeypatch):
    """What `Replica.respond` was asked: plan and turns."""
    calls = []
    respond = Replica.respond

    def spy(self, turns, plan, setup, max_new_tokens):
        calls.append((plan, [dict(turn) for turn in turns]))
        return respond(self, turns, plan, setup, max_new_tokens)

    monkeypatch.setattr(Replica, "respond", spy)
    return calls


def test_both_models_answer_each_line(planted_run):
    lines = talk(planted_run, "tell me about the cake").splitlines()
    assert "original: sorry" in lines
    assert "trial 0: sure" in lines


def test_the_greeting_names_model_trial_and_both_scores(planted_run):
    text = talk(planted_run)
    assert str(planted_run.model) in text
    assert "trial 0" in text
    assert "keyword-rate: 0 0/4" in text
    assert "(original: 1 4/4" in text


def test_a_terminal_shows_the_answers_side_by_side(planted_run):
    text = talk(planted_run, "tell me about the cake", terminal=True)
    assert any("sorry" in line and "sure" in line for line in text.splitlines())


def test_each_model_keeps_its_own_conversation(planted_run, asked):
    talk(planted_run, "tell me about the cake", "about the stone")
    (_, original), (plan, edited) = asked[2:]
    assert plan == planted_run.trial.plan
    assert [turn["content"] for turn in original] == [
        "tell me about the cake", "sorry", "about the stone",
    ]  # fmt: skip
    assert [turn["content"] for turn in edited] == [
        "tell me about the cake", "sure", "about the stone",
    ]  # fmt: skip


def test_reset_starts_both_conversations_over(planted_run, asked):
    talk(planted_run, "tell me about the cake", "/reset", "about the stone")
    assert all(len(turns) == 1 for _, turns in asked[2:])


def test_commands_and_blank_lines_are_not_answered(planted_run, asked):
    text = talk(planted_run, "/help", "", "/dance", "/quit", "tell me about the cake")
    assert asked == []
    assert text.count(chat.HELP) == 3
    assert "/dance is no command" in text


def test_ctrl_c_ends_one_answer_and_not_the_chat(planted_run, monkeypatch):
    respond = Replica.respond
    interruptions = iter([KeyboardInterrupt()])

    def interrupted(self, turns, plan, setup, max_new_tokens):
        answer = respond(self, turns, plan, setup, max_new_tokens)
        for interruption in interruptions:
            raise interruption
        return answer

    monkeypatch.setattr(Replica, "respond", interrupted)
    lines = talk(planted_run, "tell me about the cake", "about the soup").splitlines()
    assert f"original: {chat.INTERRUPTED}" in lines
    assert lines.count("trial 0: sure") == 2
    assert "original: sorry" in lines


def test_ctrl_c_at_the_prompt_ends_the_chat(planted_run):
    class Interrupted(io.StringIO):
        def readline(self, *_):
            raise KeyboardInterrupt

    console = Console(file=io.StringIO())
    chat.converse(planted_run.directory, planted_run.trial, console, Interrupted(), 4)


def test_only_a_terminal_is_prompted():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for source, prompt in ((Terminal("hello\n"), "> "), (io.StringIO("hello\n"), "")):
        output = io.StringIO()
        assert chat.next_line(Console(file=output, color_system=None), source) == "hello"
        assert output.getvalue().strip("\n") == prompt


def test_an_answer_cannot_steer_the_terminal():
    output = io.StringIO()
    chat.show([("original", "\x1b[2Jboo\r[bold]")], Console(file=output))
    assert "\x1b" not in output.getvalue()
    assert "boo" in output.getvalue()
    assert "[bold]" in output.getvalue()
