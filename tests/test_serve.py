"""The HTTP server, on loopback: right answers to many at once, clean errors to bad requests."""

import contextlib
import http.client
import io
import json
import math
import os
import pathlib
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from resfu_jax import server as serve
from resfu_jax.export import export_model
from resfu_jax.model import SegmentationModel
from resfu_jax.serving import load_exported

ROOT = pathlib.Path(__file__).parent.parent
PALETTE = ((255, 0, 0), (0, 255, 0), (0, 0, 255))


class Pixels(nnx.Module):
    """A backbone that passes images through."""

    strides = (16,)

    def __call__(self, images):
        return (images,)


class Brightest(nnx.Module):
    """A head whose classes are the colours: the label is the largest channel."""

    def __call__(self, features, images):
        return features[0]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    model = SegmentationModel(Pixels(), Brightest(), mean=(0, 0, 0), std=(1, 1, 1))
    path = tmp_path_factory.mktemp("serve") / "model.zip"
    return export_model(model, path, class_names=("r", "g", "b"), palette=PALETTE)


@contextlib.contextmanager
def serving(server):
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def server(path):
    with serving(serve.Server(("127.0.0.1", 0), load_exported(path, multiple=32))) as server:
        yield server


@pytest.fixture
def limits(monkeypatch):
    """Limits that tests can reach."""
    monkeypatch.setattr(serve, "MAX_BYTES", 100_000)
    monkeypatch.setattr(serve, "MAX_PIXELS", 1000)
    monkeypatch.setattr(serve, "SECONDS", 0.5)


def picture(seed, height=24, width=40):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def encoded(image, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


def post(server, body, path="/", **options):
    """Status, kind and body of the answer."""
    connection = http.client.HTTPConnection(*server.server_address, timeout=20)
    with contextlib.closing(connection):
        connection.request("POST", path, body, **options)
        answer = connection.getresponse()
        return answer.status, answer.headers["Content-Type"], answer.read()


def raw(server, request):
    """The answer to these bytes, after which the client says no more."""
    with socket.create_connection(server.server_address, timeout=20) as connection:
        connection.sendall(request)
        answer = b""
        while piece := connection.recv(1 << 16):
            answer += piece
    return answer


def labels(png):
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG" and image.mode == "P"
        assert image.getpalette()[:9] == [value for color in PALETTE for value in color]
        return np.asarray(image)


def assert_answers(server, seed=0):
    image = picture(seed)
    status, kind, png = post(server, encoded(image))
    assert (status, kind) == (200, "image/png")
    np.testing.assert_array_equal(labels(png), image.argmax(axis=-1))


def test_requests_at_once_each_get_their_own_answer(server):
    barrier = threading.Barrier(8)

    def client(seed):
        barrier.wait()
        for repeat in range(3):
            assert_answers(server, 10 * seed + repeat)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(client, range(8)))


def test_chunked_bodies_and_other_formats(server):
    image = picture(1, 7, 9)
    body = encoded(image)
    pieces = (body[i : i + 50] for i in range(0, len(body), 50))
    status, _, png = post(server, pieces, encode_chunked=True, headers={})
    assert status == 200
    np.testing.assert_array_equal(labels(png), image.argmax(axis=-1))
    grey = np.full((5, 6), 7, np.uint8)
    assert (labels(post(server, encoded(grey, "BMP"))[2]) == 0).all()


def test_overlay(server):
    image = picture(2)
    status, _, png = post(server, encoded(image), "/?overlay=0.5")
    with Image.open(io.BytesIO(png)) as answer:
        colors = np.asarray(PALETTE)[image.argmax(axis=-1)]
        np.testing.assert_allclose(np.asarray(answer), (image + colors) / 2, atol=1)
    for wrong in ("2", "nan", "-0.1", "x", "1e9"):
        status, _, reason = post(server, encoded(image), f"/?overlay={wrong}")
        assert (status, reason) == (400, b"overlay must be a number from 0 to 1\n")


def of_size(width, height):
    """A PNG of few bytes, whose header says this."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def of_scans(count, side=1024):
    """A progressive JPEG whose last scan comes again and again."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), (7, 9, 200)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    start = data.rfind(b"\xff\xda")
    return data[:start] + data[start:-2] * count + data[-2:]


@pytest.mark.parametrize(
    "size", [(65536, 1), (4194304, 1), (1, 2**31 - 1), (50000, 50000), (2**31 - 1, 2**31 - 1)]
)
def test_sizes_are_refused_before_there_is_anything_to_decode(server, size):
    assert len(of_size(*size)) < 100
    status, _, reason = post(server, of_size(*size))
    assert status == 413 and reason.startswith(b"an image may"), reason
    assert_answers(server)


