"""Writing files that another process may be reading, or that an interruption must not tear."""

import os
from pathlib import Path


def replace(path: Path, content: str | bytes) -> None:
    """Write a whole file or, when interrupted, none of it; text is written as UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = content.encode() if isinstance(content, str) else content
    try:
        unfinished.write_bytes(data)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
