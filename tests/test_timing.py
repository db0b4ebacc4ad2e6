"""How long a run will still take, by a clock that the test moves."""

import pytest

from resfu_jax.training import CheckpointConfig, Config, EvalConfig, Stopwatch


class Run:
    """A run of 100 steps of 2 s, evaluated every 40 for 30 s and saved every 20 for 1 s."""

    COMPILES = {"training": 60.0, "evaluation": 30.0}

    def __init__(self, start=0, **options):
        self.now, self.config = 1000.0, Config(
            steps=100, eval=EvalConfig(every=40), checkpoint=CheckpointConfig(every=20)
        )  # fmt: skip
        self.watch = Stopwatch(self.config, start=start, clock=lambda: self.now, **options)
        self.step, self.met = start, set()

    def compile(self, what):
        if what not in self.met:
            self.met.add(what)
            with self.watch.aside("compilation"):
                self.now += self.COMPILES[what]

    def go_to(self, step):
        """As train.py, up to the report of a step; what is left then, and when it is over."""
        while self.step < step:
            self.between()
            self.step += 1
            self.compile("training")
            self.now += 2.0 if self.met != {"training"} or self.step > 1 else 7.0  # reads images
            if self.step in (1, 10) or self.step % 5 == 0:
                self.watch.mark(self.step, first=self.step == 1)
        return self.watch.left(self.step)

    def between(self):
        last = self.step == self.config.steps
        evaluated = self.step and (self.step % 40 == 0 or last)
        if self.step and (evaluated or self.step % 20 == 0):
            with self.watch.aside("checkpoint"):
                self.now += 1.0
        if evaluated:
            with self.watch.aside("evaluation"):
                self.compile("evaluation")
                self.now += 30.0

    def finish(self):
        self.go_to(100)
        self.between()
        return self.now


def test_what_is_left_after_ten_steps_is_right_within_a_minute():
    """Though it has compiled for half of the time so far, and nothing was saved or evaluated."""
    run = Run(evaluation_steps=12.0)
    left, then = run.go_to(10), run.now
    assert left == pytest.approx(run.finish() - then, abs=60)
    assert left == pytest.approx(90 * 2 + 3 * 12 * 2 + 60 / 4)


@pytest.mark.parametrize("step", [41, 55, 60, 80, 81, 99, 100])
def test_it_is_exact_once_everything_has_been_timed(step):
    run = Run()
    left, then = run.go_to(step), run.now
    assert left == pytest.approx(run.finish() - then, abs=1e-6)


def test_asides_count_once_and_not_as_steps():
    run = Run()
    run.go_to(41)
    assert run.watch.seconds == 41 * 2 + 5
    assert run.watch.last("evaluation") == 30 and run.watch.last("compilation") == 30


def test_a_run_that_continues_and_one_that_changes_its_speed():
    run = Run(start=60)
    assert run.go_to(61) > 0
    run.go_to(75)
    now = 0.0
    watch = Stopwatch(Config(steps=1000), clock=lambda: now)
    for step in range(1, 41):
        now += 1.0 if step <= 20 else 3.0
        watch.mark(step)
    assert watch.left(40) == pytest.approx(3.0 * (1000 - 40))
