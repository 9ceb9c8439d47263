"""A tracker's callback, kept from ending the sweep: Ray Tune lets whatever a callback raises end the whole run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ray.tune import Callback

from cluster.errors import in_short

MOST_S = 30.0
"""Tune does nothing else while a callback works: one that takes longer over a trial's report is done without."""
_ONCE = ("setup", "on_experiment_end")


def _passed_on(hook: str) -> Any:
    """A method of ``Guarded`` that stands for the callback's method of that name."""

    def call(self: Guarded, *arguments: Any, **info: Any) -> None:
        self.call(hook, *arguments, **info)

    return call


class Guarded(Callback):
    """Passes Tune's calls on to a callback until one raises or takes too long; then tells so once, and passes no more.

    The driver alone calls it, from Tune's loop. The callback is made when Tune sets it up, so that a package that
    cannot be imported counts as a failure too.
    """

    def __init__(self, name: str, make: Callable[[], Callback], tell: Callable[[str], None]) -> None:
        """``name`` is the field of the sweep's file that asked for the callback."""
        self._name, self._make, self._tell = name, make, tell
        self._inner: Callback | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Empty: Tune pickles its callbacks into the experiment's snapshot."""
        return {}

    def setup(self, *arguments: Any, **info: Any) -> None:
        """Make the callback, and set it up."""
        try:
            self._inner = self._make()
        except Exception as error:  # noqa: BLE001 - a broken package raises anything
            self._leave_out(in_short(error))
        self.call("setup", *arguments, **info)

    on_step_begin = _passed_on("on_step_begin")
    on_step_end = _passed_on("on_step_end")
    on_trial_start = _passed_on("on_trial_start")
    on_trial_restore = _passed_on("on_trial_restore")
    on_trial_save = _passed_on("on_trial_save")
    on_trial_result = _passed_on("on_trial_result")
    on_trial_complete = _passed_on("on_trial_complete")
    on_trial_recover = _passed_on("on_trial_recover")
    on_trial_error = _passed_on("on_trial_error")
    on_checkpoint = _passed_on("on_checkpoint")
    on_experiment_end = _passed_on("on_experiment_end")

    def call(self, hook: str, *arguments: Any, **info: Any) -> None:
        """Call the callback, if there still is one."""
        if self._inner is None:
            return
        began = time.monotonic()
        try:
            getattr(self._inner, hook)(*arguments, **info)
        except Exception as error:  # noqa: BLE001 - nothing of a tracker's may end the sweep
            self._leave_out(in_short(error))
            return
        took_s = time.monotonic() - began
        if took_s > MOST_S and hook not in _ONCE:
            self._leave_out(f"it took {took_s:.0f} s over one report, and no trial goes on meanwhile")

    def _leave_out(self, why: str) -> None:
        self._inner = None
        self._tell(f"{self._name} is left out from here on, and the sweep goes on: {why}")
