"""The pictures. Okabe-Ito colours, never the only sign of a difference, on no background of their own."""

from collections import defaultdict
from collections.abc import Sequence
from datetime import date, datetime, timedelta
from textwrap import shorten
from typing import Any, get_args

import plotly.graph_objects as go
from personalization.quality.engagement import CohortWeek, DayOfEvents, share
from personalization.quality.reports import (
    SHIPPED,
    CampaignEngagement,
    CategoryEngagement,
    EngagedUser,
    EvaluationPoint,
    PolicyResult,
    RunSummary,
    StageRun,
    StageTiming,
)
from personalization.schemas import Source
from plotly.subplots import make_subplots

from components import text

BLUE, SKY, ORANGE, GREEN, PURPLE = "#0072B2", "#56B4E9", "#E69F00", "#009E73", "#CC79A7"
VERMILION, GREY = "#D55E00", "#8A8F98"

_HATCH = {"fillmode": "overlay", "size": 6, "fgcolor": "rgba(255,255,255,0.75)"}
_RUN_TICKS = 8
_BAR_HEIGHT = 26
_LABEL_CHARS = 26
_DAYS_WITH_MARKERS = 90
_SOURCES = (
    *((color, "") for color in (BLUE, ORANGE, GREEN, PURPLE, SKY)),
    *((color, "/") for color in (VERMILION, BLUE, ORANGE, GREEN)),
)


def run(stages: Sequence[StageRun]) -> go.Figure:
    """When each stage of a run worked, and what became of its rows."""
    names = [one.stage for one in stages]
    began = min((one.started_at for one in stages if one.started_at), default=None)
    offsets = [_seconds_between(began, one.started_at) for one in stages]
    lengths = [_seconds_between(one.started_at, one.finished_at) for one in stages]
    # A stage without work is named where the last one with work ends.
    end = max(map(sum, zip(offsets, lengths, strict=True)))
    figure = make_subplots(
        cols=2,
        shared_yaxes=True,
        horizontal_spacing=0.03,
        column_widths=[0.6, 0.4],
        subplot_titles=("Seconds since the start", "Rows"),
    )
    figure.add_bar(
        y=names,
        base=[offset if one.started_at else end for one, offset in zip(stages, offsets, strict=True)],
        x=lengths,
        orientation="h",
        marker_color=[VERMILION if one.status == "failed" else BLUE for one in stages],
        marker_pattern={**_HATCH, "shape": ["/" if one.status == "failed" else "" for one in stages]},
        text=[_stage_label(one, length) for one, length in zip(stages, lengths, strict=True)],
        textposition="outside",
        cliponaxis=False,
        showlegend=False,
        customdata=[[text.duration(one.seconds), one.shards] for one in stages],
        hovertemplate="%{y}: %{text}<br>%{customdata[0]} of work in %{customdata[1]} shards<extra></extra>",
    )
    for label, color, values, pattern in (
        ("out", BLUE, [one.rows_out for one in stages], ""),
        ("skipped", GREY, [one.skipped for one in stages], ""),
        ("rejected", VERMILION, [one.rejected for one in stages], "/"),
    ):
        figure.add_bar(
            y=names,
            x=values,
            name=label,
            orientation="h",
            marker_color=color,
            marker_pattern={**_HATCH, "shape": pattern},
            hovertemplate="%{y}: %{x:,} %{fullData.name}<extra></extra>",
            row=1,
            col=2,
        )
    figure.update_xaxes(range=[0, end * 1.3 or 1], col=1)
    figure.update_layout(barmode="stack")
    figure.update_yaxes(autorange="reversed")
    return _finished(figure, height=90 + _BAR_HEIGHT * len(stages), top=60)


