"""What a person sees of a probe while it runs."""

import sys
import time
from typing import Any

from resfu_jax._extras import extra

with extra("train"):
    from tqdm import tqdm


class Clock:
    """Seconds between laps."""

    def __init__(self):
        self._start = time.perf_counter()

    def lap(self) -> float:
        """Since the last one."""
        now = time.perf_counter()
        self._start, seconds = now, now - self._start
        return seconds


def progress(what: str, total: int, unit: str) -> Any:
    """A bar with the time left; in a log file it is written anew every half minute."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=what,
        unit=unit,
        file=sys.stderr,
        dynamic_ncols=terminal,
        mininterval=0.1 if terminal else 30,
        leave=True,
    )
