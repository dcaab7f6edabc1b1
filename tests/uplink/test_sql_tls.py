"""An encrypted line to real servers: checked against an authority, refused with the wrong one, unchecked with a warning."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import cast

import pytest
from tidegate.uplink.asking import AskingBackend

from tests.support.certificates import make_certificates
from tests.support.sql_servers import USER, SqlServer

from .sql_rig import EVERY_SERVER, SERVERS, assert_holds_everything, rig, tables


@pytest.fixture(params=EVERY_SERVER)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SqlServer]:
    """One that takes no password over a line that is not encrypted."""
    with SERVERS[request.param]() as server:
        server.stop()
        place = server.directory / "tls"
        place.mkdir()
        authority, certificate, key = make_certificates(place)
        shutil.copy(authority, tmp_path / "ca.pem")
        if os.geteuid() == 0:
            for path in (place, authority, certificate, key):
                shutil.chown(path, server.runs_as, server.runs_as)
        if server.backend == "pgsql":
            server.options += ("ssl=on", f"ssl_cert_file={certificate}", f"ssl_key_file={key}")
            hba = server.directory / "data" / "pg_hba.conf"
            hba.write_text(f"hostssl all {USER} all scram-sha-256\nhost all root all scram-sha-256\n")
        else:
            server.options += (f"--ssl-cert={certificate}", f"--ssl-key={key}", f"--ssl-ca={authority}")
        server.start()
        if server.backend == "mysql":
            server.run(f"ALTER USER {USER}@'127.0.0.1' REQUIRE SSL")
        tables(server)
        yield server


def test_a_checked_line_and_one_to_somebody_else(tmp_path: Path, server: SqlServer) -> None:
    with rig(tmp_path, server, more="ssl = true\ncacertfile = ca.pem") as gate:
        gate.log.publish_many(20)
        gate.drain()
        assert_holds_everything(gate, server)
        far_end = cast(AskingBackend, importlib.import_module(f"tidegate.uplink.to_{server.backend}"))
        with closing(far_end.connect_asker(gate.pool)) as asker:
            server.run("INSERT INTO mqtt_sub (clientid, topic, qos) VALUES ('c', 't', 1)")
            assert asker.subscriptions(["c"]) == {"c": [("t", 1)]}
    other = tmp_path / "other"
    other.mkdir()
    make_certificates(other)
    with rig(other, server, more="ssl = true\ncacertfile = ca.pem") as gate:
        gate.step()
        assert gate.standing().state == "misconfigured", gate.standing()
        assert "no encrypted line" in gate.standing().error
        assert f"backend.{server.backend}.pool1" in gate.standing().hint


def test_an_unchecked_line_works_and_an_open_one_is_refused(tmp_path: Path, server: SqlServer) -> None:
    with rig(tmp_path, server, more="ssl = true") as gate:
        gate.log.publish_many(20)
        gate.drain()
        assert_holds_everything(gate, server)
    (tmp_path / "open").mkdir()
    with rig(tmp_path / "open", server) as gate:
        gate.step()
        assert gate.standing().state == "misconfigured", gate.standing()
