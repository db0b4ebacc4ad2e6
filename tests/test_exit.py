"""A process that has computed a large result ends when it wants to."""

import subprocess
import sys
import textwrap
import time

# A result of 16 MiB, on one device.
COMPUTE = """
    import atexit, threading, time

    handlers, register = [], atexit.register

    def recorded(f, *args, **options):
        handlers.append(str(f.__module__).partition(".")[0])
        return register(f, *args, **options)

    atexit.register = recorded

    import jax
    from resfu_jax import create_upsampler

    up = create_upsampler("dysample", features=64, scale=4)
    jax.jit(lambda x: up(x))(jax.numpy.ones((1, 64, 64, 64))).block_until_ready()
"""


def run(ending):
    """The last line that the process prints, and when it has ended."""
    script = textwrap.dedent(COMPUTE) + textwrap.dedent(ending)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    end = time.time()
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1], end


def test_exit_does_not_wait_for_a_busy_thread():
    last, end = run("""
        def work():
            while True:
                pass

        threading.Thread(target=work, daemon=True).start()
        print(time.time(), flush=True)
    """)
    assert end - float(last) < 15  # far more than it takes; to wait for the thread took 30 s


def test_nothing_of_the_package_runs_at_exit():
    """In a forked child it would wait forever for threads that only its parent has.

    (Whether such a child's interpreter ends is up to JAX, which does not promise it.)
    """
    last, _ = run("print(handlers)")
    assert "'jax'" in last
    assert "'resfu_jax'" not in last
