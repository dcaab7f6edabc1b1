"""Real MySQL beside the system's MariaDB, where somebody has unpacked it: TIDEGATE_MYSQL_ROOT=DIR adds it to the SQL tests.

Debian has it in sid only. A private apt root downloads it with all its libraries, libc included, and its own loader runs it;
nothing is installed (`$R` is a directory of ours):

    mkdir -p $R/lists/partial $R/cache/archives/partial $R/root; : > $R/status
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian sid main" > $R/sid.list
    A="-o Dir::Etc::sourcelist=$R/sid.list -o Dir::Etc::sourceparts=- -o Dir::State::lists=$R/lists -o Dir::Cache=$R/cache"
    A="$A -o Dir::State::status=$R/status"; apt-get $A update
    apt-get $A -y --no-install-recommends --download-only install mysql-server-core
    for d in $R/cache/archives/*.deb; do dpkg-deb -x $d $R/root; done        # then TIDEGATE_MYSQL_ROOT=$R/root
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from .sql_servers import DATABASE, PASSWORD, USER, MariaDb, copy, own_directory, quietly

ROOT = os.environ.get("TIDEGATE_MYSQL_ROOT", "")


class MySql(MariaDb):
    """MySQL 9 as Debian sid has it."""

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
    libraries = next(Path(ROOT).glob("usr/lib/*-linux-gnu/ld-linux-*")).parent
    loader = next(libraries.glob("ld-linux-*"))
    return [
        *(str(loader), "--library-path", str(libraries), f"{ROOT}/usr/sbin/mysqld", "--no-defaults"),
        *(f"--datadir={directory / 'data'}", f"--basedir={ROOT}/usr", f"--lc-messages-dir={ROOT}/usr/share/mysql"),
        *(f"--plugin-dir={ROOT}/usr/lib/mysql/plugin", "--secure-file-priv=NULL", "--innodb-redo-log-capacity=16M"),
        *("--innodb-buffer-pool-size=32M", f"--tmpdir={directory}"),
    ]
