"""How long a run has taken and will take: its steps, and apart from them what comes between."""

import collections
import contextlib
import math
import time
from collections.abc import Callable, Iterator

from resfu_jax.data import EvalBatches
from resfu_jax.training.config import Config


class Stopwatch:
    """Times steps, and aside from them compilations, checkpoints and evaluations.

    Args:
      config: how many steps there are, and when is saved and evaluated.
      start: the step that the run continues from.
      evaluation_steps: an evaluation takes as long as so many steps, while none has been timed.
      clock: seconds since some moment.
    """

    def __init__(
        self,
        config: Config,
        *,
        start: int = 0,
        evaluation_steps: float = 0.0,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._config, self._evaluation_steps, self._clock = config, evaluation_steps, clock
        self._begin, self._aside = clock(), 0.0
        self._times: dict[str, list[float]] = collections.defaultdict(list)
        # Of the latest reports: the speed may change, as others come to use the machine.
        self._marks = collections.deque([(start, 0.0)], maxlen=11)

    @property
    def seconds(self) -> float:
        """Seconds of all steps so far, without what was timed aside."""
        return self._clock() - self._begin - self._aside

    @contextlib.contextmanager
    def aside(self, what: str) -> Iterator[None]:
        """What runs in it is no step; what is timed aside in it counts there alone.

        Args:
          what: "compilation", "checkpoint" or "evaluation".
        """
        before = self.seconds
        yield
        took = self.seconds - before
        self._aside += took
        self._times[what].append(took)

    def last(self, what: str) -> float:
        """Seconds that the last one took."""
        return self._times[what][-1]

    def mark(self, step: int, *, first: bool = False) -> None:
        """So many steps are done, on the device, too.

        Args:
          step: number of the last one.
          first: the ones before had more to do, such as to read the first images: forget them.
        """
        if first:
            self._marks.clear()
        if not self._marks or step > self._marks[-1][0]:
            self._marks.append((step, self.seconds))

    def left(self, step: int) -> float:
        """Seconds until the run has ended, after a step and before it is saved or evaluated.

        The rest of the steps, of the checkpoints and of the evaluations take what those so far have
        taken in the mean. The first evaluation, if it is to come, is thought to compile for a
        quarter of the training step's time: it has no backward pass.
        """
        (first, since), (last, until) = self._marks[0], self._marks[-1]
        a_step = (until - since) / max(last - first, 1)
        total, every, saved = self._config.steps, self._config.eval.every, self._config.checkpoint
        evaluations = _multiples(step, total, every)
        checkpoints = evaluations + _multiples(step, total, saved.every)
        checkpoints -= _multiples(step, total, math.lcm(every, saved.every))
        if total % every:  # the last step is evaluated, and so saved, too
            evaluations += 1
            checkpoints += total % saved.every > 0
        seconds = a_step * (total - step) + checkpoints * self._mean("checkpoint", 0.0)
        if not self._times["evaluation"]:
            seconds += self._mean("compilation", 0.0) / 4 * (evaluations > 0)
        return seconds + evaluations * self._mean("evaluation", a_step * self._evaluation_steps)

    def _mean(self, what: str, otherwise: float) -> float:
        times = self._times[what]
        return sum(times) / len(times) if times else otherwise


def _multiples(first: int, last: int, of: int) -> int:
    """How many there are from the first number to the last."""
    return last // of - (first - 1) // of


def evaluation_steps(config: Config, batches: EvalBatches) -> float:
    """How many training steps an evaluation takes, roughly: by its pixels, without backward pass.

    Args:
      config: of the run.
      batches: of the whole validation split.
    """
    protocol = config.eval
    pixels = sum(height * width for _, (height, width) in batches.slots)
    views = sum(scale**2 for scale in protocol.scales) * (1 + protocol.flip)
    if protocol.mode == "slide" and protocol.crop and protocol.stride:
        views *= math.prod(protocol.crop) / math.prod(protocol.stride)  # how windows overlap
    of_a_step = config.batch_size * math.prod(config.data.crop_size)
    return pixels * views / of_a_step / 3
