"""Files of weights from the web: fetched once, by https alone, and kept.

They are kept in `$RESFU_WEIGHTS_DIR`, else in `resfu_jax/weights` below `$XDG_CACHE_HOME` or
`~/.cache`.
"""

import contextlib
import hashlib
import http.client
import os
import pathlib
import re
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

_SECONDS = 30  # without a byte, after which a connection is given up


class DamagedDownload(ValueError):
    """A fetched file is not what its publisher says it is."""


def download(url: str, sha256: str | None = None) -> pathlib.Path:
    """The file at an address, from the cache or fetched into it: whole, or not at all.

    Args:
      url: begins with https, and leads to no other kind of address.
      sha256: the file's sum in hexadecimal digits, if it is known. It is compared at every call.

    Raises:
      ValueError: another kind of address, or a file with another sum.
      FileNotFoundError: it could not be fetched; the error says what to do.
    """
    if not re.match(r"https://[\w\[]", url):
        raise ValueError(f"weights are fetched by https only, got {url}")
    path = _place(url)
    if not path.is_file():
        try:
            _fetch(url, path, sha256)
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()
            raise FileNotFoundError(
                f"{url} could not be fetched: {type(error).__name__}: {str(error)[:500]}. Check "
                "the connection, or download the file by hand and give its path"
            ) from error
    elif sha256 is not None:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            raise DamagedDownload(
                f"{path} is damaged: its SHA-256 is {found}, and that of {url} is {sha256}. Delete "
                "it, and it is fetched again"
            )
    return path


def _place(url: str) -> pathlib.Path:
    """Where the file of an address is kept: under its own name, in a folder of the address."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = os.environ.get("RESFU_WEIGHTS_DIR") or f"{caches}/resfu_jax/weights"
    name = urllib.parse.unquote(urllib.parse.urlsplit(url).path).rpartition("/")[2]
    name = re.sub(r"[^\w.-]", "_", name).lstrip(".") or "weights"
    address = hashlib.sha256(url.encode()).hexdigest()[:12]
    return pathlib.Path(folder).expanduser() / address / name


def _fetch(url: str, path: pathlib.Path, sha256: str | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    sum_ = hashlib.sha256()
    try:
        with _open(url) as response, part.open("wb") as file:
            size = int(response.headers.get("Content-Length") or 0)
            with _progress(path.name, size) as advance:
                while chunk := response.read(1 << 20):
                    if not file.tell() and chunk.lstrip()[:1] == b"<":
                        raise OSError("it is a web page")
                    file.write(chunk)
                    sum_.update(chunk)
                    advance(len(chunk))
            if size and file.tell() != size:
                raise OSError(f"the connection ended after {file.tell()} of {size} bytes")
            file.flush()
            os.fsync(file.fileno())
        if sha256 not in (None, sum_.hexdigest()):
            raise DamagedDownload(
                f"{url} is not the file that was published: its SHA-256 is {sum_.hexdigest()}, "
                f"expected {sha256}. It was not kept"
            )
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def _progress(name: str, size: int) -> Iterator[Callable[[int], Any]]:
    """A bar that the function given advances by a number of bytes; one line where tqdm is not."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        print(f"fetching {name}, {size / 1e6:.1f} MB", file=sys.stderr)
        yield lambda _: None
    else:
        # `disable=None`: no bar where nobody looks, in a log.
        with tqdm(desc=name, total=size or None, unit="B", unit_scale=True, disable=None) as bar:
            yield bar.update


def _open(url: str) -> Any:
    request = urllib.request.Request(url, headers={"User-Agent": "resfu_jax"})
    return urllib.request.build_opener(_StayHttps).open(request, timeout=_SECONDS)


class _StayHttps(urllib.request.HTTPRedirectHandler):
    """Follows a redirection to https only."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str):
        """The request to the new address."""
        if not newurl.startswith("https://"):
            raise urllib.error.URLError(f"it leads to {newurl}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)
