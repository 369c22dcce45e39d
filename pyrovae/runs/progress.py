"""How far an evaluation has come, for whoever wants to hear of it."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# What is called with each line that a user should read; None where nobody listens.
Say = Callable[[str], object]
# Lines said at most for the rows of an evaluation whose output is no terminal.
ROW_LINES = 10


def silent(text: str) -> None:
    """Say nothing."""


@contextmanager
def rows_done(total: int, what: str, say: Say | None) -> Iterator[Callable[[int], object]]:
    """What is called with the number of rows done: a bar on a terminal, elsewhere a few plain lines that say it."""
    from tqdm import tqdm

    if say is None:
        yield lambda done: None
        return
    if sys.stderr is not None and sys.stderr.isatty():
        with tqdm(total=total, unit="row", leave=False) as bar:
            yield lambda done: bar.update(done - bar.n)
        return
    started, told = time.perf_counter(), 0
    say(f"{what}: {total} rows")

    def tell(done: int) -> None:
        nonlocal told
        if done < total and done * ROW_LINES // total > told:
            told = done * ROW_LINES // total
            say(f"  {done} of {total} rows in {time.perf_counter() - started:.0f} s")

    yield tell
