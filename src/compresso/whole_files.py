"""Files that appear under their name only when they are whole."""

from pathlib import Path


def write(path: Path, content: bytes) -> None:
    """Write or replace a file; one that is there stays until the new one is complete. Raises OSError."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)
