"""What the commands of `tidegate` share: the options that say which gateway is meant, and how a command fails.

Invariant: a user's mistake is a sentence and an exit code, 1 (it could not be done) or 2 (it was asked for wrongly).
"""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

import click

from .config import Config, ConfigError, load
from .config_places import find_config

SINCE = ("%Y-%m-%d", "%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M:%S")
"""How a time is written on the command line."""


class _Place(click.Path):
    """A path that is not empty: a shell variable that is not set must not mean the directory one happens to be in."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        if value == "":
            self.fail("it is empty: give a path, or leave the option out for the default", parameter, context)
        return super().convert(value, parameter, context)


# Without a look at the rights: each command says itself, and better, what it could not read.
CONFIG = click.option("--config", "-c", "config_file", type=_Place(path_type=Path, readable=False), help="gateway.toml to use.")
DATA = click.option("--data", type=_Place(path_type=Path, file_okay=False, readable=False), help="Directory of the log.")


class Failure(click.ClickException):
    """One sentence for the user and an exit code: 1 it could not be done, 2 it was asked for wrongly."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self._code = code

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        return self._code

    def show(self, file: Any = None) -> None:
        for line in self.message.splitlines():
            click.echo(f"tidegate: {line}", err=True)


def load_config(config_file: Path | None, data: Path | None, listen: tuple[str, ...] = ()) -> Config:
    """The configuration that the options name. Raises Failure with every mistake."""
    try:
        return load(config_file or find_config(os.environ), data, listen)
    except ConfigError as error:
        raise Failure(str(error), 2) from None


def as_json_value(value: bytes) -> object:
    """Text where it is text, else as sqlite-utils writes bytes in JSON."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return {"$base64": True, "encoded": base64.b64encode(value).decode()}
