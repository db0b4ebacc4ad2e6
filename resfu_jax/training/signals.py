"""Stopping a run politely."""

import signal
from types import FrameType


class StopSignals:
    """Remembers the first SIGINT or SIGTERM, so that the loop can save before it stops.

    A second signal acts at once, as usual.

    Attributes:
        received: number of the signal, or 0.
    """

    def __init__(self):
        self.received = 0
        self._previous = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGINT, signal.SIGTERM)
        }

    def close(self) -> None:
        """Signals act as before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self.close()