def comparison(stages: Sequence[StageRun], others: Sequence[StageRun]) -> go.Figure:
    """Work time of each stage in two runs."""
    figure = go.Figure()
    for name, color, pattern, some in (("this run", BLUE, "", stages), ("the other", GREY, "/", others)):
        figure.add_bar(
            y=[one.stage for one in some],
            x=[one.seconds for one in some],
            name=name,
            orientation="h",
            marker_color=color,
            marker_pattern={**_HATCH, "shape": pattern},
            text=[text.duration(one.seconds) for one in some],
            textposition="outside",
            cliponaxis=False,
            hovertemplate="%{y}: %{x:.2f} s in %{fullData.name}<extra></extra>",
        )
    longest = max(one.seconds for one in (*stages, *others))
    figure.update_xaxes(title="seconds of work", range=[0, longest * 1.15 or 1])
    figure.update_yaxes(autorange="reversed")
    return _finished(figure, height=110 + 2 * _BAR_HEIGHT * len(stages), top=40)


def rows_by_run(runs: Sequence[RunSummary]) -> go.Figure:
    """What became of the rows that each run read."""
    figure = go.Figure()
    runs = runs[::-1]
    for label, color, values, pattern in (
        ("staged", BLUE, [one.staged for one in runs], ""),
        ("unchanged or repeated", GREY, [one.skipped for one in runs], ""),
        ("rejected", VERMILION, [one.rejected for one in runs], "/"),
    ):
        figure.add_bar(
            x=[one.run_id for one in runs],
            y=values,
            name=label,
            marker_color=color,
            marker_pattern={**_HATCH, "shape": pattern},
            customdata=[text.moment(one.started_at) for one in runs],
            hovertemplate="%{customdata}: %{y:,} %{fullData.name}<extra></extra>",
        )
    figure.update_layout(barmode="stack", yaxis_title="rows")
    _name_runs(figure, {one.run_id: one.started_at for one in runs})
    return _finished(figure, height=320)


def seconds_by_stage(timings: Sequence[StageTiming]) -> go.Figure:
    """The work time of each run, by stage; the small stages together."""
    figure = go.Figure()
    stages = _largest_stages(timings)
    runs = {one.run_id: one.run_started_at for one in timings}
    seconds: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(runs, 0.0))
    for one in timings:
        seconds[one.stage if one.stage in stages else "other stages"][one.run_id] += one.seconds
    for stage, color in {**stages, "other stages": GREY}.items():
        figure.add_bar(
            x=list(runs),
            y=list(seconds[stage].values()),
            name=stage,
            marker_color=color,
            customdata=[text.moment(started_at) for started_at in runs.values()],
            hovertemplate="%{customdata}: %{y:.1f} s %{fullData.name}<extra></extra>",
        )
    figure.update_layout(barmode="stack", yaxis_title="seconds of work")
    _name_runs(figure, runs)
    return _finished(figure, height=360)


def throughput_by_stage(timings: Sequence[StageTiming]) -> go.Figure:
    """Rows a second of the stages that take most time."""
    figure = go.Figure()
    runs = {one.run_id: one.run_started_at for one in timings}
    symbols = ("circle", "square", "diamond", "triangle-up", "cross")
    for (stage, color), symbol in zip(_largest_stages(timings).items(), symbols, strict=False):
        points = [one for one in timings if one.stage == stage and one.rows_per_second]
        figure.add_scatter(
            x=[one.run_id for one in points],
            y=[one.rows_per_second for one in points],
            name=stage,
            mode="lines+markers",
            line_color=color,
            marker={"symbol": symbol, "size": 8},
            customdata=[text.moment(one.run_started_at) for one in points],
            hovertemplate="%{customdata}: %{y:,.0f} rows/s %{fullData.name}<extra></extra>",
        )
    figure.update_layout(yaxis={"title": "rows per second", "type": "log", "dtick": 1})
    _name_runs(figure, runs)
    return _finished(figure, height=360)


def campaigns(shown: Sequence[CampaignEngagement], now: datetime) -> go.Figure:
    """Users and messages of each campaign; hatched where it does not run now."""
    figure = make_subplots(cols=2, shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=("Users", "Messages"))
    states = [one.state(now) for one in shown]
    for column, color, values in (
        (1, BLUE, [one.users for one in shown]),
        (2, ORANGE, [one.messages for one in shown]),
    ):
        figure.add_bar(
            y=[one.name for one in shown],
            x=values,
            orientation="h",
            marker_color=color,
            marker_pattern={**_HATCH, "shape": ["" if state == "active" else "/" for state in states]},
            text=[f"{value:,}" for value in values],
            textposition="outside",
            cliponaxis=False,
            customdata=states,
            hovertemplate="%{y} (%{customdata}): %{x:,}<extra></extra>",
            showlegend=False,
            row=1,
            col=column,
        )
        figure.update_xaxes(range=[0, max(values) * 1.15 or 1], col=column)
    figure.update_yaxes(autorange="reversed")
    return _finished(figure, height=90 + _BAR_HEIGHT * len(shown))


