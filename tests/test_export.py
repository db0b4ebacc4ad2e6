"""Exported files: the model's values, in a process that has none of its code."""

import json
import pathlib
import subprocess
import sys
import tracemalloc
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import resfu_jax
from resfu_jax import create_upsampler, serving
from resfu_jax.backbones import create_backbone
from resfu_jax.export import PLATFORMS, export_model, export_module
from resfu_jax.inference import Inference
from resfu_jax.model import SegmentationModel, create_model, evaluating
from resfu_jax.predictor import Predictor
from resfu_jax.serving import load_exported

VIT = dict(name="vit", width=16, depth=1, heads=2, patch_size=16, image_size=32)
MIT = dict(widths=(4, 8, 8, 8), depths=(1, 1, 1, 1), heads=(1, 1, 2, 2), sr_ratios=(4, 2, 1, 1))
NAMES, COLORS = ("sky", "road", "car"), ((1, 2, 3), (40, 50, 60), (7, 80, 9))


def tiny(backbone=VIT, upsampler="bilinear", **options):
    head = dict(name="linear", upsampler=upsampler, width=8, stem_width=8)
    if backbone["name"] == "mit":
        head = dict(name="segformer", upsampler=upsampler, width=8)
    rngs = nnx.Rngs(0)
    return create_model(backbone=backbone, head=head, num_classes=3, rngs=rngs, **options)


def images(*shape):
    return np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)


class Pixels(nnx.Module):
    """A backbone with nothing to compile."""

    def __init__(self, strides):
        self.strides = strides

    def __call__(self, images):
        return (images,)


class Head(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    def __call__(self, features, images):
        return self.drop(self.linear(features[0]))


def pixels(*strides):
    return SegmentationModel(Pixels(strides), Head())


@jax.jit
def run(model, *arrays):
    return model(*arrays)


@pytest.fixture(scope="module")
def model():
    return tiny(upsampler="dysample")


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "made" / "model.zip"
    names = dict(class_names=NAMES, palette=COLORS)
    assert export_model(model, path, output="logits", **names) == path
    return path


@pytest.fixture(scope="module")
def loaded(path):
    return load_exported(path)


@pytest.mark.parametrize("shape", [(2, 32, 48), (1, 32, 16)])
def test_values_for_any_batch_and_size(model, loaded, shape):
    x = images(*shape)
    logits = loaded(x)
    expected = run(evaluating(model), x)
    assert isinstance(logits, np.ndarray) and logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())


def test_other_sizes_are_padded_with_the_mean_colour_and_cropped(path, loaded):
    x = images(2, 21, 39)
    padded = np.full((2, 32, 48, 3), (124, 116, 104), np.uint8)
    padded[:, :21, :39] = x
    np.testing.assert_array_equal(loaded(x), loaded(padded)[:, :21, :39])
    # To fewer shapes.
    coarse = load_exported(path, multiple=64)
    assert coarse.padded_size(21, 39) == (64, 64)
    wide = np.full((2, 64, 64, 3), (124, 116, 104), np.uint8)
    wide[:, :21, :39] = x
    np.testing.assert_array_equal(coarse(x), coarse(wide)[:, :21, :39])
    assert loaded.padded_size(100, 97) == (112, 112)
    assert load_exported(path, growth=1.0).padded_size(300, 97) == (304, 112)


def test_the_file_says_what_it_is(path, loaded, model):
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["model.stablehlo", "weights.safetensors", "meta.json"]
        meta = json.loads(archive.read("meta.json"))
    assert loaded.meta == meta
    assert meta["inputs"] == {"images": "uint8[b,16*h,16*w,3]"}
    assert meta["outputs"] == ["float32[b,16*h,16*w,3]"]
    assert (tuple(meta["class_names"]), meta["palette"]) == (NAMES, [list(c) for c in COLORS])
    assert meta["platforms"] == list(loaded.exported.platforms) == ["cpu", "cuda", "tpu"]
    assert (meta["jax"], meta["resfu_jax"]) == (jax.__version__, resfu_jax.__version__)
    # All weights are in the file, and none in the program.
    state = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
    assert sum(w.size for w in loaded.weights.values()) == sum(
        w.size for w in jax.tree.leaves(state)
    )
    kernel = model.backbone.blocks[0].ffn.expand.kernel[...]
    np.testing.assert_array_equal(loaded.weights["backbone.blocks.0.ffn.expand.kernel"], kernel)
    assert [p.name for p in path.parent.iterdir()] == ["model.zip"]


PACKAGE = """
import sys
import numpy as np
from resfu_jax.serving import load_exported

np.save(sys.argv[3], load_exported(sys.argv[1])(np.load(sys.argv[2])))
"""

