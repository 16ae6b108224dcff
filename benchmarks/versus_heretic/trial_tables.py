"""The tables of `trial_speed`, a row for each model, dtype and number of trials per pass."""

from collections.abc import Mapping
from typing import Any

from benchmarks.harness.claim import Figures, Table
from benchmarks.harness.tables import column_table, cross_table, gigabytes, median_and_range

Configured = tuple[dict[str, Any], str]
"""A configuration, and one of its numbers of trials per pass."""

SETTING = {
    "model": lambda row: row[0]["model"],
    "dtype": lambda row: row[0]["dtype"],
    "trials a pass": lambda row: row[1],
}
"""The first columns of most tables."""


def _configured(figures: Figures) -> list[Configured]:
    return [(c, count) for c in figures["configurations"] for count in c["per_pass"]]


def overview(figures: Figures) -> list[str]:
    """Return seconds per trial, ratio and memory."""

    def times(row: Configured) -> dict[str, Any]:
        by_count: dict[str, dict[str, Any]] = row[0]["per_pass"]
        return by_count[row[1]]

    columns = {
        **SETTING,
        "here, s a trial": lambda row: median_and_range(times(row)["ours_seconds"]),
        "Heretic, s a trial": lambda row: median_and_range(times(row)["peer_seconds"]),
        "ratio": lambda row: f"**{times(row)['ratio']:.2f}**",
        "paired ratios": lambda row: _ends(times(row)["paired"]),
        "peak memory here, Heretic": lambda row: (
            f"{gigabytes(times(row)['ours_peak_bytes'])}, {gigabytes(row[0]['peer_peak_bytes'])} GB"
        ),
    }
    return column_table(columns, _configured(figures))


def _ends(values: Mapping[str, float]) -> str:
    return f"{values['min']:.2f} to {values['max']:.2f}"


def agreement_table(figures: Figures) -> list[str]:
    """Return whether both measured the same."""
    columns = {
        **SETTING,
        "equal verdicts": lambda row: _verdicts(row[0]["agreement"][row[1]]),
        "refusals here, Heretic": lambda row: _refusals(row[0]["agreement"][row[1]]),
        "relative difference of KL": lambda row: _percent(
            row[0]["agreement"][row[1]]["kl_relative_difference"]
        ),
    }
    return column_table(columns, _configured(figures))


def _verdicts(agreement: Mapping[str, Any]) -> str:
    """Return the count of equal verdicts; only refusals are counted where trials share a pass."""
    verdicts = agreement["verdicts"]
    return f"{verdicts['equal']} of {verdicts['verdicts']}" if verdicts else "by count"


def _refusals(agreement: Mapping[str, Any]) -> str:
    return f"{sum(agreement['refusals_ours'])}, {sum(agreement['refusals_peer'])}"


def _percent(values: Mapping[str, float]) -> str:
    """Return the median of shares, and the largest, in percent."""
    return f"{100 * values['median']:.1f} %, at most {100 * values['max']:.1f} %"


def check_table(figures: Figures) -> list[str]:
    """Return KL divergences without normalisation: the largest difference over all points."""
    rows = [
        (
            check["model"],
            count,
            agreement,
            [(row["ours"][count]["kl"], row["peer"]["kl"]) for row in check["trials"]],
        )
        for check in figures.get("check", [])
        for count, agreement in check["agreement"].items()
    ]
    columns = {
        "model": lambda row: row[0],
        "trials a pass": lambda row: row[1],
        "points": lambda row: len(row[3]),
        "KL of Heretic": lambda row: (
            f"{min(b for _, b in row[3]):.4f} to {max(b for _, b in row[3]):.4f}"
        ),
        "largest difference": lambda row: f"{max(abs(a - b) for a, b in row[3]):.6f}",
        "equal verdicts": lambda row: _verdicts(row[2]),
        "refusals here, Heretic": lambda row: _refusals(row[2]),
    }
    return column_table(columns, rows)


def floor_table(figures: Figures) -> list[str]:
    """Return floors, and how far from them a trial is."""

    def whole(row: Configured) -> dict[str, Any]:
        floor: dict[str, Any] = row[0]["floor"][row[1]]["whole answers"]
        return floor

    def written(row: Configured) -> str:
        floor = row[0]["floor"][row[1]].get("tokens written")
        return f"{floor['ours_over_floor']:.2f}" if floor else ""

    columns = {
        **SETTING,
        "rows a step": lambda row: whole(row)["decode_rows"],
        "GFLOP a trial": lambda row: f"{whole(row)['flop_per_trial'] / 1e9:.0f}",
        "GFLOP/s prefill, step": lambda row: ", ".join(
            f"{whole(row)[f'{half}_gflop_per_s']:.0f}" for half in ("prefill", "decode")
        ),
        "floor, s": lambda row: f"{whole(row)['floor_seconds']:.2f}",
        "here over floor": lambda row: f"{whole(row)['ours_over_floor']:.2f}",
        "here over floor of the tokens written": written,
    }
    return column_table(columns, _configured(figures))


def technique_table(figures: Figures) -> list[str]:
    """Return how many times longer a pass takes without each technique."""
    columns = {
        f"{c['model']}, {c['dtype']}, {count} a pass": c["techniques"][count]
        for c, count in _configured(figures)
        if count in (c["techniques"] or {})
    }
    names = {name: name for costs in list(columns.values())[:1] for name in costs}
    return cross_table(
        "without", names, columns, lambda name, costs: f"{costs[name]['slowdown']:.2f}"
    )


def start_table(figures: Figures) -> list[str]:
    """Return the start-up of both in the comparison, and what switching trials costs."""

    def start(row: dict[str, Any], side: str) -> str:
        return f"{sum(row['start_up'][f'{side}_seconds'].values()):.1f}"

    def both(row: dict[str, Any]) -> str:
        switch = row["switch"]
        if not switch:
            return ""
        parts = (switch[f"{part}_seconds"]["median"] for part in ("apply", "restore"))
        return f"{1000 * sum(parts):.0f} ms"

    columns = {
        "model": lambda row: row["model"],
        "dtype": lambda row: row["dtype"],
        "start here, s": lambda row: start(row, "ours"),
        "start Heretic, s": lambda row: start(row, "peer"),
        "apply + restore": both,
        "of a trial": lambda row: (
            f"{row['switch']['percent_of_trial']:.1f} %" if row["switch"] else ""
        ),
    }
    return column_table(columns, figures["configurations"])


TABLES: dict[str, Table] = {
    "overview": overview,
    "agreement": agreement_table,
    "check": check_table,
    "floor": floor_table,
    "techniques": technique_table,
    "start": start_table,
}