def events_by_day(events: Sequence[DayOfEvents], first: date, last: date) -> go.Figure:
    """What was shown each day, and below it what users did; a day without events is 0."""
    days = [first + timedelta(days=at) for at in range((last - first).days + 1)]
    counts = {(one.day, one.event): one.count for one in events}
    figure = make_subplots(rows=2, shared_xaxes=True, vertical_spacing=0.08, row_heights=[0.4, 0.6])
    figure.add_bar(
        x=days,
        y=[counts.get((day, "impression"), 0) for day in days],
        name="impressions",
        marker_color=GREY,
        hovertemplate="%{x|%d %b %Y}: %{y:,} impressions<extra></extra>",
    )
    for event, color, symbol in (
        ("click", BLUE, "circle"),
        ("conversion", GREEN, "diamond"),
        ("dismiss", VERMILION, "x"),
    ):
        figure.add_scatter(
            x=days,
            y=[counts.get((day, event), 0) for day in days],
            name={"dismiss": "dismissals"}.get(event, f"{event}s"),
            mode="lines+markers" if len(days) <= _DAYS_WITH_MARKERS else "lines",
            line={"color": color, "dash": {"conversion": "dash", "dismiss": "dot"}.get(event, "solid")},
            marker={"symbol": symbol, "size": 7},
            hovertemplate="%{x|%d %b %Y}: %{y:,} %{fullData.name}<extra></extra>",
            row=2,
            col=1,
        )
    figure.update_yaxes(rangemode="tozero")
    return _finished(figure, height=360)


def funnel(shown: Sequence[CampaignEngagement]) -> go.Figure:
    """Of the users who saw each campaign those who clicked, and of these those who converted, with intervals."""
    figure = _beside("Clicked", "Converted")
    for column, color, symbol, steps in (
        (1, BLUE, "circle", [(one.clicked_by, one.shown_to) for one in shown]),
        (2, GREEN, "diamond", [(one.converted_by, one.clicked_by) for one in shown]),
    ):
        found = [(one.name, part) for one, step in zip(shown, steps, strict=True) if (part := share(*step))]
        figure.add_scatter(
            y=[_short(name) for name, _ in found],
            x=[part.mean for _, part in found],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [part.high - part.mean for _, part in found],
                "arrayminus": [part.mean - part.low for _, part in found],
            },
            mode="markers",
            marker={"color": color, "symbol": symbol, "size": 10},
            customdata=[[part.have, part.of, part.low, part.high] for _, part in found],
            hovertemplate="%{y}: %{x:.1%} (%{customdata[2]:.1%} … %{customdata[3]:.1%}), "
            "%{customdata[0]:,} of %{customdata[1]:,} users<extra></extra>",
            showlegend=False,
            row=1,
            col=column,
        )
    figure.update_xaxes(tickformat=".0%", rangemode="tozero")
    names = [_short(one.name) for one in shown]
    figure.update_yaxes(categoryorder="array", categoryarray=names, autorange="reversed", type="category")
    return _finished(figure, height=90 + _BAR_HEIGHT * len(names), top=40)