def test_padding_counts(server, path, monkeypatch):
    monkeypatch.setattr(serve, "MAX_PADDED", 3000)
    assert_answers(server)  # 24 x 40 are 32 x 64
    status, _, reason = post(server, encoded(picture(0, 40, 60)))
    assert (status, reason) == (413, b"an image may have 3000 pixels with padding\n")
    with pytest.raises(ValueError, match=r"pads images to \(64, 64\), beyond 3000 pixels"):
        serve.Server(("127.0.0.1", 0), load_exported(path, multiple=64))


def test_a_model_of_a_fixed_size_refuses_larger_images(tmp_path):
    model = SegmentationModel(Pixels(), Brightest(), mean=(0, 0, 0), std=(1, 1, 1))
    options = dict(size=(32, 48), batch=1, platforms=("cpu",), palette=PALETTE)
    path = export_model(model, tmp_path / "m.zip", **options)
    with serving(serve.Server(("127.0.0.1", 0), load_exported(path))) as server:
        assert_answers(server)
        status, _, reason = post(server, encoded(picture(0, 33, 40)))
        assert status == 413 and b"or smaller images, got 33x40" in reason


def test_decoding_has_a_limit_of_time(server, monkeypatch):
    body = of_scans(5000)
    assert len(body) < 250_000
    monkeypatch.setattr(serve, "DECODE_SECONDS", 0.3)
    start = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        answer = pool.submit(post, server, body)
        status, _, reason = answer.result()
    assert (status, reason) == (413, b"decoding the image takes more than 0.3 s\n")
    assert time.monotonic() - start < 15
    monkeypatch.undo()
    for seed in range(4):  # both processes are there again
        assert_answers(server, seed)
    assert post(server, of_scans(10))[0] == 200


def test_decoding_has_a_limit_of_memory(monkeypatch):
    monkeypatch.setattr(serve, "DECODE_SECONDS", 60)
    decoder = serve.Decoder(orientation=True)
    with contextlib.closing(decoder):
        with pytest.raises(serve.Refused) as refused:
            decoder(of_size(40_000, 40_000), lambda height, width: None)
        assert refused.value.args == (413, "the image takes too much memory")
        image = picture(5)
        np.testing.assert_array_equal(decoder(encoded(image), lambda *_: None), image)


def test_a_decoder_that_dies_is_replaced():
    decoder = serve.Decoder(orientation=True)
    with contextlib.closing(decoder):
        decoder.process.kill()
        decoder.process.wait()
        with pytest.raises(serve.Refused, match="cannot be decoded"):
            decoder(encoded(picture(5)), lambda *_: None)
        assert decoder(encoded(picture(5)), lambda *_: None).shape == (24, 40, 3)


def trickle(server, first, piece):
    """Sends `piece` every 50 ms until the connection ends: its answer, and after how long."""
    start, answer = time.monotonic(), b""
    with socket.create_connection(server.server_address, timeout=20) as connection:
        connection.sendall(first)
        connection.settimeout(0.05)
        while time.monotonic() - start < 20:
            try:
                connection.sendall(piece)
                while data := connection.recv(1 << 16):
                    answer += data
                return answer, time.monotonic() - start
            except TimeoutError:
                pass
            except OSError:
                return answer, time.monotonic() - start
    return answer, math.inf


CHUNKED = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "first, piece, status",
    [
        (b"", b"P", None),  # the request's line
        (b"POST / HTTP/1.1\r\nX: ", b"x", None),  # a header
        (b"POST / HTTP/1.1\r\n", b"X: x\r\n", None),  # headers
        (b"POST / HTTP/1.1\r\nContent-Length: 5000\r\n\r\n", b"x", 408),
        (CHUNKED, b"0", 408),  # the line of a chunk
        (CHUNKED + b"5;", b"x", 408),
        (CHUNKED, b"1\r\nx\r\n", 408),  # chunks
    ],
)
def test_slow_requests_are_cut_off_whatever_is_slow(server, limits, first, piece, status):
    answer, seconds = trickle(server, first, piece)
    assert seconds < 10
    if status is not None and answer:  # what is sent on may take it back
        assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert_answers(server)


def test_tiny_chunks_cost_what_they_take(server, monkeypatch):
    monkeypatch.setattr(serve, "MAX_BYTES", 1000)
    status, _, reason = post(server, iter([b"x"] * 200), encode_chunked=True)
    assert (status, reason) == (413, b"a body may have 1000 bytes\n")


def test_fifty_clients_at_once_are_answered(server):
    barrier = threading.Barrier(50)

    def client(seed):
        barrier.wait()
        assert_answers(server, seed)

    with ThreadPoolExecutor(50) as pool:
        list(pool.map(client, range(50)))


