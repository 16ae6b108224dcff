"""A claim: its command line, and where its figures go."""

import pytest

from benchmarks.harness import claim
from benchmarks.harness.claim import Claim

CLAIM = Claim("made_up", "How long it takes.", "made_up", {})


def options(*arguments):
    parser = CLAIM.parser(size=1, kinds=["a"])
    parser.add_argument("--size", type=int, default=100)
    parser.add_argument("--kinds", nargs="+", default=["a", "b"])
    return parser.parse_args(arguments)


def test_a_quick_run_has_the_smallest_sizes_but_for_those_given():
    assert vars(options()) == {"quick": False, "size": 100, "kinds": ["a", "b"]}
    assert vars(options("--quick")) == {"quick": True, "size": 1, "kinds": ["a"]}
    assert vars(options("--size", "7", "--quick")) == {"quick": True, "size": 7, "kinds": ["a"]}


def test_help_names_the_claim_its_command_and_the_smallest_sizes(capsys):
    with pytest.raises(SystemExit):
        options("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "python -m benchmarks.made_up" in text
    assert "How long it takes." in text
    assert "--size 1 --kinds a" in text


def test_figures_of_a_quick_run_are_not_saved(monkeypatch, capsys):
    saved = []
    monkeypatch.setattr(claim, "save", lambda file, figures: saved.append((file, figures)))
    CLAIM.save({"x": 1}, options("--quick"))
    assert saved == []
    CLAIM.save({"x": 1}, options())
    CLAIM.save({"x": 2}, options(), "another")
    assert saved == [("made_up", {"x": 1}), ("another", {"x": 2})]
