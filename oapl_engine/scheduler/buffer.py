"""D of Algorithm 1: the durable groups that may be trained, oldest first."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class BufferedGroup:
    """A durable group that may be trained; uses: optimizer steps that have trained on it."""

    key: str
    version: int
    uses: int = 0


class Buffer:
    """Groups, oldest first. Immutable; append and take cost O(1) whatever its length.

    Buffers share one list, each a slice of it, as slices of an array do. Appending writes behind the own end, where no
    earlier buffer looks; where another buffer has written there before, the list is copied first:

        a = Buffer([x])      list [x]       a = [0:1]
        b = a.append(y)      list [x, y]    b = [0:2]
        c = a.append(z)      a's end is taken, so c gets a copy: [x, z]
    """

    __slots__ = ("_items", "_start", "_stop", "uses")

    def __init__(self, items: Iterable[BufferedGroup] = ()) -> None:
        self._items = list(items)
        self._start, self._stop = 0, len(self._items)
        self.uses = sum(group.uses for group in self._items)

    def append(self, group: BufferedGroup) -> "Buffer":
        own = self if self._stop == len(self._items) else Buffer(self)
        own._items.append(group)
        return own._slice(own._start, own._stop + 1, self.uses + group.uses)

    def take(self, n: int) -> tuple[tuple[BufferedGroup, ...], "Buffer"]:
        """The n oldest (all if fewer), and the rest."""
        middle = min(self._start + n, self._stop)
        taken = tuple(self._items[self._start : middle])
        rest = self._slice(middle, self._stop, self.uses - sum(group.uses for group in taken))
        # The consumed front must not grow forever.
        return taken, Buffer(rest) if 2 * len(rest) < middle else rest

    def _slice(self, start: int, stop: int, uses: int) -> "Buffer":
        other = Buffer.__new__(Buffer)
        other._items, other._start, other._stop, other.uses = self._items, start, stop, uses
        return other

    def __len__(self) -> int:
        return self._stop - self._start

    def __iter__(self) -> Iterator[BufferedGroup]:
        return iter(self._items[self._start : self._stop])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Buffer) and list(self) == list(other)