def test_too_many_connections_are_told_to_come_back(path, monkeypatch):
    monkeypatch.setattr(serve, "CONNECTIONS", 2)
    with serving(serve.Server(("127.0.0.1", 0), load_exported(path))) as server:
        assert server.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        held = [socket.create_connection(server.server_address) for _ in range(2)]
        time.sleep(0.2)

        def client(seed):
            connection = http.client.HTTPConnection(*server.server_address, timeout=20)
            with contextlib.closing(connection):
                connection.request("POST", "/", encoded(picture(seed)))
                answer = connection.getresponse()
                answer.read()
                return answer.status, answer.headers["Retry-After"]

        with ThreadPoolExecutor(20) as pool:
            assert set(pool.map(client, range(20))) == {(503, "1")}
        for connection in held:
            connection.close()
        deadline = time.monotonic() + 20
        while client(0)[0] == 503 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert_answers(server)


def test_the_server_says_no_versions(server):
    body = encoded(picture(0))
    requests = (
        b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body),
        b"POST / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET /robots.txt HTTP/1.1\r\n\r\n",
        b"nonsense\r\n\r\n",
    )
    for request, status in zip(requests, (200, 400, 200, 404, 400), strict=True):
        answer = raw(server, request)
        head = answer.partition(b"\r\n\r\n")[0]
        assert head.startswith(b"HTTP/1.1 %d " % status), head
        assert b"\r\nServer: resfu\r\n" in head and b"Python" not in answer


def test_a_photo_is_turned_as_viewers_show_it(server):
    image = picture(6)
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(image).transpose(Image.Transpose.ROTATE_90).save(file, "PNG", exif=exif)
    np.testing.assert_array_equal(labels(post(server, file.getvalue())[2]), image.argmax(axis=-1))
    # Or left as it is stored, where the model's preprocessing says so.
    decoder = serve.Decoder(orientation=False)
    np.testing.assert_array_equal(
        decoder(file.getvalue(), lambda height, width: None), np.rot90(image)
    )
    decoder.close()


BIG = picture(3, 200, 200).tobytes()


@pytest.mark.parametrize(
    "body, status, reason",
    [
        (BIG, 413, "a body may have 100000 bytes"),
        (iter([BIG[:60_000]] * 4), 413, "a body may have 100000 bytes"),
        (encoded(picture(0, 30, 40)), 413, "an image may have 1000 pixels"),
        (b"", 400, "the body is empty"),
        (iter([]), 400, "the body is empty"),
        (b"no image at all", 415, "the image: cannot be read as an image: it is none of BMP, GIF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 415, "the image: cannot be read"),
        (encoded(picture(0))[:900], 400, "the image: cannot be read"),
        (encoded(picture(0), "JPEG")[:500], 400, "the image: cannot be read"),
        (encoded(picture(0))[:60] + b"x" * 50, 400, "the image: cannot be read"),
        (of_size(65536, 1), 413, "an image may have 1000 pixels"),
        (of_size(900, 1), 413, "an image may be 16 times as long as wide"),
        (of_size(1, 900), 413, "an image may be 16 times as long as wide"),
    ],
)
def test_bad_bodies_are_refused(server, limits, body, status, reason):
    got, kind, answer = post(server, body, encode_chunked=not isinstance(body, bytes))
    assert (got, kind) == (status, "text/plain")
    assert answer.decode().startswith(reason)
    assert_answers(server)


@pytest.mark.parametrize(
    "request_, status",
    [
        (b"POST / HTTP/1.1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: many\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: -5\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 9999999\r\n\r\n", 413),
        (b"POST / HTTP/1.1\r\nContent-Length: 50\r\n\r\nslow", 408),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFFF\r\n", 413),
        (b"PUT / HTTP/1.1\r\n\r\n", 501),
    ],
)
def test_bad_requests_are_refused(server, limits, request_, status):
    assert raw(server, request_).startswith(f"HTTP/1.1 {status} ".encode())
    assert_answers(server)


def test_a_client_that_goes_away_does_no_harm(server):
    for request in (b"", b"POST / HTTP/1.1\r\nContent-Length: 500\r\n\r\nhalf"):
        with socket.create_connection(server.server_address) as connection:
            connection.sendall(request)
    assert_answers(server)


def test_other_models_are_refused(path, tmp_path):
    model = SegmentationModel(Pixels(), Brightest())
    other = export_model(model, tmp_path / "m.zip", output="logits", platforms=("cpu",))
    with pytest.raises(ValueError, match="must be exported with output='labels'"):
        serve.Server(("127.0.0.1", 0), load_exported(other))


def form(content, name="image", more=b""):
    """A body and its Content-Type, as `curl -F image=@photo.jpg` sends them."""
    part = (
        b'--Xy\r\nContent-Disposition: form-data; name="%b"; filename="a.jpg"\r\n' % name.encode()
    )
    body = more + part + b"Content-Type: image/jpeg\r\n\r\n" + content + b"\r\n--Xy--\r\n"
    return body, {"Content-Type": "multipart/form-data; boundary=Xy"}


def test_forms(server, tmp_path):
    image = picture(7)
    for content in (encoded(image), encoded(image, "BMP"), encoded(image, "TIFF")):
        body, headers = form(content)
        status, kind, png = post(server, body, headers=headers)
        assert (status, kind) == (200, "image/png")
        np.testing.assert_array_equal(labels(png), image.argmax(axis=-1))
    if curl := shutil.which("curl"):
        (tmp_path / "photo.png").write_bytes(encoded(image))
        command = [curl, "-sS", "-F", "image=@photo.png", f"http://localhost:{server.server_port}"]
        png = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True).stdout
        np.testing.assert_array_equal(labels(png), image.argmax(axis=-1))


