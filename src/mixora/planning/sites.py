"""Where in a model adapters can stand: linear and whole modules, the groups they are named by, and what they read."""

import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import regex
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from mixora.config import did_you_mean
from mixora.errors import ConfigError
from mixora.files.documents import show
from mixora.passes import Stream
from mixora.planning.whole_modules import leave_out

GROUPS = ("attention", "query-value", "feed-forward", "all-linear")
# for one path
MOST_SECONDS = 1.0
# the group of whole feed-forward modules, for experts that stand behind a module
WHOLE = "ffn"
# the module of a block that gives the output of its feed-forward part, before dropout, residual and norm. BERT, OPT and
# BART have no module of their own for this part: there it is its last linear.
_FEED_FORWARD = re.compile(r"\.\d+\.(mlp|ffn|feed_forward|DenseReluDense|output\.dense|fc2)$")
_QUERY_VALUE = {"q_proj", "v_proj", "query", "value", "q", "v", "q_lin", "v_lin"}
# linears of one block that read the same hidden states, by the names that transformers gives them
SIBLINGS = (
    {"q_proj", "k_proj", "v_proj"},
    {"query", "key", "value"},
    {"q", "k", "v"},
    {"q_lin", "k_lin", "v_lin"},
    {"gate_proj", "up_proj"},
    {"wi_0", "wi_1"},
    {"w1", "w3"},
)
_CROSS_ATTENTION = re.compile(
    r"(EncDecAttention|encoder_attn|crossattention|cross_attn)\.(self\.)?(k|v|k_proj|v_proj|key|value)$"
)


def is_repeated(path: str) -> bool:
    """Whether a module is part of one of the repeated blocks."""
    return re.search(r"\.\d+\.", path) is not None


@dataclass(frozen=True)
class Linear:
    """A linear module: its path without wrappers, its widths, the tokens it reads, whether those may see later ones."""

    path: str
    in_features: int
    out_features: int
    stream: Stream
    is_causal: bool

    @property
    def group(self) -> str | None:
        """`attention`, `feed-forward`, or None outside of the repeated blocks."""
        if not is_repeated(self.path):
            return None
        return "attention" if re.search(r"attn|attention", self.path, re.IGNORECASE) else "feed-forward"

    @property
    def groups(self) -> set[str | None]:
        """All groups it belongs to."""
        projects = self.group == "attention" and self.path.rpartition(".")[2] in _QUERY_VALUE
        return {self.group, "all-linear", "query-value" if projects else None}

    @property
    def siblings_key(self) -> tuple[str | int, ...] | None:
        """Equal for the linears that read the same input; None where nothing is known about it."""
        return kin_of(self.path, self.stream, self.in_features)


@dataclass(frozen=True)
class Block(Linear):
    """A module adapted as a whole: the widths are those of what it reads and gives."""


def kin_of(path: str, stream: Stream, in_features: int) -> tuple[str | int, ...] | None:
    """As `Linear.siblings_key`. The width tells apart what reads another model's states, as a Q-Former's keys do."""
    parent, _, leaf = path.rpartition(".")
    known = [sorted(names) for names in SIBLINGS if leaf in names]
    return (parent, stream, in_features, *known[0]) if known else None


def linears_of(model: nn.Module) -> list[Linear]:
    """Every linear module of `model` in its own order; modules that carry adapters count as what they wrap."""
    encoder_path = _encoder_path(model)
    causal = _is_causal(model)
    found = []
    for path, module in frozen_modules(model):
        features = _features(module)
        if features is not None:
            found.append(Linear(path, *features, *_read_by(path, encoder_path, causal)))
    return found


def frozen_modules(module: nn.Module, path: str = "", seen: set[nn.Module] | None = None) -> Iterator[tuple[str, Any]]:
    """As `named_modules`, without what adapters of any type hold: paths and modules as they are in the bare model."""
    seen = set() if seen is None else seen
    frozen = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if frozen not in seen:
        seen.add(frozen)
        yield path, frozen
        for name, child in frozen.named_children():
            yield from frozen_modules(child, f"{path}.{name}" if path else name, seen)


def _read_by(path: str, encoder_path: str | None, causal: bool) -> tuple[Stream, bool]:
    """The stream of the tokens that a module reads, and whether they are causal."""
    in_encoder = encoder_path is not None and path.startswith(encoder_path + ".")
    is_source = encoder_path is None or in_encoder or bool(_CROSS_ATTENTION.search(path))
    return "source" if is_source else "target", causal if encoder_path is None else not is_source


def places_of(model: nn.Module) -> list[Linear]:
    """Every linear module, and as a `Block` every other one whose widths are known, in the model's own order."""
    linears = {linear.path: linear for linear in linears_of(model)}
    widths = _widths_around(linears.values())
    own_width = getattr(getattr(model, "config", None), "hidden_size", None)
    encoder_path, causal = _encoder_path(model), _is_causal(model)
    found: list[Linear] = []
    for path, _ in frozen_modules(model):
        width = widths.get(path, own_width)
        if path in linears:
            found.append(linears[path])
        elif width is not None and path:
            found.append(Block(path, width, width, *_read_by(path, encoder_path, causal)))
    return found


def _widths_around(linears: Iterable[Linear]) -> dict[str, int]:
    """What modules read and give, by path: the width that their linears begin and end with, where it is one width."""
    ends: dict[str, tuple[int, int]] = {}
    for linear in linears:
        steps = linear.path.split(".")
        for n in range(1, len(steps)):
            first, _ = ends.get(".".join(steps[:n]), (linear.in_features, 0))
            ends[".".join(steps[:n])] = (first, linear.out_features)
    return {path: first for path, (first, last) in ends.items() if first == last}


