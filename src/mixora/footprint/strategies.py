"""How the memory of a training step is spread over processes, and what they send: a class for each strategy.

|        | frozen weights | trained weights | gradients | optimiser |
|--------|----------------|-----------------|-----------|-----------|
| single | whole          | whole           | whole     | whole     |
| ddp    | whole          | whole           | whole     | whole     |
| zero2  | whole          | whole           | 1 / N     | 1 / N     |
| fsdp2  | 1 / N          | 1 / N           | 1 / N     | 1 / N     |
| zero3  | 1 / N          | 1 / N           | 1 / N     | 1 / N     |

Sources: ZeRO (arXiv 1910.02054, section 5, stages 2 and 3) as DeepSpeed implements it; PyTorch FSDP (arXiv 2304.11277)
and the documentation of `torch.distributed.fsdp.fully_shard`; PyTorch DDP (arXiv 2006.15704).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from mixora.footprint.communication import Traffic
from mixora.footprint.timeline import Moment, Phase
from mixora.footprint.units import Unit

MOMENTS = 2
FP32 = 4


@dataclass(frozen=True)
class Held:
    """Bytes that one process holds through a whole step. `buffers`: room for gradients on their way."""

    base_weights: int
    adapter_weights: int
    gradients: int
    optimiser: int
    buffers: int = 0


class Strategy(ABC):
    """One way to train on N processes.

    `fuses_loss`: whether the head is whole, so that the loss can be fused. `has_lean_activations`: whether autograd's
    graph still tells what made a tensor, so that it can be made again.
    """

    name: str
    fuses_loss = True
    has_lean_activations = True

    def __init__(self, processes: int, units: Sequence[Unit], hidden_size: int) -> None:
        self.processes, self.units, self.hidden_size = processes, units, hidden_size
        self.parameters = [p for unit in units for p in unit.parameters]
        self.trained = [p for p in self.parameters if p.requires_grad]
        self.frozen = [p for p in self.parameters if not p.requires_grad]

    @abstractmethod
    def hold(self) -> Held:
        """What stays."""

    @abstractmethod
    def spend(self, phase: Phase, unit: int, moment: Moment) -> int:
        """The most bytes at a moment of the step, gradients included, weights, optimiser and buffers not."""

    @abstractmethod
    def send(self) -> Traffic:
        """Bytes that one process sends in a step."""


class Single(Strategy):
    """One process. AdamW's moments have the dtype of their weights."""

    name = "single"

    def hold(self) -> Held:
        trained = bytes_of(self.trained)
        return Held(bytes_of(self.frozen), trained, trained, MOMENTS * trained)

    def spend(self, phase: Phase, unit: int, moment: Moment) -> int:
        return moment.with_gradients

    def send(self) -> Traffic:
        return Traffic()


class DDP(Single):
    """Gradients are copied to buckets, as large as all of them, and reduced there (`gradient_as_bucket_view=False`)."""

    name = "ddp"

    def hold(self) -> Held:
        trained = bytes_of(self.trained)
        return Held(bytes_of(self.frozen), trained, trained, MOMENTS * trained, buffers=trained)

    def send(self) -> Traffic:
        return Traffic.of(self.processes, all_reduce=bytes_of(self.trained))


