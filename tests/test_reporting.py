import json

import pytest

from resfu_jax.training import Reporter, print_table, read_metrics

SCORES = {"miou": 0.5, "boundary_iou": 0.4, "pixel_accuracy": 0.9, "iou/a": 0.5}


def report(workdir, steps, start=0):
    reporter = Reporter(workdir, steps=10, batch_size=2, start=start)
    for step in steps:
        reporter.advance(step)
        reporter.train(step, {"loss": 1.0 / step})
    reporter.evaluation(step, SCORES)
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
    reporter = Reporter(tmp_path, steps=10, batch_size=4, utilisation=0.5)
    reporter.train(2, {"loss": 1.0})
    reporter.close()
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line["mfu"] == pytest.approx(0.5 * line["images_per_second"] / 4)
    assert "MFU" in capsys.readouterr().err


def test_silent(tmp_path, capsys):
    reporter = Reporter(tmp_path / "absent", steps=10, batch_size=2, silent=True)
    reporter.message("text")
    reporter.advance(1)
    reporter.train(1, {"loss": 1.0})
    reporter.evaluation(1, SCORES)
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
