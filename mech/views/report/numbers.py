"""Numbers as the report writes them: a mean with its interval, and a dash for what could not be computed."""

from collections.abc import Callable, Mapping

Bounds = Mapping[str, float | None]


def percent(interval: Bounds | None) -> str:
    """A share of one, in percent."""
    return with_interval(interval, lambda value: f"{value:z.1%}")


def in_points(interval: Bounds | None) -> str:
    """A difference of shares, in percentage points."""
    return with_interval(interval, lambda value: f"{100 * value:z.1f}")


def number(interval: Bounds | None) -> str:
    """A number in its own unit."""
    return with_interval(interval, lambda value: f"{value:z.2f}")


def with_interval(interval: Bounds | None, shown: Callable[[float], str]) -> str:
    """A mean with its interval; JSON has null for what could not be computed (one sample has no interval)."""
    if interval is None:  # no counterfactual: no logit difference
        return "–"
    mean, low, high = (interval[key] for key in ("mean", "low", "high"))
    if mean is None:
        return "–"
    if low is None or high is None:
        return shown(mean)
    return f"{shown(mean)} <small>[{shown(low)}, {shown(high)}]</small>"


def p_value(value: float | None) -> str:
    """The p-value of a test."""
    return "–" if value is None else "&lt; 0.001" if value < 0.001 else f"{value:.3f}"
