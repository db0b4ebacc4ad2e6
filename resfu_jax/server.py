"""Serves an exported segmentation model over HTTP, with the standard library.

    resfu serve --model camvid.zip --port 8000
    curl -F image=@street.jpg localhost:8000 -o labels.png
    curl -F image=@street.jpg 'localhost:8000/?overlay=0.5' -o overlay.png

GET the page, server.html, for a browser. POST an image, as it is or as the file `image` of a form;
the answer is a PNG of its size: labels as palette indices, or the classes' colours over the image.
Nothing that a client sends takes more than the limits below: docs/export.md.
"""

import bisect
import collections
import colorsys
import contextlib
import email
import http
import io
import json
import math
import os
import pathlib
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
from PIL import Image

from resfu_jax.images import ImageError, image_size, read_image

if TYPE_CHECKING:  # processes that decode need no JAX
    from resfu_jax.serving import Exported

MAX_BYTES, MAX_PIXELS, MAX_RATIO = 16 << 20, 4 << 20, 16
MAX_PADDED = 2 * MAX_PIXELS  # pixels that the model sees
SECONDS = 30  # for a request to come, whole; for its turn; for its answer to go
CONNECTIONS = 64  # at once, each a thread; what is beyond is told to come back
DECODERS, DECODE_SECONDS, DECODE_BYTES = 2, 5, 512 << 20  # processes; limits of an image
PAGE_SIDE = 1024  # to which the page reduces photos: those of telephones exceed the limit


class Refused(Exception):  # noqa: N818
    """An error to answer: status and reason."""


# ------------------------------------------------------------------------------------------ images
class Decoder:
    """A process that decodes images, ended if one takes too long, and then started again.

    How much time and memory a small file takes is known only once it is decoded: thousands of scans
    in one JPEG, a TIFF whose tiles are larger than the image. The server goes on meanwhile.
    """

    def __init__(self, orientation: bool):
        self.orientation = orientation  # of `Preprocess`: whether photos are turned upright
        self.start()

    def start(self):
        """Returns when the process is ready."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__, "--decode"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # Ctrl-C is for the server, which waits for answers under way
        )
        if self.process.stdout.readline() != b"ready\n":
            self.close()
            raise RuntimeError("the process that decodes images does not start")

    def close(self):
        """Ends the process."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()

    def __call__(
        self, body: bytes, check: Callable[[int, int], None], kind: str = ""
    ) -> np.ndarray:
        """RGB pixels of an encoded image; `check(height, width)` comes before it is decoded.

        Args:
          body: the image, or a form that holds it.
          check: raises `Refused` for sizes that are not wanted.
          kind: the body's Content-Type.
        """
        late = threading.Event()

        def end() -> None:
            late.set()
            self.process.kill()

        timer = threading.Timer(DECODE_SECONDS, end)
        timer.start()
        broken = False
        try:
            head = {"bytes": len(body), "kind": kind, "orientation": self.orientation}
            self.send(json.dumps(head).encode() + b"\n" + body)
            size = self.receive()
            try:
                check(*size)
            except Refused:
                self.send(b"n")
                raise
            self.send(b"y")
            height, width = self.receive()
            pixels = self.process.stdout.read(3 * height * width)
            return np.frombuffer(pixels, np.uint8).reshape(height, width, 3)
        except (OSError, ValueError) as error:  # the process has ended
            broken = True
            if late.is_set():
                reason = f"decoding the image takes more than {DECODE_SECONDS} s"
                raise Refused(413, reason) from error
            raise Refused(400, "the image cannot be decoded") from error
        finally:
            timer.cancel()
            timer.join()
            if broken or late.is_set():
                self.close()
                self.start()

    def send(self, data):
        """Writes to the process."""
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def receive(self):
        """Height and width, as the process says them, or what it says is wrong."""
        said = json.loads(self.process.stdout.readline())
        if "reason" in said:
            raise Refused(said["status"], said["reason"])
        return said["size"]


