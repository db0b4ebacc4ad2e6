"""What people read: commands whose output nobody reads to its end, and counts of things."""

import contextlib
import os
import select
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def readers_may_leave() -> Iterator[None]:
    """Around a command: it ends without a word, with status 1, once nobody reads its output.

    As after `| head`. It flushes the output, since Python would complain of what is left at exit;
    see "Note on SIGPIPE" in the documentation of Python's module `signal`.

    Raises:
      SystemExit: nobody does.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        outputs = [sys.stdout.fileno(), sys.stderr.fileno()]
        poll = select.poll()
        for output in outputs:
            poll.register(output, 0)
        if not poll.poll(0):
            raise  # another pipe, such as one to a process of ours that has died
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for output in outputs:
            os.dup2(nowhere, output)
        sys.exit(1)


def counted(number: int, noun: str, plural: str = "") -> str:
    """`1 image`, `2 images`.

    Args:
      number: how many there are.
      noun: for one.
      plural: for any other number; by default with an s.
    """
    return f"{number} {noun if number == 1 else plural or f'{noun}s'}"
