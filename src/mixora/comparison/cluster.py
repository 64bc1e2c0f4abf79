"""Runs on an existing Ray cluster: its scheduler places them, the same processes as on one machine make them."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from mixora.comparison.execution import GRACE, Job, Outcome, execute
from mixora.errors import ConfigError


@dataclass(frozen=True)
class Cluster:
    """Runs of `threads` cores and `gpus` GPUs each; `workers`: the most at a time, None for as many as fit."""

    ray: Any
    workers: int | None
    threads: int
    gpus: int
    is_ours: bool

    def launch(self, jobs: Sequence[Job]) -> Generator[Outcome]:
        """Make all runs and tell each end; runs that go on are stopped where the iteration ends before they do."""
        task = self.ray.remote(num_cpus=self.threads, num_gpus=self.gpus, max_retries=0)(execute)
        waiting, running = list(jobs), dict[Any, Job]()
        try:
            while waiting or running:
                while waiting and len(running) < (self.workers or len(jobs)):
                    job = waiting.pop(0)
                    running[task.remote(job)] = job
                (ended,), _ = self.ray.wait(list(running))
                yield self._outcome(ended, running.pop(ended))
        finally:
            for reference in running:
                self.ray.cancel(reference)
            if running:
                self.ray.wait(list(running), num_returns=len(running), timeout=GRACE)
            if self.is_ours:
                self.ray.shutdown()

    def _outcome(self, reference: Any, job: Job) -> Outcome:
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            return Outcome(job.name, 0.0, f"Ray: {error}")

    def __str__(self) -> str:
        at_once = f"at most {self.workers}" if self.workers else "as many as fit"
        return f"{at_once} at a time on the Ray cluster, {self.threads} threads and {self.gpus} GPUs each"


def make_cluster(address: str, workers: int | None, threads: int | None) -> Cluster:
    """Connect to the cluster at `address` (`auto`: the one that this machine belongs to).

    By default a run takes one GPU where the nodes have some, and its share of the smallest such node's cores; else all
    cores of the smallest node. Raises `ConfigError` without Ray, without a cluster, and for more than a node has.
    """
    ray = _import_ray()
    is_ours = not ray.is_initialized()
    if is_ours:
        try:
            ray.init(address=address, log_to_driver=False, logging_level="error")
        except (ConnectionError, ValueError) as error:
            raise ConfigError(
                f"address: got {address!r}, where no Ray cluster answers: {error}; "
                "valid: --address HOST:PORT of one that runs; `ray start --head` starts one"
            ) from None
    sizes = [(int(r.get("CPU", 0)), int(r.get("GPU", 0))) for r in (n["Resources"] for n in ray.nodes() if n["Alive"])]
    gpus = int(any(count for _, count in sizes))
    shares = [cores // max(1, count) for cores, count in sizes if cores and count >= gpus]
    largest = max((cores for cores, count in sizes if count >= gpus), default=0)
    if not shares or (threads or 1) > largest:
        raise ConfigError(f"threads: got {threads or 1}; valid: at most {largest}, the cores of the largest Ray node")
    return Cluster(ray, workers, threads or max(1, min(shares)), gpus, is_ours)


def _import_ray() -> Any:
    try:
        import ray
    except ImportError:
        raise ConfigError('launcher: got ray, which is not installed; valid: pip install "mixora[ray]"') from None
    return ray
