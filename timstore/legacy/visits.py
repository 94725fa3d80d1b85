"""What one sample's key holds in an epoch's file: gradients, and the steps that are marked beside them."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

MARKER = "_step"


@dataclass(slots=True)
class Visit:
    """One sample's key, in the order of its file; to be read before the next one is asked for.

    Attributes:
        key: the sample's.
        names: of its arrays.
        load: returns an array, by its place in `names`.
        scalars: names with single numbers: step markers, and gradients without axes.
    """

    key: Any
    load: Callable[[int], np.ndarray]
    names: list[str] = field(default_factory=list)
    scalars: dict[str, list[int | float]] = field(default_factory=dict)

    def gradients(self) -> Iterator[tuple[str, np.ndarray, int | None]]:
        """Yield names, gradients and the step of each, None where it is not known."""
        steps = {stem: iter(values) for stem, values in self._steps().items()}
        for place, name in enumerate(self.names):
            yield name, self.load(place), next(steps.get(name, iter(())), None)
        for name, values in self.scalars.items():
            if name.endswith(MARKER) and name.removesuffix(MARKER) in steps:
                continue
            for value in values:
                yield name, narrowed(np.array(float(value))), next(steps.get(name, iter(())), None)

    def _steps(self) -> dict[str, list[int | None]]:
        """Return the step of every occurrence of a gradient, by its name; None for a negative one, which is none.

        A key is a step marker only if it ends in `_step`, its value is an integer, and the rest of it is a key beside.
        Where there are more of one than of the other none is known.
        """
        counts = Counter(self.names) + Counter({name: len(values) for name, values in self.scalars.items()})
        found: dict[str, list[int | None]] = {}
        for key, values in self.scalars.items():
            stem = key.removesuffix(MARKER)
            if stem != key and counts[stem] and all(type(one) is int for one in values):
                steps = [int(one) if one >= 0 else None for one in values]
                found[stem] = steps if len(values) == counts[stem] else []
        return found


def narrowed(numbers: np.ndarray) -> np.ndarray:
    """Return float64 numbers as float32, if they are the very same."""
    with np.errstate(over="ignore"):
        single = numbers.astype(np.float32)
    same = (single == numbers) | np.isnan(numbers)
    return single if bool(same.all()) else np.array(numbers)
