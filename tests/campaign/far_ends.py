"""Which far ends there are, and why one cannot be had on this machine."""

from __future__ import annotations

import shutil

from .far_end import FarEnd
from .redis_far_end import SingleRedis

FAR_ENDS: dict[str, type[FarEnd]] = {"redis": SingleRedis}


def not_here(name: str) -> str:
    """Why this one cannot run here; empty if it can."""
    if not shutil.which("redis-server"):
        return "redis-server is not installed: apt-get install redis-server"
    return ""
