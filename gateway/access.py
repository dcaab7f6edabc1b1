"""Who may connect: the password file in mosquitto's format, and the listeners that let anybody in. The only part that refuses.

A line is `user:$7$iterations$salt$hash` (PBKDF2-HMAC-SHA512, base64) or `user:$6$salt$hash` (one SHA-512 of password and
salt), as mosquitto_passwd writes them. An unknown user costs as much time as a wrong password.

Invariant: a password file with a mistake is never half in force: all of it is loaded, or what was loaded before stays.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import errno
import grp
import hashlib
import hmac
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

ITERATIONS = 1000
"""Of what we write; a Raspberry Pi verifies it in about 2 ms. mosquitto 2.0 writes 101 and reads any."""
MAX_ITERATIONS = 1_000_000
SALT_BYTES = 12
OPENED = 'set bind = "0.0.0.0:1883" under [[listener]] in gateway.toml, and restart'
"""The last step of letting devices in."""


NO_NAME, UNKNOWN, WRONG = "no user name", "unknown user", "wrong password"
"""Why somebody is not let in, for the owner of the gateway. The client never learns which."""


class PasswordFileError(Exception):
    """The file cannot be used; the text names file and line."""


class ListenerRule(Protocol):
    """What is needed of a listener."""

    @property
    def allow_anonymous(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Secret:
    """One user's line, taken apart. `iterations` 0: the older `$6$` form."""

    iterations: int
    salt: bytes
    digest: bytes

    def matches(self, password: bytes) -> bool:
        if self.iterations:
            found = hashlib.pbkdf2_hmac("sha512", password, self.salt, self.iterations, len(self.digest))
        else:
            found = hashlib.sha512(password + self.salt).digest()
        return hmac.compare_digest(found, self.digest)


_NOBODY = Secret(ITERATIONS, bytes(SALT_BYTES), bytes(64))


class Access:
    """Decides for each CONNECT. Raises PasswordFileError when made or reloaded with a bad file."""

    def __init__(self, password_file: Path | None) -> None:
        self._path = password_file
        self._users: dict[str, Secret] = {}
        self.reload()

    def reload(self) -> None:
        """Read the file again."""
        if self._path is not None:
            self._users = read_passwords(self._path)

    def authenticate(self, username: str | None, password: bytes | None, listener: ListenerRule) -> bool:
        """Whether a client with these credentials may use this listener."""
        if username is None:
            return listener.allow_anonymous
        if self._path is None:
            return listener.allow_anonymous
        secret = self._users.get(username)
        good = (secret or _NOBODY).matches(password or b"")
        return good and secret is not None

    def why_not(self, username: str | None) -> str:
        """Why `authenticate` said no."""
        return NO_NAME if username is None else WRONG if username in self._users else UNKNOWN


def read_passwords(path: Path) -> dict[str, Secret]:
    """User -> secret. Raises PasswordFileError with every bad line."""
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise PasswordFileError(f"{path}: cannot be read: {error.strerror}{_way_out(error, path)}") from None
    except UnicodeDecodeError:
        raise PasswordFileError(f"{path}: is not UTF-8 text; save it as UTF-8") from None
    users: dict[str, Secret] = {}
    faults: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip() or line.startswith("#"):
            continue
        user, colon, coded = line.partition(":")
        secret = _secret(coded.strip()) if colon and user else None
        if secret is None:
            faults.append(
                f"{path}:{number}: is not USER:$7$ITERATIONS$SALT$HASH; set this user's password again with:"
                f" tidegate passwd {path} USER"
            )
        else:
            users[user] = secret
    if faults:
        raise PasswordFileError("\n".join(faults))
    return users


