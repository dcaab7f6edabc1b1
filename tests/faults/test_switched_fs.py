"""A file system that really becomes read-only under the running gateway, and writable again: recovery without a restart."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.gateway import Gateway

from .refusing import survives
from .switched_fs import mounted, reason

pytestmark = pytest.mark.skipif(bool(reason()), reason=reason())


def test_it_is_read_only_for_who_has_a_file_open_and_writable_again(tmp_path: Path) -> None:
    switch = tmp_path / "switch"
    with mounted(tmp_path / "kept", tmp_path / "mount", switch) as at, (at / "file").open("wb", buffering=0) as file:
        file.write(b"before")
        switch.touch()
        for change in (lambda: file.write(b"during"), lambda: os.mkdir(at / "new"), lambda: (at / "file").open("r+b")):
            with pytest.raises(OSError) as refused:
                change()
            assert refused.value.errno == errno.EROFS
        assert (at / "file").read_bytes() == b"before"
        switch.unlink()
        file.write(b" after")
        os.fsync(file.fileno())
    assert (tmp_path / "kept" / "file").read_bytes() == b"before after"


def test_file_system_that_becomes_read_only_and_writable_again_under_load(tmp_path: Path) -> None:
    switch = tmp_path / "switch"

    @contextmanager
    def read_only(_: Gateway) -> Iterator[None]:
        switch.touch()
        try:
            yield
        finally:
            switch.unlink()

    with mounted(tmp_path / "kept", tmp_path / "mount", switch) as at:
        survives(Gateway(tmp_path / "gateway", data=at / "data"), read_only, "read-only")