class FSDP2(Strategy):
    """`fully_shard` on every block and on the model, which keeps what no block holds gathered after its forward.

    A gathered unit stands in its parameters and, until the next one is asked for, in the buffer of the all-gather too.
    In backward the unit before is gathered meanwhile.
    """

    name = "fsdp2"
    fuses_loss = False

    def hold(self) -> Held:
        trained = self._shards(self.trained)
        return Held(self._shards(self.frozen), trained, trained, MOMENTS * trained)

    def spend(self, phase: Phase, unit: int, moment: Moment) -> int:
        own, last = self._gathered(unit), self._gathered(len(self.units) - 1)
        before = self._gathered(unit - 1) if unit > 1 else 0
        if unit == 0:
            around = last if phase == "backward" or len(self.units) > 1 else own
        else:
            around = own + (own if phase == "forward" else max(own, before))
        reduced = bytes_of(self.units[unit].trained) if phase == "backward" else 0
        done = self._shards(self.trained) if phase == "backward" else 0
        return moment.live + self._gathered(0) + around + reduced + done

    def send(self) -> Traffic:
        every = sum(map(self._gathered, range(len(self.units))))
        trained = sum(self._shards(unit.trained) * self.processes for unit in self.units)
        return Traffic.of(
            self.processes, gather_forward=every, gather_backward=every - self._gathered(0), reduce_scatter=trained
        )

    def _shards(self, parameters: Iterable[nn.Parameter]) -> int:
        return sum(_rows_of_shard(p, self.processes) * (p.nbytes // max(len(p), 1)) for p in parameters)

    def _gathered(self, unit: int) -> int:
        return self.processes * self._shards(self.units[unit].parameters)


class Zero2(Strategy):
    """DeepSpeed's stage 2: each process averages, keeps and applies the gradients of its part of the trained weights.

    The part stands in fp32 beside the weights, with moments in fp32. Gradients wait in a bucket of `hidden_size`
    squared numbers, which is what transformers' Trainer sets for `auto`.
    """

    name = "zero2"

    def hold(self) -> Held:
        part = self._part(self.trained)
        whole = bytes_of(self.trained)
        return Held(bytes_of(self.frozen), whole, self._part_bytes(self.trained), (1 + MOMENTS) * FP32 * part)

    def spend(self, phase: Phase, unit: int, moment: Moment) -> int:
        if phase == "forward":
            return moment.live
        return moment.live + self._bucket() + self._part_bytes(self.trained)

    def send(self) -> Traffic:
        trained = bytes_of(self.trained)
        return Traffic.of(self.processes, reduce_scatter=trained, gather_update=trained)

    def _part(self, parameters: Iterable[nn.Parameter]) -> int:
        """Numbers of each process; what does not divide is filled up."""
        return sum(-(-p.numel() // self.processes) for p in parameters)

    def _part_bytes(self, parameters: Iterable[nn.Parameter]) -> int:
        return sum(-(-p.numel() // self.processes) * p.itemsize for p in parameters)

    def _bucket(self) -> int:
        return self.hidden_size**2 * self.trained[0].itemsize


class Zero3(Zero2):
    """DeepSpeed's stage 3: weights are in parts too, and gathered module by module.

    As it comes it gathers ahead, and keeps what is used again, up to a thousand million numbers
    (`stage3_max_live_parameters`, `stage3_max_reuse_distance`). Weights in fp32 need no copy in fp32. Its hooks put
    functions of their own around the results of all modules.
    """

    name = "zero3"
    fuses_loss = False
    has_lean_activations = False
    live_parameters = 10**9

    def hold(self) -> Held:
        copies = sum(-(-p.numel() // self.processes) for p in self.trained if p.itemsize < FP32)
        optimiser = FP32 * (MOMENTS * self._part(self.trained) + copies)
        trained = self._part_bytes(self.trained)
        return Held(self._part_bytes(self.frozen), trained, trained, optimiser, buffers=self._bucket())

    def spend(self, phase: Phase, unit: int, moment: Moment) -> int:
        return moment.live + self._gathered() + self._part_bytes(self.trained)

    def send(self) -> Traffic:
        every, trained = bytes_of(self.parameters), bytes_of(self.trained)
        return Traffic.of(self.processes, gather_forward=every, gather_backward=every, reduce_scatter=trained)

    def _gathered(self) -> int:
        largest = max(p.numel() for p in self.parameters)
        share = min(1.0, max(self.live_parameters, largest) / sum(p.numel() for p in self.parameters))
        return int(share * bytes_of(self.parameters))


def bytes_of(parameters: Iterable[nn.Parameter]) -> int:
    """Their sum."""
    return sum(p.nbytes for p in parameters)


def _rows_of_shard(parameter: nn.Parameter, processes: int) -> int:
    """The first dimension is split, and filled up to equal parts."""
    return -(-len(parameter) // processes)


STRATEGIES: dict[str, type[Strategy]] = {strategy.name: strategy for strategy in (DDP, FSDP2, Zero2, Zero3)}
