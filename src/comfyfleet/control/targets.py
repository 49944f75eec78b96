"""The documented arithmetic of scaling, each rule a function: how much capacity is wanted, before any worker is named.

Sources: the public documentation of the serverless engine (its worked examples are tests). How load is predicted is
not public; ours is below.
"""

from __future__ import annotations

import math

from comfyfleet.control.demand import MIDDLE_S, SHORT_S, Demand
from comfyfleet.control.scaling import ScalePolicy

# A rate is only believed over a window of several jobs' length: one job of 100 s is no "7 load/s".
WINDOW_JOBS = 3.0
# A rising rate is followed this far ahead at most.
TREND_CAP = 1.0
NOISE_SIGMAS = 2.0
# Where no inactivity_timeout is set, an endpoint that had neither request nor work for so long is taken for quiet.
QUIET_AFTER_S = 60.0


def predicted_load(demand: Demand, *, service_s: float, lead_s: float) -> float:
    """Load/s to expect when capacity ordered now is ready.

    service_s: how long a job runs; it chooses the window. lead_s: how long starting a worker takes; a rising rate is
    followed that far (at most to twice its present value), a falling one is not: letting go has its own delay. Arrivals
    at random rise and fall at a constant rate too: a rise counts where it is over twice what two windows of a Poisson
    process differ by (the root of their sum of requests).
    """
    rates = demand.rates
    wanted_s = WINDOW_JOBS * service_s
    if wanted_s <= SHORT_S:
        rate = rates.short
    elif wanted_s <= MIDDLE_S:
        rate = rates.middle
    else:
        rate = rates.long
    noise = NOISE_SIGMAS * math.sqrt(2.0 * rates.middle * rates.mean_cost / SHORT_S)
    if wanted_s <= MIDDLE_S and rates.trend * SHORT_S > noise and rates.short > rates.middle:
        rate += min(rates.trend * lead_s, TREND_CAP * rate)
    return rate


def active_target(policy: ScalePolicy, load: float) -> float:
    """Load/s that active workers should be able to serve: 900 at 0.9 gives 1000."""
    return max(policy.min_load, load) / policy.target_util


def total_target(policy: ScalePolicy, active: float) -> float:
    """Load/s of active and inactive workers together."""
    return max(active * policy.cold_mult, policy.min_cold_load)


def queue_target(
    policy: ScalePolicy, demand: Demand, *, backlog: float, ready: float, perf: float, lead_s: float
) -> float:
    """Load/s wanted because of what is in the system now; 0 where that is begun in time anyway.

    ready: load/s of the workers that serve now (those that start count towards the target). Capacity ordered now
    can only help with what is left after `lead_s`; that is to be begun within `target_queue_time`. A job runs on one
    worker, so there is no sense in more of them than jobs that would still wait then.
    """
    waiting = max(demand.waiting_cost, float(demand.waiting))  # a caller's cost of 0 is still a job
    if not demand.waiting:
        return 0.0
    limit_s = max(policy.target_queue_time, 0.1)
    if ready > 0 and (waiting + backlog) / ready <= limit_s:
        return 0.0
    left = max(0.0, waiting + backlog - ready * lead_s)
    jobs_left = left / max(waiting / demand.waiting, 1.0)
    extra = min(left / limit_s, jobs_left * perf)
    return ready + extra if extra > 0 else 0.0


def active_floor(policy: ScalePolicy, *, active_now: int, idle_s: float) -> int:
    """How many workers stay active whatever the load says (`min_load` has its own effect on the target)."""
    timeout = policy.inactivity_timeout
    if timeout is None or timeout == 0:
        return 0
    if timeout < 0:
        return 1
    return min(1, active_now) if idle_s < timeout else 0


def is_quiet(policy: ScalePolicy, *, idle_s: float, wake_s: float) -> bool:
    """Nothing has come for so long that the recent rate says nothing about the near future."""
    timeout = policy.inactivity_timeout
    if timeout is None or timeout < 0:
        return idle_s >= max(QUIET_AFTER_S, 2 * wake_s)
    return idle_s >= max(timeout, wake_s)


def workers_for(load: float, perf: float) -> int:
    """How many workers of that score carry that load/s. Load of exactly one worker's score over 0.9 takes two."""
    return math.ceil(min(load / max(perf, 1e-6), 1e6) - 1e-9) if load > 0 else 0