def cohorts(weeks: Sequence[CohortWeek]) -> go.Figure:
    """Share of the users of each first week who were active so many weeks later."""
    firsts = sorted({one.first_week for one in weeks})
    of = {one.first_week: one.of for one in weeks}
    shares = {(one.first_week, one.weeks_later): one.share for one in weeks}
    latest = max(one.weeks_later for one in weeks)
    now = max(one.first_week + timedelta(weeks=one.weeks_later) for one in weeks)
    # A week in which nobody came back is 0; one that is still to come is nothing.
    cells = [
        [
            shares.get((first, later), 0.0) if later and first + timedelta(weeks=later) <= now else None
            for later in range(1, latest + 1)
        ]
        for first in firsts
    ]
    figure = go.Figure()
    figure.add_heatmap(
        x=[f"+{later}" for later in range(1, latest + 1)],
        y=[f"{first:%d %b} · {of[first]:,} new" for first in firsts],
        z=cells,
        texttemplate="%{z:.0%}",
        colorscale="Cividis",
        zmin=0,
        xgap=2,
        ygap=2,
        showscale=False,
        hoverongaps=False,
        hovertemplate="%{y}, %{x} weeks: %{z:.1%} active<extra></extra>",
    )
    figure.update_xaxes(title="weeks later", type="category")
    figure.update_yaxes(autorange="reversed", type="category")
    return _finished(figure, height=90 + _BAR_HEIGHT * len(firsts))


def categories(shown: Sequence[CategoryEngagement]) -> go.Figure:
    """Messages that speak to the campaigns of each category."""
    return _ranking([one.category for one in shown], [one.messages for one in shown], [one.last_at for one in shown])


def users(shown: Sequence[EngagedUser]) -> go.Figure:
    """Messages of the users who engage most."""
    return _ranking([one.user_id for one in shown], [one.messages for one in shown], [one.last_at for one in shown])


def policies(results: Sequence[PolicyResult]) -> go.Figure:
    """What each policy reached, and how far the shipped one is ahead of it, user by user."""
    figure = _beside("NDCG@10", "NDCG@10 that shipped is ahead by")
    _intervals(figure, [(one, one.mean, one.low, one.high) for one in results], column=1)
    _intervals(figure, [(one, one.diff_mean, one.diff_low, one.diff_high) for one in results], column=2)
    figure.add_vline(0, line_color=GREY, line_dash="dot", row=1, col=2)
    return _of_policies(figure, results)


def segments(cold: Sequence[PolicyResult], warm: Sequence[PolicyResult]) -> go.Figure:
    """What each policy reached for users of whom next to nothing was known, and for the others."""
    shown = [(name, results) for name, results in (("Cold", cold), ("Warm", warm)) if results]
    figure = _beside(*(f"{name}: {results[0].answers:,} answers" for name, results in shown))
    for column, (_, results) in enumerate(shown, start=1):
        _intervals(figure, [(one, one.mean, one.low, one.high) for one in results], column)
    return _of_policies(figure, shown[-1][1])


def evaluations(points: Sequence[EvaluationPoint]) -> go.Figure:
    """NDCG@10 of some policies over the evaluations."""
    figure = go.Figure()
    names = sorted({one.policy for one in points}, key=lambda policy: policy != SHIPPED)
    for policy, color, symbol in zip(names, (BLUE, GREY), ("diamond", "square"), strict=False):
        some = [one for one in points if one.policy == policy]
        figure.add_scatter(
            x=[text.local(one.created_at) for one in some],
            y=[one.mean for one in some],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [one.high - one.mean for one in some],
                "arrayminus": [one.mean - one.low for one in some],
            },
            name=policy,
            mode="lines+markers",
            line={"color": color, "dash": "solid" if policy == SHIPPED else "dot"},
            marker={"symbol": symbol, "size": 9},
            hovertemplate="%{x|%d %b %Y, %H:%M}: %{y:.3f} %{fullData.name}<extra></extra>",
        )
    figure.update_yaxes(title="NDCG@10", rangemode="tozero")
    return _finished(figure, height=320)


def reasons(recommendations: Sequence[dict[str, Any]]) -> go.Figure:
    """How much each source speaks for each recommended campaign, as the API explains it."""
    figure = go.Figure()
    names = [f"{one['position']}. {_short(one['name'])}" for one in recommendations]
    for at, source in enumerate(get_args(Source)):
        shares = [
            sum(reason["share"] for reason in one["reasons"] if reason["source"] == source) for one in recommendations
        ]
        if any(shares):
            color, pattern = _SOURCES[at]
            figure.add_bar(
                y=names,
                x=shares,
                name=source.replace("_", " "),
                orientation="h",
                marker_color=color,
                marker_pattern={**_HATCH, "shape": pattern},
                hovertemplate="%{y}: %{x:.2f} by %{fullData.name}<extra></extra>",
            )
    figure.update_layout(barmode="stack", xaxis_title="score")
    figure.update_yaxes(autorange="reversed", type="category")
    figure = _finished(figure, height=130 + 34 * len(names), top=60)
    return figure.update_layout(legend={"x": 0, "xanchor": "left"})


