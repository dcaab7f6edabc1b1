"""Whether the gateway's own user can read its configuration, when root asks: what root can read says nothing about that.

Asked as that user (`test -r`), so that groups, access lists and every directory on the way count as the kernel counts them.

Invariant: nothing is found when who asks is not root, or the gateway runs as root.
"""

from __future__ import annotations

import grp
import os
import pwd
import re
import stat
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from .config import Beside
from .config_places import SYSTEM_CONF, USER

_NAMED = re.compile(r"\s*backend\.\S+\.(?:\w*password_file|\w*secret_access_key_file|cacertfile|certfile|keyfile)\s*=\s*(\S+)")
_ASK = 'flag=$1; shift; for file; do test "$flag" "$file" || printf "%s\\0" "$file"; done'


class Unreadable(NamedTuple):
    """A file that the gateway must read and cannot: what is so, and the command that changes it."""

    text: str
    advice: str


def unreadable(beside: Beside) -> Iterator[Unreadable]:
    """Of a gateway whose data belong to another user than root; without data yet, of the service."""
    user = _user(beside) if os.geteuid() == 0 else None
    if user is None:
        return
    files = [file for file in dict.fromkeys(_files(beside)) if file.exists()]
    for file in _refused(user, "-r", files):
        name, group = user.pw_name, grp.getgrgid(user.pw_gid).gr_name
        if closed := _refused(user, "-x", reversed(file.parents)):
            text, change = f"{name} may not look into {closed[0]}", f"chgrp {group} {closed[0]} && chmod g+rx {closed[0]}"
        else:
            text, change = f"it is {_owner(file)}", f"chgrp {group} {file} && chmod g+r {file}"
        yield Unreadable(f"{file}: {name}, as whom the gateway runs, cannot read it: {text}", change)


def _user(beside: Beside) -> pwd.struct_passwd | None:
    try:
        if not beside.data.exists():
            return pwd.getpwnam(USER) if beside.conf_dir == SYSTEM_CONF else None
        owner = beside.data.stat().st_uid
        return pwd.getpwuid(owner) if owner else None
    except KeyError:
        return None


def _files(beside: Beside) -> Iterator[Path]:
    if beside.file is not None:
        yield beside.file
    if beside.password_file is not None:
        yield beside.password_file
    for backend in beside.backends:
        conf = beside.conf_dir / f"emqx_backend_{backend}.conf"
        if conf.is_file():
            yield conf
            lines = conf.read_text(errors="replace").splitlines()
            yield from (beside.conf_dir / named[1] for line in lines if (named := _NAMED.match(line)))


def _refused(user: pwd.struct_passwd, flag: str, paths: Iterable[Path]) -> list[Path]:
    """Those of which `test` says no to this user."""
    groups = os.getgrouplist(user.pw_name, user.pw_gid)
    command = ["/bin/sh", "-c", _ASK, "ask", flag, *map(str, paths)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, check=True, cwd="/", extra_groups=groups, user=user.pw_uid, group=user.pw_gid
    )
    return [Path(os.fsdecode(name)) for name in done.stdout.split(b"\0") if name]


def _owner(file: Path) -> str:
    about = file.stat()
    try:
        names = f"{pwd.getpwuid(about.st_uid).pw_name}:{grp.getgrgid(about.st_gid).gr_name}"
    except KeyError:
        names = f"{about.st_uid}:{about.st_gid}"
    return f"{names}, mode {stat.S_IMODE(about.st_mode):o}"
