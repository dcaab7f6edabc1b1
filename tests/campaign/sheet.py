"""The sheet of a campaign: far end by fault, how often each was made, and the balance below."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from .balance import Balance
from .far_end import FAILED_OVER, FAULTS, MOVED
from .far_ends import FAR_ENDS
from .trial import BLIND, BROKER, CHILD, CUT, Result


def table(results: Mapping[str, Result]) -> str:
    """Markdown; a column for each far end. What cannot be made somewhere has a dash, and the reason below."""
    if not results:
        return ""
    lines = [_line("times done", *results), _line("---", *["---:"] * len(results))]
    for event in (CUT, BLIND, BROKER, CHILD, *FAULTS, MOVED, FAILED_OVER):
        lines.append(_line(event, *[_times(name, event, result) for name, result in results.items()]))
    lines.append(_line("**the balance**", *[""] * len(results)))
    for field in fields(Balance):
        figures = [f"{getattr(result.sheet, field.name):,}" for result in results.values()]
        lines.append(_line(field.name.replace("_", " "), *figures))
    reasons = {
        f"{event}, {name}: {FAR_ENDS[name].impossible[event]}" for name in results for event in FAR_ENDS[name].impossible
    }
    return "\n".join([*lines, "", *[f"- {reason}" for reason in sorted(reasons)]])


def _times(name: str, event: str, result: Result) -> str:
    elsewhere = event in (MOVED, FAILED_OVER) and not result.counts[event]
    return "–" if elsewhere or event in FAR_ENDS[name].impossible else str(result.counts[event])


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