def neighbourhood(
    user_id: str,
    intents: Sequence[dict[str, Any]],
    campaigns: Sequence[dict[str, Any]],
    similar: Sequence[dict[str, Any]],
    targets: Sequence[tuple[str, str]],
) -> go.Figure:
    """Similar users, the user, intents and campaigns from left to right, joined by what the graph knows.

    `intents`, `campaigns` and `similar` are of the API's profile and similar users; `targets` are (campaign, intent).
    """
    columns = (
        ("similar user", "circle", GREY, [(f"s {one['user_id']}", one["user_id"]) for one in similar]),
        ("the user", "star", VERMILION, [("user", user_id)]),
        ("intent", "diamond", GREEN, [(f"i {one['intent_id']}", one["name"] or one["intent_id"]) for one in intents]),
        (
            "campaign",
            "square",
            BLUE,
            [(f"c {one['campaign_id']}", one["name"] or one["campaign_id"]) for one in campaigns],
        ),
    )
    places = {
        key: (x, -(at - (len(nodes) - 1) / 2) / max(len(nodes), 1))
        for x, (_, _, _, nodes) in enumerate(columns)
        for at, (key, _) in enumerate(nodes)
    }
    edges = [
        *(("user", f"s {one['user_id']}", "is similar to", one["similarity"], "dot") for one in similar),
        *(("user", f"i {one['intent_id']}", "expressed", one["weight"], "solid") for one in intents),
        *(("user", f"c {one['campaign_id']}", "engaged with", one["weight"], "dash") for one in campaigns),
        *((f"i {intent}", f"c {campaign}", "targeted by", 0.0, "dot") for campaign, intent in targets),
    ]
    figure = go.Figure()
    named: set[str] = set()
    heaviest = max((weight for *_, weight, _ in edges), default=0.0) or 1.0
    for start, end, name, weight, dash in edges:
        if start in places and end in places:
            (x0, y0), (x1, y1) = places[start], places[end]
            # Over a column between them the line bends around what is there.
            middle = (y0 + y1) / 2 + (0.6 if x1 - x0 > 1 else 0)
            figure.add_scatter(
                x=[x0, (x0 + x1) / 2, x1],
                y=[y0, middle, y1],
                mode="lines",
                line={"shape": "spline", "width": 1 + 4 * weight / heaviest, "color": GREY, "dash": dash},
                opacity=0.7,
                hoverinfo="skip",
                name=name,
                legendgroup=name,
                showlegend=name not in named,
            )
            named.add(name)
    for x, (kind, symbol, color, nodes) in enumerate(columns):
        figure.add_scatter(
            x=[x] * len(nodes),
            y=[places[key][1] for key, _ in nodes],
            mode="markers+text",
            text=[_short(label) for _, label in nodes],
            textposition="top center",
            cliponaxis=False,
            marker={"symbol": symbol, "color": color, "size": 18 if x == 1 else 14},
            hovertext=[f"{kind} {label}" for _, label in nodes],
            hoverinfo="text",
            name=kind,
        )
    figure.update_xaxes(visible=False, range=[-0.4, 3.5])
    figure.update_yaxes(visible=False)
    most = max(len(nodes) for *_, nodes in columns)
    figure = _finished(figure, height=160 + 48 * most, top=70)
    return figure.update_layout(legend={"x": 0, "xanchor": "left"})


def _short(label: str) -> str:
    return shorten(label, _LABEL_CHARS, placeholder="…") if " " in label else label[:_LABEL_CHARS]


def _beside(*titles: str) -> go.Figure:
    return make_subplots(cols=len(titles), shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=titles)


