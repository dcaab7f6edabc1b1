"""A file system of our own that becomes read-only and writable again while files are open on it (FUSE, by its protocol alone).

ext4 cannot do that: the kernel does not let go of `emergency_ro` before the file system is unmounted, and refuses
`remount,ro` while a file is open for writing (EBUSY). Here every call that would change something is answered with EROFS by the
file system itself as long as the file SWITCH is there. Everything else is passed on to a directory.

    .venv/bin/python -m tests.faults.switched_fs DIRECTORY MOUNT_POINT SWITCH

Needs root and /dev/fuse; `reason` says what is missing. include/uapi/linux/fuse.h has the protocol; this speaks 7.31.

Invariant: what was written before the switch is there during and after it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = 1
MAX_WRITE = 128 << 10
VALID = 60
"""Seconds that the kernel need not ask again: nobody else is at the directory."""
ONLY_SIZE, WITH_HANDLE = 8, 64
"""Bits of SETATTR; of the others nothing matters to a log."""
BY_HANDLE = 1
MS_NOSUID, MS_NODEV = 2, 4
WRITING = os.O_WRONLY | os.O_RDWR | os.O_TRUNC


def reason() -> str:
    """Why such a file system cannot be had here; empty when it can."""
    if os.geteuid() != 0:
        return "a file system of our own needs root (to mount it)"
    if not Path("/dev/fuse").exists():
        return "a file system of our own needs FUSE (/dev/fuse)"
    return ""


@contextmanager
def mounted(directory: Path, at: Path, switch: Path) -> Iterator[Path]:
    """Mount it; it is read-only as long as the file `switch` is there."""
    for place in (directory, at):
        place.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.faults.switched_fs", str(directory), str(at), str(switch)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    try:
        assert server.stdout is not None and server.stdout.readline() == b"mounted\n"
        yield at
    finally:
        subprocess.run(["umount", str(at)], check=False)
        server.wait(10)
        assert server.stdout is not None
        server.stdout.close()


class Request:
    """One request of the kernel."""

    def __init__(self, data: bytes) -> None:
        _, self.opcode, self.unique, self.node, *_ = struct.unpack_from("<IIQQ", data)
        self.body = data[40:]

    def numbers(self, form: str) -> tuple[int, ...]:
        return struct.unpack_from("<" + form, self.body)

    def names(self, skipped: int) -> list[str]:
        return [os.fsdecode(name) for name in self.body[skipped:].split(b"\0")[:-1]]


class SwitchedFs:
    """Passes on to `directory`."""

    def __init__(self, directory: str, switch: str) -> None:
        self._switch = switch
        self._paths = {ROOT: directory}
        self._numbers = {directory: ROOT}
        self._last = ROOT
        reading: dict[int, Callable[[Request], bytes]] = {
            1: self._lookup, 3: self._getattr, 14: self._open, 15: self._read, 17: self._statfs, 18: self._release,
            20: self._fsync, 26: self._init, 27: self._opendir, 28: self._readdir, 29: self._nothing, 38: self._nothing,
        }  # fmt: skip
        self._changing: dict[int, Callable[[Request], bytes]] = {
            4: self._setattr, 8: self._mknod, 9: self._mkdir, 10: self._unlink, 11: self._rmdir, 12: self._rename,
            16: self._write, 35: self._create,
        }  # fmt: skip
        self._known = reading | self._changing

    def answer(self, data: bytes) -> bytes:
        """What goes back to the kernel; nothing for what wants no answer."""
        request = Request(data)
        if request.opcode in (2, 36, 42):  # FORGET, INTERRUPT, BATCH_FORGET
            return b""
        body, error = b"", 0
        try:
            if request.opcode not in self._known:
                raise OSError(errno.ENOSYS, "")
            if request.opcode in self._changing:
                self._refuse_changes()
            body = self._known[request.opcode](request)
        except OSError as fault:
            error = -(fault.errno or errno.EIO)
        return struct.pack("<IiQ", 16 + len(body), error, request.unique) + body

    def _refuse_changes(self) -> None:
        if os.path.exists(self._switch):
            raise OSError(errno.EROFS, "")

    # -- what only looks -------------------------------------------------------------------------------------------

    def _init(self, request: Request) -> bytes:
        big_writes = 1 << 5
        return struct.pack("<IIIIHHIIHHI28x", 7, 31, MAX_WRITE, big_writes, 16, 12, MAX_WRITE, 1, 0, 0, 0)

    def _lookup(self, request: Request) -> bytes:
        return self._entry(self._below(request, request.names(0)[0]))

    def _getattr(self, request: Request) -> bytes:
        flags, _, handle = request.numbers("IIQ")
        found = os.fstat(handle) if flags & BY_HANDLE else os.lstat(self._paths[request.node])
        return struct.pack("<QII", VALID, 0, 0) + _attributes(found)

    def _open(self, request: Request) -> bytes:
        flags, _ = request.numbers("II")
        if flags & WRITING:
            self._refuse_changes()
        return struct.pack("<QII", os.open(self._paths[request.node], flags & ~os.O_CREAT), 0, 0)

    def _read(self, request: Request) -> bytes:
        handle, offset, size = request.numbers("QQI")
        return os.pread(handle, size, offset)

    def _statfs(self, request: Request) -> bytes:
        found = os.statvfs(self._paths[ROOT])
        counts = (found.f_blocks, found.f_bfree, found.f_bavail, found.f_files, found.f_ffree)
        return struct.pack("<QQQQQIII28x", *counts, found.f_bsize, found.f_namemax, found.f_frsize)

    def _release(self, request: Request) -> bytes:
        os.close(request.numbers("Q")[0])
        return b""

    def _fsync(self, request: Request) -> bytes:
        os.fsync(request.numbers("Q")[0])
        return b""

    def _nothing(self, request: Request) -> bytes:
        return b""

    def _opendir(self, request: Request) -> bytes:
        return struct.pack("<QII", 0, 0, 0)

    def _readdir(self, request: Request) -> bytes:
        _, offset, size = request.numbers("QQI")
        out = b""
        for number, entry in enumerate(sorted(os.scandir(self._paths[request.node]), key=lambda one: one.name)):
            name = os.fsencode(entry.name)
            kind = stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode) >> 12
            line = struct.pack("<QQII", entry.inode(), number + 1, len(name), kind) + name
            line += bytes(-len(line) % 8)
            if number >= offset and len(out) + len(line) <= size:
                out += line
        return out

    # -- what changes something ------------------------------------------------------------------------------------

    def _setattr(self, request: Request) -> bytes:
        valid, _, handle, size, *_ = request.numbers("IIQQ")
        where = handle if valid & WITH_HANDLE else self._paths[request.node]
        if valid & ONLY_SIZE:
            os.truncate(where, size)
        return struct.pack("<QII", VALID, 0, 0) + _attributes(os.stat(where))

    def _mknod(self, request: Request) -> bytes:
        mode, device, *_ = request.numbers("IIII")
        path = self._below(request, request.names(16)[0])
        os.mknod(path, mode, device)
        return self._entry(path)

    def _mkdir(self, request: Request) -> bytes:
        path = self._below(request, request.names(8)[0])
        os.mkdir(path, request.numbers("I")[0])
        return self._entry(path)

    def _unlink(self, request: Request) -> bytes:
        self._gone(path := self._below(request, request.names(0)[0]))
        os.unlink(path)
        return b""

    def _rmdir(self, request: Request) -> bytes:
        self._gone(path := self._below(request, request.names(0)[0]))
        os.rmdir(path)
        return b""

    def _rename(self, request: Request) -> bytes:
        old, new = request.names(8)
        source, target = self._below(request, old), os.path.join(self._paths[request.numbers("Q")[0]], new)
        os.rename(source, target)
        self._gone(target)
        if (number := self._numbers.pop(source, None)) is not None:
            self._numbers[target], self._paths[number] = number, target
        return b""

    def _write(self, request: Request) -> bytes:
        handle, offset, size = request.numbers("QQI")
        return struct.pack("<II", os.pwrite(handle, request.body[40 : 40 + size], offset), 0)

    def _create(self, request: Request) -> bytes:
        flags, mode, *_ = request.numbers("IIII")
        path = self._below(request, request.names(16)[0])
        handle = os.open(path, flags | os.O_CREAT, mode)
        return self._entry(path) + struct.pack("<QII", handle, 0, 0)

    # -- names -----------------------------------------------------------------------------------------------------

    def _below(self, request: Request, name: str) -> str:
        return os.path.join(self._paths[request.node], name)

    def _entry(self, path: str) -> bytes:
        found = os.lstat(path)
        if path not in self._numbers:
            self._last += 1
            self._numbers[path], self._paths[self._last] = self._last, path
        return struct.pack("<QQQQII", self._numbers[path], 0, VALID, VALID, 0, 0) + _attributes(found)

    def _gone(self, path: str) -> None:
        """The name may be given to another file, which is another node."""
        self._numbers.pop(path, None)


def _attributes(found: os.stat_result) -> bytes:
    times = [divmod(at, 1_000_000_000) for at in (found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns)]
    return struct.pack(
        "<QQQQQQIIIIIIIIII",
        *(found.st_ino, found.st_size, found.st_blocks, *(seconds for seconds, _ in times), *(rest for _, rest in times)),
        *(found.st_mode, found.st_nlink, found.st_uid, found.st_gid, found.st_rdev, found.st_blksize, 0),
    )


def serve(directory: str, at: str, switch: str) -> None:
    """Mount and answer until it is unmounted."""
    kernel = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={kernel},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions".encode()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"switched", os.fsencode(at), b"fuse", MS_NOSUID | MS_NODEV, options):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), at)
    print("mounted", flush=True)
    system = SwitchedFs(directory, switch)
    while True:
        try:
            data = os.read(kernel, MAX_WRITE + 8192)
        except OSError as error:
            if error.errno == errno.ENODEV:
                return
            if error.errno in (errno.EINTR, errno.ENOENT):
                continue
            raise
        if answer := system.answer(data):
            try:
                os.write(kernel, answer)
            except OSError as error:
                if error.errno != errno.ENOENT:  # whoever asked has been interrupted
                    raise


if __name__ == "__main__":
    serve(*sys.argv[1:])
