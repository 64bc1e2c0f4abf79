"""What an adapter must be before it is made on a model: of a name that can be kept, apart from others, not too big."""

import os
from collections.abc import Iterable, Iterator

from torch import nn

from mixora.errors import ConfigError
from mixora.mixture import PREFIX
from mixora.planning.plan import Plan
from mixora.planning.sites import frozen_modules, is_repeated


def check_name(name: str, model: nn.Module) -> None:
    """`ConfigError` for a name under which the tensors of an adapter cannot be kept, or not be told from others."""
    if not name or any(sign in name for sign in "./\\") or hasattr(nn.ParameterDict(), name):
        raise ConfigError(
            f"adapter_name: got {name!r}; valid: a name without '.', '/' and '\\', and none that torch's dictionaries "
            "have for themselves, such as 'keys' or 'pop'"
        )
    frozen = [path for path, _ in model.named_parameters() if PREFIX not in path and "modules_to_save" not in path]
    steps = {"base_model", "model", "base_layer", "modules_to_save"}.union(*(path.split(".") for path in frozen))
    if name in steps or name.startswith(PREFIX):
        # PEFT leaves every tensor out of the files of other adapters that has the name anywhere in its path
        raise ConfigError(
            f"adapter_name: got {name!r}, a part of the paths of this model's tensors; valid: other names"
        )


def check_room(model: nn.Module, plan: Plan) -> None:
    """`ConfigError` for an adapter that this machine cannot hold, before any of it is made."""
    frozen = next(model.parameters(), None)
    if frozen is None or frozen.device.type != "cpu" or not hasattr(os, "sysconf"):
        return
    # experts have the dtype of the base, routers fp32, so this is the least that it can be
    needed, there = plan.parameters * frozen.element_size(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ConfigError(
            f"the adapter takes {needed / 2**30:,.0f} GiB, and this machine has {there / 2**30:,.0f} GiB of memory; "
            "valid: fewer experts or a lower rank"
        )


def remark_untrained(model: nn.Module, plan: Plan, saved: Iterable[str]) -> Iterator[str]:
    """A note for each frozen linear before a classifier's head that nobody trained, as a bias of zeros tells.

    Sentence encoders carry such a pooler, since they average their tokens; a head that has to learn through its random
    projection learns little. `saved`: the names of the modules that are trained whole.
    """
    sites, trained = {site.path for site in plan.sites}, [f".{name}." for name in saved]
    for path, module in frozen_modules(model):
        if not isinstance(module, nn.Linear) or is_repeated(path) or path in sites:
            continue
        if module.bias is None or module.bias.is_meta or any(name in f".{path}." for name in trained):
            continue
        if not module.bias.any():
            name = path.removesuffix(".dense").rpartition(".")[2]
            yield f"{path}: frozen, and its bias of zeros looks never trained; modules_to_save: [{name}] trains it"