PLAIN = """
import sys, zipfile
import jax, numpy as np
import safetensors.numpy

with zipfile.ZipFile(sys.argv[1]) as archive:
    program = jax.export.deserialize(bytearray(archive.read("model.stablehlo")))
    weights = safetensors.numpy.load(archive.read("weights.safetensors"))
np.save(sys.argv[3], jax.jit(program.call)(weights, np.load(sys.argv[2])))
"""

MODULES = """
names = {m.partition(".")[0] for m in sys.modules} & {"flax", "orbax", "optax", "tensorflow"}
print(sorted(names) + sorted(m for m in sys.modules if m.startswith("resfu_jax")))
"""


def in_a_fresh_process(script, folder, *arguments):
    """What the script prints, and then the modules of this package and its frameworks it has."""
    command = [sys.executable, "-c", script + MODULES, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    "script, modules", [(PACKAGE, ["resfu_jax", "resfu_jax.serving"]), (PLAIN, [])]
)
def test_same_values_in_a_process_without_model_code(path, loaded, script, modules, tmp_path):
    x = images(1, 32, 16)
    np.save(tmp_path / "x.npy", x)
    arguments = path, tmp_path / "x.npy", tmp_path / "y.npy"
    folder = pathlib.Path(serving.__file__).parent.parent
    assert in_a_fresh_process(script, folder, *arguments) == [str(modules)]
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), loaded(x), atol=1e-6)


def test_the_loader_works_as_a_copied_file(path, tmp_path):
    (tmp_path / "copied.py").write_text(pathlib.Path(serving.__file__).read_text())
    script = "import copied, sys\nprint(copied.load_exported(sys.argv[1]).meta['class_names'])\n"
    assert in_a_fresh_process(script, tmp_path, path) == [str(list(NAMES)), "[]"]


def test_outputs_agree(tmp_path):
    model, x = pixels(4, 8), images(1, 30, 40)
    results = {}
    for output in ("logits", "probabilities", "labels"):
        export_model(model, tmp_path / "m.zip", output=output, platforms=("cpu",))
        results[output] = load_exported(tmp_path / "m.zip")(x)
    logits = results["logits"]
    np.testing.assert_allclose(results["probabilities"], jax.nn.softmax(logits), atol=1e-6)
    np.testing.assert_array_equal(results["labels"], logits.argmax(axis=-1))
    assert results["labels"].dtype == np.uint8 and len(np.unique(results["labels"])) > 1


def test_fixed_batch_and_size(tmp_path, as_users_call):
    model, x = pixels(16), images(2, 40, 48)
    path = export_model(
        model, tmp_path / "m.zip", output="logits", batch=2, size=(40, 48), platforms=("cpu",)
    )
    loaded = load_exported(path)
    assert loaded.meta["inputs"] == {"images": "uint8[2,40,48,3]"}
    np.testing.assert_allclose(loaded(x), run(evaluating(model), x), atol=1e-5)
    assert loaded(x[:, :30, :20]).shape == (2, 30, 20, 3)
    for wrong in (x[:1], images(2, 41, 48)):
        with pytest.raises(ValueError, match=r"takes images uint8\[2,40,48,3\]"):
            loaded(wrong)


def test_bfloat16_and_vit(tmp_path):
    """Parameters in bfloat16, which safetensors' NumPy reader does not know; patches of 14."""
    model = tiny(
        VIT | dict(patch_size=14, image_size=28),
        frozen=True,
        dtype=jnp.bfloat16,
        param_dtype=jnp.bfloat16,
    )
    path = export_model(model, tmp_path / "m.zip", output="logits", platforms=("cpu",))
    loaded = load_exported(path)
    assert loaded.meta["inputs"] == {"images": "uint8[b,14*h,14*w,3]"}
    assert loaded.weights["head.classify.kernel"].dtype == jnp.bfloat16
    x = images(1, 28, 42)
    expected = run(evaluating(model), x)
    np.testing.assert_allclose(loaded(x), expected, atol=0.02 * np.abs(expected).max())


HALF = dict(mean=(127.5,) * 3, std=(127.5,) * 3)
RESIZED = dict(scale=0.75, resize_to=(60, 90))
# One side of a photo is smaller than a window, the other larger.
WINDOWS = dict(inference=Inference("slide", (64, 96), (48, 64)))
RUNS = {
    "mit": (dict(name="mit", **MIT), {}, {}),
    "mit, in windows": (dict(name="mit", **MIT), {}, WINDOWS),
    "vit": (VIT, HALF, {}),
    "vit, in windows": (VIT, HALF, WINDOWS),
    "vit of patches of 14, resized": (VIT | dict(patch_size=14, image_size=28), HALF, RESIZED),
    "vit, resized, in windows": (VIT, HALF, RESIZED | WINDOWS),
}


