"""Timing things that take turns, so that what disturbs the machine disturbs all of them alike.

Public: `time_interleaved`.
"""

import time
from collections.abc import Callable
from typing import Any


def time_interleaved(
    runs: dict[str, Callable[[], Any]], rounds: int, tell: Callable[[str], None] = lambda line: None
) -> dict[str, list[float]]:
    """Seconds of each call by round, after one that is not counted.

    Args:
      runs: by name; each call waits for its result.
      rounds: times each is called; in every second round the last comes first.
      tell: told what is being done.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for name, call in runs.items():
        tell(f"{name}: compiling")
        call()
    for number in range(rounds):
        tell(f"round {number + 1} of {rounds}")
        for name in list(runs)[:: 1 if number % 2 == 0 else -1]:
            start = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds
