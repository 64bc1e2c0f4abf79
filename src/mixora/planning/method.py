"""A method as data: rules that say which modules get which experts, routers and kernel, and the auxiliary losses."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, Union

from pydantic import Discriminator, Field, PlainValidator, SerializeAsAny, Tag, create_model

from mixora.allocators import ALLOCATORS
from mixora.config import Strict, parse
from mixora.contracts import Allocator, Expert, Router
from mixora.depth import Count
from mixora.experts import EXPERTS
from mixora.kernels import KERNELS
from mixora.losses import LOSSES
from mixora.planning.outside import is_outside, load_part
from mixora.routers import ROUTERS


def _one_of(table: dict[str, Any], contract: type) -> Any:
    """Field type: the configuration of any part in the table, or of one outside of mixora, told apart by its `kind`."""
    configs = tuple(part.Config for part in table.values())
    known: Any = Annotated[Union[configs], Field(discriminator="kind")]  # noqa: UP007
    other: Any = Annotated[Strict, PlainValidator(partial(_read_outside, table, contract))]
    either: Any = Annotated[known, Tag("known")] | Annotated[other, Tag("outside")]
    return Annotated[either, Discriminator(_origin_of), SerializeAsAny()]


def _origin_of(value: Any) -> str:
    kind = value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)
    return "outside" if is_outside(kind) else "known"


def _read_outside(table: dict[str, Any], contract: type, value: Any) -> Strict:
    """The configuration of a part from outside, which joins the table."""
    settings = value.model_dump(mode="json") if isinstance(value, Strict) else value
    kind = settings["kind"]
    if kind not in table:
        table[kind] = load_part(kind, contract)
    return parse(table[kind].Config, settings)


if TYPE_CHECKING:
    # built from the tables below, which a type checker cannot run
    AnyExpert: TypeAlias = Any
    AnyRouter: TypeAlias = Any
    AnyKernel: TypeAlias = Any
    AnyAllocator: TypeAlias = Any
    Losses: TypeAlias = Any
else:
    AnyExpert = _one_of(EXPERTS, Expert)
    AnyRouter = _one_of(ROUTERS, Router)
    AnyKernel = Literal[("auto", *KERNELS)]
    AnyAllocator = _one_of(ALLOCATORS, Allocator)
    _of_losses = {name: (loss.Config, loss.Config()) for name, loss in LOSSES.items()}
    Losses = create_model("Losses", __base__=Strict, **_of_losses)


class Rule(Strict):
    """What the modules that match `targets` get.

    `targets`: a list of path endings (`q_proj`, `mlp.down_proj`) and of the groups `attention`, `feed-forward` and
    `all-linear` (the linears of the repeated blocks), or one string, a regular expression for the whole path. Experts
    that read a module's output can adapt modules of any kind, and the group `ffn` (whole feed-forward modules).
    """

    targets: Annotated[str, Field(min_length=1, max_length=1000)] | Annotated[tuple[str, ...], Field(min_length=1)]
    expert: AnyExpert
    router: AnyRouter
    kernel: AnyKernel = "auto"

    @property
    def one_rank(self) -> bool:
        """Whether the experts of a site cannot differ in rank: they share a tensor, or one is drawn for a pass."""
        return EXPERTS[self.expert.kind].one_rank or ROUTERS[self.router.kind].draws


class Method(Strict):
    """Named rules, of which no two may match the same module, the losses, and how a budget is spread over the sites.

    `allocation`: the ranks of each site's experts by path, as `mixora.allocate` found them; they replace the rules'.
    """

    rules: Annotated[dict[str, Rule], Field(min_length=1)]
    losses: Losses = Losses()
    allocator: AnyAllocator = ALLOCATORS["groups"].Config()
    allocation: dict[str, Annotated[tuple[Count, ...], Field(min_length=1)]] | None = None