@pytest.mark.parametrize("backbone, colours, protocol", RUNS.values(), ids=RUNS)
def test_a_photo_gets_the_labels_that_predictor_gives_it(backbone, colours, protocol, tmp_path):
    model = tiny(backbone, **colours)
    for path, kernel in nnx.iter_graph(model):  # untrained, it would see one class everywhere
        if path[-2:] == ("classify", "kernel"):
            kernel[...] = 10 * kernel[...]
    predictor = Predictor(
        model, class_names=NAMES, palette=COLORS, devices=jax.devices()[:1], **protocol
    )
    files = {}
    for output in ("labels", "probabilities"):
        path = tmp_path / f"{output}.zip"
        seen = dict(preprocess=predictor.preprocess, inference=predictor.inference)
        export_model(model, path, output=output, platforms=("cpu",), **seen)
        files[output] = load_exported(path)
        assert files[output].preprocess == predictor.preprocess
    labels, probabilities = files.values()
    for size in ((37, 101), (150, 61)):
        # In blocks, which an untrained network tells apart.
        photo = images(1, 10, 10).repeat(16, axis=1).repeat(16, axis=2)
        photo = np.ascontiguousarray(photo[:, : size[0], : size[1]])
        (expected,) = predictor.predict(photo[0], probabilities=True)
        assert len(np.unique(expected.labels)) > 1
        got = labels(photo)
        assert got.dtype == np.uint8
        np.testing.assert_allclose(probabilities(photo)[0], expected.probabilities, atol=1e-4)
        two = np.sort(expected.probabilities, axis=-1)[..., -2:]
        clear = two[..., 1] - two[..., 0] > 2e-4  # not a tie up to rounding
        assert clear.mean() > 0.98
        np.testing.assert_array_equal(got[0][clear], expected.labels[clear])
        padded = predictor.compiled_shapes[-1][1:]
        if "inference" in protocol:  # which do not depend on the padding
            padded = tuple(map(max, predictor.preprocess.resized_size(*size), (64, 96)))
        assert labels.padded_size(*size) == padded


@pytest.mark.parametrize("name", ["resfu", "carafe"])
def test_upsampler_by_itself(name, tmp_path):
    up = create_upsampler(name, features=16, guide_features=8, scale=2, rngs=nnx.Rngs(0))
    inputs = {"features": "float32[b, h, w, 16]", "guide": "float32[b, 2*h, 2*w, 8]"}
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=s).astype(np.float32) for s in ((2, 5, 7, 16), (2, 10, 14, 8))]
    if up.guide == "none":
        del inputs["guide"], arrays[1:]
    path = export_module(up, tmp_path / "up.zip", inputs, constraints=("h >= 2",))
    loaded = load_exported(path)
    assert loaded.exported.platforms == PLATFORMS
    np.testing.assert_allclose(loaded(*arrays), run(up, *arrays), atol=2e-5)
    # Inside other JAX code.
    assert jax.eval_shape(lambda *a: 2 * loaded.call(*a), *arrays).shape == (2, 10, 14, 16)
    with pytest.raises(ValueError, match=r"takes features float32\[b,h,w,16\].*got float32\[2, 5"):
        loaded(*(a[..., :4] for a in arrays))
    with pytest.raises(ValueError, match="got 0 arrays"):
        loaded()


class Extractor(nnx.Module):
    """Features of an image at its own size, and at that of the backbone."""

    def __init__(self):
        self.backbone = create_backbone("mit", **MIT, rngs=nnx.Rngs(0))
        self.upsample = create_upsampler("bilinear", features=4, scale=4)

    def __call__(self, images):
        fine, *_, coarse = self.backbone(images)
        return {"fine": self.upsample(fine), "maps": (fine, coarse)}


def test_feature_extractor_with_several_outputs(tmp_path):
    inputs = {"images": "float32[b, 32*h, 32*w, 3]"}
    extractor = Extractor()
    loaded = load_exported(export_module(extractor, tmp_path / "e.zip", inputs, platforms=["cpu"]))
    x = images(1, 32, 64).astype(np.float32)
    outputs, expected = loaded(x), run(evaluating(extractor), x)
    assert jax.tree.structure(outputs) == jax.tree.structure(expected)
    assert outputs["fine"].shape == (1, 32, 64, 4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), outputs, expected)


class Asks(nnx.Module):
    """Does one thing or another by a size."""

    def __call__(self, x):
        return x if x.shape[1] > 7 else -x


