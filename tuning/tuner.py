"""Ray Tune as a sweep runs it: what it is told, what a trial asks it for, and how Ctrl-C or SIGTERM ends it."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

from ray import tune
from ray.tune import Callback

from cluster.connect import environment
from tuning.past import Past
from tuning.search import make_scheduler, make_search
from tuning.spec import SweepSpec
from tuning.tracking import tracking_variables
from tuning.trial import TRIAL_KEY, Ticket, make_trainable
from tuning.watch import InterruptStopper

MAX_FAILURES = 2
"""Times that a trial is started again after its own process died, or something in it failed. Dead hosts do not count
(see ``ThinTrial.step``)."""
TUNE_VARIABLES = {
    # Tune's newer console output prints a banner even when told to be silent; the older one obeys.
    "RAY_AIR_NEW_OUTPUT": "0",
    # What it writes of trials goes to a temporary folder first; ours goes where it belongs at once (tuning/ledger.py).
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
}


def make_tuner(
    spec: SweepSpec,
    past: Past,
    ticket: Ticket,
    callbacks: Sequence[Callback],
    stopper: InterruptStopper,
    spent_s: float,
) -> tune.Tuner:
    """The Tuner that runs what ``past`` has left of ``spec``, into the ticket's folder.

    ``spent_s``: seconds of the sweep's time budget that earlier runs have used up.
    """
    budget_s = spec.search.time_budget_s
    return tune.Tuner(
        make_trainable(ticket),
        tune_config=tune.TuneConfig(
            metric=spec.search.metric,
            mode="min",
            search_alg=make_search(spec, past),
            scheduler=make_scheduler(spec, past),
            num_samples=len(past.left(spec.num_trials)),
            max_concurrent_trials=spec.resources.max_concurrent,
            reuse_actors=spec.resources.reuse_processes,
            time_budget_s=budget_s and max(budget_s - spent_s, 1.0),
            trial_name_creator=lambda trial: trial.config[TRIAL_KEY],
            trial_dirname_creator=lambda trial: trial.config[TRIAL_KEY],
        ),
        run_config=tune.RunConfig(
            name=ticket.folder.name,
            storage_path=str(ticket.folder.parent),
            callbacks=[*callbacks],
            stop=stopper,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
        ),
    )


@contextmanager
def quiet_tune(spec: SweepSpec, slots: int) -> Generator[None]:
    """While Tune runs: its environment and its trackers', and nothing from them on the terminal."""
    levels = {
        "ray.tune": logging.WARNING,
        # Its own snapshots need no room on the disk to be of no use to us.
        "ray.tune.execution.experiment_state": logging.CRITICAL,
        # It tells of each time that MLflow's client asks a server again; we tell when it has given up.
        "urllib3.connectionpool": logging.ERROR,
    }
    loggers = {logging.getLogger(name): level for name, level in levels.items()}
    before = {logger: logger.level for logger in loggers}
    # Of trials that end together, Tune keeps as many processes as it has asked the search for next trials. A search
    # that learns is asked for one at a time, so that it knows all results there are.
    ahead = {} if spec.search.algorithm == "tpe" else {"TUNE_MAX_PENDING_TRIALS_PG": str(slots)}
    try:
        for logger, level in loggers.items():
            logger.setLevel(level)
        with environment({**TUNE_VARIABLES, **ahead, **tracking_variables(spec.track)}):
            yield
    finally:
        for logger, level in before.items():
            logger.setLevel(level)


@contextmanager
def interruptible() -> Generator[InterruptStopper]:
    """A stopper for Tune that ends the sweep after a SIGINT or SIGTERM; a second SIGINT raises KeyboardInterrupt."""
    stopper = InterruptStopper()
    if threading.current_thread() is not threading.main_thread():
        yield stopper
        return

    def on_signal(number: int, _frame: object) -> None:
        stopper.interrupt()
        if number == signal.SIGINT:
            signal.signal(number, previous[number])

    # Tune's own handler is left out: it breaks off in the middle of a checkpoint.
    with environment({"TUNE_DISABLE_SIGINT_HANDLER": "1"}):
        previous: dict[int, Any] = {
            number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield stopper
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
