"""train.py in two processes, as on two hosts: same numbers, one stop, and one process goes on."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from resfu_jax.data import prepare

ROOT = pathlib.Path(__file__).parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A few small images in CamVid's layout: quicker to make than `shapes`."""
    raw, rng = tmp_path_factory.mktemp("raw"), np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 5)):
        for kind, shape, high in (("", (32, 40, 3), 256), ("annot", (32, 40), 12)):
            (raw / f"{split}{kind}").mkdir()
            for i in range(count):
                pixels = rng.integers(0, high, shape, np.uint8)
                Image.fromarray(pixels).save(raw / f"{split}{kind}" / f"0001TP_{split}{i}.png")
    directory = tmp_path_factory.mktemp("data")
    prepare("camvid", directory, raw)
    return directory


def start(data_dir, workdir, *arguments):
    environment = os.environ | {
        "RESFU_DATA_DIR": str(data_dir),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1",
    }
    command = [sys.executable, "train.py", "--config=tests/tiny_config.py", f"--workdir={workdir}"]
    camvid = ["--config.data.name=camvid", "--config.data.resize_scale=1.0"]
    return subprocess.Popen(
        [*command, *camvid, "--config.eval.batch_size=4", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_two(data_dir, workdir, *arguments, each=("", "")):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    together = (f"--coordinator_address=localhost:{port}", "--num_processes=2", *arguments)
    return [
        start(data_dir, workdir, *together, f"--process_id={i}", *each[i].split()) for i in range(2)
    ]


def end(*processes):
    """Return codes and outputs."""
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:  # A process whose peer has ended waits for it.
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], outputs


def lines(workdir):
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def values(workdir, *names):
    return [[line[name] for name in names] for line in lines(workdir) if names[0] in line]


def test_two_processes_train_stop_and_hand_over(data_dir, tmp_path):
    workdir, alone = tmp_path / "together", tmp_path / "alone"
    reference = start(data_dir, alone, "--config.eval.every=8")
    processes = start_two(
        data_dir,
        workdir,
        "--config.parallel.shard_parameters",
        "--config.parallel.shard_at_least=256",
        "--config.profile.start=1",
        "--config.profile.steps=1",
    )
    deadline = time.monotonic() + 300
    while not values(workdir, "loss"):
        if any(process.poll() is not None for process in processes) or time.monotonic() > deadline:
            pytest.fail(str(end(*processes)))
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)  # to the one that does not report
    codes, (output, silent) = end(*processes)
    assert codes == [128 + signal.SIGTERM] * 2, (output, silent)
    assert "2 x cpu in 2 processes" in output and "stopped at step" in output
    assert "step" not in silent
    stopped = lines(workdir)[-1]["step"]
    assert 1 <= stopped < 8
    assert (workdir / "checkpoints" / str(stopped)).is_dir()
    assert len(list((workdir / "profile").rglob("*.xplane.pb"))) == 1

    # One process goes on with whole parameters, and ends where one alone does.
    utilisation = "--config.parallel.peak_tflops=0.001"
    codes, outputs = end(reference)  # It leaves its compiled programs to the next.
    assert codes == [0], outputs
    codes, (output,) = end(start(data_dir, workdir, "--config.eval.every=8", utilisation))
    assert codes == [0], output
    assert f"continuing from step {stopped}" in output and "Gflop a step" in output
    for line in lines(workdir):
        assert ("mfu" in line) == ("loss" in line and line["step"] > stopped)
    names = ("loss", "step", "gradient_norm", "learning_rate")
    assert [step for _, step in values(workdir, "loss", "step")] == list(range(1, 9))
    np.testing.assert_allclose(values(workdir, *names), values(alone, *names), rtol=2e-5)

    # Two processes evaluate what one has trained.
    codes, (output, silent) = end(*start_two(data_dir, workdir, "--mode=eval", "--checkpoint=8"))
    assert codes == [0, 0], (output, silent)
    assert "pixel accuracy" in output and "pixel accuracy" not in silent
    again = json.loads((workdir / "eval_8.json").read_text())
    last = {k: v for k, v in lines(workdir)[-1].items() if k.startswith("val/")}
    assert {f"val/{k}": v for k, v in again.items() if k != "step"} == last


def test_a_signal_to_one_process_while_they_start_ends_both(data_dir, tmp_path):
    workdir = tmp_path / "run"
    processes = start_two(data_dir, workdir)
    while not workdir.exists():  # they have met
        assert all(process.poll() is None for process in processes), end(*processes)
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGINT)
    codes, (output, silent) = end(*processes)
    assert codes == [128 + signal.SIGINT] * 2, (output, silent)
    told = [line for line in (output + silent).splitlines() if not line.startswith("[Gloo]")]
    assert told == ["stopped; the same command continues"]
    assert lines(workdir) == []


def test_another_config_in_one_process_is_told_by_all(data_dir, tmp_path):
    processes = start_two(data_dir, tmp_path, each=("--config.seed=0", "--config.seed=1"))
    codes, outputs = end(*processes)
    assert codes == [1, 1]
    for output in outputs:
        assert "error: all processes have to be given the same config" in output
        assert "Traceback" not in output
