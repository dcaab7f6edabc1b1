"""Which far ends there are, and why one cannot be had on this machine."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.support.real_mysql import ROOT

from .far_end import FarEnd
from .redis_far_end import SingleRedis
from .redis_together import ClusterFarEnd, SentinelFarEnd
from .sql_far_end import MariaDbFarEnd, MySqlFarEnd, PostgresFarEnd

_KINDS: tuple[type[FarEnd], ...] = (SingleRedis, ClusterFarEnd, SentinelFarEnd, MariaDbFarEnd, MySqlFarEnd, PostgresFarEnd)
FAR_ENDS: dict[str, type[FarEnd]] = {kind.name: kind for kind in _KINDS}


def not_here(name: str) -> str:
    """Why this one cannot run here; empty if it can."""
    if name == "mysql":
        return "" if ROOT else "set TIDEGATE_MYSQL_ROOT to an unpacked MySQL (tests/support/real_mysql.py tells how)"
    if name == "mariadb":
        found = shutil.which("mariadbd", path="/usr/sbin:/usr/bin")
        return "" if found else "mariadb-server is not installed: apt-get install mariadb-server"
    if name == "pgsql":
        return (
            ""
            if any(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
            else "postgresql is not installed: apt-get install postgresql"
        )
    return "" if shutil.which("redis-server") else "redis-server is not installed: apt-get install redis-server"
