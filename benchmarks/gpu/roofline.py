"""The least time that a device can take: arithmetic and traffic counted beforehand, by formulas.

Of each product, every operand is read once and the result written once; what fits into caches may be read again for
nothing, and nothing else is counted. A part takes at least the longer of its arithmetic at the peak rate and its bytes
at the peak bandwidth; parts follow each other. The fraction of the roofline is this bound over the measured time.
"""

from collections.abc import Iterable
from dataclasses import dataclass

BYTES = 2  # of a number in bf16


@dataclass(frozen=True)
class Peak:
    """Dense bf16 products per second, times two, and bytes per second, as the vendor states them."""

    name: str
    flops: float
    bandwidth: float


# by what the device's name holds; the first that fits counts
PEAKS = (
    Peak("H200", 989e12, 4.8e12),
    Peak("H100 PCIe", 756e12, 2.0e12),
    Peak("H100 NVL", 835e12, 3.9e12),
    Peak("H100", 989e12, 3.35e12),
)


def find_peak(device_name: str) -> Peak | None:
    """That of a device; None where it is not in the table."""
    return next((peak for peak in PEAKS if peak.name in device_name), None)


@dataclass(frozen=True)
class Part:
    """Floating-point operations and bytes."""

    flops: float
    bytes: float

    def bound(self, peak: Peak) -> float:
        """Seconds."""
        return max(self.flops / peak.flops, self.bytes / peak.bandwidth)


@dataclass(frozen=True)
class Llama:
    """A model of Llama's shape."""

    width: int
    inner: int
    layers: int
    heads: int
    groups: int
    vocabulary: int
    tied: bool

    @property
    def linears(self) -> list[tuple[int, int]]:
        """Inputs and outputs of the seven linears of a block."""
        narrow = self.width * self.groups // self.heads
        of_attention = [(self.width, self.width), *[(self.width, narrow)] * 2, (self.width, self.width)]
        return of_attention + [(self.width, self.inner)] * 2 + [(self.inner, self.width)]


@dataclass(frozen=True)
class Mixture:
    """Experts of one linear; `columns`: of hidden, R where all experts are computed and K r where the chosen ones."""

    columns: int
    experts: int


def product(m: int, n: int, k: int) -> Part:
    """[m, k] times [k, n]."""
    return Part(2 * m * n * k, BYTES * (m * k + k * n + m * n))


def frozen(tokens: int, inputs: int, outputs: int) -> list[Part]:
    """A frozen linear: its output, and in backward the gradient of its input."""
    return [product(tokens, outputs, inputs), product(tokens, inputs, outputs)]


def experts(tokens: int, inputs: int, outputs: int, mixture: Mixture) -> list[Part]:
    """Experts and router of a linear: forward, and the gradients of A with the router, of B, of hidden and input."""
    rows = mixture.columns + mixture.experts
    forward = [product(tokens, rows, inputs), product(tokens, outputs, mixture.columns)]
    of_hidden = [product(tokens, mixture.columns, outputs), product(mixture.columns, outputs, tokens)]
    return forward + of_hidden + [product(rows, inputs, tokens), product(tokens, inputs, rows)]


def attention(tokens: int, length: int, width: int) -> list[Part]:
    """Causal attention that never writes its weights: forward, and backward with 2.5 times its arithmetic."""
    flops = 2 * tokens * length * width
    return [Part(flops, BYTES * 4 * tokens * width), Part(2.5 * flops, BYTES * 8 * tokens * width)]


def training_step(llama: Llama, layers: int, tokens: int, length: int, mixture: Mixture) -> list[Part]:
    """Forward and backward of a model with all seven linears adapted, the frozen head's gradient of its input too."""
    block = attention(tokens, length, llama.width)
    for inputs, outputs in llama.linears:
        block += frozen(tokens, inputs, outputs) + experts(tokens, inputs, outputs, mixture)
    return block * layers + frozen(tokens, llama.width, llama.vocabulary)


def decoding_step(llama: Llama, layers: int, rows: int, context: int, mixture: Mixture) -> list[Part]:
    """One token for each of `rows` sequences: every weight is read, and the keys and values of `context` tokens."""
    narrow = llama.width * llama.groups // llama.heads
    block = [Part(4 * rows * context * llama.width, BYTES * 2 * rows * context * narrow)]
    for inputs, outputs in llama.linears:
        block += [product(rows, outputs, inputs), product(rows, mixture.columns + mixture.experts, inputs)]
        block += [product(rows, outputs, mixture.columns)]
    return block * layers + [product(rows, llama.vocabulary, llama.width)]


def summarise(parts: Iterable[Part], peak: Peak | None) -> dict[str, float | str]:
    """Operations and bytes, and the bound in milliseconds where the peak is known."""
    parts = list(parts)
    counted = {"teraflops": sum(p.flops for p in parts) / 1e12, "gigabytes": sum(p.bytes for p in parts) / 1e9}
    if peak is None:
        return {**counted, "bound_ms": "the device's peak is not in the table"}
    return {**counted, "bound_ms": 1e3 * sum(part.bound(peak) for part in parts), "peak": peak.name}