def _way_out(error: OSError, path: Path) -> str:
    """A file with users must not be made anew because this user cannot read it."""
    if isinstance(error, FileNotFoundError):
        return f"; make it with: tidegate passwd -c {path} USER"
    if isinstance(error, PermissionError):
        group = str(os.getegid())
        with contextlib.suppress(KeyError):
            group = grp.getgrgid(os.getegid()).gr_name
        return f"; let the gateway's user read it: chgrp {group} {path} && chmod g+r {path}"
    return ""


def _secret(coded: str) -> Secret | None:
    parts = coded.split("$")
    try:
        if len(parts) == 5 and parts[:2] == ["", "7"]:
            iterations = int(parts[2])
            if not 0 < iterations <= MAX_ITERATIONS:
                return None
            return Secret(iterations, base64.b64decode(parts[3], validate=True), _digest(parts[4]))
        if len(parts) == 4 and parts[:2] == ["", "6"]:
            return Secret(0, base64.b64decode(parts[2], validate=True), _digest(parts[3]))
    except (ValueError, binascii.Error):
        return None
    return None


def _digest(text: str) -> bytes:
    digest = base64.b64decode(text, validate=True)
    if len(digest) != 64:
        raise ValueError("a SHA-512 digest has 64 bytes")
    return digest


def lacking(password_file: Path | None, conf_dir: Path) -> list[str]:
    """What is to be done before anybody in the network can log in; nothing where the password file has users."""
    file = password_file or conf_dir / "passwd"
    try:
        users = read_passwords(file)
    except PasswordFileError:
        users = {}
    steps = [] if users else [f"`tidegate passwd {'' if os.path.exists(file) else '-c '}{file} USER`"]
    return steps if password_file else [*steps, 'set password_file = "passwd" under [access] in gateway.toml']


def user_fault(user: str) -> str | None:
    """Why this cannot be a user name in the file, None if it can."""
    if not user or len(user.encode()) > 65_535:
        return "a user name has 1 to 65535 bytes"
    if any(character in user for character in ":\n\r\0") or user.startswith("#"):
        return "a user name holds no colon or line break and does not begin with #"
    return None


def password_line(user: str, password: bytes) -> str:
    """The line for this user, freshly salted."""
    salt = os.urandom(SALT_BYTES)
    digest = hashlib.pbkdf2_hmac("sha512", password, salt, ITERATIONS, 64)
    return f"{user}:$7${ITERATIONS}${base64.b64encode(salt).decode()}${base64.b64encode(digest).decode()}"


def set_user(path: Path, user: str, line: str | None, create: bool) -> bool:
    """Put the user's line into the file (None: take it out), in one atomic step; whether the user was there. Raises OSError.

    With `create` the file may be missing, and must not hold other users: nobody is thrown away by a letter.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "is not a regular file; nothing was changed")
    if not path.parent.is_dir():
        raise OSError(errno.ENOENT, f"there is no directory {path.parent}; make it first")
    lines = [] if create and not path.exists() else path.read_text("utf-8", "surrogateescape").split("\n")
    lines = [old for old in lines if old]
    kept = [old for old in lines if old.partition(":")[0] != user or old.startswith("#")]
    if create and (others := [old.partition(":")[0] for old in kept if not old.startswith("#")]):
        names = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        raise OSError(errno.EEXIST, f"holds other users ({names}): leave -c out to keep them, or delete the file first")
    was_there = len(kept) < len(lines)
    if line is not None:
        kept.append(line)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.writelines(f"{text}\n" for text in kept)
            file.flush()
            os.fsync(file.fileno())
        _dress(fresh, path)
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    return was_there


def _dress(fresh: Path, path: Path) -> None:
    """Owner and rights as the file had. A new one made by root is for its directory's group: the gateway's user is in it."""
    root = os.geteuid() == 0
    if path.exists():
        status = path.stat()
        os.chmod(fresh, status.st_mode & 0o777)
        if root:
            os.chown(fresh, status.st_uid, status.st_gid)
    elif root:
        os.chown(fresh, -1, path.parent.stat().st_gid)
        os.chmod(fresh, 0o640)
