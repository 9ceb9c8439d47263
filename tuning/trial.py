"""The thin Tune trial: it holds a fraction of a GPU in Ray's books; the host that it talks to does the work.

Tune sees no checkpoints: the host writes them into the trial's folder, and a trial that starts, for the first time or
again, goes on from the last good one there. So it makes no difference whether Tune starts it again, or a resumed sweep.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.tune import PlacementGroupFactory, Trainable
from ray.tune.result import TIMESTEPS_TOTAL

from tuning.host import TURN_S, BrokerHandle, HostHandle, Place
from tuning.spec import TrialConfig

TRIAL_KEY = "trial"
"""Key of Tune's configuration that holds the trial's name; all others are knobs."""
NOTES = "notes"
"""Key of a result: what the user must hear, beside what ``Host.save`` answers."""
HOST_DEATHS = 2
"""Hosts that may die while a trial has its turn, without a report between: then it is what kills them."""
POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Ticket:
    """What every trial of a sweep is given."""

    broker: BrokerHandle
    folder: Path
    """The sweep's; each trial has one of its name in it."""
    shared: dict[str, Any]
    """Fields of TrialConfig that the search does not set."""
    cpus: float
    gpus: float
    reuse: bool
    """The process of a trial that has ended takes the next one."""


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
        """Find the host of the device that Ray gave this actor. The slot is taken at the first step."""
        self._name = str(config[TRIAL_KEY])
        knobs = {key: value for key, value in config.items() if key != TRIAL_KEY}
        self._config = TrialConfig.model_validate({**self._ticket.shared, **knobs})
        self._folder = str(self._ticket.folder / self._name)
        gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        self._place = Place(ray.get_runtime_context().get_node_id(), gpus[0] if gpus else None)
        self._serial, self._host = self._find_host()
        self._slot: int | None = None
        self._told = 0
        self._is_suspect = False
        """A host has died under it since its last report."""
        self._deaths = 0
        self._notes: list[str] = []

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Tune's way to start the next trial in this process; always possible."""
        self.cleanup()
        self.setup(new_config)
        return True

    def __repr__(self) -> str:
        """What Ray's dashboard and logs call this process; Ray asks once, when it is new."""
        trial = describe(self._name, self._config)
        return f"trials from {trial}" if self._ticket.reuse else trial

    def step(self) -> dict[str, Any]:
        """Train to the next report; the first after a restart is the checkpoint's own, which may not have been heard.

        A host that dies under way costs the trial nothing but the steps since its checkpoint, and Tune does not hear of
        it: all trials of a host suffer when one of them, or the machine, ends it. To find that one out, they go on one
        after another until each has reported once.

        Raises:
            RayActorError: the base does not load, or hosts die of this trial.
        """
        while True:
            try:
                return self._report()
            except RayActorError as error:
                self._slot = None
                self._serial, self._host = self._find_host(broken=self._serial)
                if self._is_suspect:
                    self._deaths += 1
                    self._end_turn()
                if error.actor_init_failed or self._deaths >= HOST_DEATHS:
                    raise
                self._is_suspect = True

    def cleanup(self) -> None:
        """Free the slot for the next trial."""
        self._end_turn()
        self._free_slot()

    def _free_slot(self) -> None:
        if self._slot is not None:
            with contextlib.suppress(RayActorError):  # then the slot went with its host
                self._ask("detach", self._slot)
            self._slot = None

    def _report(self) -> dict[str, Any]:
        """One report, from a checkpoint or from training."""
        if self._slot is None:
            while self._is_suspect and not self._take_turn():
                time.sleep(POLL_S)
            self._slot, found, passed_over = self._ask("attach", self._name, self._config, self._folder)
            self._notes += [f"{self._name}: {note}; passed over" for note in passed_over]
            if found is not None and found["steps"] > self._told:
                return self._result(found)
        report: dict[str, Any] = self._ask("advance", self._slot, self._config.report_every)
        self._notes += report.pop("notes", [])
        # The weights of a trial that diverged are worth nothing, and with its state it would only diverge again.
        trouble: dict[str, str] = {} if report["diverged"] else self._ask("save", self._slot, self._folder, report)
        self._end_turn()
        self._is_suspect, self._deaths = False, 0
        return self._result(report, trouble)

    def _result(self, report: dict[str, Any], trouble: dict[str, str] | None = None) -> dict[str, Any]:
        """The report as Tune takes it, with what ``Host.save`` has answered."""
        self._told = int(report["steps"])
        done = report["diverged"] or report["steps"] >= self._config.steps
        # Trackers lay a trial's numbers over what Tune calls its time steps.
        result = {**report, "done": done, TIMESTEPS_TOTAL: self._told, **(trouble or {})}
        if self._notes:
            result[NOTES] = "\n".join(self._notes)
            self._notes = []
        if result["done"]:
            self._free_slot()  # this process may wait for its next trial
        return result

    def _ask(self, method: str, *arguments: Any) -> Any:
        """Call the host and wait; a turn is kept meanwhile."""
        answer = getattr(self._host, method).remote(*arguments)
        while self._is_suspect and not ray.wait([answer], timeout=TURN_S / 3)[0]:
            self._take_turn()
        return ray.get(answer)

    def _take_turn(self) -> bool:
        return ray.get(self._ticket.broker.take_turn.remote(self._place, self._name))

    def _end_turn(self) -> None:
        if self._is_suspect:
            ray.get(self._ticket.broker.end_turn.remote(self._place, self._name))

    def _find_host(self, broken: str | None = None) -> tuple[str, HostHandle]:
        return ray.get(self._ticket.broker.host.remote(self._place, broken))


def describe(name: str, config: TrialConfig) -> str:
    """One line that tells a trial from the others: name, rank, alpha, targets, learning rate."""
    targets = config.target_modules if isinstance(config.target_modules, str) else ",".join(config.target_modules)
    return f"{name} rank={config.rank} alpha={config.alpha:g} targets={targets} lr={config.learning_rate:.3g}"