def check_block(model: nn.Module, path: str, where: str) -> None:
    """`ConfigError` where a module needs more than hidden states: what it gives is not its own function of them."""
    module = model.get_submodule(path)
    module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    parameters = list(inspect.signature(module.forward).parameters.values())
    more = [p.name for p in parameters[1:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if more:
        raise ConfigError(
            f"{where}: {path} is a {type(module).__name__}, which reads {', '.join(more)} beside the hidden states; "
            "valid: a module that reads hidden states and gives one tensor"
        )


def _features(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, Conv1D):
        return tuple(module.weight.shape)
    if isinstance(module, nn.Linear) or (hasattr(module, "in_features") and hasattr(module, "out_features")):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    return None


def _encoder_path(model: nn.Module) -> str | None:
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    encoder = model.get_encoder()  # type: ignore[operator]
    return next(name for name, module in model.named_modules() if module is encoder)


def _is_causal(model: nn.Module) -> bool:
    """Whether tokens see only earlier ones: attention modules of transformers say so."""
    is_named_so = re.search(r"CausalLM|LMHead", type(model).__name__) is not None
    return is_named_so or any(getattr(module, "is_causal", False) is True for module in model.modules())


def match(
    targets: str | tuple[str, ...],
    linears: list[Linear],
    model: nn.Module,
    where: str,
    groups: tuple[str, ...] = GROUPS,
    whole: Iterable[str] = (),
) -> list[Linear]:
    """The linears that `targets` names; `ConfigError` for an entry that names none. `where` heads its message.

    `groups`: the groups that may be named, with `ffn` where `linears` are all the places of the model. `whole`: names
    of modules that are trained whole, in which no linear is meant.
    """
    if isinstance(targets, str) and targets not in (*GROUPS, WHOLE):
        named = [_match_expression(targets, linears, model, where)]
    else:
        entries = (targets,) if isinstance(targets, str) else targets
        named = [_match_entry(entry, linears, model, where, groups) for entry in entries]
    found = set().union(*(leave_out(paths, whole) for paths in named))
    return [linear for linear in linears if linear.path in found]


def _match_entry(entry: str, linears: list[Linear], model: nn.Module, where: str, groups: tuple[str, ...]) -> list[str]:
    if entry == WHOLE and WHOLE not in groups:
        raise ConfigError(
            f"{where}: 'ffn' names whole modules, which an expert that reads the module's input cannot adapt; "
            f"valid: {', '.join(GROUPS)} and path endings of linear modules"
        )
    hits = [linear.path for linear in linears if _names(entry, linear)]
    if not hits:
        raise ConfigError(_nothing(entry, linears, model, where, groups))
    return hits


def names_by_group(targets: str | tuple[str, ...], linear: Linear) -> bool:
    """Whether `targets` reaches the linear by a group alone, not by its path."""
    if isinstance(targets, str):
        return targets in GROUPS
    return not any(_names(entry, linear) for entry in targets if entry not in GROUPS)


def _match_expression(pattern: str, linears: list[Linear], model: nn.Module, where: str) -> list[str]:
    # by a library that can be stopped: an expression such as (a+)+$ may take for ever, and adapters bring theirs
    try:
        compiled = regex.compile(pattern)
        hits = [linear.path for linear in linears if compiled.fullmatch(linear.path, timeout=MOST_SECONDS)]
    except TimeoutError:
        raise ConfigError(
            f"{where}: the expression {show(pattern)} takes more than {MOST_SECONDS:g} s for one path; valid: one "
            "without repetitions inside of repetitions"
        ) from None
    except (regex.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"{where}: got {show(pattern)}, which is no regular expression: {error}") from None
    if not hits:
        raise ConfigError(
            f"{where}: the expression {show(pattern)} matches no linear module{_tell_fused(model)}; one string is "
            f"matched against whole paths such as {linears[0].path!r}; valid too: a list of path endings"
        )
    return hits


def _names(entry: str, linear: Linear) -> bool:
    if entry == WHOLE:
        return _FEED_FORWARD.search(linear.path) is not None
    if entry in GROUPS:
        return not isinstance(linear, Block) and linear.group is not None and entry in linear.groups
    return linear.path == entry or linear.path.endswith("." + entry)


def _nothing(entry: str, linears: list[Linear], model: nn.Module, where: str, groups: tuple[str, ...]) -> str:
    others = [module for name, module in model.named_modules() if name == entry or name.endswith("." + entry)]
    why = _tell_fused(others[0] if others else model)
    if others and not why:
        valid = "linear modules" + (" and modules of known width" if WHOLE in groups else "")
        return f"{where}: {entry!r} is a {type(others[0]).__name__}; valid here: {valid}"
    leaves = {linear.path.rpartition(".")[2] for linear in linears}
    known = did_you_mean(entry, leaves.union(group for group in groups if any(_names(group, each) for each in linears)))
    return f"{where}: {entry!r} matches no {'linear ' if why else ''}module of this model{why}{known}"


def _tell_fused(model: nn.Module) -> str:
    """Why adapters cannot stand at the experts of the model's own mixture; empty where they are linear modules."""
    fused = find_fused_experts(model)
    if fused is None:
        return ""
    return (
        f": its own experts are fused, {fused}, so no module is there beside which adapters of one expert could "
        "stand; valid: other linear modules, or 'ffn' with experts of kind 'bottleneck' behind the whole part"
    )


def find_fused_experts(model: nn.Module) -> str | None:
    """What holds all experts of a layer of the model's own mixture in one parameter, with its shape, if any."""
    for owner in model.modules():
        for name, weight in owner.named_parameters(recurse=False):
            if weight.dim() == 3 and "Expert" in type(owner).__name__:
                return f"{type(owner).__name__}.{name} is one parameter of shape {list(weight.shape)}"
    return None
