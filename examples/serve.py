"""Serves an exported segmentation model over HTTP, with the standard library.

    python examples/serve.py --model camvid.zip --port 8000
    curl --data-binary @street.jpg localhost:8000 -o labels.png
    curl --data-binary @street.jpg 'localhost:8000/?overlay=0.5' -o overlay.png

POST an image; the answer is a PNG of its size: labels as palette indices, or the classes' colours
over the image.
"""

import argparse
import contextlib
import io
import signal
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import numpy as np
from PIL import Image, ImageOps

from resfu_jax.serving import load_exported

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM")  # not EPS: it starts Ghostscript
MAX_BYTES, MAX_PIXELS, SECONDS = 16 << 20, 4 << 20, 30


class Refused(Exception):  # noqa: N818
    """An error to answer: status and reason."""


class Server(ThreadingHTTPServer):
    """A thread for each request; one at a time uses the model."""

    daemon_threads = False  # closing waits for answers under way

    def __init__(self, address, model):
        if model.meta["output"] != "labels" or not model.meta["outputs"][0].startswith("uint8"):
            raise ValueError("the model must be exported with output='labels', up to 256 classes")
        model(np.zeros((1, 64, 64, 3), np.uint8))  # it runs here, one image at a time
        self.model, self.lock = model, threading.Lock()
        super().__init__(address, Handler)

    def answer(self, body, overlay):
        """An encoded image to an encoded label map."""
        try:
            image = Image.open(io.BytesIO(body), formats=FORMATS)
            fits = image.width * image.height <= MAX_PIXELS  # known before it is decoded
            image = ImageOps.exif_transpose(image).convert("RGB") if fits else None
        except Image.UnidentifiedImageError:
            raise Refused(415, f"the body is none of {', '.join(FORMATS)}") from None
        except Exception as error:  # Pillow raises many kinds for broken files
            raise Refused(400, f"the image cannot be read: {error}") from None
        if not fits:
            raise Refused(413, f"an image may have {MAX_PIXELS} pixels")
        with self.lock:
            labels = Image.fromarray(self.model(np.asarray(image)[None])[0])
        labels.putpalette([v for color in self.model.meta["palette"] for v in color] or range(256))
        png = io.BytesIO()
        (Image.blend(image, labels.convert("RGB"), overlay) if overlay else labels).save(png, "PNG")
        return png.getvalue()


class Handler(BaseHTTPRequestHandler):
    """Answers one request; nothing that a client sends ends the server."""

    protocol_version = "HTTP/1.1"
    timeout = SECONDS  # of a client that sends nothing

    def do_POST(self):
        """Answers an image, or why there is no answer."""
        try:
            overlay = parse_qs(urlsplit(self.path).query).get("overlay", ["0"])[0]
            if not overlay.replace(".", "", 1).isdecimal() or float(overlay) > 1:
                raise Refused(400, "overlay must be a number from 0 to 1")
            self.reply(200, self.server.answer(b"".join(self.pieces()), float(overlay)))
        except Refused as error:
            self.reply(*error.args)
        except TimeoutError:
            self.reply(408, "the body did not come in time")
        except Exception as error:
            self.log_error("%r", error)
            self.reply(500, "internal error")

    def pieces(self):
        """The body as it comes, by its length or in chunks, up to the limits of size and time."""
        chunked = self.headers.get("Transfer-Encoding", "").lower() == "chunked"
        deadline, total, more = time.monotonic() + SECONDS, 0, True
        while more:
            size = self.rfile.readline(64) if chunked else self.headers.get("Content-Length", "")
            try:
                n = int(size.split(b";")[0], 16) if chunked else int(size)
            except ValueError:
                n = -1
            if n < 0 or total + n == 0:
                raise Refused(400, "the body is empty, or its length is missing")
            if (total := total + n) > MAX_BYTES:
                raise Refused(413, f"a body may have {MAX_BYTES} bytes")
            more = chunked and n > 0
            while n:
                if time.monotonic() > deadline:
                    raise TimeoutError
                if not (piece := self.rfile.read1(min(n, 1 << 16))):
                    raise Refused(400, "the body ended early")
                n -= len(piece)
                yield piece
            if chunked:
                self.rfile.readline(64)  # the rest of the line after a chunk

    def reply(self, status, body):
        """Sends a PNG, or the reason of an error, and ends the connection."""
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if status >= 400 else "image/png")
        body = f"{body}\n".encode() if status >= 400 else body
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        # Reads on for a while if the body was refused: closing now would take the answer back.
        until = time.monotonic() + (2 if status >= 400 else 0)
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(1)
            while time.monotonic() < until and self.connection.recv(1 << 16):
                pass


def main():
    """Serves until SIGINT or SIGTERM, and then ends what is under way."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="a file of resfu_jax.export.export_model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--multiple", type=int, help="pad sides to it: fewer shapes to compile")
    args = parser.parse_args()
    model = load_exported(args.model, multiple=args.multiple)
    with Server((args.host, args.port), model) as server:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
        print(f"serving {args.model} on http://{args.host}:{server.server_port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
