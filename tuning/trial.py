"""The thin Tune trial: it holds a fraction of a GPU in Ray's books; the host that it talks to does the work."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.tune import PlacementGroupFactory, Trainable

from tuning.host import BrokerHandle, HostHandle, Place
from tuning.spec import TrialConfig

METRICS = "metrics.json"
"""The report that a checkpoint belongs to, beside it."""
TRIAL_KEY = "trial"
"""Key of Tune's configuration that holds the trial's name; all others are knobs."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """What every trial of a sweep is given."""

    broker: BrokerHandle
    shared: dict[str, Any]
    """Fields of TrialConfig that the search does not set."""
    cpus: float
    gpus: float


def make_trainable(ticket: Ticket) -> type[Trainable]:
    """The trial class of one sweep.

    A class of its own for each sweep, because ``tune.with_parameters`` and ``with_resources`` rename what the
    dashboard shows.
    """

    class LoraTrial(ThinTrial):
        _ticket = ticket

        @classmethod
        def default_resource_request(cls, config: dict[str, Any]) -> PlacementGroupFactory:  # noqa: ARG003
            return PlacementGroupFactory([{"CPU": ticket.cpus, "GPU": ticket.gpus}])

    return LoraTrial


class ThinTrial(Trainable):
    """One trial. ``step`` is a report's worth of training steps on the host."""

    _ticket: Ticket

    def setup(self, config: dict[str, Any]) -> None:
        """Find the host of the device that Ray gave this actor. The slot is taken at the first step or restore."""
        self._name = str(config[TRIAL_KEY])
        knobs = {key: value for key, value in config.items() if key != TRIAL_KEY}
        self._config = TrialConfig.model_validate({**self._ticket.shared, **knobs})
        gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        self._place = Place(ray.get_runtime_context().get_node_id(), gpus[0] if gpus else None)
        self._serial, self._host = self._find_host()
        self._slot: int | None = None
        self._last: dict[str, Any] = {}

    def __repr__(self) -> str:
        return describe(self._name, self._config)

    def step(self) -> dict[str, Any]:
        """Train to the next report."""
        report: dict[str, Any] = self._ask("advance", self._attached(), self._config.report_every)
        self._last = {**report, "done": report["diverged"] or report["steps"] >= self._config.steps}
        return dict(self._last)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Have the host write the checkpoint; it is on this node, so the folder is too."""
        self._ask("save", self._attached(), checkpoint_dir)
        folder = Path(checkpoint_dir)
        # Tune copies the folder file by file: with their sizes, a reader can tell a whole copy from one cut short.
        sizes = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        (folder / METRICS).write_text(json.dumps({**self._last, "files": sizes}, indent=2) + "\n")

    def load_checkpoint(self, checkpoint: str | dict[str, Any] | None) -> None:
        """Take a slot that goes on from ``checkpoint``."""
        self.cleanup()
        self._slot = int(self._ask("attach", self._config, str(checkpoint)))

    def cleanup(self) -> None:
        """Free the slot for the next trial."""
        if self._slot is not None:
            with contextlib.suppress(RayActorError):  # then the slot went with its host
                self._ask("detach", self._slot)
            self._slot = None

    def _attached(self) -> int:
        slot = self._slot
        if slot is None:
            slot = self._slot = int(self._ask("attach", self._config, None))
        return slot

    def _ask(self, method: str, *arguments: Any) -> Any:
        """Call the host and wait.

        A dead host fails the trial, and Tune starts it again from its last checkpoint; the broker is told first, so
        that the trial then finds a living host.
        """
        try:
            return ray.get(getattr(self._host, method).remote(*arguments))
        except RayActorError:
            self._find_host(broken=self._serial)
            raise

    def _find_host(self, broken: int | None = None) -> tuple[int, HostHandle]:
        return ray.get(self._ticket.broker.host.remote(self._place, broken))


def describe(name: str, config: TrialConfig) -> str:
    """One line that tells a trial from the others: name, rank, alpha, targets, learning rate."""
    targets = config.target_modules if isinstance(config.target_modules, str) else ",".join(config.target_modules)
    return f"{name} rank={config.rank} alpha={config.alpha:g} targets={targets} lr={config.learning_rate:.3g}"
