"""What the processes say: one format for people, one for programs, and repetitions held back and counted."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from tidegate.store.report import INFO, MAX_SUBJECTS, WARNING, Event, Often, printable

ROOT = Path(__file__).parents[2]
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
SAY = """
import os, sys
from tidegate.store.report import *
report = Report(*sys.argv[1:])
report("started", "it begins", address="127.0.0.1:1883", empty="", quoted='say "x"', both='it\\'s "x"', steer="a\\x1b[2J\\nb")
report("broken", "it broke", WARNING, count=3, path="/a b")
report("dead", "it died", ERROR)
report.close()
"""


def said(*options: str, environment: dict[str, str] | None = None, program: str = SAY) -> list[str]:
    command = [sys.executable, "-c", program, *options]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=True, env=os.environ | (environment or {}))
    return done.stderr.splitlines()


def test_lines_for_people() -> None:
    lines = [line.partition(" ") for line in said()]
    assert all(re.fullmatch(TIME, time) for time, _, _ in lines)
    assert [line for _, _, line in lines] == [
        r"""info started: it begins address=127.0.0.1:1883 empty="" quoted='say "x"' both="it's \"x\"" steer=a\x1b[2J\nb""",
        'warning broken: it broke count=3 path="/a b"',
        "error dead: it died",
    ]


def test_lines_for_programs() -> None:
    first, second, third = map(json.loads, said("json"))
    assert re.fullmatch(TIME, first.pop("time"))
    assert first == {
        "level": "info", "event": "started", "text": "it begins", "address": "127.0.0.1:1883", "empty": "", "quoted": 'say "x"',
        "both": 'it\'s "x"', "steer": "a\x1b[2J\nb",
    }  # fmt: skip
    assert (second["level"], second["event"], second["count"], second["path"]) == ("warning", "broken", 3, "/a b")
    assert third["level"] == "error"


@pytest.mark.parametrize(("level", "events"), [("info", 3), ("warning", 2), ("error", 1)])
def test_the_least_that_is_said(level: str, events: int) -> None:
    assert len(said("text", level)) == events


@pytest.mark.parametrize("style", ["text", "json"])
def test_the_journal_keeps_the_time_and_is_told_the_priority(style: str) -> None:
    """Only if standard error is what systemd connected: the variable is inherited by everything below a service."""
    program = "import os; s = os.fstat(2); os.environ['JOURNAL_STREAM'] = f'{s.st_dev}:{s.st_ino}'\n" + SAY
    lines = said(style, program=program)
    assert [line[:3] for line in lines] == ["<6>", "<4>", "<3>"]
    assert lines[1][3:].startswith('{"level": "warning", ' if style == "json" else "broken: it broke")
    assert all(re.match(TIME, line) for line in said(environment={"JOURNAL_STREAM": "8:1234"}))


def test_threads_do_not_disturb_each_other() -> None:
    program = f"import threading\n{SAY.replace('report.close()', '')}" + (
        "threads = [threading.Thread(target=lambda: [report('i', 'x' * 1000) for _ in range(200)]) for _ in range(5)]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
        "report.close()\n"
    )
    lines = said(program=program)
    assert len(lines) == 3 + 1000
    assert {line.partition(" ")[2] for line in lines[3:]} == {"info i: " + "x" * 1000}


# -- repetitions -----------------------------------------------------------------------------------------------------


def _event(number: int = 0) -> Event:
    return Event(WARNING, "broken", "it broke", {"number": number})


def _numbers(events: Iterable[Event]) -> list[tuple[object, object]]:
    return [(event.fields["number"], event.fields.get("repeated")) for event in events]


def test_a_failure_each_second_is_said_twice_a_minute_and_counted() -> None:
    often = Often()
    heard = [
        (second, number, repeated)
        for second in range(180)
        for number, repeated in _numbers([*often.over(second), *often.admit(("broken", ""), _event(second), second)])
    ]
    assert heard[:5] == [(0, 0, None), (1, 1, None), (60, 59, 58), (60, 60, None), (61, 61, None)]
    assert heard[5:] == [(120, 119, 58), (120, 120, None), (121, 121, None)]


def test_what_was_held_back_is_said_when_its_minute_is_over_though_nothing_comes_any_more() -> None:
    often = Often()
    for second in range(5):
        list(often.admit(("broken", ""), _event(second), second))
    assert often.holds
    assert _numbers(often.over(59)) == []
    assert _numbers(often.over(60)) == [(4, 3)]
    assert not often.holds
    assert _numbers(often.over(1000)) == []


def test_subjects_do_not_hide_each_other_and_there_is_a_bound_on_them() -> None:
    often = Often()
    counted = 0
    for number in range(10 * MAX_SUBJECTS):
        for _ in range(3):
            for event in often.admit(("broken", str(number)), _event(number), number / 1000):
                counted += int(str(event.fields.get("repeated", 1)))
    assert len(often._subjects) == MAX_SUBJECTS
    counted += sum(int(str(event.fields["repeated"])) for event in often.over(1e9))
    assert counted == 30 * MAX_SUBJECTS, "an event was neither said nor counted"


def test_an_info_that_is_not_about_anything_is_always_said() -> None:
    program = SAY.replace(
        "report.close()", "for _ in range(9): report('again', 'x'); report('often', 'y', INFO, 'z')\nreport.close()"
    )
    lines = [line.split()[2] for line in said(program=program)]
    assert (lines.count("again:"), lines.count("often:")) == (9, 3)
    assert INFO > WARNING


def test_text_that_would_steer_a_terminal_is_shown_as_text() -> None:
    assert printable("a\x1b[2J\r\n\u202eb\x9bé") == "a\\x1b[2J\\r\\n\\u202eb\\x9bé"


# -- the promise -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["text", "json"])
def test_what_strangers_send_does_not_make_lines_of_65535_characters(style: str) -> None:
    program = SAY.replace('path="/a b"', 'client="x" * 65_535, filter="y" * 1_000')
    line = said(style, program=program)[1]
    assert "x" * 1_000 + "…" in line and "y" * 1_000 in line and len(line) < 2_500


def test_every_event_stands_in_the_documentation_and_no_other() -> None:
    source = "\n".join(file.read_text() for package in ("gateway", "store", "uplink") for file in (ROOT / package).glob("*.py"))
    calls = re.findall(r'(?:report|_report|_say|_say_rarely|say)\(\s*"([a-z_]+)"', source)
    events = {*calls, "lines_missing"}
    section = (ROOT / "docs" / "operating.md").read_text().partition("## The log")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `([a-z_]+)` \|", section, re.MULTILINE)) == events
