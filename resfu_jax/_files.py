"""Folders as people type them, and files that are written whole or not at all."""

import os
import pathlib
import re
import threading

Path = str | os.PathLike[str]


def local_path(path: Path, name: str) -> pathlib.Path:
    """The absolute path, with `~` replaced by the home folder.

    Args:
      path: as a person typed it.
      name: of the argument, for the message.

    Raises:
      ValueError: it is the address of something that is not on this machine, or no path at all.
    """
    text = os.fspath(path)
    # `pathlib` makes gs:/bucket of gs://bucket, and a folder called `gs:` would appear.
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        raise ValueError(
            f"{name} is {text}; it has to be a folder or file of this machine: mount remote "
            "storage (gcsfuse, s3fs), or copy"
        )
    if not text or "\0" in text:
        raise ValueError(f"{name} is {text!r}, which is not a path")
    return pathlib.Path(os.path.expanduser(text)).absolute()


def write_whole(path: pathlib.Path, content: bytes | memoryview | str) -> None:
    """Writes a file such that a process or machine that stops leaves the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # else a power loss may leave the new name with no content
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
