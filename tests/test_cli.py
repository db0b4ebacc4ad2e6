import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from tiny_run import make_run, tiny_config_of

import resfu_jax
from resfu_jax import data, training, visualize
from resfu_jax.cli import COMMANDS, main
from resfu_jax.predictor import Predictor
from resfu_jax.serving import load_exported
from resfu_jax.training import BackboneConfig, HeadConfig

pytestmark = pytest.mark.usefixtures("programs_are_kept")

ROOT = pathlib.Path(__file__).parents[1]
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    make_run(workdir, tiny_config_of(batch_size=8), {5: 0.3, 7: None})
    return workdir


def save_picture(path, height, width):
    blocks = RNG.integers(0, 256, (-(-height // 8), -(-width // 8), 3), np.uint8)
    pixels = blocks.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    save_picture(folder / "a.png", 20, 30)
    save_picture(folder / "b.png", 31, 9)
    return folder


def read(path):
    with Image.open(path) as file:
        return np.asarray(file), file.mode, file.getpalette()


def test_help_does_not_wait_for_jax():
    code = (
        "import sys; from resfu_jax.cli import main; main(['--help']); main(['--version']);"
        "sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result
    assert all(name in result.stdout for name in COMMANDS)
    versions = rf"resfu_jax {resfu_jax.__version__}, jax {jax.__version__}, flax [0-9.]+, Python 3"
    assert re.match(versions, result.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_have_help_with_examples(capsys, name):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: resfu {name}" in text and re.search(rf"^resfu {name} ?", text, re.M)


@pytest.mark.parametrize(
    ("command", "both"),
    [
        ("resfu_jax --help", False),
        ("resfu_jax --version", True),
        ("resfu_jax upsamplers --help", False),
        ("resfu_jax train --helpshort", False),
        ("resfu_jax.train --helpshort", False),
        ("resfu_jax.data --data-dir HERE list", False),
    ],
)
def test_a_reader_that_leaves_ends_a_command_quietly(command, both, tmp_path):
    """As in `resfu --help | true`; with both, stderr goes there too."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        result = subprocess.run(
            [sys.executable, "-m", *command.replace("HERE", str(tmp_path)).split()],
            cwd=ROOT,
            stdout=closed,
            stderr=closed if both else subprocess.PIPE,
            text=True,
        )
    assert result.returncode == 1
    assert not result.stderr


def test_other_broken_pipes_are_told(monkeypatch, capfd):
    def of_a_worker(*_, **__):
        raise BrokenPipeError("of a worker")

    monkeypatch.setattr("tyro.cli", of_a_worker)
    assert main(["upsamplers"]) == 1
    assert capfd.readouterr().err == "error: of a worker\n"


def test_train_is_the_script(monkeypatch):
    """Also in a wheel, which has the file that the link in the package leads to."""
    assert (ROOT / "resfu_jax" / "train.py").samefile(ROOT / "train.py")
    started = []
    monkeypatch.setattr(sys, "argv", ["resfu", "train"])
    monkeypatch.setattr("runpy.run_module", lambda *a, **k: started.append((*a, *sys.argv[1:])))
    assert main(["train", "--config", "mine.py", "--workdir=x"]) == 0
    assert started == [("resfu_jax.train", "--config", "mine.py", "--workdir=x")]


def test_predict_writes_labels_and_overlays(run, photos, tmp_path, capsys):
    save_picture(photos / "large.png", 70, 120)  # more than 8 crops of 32x32 pixels
    out = tmp_path / "out"
    status = main(["predict", str(photos), "--checkpoint", str(run), "--out", str(out)])
    output = capsys.readouterr()
    assert status == 0, output
    assert "3 images in" in output.out and "for compiling 2 sizes" in output.out
    assert re.search("^compiling for 32x32 pixels$", output.err, re.M)
    assert "96x128 pixels, seen in windows of 32x32 as in training; --mode whole" in output.err
    predictor = Predictor.from_checkpoint(run)
    windows = {"mode": "slide", "crop": (32, 32), "stride": (22, 22)}
    results = predictor.predict([photos / "a.png", photos / "b.png"])
    results += Predictor.from_checkpoint(run, inference=windows).predict([photos / "large.png"])
    for result in results:
        height, width = result.labels.shape
        (line,) = [text for text in output.out.splitlines() if text.startswith(f"{result.path}: ")]
        first, share = next(iter(result.shares.items()))
        assert share == np.mean(result.labels == first)
        largest = f"{width}x{height}, {predictor.class_names[first]} {share:.1%}"
        assert f": {largest}" in line and re.search(r"; \d+\.\d\d s$", line)
        labels, mode, palette = read(out / "labels" / f"{result.id}.png")
        assert mode == "P"
        np.testing.assert_array_equal(labels, result.labels)
        colors = np.array(predictor.palette)
        np.testing.assert_array_equal(np.reshape(palette, (-1, 3))[:8], colors)
        overlay, mode, _ = read(out / "overlays" / f"{result.id}.png")
        expected = 0.5 * read(result.path)[0] + 0.5 * colors[result.labels]
        np.testing.assert_allclose(overlay[:height, :width], expected, atol=0.51)
        below = {tuple(c) for c in overlay[height:].reshape(-1, 3).tolist()}
        for i, color in enumerate(predictor.palette):
            assert (tuple(color) in below) == (i in result.shares)


def test_a_bad_file_does_not_lose_the_others(run, photos, tmp_path, capsys):
    (photos / "broken.jpg").write_text("no image")
    (photos / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (photos / "notes.txt").write_text("of no kind of image")
    save_picture(photos / "a.jpg", 8, 8)
    out = tmp_path / "out"
    arguments = [
        str(photos),
        str(tmp_path / "missing.png"),
        "--checkpoint",
        str(run / "checkpoints/7"),
    ]
    assert main(["predict", *arguments, "--out", str(out), "--flip", "True"]) == 1
    output = capsys.readouterr()
    errors = [line for line in output.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 4
    assert any("phone.HEIC: cannot be read" in e and "none of BMP, GIF, JPEG" in e for e in errors)
    assert any("broken.jpg: cannot be read as an image" in line for line in errors)
    assert any("missing.png: no such file" in line for line in errors)
    assert any("would replace those of" in line for line in errors)
    assert "2 images in" in output.out and "4 failed" in output.out
    assert sorted(p.name for p in (out / "labels").iterdir()) == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predic"], "unknown command 'predic'; did you mean 'predict'"),
        (["predict", "--checkpoint", "RUN"], "no images"),
        (["predict", "x.png", "--checkpoint", "nowhere"], "nowhere is not a folder"),
        (
            ["predict", "x.png", "--checkpoint", "RUN", "--which", "6"],
            "there are: best, latest, 5, 7",
        ),
        (["predict", "x.png", "--checkpoint", "RUN", "--mode", "slide"], "crop must be (height, w"),
        (
            ["predict", "x.png", "--checkpoint", "RUN", "--opacity", "2"],
            "--opacity must be between",
        ),
        (
            ["predict", "x.png", "--checkpoint", "RUN", "--batch-size", "3"],
            "batch_size must be a mul",
        ),
        (["predict", "x.png", "--checkpoint", "RUN", "--out", "RUN/config.json"], "config.json"),
        (["evaluate", "--checkpoint", "RUN", "--data-dir", "nowhere"], "is not prepared"),
        (["evaluate", "--checkpoint", "RUN", "--dataset", "shape"], "Did you mean 'shapes'"),
        (["evaluate", "--checkpoint", "RUN", "--dataset", "voc"], "--dataset voc has the classes"),
        (["upsamplers", "resfuu"], "did you mean 'resfu'"),
        (["upsamplers", "--features", "0"], "must be positive"),
        (["benchmark", "nearest", "--runs", "0"], "--runs must be at least 1"),
    ],
)
def test_mistakes_end_in_one_line(run, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main([a.replace("RUN", str(run)) for a in arguments]) == 1
    (line,) = capsys.readouterr().err.rstrip().split("\n    ")[0].splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize("verb", ["predict", "evaluate", "export", "visualize"])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"", "config.json cannot be read (it is empty): put back"),
        ("config.json", b'{"steps": 8, "mo', "config.json cannot be read (not JSON"),
        ("config.json", b"[]", "config.json cannot be read (all of it is '[]'"),
        ("config.json", b'{"flux": 3}', "does not know: flux; another version of resfu_jax"),
        ("checkpoints/5/state/_METADATA", b"{", "intact is 7: evaluate it with --checkpoint 7"),
        ("checkpoints/5/metrics/metrics", b"", "metrics/metrics is damaged; without the folder"),
    ],
)
def test_damaged_workdirs_end_in_one_line(
    run, photos, tmp_path, capsys, verb, name, content, message
):
    workdir = tmp_path / "run"
    shutil.copytree(run, workdir)
    (workdir / name).write_bytes(content)
    what = {"export": str(tmp_path / "x.zip"), "evaluate": None}.get(verb, str(photos / "a.png"))
    assert main([verb, *([what] if what else []), "--checkpoint", str(workdir)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


@pytest.mark.parametrize("value", ["gs://bucket/x", "s3://bucket/x"])
@pytest.mark.parametrize(
    "command",
    [
        "predict x.png --checkpoint RUN --out VALUE",
        "predict x.png --checkpoint VALUE",
        "evaluate --checkpoint RUN --out VALUE",
        "export VALUE --checkpoint RUN",
        "visualize x.png --checkpoint RUN --out VALUE",
        "visualize x.png --checkpoint RUN --panels VALUE",
    ],
)
def test_addresses_are_no_folders(run, tmp_path, monkeypatch, capsys, command, value):
    monkeypatch.chdir(tmp_path)
    words = command.replace("VALUE", value).replace("RUN", str(run)).split()
    assert main(words) == 1
    assert "has to be a folder or file of this machine" in capsys.readouterr().err
    assert not [path for path in tmp_path.iterdir() if ":" in path.name]


def test_home_in_options(run, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(run)
    photo = str(photos / "a.png")
    assert main(["predict", photo, "--checkpoint=~/link", "--out=~/[o] u:t"]) == 0
    assert (tmp_path / "[o] u:t" / "labels" / "a.png").exists()
    assert not (tmp_path / "~").exists()


def test_flags_that_are_none_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["predict", "x.png", "--chekpoint", "runs"])
    assert stop.value.code == 2
    assert "--chekpoint" in capsys.readouterr().err


def test_evaluate_counts_what_the_model_predicts(run, tmp_path, capsys):
    info = data.dataset_info("shapes")
    raw = tmp_path / "raw"
    truth = training.SegmentationCounts.zeros(8)
    predictor = Predictor.from_checkpoint(run, growth=1)
    for split in ("train", "validation"):
        for kind in ("images", "labels"):
            (raw / kind / split).mkdir(parents=True)
    for i in range(3):
        pixels = save_picture(raw / "images" / "validation" / f"{i}.png", 24, 32)
        labels = RNG.integers(0, 8, (24, 32), np.uint8)
        Image.fromarray(labels).save(raw / "labels" / "validation" / f"{i}.png")
        pair = (jnp.asarray(x)[None] for x in (predictor.predict(pixels)[0].labels, labels))
        truth = truth.merge(training.count(*pair, num_classes=8))
    save_picture(raw / "images" / "train" / "t.png", 8, 8)
    Image.new("L", (8, 8)).save(raw / "labels" / "train" / "t.png")
    (raw / "classes.txt").write_text("\n".join(info.class_names))
    place = ["--data-dir", str(tmp_path / "data")]
    assert main(["prepare", "image_folder/mine", *place, "--manual-dir", str(raw)]) == 0
    assert "1 train, 3 validation" in capsys.readouterr().out

    numbers = tmp_path / "numbers.json"
    command = ["evaluate", "--checkpoint", str(run), "--dataset", "image_folder/mine", *place]
    status = main([*command, "--out", str(numbers)])
    output = capsys.readouterr()
    assert status == 0, output.err
    assert "image_folder/mine, validation: checkpoint 5" in " ".join(output.out.split())
    expected = {"step": 5} | truth.compute(info.class_names)
    assert json.loads(numbers.read_text()) == pytest.approx(expected)
    assert main([*command, "--batch-size", "3"]) == 1
    assert "--batch-size must be a multiple of 8" in capsys.readouterr().err


def test_prepare_without_a_name_lists_the_datasets(tmp_path, capsys):
    assert main(["prepare", "--data-dir", str(tmp_path)]) == 0
    assert "camvid/clean" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"^error: There is no dataset 'camvit'"):
        main(["prepare", "camvit", "--data-dir", str(tmp_path)])


def test_prepare_hands_on_all_that_is_said_of_own_images(monkeypatch):
    from resfu_jax.data import __main__

    heard = []
    monkeypatch.setattr(__main__, "main", heard.append)
    own = ["--images", "a b", "--labels", "b", "--validation-images", "c", "--validation-labels"]
    own += ["d", "--classes", "0=x", "1=y", "--ignore-label", "0", "--ignore-exif", "--yes"]
    assert main(["prepare", "image_folder/mine", "--overwrite", *own]) == 0
    assert heard == [["prepare", "image_folder/mine", "--overwrite", *own]]
    known = vars(__main__._parser().parse_args(heard[0]))
    assert known["classes"] == ["0=x", "1=y"] and known["ignore_label"] == 0 and known["yes"]


def test_table_of_upsamplers(capsys):
    names = ["bilinear", "carafe", "resfu"]
    assert main(["upsamplers", *names, "--features", "16", "--size", "8", "9", "--scale", "2"]) == 0
    text = capsys.readouterr().out
    assert "16 channels, 8x9 to 16x18" in text
    rows = {
        cells[0]: cells[1:] for line in text.splitlines() if (cells := re.findall(r"[\w.,]+", line))
    }
    for name in names:
        guide, parameters, gflop = rows[name]
        up = resfu_jax.create_upsampler(name, features=16, guide_features=16, scale=2)
        assert guide == up.guide
        count = sum(p.size for p in jax.tree.leaves(nnx.state(up)))
        assert int(parameters.replace(",", "")) == count
        assert 0 <= float(gflop) < 0.1
    assert float(rows["resfu"][2]) > float(rows["bilinear"][2])


@pytest.mark.parametrize("options", [[], ["--gradient", "--dtype", "bfloat16"]])
def test_benchmark_of_one_upsampler(capsys, options):
    arguments = ["--features", "8", "--size", "4", "4", "--scale", "2", "--runs", "2"]
    assert main(["benchmark", "pixel_shuffle", *arguments, *options]) == 0
    assert re.search(r"median \d+\.\d+ ms, .* of 2 calls; .* MB; .* GFLOP", capsys.readouterr().out)


def test_a_real_process(run, photos, tmp_path):
    command = [sys.executable, "-m", "resfu_jax", "predict", str(photos / "a.png")]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)}
    result = subprocess.run(
        [*command, "--checkpoint", str(run), "--out", str(tmp_path / "out")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "1 image in" in result.stdout and "Traceback" not in result.stderr
    (expected,) = Predictor.from_checkpoint(run, devices=jax.devices()[:1]).predict(
        photos / "a.png"
    )
    np.testing.assert_array_equal(read(tmp_path / "out" / "labels" / "a.png")[0], expected.labels)
    assert list((tmp_path / ".cache" / "resfu_jax" / "xla").iterdir())


@pytest.fixture(scope="module")
def linear_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "probe"
    config = tiny_config_of()
    vit = dict(width=16, depth=1, heads=2, image_size=32, patch_size=16)
    config.model.backbone = BackboneConfig(name="vit", variant="tiny", options=vit)
    config.model.head = HeadConfig(name="linear", upsampler="sapa", width=8, norm=True)
    make_run(workdir, config, {3: None})
    return workdir


def test_visualize_runs(run, linear_run, photos, tmp_path, capsys):
    figure, panels = tmp_path / "new" / "figure.png", tmp_path / "panels"
    command = ["visualize", str(photos / "a.png"), "--out", str(figure), "--panels", str(panels)]
    # A head of several upsamplers: the path of the coarsest map.
    assert main([*command, "--checkpoint", str(run), "--pixel", "3", "4"]) == 0, capsys.readouterr()
    assert "8 panels" in capsys.readouterr().out
    assert read(figure)[0].shape[1] > 900
    assert [path.name for path in sorted(panels.iterdir())] == [
        "00_photo.png",
        "01_backbone_s_features.png",
        "02_tiny_upsampled.png",
        "03_tiny_prediction.png",
        "04_one_pixel.png",
        "05_its_surroundings.png",
        "06_their_features.png",
        "07_tiny.png",
    ]
    predictor = Predictor.from_checkpoint(run)
    labels = predictor.predict(photos / "a.png")[0].labels
    expected = visualize.overlay(read(photos / "a.png")[0], labels, predictor.palette)
    np.testing.assert_array_equal(read(panels / "03_tiny_prediction.png")[0], expected)

    assert main([*command, "--checkpoint", str(linear_run), "--pixel", "3", "4", "19", "29"]) == 0
    assert "12 panels" in capsys.readouterr().out
    # The photo is seen as 16x32: 1x2 patches, and 4x8 features at stride 4.
    assert read(panels / "01_backbone_s_features.png")[0].shape == (1, 2, 3)
    assert read(panels / "02_probe_upsampled.png")[0].shape == (4, 8, 3)


def test_visualize_upsamplers_fitted_to_a_photo(photos, tmp_path, capsys, monkeypatch):
    def means(images):
        b, h, w, _ = images.shape
        x = jnp.asarray(images, jnp.float32).reshape(b, h // 8, 8, w // 8, 8, 3).mean((2, 4))
        return jnp.concatenate([x, x[..., :1]], axis=-1) / 255

    module = sys.modules["resfu_jax.cli.visualize"]  # the package has a function of this name
    monkeypatch.setattr(module, "_backbone", lambda *_: (means, 8))
    panels, figure = tmp_path / "panels", tmp_path / "figure.png"
    members = ["bilinear", "pixel_shuffle", "sapa"]
    command = ["visualize", str(photos / "a.png"), "--pretrained", "x", "--out", str(figure)]
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        status = main(
            [*command, "--upsamplers", *members, "--steps", "2", "--side", "64", "--scale", "2"]
            + ["--pixel", "3", "4", "--panels", str(panels), "--columns", "5"]
        )
    assert status == 0, capsys.readouterr()
    assert "20 panels" in capsys.readouterr().out
    names = [path.stem for path in sorted(panels.iterdir())]
    for i, name in enumerate(members, 3):
        assert re.fullmatch(rf"{i:02d}_{name}_error_\d_\d\d", names[i])
    assert names[14] == "14_pixel_shuffle_makes_new_features"
    # The photo of 20x30 is seen as 40x64, eight features across become sixteen.
    assert read(panels / "00_photo.png")[0].shape == (40, 64, 3)
    assert read(panels / f"{names[3]}.png")[0].shape == (10, 16, 3)


def test_pixels_are_clicked(monkeypatch):
    monkeypatch.setattr(plt, "get_backend", lambda: "tkagg")
    monkeypatch.setattr(plt, "ginput", lambda **_: [(4.2, 3.6), (0.0, 11.0)])
    clicked = sys.modules["resfu_jax.cli.visualize"]._clicked(np.zeros((12, 9, 3), np.uint8))
    assert clicked == ((4, 4), (11, 0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.png"], "give either --checkpoint RUN ... or --pretrained FILE"),
        (["none.png", "--pretrained", "x"], "none.png: no such file"),
        (["a.png", "--pretrained", "x", "--columns", "0"], "--columns must be at least 1, got 0"),
        (["a.png", "--checkpoint", "RUN", "--pixel", "20", "3"], "the photo of 20 rows and 30"),
        (["a.png", "--checkpoint", "nowhere"], "nowhere is not a folder"),
        (["a.png", "--pretrained", "nowhere.safetensors"], "nowhere.safetensors"),
        (["a.png", "--pretrained", "x", "--upsamplers", "resfy"], "unknown upsampler 'resfy'"),
        (["a.png", "--pretrained", "x", "--click"], "--click needs a window"),
        (["a.png", "--pretrained", "x", "--variant", "huge"], "variant must be one of tiny"),
    ],
)
def test_wrong_input_to_visualize(run, photos, tmp_path, capsys, arguments, message, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    name, *options = [str(run) if a == "RUN" else a for a in arguments]
    out = tmp_path / "figure.png"
    assert main(["visualize", str(photos / name), *options, "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert "Traceback" not in error and not out.exists()


def test_export(run, tmp_path, capsys):
    path = tmp_path / "model.zip"
    arguments = f"{path} --checkpoint {run} --size 32 64 --batch 1 --platforms cpu"
    assert main(["export", *arguments.split()]) == 0
    assert "for cpu" in capsys.readouterr().out
    exported = load_exported(path)
    predictor = Predictor.from_checkpoint(run)
    assert exported.meta["class_names"] == list(predictor.class_names)
    assert exported.preprocess == predictor.preprocess
    image = RNG.integers(0, 256, (1, 32, 64, 3), np.uint8)
    expected = jnp.argmax(jax.jit(lambda m, x: m(x))(predictor.model, jnp.asarray(image)), axis=-1)
    np.testing.assert_array_equal(exported(image), expected)
