"""The tuner of type MIXORA, registered from outside, so that all of PEFT's entry points know it."""

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from peft import PeftConfig
from peft.utils import ModulesToSaveWrapper
from torch import nn

from mixora.config import did_you_mean
from mixora.errors import ConfigError, MixoraError
from mixora.host import versions
from mixora.host.packed import keep_differentiable
from mixora.mixture import PREFIX, Mixture, mixtures_of
from mixora.mixture.folding import check_untied
from mixora.passes import entrances
from mixora.planning import whole_modules
from mixora.planning.admission import check_name, check_room
from mixora.planning.assembly import make_plan, parts_of
from mixora.planning.plan import Plan, Site
from mixora.planning.sites import kin_of
from mixora.routers import ROUTERS
from mixora.tuner import keys
from mixora.tuner.config import MixoraConfig, allocate


class MixoraModel(versions.Tuner):
    """The tuner; holds nothing that is needed at run time, since native loading throws it away."""

    prefix = PREFIX
    tuner_layer_cls = Mixture
    target_module_mapping: dict[str, list[str]] = {}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Plan, compare with the stored plan where there is one, wrap the sites, hook the model's entrances."""
        check_name(adapter_name, model)
        keep_differentiable(model)
        # TRL makes its reference so and copies the tensors whose names hold ".default.", which none of ours does
        is_reference = adapter_name == "ref" and self.peft_config["ref"] is self.peft_config.get("default")
        # the user's config stays as it is: it may serve for another model
        config = self.peft_config[adapter_name] = copy.copy(self.peft_config[adapter_name])
        if config.plan is None:
            config = self.peft_config[adapter_name] = allocate(model, config)
        whole = whole_modules.names_of(config)
        # PEFT adds some heads to the config that it was given when this one is a copy already
        config.modules_to_save = list(whole) or None
        new_plan = make_plan(model, config.method, whole, is_stored=config.plan is not None)
        if config.plan is not None:
            new_plan.check_against(config.plan)
        config.plan = new_plan.to_list()
        self._roots = _group_by_root(model, new_plan)
        foreign = sorted(self._roots.keys() - {site.path for site in new_plan.sites})
        if foreign and "_plan" not in self.__dict__:
            raise ConfigError(
                f"{foreign[0]}: is wrapped by another adapter and not by this one, which transformers' own loading "
                "cannot follow; valid: PeftModel.from_pretrained for the first adapter, then PeftModel.load_adapter"
            )
        self._plan = new_plan
        self._kin: dict[tuple[str | int, ...], list[Mixture]] = {}
        check_room(model, new_plan)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        # PEFT's export to LoRA reads it
        config.target_modules = {site.path for site in new_plan.sites}
        if not hasattr(model, "_mixora_hooks"):
            model._mixora_hooks = entrances.install(model)  # type: ignore[assignment]
        if any(ROUTERS[site.router].draws for site in new_plan.sites):
            entrances.expect_draws(model)
        for layer in mixtures_of(model) if is_reference else ():
            layer.copy_adapter("default", adapter_name)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        return peft_config

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> bool:  # type: ignore[override]
        # on the instance: what PEFT has to visit depends on the plan and on what is wrapped already
        return not key.endswith(".base_layer") and key.replace(".base_layer", "") in self._roots

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, MixoraConfig)
        for site in self._roots[current_key.replace(".base_layer", "")]:
            self._adapt(site, peft_config, adapter_name)

    def _adapt(self, site: Site, config: MixoraConfig, adapter_name: str) -> None:
        leader = self.model.get_submodule(site.leader) if site.leader else None
        assert leader is None or isinstance(leader, Mixture)
        parts = parts_of(site, config.method, self._plan, leader)
        above, _, name = site.path.rpartition(".")
        parent, target = self.model.get_submodule(above), self.model.get_submodule(site.path)
        kin = kin_of(site.path, site.stream, site.in_features) or (site.path,)
        parts.kin = self._kin.setdefault((site.rule, *kin), [])
        if isinstance(target, Mixture):
            parts.kin.append(target)
            target.add(adapter_name, parts, config.inference_mode)
            return
        wrapped = Mixture(target, site.path, self.peft_config)
        parts.kin.append(wrapped)
        wrapped._active_adapter = self.active_adapters
        wrapped.add(adapter_name, parts, config.inference_mode)
        self._replace_module(parent, name, wrapped, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(new_module, Mixture) or isinstance(child, Mixture | ModulesToSaveWrapper):
            # PEFT's way expects a weight on the wrapped module; `add` made the tensors on the right device
            setattr(parent.get_base_layer() if isinstance(parent, Mixture) else parent, child_name, new_module)
            return
        super()._replace_module(parent, child_name, new_module, child)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        found = super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)
        return keys.as_alone(model, adapter_name, found)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Any]
    ) -> dict[str, Any]:
        found = keys.as_here(model, state_dict)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, found)

    def _enable_peft_forward_hooks(
        self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> AbstractContextManager[None]:
        """Refuse what PEFT would drop without a word: an adapter of its own for each row of a batch."""
        if adapter_names is not None:
            raise MixoraError(
                "adapter_names: rows of one batch cannot have adapters of their own; valid: a batch for each adapter, "
                "with set_adapter before it"
            )
        return nullcontext()

    def set_adapter(self, adapter_name: str | list[str], *args: Any, **kwargs: Any) -> None:
        """Refuse names that no adapter has, for which PEFT would leave the base alone at work."""
        for name in [adapter_name] if isinstance(adapter_name, str) else adapter_name:
            if name not in self.peft_config:
                raise ConfigError(f"adapter {name!r}: is not there{did_you_mean(name, self.peft_config)}")
        super().set_adapter(adapter_name, *args, **kwargs)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: routers that were trained with different experts have no mean."""
        raise MixoraError(
            "add_weighted_adapter: mixtures have no weighted sum that is a mixture; valid: several active adapters, "
            "whose outputs add up (model.base_model.set_adapter), or mixora.merge, which makes LoRA adapters"
        )

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Refuse before the first weight is changed."""
        self._check_all_foldable(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _check_all_foldable(self, adapter_names: list[str] | None) -> None:
        merged = []
        for module in mixtures_of(self.model):
            names = [name for name in adapter_names or module.active_adapters if name in module.parts]
            for name in names:
                module.check_foldable(name)
            merged += [module] if names else []
        check_untied(self.model, merged)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            names = kwargs.get("adapter_names") or (args[2] if len(args) > 2 else None)
            self._check_all_foldable(names)
        model: Any = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        while mixtures_of(model):
            # PEFT does not look inside of what it unwraps
            model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        for handle in model.__dict__.pop("_mixora_hooks", ()):
            handle.remove()
        return model


def _group_by_root(model: nn.Module, plan: Plan) -> dict[str, list[Site]]:
    """The sites below each module that PEFT visits: it does not look inside of a module that is wrapped already."""
    wrapped = [name.replace(".base_layer", "") for name, module in model.named_modules() if isinstance(module, Mixture)]
    roots: dict[str, list[Site]] = {}
    for site in plan.sites:
        steps = site.path.split(".")
        above = {".".join(steps[: n + 1]) for n in range(len(steps))}
        root = min((path for path in wrapped if path in above), key=len, default=site.path)
        roots.setdefault(root, []).append(site)
    return roots


def register() -> None:
    """Make PEFT know the type MIXORA."""
    versions.register(MixoraConfig, MixoraModel, PREFIX, keys.as_alone, keys.as_here)
