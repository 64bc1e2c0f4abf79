"""Bins of whole rows: best fit, longest rows first."""

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Put rows into bins of at most `size` tokens.

    Args:
        lengths: tokens of each row, 1 to `size`.
        size: tokens of a bin.

    Returns:
        Row numbers of each bin, ascending; bins in order of their first row. Every row is in exactly one bin.
    """
    assert all(0 < length <= size for length in lengths)
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, bin), ascending: the tightest fit is found by bisection
    for row in sorted(range(len(lengths)), key=lambda r: (-lengths[r], r)):
        place = bisect_left(rooms, (lengths[row], -1))
        if place == len(rooms):
            bins.append([])
            rooms.append((size, len(bins) - 1))
        room, number = rooms.pop(place)
        bins[number].append(row)
        insort(rooms, (room - lengths[row], number))
    return sorted(sorted(members) for members in bins)
