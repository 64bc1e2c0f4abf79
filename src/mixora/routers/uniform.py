"""Stochastic routing: a pass is computed by one expert, drawn blindly (AdaMix, arXiv 2205.12410, section 3).

i, j ~ uniform{1..M}, independent, one draw per projection, site and pass;  in evaluation the mean of the experts serves
"""

from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor

from mixora.config import Strict
from mixora.contracts import Expert, Parameters, Router
from mixora.depth import OverDepth
from mixora.routing import Routing, Tokens
from mixora.routing.draws import Draw


class UniformConfig(Strict):
    """One of `num_experts` serves a pass, drawn for the down and for the up projection apart.

    `share`: the projection that all experts have in common: `up`, `down` or `none`. `tied`: one draw for both
    projections; then it is the mean of the products that serves in evaluation. `start`: whether each expert is drawn
    for itself (`apart`), or all begin with the numbers of the first (`alike`), so that the model is that of one expert
    until training sets them apart.
    """

    kind: Literal["uniform"] = "uniform"
    num_experts: OverDepth = 4
    share: Literal["up", "down", "none"] = "up"
    tied: bool = False
    start: Literal["apart", "alike"] = "apart"

    @model_validator(mode="after")
    def _fits(self) -> "UniformConfig":
        if self.tied and self.share != "none":
            raise ValueError(f"tied has no effect with share {self.share!r}; valid: tied with share 'none'")
        return self


class Uniform(Router):
    """No tensors of its own. The down projection is what stands in kinds A, the up projection what stands in kinds B.

    Kept tensors are named `A_0`, `A_1`, ...; those of a shared projection as their kind.
    """

    Config = UniformConfig
    config: UniformConfig
    is_static = True
    draws = True
    joins = True
    top_k = 1

    @property
    def num_experts(self) -> int:
        """M."""
        return self.config.num_experts

    @property
    def starts_alike(self) -> bool:
        """As `start` says."""
        return self.config.start == "alike"

    def parameter_shapes(self, in_features: int) -> dict[str, tuple[int, ...]]:
        """None."""
        return {}

    def initialise(self, parameters: Parameters) -> None:
        """Nothing to fill."""

    def objection(self, is_causal: bool, expert: Expert) -> str | None:
        """The mean of products is one expert again only where experts are linear."""
        if self.config.tied and expert.reads == "output":
            return "tied: got true with experts that stand behind a module; valid: false, or LoRA experts"
        return None

    def route(self, x_TI: Tensor, parameters: Parameters, tokens: Tokens, training: bool) -> Routing:
        """All tokens to the drawn expert, the one of the up projection where downs are shared; or to all members."""
        drawn = tokens.draw.choose("up" if self.config.share == "down" else "down", self.num_experts)
        return Routing.even(tokens.valid_T, self._members(tokens.draw) if drawn is None else (drawn,), self.num_experts)

    def alternatives(self, kinds: Iterable[str]) -> list[dict[str, str]]:
        """A name for each expert, but for the shared projection."""
        kinds = tuple(kinds)
        return [{kind: self._name(kind, expert) for kind in kinds} for expert in range(self.num_experts)]

    def serve(self, parameters: Parameters, draw: Draw) -> Parameters:
        """The drawn expert's tensors, or the mean over the members, which is exact for independent draws.

        For tied ones: all members' tensors one below the other, so that the product is the mean of the products.
        """
        kinds = [kind for kind in ("A", "B", "bias_A", "bias_B") if self._name(kind, 0) in parameters]
        if draw.key is not None:
            drawn = {side: draw.choose("down" if self.config.tied else side, self.num_experts) for side in _SIDES}
            return {kind: parameters[self._name(kind, drawn[_side_of(kind)])] for kind in kinds}
        members = self._members(draw)
        if self.config.tied:
            stacked = {kind: torch.cat([parameters[self._name(kind, m)] for m in members]) for kind in kinds}
            return {**stacked, "B": stacked["B"] / len(members)}
        return {kind: self._mean(kind, parameters, members) for kind in kinds}

    def _mean(self, kind: str, parameters: Parameters, members: tuple[int, ...]) -> Tensor:
        if self._is_shared(kind) or len(members) == 1:
            return parameters[self._name(kind, members[0])]
        return torch.stack([parameters[self._name(kind, m)] for m in members]).mean(dim=0)

    def _members(self, draw: Draw) -> tuple[int, ...]:
        return tuple(range(self.num_experts)) if draw.members is None else draw.members

    def _is_shared(self, kind: str) -> bool:
        return _side_of(kind) == self.config.share

    def _name(self, kind: str, expert: int | None) -> str:
        return kind if self._is_shared(kind) else f"{kind}_{expert}"


_SIDES = ("down", "up")


def _side_of(kind: str) -> Literal["down", "up"]:
    return "down" if kind.endswith("A") else "up"
