import json
import logging
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from resfu_jax.tasks import Segmentation
from resfu_jax.training import Config, ConfigError, Reporter, print_table, read_metrics, validate

CONFIG = Config(steps=10, batch_size=2)
SCORES = {"miou": 0.5, "boundary_iou": 0.4, "pixel_accuracy": 0.9, "iou/a": 0.5}
SUMMARY = Segmentation.summary


def report(workdir, steps, start=0):
    reporter = Reporter(workdir, CONFIG, start=start)
    for step in steps:
        reporter.advance(step, None)
        reporter.train(step, {"loss": 1.0 / step})
    reporter.evaluation(step, SCORES, SUMMARY)
    reporter.close()


def test_lines_and_events(tmp_path, capsys):
    report(tmp_path, [1, 2])
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 2]
    assert lines[0]["loss"] == 1.0 and lines[0]["images_per_second"] > 0
    assert lines[2]["val/miou"] == 0.5 and lines[2]["val/iou/a"] == 0.5
    assert list(tmp_path.glob("events.out.tfevents.*"))
    printed = capsys.readouterr().err
    assert "step 2/10  loss 0.5000" in printed and "images/s" in printed and "left" in printed
    assert "mIoU 0.5000  boundary IoU 0.4000" in printed


def test_lines_after_the_restored_step_are_replaced(tmp_path):
    report(tmp_path, [1, 2, 3])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 0.')  # killed while writing
    report(tmp_path, [3, 4], start=2)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == [1, 2, 3, 4, 4]


def test_utilisation_is_the_rate_of_steps_over_that_of_the_peak(tmp_path, capsys):
    reporter = Reporter(tmp_path, CONFIG, utilisation=0.5)
    reporter.train(2, {"loss": 1.0})
    reporter.close()
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line["mfu"] == pytest.approx(0.5 * line["images_per_second"] / 2)
    assert "MFU" in capsys.readouterr().err


def test_silent(tmp_path, capsys):
    reporter = Reporter(tmp_path / "absent", CONFIG, silent=True)
    reporter.message("text")
    reporter.advance(1, None)
    reporter.train(1, {"loss": 1.0})
    reporter.evaluation(1, SCORES, SUMMARY)
    reporter.close()
    assert not (tmp_path / "absent").exists()
    assert capsys.readouterr() == ("", "")


def test_a_missing_file_has_no_lines(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("missing", [False, True])
def test_table(capsys, missing):
    names = ("a", "b") if missing else ("a",)
    print_table("title", SCORES, names, {"parameters": "1,234"})
    printed = capsys.readouterr().out
    assert "title" in printed and "0.5000" in printed and "parameters: 1,234" in printed
    assert ("│ b " in printed) == missing


def test_compilation_is_announced_once_for_each_size(tmp_path, capsys):
    reporter = Reporter(tmp_path, CONFIG)
    step = reporter.announced("training step", jax.jit(lambda state, batch: state + batch["image"]))
    for size in (8, 8, 16):
        step(jnp.ones(()), {"image": jnp.ones((2, size, 32, 3))})
    reporter.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[::2] == [
        f"compiling the training step for 2 x {n} x 32 pixels ..." for n in (8, 16)
    ]
    assert all(line.startswith("compiled the training step in ") for line in lines[1::2])


def test_the_tenth_step_tells_the_time_left(tmp_path, capsys):
    reporter = Reporter(tmp_path, Config(steps=100))
    for step in range(1, 13):
        reporter.advance(step, None)
    reporter.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("step 10/100  ") and line.endswith(" left")


# ------------------------------------------------------------------------------------------ W&B
@pytest.fixture
def wandb(monkeypatch):
    """A module `wandb` that keeps what it is told."""
    fake = types.ModuleType("wandb")
    fake.calls = []

    class Run:
        def __getattr__(self, name):
            return lambda *args, **kwargs: fake.calls.append((name, *args, kwargs))

    def init(**options):
        fake.calls.append(("init", options))
        return Run()

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_weights_and_biases_gets_the_same_numbers_in_one_run(tmp_path, wandb):
    config = Config(steps=10, batch_size=2, wandb="upsampling")
    validate(config)
    for start in (0, 1):
        reporter = Reporter(tmp_path, config, start=start)
        reporter.train(start + 1, {"loss": 0.5})
        reporter.evaluation(start + 1, SCORES, SUMMARY)
        reporter.close()
    inits = [call[1] for call in wandb.calls if call[0] == "init"]
    assert inits[0] == inits[1] and inits[0]["id"] == (tmp_path / "wandb_id").read_text()
    assert inits[0]["project"] == "upsampling" and inits[0]["config"]["wandb"] == "upsampling"
    logged = [call[1] for call in wandb.calls if call[0] == "log"]
    assert logged == read_metrics(tmp_path / "metrics.jsonl")
    assert [call[0] for call in wandb.calls].count("finish") == 2


def test_weights_and_biases_that_refuses_or_is_not_there(tmp_path, wandb, monkeypatch):
    def init(**_):
        raise RuntimeError("api_key not configured")

    wandb.init = init
    config = Config(wandb="upsampling")
    with pytest.raises(ConfigError, match="config.wandb is 'upsampling'.*api_key.*WANDB_MODE"):
        Reporter(tmp_path, config)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"config.wandb .*pip install 'resfu_jax\[wandb\]'"):
        validate(config)


