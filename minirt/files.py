"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from .errors import ModelError


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes its name only if the block ends well. ModelError where it cannot be written.

    A symbolic link stays and what it names is written. What is there keeps its mode; no regular file is refused.
    """
    try:
        target = Path(os.path.realpath(path))
        mode = _mode(target)
        if not stat.S_ISREG(mode):
            raise ModelError(f"{path}: not a regular file")
        file = cast(BinaryIO, tempfile.NamedTemporaryFile(dir=target.parent, prefix=".minirt-", delete=False))  # noqa: SIM115
    except ModelError:
        raise
    except (OSError, ValueError) as e:
        raise ModelError(f"{path}: cannot write: {getattr(e, 'strerror', None) or e}") from None
    try:
        with file:
            yield file
        os.chmod(file.name, stat.S_IMODE(mode))
        os.replace(file.name, target)
    except OSError as e:
        if e.errno == errno.EPIPE or e.filename not in (None, file.name):  # another file's
            raise
        raise ModelError(f"{path}: cannot write: {e.strerror or e}") from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(file.name)


def _mode(path: Path) -> int:
    """Of the file that is there, or of the one that open() would make."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        mask = os.umask(0o077)
        os.umask(mask)
        return stat.S_IFREG | (0o666 & ~mask)
