"""Real MySQL beside the system's MariaDB: `tests/fetch_mysql` unpacks it into .mysql, TIDEGATE_MYSQL_ROOT names another root.

Where it is not, its tests are skipped and say so; with TIDEGATE_REAL_MYSQL=required, as in the build, they fail. As root it
runs as root, because what it is unpacked in may be closed to others.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from .sql_servers import DATABASE, PASSWORD, USER, MariaDb, copy, own_directory, quietly

_FETCHED = Path(__file__).parents[2] / ".mysql" / "root"
ROOT = os.environ.get("TIDEGATE_MYSQL_ROOT", "") or (str(_FETCHED) if (_FETCHED / "complete").exists() else "")
MISSING = "real MySQL is not here: sh tests/fetch_mysql .mysql"
IS_SKIPPED = not ROOT and os.environ.get("TIDEGATE_REAL_MYSQL") != "required"


class MySql(MariaDb):
    """MySQL 9 as Debian sid has it."""

    runs_as = "root"

    @classmethod
    @functools.cache
    def template(cls) -> Path:
        directory = own_directory(cls.runs_as)
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
        quietly(cls.runs_as, directory, *_program(directory), "--initialize-insecure")
        with cls(data=directory / "data") as server:
            server.recreate()
            server.run(
                f"CREATE USER {USER}@'127.0.0.1' IDENTIFIED BY '{PASSWORD}'", f"GRANT ALL ON {DATABASE}.* TO {USER}@'127.0.0.1'"
            )
            server.stop()
            shutil.rmtree(directory / "data")
            copy(server.directory / "data", directory / "data")
        return directory / "data"

    def command(self) -> Sequence[str]:
        return [
            *_program(self.directory),
            *(f"--socket={self.directory / 's.sock'}", f"--pid-file={self.directory / 'pid'}", f"--port={self.port}"),
            *("--bind-address=127.0.0.1", "--mysqlx=OFF", "--skip-name-resolve", "--performance-schema=OFF"),
            *("--disable-log-bin", *self.options),
        ]


def _program(directory: Path) -> Sequence[str]:
    assert ROOT, MISSING
    libraries = next(Path(ROOT).glob("usr/lib/*-linux-gnu/ld-linux-*")).parent
    loader = next(libraries.glob("ld-linux-*"))
    return [
        *(str(loader), "--library-path", str(libraries), f"{ROOT}/usr/sbin/mysqld", "--no-defaults"),
        *(f"--datadir={directory / 'data'}", f"--basedir={ROOT}/usr", f"--lc-messages-dir={ROOT}/usr/share/mysql"),
        *(f"--plugin-dir={ROOT}/usr/lib/mysql/plugin", "--secure-file-priv=NULL", "--innodb-redo-log-capacity=16M"),
        *("--innodb-buffer-pool-size=32M", f"--tmpdir={directory}"),
        *(["--user=root"] if os.geteuid() == 0 else []),
    ]
