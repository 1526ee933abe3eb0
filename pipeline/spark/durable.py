"""Makes local files survive a power cut. Spark, Delta and Hadoop never sync the files that they write."""

import errno
import os
from collections.abc import Iterable
from pathlib import Path


def sync(paths: Iterable[str | Path]) -> None:
    """Syncs these files, and their names in their folders, to the disk. Skips files that don't exist.

    An executor on another machine writes a checksum file `.NAME.crc` beside each file; those are synced, too.
    """
    existing = [
        path
        for each in paths
        for path in (each, Path(each).with_name(f".{Path(each).name}.crc"))
        if os.path.exists(path)
    ]
    for path in dict.fromkeys([*map(str, existing), *(os.path.dirname(path) for path in existing)]):
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        except OSError as error:
            # Some file systems, such as shared folders of virtual machines, can't sync a folder.
            if not os.path.isdir(path) or error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
                raise OSError(error.errno, error.strerror, path) from error
        finally:
            os.close(number)


def replace(path: str, text: str) -> None:
    """Writes a file atomically: after a power cut at any moment, it has either the old or the new content."""
    draft = f"{path}.draft"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Path(draft).write_text(text, encoding="utf-8")
    sync([draft])
    os.replace(draft, path)
    sync([path])
