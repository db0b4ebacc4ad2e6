"""load_upsampler, its catalogue, downloads, and archives of NumPy."""

import collections
import functools
import hashlib
import http.server
import io
import os
import pathlib
import re
import sys
import threading
import urllib.error
import urllib.request
import zipfile

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from weights import (
    CARAFE,
    STATE,
    Global,
    archive,
    carafe,
    carafe_file,
    make_hub,
    same,
    tensor,
    write,
)

import resfu_jax
from resfu_jax import from_torch, load_upsampler
from resfu_jax.cli import main
from resfu_jax.convert import _CONVERTERS, _download, catalogue, released
from resfu_jax.convert._files import _REPOSITORY, read_weights
from resfu_jax.convert.catalogue import RELEASES, Release
from scripts import weights_table

SHARED = goldens._HERE.parent.parent / "shared"
if "RESFU_GOLDENS" in os.environ:
    SHARED = pathlib.Path(os.environ["RESFU_GOLDENS"]).parent


# --------------------------------------------------------------------------------- the catalogue
@pytest.mark.parametrize("name", RELEASES)
def test_entries(name):
    release = RELEASES[name]
    assert name.startswith(release.member)
    assert re.fullmatch(r"https://[\w.-]+(/[\w.-]+)+\.(pth|bin|ckpt|safetensors)", release.url)
    assert release.weights == release.url or _REPOSITORY.fullmatch(release.weights)
    assert release.sha256 is None or re.fullmatch("[0-9a-f]{64}", release.sha256)
    assert release.features is None or release.features in release.arguments.values()
    assert re.fullmatch(r"[\w.-]+/[\w.-]+:\w+", release.official_class)
    assert "" not in (release.license, release.backbone)


def test_names_are_those_of_the_issue():
    expected = {
        *("naf", "anyup", "anyup_multi_backbone", "jafar_dinov2_vits14", "loftup_dinov2s"),
        *("featup_dino16", "uplift_dinov2_s14"),
    }
    assert expected <= RELEASES.keys()
    members = collections.Counter(release.member for release in RELEASES.values())
    assert members == dict(naf=1, anyup=2, jafar=7, loftup=7, featup=11, uplift=3)
    assert len({release.url for release in RELEASES.values()}) == len(RELEASES)


@pytest.mark.parametrize(
    "name",
    [
        next(n for n, r in RELEASES.items() if r is release)
        for release in released._networks(RELEASES)
    ],
)
def test_networks_can_be_built(name):
    """Their classes and arguments are such that only the weights are missing."""
    release = RELEASES[name]
    assert release.member in resfu_jax.list_upsamplers()
    with pytest.raises(ValueError, match="state_dict does not fit .*missing"):
        from_torch(release.official_class, {}, **release.arguments)


def test_the_docs_have_the_catalogue():
    assert weights_table.PAGE.read_text() == weights_table.page(), (
        "python -m scripts.weights_table writes it anew"
    )
    assert all(f"| `{name}` |" in weights_table.page() for name in RELEASES)


def test_sums_are_those_of_the_goldens():
    for golden, name in {"anyup_paper": "anyup", "anyup_multi_backbone": None}.items():
        path = goldens._PLACES[0] / f"{golden}.npz"
        if path.exists():  # too large for a clone
            with np.load(path) as z:
                meta = str(z["meta"])
            assert RELEASES[name or golden].sha256 in meta


