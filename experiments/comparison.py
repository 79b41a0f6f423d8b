"""Do two variants differ? Means with confidence intervals, and a test of differences.

A difference is tested within pairs of runs with the same seed, which sets the initial weights and
the batches of both: what it adds to their losses cancels out. Of twenty variants without any effect
one would be "significant" at 0.05; Holm's method corrects for this.
"""

import math
import sys
from collections.abc import Iterable, Sequence
from statistics import fmean as mean
from typing import Any

from matplotlib.axes import Axes

from viz.curve import BLUE, COLORS, ORANGE

try:
    from scipy import stats
except ImportError:
    sys.exit("error: the studies need SciPy: pip install scipy")

Row = dict[str, Any]  # of a table: column -> value

LOSS = "validation loss (nats per token)"  # the label of an axis


def margin(values: list[float]) -> float:
    """The half width of the confidence interval of the mean; NaN if there is none."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return math.nan
    quantile = stats.t.ppf(0.975, len(values) - 1)
    return float(quantile * stats.sem(values))


def mean_columns(name: str, values: list[float], margin_name: str = "95% margin") -> Row:
    """The columns of a table for these values: the mean and the margin."""
    return {name: mean(values), margin_name: margin(values)}


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
    rows: list[Row], values: Iterable[list[float]], bases: list[int] | None = None
) -> list[Row]:
    """The rows of a table with further columns. values: of each row, one per seed; bases: the row
    that each one is compared to, by default the first one. A row that is its own base is not.

    The columns are the mean difference to the base, its confidence interval, and the p-value, which
    is corrected for all comparisons of the table. A variant that diverged has only that word.
    """
    rows = [row | dict.fromkeys(("difference", "95% from", "to", "p"), "") for row in rows]
    values = list(values)
    for i, base in enumerate(bases or [0] * len(rows)):
        if base == i:
            continue
        differences = [b - a for a, b in zip(values[base], values[i], strict=True)]
        if not all(map(math.isfinite, differences)):
            rows[i]["difference"] = "diverged"
            continue
        center, half = mean(differences), margin(differences)
        rows[i] |= {"difference": center, "95% from": center - half, "to": center + half}
        if len(differences) > 1:
            rows[i]["p"] = p_value(differences)
    tested = [row for row in rows if row["p"] != ""]
    for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p"] = p
    return rows


def plot_seeds(axes: Axes, groups: dict[str, list[float]], colors: Sequence[str]) -> None:
    """The values of each name, from top to bottom: a dot per seed, the mean and its interval."""
    for y, (values, color) in enumerate(zip(groups.values(), colors, strict=False)):
        if not all(map(math.isfinite, values)):
            axes.text(0, y, " diverged", color=color, va="center")
        elif values:
            axes.plot(values, [y] * len(values), "o", color=color, alpha=0.4)
            axes.errorbar(mean(values), y, xerr=margin(values), fmt="|", color=color, capsize=4)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.invert_yaxis()


def plot_differences(
    axes: Axes, rows: list[Row], losses: dict[str, list[float]], title: str
) -> None:
    """The differences of losses to those of the first variant; rows: of `add_differences`."""
    (base, first), *others = losses.items()
    groups: dict[str, list[float]] = {base: []}
    for name, values in others:
        groups[name] = [b - a for a, b in zip(first, values, strict=True)]
    significant = [isinstance(row["p"], float) and row["p"] < 0.05 for row in rows]
    axes.axvline(0, color="gray", linewidth=1)
    plot_seeds(axes, groups, [ORANGE if yes else BLUE for yes in significant])
    axes.set(xlabel=f"validation loss minus that of {base} (nats per token)")
    axes.set_title(f"{title}\none dot per seed, bars: 95% interval, orange: significant")


def plot_band(
    axes: Axes, x: list[float], values: list[list[float]], style: str, color: str, label: str
) -> None:
    """A line through the means over the seeds, in a band from the lowest to the highest value."""
    axes.plot(x, [mean(v) for v in values], style, color=color, label=label)
    lowest, highest = [min(v) for v in values], [max(v) for v in values]
    axes.fill_between(x, lowest, highest, color=color, alpha=0.25)


def plot_curves(axes: Axes, runs: dict[str, list[dict[str, Any]]]) -> None:
    """The validation loss of each variant's runs, without that of the untrained model."""
    for (name, results), color in zip(runs.items(), COLORS, strict=False):
        logs = (result["log"][1:] for result in results)
        by_step = list(zip(*logs, strict=False))  # as far as all seeds got
        steps = [records[0]["step"] for records in by_step]
        losses = [[record["val"] for record in records] for records in by_step]
        plot_band(axes, steps, losses, "-", color, name)
    axes.set(xlabel="step", ylabel=LOSS)