def _intervals(
    figure: go.Figure,
    points: Sequence[tuple[PolicyResult, float | None, float | None, float | None]],
    column: int,
) -> None:
    """Means with their intervals, by kind of policy."""
    for kind, color, symbol in (
        ("shipped", BLUE, "diamond"),
        ("variant", ORANGE, "circle"),
        ("baseline", GREY, "square"),
    ):
        some = [
            (one.policy, mean, low, high)
            for one, mean, low, high in points
            if one.kind == kind and mean is not None and low is not None and high is not None
        ]
        figure.add_scatter(
            y=[policy for policy, *_ in some],
            x=[mean for _, mean, _, _ in some],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [high - mean for _, mean, _, high in some],
                "arrayminus": [mean - low for _, mean, low, _ in some],
            },
            name=kind,
            mode="markers",
            marker={"color": color, "symbol": symbol, "size": 11 if kind == "shipped" else 8},
            customdata=[[low, high] for _, _, low, high in some],
            hovertemplate="%{y}: %{x:.3f} (%{customdata[0]:.3f} … %{customdata[1]:.3f})<extra></extra>",
            legendgroup=kind,
            showlegend=column == 1,
            row=1,
            col=column,
        )


def _of_policies(figure: go.Figure, results: Sequence[PolicyResult]) -> go.Figure:
    names = [one.policy for one in results]
    figure.update_yaxes(categoryorder="array", categoryarray=names, autorange="reversed")
    return _finished(figure, height=100 + _BAR_HEIGHT * len(names), top=60)


def _ranking(names: list[str], messages: list[int], last_at: Sequence[int | None]) -> go.Figure:
    figure = go.Figure()
    figure.add_bar(
        y=names,
        x=messages,
        orientation="h",
        marker_color=ORANGE,
        text=[f"{value:,}" for value in messages],
        textposition="outside",
        cliponaxis=False,
        customdata=[text.moment(text.local_ms(one) if one else None) for one in last_at],
        hovertemplate="%{y}: %{x:,} messages, the last %{customdata}<extra></extra>",
    )
    # Ids of digits alone are names too, not places on a scale.
    figure.update_yaxes(type="category", autorange="reversed")
    figure.update_xaxes(range=[0, max(messages) * 1.15 or 1])
    return _finished(figure, height=40 + _BAR_HEIGHT * len(names), top=10)


def _largest_stages(timings: Sequence[StageTiming]) -> dict[str, str]:
    """The stages that take most time, each with its colour, in order of the pipeline."""
    colors = (BLUE, ORANGE, GREEN, PURPLE, SKY)
    seconds: dict[tuple[int, str], float] = defaultdict(float)
    for one in timings:
        seconds[one.position, one.stage] += one.seconds
    largest = sorted(sorted(seconds, key=lambda stage: seconds[stage], reverse=True)[: len(colors)])
    return {stage: color for (_, stage), color in zip(largest, colors, strict=False)}


def _stage_label(stage: StageRun, length: float) -> str:
    if not stage.started_at:
        return stage.status.replace("_", " ")
    return f"{text.duration(length)}, failed" if stage.status == "failed" else text.duration(length)


def _seconds_between(start: datetime | None, end: datetime | None) -> float:
    return (end - start).total_seconds() if start and end else 0.0


def _name_runs(figure: go.Figure, runs: dict[str, datetime | None]) -> None:
    """Put the runs at equal distances in order, some named by their time."""
    every = 1 + len(runs) // _RUN_TICKS
    named = list(runs.items())[::-every]
    figure.update_xaxes(
        type="category",
        categoryorder="array",
        categoryarray=list(runs),
        tickvals=[run_id for run_id, _ in named],
        ticktext=[f"{text.local(started_at):%d %b<br>%H:%M}" if started_at else "" for _, started_at in named],
        tickangle=0,
    )


def _finished(figure: go.Figure, height: int, top: int = 30) -> go.Figure:
    figure.update_layout(
        height=height,
        margin={"l": 0, "r": 10, "t": top, "b": 0},
        legend={
            "orientation": "h",
            "traceorder": "normal",
            "yref": "container",
            "y": 1,
            "yanchor": "top",
            "x": 1,
            "xanchor": "right",
        },
        bargap=0.25,
    )
    return figure