def test_wrong_exports(tmp_path, as_users_call):
    model = pixels(4, 16)
    path = tmp_path / "m.zip"
    for message, options in {
        "output must be one of labels, probabilities, logits, got 'masks'": dict(output="masks"),
        "platforms must be of cpu, cuda, rocm and tpu, got": dict(platforms=("gpu",)),
        r"multiple of the backbone's strides \(4, 16\), got 40": dict(multiple=40),
        "class_names must have the model's 3 entries, got 2": dict(class_names=("a", "b")),
        "palette must have the model's 3 entries, got 1": dict(palette=((0, 0, 0),)),
    }.items():
        with pytest.raises(ValueError, match=message):
            export_model(model, path, **options)
    for message, inputs in {
        r"inputs\['x'\] must be like 'float32\[b, h, w, 3\]', got 'b, h'": {"x": "b, h"},
        r"inputs\['x'\] must be like.*float33": {"x": "float33[b, h]"},
        r"inputs\['x'\] must be like.*syntax error": {"x": "float32[b, h h]"},
        r"cannot be traced for any float32\[b, h\]: give fixed sizes": {"x": "float32[b, h]"},
    }.items():
        with pytest.raises(ValueError, match=message):
            export_module(Asks(), path, inputs)
    assert not list(tmp_path.iterdir())


def test_wrong_files_and_inputs(path, loaded, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError):
        load_exported(tmp_path / "none.zip")
    wrong = tmp_path / "wrong.zip"
    wrong.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"wrong.zip is not a file of resfu_jax.export"):
        load_exported(wrong)
    with zipfile.ZipFile(wrong, "w") as archive:
        archive.writestr("meta.json", json.dumps({"format": 7}))
    with pytest.raises(ValueError, match="has format 7, this loader reads 3"):
        load_exported(wrong)
    with zipfile.ZipFile(wrong, "w") as archive:
        archive.writestr("meta.json", json.dumps(loaded.meta | {"jax": "0.3"}))
        archive.writestr("weights.safetensors", b"")
        archive.writestr("model.stablehlo", b"not a program")
    with pytest.raises(ValueError, match="exported with JAX 0.3, which JAX .* does not read"):
        load_exported(wrong)
    for x in (images(32, 32), images(1, 32, 32).astype(np.float32), images(1, 0, 32)):
        with pytest.raises(ValueError, match=r"takes images uint8\[b,16\*h,16\*w,3\], got"):
            loaded(x)
    with pytest.raises(ValueError, match="multiple must be a multiple of 16, got 40"):
        load_exported(path, multiple=40)
    with monkeypatch.context() as patch:  # flatbuffers is what it imports
        patch.setitem(sys.modules, "jax._src.export.serialization", None)
        with pytest.raises(ModuleNotFoundError, match="pip install flatbuffers"):
            load_exported(path)
    monkeypatch.setattr(jax.export, "default_export_platform", lambda: "rocm")
    with pytest.raises(ValueError, match="exported for cpu, cuda, tpu, and JAX runs on rocm"):
        load_exported(path)


