"""Times several calls in turns, so that a disturbance of the machine affects all of them."""

import time
from collections.abc import Callable
from typing import Any


def time_interleaved(
    calls: dict[str, Callable[[], Any]], rounds: int, log: Callable[[str], None] = lambda line: None
) -> dict[str, list[float]]:
    """Time each call once per round, after a first call that is not counted.

    Args:
      calls: functions by name; each waits for its result.
      rounds: number of timed calls of each function; every second round runs in reverse order.
      log: receives a line about each step.

    Returns:
      Seconds of each round, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        log(f"{name}: compiling")
        call()
    for number in range(rounds):
        log(f"round {number + 1} of {rounds}")
        for name in list(calls)[:: 1 if number % 2 == 0 else -1]:
            start = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds
