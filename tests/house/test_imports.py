"""Who may import whom: the table that keeps the gateway two pure translators with a log between them.

Read from the source, so an import inside a function counts as well.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("store", "gateway", "uplink", "device", "firmware")
FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))

WIRING = {
    "gateway/app.py",
    "gateway/cli.py",
    "gateway/cli_dead.py",
    "gateway/cli_doctor.py",
    "gateway/cli_rules.py",
    "gateway/cli_uplink.py",
    "gateway/far_ends.py",
}
"""Where everything is put together: they may import every package."""

OURS = {
    "store": ("tidegate.store",),
    "gateway/mqtt": ("tidegate.gateway.mqtt", "tidegate.store.topic"),
    "gateway": ("tidegate.gateway", "tidegate.store"),
    "uplink": ("tidegate.uplink", "tidegate.store"),
    "device": ("tidegate.device", "tidegate.store.device"),
    "firmware": (),
}

LIBRARIES = {
    "store": {"sqlite_utils"},
    "gateway/app.py": {"uvloop"},
    "gateway/cli.py": {"click"},
    "gateway/cli_dead.py": {"click"},
    "gateway/cli_doctor.py": {"click"},
    "gateway/cli_parts.py": {"click"},
    "gateway/cli_rules.py": {"click"},
    "gateway/cli_store.py": {"click"},
    "gateway/cli_sub.py": {"click"},
    "gateway/cli_uplink.py": {"click"},
    "gateway/demo.py": {"aiomqtt"},
    "gateway/demo_far_end.py": {"fakeredis", "redis"},
    "gateway/demo_screen.py": {"rich"},
    "gateway/watch.py": {"rich"},
    "gateway/web.py": {"microdot"},
    "uplink/redis_answers.py": {"redis"},
    "uplink/redis_asking.py": {"redis"},
    "uplink/redis_channel.py": {"redis"},
    "uplink/redis_cluster.py": {"redis"},
    "uplink/redis_slots.py": {"redis"},
    "uplink/redis_wire.py": {"redis"},
    "uplink/mysql_session.py": {"pymysql"},
    "uplink/pgsql_copy.py": {"psycopg"},
    "uplink/pgsql_session.py": {"psycopg"},
    "uplink/to_mysql.py": {"pymysql"},
    "uplink/to_pgsql.py": {"psycopg"},
    "uplink/to_redis.py": {"redis"},
}
"""A driver only in its backend's own files."""

IMPURE = {"asyncio", "socket", "time", "sqlite3"}
HEAVY = (
    *("redis", "psycopg", "pymysql", "rich", "aiomqtt", "sqlite_utils", "fakeredis", "microdot"),
    *(
        "tidegate.gateway.web",
        "tidegate.gateway.doctor",
        "tidegate.uplink.child",
        "tidegate.gateway.demo",
        "tidegate.store.export",
    ),
    *("tidegate.store.salvage", "tidegate.store.damaged"),
)


def area(name: str) -> str:
    """The row of the table for a file."""
    return "gateway/mqtt" if name.startswith("gateway/mqtt/") else name.partition("/")[0]


def imports(file: Path) -> Iterator[str]:
    """Every module the file imports, with its full name; `from x import y` counts as x.y when y is a module of ours."""
    package = ["tidegate", *file.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
            yield from (name if is_module(name) else module for name in names)


def is_module(name: str) -> bool:
    """Whether a module of the project has this name."""
    path = ROOT.joinpath(*name.split(".")[1:])
    return name.startswith("tidegate.") and (path.with_suffix(".py").exists() or (path / "__init__.py").exists())


def within(module: str, allowed: tuple[str, ...]) -> bool:
    """Whether the module is one of these or inside one."""
    return any(module == name or module.startswith(f"{name}.") for name in allowed)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_only_what_the_table_allows(file: Path) -> None:
    name = str(file.relative_to(ROOT))
    row = area(name)
    ours = ("tidegate",) if name in WIRING else OURS[row]
    libraries = LIBRARIES.get(row, set()) | LIBRARIES.get(name, set())
    for module in imports(file):
        top = module.partition(".")[0]
        if top == "tidegate":
            # The bare package `tidegate.gateway` holds the version only.
            assert within(module, ours), f"{name} imports {module}"
        elif row == "gateway/mqtt":
            assert top not in IMPURE, f"{name} is pure, but imports {module}"
            assert top in sys.stdlib_module_names, f"{name} imports {module}"
        elif row != "firmware":
            assert top in sys.stdlib_module_names or top in libraries, f"{name} imports {module}"


def test_the_table_names_only_files_that_exist() -> None:
    named = WIRING | {name for name in LIBRARIES if name.endswith(".py")}
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_a_wrong_import_would_be_seen() -> None:
    assert "tidegate.uplink.progress" in set(imports(ROOT / "gateway" / "app.py"))
    assert not within("tidegate.uplink.progress", OURS["gateway"])
    assert not within("tidegate.store.log", OURS["gateway/mqtt"])


def test_the_broker_starts_without_heavy_modules() -> None:
    program = "import sys, tidegate.gateway.app, tidegate.gateway.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert [name for name in HEAVY if name in loaded] == []
