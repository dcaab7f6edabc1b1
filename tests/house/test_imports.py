"""Who may import whom: the table of the design, checked on the source of every module.

Read with `ast`, imports inside functions included, so nothing is imported to find out. The table binds imports inside the
project and, for the pure parts, what of the standard library would make them impure.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("store", "gateway", "uplink", "device", "conf")

MAY_IMPORT = {
    "store": {"store"},
    "gateway.mqtt": {"gateway.mqtt", "store.topic"},
    "gateway": {"gateway", "gateway.mqtt", "store"},
    "uplink": {"uplink", "store"},
    "device": {"device", "store.device"},
    "conf": {"conf"},
}
"""Package -> packages (or single modules) of the project that it may import."""
TOGETHER = {"gateway/app.py", "gateway/cli.py"}
"""Where the parts are put together and shown as one: these import everything."""
IMPURE = {"asyncio", "socket", "time", "sqlite3", "threading", "random", "select", "selectors", "os"}
"""Not in gateway/mqtt, which is bytes in and events out."""
DRIVERS = {"redis": ("uplink/to_redis.py", "uplink/redis_"), "sqlite_utils": ("store/",)}
"""Library of a far end -> the only places that may import it."""
LIBRARIES = {"store": {"sqlite_utils"}, "gateway.mqtt": set[str](), "conf": set[str]()}
"""Packages that may use only these besides the standard library."""


def modules() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def package_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return ".".join(parts[:2]) if len(parts) > 2 else parts[0]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import; ours without the leading `tidegate.`, relative ones resolved."""
    here = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(here[: len(here) - node.level + 1]) if node.level else []
            module = node.module.split(".") if node.module else []
            prefix = ["tidegate", *base] if node.level else []
            full = [*prefix, *module]
            if (node.level and not module) or full == ["tidegate"]:
                yield from ((node.lineno, ".".join([*full, alias.name])) for alias in node.names)
            else:
                names = [alias.name for alias in node.names if _is_module(full, alias.name)]
                yield from ((node.lineno, ".".join([*full, name])) for name in names or [""])


def _is_module(parts: list[str], name: str) -> bool:
    folder = ROOT.joinpath(*parts[1:])
    return parts[0] == "tidegate" and ((folder / f"{name}.py").exists() or (folder / name / "__init__.py").exists())


def fault(path: Path, name: str) -> str | None:
    """What is wrong with this import there, if anything."""
    package, place = package_of(path), path.relative_to(ROOT).as_posix()
    top, _, ours = name.strip(".").partition(".")
    if top == "tidegate":
        allowed = MAY_IMPORT[package]
        good = place in TOGETHER or any(ours == one or ours.startswith(f"{one}.") for one in allowed)
        if package == "gateway.mqtt" and ours == "gateway":
            good = False
        return None if good else f"{package} may import {', '.join(sorted(allowed))}"
    if package == "gateway.mqtt" and top in IMPURE:
        return "gateway.mqtt is pure"
    if top in sys.stdlib_module_names:
        return None
    if top in DRIVERS and not place.startswith(DRIVERS[top]) and package in ("uplink", "store"):
        return f"{top} belongs into {' or '.join(DRIVERS[top])}"
    if package in LIBRARIES and top not in LIBRARIES[package]:
        return f"{package} uses no library but {', '.join(LIBRARIES[package]) or 'the standard one'}"
    return None


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_module_imports_only_what_the_table_allows(path: Path) -> None:
    faults = [f"line {line}: {name}: {text}" for line, name in imports(path) if (text := fault(path, name))]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("store/log.py", "tidegate.gateway.broker"),
        ("store/log.py", "redis"),
        ("uplink/worker.py", "tidegate.gateway.config"),
        ("uplink/worker.py", "redis"),
        ("gateway/broker.py", "tidegate.uplink.rule"),
        ("gateway/mqtt/wire.py", "asyncio"),
        ("gateway/mqtt/wire.py", "tidegate.gateway.session"),
        ("gateway/mqtt/wire.py", "tidegate.store.log"),
    ],
)
def test_the_table_forbids(place: str, name: str) -> None:
    assert fault(ROOT / place, name) is not None


def test_every_module_begins_with_what_it_is() -> None:
    silent = [
        path.relative_to(ROOT).as_posix()
        for path in modules()
        if path.read_text().strip() and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not silent, f"without a docstring: {', '.join(silent)}"
