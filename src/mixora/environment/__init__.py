"""What mixora finds around itself: packages, machine, and what works here and what does not.

Nothing here needs a library before it is known to be there, so that a broken installation can be examined too. No
values of environment variables and no paths are told.
"""

from dataclasses import asdict, dataclass
from typing import Any

from mixora.environment.abilities import Ability, try_all
from mixora.environment.machine import Machine, read_machine
from mixora.environment.packages import Package, read_packages

__all__ = ["Ability", "Environment", "Machine", "Package", "examine"]

LEAST_DISK = 2**28


@dataclass(frozen=True)
class Environment:
    """`packages` in the order of the dependencies; `abilities` with `training` first."""

    machine: Machine
    packages: tuple[Package, ...]
    abilities: tuple[Ability, ...]

    @property
    def obstacles(self) -> list[str]:
        """What has to be done before mixora can train here."""
        unfit = [package for package in self.packages if package.is_needed and not package.is_fit]
        found = [f'{package.describe()}: pip install "{package.name}{package.range}"' for package in unfit]
        found += [
            f"{ability.name}: {ability.why}" for ability in self.abilities if ability.is_needed and not ability.works
        ]
        if self.machine.disk_free < LEAST_DISK:
            found.append(f"only {self.machine.disk_free / 2**20:.0f} MiB of disk are free here: make room")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {**asdict(self), "can_train": not self.obstacles, "obstacles": self.obstacles}


def examine(network: bool = False) -> Environment:
    """Look at everything; with `network` also whether the hub answers, which takes three seconds at most."""
    return Environment(read_machine(), read_packages(), try_all(network))
