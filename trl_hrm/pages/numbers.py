"""Format numbers for pages and terminals."""


def percent(value: float | None) -> str:
    """
    Format a share in percent.

    Example:

    ```python
    >>> percent(0.8125)
    '81.2 %'
    ```
    """
    return "–" if value is None else f"{100 * value:.1f} %"


def in_points(value: float) -> str:
    """Format a difference of two shares in percentage points."""
    return f"{round(100 * value, 1) + 0.0:.1f} points".replace("-", "−")  # + 0.0: no negative zero


def points_between(low: float, high: float) -> str:
    """
    Format an interval in percentage points.

    Example:

    ```python
    >>> points_between(-0.05, 0.1)
    '−5.0 to 10.0'
    ```
    """
    ends = (f"{100 * end + 0.0:.1f}".replace("-", "−") for end in (low, high))
    return " to ".join(ends)  # an end below 0 keeps its sign, so that an interval that excludes 0 looks like one


def tint(score: float) -> str:
    """
    Return the colour of a score as a CSS value: orange at 0, grey at 0.5, blue at 1.

    Example:

    ```python
    >>> tint(0.75)
    'color-mix(in oklab, var(--high) 50%, var(--middle))'
    ```
    """
    share = 2 * min(max(score, 0.0), 1.0) - 1
    return f"color-mix(in oklab, var(--{'high' if share > 0 else 'low'}) {100 * abs(share):.0f}%, var(--middle))"
