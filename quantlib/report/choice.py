"""Which of several files to ship, and why."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from quantlib.measure import ranking, significance
from quantlib.runtimes.available import Runtime


@dataclass(frozen=True)
class Choice:
    """One of several files, and why."""

    place: int
    """Its index."""
    reason: str


@dataclass(frozen=True)
class Contender:
    """A file in a runtime, as it is compared with others."""

    name: str
    samples_ms: Sequence[float]
    """Times for one image on one thread, in the same rounds as the others'."""
    selection: np.ndarray
    """[N], bool: which of the selection images it gets right."""
    size_bytes: int

    @property
    def p50_ms(self) -> float:
        """The median time."""
        return float(np.median(self.samples_ms))

    def is_slower(self, other: "Contender") -> bool:
        """Whether it is slower beyond the noise of timing."""
        return significance.is_slower(self.samples_ms, other.samples_ms)

    def is_less_accurate(self, other: "Contender") -> bool:
        """Whether it is less accurate beyond chance."""
        return significance.is_less_accurate(self.selection, other.selection)

    def is_beaten_by(self, other: "Contender") -> bool:
        """Whether another is better in speed or accuracy, and not worse in the remaining one, beyond noise."""
        slower, less_accurate = self.is_slower(other), self.is_less_accurate(other)
        return (slower and not other.is_less_accurate(self)) or (less_accurate and not other.is_slower(self))


def choose(contenders: Sequence[Contender]) -> Choice:
    """Choose which of several files to ship: the fastest, then the most accurate, then the smallest, then the first.

    A file counts as fast as the fastest unless it is slower beyond the noise of timing, and as accurate as the most
    accurate of those, on the selection images, unless it is less accurate beyond chance.

    Args:
        contenders: In the order of the recipe, at least one.
    """
    places = range(len(contenders))
    fastest = min(places, key=lambda place: contenders[place].p50_ms)
    fast = [place for place in places if not contenders[place].is_slower(contenders[fastest])]
    best = max(fast, key=lambda place: contenders[place].selection.mean())
    accurate = [place for place in fast if not contenders[place].is_less_accurate(contenders[best])]
    chosen = min(accurate, key=lambda place: contenders[place].size_bytes)
    return Choice(chosen, _reason(contenders, chosen, fast, accurate))


def describe_lead(contenders: Sequence[Contender]) -> str:
    """How certain it is that the fastest of several files is faster than the next, in one sentence.

    Args:
        contenders: At least two.
    """
    first, second = sorted(contenders, key=lambda contender: contender.p50_ms)[:2]
    certainty = ranking.certainty_faster(first.samples_ms, second.samples_ms)
    shown = "more than 99.9%" if certainty > 0.999 else f"{certainty:.1%}"
    rounds = f"after {len(first.samples_ms)} rounds of timing"
    other = "its other file" if first.name == second.name else second.name
    if certainty >= 1 - significance.LEVEL:
        return f"{first.name} is faster than {other}, the next inside the gate, with {shown} certainty {rounds}."
    return f"{first.name} and {other}, the fastest inside the gate, are as fast as each other within noise {rounds}."


def _reason(contenders: Sequence[Contender], chosen: int, fast: Sequence[int], accurate: Sequence[int]) -> str:
    """Why a file was chosen, such as "as fast as qat and tutorial (within noise), as accurate, smallest"."""
    if len(contenders) == 1:
        return "the only file inside the gate"
    if len(fast) == 1:
        return "the fastest inside the gate"
    own = contenders[chosen].name
    names = [contenders[place].name for place in fast if place != chosen]
    rivals = list(dict.fromkeys("its other file" if name == own else name for name in names))
    parts = [f"as fast as {_list(rivals)} (within noise)"]
    if len(accurate) == 1:
        return f"{parts[0]}, and more accurate"
    parts.append("as accurate" if len(accurate) == len(fast) else "among the most accurate of them")
    sizes = [contenders[place].size_bytes for place in accurate]
    parts.append("smallest" if sizes.count(min(sizes)) == 1 else "as small, and first in the recipe")
    return ", ".join(parts)


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def fastest_runtime(samples_ms: Mapping[Runtime, Sequence[float]]) -> Runtime:
    """The runtime that a file is fastest in: the first of those that are equally fast within noise.

    Args:
        samples_ms: By runtime, in the order of preference; taken in the same rounds.
    """
    fastest = min(samples_ms.values(), key=np.median)
    return next(runtime for runtime, samples in samples_ms.items() if not significance.is_slower(samples, fastest))
