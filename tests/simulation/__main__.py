"""Run the simulation for as long as you like: `python -m tests.simulation --minutes 60`, or one seed: `--seed 154`.

A failing seed is printed with its steps; the same command repeats it exactly. The exit code is the number of failures, at
most 100.
"""

from __future__ import annotations

import argparse
import sys

from .campaign import campaign, run_seed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, help="only this one")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="the first seed of the campaign")
    options = parser.parse_args()
    if options.seed is not None:
        run_seed(options.seed, options.steps)
        return 0
    sheet = campaign(options.minutes * 60, options.steps, options.first, lambda text: print(text, file=sys.stderr))
    rate = sheet.steps / max(1e-9, sheet.seconds)
    print(f"{sheet.seeds} seeds, {sheet.steps} steps, {rate:.0f} a second, {sheet.failed} failed")
    return min(100, sheet.failed)


if __name__ == "__main__":
    sys.exit(main())
