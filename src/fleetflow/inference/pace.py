"""What a step of a stream may cost, so that it keeps within a time: fewer iterations first, then smaller frames."""

from collections import deque
from statistics import median
from typing import NamedTuple

BESIDE = 2  # iterations: what a network that refines costs besides them (RAFT-small at 720p on a CPU: 1.5 to 2)
SHARES = (1.0, 0.7, 0.5, 0.35, 0.25)  # of the iterations, then of the sides of the frames
FEWEST = 2  # iterations
SMALLEST = 64  # pixels of a side
MEASURED = 3  # steps, at least, of which the median says what one costs; the first of its kind is left out
TIGHT, EASY = 0.95, 0.75  # of the budget: what the next effort may cost when it goes down, and when it goes up


class Effort(NamedTuple):
    """What a step is given: height and width of the frames as the network sees them, and iterations if it refines."""

    size: tuple[int, int]
    iterations: int | None

    def cost(self) -> float:
        """Returns what it costs, in units of its own."""
        return self.size[0] * self.size[1] * (1 if self.iterations is None else BESIDE + self.iterations)


def efforts(whole: Effort) -> list[Effort]:
    """Returns what may be chosen from, the whole effort first, each cheaper than the one before it."""
    counts = [None]
    if whole.iterations is not None:
        counts = [max(round(whole.iterations * share), min(FEWEST, whole.iterations)) for share in SHARES]
    height, width = ([max(round(side * share), min(SMALLEST, side)) for share in SHARES] for side in whole.size)
    found = [whole._replace(iterations=count) for count in counts]
    return list(dict.fromkeys([*found, *(Effort(size, counts[-1]) for size in zip(height, width))]))


class Pace:
    """Chooses the effort of the next step from what the last ones took.

    Attributes:
        effort: of the next step.

    Args:
        budget: seconds that a step may take.
        whole: the effort if there were time enough.
    """

    def __init__(self, budget: float, whole: Effort):
        self.budget, self.efforts, self._at = budget, efforts(whole), 0
        self._rates: deque[float] = deque(maxlen=2 * MEASURED)  # seconds for a unit of cost
        self._new = True

    @property
    def effort(self) -> Effort:
        return self.efforts[self._at]

    def took(self, seconds: float, effort: Effort) -> None:
        """Says how long the last step took, and what it was given."""
        if self._new:  # memory is taken and weights are packed
            self._new = False
            return
        self._rates.append(seconds / effort.cost())
        if len(self._rates) < MEASURED:
            return
        rate = median(self._rates)
        costs = [rate * effort.cost() for effort in self.efforts]
        if costs[self._at] > self.budget:
            fitting = [k for k, cost in enumerate(costs) if cost <= TIGHT * self.budget]
            self._go(max(self._at, fitting[0] if fitting else len(costs) - 1))
        elif self._at > 0 and costs[self._at - 1] <= EASY * self.budget:
            self._go(self._at - 1)

    def _go(self, place: int) -> None:
        if place != self._at:
            self._at, self._new = place, True
            self._rates.clear()
