"""Do two variants differ? Means with confidence intervals, and a test of differences.

Variants are trained with the same seeds, so a difference is tested within pairs: a seed sets the
initial weights and the batches, and what it adds to the loss of both variants cancels out.
Student's t distribution accounts for a standard deviation that is estimated from a few seeds. A
study tests many variants at once, and of twenty without any effect one would be "significant" at
0.05; Holm's method corrects for this.
"""

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from viz.curve import BLUE, ORANGE

try:
    from scipy import stats
except ImportError:
    sys.exit("error: the studies need SciPy: pip install scipy")

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]  # of a table: column -> value

CONFIDENCE = 0.95
SIGNIFICANT = 0.05  # p-values below it

COLUMNS = ("difference", "95% from", "to", "p")  # that `add_differences` adds to a table


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# --- means and differences


def margin(values: list[float]) -> float:
    """The half width of the confidence interval of the mean; NaN for a single value, infinite if
    one of the values is."""
    if not all(map(math.isfinite, values)):
        return math.inf
    if len(values) < 2:
        return math.nan
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
    return float(quantile * stats.sem(values))


def p_value(differences: list[float]) -> float:
    """The two-sided p-value of the t-test that the mean of two or more differences is 0."""
    if len(set(differences)) == 1:  # without a spread
        return float(differences[0] == 0)
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def holm(p_values: list[float]) -> list[float]:
    """The p-values of several tests, corrected so that 0.05 is the probability of one or more wrong
    discoveries (Holm 1979): the smallest is multiplied by the number of tests, the next one by one
    less, and so on; none becomes smaller than the one before.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected, highest = [0.0] * len(p_values), 0.0
    for i, at in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - i) * p_values[at]))
        corrected[at] = highest
    return corrected


def add_differences(
    rows: list[Row], values: list[list[float]], bases: list[int] | None = None
) -> None:
    """Add COLUMNS to the rows of a table. values: of each row, one per seed; bases: the row that
    each one is compared to, by default the first one. A row that is its own base is not compared.

    The columns are the mean difference to the base, its confidence interval, and the p-value, which
    is corrected for all comparisons of the table. A variant that diverged has only that word.
    """
    bases = bases or [0] * len(rows)
    tested: list[tuple[Row, float]] = []
    for i, (row, base) in enumerate(zip(rows, bases, strict=True)):
        row |= dict.fromkeys(COLUMNS, "")
        if base == i:
            continue
        differences = [b - a for a, b in zip(values[base], values[i], strict=True)]
        if not all(map(math.isfinite, differences)):
            row["difference"] = "diverged"
            continue
        center, half = mean(differences), margin(differences)
        row |= {"difference": center, "95% from": center - half, "to": center + half}
        if len(differences) > 1:
            tested.append((row, p_value(differences)))
    for (row, _), p in zip(tested, holm([p for _, p in tested]), strict=True):
        row["p"] = p


def is_significant(row: Row) -> bool:
    """Whether the difference in a row of `add_differences` is."""
    return isinstance(row["p"], float) and row["p"] < SIGNIFICANT


def plot_differences(axes: "Axes", names: list[str], rows: list[Row], values: list[list[float]],
                     title: str) -> None:  # fmt: skip
    """The difference of each row to the first one: a dot per seed and the confidence interval of
    the mean. Rows and values are those of `add_differences`."""
    axes.axvline(0, color="gray", linewidth=1)
    for y, (row, losses) in enumerate(zip(rows, values, strict=True)):
        color = ORANGE if is_significant(row) else BLUE
        if row["difference"] == "diverged":
            axes.text(0, y, " diverged", color=ORANGE, va="center")
        elif y:
            pairs = zip(values[0], losses, strict=True)
            axes.plot([b - a for a, b in pairs], [y] * len(losses), "o", color=color, alpha=0.4)
            half = row["to"] - row["difference"]
            axes.errorbar(row["difference"], y, xerr=half, fmt="|", color=color, capsize=4)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel=f"validation loss minus that of {names[0]} (nats per token)")
    axes.set_title(f"{title}\none dot per seed, bars: 95% interval, orange: significant")
