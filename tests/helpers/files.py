"""Files for the input folder."""

import gzip
import os


def put(folder, name: str, *records: bytes) -> None:
    """Writes a file that appears in one piece, as the script's manual demands."""
    content = b"\n".join(records) + b"\n"
    (folder / f"_{name}").write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    os.rename(folder / f"_{name}", folder / name)
