"""One run at a time in a folder of results."""

import contextlib
import errno
import json
import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # no POSIX
    fcntl = None

LOCK = ".lock"
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class InUseError(Exception):
    """Another run writes into the folder. The message says which."""


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder, which is made if need be.

    The system gives the lock up when its holder ends, however that was. Some file systems have no
    such locks: there the file itself is the lock, and who finds it looks whether its writer lives.
    (Two runs that begin in the same instant are not told apart there.)

    Raises:
      InUseError: If another run is in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    file = _claim(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is still ours
        os.close(file)


def _claim(path: Path) -> int:
    """The descriptor of the lock file, which says who has it."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if _locked(file, path):
                holder = {
                    "pid": os.getpid(),
                    "host": socket.gethostname(),
                    "since": datetime.now(UTC).isoformat(" ", "seconds"),
                }
                os.ftruncate(file, 0)
                os.pwrite(file, json.dumps(holder).encode(), 0)
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _locked(file: int, path: Path) -> bool:
    """Takes the lock. False if its last holder removed the file meanwhile.

    Raises:
      InUseError: If another run has it.
    """
    holder = _holder(file)
    try:
        supported = _flock(file)
    except BlockingIOError:
        raise InUseError(_in_use(path, holder)) from None
    if not supported and holder and not _ended(holder):
        raise InUseError(f"{_in_use(path, holder)}. If that run is no more, remove {path}")
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _flock(file: int) -> bool:
    """Takes the system's lock of a file. False where there are none.

    Raises:
      OSError: If another run has it (`BlockingIOError`), or it cannot be taken.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return False
        raise
    return True


def _holder(file: int) -> dict[str, Any]:
    """Who wrote the lock file; empty if it does not say."""
    with contextlib.suppress(ValueError):
        holder = json.loads(os.pread(file, 1000, 0))
        if isinstance(holder, dict):
            return holder
    return {}


def _in_use(path: Path, holder: dict[str, Any]) -> str:
    words = [f"{name} {str(holder[name])[:80]}" for name in ("pid", "host") if name in holder]
    who = f" ({', '.join(words)}, since {str(holder.get('since'))[:80]})" if words else ""
    return (
        f"{path.parent} is in use by another run{who}: wait for it, stop it, or name another "
        "--output"
    )


def _ended(holder: dict[str, Any]) -> bool:
    """Whether a lock's holder was a process of this machine that is no more."""
    if holder.get("host") != socket.gethostname() or os.name != "posix":
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except (ProcessLookupError, KeyError, ValueError, TypeError, OverflowError):
        return True
    except OSError:  # it lives, and is another user's
        return False
    return False
