"""How often a drafted token is taken, beside what theory has as its least."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
import math
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Row = Mapping[str, Any]


def least(kl: float) -> float:
    """Returns the share of drafts taken at least, if the guided law is `kl` nats a token from the sampler's.

    A shared noise draws the same from two laws with probability (1 - TV) / (1 + TV) at least, which is convex in TV,
    and the mean TV is at most sqrt(mean KL / 2) (Pinsker, Jensen).
    """
    distance = min(math.sqrt(kl / 2), 1.0)
    return (1 - distance) / (1 + distance)


def measured(row: Row) -> tuple[float, float]:
    """Returns the nats a token that guidance adds to the sampler's KL, and the share of drafts that were taken."""
    label = next(one for one in row['rates'] if one != row['base'])
    added = max(row['kl'][label] - row['kl'][row['base']], 0.0) / row['settings']['tokens']
    return added, row['tokens_a_step'][label] - 1


def lines(rows: Sequence[Row]) -> list[list[str]]:
    """Returns the lines of a table, the heads first."""
    found = [['spread of the head\'s logits', 'drafts taken', 'KL to the sampler, nats a token', 'taken at least']]
    for row in rows:
        kl, taken = measured(row)
        found.append([row['name'].rpartition('=')[2], f'{taken:.3f}', f'{kl:.4f}', f'{least(kl):.3f}'])
    return found


def draw(rows: Sequence[Row], path: str) -> None:
    """Draws the drafts taken against the KL."""
    points = sorted(map(measured, rows))
    figure = Figure(figsize=(4.8, 3.6), layout='constrained')
    ax = figure.subplots()
    ax.plot(*zip(*points), marker='o', markersize=4, label='measured')
    most = max(kl for kl, _ in points)
    kls = [most * number / 200 for number in range(1, 201)]
    ax.plot(kls, [least(kl) for kl in kls], color='#8a8f98', linestyle='--', linewidth=1, label='at least, by theory')
    ax.set(xlabel='KL to the sampler, nats a token', ylabel='share of drafts taken', ylim=(0, 1.02), xlim=(0, None))
    ax.legend(frameon=False)
    FigureCanvasAgg(figure).print_png(path)
