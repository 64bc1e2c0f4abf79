"""Bytes as choices: what a fuzzer mutates becomes numbers, words and values, the same ones every time."""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")

TEXTS = (
    "",
    " ",
    "a",
    "\x00",
    "\ud800",
    "\udcff",
    "\ufeff",
    "\u202e",
    "\u2028",
    "a\r\nb\rc",
    "é",
    "e\u0301",
    "😀",
    "../..",
    "/",
    "~",
    ".",
    "NaN",
    "__class__",
    "{{ 1 }}",
    "[bold]",
    "<script>",
    "x" * 5000,
    "-" * 300,
    "lora",
    "auto",
    "(a+)+$",
    "(.*)*(.*)*!",
    "[",
    "(?P<x",
    "a{1,99999}",
)
NUMBERS = (0, 1, 2, 3, -1, 7, 255, 2**16, 2**16 + 1, 2**31, 2**32, 10**9, 10**12, 2**63, 2**64, 10**30, 10**400)
FLOATS = (0.0, -0.0, 0.5, 1.0, 1e-320, 1e308, -1e308, math.inf, -math.inf, math.nan, 1e16)


class Draw:
    """Reads choices off `data`; where that ends, the choice is the first one."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def byte(self) -> int:
        self.place += 1
        return self.data[self.place - 1] if self.place <= len(self.data) else 0

    def below(self, most: int) -> int:
        return (self.byte() << 8 | self.byte()) % most if most > 256 else self.byte() % most

    def pick(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def rest(self) -> bytes:
        found = self.data[self.place :]
        self.place = len(self.data)
        return found

    def text(self) -> str:
        if self.byte() % 3:
            return self.pick(TEXTS)
        length = self.below(24)
        found = self.data[self.place : self.place + length]
        self.place += length
        return found.decode("utf-8", "surrogateescape")

    def value(self, depth: int = 0) -> Any:
        """Any value of JSON, and now and then one that JSON does not have."""
        kind = self.below(10 if depth < 4 else 6)
        if kind < 2:
            return self.text()
        if kind < 6:
            return (self.pick(NUMBERS), self.pick(FLOATS), self.pick((True, False)), None)[kind - 2]
        if kind < 8:
            return [self.value(depth + 1) for _ in range(self.below(5))]
        return {self.text(): self.value(depth + 1) for _ in range(self.below(5))}

    def damage(self, tree: Any) -> Any:
        """A copy of `tree` with some of its values replaced, taken away, doubled or added to."""
        for _ in range(1 + self.below(3)):
            tree = self._damage_once(tree)
        return tree

    def _damage_once(self, here: Any) -> Any:
        if isinstance(here, dict) and here and self.byte() % 8:
            name = self.pick(sorted(map(str, here)))
            action = self.below(8)
            if action == 0:
                return {key: value for key, value in here.items() if key != name}
            if action == 1:
                return {**here, self.text(): self.value()}
            return {key: self._damage_once(value) if key == name else value for key, value in here.items()}
        if isinstance(here, list) and here and self.byte() % 4:
            place, action = self.below(len(here)), self.below(6)
            if action == 0:
                return here[:place] + here[place + 1 :]
            if action == 1:
                return [*here[:place], here[place], *here[place:]]
            return [self._damage_once(value) if n == place else value for n, value in enumerate(here)]
        if self.byte() % 2:
            return self.value()
        if isinstance(here, str):
            return self.text()
        return self.pick(NUMBERS) if isinstance(here, int) else self.pick(FLOATS)

    def alter(self, content: bytes) -> bytes:
        """`content` with bits turned, pieces cut out, put in or repeated."""
        found = bytearray(content)
        for _ in range(1 + self.below(4)):
            place = int.from_bytes(bytes((self.byte(), self.byte(), self.byte())), "big") % (len(found) + 1)
            action = self.below(6)
            if action == 0:
                del found[place:]
            elif action == 1:
                del found[place : place + 1 + self.byte()]
            elif action == 2:
                found[place:place] = found[place : place + 1 + self.byte()] * (1 + self.below(4))
            elif action == 3:
                found[place:place] = bytes(self.byte() for _ in range(1 + self.below(8)))
            elif place < len(found):
                found[place] ^= 1 << self.below(8)
        return bytes(found)
