"""Counts the CPU cores that this process may use."""

import os

CAN_CHOOSE_CORES = hasattr(os, "sched_getaffinity")  # Linux


def num_cores() -> int:
    """Return the number of cores that this process may run on, at least 1."""
    return len(os.sched_getaffinity(0)) if CAN_CHOOSE_CORES else os.cpu_count() or 1
