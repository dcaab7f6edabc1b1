"""The table that a run ends with, and its place in bench/README.md.

Rules: each value is the median of its rounds; a ratio above 1 always means that the gateway is better, also
where less is better; a rate is marked when the load generator used its CPU up and the broker did not: the
broker may do more.

Invariant: what is printed and what is written into the README is the same text.
"""

from __future__ import annotations

import os
import platform
import sqlite3
import statistics
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from scenarios import Figure

BEGIN, END = "<!-- last run: begin -->", "<!-- last run: end -->"
SATURATED = 0.9
COLUMNS = ("mosquitto", "tidegate", "tidegate, asyncio")

Results = dict[str, dict[str, list[Figure]]]
"""Figure name → broker name → one figure per round."""


def add(results: Results, broker: str, figures: Iterable[Figure]) -> None:
    """Take in what one broker did in one round."""
    for figure in figures:
        brokers = results.setdefault(figure.name, {})
        brokers.setdefault(broker, []).append(figure)
        if figure.peer:
            brokers.setdefault(COLUMNS[0], []).append(replace(figure, value=figure.peer))


def render(results: Results, rounds: int, directory: Path) -> str:
    """The whole table as Markdown, with the machine it was measured on."""
    lines = [
        f"{_machine()}; one `fdatasync` of 4 KiB takes {_flush(directory) * 1000:.2f} ms. "
        f"Median of {rounds} interleaved rounds.",
        "",
        "| | unit | mosquitto | tidegate | ratio | without uvloop | ratio | CPU: generator/broker |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    lines += [_row(name, brokers) for name, brokers in results.items()]
    lines += [
        "",
        "Ratio: tidegate / mosquitto, or the inverse where less is better; above 1 tidegate is better. "
        "`≥`: the load generator used its CPU up and the broker did not, it may do more.",
    ]
    return "\n".join(lines) + "\n"


def write(readme: Path, text: str) -> None:
    """Replace the last run in the README."""
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n{text}{END}{after}")


def _row(name: str, brokers: dict[str, list[Figure]]) -> str:
    figure = next(iter(brokers.values()))[0]
    values = [_median(brokers.get(column, [])) for column in COLUMNS]
    cells = [name, figure.unit, _value(brokers, COLUMNS[0])]
    for column, value in zip(COLUMNS[1:], values[1:], strict=True):
        cells += [_value(brokers, column), _ratio(value, values[0], figure.less_is_better)]
    cells.append(" · ".join(_cpu(brokers[column]) for column in COLUMNS if column in brokers).strip(" ·"))
    return f"| {' | '.join(cells)} |"


def _median(figures: list[Figure]) -> float | None:
    return statistics.median(figure.value for figure in figures) if figures else None


def _value(brokers: dict[str, list[Figure]], column: str) -> str:
    value = _median(brokers.get(column, []))
    if value is None:
        return ""
    own = statistics.median(figure.own_cpu for figure in brokers[column])
    theirs = statistics.median(figure.broker_cpu for figure in brokers[column])
    text = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return f"≥ {text}" if own > SATURATED > theirs else text


def _ratio(ours: float | None, theirs: float | None, less_is_better: bool) -> str:
    if not ours or not theirs:
        return ""
    return f"{theirs / ours if less_is_better else ours / theirs:.2f}"


def _cpu(figures: list[Figure]) -> str:
    own = statistics.median(figure.own_cpu for figure in figures)
    theirs = statistics.median(figure.broker_cpu for figure in figures)
    return f"{own:.0%}/{theirs:.0%}" if own else ""


def _machine() -> str:
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "Model")):
            model = line.partition(":")[2].strip()
            break
    return (
        f"{model}, {os.cpu_count()} CPUs, Linux {platform.release().split('-')[0]}, "
        f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"
    )


def _flush(directory: Path) -> float:
    """Seconds that the disk under the benchmark takes to make 4 KiB durable."""
    path = directory / f"tidegate-bench-flush-{os.getpid()}"
    took = []
    number = os.open(path, os.O_CREAT | os.O_WRONLY)
    try:
        for _ in range(100):
            began = time.perf_counter()
            os.write(number, bytes(4096))
            os.fdatasync(number)
            took.append(time.perf_counter() - began)
    finally:
        os.close(number)
        path.unlink()
    return statistics.median(took)
