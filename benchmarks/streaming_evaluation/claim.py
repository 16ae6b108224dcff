"""Streaming evaluation: a million tokens, what each carried context computes, what logits take.

    python -m benchmarks.streaming_evaluation [--tokens 1000000] [--rounds 3] [--save NAME]

Small models of real architectures with random weights; each part runs in a process of its own with
one thread, long texts from a token file on disk. `long_text`, `carried_context`, `logits_memory`
and `hidden_states` say how each is measured.
"""

import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness.claim import Claim, Figures
from benchmarks.harness.tables import column_table, cross_table
from benchmarks.harness.worker_process import call_in_new_process
from benchmarks.streaming_evaluation import (
    carried_context,
    hidden_states,
    logits_memory,
    long_text,
)

CARRIED_CONTEXTS = ("kv", "window", "state", "none")


def main() -> None:
    """Measure all parts, print, save."""
    parser = CLAIM.parser(
        tokens=4096, rounds=1, families=["llama"], vocabularies=[2048], state_tokens=2048
    )
    add = parser.add_argument
    add("--tokens", type=int, default=1_000_000, help="length of the long text")
    add("--rounds", type=int, default=3)
    add("--families", nargs="+", default=list(carried_context.FAMILIES))
    add("--vocabularies", type=int, nargs="+", default=list(logits_memory.VOCABULARIES))
    add("--state-tokens", type=int, default=16_384, help="text that is read from a block on")
    add("--save", default="", help="name of the file under results/")
    options = parser.parse_args()
    rounds = options.rounds
    with tempfile.TemporaryDirectory() as folder:
        file = str(long_text.write_tokens(Path(folder) / "tokens.npy", options.tokens))
        lengths = [
            call_in_new_process(long_text.measure, carry, file, rounds, threads=1)
            for carry in long_text.SETTINGS
        ]
    state_tokens = min(options.tokens, options.state_tokens)
    figures: Figures = {
        "threads": 1,
        "tokens": options.tokens,
        "lengths": lengths,
        "exactness": _rows(carried_context.measure, options.families),
        "logits": [_logits(vocab) for vocab in options.vocabularies],
        "states": _rows(hidden_states.measure, state_tokens, rounds),
        "first_edited": hidden_states.first_edited_blocks(),
    }
    CLAIM.save(figures, options, options.save)
    for part in ("lengths", "exactness", "logits", "states"):
        for row in figures[part]:
            print({name: value for name, value in row.items() if name != "memory"})


def _rows(measure: Any, *arguments: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = call_in_new_process(measure, *arguments, threads=1)["rows"]
    return rows


def _logits(vocab: int) -> dict[str, Any]:
    """Return peak bytes of a chunk with all its logits at once, and with slices of them."""
    peaks = {
        way: call_in_new_process(logits_memory.measure, vocab, way, threads=1)["bytes"]
        for way in ("plain", "sliced")
    }
    return {"vocab": vocab, "tokens": logits_memory.TOKENS, **peaks}


def long_text_table(figures: Figures) -> list[str]:
    """Return rate and memory of a long text, by the carried contexts of constant memory."""
    columns = {
        "carry": lambda row: f"`{row['carry']}`",
        "model": lambda row: f"{row['family']}, {row['parameters'] / 1e6:.1f}M",
        "tokens": lambda row: f"{row['tokens']:,}",
        "tokens/s, whole text": lambda row: f"{row['tokens_per_second']:,.0f}",
        "tokens/s here, plain loop": lambda row: ", ".join(
            f"{median(row[f'{side}_tokens_per_second']):,.0f}" for side in ("ours", "plain")
        ),
        "resident MB at the first and last look": lambda row: ", ".join(
            f"{size / 1e6:.1f}" for _, size in (row["memory"][:1] + row["memory"][-1:])
        ),
        "growth, kB per 100,000 tokens": lambda row: f"{row['slope_bytes_per_100k'] / 1e3:.1f}",
        "handed on, kB": lambda row: f"{row['carried_bytes'] / 1e3:.0f}",
    }
    return column_table(columns, figures["lengths"])


def exactness_table(figures: Figures) -> list[str]:
    """Return the largest difference from the reference, by family and carried context."""

    def cell(row: dict[str, Any], carry: str) -> str:
        measured = row[carry]
        if "refused" in measured:
            return "–"
        passes = ", token by token" if measured["single"] else ""
        return f"{measured['difference']:.0e}{passes}"

    families = {row["family"]: row for row in figures["exactness"]}
    return cross_table("family", families, {f"`{c}`": c for c in CARRIED_CONTEXTS}, cell)


def logits_table(figures: Figures) -> list[str]:
    """Return peak memory of one chunk, with all its logits and with slices of them."""
    columns = {
        "vocabulary": lambda row: f"{row['vocab']:,}",
        "tokens": lambda row: f"{row['tokens']:,}",
        "all logits, MB": lambda row: f"{row['plain'] / 1e6:,.0f}",
        "slices, MB": lambda row: f"{row['sliced'] / 1e6:,.0f}",
        "saved, MB": lambda row: f"**{(row['plain'] - row['sliced']) / 1e6:,.0f}**",
    }
    return column_table(columns, figures["logits"])


def states_table(figures: Figures) -> list[str]:
    """Return seconds of a text from a block on, with the stored states of the base model."""
    columns = {
        "edit begins at block": lambda row: f"{row['block']} of {row['blocks']}",
        "plain, s": lambda row: f"{row['plain']:.1f}",
        "recording, s": lambda row: f"{row['recording']:.1f}",
        "from there, s": lambda row: f"**{row['from']:.1f}**",
        "states, MB": lambda row: f"{row['bytes'] / 1e6:.0f}",
    }
    return column_table(columns, figures["states"])


CLAIM = Claim(
    "streaming_evaluation",
    "Long texts: rate, memory, exactness by carried context, logits, states of the base model.",
    "streaming",
    {
        "streaming": long_text_table,
        "exactness": exactness_table,
        "logits": logits_table,
        "states": states_table,
    },
)
