"""Installed packages against the versions that mixora supports."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import Version

# what mixora works with where it is there, beside the extras
OPTIONAL = (
    "bitsandbytes",
    "torchao",
    "triton",
    "flash-attn",
    "trackio",
    "tensorboard",
    "wandb",
    "mlflow",
    "ray",
    "lm-eval",
)


@dataclass(frozen=True)
class Package:
    """`version`: None where it is not installed. `range`: what mixora supports. `is_needed`: else it is optional."""

    name: str
    version: str | None
    range: str
    is_needed: bool

    @property
    def is_fit(self) -> bool:
        """Whether it is installed in a supported version."""
        if self.version is None:
            return False
        return Requirement(self.name + self.range).specifier.contains(Version(self.version), prereleases=True)

    def describe(self) -> str:
        """Name, version and supported range."""
        supported = f" (supported: {self.range})" if self.range else ""
        return f"{self.name} {self.version or 'is not installed'}{supported}"


def read_packages() -> tuple[Package, ...]:
    """mixora's dependencies, then what is optional; ranges come from mixora's own metadata."""
    found: dict[str, Package] = {}
    for requirement, is_needed in [*_required(), *((Requirement(name), False) for name in OPTIONAL)]:
        version = version_of(requirement.name)
        found.setdefault(requirement.name, Package(requirement.name, version, str(requirement.specifier), is_needed))
    return tuple(found.values())


def version_of(name: str) -> str | None:
    """The installed version of a distribution."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _required() -> Iterator[tuple[Requirement, bool]]:
    try:
        lines = metadata.requires("mixora") or []
    except metadata.PackageNotFoundError:
        # run from a source tree, where nothing states the ranges
        return
    for line in lines:
        requirement = Requirement(line)
        is_extra = "extra" in str(requirement.marker or "")
        if is_extra or requirement.marker is None or requirement.marker.evaluate():
            yield requirement, not is_extra
