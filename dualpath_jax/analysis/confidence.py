"""Computes how far an accuracy could be off because of the choice of the videos."""


def confidence_interval(fraction: float, number: int) -> tuple[float, float]:
    """Return Wilson's 95% confidence interval (low, high) of a fraction of `number` videos.

    It accounts only for the random choice of the videos.
    """
    from scipy import stats  # slow to import

    test = stats.binomtest(min(round(fraction * number), number), number)
    interval = test.proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def format_accuracy(fraction: float, number: int) -> str:
    """Format an accuracy on `number` videos: "0.8000 (95%: 0.490 to 0.943)", with its interval."""
    low, high = confidence_interval(fraction, number)
    return f"{fraction:.4f} (95%: {low:.3f} to {high:.3f})"
