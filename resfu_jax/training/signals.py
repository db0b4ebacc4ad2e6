"""Stopping a run politely."""

import signal
import sys
from types import FrameType

import jax

from resfu_jax.training.devices import agreed_stop

STOPPING = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A signal ends the run. The message says where it stopped.

    Attributes:
      number: of the signal.
    """

    def __init__(self, number: int, message: str = "stopped"):
        super().__init__(message)
        self.number = number


class StopSignals:
    """Answers the first SIGINT or SIGTERM of a run; a second one kills the process.

    While a run starts (`at_once`) and has nothing to lose, the signal raises `Stopped` wherever the
    process is. That alone does not do: Python drops what is raised while it happens to be in a
    callback of its garbage collector or of a weak reference, of which JAX has many. So the signal
    is also remembered, and `check` raises it before each long step. In several processes it is
    only remembered, since all have to stop at the same place.

    Attributes:
      received: number of the signal, or 0.
      at_once: False, once there is something to save before the process ends.
    """

    def __init__(self):
        self.received = 0
        self.at_once = True
        self._previous = {n: signal.signal(n, self._handle) for n in STOPPING}
        self._report = sys.unraisablehook
        sys.unraisablehook = self._dropped

    def check(self, *, ask: bool = True) -> None:
        """Raises `Stopped`, in all processes if one of them has received a signal.

        Args:
          ask: as for `agreed_stop`.
        """
        if number := agreed_stop(self.received, ask=ask):
            raise Stopped(number)

    def close(self) -> None:
        """Signals act as before."""
        sys.unraisablehook = self._report
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for n in STOPPING:
            signal.signal(n, signal.SIG_DFL)  # A second one does not wait for Python.
        if self.at_once and not jax.distributed.is_initialized():
            raise Stopped(number)

    def _dropped(self, what: "sys.UnraisableHookArgs") -> None:
        if what.exc_type is not Stopped:  # `check` comes back to it
            self._report(what)
