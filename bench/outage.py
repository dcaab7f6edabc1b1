"""Three days without a far end at 20 messages/s, three priorities, a budget of 64 MiB: what is lost, and is it named?

    .venv/bin/python bench/outage.py [--hours H] [--budget MIB] [--seed N]

The broker's core with the real store and an injected clock (the outage takes minutes), then a real redis-server and the
uplink's worker. The exit code is 1 if the budget was exceeded or a loss is not named by a gap record.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.faults.outage import RATE, Outage
from tests.support.redis_server import RedisServer


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hours", type=float, default=72)
    parser.add_argument("--budget", type=int, default=64, help="MiB")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tidegate-outage-") as directory:
        outage = Outage(Path(directory), int(options.hours * 3600) * RATE, options.budget << 20, options.seed)
        try:
            outage.publish()
            with RedisServer(Path(directory)) as redis:
                outage.come_back(redis)
        finally:
            outage.close()
    sheet = outage.sheet
    print(sheet.text())
    named = sheet.counted_by_records == sheet.dropped.total() and not sheet.unnamed and not sheet.named_wrongly
    return 0 if named and sheet.most_on_disk <= sheet.budget and not sheet.dropped_too_high else 1


if __name__ == "__main__":
    sys.exit(main())
