"""The HTTP example, on loopback: right answers to many at once, clean errors to bad requests."""

import contextlib
import http.client
import importlib.util
import io
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from flax import nnx
from PIL import Image

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


@pytest.fixture(scope="module")
def serve():
    spec = importlib.util.spec_from_file_location("serve", ROOT / "examples" / "serve.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def server(serve, path):
    with serve.Server(("127.0.0.1", 0), load_exported(path, multiple=32)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def limits(serve, monkeypatch):
    """Limits that tests can reach."""
    monkeypatch.setattr(serve, "MAX_BYTES", 100_000)
    monkeypatch.setattr(serve, "MAX_PIXELS", 1000)
    monkeypatch.setattr(serve, "SECONDS", 0.5)
    monkeypatch.setattr(serve.Handler, "timeout", 0.5)


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


BIG = picture(3, 200, 200).tobytes()


@pytest.mark.parametrize(
    "body, status, reason",
    [
        (BIG, 413, "a body may have 100000 bytes"),
        (iter([BIG[:60_000]] * 4), 413, "a body may have 100000 bytes"),
        (encoded(picture(0, 30, 40)), 413, "an image may have 1000 pixels"),
        (b"", 400, "the body is empty"),
        (iter([]), 400, "the body is empty"),
        (b"no image at all", 415, "the body is none of JPEG, PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 415, "the body is none of"),
        (encoded(picture(0))[:900], 400, "the image cannot be read"),
        (encoded(picture(0), "JPEG")[:500], 400, "the image cannot be read"),
        (encoded(picture(0))[:60] + b"x" * 50, 400, "the image cannot be read"),
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


def test_other_models_are_refused(serve, path, tmp_path):
    model = SegmentationModel(Pixels(), Brightest())
    other = export_model(model, tmp_path / "m.zip", output="logits", platforms=("cpu",))
    with pytest.raises(ValueError, match="must be exported with output='labels'"):
        serve.Server(("127.0.0.1", 0), load_exported(other))


def test_the_command_serves_and_ends_cleanly(path):
    command = [sys.executable, "examples/serve.py", "--model", str(path), "--port", "0"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            port = int(process.stdout.readline().rpartition(":")[2])
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            with contextlib.closing(connection):
                connection.request("POST", "/", encoded(picture(4)))
                assert (labels(connection.getresponse().read()) == picture(4).argmax(axis=-1)).all()
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=30) == 0
        finally:
            process.kill()
