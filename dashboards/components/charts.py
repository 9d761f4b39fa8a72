"""The pictures. Okabe-Ito colours, never the only sign of a difference, on no background of their own."""

from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime

import plotly.graph_objects as go
from personalization.quality.anomalies import Anomaly
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
from plotly.subplots import make_subplots

from components import text

BLUE, SKY, ORANGE, GREEN, PURPLE = "#0072B2", "#56B4E9", "#E69F00", "#009E73", "#CC79A7"
VERMILION, GREY = "#D55E00", "#8A8F98"

_HATCH = {"fillmode": "overlay", "size": 6, "fgcolor": "rgba(255,255,255,0.75)"}
_RUN_TICKS = 8
_BAR_HEIGHT = 26


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


def anomalies(found: Sequence[Anomaly], runs: Sequence[RunSummary], stages: Sequence[str]) -> go.Figure:
    """Where and when something was wrong: runs from left to right, stages from top to bottom."""
    runs = runs[::-1]
    figure = go.Figure()
    figure.add_scatter(
        x=[one.run_id for one in runs for _ in stages],
        y=[stage for _ in runs for stage in stages],
        mode="markers",
        marker={"color": GREY, "size": 4, "opacity": 0.45},
        hoverinfo="skip",
        showlegend=False,
    )
    for severity, color, symbol in (("error", VERMILION, "x"), ("warning", ORANGE, "triangle-up")):
        some = [one for one in found if one.severity == severity]
        figure.add_scatter(
            x=[one.run_id for one in some],
            y=[one.stage for one in some],
            name=severity,
            mode="markers",
            marker={"color": color, "size": 13, "symbol": symbol},
            customdata=[[text.moment(one.run_started_at), one.title] for one in some],
            hovertemplate="%{customdata[0]}: %{customdata[1]}<extra></extra>",
        )
    figure.update_yaxes(categoryorder="array", categoryarray=list(stages), autorange="reversed")
    _name_runs(figure, {one.run_id: one.started_at for one in runs})
    return _finished(figure, height=110 + _BAR_HEIGHT * len(stages))


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
