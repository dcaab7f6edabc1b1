"""What the README says is so: its commands exist, its examples load, its links lead somewhere, and command one works from a
wheel in an environment of its own.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import click
import pytest
from tidegate.gateway import __version__
from tidegate.gateway.cli import main as cli
from tidegate.gateway.config import load
from tidegate.uplink.rule import load as load_rules

from tests.support.ports import free_port

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("*/README.md")])
SOURCES = ("gateway", "store", "uplink", "conf", "device", "firmware", "pyproject.toml", "README.md", "LICENSE")


def blocks(language: str) -> list[str]:
    """The README's fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def test_the_first_command_makes_an_environment_and_runs_the_demo() -> None:
    apt, venv, pip, demo = (part.strip() for part in blocks("sh")[0].split("&&"))
    assert apt == "sudo apt install -y python3-venv"
    assert venv == "python3 -m venv .venv"
    extras = re.fullmatch(r"\.venv/bin/pip install '\.\[([\w,]+)\]'", pip)
    assert extras
    assert set(extras[1].split(",")) <= set(project()["optional-dependencies"])
    assert demo == ".venv/bin/tidegate demo"


def test_the_second_command_is_what_the_build_runs() -> None:
    (command,) = blocks("sh")[1].splitlines()
    assert command == "sh tests/all"
    assert command in (ROOT / ".ci" / "run").read_text()
    script = (ROOT / "tests" / "all").read_text()
    for step in ('ruff" check', 'ruff" format --check', 'mypy" --strict -p', 'mypy" --strict bench tests', "-m pytest"):
        assert step in script
    assert all(f"-p tidegate.{package}" in script for package in ("gateway", "store", "uplink", "conf"))


@pytest.mark.parametrize(
    "line", [line for block in blocks("sh") for line in block.splitlines() if re.search(r"/tidegate ", line)]
)
def test_a_command_of_the_readme_exists(line: str) -> None:
    words = shlex.split(line.split("&&")[-1], comments=True)
    words = words[next(index for index, word in enumerate(words) if word.endswith("/tidegate")) + 1 :]
    command: click.Command = cli
    while isinstance(command, click.Group):
        name = words.pop(0)
        assert name in command.commands, line
        command = command.commands[name]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert [word for word in words if word.startswith("-") and word not in known] == []


def test_the_toml_examples_are_configuration(tmp_path: Path) -> None:
    whole = "\n".join(blocks("toml"))
    (tmp_path / "gateway.toml").write_text(whole)
    (tmp_path / "passwd").write_text("")
    config = load(tmp_path / "gateway.toml", tmp_path, (), {})
    assert config.backends == ("sqlite", "redis")
    assert [(listener.host, listener.allow_anonymous) for listener in config.listeners] == [("0.0.0.0", False)]


def test_the_rule_example_has_no_mistake(tmp_path: Path) -> None:
    (example,) = blocks("conf")
    (tmp_path / "emqx_backend_redis.conf").write_text(example)
    (tmp_path / "redis.password").write_text("secret\n")
    file = load_rules(tmp_path / "emqx_backend_redis.conf", "redis")
    assert file.mistakes == ()
    assert len(file.rules) == 2


@pytest.mark.parametrize("program", ["tests/campaign/__main__.py", "bench/run.py"])
def test_what_needs_more_than_the_first_command_says_so(program: str) -> None:
    name = "run_module('tests.campaign'" if "campaign" in program else f"run_path({program!r}"
    without = (
        f"import sys, runpy; sys.modules['psycopg'] = None; sys.path[:0] = ['bench', '.']; runpy.{name}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", without], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1
    assert re.fullmatch(r"the \w+ needs? psycopg: sh tests/all installs what \w+ needs?\n", done.stderr), done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, so that nothing is left in the clone."""
    copy = tmp_path_factory.mktemp("clone")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(copy / "dist"), str(copy)], check=True)
    (built,) = (copy / "dist").glob("tidegate-*.whl")
    return built


def test_the_wheel_holds_every_module_the_configuration_and_the_types(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in ("gateway", "store", "uplink", "conf"):
        assert f"tidegate/{package}/py.typed" in names
        for file in (ROOT / package).rglob("*"):
            if file.suffix in (".py", ".toml", ".conf"):
                assert f"tidegate/{file.relative_to(ROOT)}" in names
    foreign = {name.partition("/")[0] for name in names if not name.startswith("tidegate")}
    assert foreign == set(), "only the namespace tidegate lands in site-packages"


def test_the_first_command_works_in_a_fresh_environment(wheel: Path, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    pip = [str(venv / "bin" / "pip"), "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", f"{wheel}[demo,fast]"], check=True)
    fresh = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    tidegate = str(venv / "bin" / "tidegate")
    version = subprocess.run([tidegate, "version"], capture_output=True, text=True, check=True, env=fresh).stdout
    assert version == f"tidegate {__version__}\n"
    demo = [tidegate, "demo", "--seconds", "4", "--port", str(free_port())]
    done = subprocess.run(demo, capture_output=True, text=True, timeout=120, env=fresh)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing is missing" in done.stdout