def test_the_command_lists_them(capsys):
    assert main(["upsamplers", "--weights"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, release in RELEASES.items():
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        for text in (release.member, release.backbone, release.license, release.url.split("/")[2]):
            assert text in line
    assert main(["upsamplers", "--weights", "jafar", "anyup_multi_backbone"]) == 0
    text = capsys.readouterr().out
    for name, release in RELEASES.items():
        told = release.member == "jafar" or name == "anyup_multi_backbone"
        assert (release.url in text) is told
    assert RELEASES["anyup_multi_backbone"].sha256 in text
    assert main(["upsamplers", "--weights", "jafarr"]) == 1
    assert "did you mean 'jafar'" in capsys.readouterr().err


# -------------------------------------------------------------------- made-up releases, and a site
ADDRESS = "https://example.org/releases/carafe.pth"
WIDE = goldens.load("carafe_s2_k5_g2")


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    return carafe_file(tmp_path_factory.mktemp("content") / "carafe.pth").read_bytes()


def release(**changes):
    facts = dict(
        member="carafe",
        weights=ADDRESS,
        license="MIT",
        official_class="open-mmlab/mmcv:CARAFEPack",
        arguments=CARAFE.args,
        backbone="any",
        features=CARAFE.args["channels"],
        image="unit",
    )
    return Release(**facts | changes)


@pytest.fixture
def releases(monkeypatch):
    made_up = {"carafe_small": release()}
    monkeypatch.setattr(catalogue, "RELEASES", made_up)
    monkeypatch.setattr(released, "RELEASES", made_up)
    return made_up


class Site:
    """Files by path, and the paths that were asked for; they are had by http instead of https."""

    def __init__(self):
        self.files, self.asked, self.headers = {}, [], {}
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                site.asked.append(self.path)
                body = site.files.get(self.path)
                self.send_response(200 if body is not None else 404)
                for item in ({"Content-Length": str(len(body or b""))} | site.headers).items():
                    self.send_header(*item)
                self.end_headers()
                self.wfile.write(body or b"")

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def open(self, url):
        path = "/" + url.split("/", 3)[3]
        return urllib.request.urlopen(f"http://127.0.0.1:{self.server.server_port}{path}")


@pytest.fixture
def site(monkeypatch, tmp_path, content):
    site = Site()
    site.files["/releases/carafe.pth"] = content
    monkeypatch.setattr(_download, "_open", site.open)
    monkeypatch.setenv("RESFU_WEIGHTS_DIR", str(tmp_path / "kept"))
    yield site
    site.server.shutdown()
    site.server.server_close()


def kept(tmp_path):
    return [path for path in (tmp_path / "kept").rglob("*") if path.is_file()]


def test_released_files_are_fetched_once(site, releases, content, tmp_path):
    for sha256 in (None, hashlib.sha256(content).hexdigest()):
        releases["carafe_small"] = release(sha256=sha256)
        same(load_upsampler("carafe_small"), carafe(STATE))
        same(load_upsampler("carafe"), carafe(STATE))  # the only one of that member
    same(from_torch("CARAFEPack", ADDRESS, **CARAFE.args), carafe(STATE))
    assert site.asked == ["/releases/carafe.pth"]
    (path,) = kept(tmp_path)
    assert path.name == "carafe.pth" and path.read_bytes() == content


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        (dict(RESFU_WEIGHTS_DIR="~/here", XDG_CACHE_HOME="x"), "here"),
        (dict(XDG_CACHE_HOME="~/caches"), "caches/resfu_jax/weights"),
        ({}, ".cache/resfu_jax/weights"),
    ],
)
def test_where_files_are_kept(site, tmp_path, monkeypatch, variables, place):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RESFU_WEIGHTS_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    path = _download.download(ADDRESS)
    assert path.parent.parent == tmp_path / place


def test_addresses_are_told_apart_and_stay_in_their_folder(site, tmp_path):
    odd = ["a/w.pth", "b/w.pth", "..%2f..%2fw.pth", "a/..", "w.pth?token=1/../2", "d/", "%2e%2e"]
    for path in odd:
        site.files[f"/{path}"] = path.encode()
    found = [_download.download(f"https://example.org/{path}") for path in odd]
    assert [path.read_bytes().decode() for path in found] == odd
    assert all(path.parent.parent == tmp_path / "kept" for path in found)


def test_a_file_with_another_sum_is_not_taken(site, releases, content, tmp_path):
    releases["carafe_small"] = release(sha256="0" * 64)
    with pytest.raises(ValueError, match="not the file that was published: its SHA-256 is .*00000"):
        load_upsampler("carafe_small")
    assert not kept(tmp_path)
    releases["carafe_small"] = release(sha256=hashlib.sha256(content).hexdigest())
    load_upsampler("carafe_small")
    (path,) = kept(tmp_path)
    path.write_bytes(content[:-1] + b"x")
    with pytest.raises(ValueError, match=f"{path.name} is damaged: .*Delete it, and it is fetched"):
        load_upsampler("carafe_small")
    path.unlink()
    same(load_upsampler("carafe_small"), carafe(STATE))


