"""Draw a search over time: what each replica evaluated, and events of replicas, nodes and disk."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from ray_abliterate.report.figures.plotly_parts import Figure, figure, marks, view
from ray_abliterate.report.run_data import escape_text
from ray_abliterate.report.timeline import Timeline, TimelineEvent, TimelineSpan

COLORS = {"finished": "c0", "stopped early": "muted", "failed": "c1", "interrupted": "c4"}
LABEL_CHARACTERS = 32
"""Characters of a name beside the axis; hovering shows the whole. A narrow page shows fewer."""
MOST_ALT_EVENTS = 20
"""Events that the text for screen readers mentions."""
PAUSE = timedelta(minutes=10)
"""A longer time without a plan in flight is cut out of the axis."""


def timeline_figure(timeline: Timeline) -> Figure:
    """Return evaluations as bars by replica, with events below them."""
    title = "Over time"
    if not timeline.spans:
        return figure(title, "", [])
    note = (
        "Each bar is the evaluation of a plan on its replica. Where the replica is not known "
        "(the plan failed, or was interrupted), the bar lies in the row “in flight”, from asking "
        "for the plan to reporting its outcome."
    )
    replica_rows = {name or "in flight": middle for name, middle in timeline.names.items()}
    subjects = dict.fromkeys(event.who for event in timeline.events)
    others = [who for who in subjects if who not in replica_rows]
    rows = replica_rows | {name: timeline.lanes + place for place, name in enumerate(others)}
    data = [
        _bars(outcome, [s for s in timeline.spans if s.outcome == outcome], color)
        for outcome, color in COLORS.items()
    ]
    data = [bars for bars in data if bars["y"]] + _event_traces(timeline.events, rows)
    breaks = _pauses(timeline.spans)
    note += " Pauses are cut out." if breaks else ""
    x = {"title": {"text": "time"}, "type": "date", "rangebreaks": breaks}
    y = {
        "title": {"text": ""},
        "tickvals": [*rows.values()],
        "ticktext": [escape_text(_short(name)) for name in rows],
        "range": [timeline.lanes + len(others) - 0.4, -0.6],
        "showgrid": False,
    }
    height = min(900, max(260, 160 + 22 * (timeline.lanes + len(others))))
    look = {"barmode": "overlay", "bargap": 0.25, "height": height}
    return figure(title, note, [view("time", data, x, y, **look)], _alt_text(timeline))


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
    in_flight = (span.end - span.start).total_seconds()
    took = "" if span.seconds is None else f"<br>evaluated in {span.seconds:.1f} s"
    times = f"{span.start:%H:%M:%S} to {span.end:%H:%M:%S}, {in_flight:.1f} s"
    replica = f"<br>{escape_text(span.replica)}" if span.replica else ""
    return f"<b>trial {span.number}</b>, {span.outcome}<br>{times}{took}{replica}"


def _event_traces(events: Sequence[TimelineEvent], rows: Mapping[str, float]) -> list[Figure]:
    """Return outages as thick lines, and other events as points."""
    points = [event for event in events if event.end is None]
    traces: list[Figure] = []
    x: list[Any] = []
    y: list[Any] = []
    texts: list[Any] = []
    for event in events:
        if event.end is not None:
            ends = [event.time, event.end]
            x += [*(time.isoformat(timespec="milliseconds") for time in ends), None]
            y += [rows[event.who]] * 2 + [None]
            texts += [_event_text(event)] * 2 + [None]
    if x:
        style = {"color": "var(--c1)", "width": 8}
        lost = {"type": "scatter", "mode": "lines", "name": "outage", "x": x, "y": y}
        traces.append(lost | {"line": style, "text": texts, "hoverinfo": "text"})
    if points:
        mark = {"size": 10, "symbol": "diamond", "color": "var(--c1)"}
        at = [event.time.isoformat(timespec="milliseconds") for event in points]
        hover = [_event_text(event) for event in points]
        traces.append(marks("event", at, [rows[event.who] for event in points], hover, mark))
    return traces


def _event_text(event: TimelineEvent) -> str:
    until = f" to {event.end:%H:%M:%S}" if event.end else ""
    return f"<b>{escape_text(event.who)}</b>, {event.time:%H:%M:%S}{until}<br>" + "<br>".join(
        escape_text(part) for part in event.text.split("; ")
    )


def _short(name: str) -> str:
    return name if len(name) <= LABEL_CHARACTERS else f"{name[: LABEL_CHARACTERS - 1]}…"


def _pauses(spans: Sequence[TimelineSpan]) -> list[dict[str, list[str]]]:
    """Return long times without a plan in flight, less a little at each end."""
    pauses = []
    last: datetime | None = None
    for span in sorted(spans, key=lambda span: span.start):
        if last is not None and span.start - last > PAUSE:
            rest = 0.05 * PAUSE
            ends = (last + rest, span.start - rest)
            pauses.append({"bounds": [end.isoformat(timespec="milliseconds") for end in ends]})
        last = span.end if last is None else max(last, span.end)
    return pauses


def _alt_text(timeline: Timeline) -> str:
    first = min(span.start for span in timeline.spans)
    last = max(span.end for span in timeline.spans)
    events = "; ".join(
        f"{event.time:%H:%M:%S} {event.who}: {event.text}"
        for event in timeline.events[:MOST_ALT_EVENTS]
    )
    return (
        f"{len(timeline.spans)} plans from {first:%Y-%m-%d %H:%M:%S} to {last:%Y-%m-%d %H:%M:%S}, "
        f"on {sum(map(bool, timeline.names))} replicas." + (f" Events: {events}." if events else "")
    )
