"""A process that has computed a large result ends when it wants to."""

import subprocess
import sys
import textwrap
import time

import pytest

# A result of 16 MiB, on one device.
COMPUTE = """
    import os, sys, threading, time
    import jax
    from resfu_jax import create_upsampler

    up = create_upsampler("dysample", features=64, scale=4)
    jax.jit(lambda x: up(x))(jax.numpy.ones((1, 64, 64, 64))).block_until_ready()
"""
BUSY = """
    def work():
        while True:
            pass

    threading.Thread(target=work, daemon=True).start()
    print("exits at", time.time(), flush=True)
"""
FORK = """
    if os.fork() == 0:
        sys.exit()
    print("exits at", time.time(), flush=True)
    os.wait()  # with which status is JAX's: it does not promise to survive a fork
"""


@pytest.mark.parametrize("ending", [BUSY, FORK], ids=["busy", "fork"])
def test_exit_does_not_wait(ending):
    script = textwrap.dedent(COMPUTE) + textwrap.dedent(ending)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    end = time.time()
    assert done.returncode == 0, done.stderr
    # Far more than it takes; to wait for other threads took 30 s, and for a forked child forever.
    assert end - float(done.stdout.removeprefix("exits at")) < 15