def test_what_does_not_come_whole_is_not_kept(site, releases, content, tmp_path):
    def message():
        with pytest.raises(FileNotFoundError) as error:
            load_upsampler("carafe_small")
        assert not kept(tmp_path)
        text = str(error.value)
        assert f"Get {ADDRESS} in another way" in text
        assert "load_upsampler('carafe_small', weights='path')" in text
        return text

    site.headers["Content-Length"] = str(len(content) + 5)
    assert f"the connection ended after {len(content)} of {len(content) + 5} bytes" in message()
    site.headers.clear()
    site.files["/releases/carafe.pth"] = b"\n<!DOCTYPE html><html>Please log in</html>"
    assert "it is a web page" in message()
    del site.files["/releases/carafe.pth"]
    assert "HTTP Error 404" in message()


def test_without_a_connection(releases, tmp_path, monkeypatch):
    """The real way, to an address that no server is at."""
    monkeypatch.setenv("RESFU_WEIGHTS_DIR", str(tmp_path / "kept"))
    monkeypatch.setitem(releases, "carafe_small", release(weights="https://127.0.0.1:9/carafe.pth"))
    with pytest.raises(FileNotFoundError, match=r"URLError.*\nGet https://127.0.0.1:9/carafe.pth"):
        load_upsampler("carafe_small")
    assert not kept(tmp_path)


def test_https_only_also_when_redirected():
    for url in ("http://example.org/a.pth", "ftp://example.org/a.pth", "https:///a", "file:///a"):
        with pytest.raises(ValueError, match="by https only, got "):
            _download.download(url)
    follow = functools.partial(
        _download._StayHttps().redirect_request,
        urllib.request.Request("https://example.org/a"),
        None,
        302,
        "Found",
        {},
    )
    assert follow("https://example.com/b").full_url == "https://example.com/b"
    with pytest.raises(urllib.error.URLError, match="http://example.com/b, which is not https"):
        follow("http://example.com/b")


