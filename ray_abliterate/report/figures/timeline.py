"""A search over time: what each replica evaluated, and what happened to it, nodes and files."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from ray_abliterate.report.figures.plotly_parts import Figure, figure, marks, view
from ray_abliterate.report.run_data import escaped
from ray_abliterate.report.timeline import Happening, Timeline, TimelineSpan

COLORS = {"finished": "c0", "stopped early": "muted", "failed": "c1", "interrupted": "c4"}
LABEL_CHARACTERS = 32
"""Of names beside the axis; the whole name is said when pointed at. The page shortens them further
where it is narrow."""
TOLD_EVENTS = 20
"""Events that are in the figure's text for those who can't see it."""
PAUSE = timedelta(minutes=10)
"""Without any plan out: cut out of the axis, if it is longer."""


def timeline_figure(timeline: Timeline) -> Figure:
    """Bars of evaluations by replica; below them, what happened."""
    title = "Over time"
    if not timeline.spans:
        return figure(title, "", [])
    note = (
        "A bar is a plan on its replica, while it was evaluated. Where the replica is not known "
        "(the plan failed, or was cut off), it is from asking for the plan to telling its outcome, "
        "in the row “plans out”."
    )
    own = {name or "plans out": middle for name, middle in timeline.names.items()}
    others = [who for who in dict.fromkeys(h.who for h in timeline.happenings) if who not in own]
    rows = own | {name: timeline.lanes + place for place, name in enumerate(others)}
    data = [
        _bars(outcome, [s for s in timeline.spans if s.outcome == outcome], color)
        for outcome, color in COLORS.items()
    ]
    data = [bars for bars in data if bars["y"]] + _happened(timeline.happenings, rows)
    breaks = _pauses(timeline.spans)
    note += " Pauses are cut out." if breaks else ""
    x = {"title": {"text": "time"}, "type": "date", "rangebreaks": breaks}
    y = {
        "title": {"text": ""},
        "tickvals": [*rows.values()],
        "ticktext": [escaped(_short(name)) for name in rows],
        "range": [timeline.lanes + len(others) - 0.4, -0.6],
        "showgrid": False,
    }
    height = min(900, max(260, 160 + 22 * (timeline.lanes + len(others))))
    look = {"barmode": "overlay", "bargap": 0.25, "height": height}
    return figure(title, note, [view("time", data, x, y, **look)], _told(timeline))


def _bars(outcome: str, spans: Sequence[TimelineSpan], color: str) -> Figure:
    return {
        "type": "bar",
        "orientation": "h",
        "name": outcome,
        "base": [span.start.isoformat(timespec="milliseconds") for span in spans],
        "x": [(span.end - span.start).total_seconds() * 1000 for span in spans],
        "y": [span.lane for span in spans],
        "text": [_hover(span) for span in spans],
        "textposition": "none",
        "hoverinfo": "text",
        "marker": {"color": f"var(--{color})", "line": {"color": "var(--paper)", "width": 1}},
    }


def _hover(span: TimelineSpan) -> str:
    out = (span.end - span.start).total_seconds()
    took = "" if span.seconds is None else f"<br>evaluated in {span.seconds:.1f} s"
    times = f"{span.start:%H:%M:%S} to {span.end:%H:%M:%S}, {out:.1f} s"
    where = f"<br>{escaped(span.replica)}" if span.replica else ""
    return f"<b>trial {span.number}</b>, {span.outcome}<br>{times}{took}{where}"


def _happened(happenings: Sequence[Happening], rows: Mapping[str, float]) -> list[Figure]:
    """Outages as thick lines, all else as points."""
    points = [one for one in happenings if one.end is None]
    found: list[Figure] = []
    x: list[Any] = []
    y: list[Any] = []
    texts: list[Any] = []
    for one in happenings:
        if one.end is not None:
            ends = [one.time, one.end]
            x += [*(time.isoformat(timespec="milliseconds") for time in ends), None]
            y += [rows[one.who]] * 2 + [None]
            texts += [_happening(one)] * 2 + [None]
    if x:
        style = {"color": "var(--c1)", "width": 8}
        lost = {"type": "scatter", "mode": "lines", "name": "outage", "x": x, "y": y}
        found.append(lost | {"line": style, "text": texts, "hoverinfo": "text"})
    if points:
        mark = {"size": 10, "symbol": "diamond", "color": "var(--c1)"}
        at = [one.time.isoformat(timespec="milliseconds") for one in points]
        hover = [_happening(one) for one in points]
        found.append(marks("event", at, [rows[one.who] for one in points], hover, mark))
    return found


def _happening(one: Happening) -> str:
    until = f" to {one.end:%H:%M:%S}" if one.end else ""
    return f"<b>{escaped(one.who)}</b>, {one.time:%H:%M:%S}{until}<br>" + "<br>".join(
        escaped(part) for part in one.text.split("; ")
    )


def _short(name: str) -> str:
    return name if len(name) <= LABEL_CHARACTERS else f"{name[: LABEL_CHARACTERS - 1]}…"


def _pauses(spans: Sequence[TimelineSpan]) -> list[dict[str, list[str]]]:
    """Long times without a plan out, but for a little at each end."""
    found = []
    last: datetime | None = None
    for span in sorted(spans, key=lambda one: one.start):
        if last is not None and span.start - last > PAUSE:
            rest = 0.05 * PAUSE
            ends = (last + rest, span.start - rest)
            found.append({"bounds": [end.isoformat(timespec="milliseconds") for end in ends]})
        last = span.end if last is None else max(last, span.end)
    return found


def _told(timeline: Timeline) -> str:
    first = min(span.start for span in timeline.spans)
    last = max(span.end for span in timeline.spans)
    events = "; ".join(
        f"{one.time:%H:%M:%S} {one.who}: {one.text}" for one in timeline.happenings[:TOLD_EVENTS]
    )
    return (
        f"{len(timeline.spans)} plans from {first:%Y-%m-%d %H:%M:%S} to {last:%Y-%m-%d %H:%M:%S}, "
        f"on {sum(map(bool, timeline.names))} replicas." + (f" Events: {events}." if events else "")
    )
