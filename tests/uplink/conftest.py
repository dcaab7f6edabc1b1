"""Servers that more than one file starts; each file has its own, and every test empty tables of ours."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.sql_servers import SqlServer

from .sql_rig import EVERY_SERVER, SERVERS, tables


@pytest.fixture(scope="module", params=EVERY_SERVER)
def running(request: pytest.FixtureRequest) -> Iterator[SqlServer]:
    with SERVERS[request.param]() as server:
        yield server


@pytest.fixture
def server(running: SqlServer) -> SqlServer:
    running.recreate()
    tables(running)
    return running
