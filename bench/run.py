"""Measure the gateway against a mosquitto started in the same run, and print one table with ratios.

    .venv/bin/python bench/run.py [--quick] [--only NAME]... [--rounds N] [--write] [--peer-only]

Rules: every round runs each scenario on every broker in turn, so that a machine that grows slower hurts all
alike; each broker starts fresh, with an empty directory, for each measurement. The directory must lie on a
real disk: on a tmpfs nothing is durable and nothing is "written".

Invariant: a figure appears only if everything it counts was checked; anything else ends the run with a
failure.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

try:
    import brokers
    import table
    from load import WrongAnswer
    from scenarios import SCENARIOS, Figure, Scenario

    from tests.uplink.sql_rig import SERVERS, settings, tables
except ModuleNotFoundError as error:
    sys.exit(f"the benchmarks need {error.name}: sh tests/all installs what they need")

README = Path(__file__).with_name("README.md")
QUICK = 10


def main() -> int:
    """The command; 0 when everything was measured and right."""
    options = _options()
    brokers.allow_many_sockets()
    results: table.Results = {}
    chosen = [one for one in SCENARIOS if not options.only or one.name in options.only]
    try:
        for number in range(options.rounds):
            for scenario in chosen:
                _measure(results, scenario, options, f"{number + 1}/{options.rounds}")
    except (brokers.BrokerError, WrongAnswer, OSError) as error:
        print(f"benchmark failed: {error}", file=sys.stderr)
        return 1
    text = table.render(results, options.rounds, options.directory)
    print(text)
    if options.write:
        table.write(README, text)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one round, a tenth of the messages")
    names = [scenario.name for scenario in SCENARIOS]
    parser.add_argument("--only", action="append", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--rounds", type=int, help="default 5, with --quick 1")
    parser.add_argument("--write", action="store_true", help="put the table into bench/README.md")
    parser.add_argument("--peer-only", action="store_true", help="mosquitto alone")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="on a real disk")
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 5)
    return options


def _measure(results: table.Results, scenario: Scenario, options: argparse.Namespace, label: str) -> None:
    with ExitStack() as stack:
        far_end = _far_end(scenario, stack)
        targets: list[brokers.Target] = [] if scenario.alone else [brokers.Mosquitto()]
        if not options.peer_only:
            targets += [brokers.Tidegate(True, far_end), brokers.Tidegate(False, far_end)]
        for target in targets:
            with brokers.Broker(target, options.directory) as broker:
                figures = scenario.measure(broker, scenario.messages // (QUICK if options.quick else 1))
            table.add(results, target.name, figures)
            for figure in figures:
                _tell(label, target.name, figure)


def _far_end(scenario: Scenario, stack: ExitStack) -> brokers.FarEnd | None:
    if scenario.uplink == "up":
        return brokers.FarEnd("redis", stack.enter_context(brokers.redis()))
    if scenario.uplink in SERVERS:
        server = stack.enter_context(SERVERS[scenario.uplink]())
        tables(server)
        lines = "".join(f"backend.{server.backend}.pool1.{line}\n" for line in settings(server).splitlines())
        return brokers.FarEnd(server.backend, server.port, lines, server)
    return brokers.FarEnd("redis", brokers.free_port()) if scenario.uplink == "down" else None


def _tell(label: str, broker: str, figure: Figure) -> None:
    print(f"{label} {broker}: {figure.name}: {figure.value:,.3f} {figure.unit}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