def members(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write(path, contents, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return path


def weights_with(change):
    """A change of the header of weights.safetensors, in whose place the data stay as they are."""

    def changed(data):
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header = {name: entry for name, entry in header.items() if name != "__metadata__"}
        change(header)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    return lambda contents: (
        contents | {"weights.safetensors": changed(contents["weights.safetensors"])}
    )


def other_type(header):
    header["head.classify.bias"]["dtype"] = "I32"


def other_shape(header):
    header["head.classify.kernel"]["shape"] = header["head.classify.kernel"]["shape"][::-1]


def other_name(header):
    header["head.classify.weight"] = header.pop("head.classify.kernel")


def meta_with(**changes):
    def change(contents):
        meta = json.loads(contents["meta.json"])
        for name, value in changes.items():
            if isinstance(value, dict):
                value = (meta[name] or {}) | value
            meta[name] = value
        return contents | {"meta.json": json.dumps(meta)}

    return change


def without(name):
    return lambda contents: {n: data for n, data in contents.items() if n != name}


@pytest.mark.parametrize(
    "change, message",
    [
        (
            weights_with(other_type),
            r"weights.safetensors: head.classify.bias is I32\[3\], the program takes float32\[3\]",
        ),
        (
            weights_with(other_shape),
            r"head.classify.kernel is F32\[3, 16\], the program takes float32\[16,3\]",
        ),
        (
            weights_with(other_name),
            r"kernel is missing; head.classify.weight is in it, not in the program",
        ),
        (weights_with(lambda header: header.clear()), "cannot be read|and [0-9]+ more"),
        (without("weights.safetensors"), "there is no weights.safetensors in it"),
        (without("model.stablehlo"), "there is no model.stablehlo in it"),
        (without("meta.json"), "there is no meta.json in it"),
        (
            lambda c: c | {"weights.safetensors": c["weights.safetensors"][:-5]},
            "weights.safetensors cannot be read",
        ),
        (
            lambda c: c | {"weights.safetensors": b"\xff" * 100},
            "weights.safetensors cannot be read",
        ),
        (lambda c: c | {"model.stablehlo": c["model.stablehlo"][:40]}, "does not read"),
        (lambda c: c | {"meta.json": b"[1]"}, "meta.json says no format"),
        (lambda c: c | {"meta.json": b"[" * 100_000}, "is not a file of resfu_jax.export"),
        (lambda c: c | {"meta.json": b"\xff\xfe"}, "is not a file of resfu_jax.export"),
        (meta_with(palette=[[1, 2, 300]]), r"meta.json: palette is \[\[1, 2, 300\]\]"),
        (meta_with(palette=[[1, 2, 3]]), "meta.json: palette has length 1, not 3"),
        (meta_with(class_names=["a"] * 4), "meta.json: class_names has length 4, not 3"),
        (meta_with(class_names="abc"), "meta.json: class_names is abc"),
        (meta_with(output="masks"), "meta.json: output is masks"),
        (meta_with(inputs=3), "meta.json: inputs is 3"),
        (meta_with(preprocess={"multiple": 0}), "preprocess: multiple must be at least 1"),
        (meta_with(preprocess={"multiple": 8}), "does not take images as meta.json says"),
        (meta_with(preprocess={"mean": [0, 0]}), "preprocess: mean must be three real numbers"),
        (meta_with(preprocess={"colour": 1}), "preprocess: .*colour"),
        (meta_with(preprocess=7), "meta.json: preprocess is 7"),
        (meta_with(windows=0), "meta.json: windows is 0"),
        (meta_with(windows=[8, 8]), r"meta.json: windows is \[8, 8\]"),
        (meta_with(windows=dict(crop=[32, 32], stride=[40, 8])), "meta.json: windows is"),
        (
            meta_with(windows=dict(crop=[32, 32], stride=[16, 8])),
            "does not take images .* its windows are",
        ),
    ],
)
def test_files_are_checked_against_what_they_say(path, change, message, tmp_path):
    wrong = write(tmp_path / "wrong.zip", change(members(path)))
    with pytest.raises(ValueError, match=message) as raised:
        load_exported(wrong)
    assert str(wrong) in str(raised.value) and len(str(raised.value)) < 2000


@pytest.mark.parametrize("name", ["meta.json", "model.stablehlo", "weights.safetensors"])
def test_what_unpacks_to_far_more_than_it_is(path, name, tmp_path):
    bomb = write(
        tmp_path / "bomb.zip", members(path) | {name: bytes(300 << 20)}, zipfile.ZIP_DEFLATED
    )
    assert bomb.stat().st_size < 1 << 20
    with pytest.raises(ValueError, match=rf"bomb.zip .*{name} would unpack from \d+ to 314572800"):
        load_exported(bomb)
    # Nor if the size that it unpacks to is said to be less.
    data = bomb.read_bytes().replace((300 << 20).to_bytes(4, "little"), (900).to_bytes(4, "little"))
    bomb.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(ValueError, match="bomb.zip is not a file of resfu_jax.export"):
        load_exported(bomb)
    assert tracemalloc.get_traced_memory()[1] < 50 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.999])
def test_a_cut_file_is_named(path, share, tmp_path):
    cut = tmp_path / "cut.zip"
    cut.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match="cut.zip is not a file of resfu_jax.export"):
        load_exported(cut)


def test_a_flipped_bit_is_named(path, tmp_path):
    flipped = tmp_path / "flipped.zip"
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("weights.safetensors").header_offset
    data = bytearray(path.read_bytes())
    data[offset + 5000] ^= 1
    flipped.write_bytes(data)
    with pytest.raises(ValueError, match="flipped.zip is not a file .*Bad CRC"):
        load_exported(flipped)


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    written = export_model(pixels(16), "~/models [1]: a/m.zip", platforms=("cpu",))
    assert written == tmp_path / "home" / "models [1]: a" / "m.zip" and written.exists()
    x = images(1, 16, 16)
    assert load_exported("~/models [1]: a/m.zip")(x).shape == (1, 16, 16)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path / 'home' / 'none.zip'}: no such file"):
        load_exported("~/none.zip")
    assert [p.name for p in tmp_path.iterdir()] == ["home"]
