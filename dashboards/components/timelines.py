"""Pictures over time: anomalies, and how the API answered. As `charts.py`."""

from collections.abc import Sequence
from datetime import datetime

import plotly.graph_objects as go
from personalization.quality.anomaly import Anomaly
from personalization.quality.traffic import Counted, Traffic

from components import text
from components.charts import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION

_ROW_HEIGHT = 26
_MARKED = 200
_MILLISECONDS = [digit * 10**power for power in range(-1, 5) for digit in (1, 2, 5)]
_STORES = (ORANGE, PURPLE, SKY, BLUE, GREEN)
_PATTERNS = ("", "/", ".", "x", "-")


def anomalies(found: Sequence[Anomaly], seen: set[str], since: datetime, until: datetime) -> go.Figure:
    """When and where something was wrong; hollow where somebody has seen it."""
    figure = go.Figure()
    for severity, color, symbol in (("error", VERMILION, "x"), ("warning", ORANGE, "triangle-up")):
        for is_seen in (False, True):
            some = [one for one in found if one.severity == severity and (one.anomaly_id in seen) == is_seen]
            if some:
                figure.add_scatter(
                    x=[text.local(one.run_started_at) if one.run_started_at else None for one in some],
                    y=[one.stage for one in some],
                    name=f"{severity}, acknowledged" if is_seen else severity,
                    mode="markers",
                    marker={"color": color, "size": 12, "symbol": f"{symbol}-open" if is_seen else symbol},
                    cliponaxis=False,
                    customdata=[one.title for one in some],
                    hovertemplate="%{x|%d %b %Y, %H:%M}: %{customdata} (%{y})<extra></extra>",
                )
    stages = sorted({one.stage for one in found})
    figure.update_layout(showlegend=True)
    figure.update_xaxes(range=[text.local(since), text.local(until)])
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=stages, autorange="reversed")
    return _finished(figure, 110 + _ROW_HEIGHT * max(len(stages), 3))


def latency(steps: Sequence[Traffic]) -> go.Figure:
    """The median and the outer percentiles of the API's answers, in milliseconds."""
    figure = go.Figure()
    for label, share, color, dash, symbol in (
        ("p99", 0.99, VERMILION, "dot", "x"),
        ("p95", 0.95, ORANGE, "dash", "square"),
        ("p50", 0.5, BLUE, "solid", "circle"),
    ):
        figure.add_scatter(
            x=_moments(steps),
            y=[None if (seconds := one.quantile(share)) is None else seconds * 1000 for one in steps],
            name=label,
            mode=_mode(steps),
            line={"color": color, "dash": dash},
            marker={"symbol": symbol, "size": 6},
            hovertemplate="%{x|%d %b, %H:%M}: %{y:,.1f} ms %{fullData.name}<extra></extra>",
        )
    figure.update_yaxes(
        title="milliseconds", type="log", tickvals=_MILLISECONDS, ticktext=[f"{one:g}" for one in _MILLISECONDS]
    )
    return _finished(figure, 320)


def requests(steps: Sequence[Traffic], step_ms: int, now: datetime) -> go.Figure:
    """Requests a second; the last step may not be over."""
    figure = go.Figure()
    now_ms = now.timestamp() * 1000
    figure.add_scatter(
        x=_moments(steps),
        y=[one.requests * 1000 / max(min(step_ms, now_ms - one.moment_ms), 1000) for one in steps],
        name="requests",
        mode=_mode(steps),
        line_color=BLUE,
        hovertemplate="%{x|%d %b, %H:%M}: %{y:,.2f} /s<extra></extra>",
    )
    figure.update_yaxes(title="requests per second", rangemode="tozero")
    return _finished(figure, 260)


def errors(steps: Sequence[Traffic]) -> go.Figure:
    """The share of answers that were 5xx."""
    figure = go.Figure()
    figure.add_bar(
        x=_moments(steps),
        y=[one.errors / one.requests if one.requests else None for one in steps],
        name="5xx",
        marker_color=VERMILION,
        customdata=[[one.errors, one.requests] for one in steps],
        hovertemplate="%{x|%d %b, %H:%M}: %{y:.2%}, %{customdata[0]:,} of %{customdata[1]:,}<extra></extra>",
    )
    figure.update_yaxes(title="failed", tickformat=".2%", rangemode="tozero")
    return _finished(figure, 260)


def answers(counts: Sequence[Counted]) -> go.Figure:
    """Where answers came from, as shares."""
    figure = go.Figure()
    for name, label, color, pattern in (
        ("hit", "from the cache", BLUE, ""),
        ("stale", "past its time", ORANGE, "/"),
        ("miss", "made anew", GREY, "."),
    ):
        some = [one for one in counts if one.name == name]
        figure.add_bar(
            x=_moments(some),
            y=[one.count for one in some],
            name=label,
            marker={"color": color, "pattern": {"shape": pattern, "fillmode": "overlay"}},
            hovertemplate="%{x|%d %b, %H:%M}: %{y:,} %{fullData.name}<extra></extra>",
        )
    figure.update_layout(barmode="stack", barnorm="percent")
    figure.update_yaxes(title="answers", ticksuffix=" %")
    return _finished(figure, 260)


def degraded(counts: Sequence[Counted]) -> go.Figure:
    """Answers that lacked a store, by the store."""
    figure = go.Figure()
    stores = sorted({one.name for one in counts})
    for at, name in enumerate(stores):
        some = [one for one in counts if one.name == name]
        figure.add_bar(
            x=_moments(some),
            y=[one.count for one in some],
            name=name.partition(":")[2],
            marker={"color": _STORES[at % len(_STORES)], "pattern": {"shape": _PATTERNS[at % len(_PATTERNS)]}},
            hovertemplate="%{x|%d %b, %H:%M}: %{y:,} without %{fullData.name}<extra></extra>",
        )
    figure.update_layout(showlegend=True, barmode="stack")
    figure.update_yaxes(title="answers", rangemode="tozero")
    return _finished(figure, 260)


def within(figure: go.Figure, since_ms: int, until: datetime, step_ms: int) -> go.Figure:
    """The picture over the whole span, each bar as wide as its step: also where there is but one."""
    figure.update_xaxes(range=[text.local_ms(since_ms), text.local(until)])
    return figure.update_traces(width=step_ms, offset=0, selector={"type": "bar"})


def _moments(steps: Sequence[Traffic] | Sequence[Counted]) -> list[datetime]:
    return [text.local_ms(one.moment_ms) for one in steps]


def _mode(steps: Sequence[Traffic]) -> str:
    return "lines" if len(steps) > _MARKED else "lines+markers"


def _finished(figure: go.Figure, height: int) -> go.Figure:
    return figure.update_layout(
        height=height,
        margin={"l": 0, "r": 10, "t": 30, "b": 0},
        legend={"orientation": "h", "yref": "container", "y": 1, "yanchor": "top", "x": 1, "xanchor": "right"},
        bargap=0.1,
    )
