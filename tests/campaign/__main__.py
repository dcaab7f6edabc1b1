"""The proof campaign: every far end, every fault, under real traffic, compared row by row at the end.

    .venv/bin/python -m tests.campaign [--cuts 50] [--kills 10] [--rounds 2] [--far all] [--seed K]

For each far end real servers, the real gateway (broker and uplink child) and real MQTT clients run; then a sheet is printed.
The exit code is 1 if anything is missing or not explained; what failed keeps its directory, and its seed is printed.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

try:
    from .far_ends import FAR_ENDS, not_here
    from .sheet import table
    from .trial import Plan, Result, Trial
except ModuleNotFoundError as error:
    sys.exit(f"the campaign needs {error.name}: sh tests/all installs what it needs")


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__.partition("\n")[0])
    parser.add_argument("--cuts", type=int, default=50, help="counted cuts between a commit and its reply")
    parser.add_argument("--kills", type=int, default=10, help="of each of the gateway's two processes")
    parser.add_argument("--rounds", type=int, default=2, help="how often each fault of a far end is made")
    parser.add_argument("--far", choices=[*FAR_ENDS, "all"], default="all")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32), help="of the order, not of what meets it")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    results: dict[str, Result] = {}
    good = True
    for name in FAR_ENDS if options.far == "all" else [options.far]:
        if why := not_here(name):
            print(f"{name}: not run: {why}", flush=True)
            continue
        plan = Plan(options.cuts, options.kills, options.rounds)
        good &= _one(name, plan, options.seed, results)
    print(table(results))
    return 0 if good and results else 1


def _one(name: str, plan: Plan, seed: int, results: dict[str, Result]) -> bool:
    """One far end; its directory is kept if something is wrong."""
    directory = Path(tempfile.mkdtemp(prefix=f"campaign-{name}-"))
    began = time.monotonic()
    try:
        with FAR_ENDS[name](directory) as far:
            results[name] = Trial(far, directory / "gateway", random.Random(seed)).run(plan)
        mistakes: object = results[name].sheet.mistakes()
    except Exception:  # noqa: BLE001 - of whatever kind: the other far ends are tried all the same
        mistakes = traceback.format_exc()
    print(f"{name}: {mistakes or 'good'}, {time.monotonic() - began:.0f} s", flush=True)
    if mistakes:
        print(f"{name}: seed {seed}, kept in {directory}", flush=True)
        return False
    shutil.rmtree(directory)
    return True


if __name__ == "__main__":
    sys.exit(main())