# ------------------------------------------------------------------------------------------ damage
WHOLE = [b'{"step": 1, "loss": 2.0}', b'{"step": 2, "loss": NaN, "val/iou/\xc3\xa9": 1e-3}']


@pytest.mark.parametrize(
    ("before", "between", "after", "damaged"),
    [
        (b"", b"", b"", 0),
        (b"", b"", b'{"step": 3, "lo', 1),  # killed
        (b"", b"", b'{"step": 3, "lo\n', 1),
        (b"", b"", b"\0" * 300 + b"\n", 1),  # a power loss
        (b"", b"", b"\0" * 300, 1),
        (b"", b"\n \n\r\n", b"\n\n", 0),  # blank lines
        (b"", b'{"step": 1, "lo\n', b"", 1),
        (b'{"step": 1\n', b"loss\n", b"\xff\xfe\n", 3),
        (b"", b'[]\n{}\n3\n{"step": "x"}\n{"step": true}\n', b"", 5),
        (b"[" * 100_000 + b"\n", b"", b"", 1),
    ],
)
def test_whole_lines_are_kept_and_the_rest_moved_aside(
    tmp_path, capsys, caplog, before, between, after, damaged
):
    path = tmp_path / "metrics.jsonl"
    content = before + WHOLE[0] + b"\n" + between + WHOLE[1] + b"\n" + after
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert [line["step"] for line in read_metrics(path)] == [1, 2]
    lines = "1 damaged line" if damaged == 1 else f"{damaged} damaged lines"
    assert (f"left out {lines}" in caplog.text) == (damaged > 0)
    assert path.read_bytes() == content  # reading changes nothing

    Reporter(tmp_path, CONFIG, start=2).close()
    assert path.read_bytes() == b"".join(line + b"\n" for line in WHOLE)
    aside = tmp_path / "metrics.jsonl.damaged"
    said = f"metrics.jsonl had {lines}, now in {aside}"
    assert (said in capsys.readouterr().err) == aside.exists() == (damaged > 0)
    if damaged:
        kept = aside.read_bytes()
        assert kept.count(b"\n") == damaged
        assert all(part.strip(b"\n ") in kept for part in (before, after))


def test_a_line_behind_zeros_is_whole(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(WHOLE[0] + b"\n\0\0\0" + WHOLE[1])
    Reporter(tmp_path, CONFIG, start=2).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == WHOLE[0] + b"\n" + WHOLE[1] + b"\n"
    assert not (tmp_path / "metrics.jsonl.damaged").exists()


def test_names_are_no_markup(capsys):
    scores = SCORES | {"iou/[bold]": 0.25, "iou/[/x]": 0.75}
    names = ("[bold]", "[/x]", ":smile:")
    print_table("[red]data[/red], [/]", scores, names, {"workdir": "/runs/[a]/:smile:/[/b]"})
    printed = capsys.readouterr().out
    for text in (*names, "[red]data[/red], [/]", "workdir: /runs/[a]/:smile:/[/b]", "0.2500"):
        assert text in printed
