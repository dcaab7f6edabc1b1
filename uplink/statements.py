"""The `${name}`s of a user's SQL or CQL: each becomes one bound value, so a quote in a payload can never end a text.

That is why a placeholder inside quotes is a fault: there it would be text, or, pasted in, a hole.

Invariant: a statement that passed the check names only what its event offers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from .commands import TemplateFault

_PARTS = re.compile(
    r"(?P<quoted>'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`[^`]*`)|(?P<comment>--[^\n]*|/\*.*?\*/)|\$\{(?P<name>[^}]*)\}|(?P<open>\$\{)",
    re.DOTALL,
)


def check_statement(text: str, known: Sequence[str]) -> None:
    """Raises TemplateFault when a placeholder is not one of `known`, is not closed, or stands inside quotes."""
    for part in _PARTS.finditer(text):
        if part["open"]:
            raise TemplateFault("a placeholder has no closing brace")
        if part["quoted"] and "${" in part["quoted"]:
            raise TemplateFault("a placeholder stands inside quotes: write it without them, it is bound as a value")
        if part["name"] is not None and part["name"] not in known:
            raise TemplateFault(f"unknown placeholder ${{{part['name']}}}", unknown=part["name"])
