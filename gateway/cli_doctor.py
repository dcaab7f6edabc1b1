"""The commands that look: `tidegate status` in its forms, and `tidegate doctor`. They change nothing.

Nothing here is imported before its command needs it; the terminal's table (rich) only when the output is a terminal.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from .cli_parts import CONFIG, DATA, Failure, load_config


@click.command()
@CONFIG
@DATA
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON (with --watch: a line each time).")
@click.option("--refused", is_flag=True, help="Show instead who was refused lately, and why.")
@click.option("--watch", is_flag=True, help="Show it again and again, until Ctrl-C.")
@click.option("--interval", type=click.FloatRange(0.1, 3600), default=2.0, show_default=True, help="Seconds, for --watch.")
def status(config_file: Path | None, data: Path | None, as_json: bool, refused: bool, watch: bool, interval: float) -> None:
    """Show clients, what waits for each pool, the store and what was dropped."""
    from .control import NotRunning, ask
    from .status import render, render_refused

    socket = load_config(config_file, data).data / "control.sock"

    def look() -> str:
        answer = ask(socket, {"command": "refused" if refused else "status"})
        if as_json:
            return json.dumps(answer, indent=None if watch else 2)
        return render_refused(answer) if refused else render(answer)

    def look_again() -> str:
        """A gateway that is stopped and started meanwhile is what one watches for."""
        try:
            return look()
        except NotRunning as error:
            return json.dumps({"error": str(error)}) if as_json else f"tidegate: {error}"

    try:
        first = look()
    except NotRunning as error:
        raise Failure(str(error)) from None
    if not watch:
        click.echo(first)
        return
    from .watch import watch_in_blocks, watch_in_place

    if sys.stdout.isatty() and not as_json:
        watch_in_place(first, look_again, interval)
    else:
        watch_in_blocks(first, look_again, interval, "\n" if as_json else "\n\n")


@click.command()
@CONFIG
@DATA
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(config_file: Path | None, data: Path | None, as_json: bool) -> None:
    """Look at disk, clock, rights, ports, far ends and refused clients; say what to do. Ends with 1 if there is a problem."""
    from .config import ConfigError, load
    from .config_places import find_config
    from .doctor import PROBLEM, Finding, examine, examine_files, examine_machine, render

    try:
        config = load(config_file or find_config(os.environ), data)
        beside, findings = config.beside, examine(config)
    except ConfigError as error:
        advice = "mend it, then run this again: the rest needs it"
        findings = [Finding(PROBLEM, "configuration", str(mistake), advice) for mistake in error.mistakes] + examine_machine()
        beside = error.beside
    advice = "mend it: until then its pools wait; tidegate check lists everything"
    findings += [Finding(PROBLEM, "rules", mistake, advice) for mistake in _rule_mistakes(beside.conf_dir, beside.backends)]
    findings += examine_files(beside)
    if as_json:
        answer: list[dict[str, Any]] = [finding._asdict() for finding in findings]
        click.echo(json.dumps({"findings": answer}, indent=2))
    else:
        click.echo(render(findings))
    if any(finding.level == PROBLEM for finding in findings):
        sys.exit(1)


def _rule_mistakes(folder: Path, backends: Sequence[str]) -> list[str]:
    from tidegate.uplink.rule import load_all

    return [str(mistake) for file in load_all(folder, backends) for mistake in file.mistakes]