def test_progress_is_shown_to_a_terminal_only(site, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        site.files["/a.pth"] = bytes(10**6)
        path = _download.download("https://example.org/a.pth")
        assert ("a.pth" in stream.getvalue()) is isinstance(stream, Terminal)
        path.unlink()


def test_without_tqdm_a_line_tells_of_a_download(site, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    site.files["/a.pth"] = bytes(10**6)
    assert _download.download("https://example.org/a.pth").stat().st_size == 10**6
    assert capsys.readouterr().err == "fetching a.pth, 1.0 MB\n"


def test_released_files_of_the_hub(releases, content, tmp_path, monkeypatch):
    releases["carafe_small"] = release(weights="owner/carafe:w.bin")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r"resfu_jax\[hub\](.|\n)*weights='path'") as error:
        load_upsampler("carafe_small")
    assert "https://huggingface.co/owner/carafe/resolve/main/w.bin" in str(error.value)
    hub = make_hub(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    hub.files["w.bin"] = content
    same(load_upsampler("carafe_small"), carafe(STATE))
    same(load_upsampler("carafe_small", "owner/carafe:w.bin"), carafe(STATE))
    assert hub.calls == ["w.bin"] * 2


# ------------------------------------------------------------------------------------ given files
@pytest.mark.parametrize("name", ["a.pth", "a.ckpt", "a.safetensors", "a.npz", "a"])
def test_files_at_hand(name, releases, tmp_path):
    path = tmp_path / name
    if name.endswith(".npz"):
        np.savez(path, **STATE, meta=np.array("a remark"))
    else:
        (write(path, STATE) if name.endswith("tensors") else carafe_file(path))
    for given in (path, str(path)):
        same(load_upsampler("carafe_small", weights=given), carafe(STATE))
    same(load_upsampler("carafe", STATE), carafe(STATE))
    up = load_upsampler("carafe_small", path, dtype=jnp.bfloat16, implementation="xla")
    assert up.dtype == jnp.bfloat16 and up.implementation == "xla"


def test_part_of_a_larger_checkpoint(releases, tmp_path):
    larger = {f"net.up.{k}": v for k, v in STATE.items()} | {"net.w": np.ones(3, np.float32)}
    path = write(tmp_path / "a.safetensors", larger)
    with pytest.raises(ValueError, match="mean these with prefix='net.up.'"):
        load_upsampler("carafe_small", path)
    same(load_upsampler("carafe_small", path, prefix="net.up"), carafe(STATE))


def test_a_member_and_a_file_of_one_of_its_networks(releases):
    releases["carafe_wide"] = release(arguments=WIDE.args, weights=f"{ADDRESS}.wide")
    wide = WIDE.group("param")
    same(load_upsampler("carafe", wide), from_torch("CARAFEPack", wide, **WIDE.args))
    same(load_upsampler("carafe", STATE), carafe(STATE))
    with pytest.raises(ValueError, match="2 released models, .*choose one by its name") as error:
        load_upsampler("carafe")
    assert "They are carafe_small (any), carafe_wide (any)" in str(error.value)
    with pytest.raises(ValueError, match="fit CARAFEPack: it holds the network of 'carafe_wide';"):
        load_upsampler("carafe_small", wide)
    with pytest.raises(ValueError, match="does not fit CARAFEPack: it has none of the names"):
        load_upsampler("carafe", {"a": np.ones(2)})


def test_mistakes_are_told_before_anything_is_fetched(site, releases):
    for name, message in {
        "carafe_smal": "unknown released weights 'carafe_smal'; did you mean 'carafe_small'",
        "carave": "did you mean 'carafe'",
        "sapa": "unknown released weights 'sapa'",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_upsampler(name)
    for options, message in [
        (dict(chanels=3), "unknown argument of open-mmlab/mmcv:CARAFEPack 'chanels'; did you mean"),
        (dict(dtype=jnp.int8), "dtype must be"),
        (dict(up_kernel=-1), "up_kernel"),
    ]:
        for weights in (None, "nowhere.pth"):
            with pytest.raises(ValueError, match=message):
                load_upsampler("carafe_small", weights, **options)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth does not exist"):
        load_upsampler("carafe_small", "nowhere.pth")
    assert not site.asked


def test_hostile_files(releases, tmp_path):
    """What from_torch refuses is refused here, too: it is the same reader."""
    state = {k: tensor(v, str(i)) for i, (k, v) in enumerate(STATE.items())}
    storages = {str(i): v.tobytes() for i, v in enumerate(STATE.values())}
    path = archive(tmp_path / "a.pth", state | {"x": Global("os.system", "touch x")}, storages)
    with pytest.raises(ValueError, match="names 'os.system', which would be run by torch.load"):
        load_upsampler("carafe_small", path)
    bomb = archive(tmp_path / "b.pth", state, storages, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="compressed"):
        load_upsampler("carafe_small", bomb)


# ------------------------------------------------------------------------------ archives of NumPy
def test_archives_of_numpy(tmp_path):
    arrays = {
        "a.b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big": np.arange(3, dtype=">f4"),
        "half": np.arange(3, dtype=np.float16),
        "empty": np.zeros((0, 2), np.float32),
        "scalar": np.float64(3),
        "integers": np.arange(4),
    }
    np.savez(tmp_path / "a.npz", **arrays, note=np.array("text"), bytes=np.array(b"x"))
    np.savez_compressed(tmp_path / "b.npz", **arrays)
    for path in (tmp_path / "a.npz", tmp_path / "b.npz"):
        found = read_weights(path)
        assert found.keys() == arrays.keys()
        for name, expected in arrays.items():
            assert found[name].shape == np.shape(expected)
            np.testing.assert_array_equal(found[name], expected)


class Explosive:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_archives_of_numpy_are_not_unpickled(releases, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    objects = np.array([Explosive()], object)
    np.savez("a.npz", **STATE, beside=objects)
    with pytest.raises(ValueError, match="'beside' holds Python objects, which .*might execute"):
        load_upsampler("carafe_small", "a.npz")
    structured = np.zeros(1, [("a", object)])
    np.savez("b.npz", **STATE, beside=structured)
    with pytest.raises(ValueError, match="'beside' holds Python objects"):
        read_weights("b.npz")
    # A header that says numbers, over a pickle; a pickle instead of an array.
    np.savez("c.npz", **STATE)
    with zipfile.ZipFile("c.npz", "a") as z:
        z.writestr("x.npy", b"\x80\x04cos\nsystem\n.")
    with pytest.raises(ValueError, match="damaged, or no archive of numpy.savez .*'x'"):
        read_weights("c.npz")
    assert not pathlib.Path("exploded").exists()


def test_damaged_archives_of_numpy(tmp_path):
    def header(shape, dtype="<f4"):
        buffer = io.BytesIO()
        facts = dict(descr=dtype, fortran_order=False, shape=shape)
        np.lib.format.write_array_header_1_0(buffer, facts)
        return buffer.getvalue()

    def message(content, compression=zipfile.ZIP_STORED):
        path = tmp_path / "a.npz"
        with zipfile.ZipFile(path, "w", compression) as z:
            z.writestr("w.npy", content)
        with pytest.raises(ValueError, match=r"a\.npz is damaged.*'w'") as error:
            np.asarray(read_weights(path)["w"])
        assert len(str(error.value)) < 1000

    message(b"")
    message(b"\x93NUMPY\x01\x00")
    message(header((3,))[:-20])
    message(header((3,)))
    message(header((3,)) + bytes(13))
    message(header((2**60,)))
    message(header((3,), "<f99"))
    message(b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + b"(" * 10**6)

    np.savez(tmp_path / "b.npz", **STATE)
    whole = (tmp_path / "b.npz").read_bytes()
    damaged = bytearray(whole)
    damaged[whole.index(next(iter(STATE.values())).tobytes())] ^= 1
    for content in (bytes(damaged), whole[: len(whole) // 2], whole[:30]):
        (tmp_path / "c.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"c\.npz"):
            carafe(tmp_path / "c.npz")


def test_a_compressed_archive_is_not_unpacked_for_nothing(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", weight=np.zeros(2**22, np.float32))
    assert (tmp_path / "a.npz").stat().st_size < 2**15
    monkeypatch.setattr(np.lib.format, "read_array", None)
    with pytest.raises(ValueError, match=r"'weight' has shape \(4194304,\)"):
        from_torch(
            "ConvTranspose2d", tmp_path / "a.npz", in_channels=1, out_channels=1, kernel_size=1
        )


# --------------------------------------------------------------------------- wrappers, all members
def smallest(name):
    """The smallest golden file of an official class, by name."""
    official = name.replace("pytorch/pytorch:", "torch:torch.nn.")
    files = [
        (entry["path"].stat().st_size, golden)
        for golden, entry in goldens.index().items()
        if f"{entry['repo']}:{entry['official_class']}".partition(" (")[0] == official
        and any(array.startswith("param/") for array in entry["arrays"])
    ]
    return min(files)[1] if files else None


SMALLEST = {name: golden for name in _CONVERTERS if (golden := smallest(name))}


def test_classes_without_a_golden_file_wrap_those_that_have_one():
    assert _CONVERTERS.keys() - SMALLEST.keys() <= {"andrehuang/loftup:UpsamplerwithChannelNorm"}


@pytest.mark.parametrize("name", SMALLEST)
def test_prefixes_of_wrappers(name):
    g = goldens.load(SMALLEST[name])
    state = g.group("param")
    expected = from_torch(name, state, **g.args)
    for prefix in ("module.", "_orig_mod.", "model.", "module._orig_mod.model."):
        wrapped = {prefix + key: value for key, value in state.items()}
        same(from_torch(name, wrapped, **g.args), expected)
    trainers = {"state_dict": wrapped, "optimizer": {"state": {0: np.ones(2)}}, "epoch": 3}
    same(from_torch(name, trainers, **g.args), expected)


# --------------------------------------------------------------------------------- real weights
PRETRAINED = {
    "anyup_pretrained_paper_64": ("anyup", SHARED / "goldens/anyup_paper.npz"),
    "anyup_pretrained_multi_64": (
        "anyup_multi_backbone",
        SHARED / "goldens/anyup_multi_backbone.npz",
    ),
    "jafar_pretrained_dinov2_vits14_10x14": (
        "jafar_dinov2_vits14",
        SHARED / "weights/jafar_dinov2_vits14.safetensors",
    ),
}


# Those that are here: they are too large for a clone.
@pytest.mark.parametrize("name", [n for n in PRETRAINED if n in goldens.index()])
@pytest.mark.parametrize("x64", [False, True], ids=["float32", "x64"])
def test_released_weights_give_the_released_features(name, x64):
    with jax.enable_x64(x64):
        g = goldens.load(name, x64=x64)
        release, path = PRETRAINED[name]
        up = load_upsampler(release, path)
        x, image = (jnp.asarray(goldens.nhwc(g.arrays[f"in/{n}"])) for n in ("features", "image"))
        size = tuple(g.meta["output_size"])
        y = jax.jit(lambda x, image: up(x, image, size))(x, image)
        goldens.assert_close(y, goldens.nhwc(g.arrays["out/y"]), g.tol_out, "y")
    member = RELEASES[release].member
    assert nnx.graphdef(load_upsampler(member, path)) == nnx.graphdef(up)