def decode():
    """What the process of `Decoder` does, until its input ends."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # where there are such limits
        import resource

        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + DECODE_BYTES,) * 2)
    source, sink = sys.stdin.buffer, sys.stdout.buffer

    def say(said):
        sink.write(said if isinstance(said, bytes) else json.dumps(said).encode() + b"\n")
        sink.flush()

    say(b"ready\n")
    while line := source.readline():
        head = json.loads(line)
        body = source.read(head["bytes"])
        options = dict(orientation=head["orientation"], max_pixels=sys.maxsize)
        try:
            if head["kind"].lower().startswith("multipart/"):
                body = file_of_form(body, head["kind"])
            say({"size": image_size(body, "the image", **options)})
            if source.read(1) == b"n":
                continue
            pixels = read_image(body, "the image", **options)
            say({"size": pixels.shape[:2]})
            say(pixels.tobytes())
        except (ImageError, MemoryError) as error:
            status, reason = 400, str(error)
            if MemoryError in (type(error), type(error.__cause__)):
                status, reason = 413, "the image takes too much memory"
            elif "it is none of" in reason:
                status = 415
            say({"status": status, "reason": reason})


def file_of_form(form: bytes, kind: str) -> bytes:
    """The file `image` of a form of this Content-Type. There must be nothing else in it."""
    try:
        message = email.message_from_bytes(f"Content-Type: {kind}\r\n\r\n".encode() + form)
        parts: Any = message.get_payload() if message.is_multipart() else []
        names = [part.get_param("name", header="Content-Disposition") for part in parts]
        content = parts[0].get_payload(decode=True) if names == ["image"] else None
    except Exception as error:  # memory; parts within parts within parts
        raise ImageError("the form cannot be read") from error
    if content is None:
        raise ImageError(f"the form must have one file, image, got {', '.join(map(str, names))}")
    return content


# ------------------------------------------------------------------------------------------ server
class Server(ThreadingHTTPServer):
    """A thread for each of so many connections; one request at a time uses the model."""

    daemon_threads = False  # closing waits for answers under way
    request_queue_size = 128  # connections that the system keeps until they are accepted

    def __init__(self, address: tuple[str, int], model: "Exported"):
        self.model, self.lock = model, threading.Lock()
        self.slots = threading.BoundedSemaphore(CONNECTIONS)
        # Connections told to come back, and until when.
        self.leaving: collections.deque[tuple[float, socket.socket]] = collections.deque()
        self.decoders: queue.Queue[Decoder] = queue.Queue()
        super().__init__(address, Handler)  # an address that is taken is known before XLA compiles
        try:
            # It runs here, one image at a time.
            if (
                model.meta["output"] != "labels"
                or model(np.zeros((1, 1, 1, 3), np.uint8)).dtype != np.uint8
            ):
                raise ValueError(
                    "the model must be exported with output='labels', up to 256 classes"
                )
            if math.prod(smallest := model.padded_size(1, 1)) > MAX_PADDED:
                raise ValueError(f"the model pads images to {smallest}, beyond {MAX_PADDED} pixels")
            self.palette = model.meta["palette"] or distinct_colors()
            self.page = self.make_page()
            for _ in range(DECODERS):
                self.decoders.put(Decoder(model.preprocess.orientation))
        except BaseException:
            self.server_close()
            raise

    def make_page(self) -> bytes:
        """server.html with the model's classes, and the largest photo that it sends."""

        def fits(height: int, width: int) -> bool:
            with contextlib.suppress(ValueError):  # a model of a fixed size
                return bool(self.model.padded_size(height, width))
            return False

        lengths = range(1, PAGE_SIDE + 1)
        names = self.model.meta["class_names"] or [f"class {i}" for i in range(256)]
        facts = {
            "classes": [[n, f"rgb{tuple(c)}"] for n, c in zip(names, self.palette, strict=False)],
            "sides": [  # the longest that fit
                bisect.bisect_left(lengths, True, key=lambda n: not fits(n, 1)),
                bisect.bisect_left(lengths, True, key=lambda n: not fits(1, n)),
            ],
        }
        html = pathlib.Path(__file__).with_suffix(".html").read_text("utf-8")
        # No name ends the script that it is in.
        return html.replace("{facts}", json.dumps(facts).replace("<", r"\u003c")).encode()

    def answer(self, body: bytes, kind: str, overlay: float) -> tuple[bytes, dict[int, float]]:
        """An encoded image to an encoded label map, and the share of each class in it."""
        try:
            decoder = self.decoders.get(timeout=SECONDS)
        except queue.Empty:
            raise Refused(503, "too many images at once") from None
        try:
            image = decoder(body, self.check, kind)
        finally:
            self.decoders.put(decoder)
        if not self.lock.acquire(timeout=SECONDS):
            raise Refused(503, "too many images at once")
        try:
            labels = self.model(image[None])[0]
        finally:
            self.lock.release()
        classes, counts = np.unique(labels, return_counts=True)
        shares = dict(zip(classes.tolist(), (counts / labels.size).round(4).tolist(), strict=True))
        picture = Image.fromarray(labels)
        picture.putpalette([value for color in self.palette for value in color])
        if overlay:
            picture = Image.blend(Image.fromarray(image), picture.convert("RGB"), overlay)
        picture.save(png := io.BytesIO(), "PNG")
        return png.getvalue(), shares

    def check(self, height, width):
        """Refuses sizes for which there would be too much to do, known before it is done."""
        if height * width > MAX_PIXELS:
            raise Refused(413, f"an image may have {MAX_PIXELS} pixels")
        if max(height, width) > MAX_RATIO * min(height, width):
            raise Refused(413, f"an image may be {MAX_RATIO} times as long as wide")
        try:
            padded = self.model.padded_size(height, width)
        except ValueError as error:  # a model of a fixed size
            raise Refused(413, str(error)) from None
        if math.prod(padded) > MAX_PADDED:
            raise Refused(413, f"an image may have {MAX_PADDED} pixels with padding")

    # ------------------------------------------------------------------------------- connections
    def process_request(self, request, client_address):
        """Starts a thread, or says that there are too many."""
        if self.slots.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        with contextlib.suppress(OSError):
            request.setblocking(False)
            request.send(
                b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\n"
                b"Content-Type: text/plain\r\nContent-Length: 21\r\n\r\ntoo many connections\n"
            )
            request.shutdown(socket.SHUT_WR)
        self.leaving.append((time.monotonic() + 2, request))

    def process_request_thread(self, request, client_address):
        """The thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.slots.release()

    def service_actions(self):
        """Reads what those send who were told to come back: closing at once takes the answer back.

        `serve_forever` calls it between connections.
        """
        for _ in range(len(self.leaving)):
            until, connection = self.leaving.popleft()
            try:
                there = connection.recv(1 << 16) != b""
            except BlockingIOError:
                there = True
            except OSError:
                there = False
            if there and time.monotonic() < until and len(self.leaving) < 4 * CONNECTIONS:
                self.leaving.append((until, connection))
            else:
                connection.close()

    def server_close(self):
        """Waits for the answers under way."""
        super().server_close()
        for _, connection in self.leaving:
            connection.close()
        while not self.decoders.empty():
            self.decoders.get().close()


def distinct_colors(count: int = 256) -> list[tuple[int, ...]]:
    """Colours of classes for which the model has none: hues by the golden ratio."""
    hues = (colorsys.hsv_to_rgb(0.618034 * i % 1, 0.75, 1 - 0.3 * (i % 2)) for i in range(count))
    return [tuple(round(255 * part) for part in color) for color in hues]


class Until(io.RawIOBase):
    """What comes through a connection up to a moment, however slowly."""

    def __init__(self, connection, moment):
        self.connection, self.moment = connection, moment

    def readable(self):
        """It is."""
        return True

    def readinto(self, buffer):
        """Raises `TimeoutError` from that moment on."""
        if (left := self.moment - time.monotonic()) <= 0:
            raise TimeoutError
        self.connection.settimeout(left)
        return self.connection.recv_into(buffer)


class Handler(BaseHTTPRequestHandler):
    """Answers one request; nothing that a client sends ends the server."""

    server: Server
    protocol_version = "HTTP/1.1"

    def setup(self):
        """One deadline for all of the request: line, headers, and body."""
        super().setup()
        self.rfile.close()
        self.rfile = io.BufferedReader(Until(self.connection, time.monotonic() + SECONDS), 1 << 16)

    def do_GET(self) -> None:
        """Answers with the page."""
        if urlsplit(self.path).path != "/":
            self.reply(404, "there is only the page / here")
            return
        policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
        policy += "img-src blob: data:; connect-src 'self'"  # nothing from elsewhere
        kind = {"Content-Type": "text/html; charset=utf-8"}
        self.reply(200, self.server.page, kind | {"Content-Security-Policy": policy})

    def do_POST(self):
        """Answers an image, or why there is no answer."""
        try:
            overlay = parse_qs(urlsplit(self.path).query).get("overlay", ["0"])[0]
            if not overlay.replace(".", "", 1).isdecimal() or float(overlay) > 1:
                raise Refused(400, "overlay must be a number from 0 to 1")
            kind = self.headers.get("Content-Type", "")
            png, shares = self.server.answer(b"".join(self.pieces()), kind, float(overlay))
            self.reply(200, png, {"Content-Type": "image/png", "Classes": json.dumps(shares)})
        except Refused as error:
            self.reply(*error.args)
        except TimeoutError:
            self.reply(408, "the body did not come in time")
        except Exception as error:
            self.log_error("%r", error)
            self.reply(500, "internal error")

    def pieces(self):
        """The body as it comes, by its length or in chunks, up to the limit of its size."""
        chunked = self.headers.get("Transfer-Encoding", "").lower() == "chunked"
        total, more = 0, True
        while more:
            size = self.rfile.readline(64) if chunked else self.headers.get("Content-Length", "")
            try:
                n = int(size.split(b";")[0], 16) if chunked else int(size)
            except ValueError:
                n = -1
            if n < 0 or total + n == 0:
                raise Refused(400, "the body is empty, or its length is missing")
            total += n + (8 if total and chunked else 0)  # or tiny chunks would cost nothing
            if total > MAX_BYTES:
                raise Refused(413, f"a body may have {MAX_BYTES} bytes")
            more = chunked and n > 0
            while n:
                if not (piece := self.rfile.read1(min(n, 1 << 16))):
                    raise Refused(400, "the body ended early")
                n -= len(piece)
                yield piece
            if chunked:
                self.rfile.readline(64)  # the rest of the line after a chunk

    def reply(self, status: int, body: bytes | str, headers: dict[str, str] | None = None) -> None:
        """Sends what was asked for, or the reason of an error, and ends the connection."""
        with contextlib.suppress(OSError):  # a client that has gone
            self.connection.settimeout(SECONDS)
            self.send_response(status)
            body = f"{body}\n".encode() if isinstance(body, str) else body
            standard = {"Content-Type": "text/plain", "Content-Length": str(len(body))}
            standard |= {"Retry-After": "1"} if status == 503 else {}
            for header in (standard | (headers or {}) | {"Connection": "close"}).items():
                self.send_header(*header)
            self.end_headers()
            self.wfile.write(body)
            # Reads on for a while if the body was refused: closing now would take the answer back.
            until = time.monotonic() + (2 if status >= 400 else 0)
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(1)
            while time.monotonic() < until and self.connection.recv(1 << 16):
                pass

    def send_error(self, code, message=None, explain=None):
        """What the base class says of a request that it does not understand."""
        self.request_version = self.protocol_version  # of 0.9, answers would have no status
        self.reply(int(code), message or http.HTTPStatus(code).phrase)

    def version_string(self):
        """For the header `Server`: nobody needs to know which versions run here."""
        return "resfu"


def serve(path: str | os.PathLike[str], host: str, port: int, multiple: int | None = None) -> None:
    """Serves an exported model until SIGINT or SIGTERM, and then ends what is under way.

    Prints the address when it answers there. Port 0 is any that is free.

    Args:
      path: a file of `resfu_jax.export.export_model`.
      host: address to listen at; 0.0.0.0 is every one that this machine has.
      port: its port.
      multiple: pads sides to multiples of it: fewer shapes to compile.

    Raises:
      FileNotFoundError: there is no such file.
      OSError: the address is taken, or not this machine's.
      ValueError: an argument is out of range, or the model is none that gives labels.
    """
    from resfu_jax.serving import load_exported  # here, since processes that decode need no JAX

    if not 0 <= port <= 65535:
        raise ValueError(f"port must be 0 .. 65535, got {port}")
    print(f"loading and compiling {path}", file=sys.stderr, flush=True)
    try:
        server = Server((host, port), load_exported(path, multiple=multiple))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise OSError(
            f"cannot listen on {host}:{port}: {error}; port 0 takes a free one"
        ) from error
    with server:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
        print(f"serving {path} on http://{host}:{server.server_port}", flush=True)
        server.serve_forever(0.1)


if __name__ == "__main__" and sys.argv[1:] == ["--decode"]:
    decode()