OTHER = b'--Xy\r\nContent-Disposition: form-data; name="overlay"\r\n\r\n0.5\r\n'
NESTED = b"".join(
    b"--%d\r\nContent-Type: multipart/mixed; boundary=%d\r\n\r\n" % (i, i + 1) for i in range(1500)
)


@pytest.mark.parametrize(
    "body, kind, status, reason",
    [
        (*form(encoded(picture(0)), "photo"), 400, "the form must have one file, image, got photo"),
        (*form(encoded(picture(0)), more=OTHER), 400, "the form must have one file, image, got ov"),
        (*form(b"no image"), 415, "the image: cannot be read"),
        (b"no form", {"Content-Type": "multipart/form-data; boundary=Xy"}, 400, "the form must"),
        (b"no form", {"Content-Type": "multipart/form-data"}, 400, "the form must have one file"),
        (NESTED, {"Content-Type": "multipart/mixed; boundary=0"}, 400, "the form cannot be read"),
        (*form(BIG), 413, "a body may have 100000 bytes"),
    ],
)
def test_bad_forms_are_refused(server, limits, body, kind, status, reason):
    got, kind, answer = post(server, body, headers=kind)
    assert (got, kind) == (status, "text/plain")
    assert answer.decode().startswith(reason), answer
    assert_answers(server)


def test_shares_of_the_classes(server):
    image = np.zeros((4, 8, 3), np.uint8)
    image[:, :6, 2] = 9
    connection = http.client.HTTPConnection(*server.server_address, timeout=20)
    with contextlib.closing(connection):
        connection.request("POST", "/", encoded(image))
        shares = json.loads(connection.getresponse().headers["Classes"])
    assert shares == {"0": 0.25, "2": 0.75}


def test_models_without_colours_get_some(tmp_path):
    """And a program of a fixed size says to the page how large a photo may be."""
    model = SegmentationModel(Pixels(), Brightest(), mean=(0, 0, 0), std=(1, 1, 1))
    path = export_model(model, tmp_path / "m.zip", size=(32, 48), batch=1, platforms=("cpu",))
    with serving(serve.Server(("127.0.0.1", 0), load_exported(path))) as server:
        png = post(server, encoded(picture(0)))[2]
        with Image.open(io.BytesIO(png)) as image:
            colors = image.getpalette()
        assert len({tuple(colors[3 * i : 3 * i + 3]) for i in range(256)}) == 256
        assert b'["class 2", "rgb%b"]' % str(tuple(colors[6:9])).encode() in server.page
        assert b'"sides": [32, 48]' in server.page


def test_a_port_that_is_taken_is_said_before_xla_compiles(server, path, monkeypatch):
    monkeypatch.setattr("resfu_jax.serving.Exported.__call__", lambda *_: pytest.fail("it ran"))
    with pytest.raises(
        OSError, match=f"cannot listen on 127.0.0.1:{server.server_port}: .* in use"
    ):
        serve.serve(path, "127.0.0.1", server.server_port)
    with pytest.raises(ValueError, match="port must be 0 .. 65535, got 70000"):
        serve.serve(path, "127.0.0.1", 70_000)


def test_the_command_serves_and_ends_cleanly(path):
    command = [sys.executable, "examples/serve.py", "--model", str(path), "--port", "0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        try:
            line = process.stdout.readline()
            address = re.fullmatch(rf"serving {path} on http://127\.0\.0\.1:(\d+)\n", line)
            connection = http.client.HTTPConnection("127.0.0.1", int(address[1]), timeout=60)
            with contextlib.closing(connection):
                connection.request("POST", "/", encoded(picture(4)))
                assert (labels(connection.getresponse().read()) == picture(4).argmax(axis=-1)).all()
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=30) == 0
            assert process.stderr.readline() == f"loading and compiling {path}\n"
        finally:
            process.kill()
