"""Run the simulation for as long as you like: `python -m tests.simulation --minutes 60`, or one seed: `--seed 154`.

A failing seed is printed with its steps; the same command repeats it exactly. The exit code is the number of failures, at
most 100. `--plants` shows instead how many steps each planted bug survives.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence

from .asking_plants import ASKING_PLANTS
from .campaign import KINDS_OF_SIMULATION, Simulated, campaign, run_seed, survival
from .more_plants import MORE_PLANTS
from .plants import PLANTS

AT_MOST = 200_000
"""Steps after which a planted bug counts as not found."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, help="only this one")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="the first seed of the campaign")
    parser.add_argument("--kind", choices=[*KINDS_OF_SIMULATION, *PLANTED], default="all", help="which simulation")
    parser.add_argument("--plants", type=int, metavar="SEEDS", help="the survival of each planted bug, over so many seeds")
    options = parser.parse_args(arguments)
    if options.plants:
        return _show_survival(options.plants, options.steps)
    kinds = KINDS_OF_SIMULATION.get(options.kind) or (PLANTED[options.kind],)
    if options.seed is not None:
        for kind in kinds:
            print(f"{kind.__name__}: {run_seed(options.seed, options.steps, kind)}")
        return 0
    sheet = campaign(options.minutes * 60, options.steps, options.first, kinds, lambda text: print(text, file=sys.stderr))
    rate = sheet.steps / max(1e-9, sheet.seconds)
    print(f"{sheet.seeds} seeds, {sheet.steps} steps, {rate:.0f} a second, {sheet.failed} failed")
    return min(100, sheet.failed)


PLANTED: dict[str, type[Simulated]] = {plant.__name__: plant for plant in (*PLANTS, *MORE_PLANTS, *ASKING_PLANTS)}


def _show_survival(seeds: int, steps: int) -> int:
    """One row for each planted bug; the exit code is how many were not found from every seed."""
    missed = 0
    print("| planted | steps it survived: median | least | most |\n|---|---|---|---|")
    for plant in PLANTED.values():
        found = [survival(plant, seed, steps, AT_MOST) for seed in range(seeds)]
        counted = sorted(AT_MOST if one is None else one for one in found)
        missed += None in found
        median, most = int(statistics.median(counted)), f"over {AT_MOST:,}" if None in found else f"{counted[-1]:,}"
        print(f"| {(plant.__doc__ or plant.__name__).rstrip('.')} | {median:,} | {counted[0]:,} | {most} |", flush=True)
    return missed


if __name__ == "__main__":
    sys.exit(main())
