"""How many processors there are for this process.

Public: `num_cores`, `CAN_CHOOSE_CORES`.
"""

import os

CAN_CHOOSE_CORES = hasattr(os, "sched_getaffinity")  # Linux


def num_cores() -> int:
    """Cores that this process may run on, at least 1."""
    return len(os.sched_getaffinity(0)) if CAN_CHOOSE_CORES else os.cpu_count() or 1
