"""How an error energy moves from step to step, for all slots and casts at once: what `confidence.py` is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from scipy.special import erf

from advisor.confidence import DAMAGE, FEWEST_STEPS, NOISE, halves_apart, log_error, scatter
from advisor.grid import Array
from advisor.metrics import Metrics

UNKNOWN, EXACT, NONE, MOVES = 0.0, 1.0, 2.0, 3.0


@dataclass(frozen=True, eq=False)
class Moments:
    """Of q, the log2 error energies of a slot's steps under a cast; float64 [P, K] each.

    state    UNKNOWN: too few steps; EXACT: no error at all; NONE: errors in some steps alone, or infinite;
             MOVES: all others
    steps    how many of them are finite
    apart    mean of the second half less that of the first (`confidence.halves_apart`)
    scatter  standard deviation about the straight line (`confidence.scatter`)
    """

    state: Array
    steps: Array
    apart: Array
    scatter: Array

    @classmethod
    def of(
        cls, errors: Array, whole: Array, nonzero: Array, starts: NDArray[np.int64], wanted: NDArray[np.bool_]
    ) -> Moments:
        """From each step's error energies [T, K] and what they are of [T]; slot p has the steps from starts[p] on."""
        with np.errstate(divide="ignore", invalid="ignore"):
            relative = torch.from_numpy(errors / whole[:, None])
        found = np.zeros((4, *wanted.shape))
        # torch takes logarithms several at a time.
        _moments(torch.log2(relative).numpy(), nonzero, starts, wanted, FEWEST_STEPS, found)
        return cls(*found)

    @classmethod
    def joined(cls, parts: Sequence[Moments]) -> Moments:
        """Those of several groups of slots, one after another."""
        names = ("state", "steps", "apart", "scatter")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def put(self, p: int, k: int, metrics: Metrics, in_loss_units: bool) -> None:
        """Those of one slot and cast, from its metrics."""
        q = log_error(metrics, in_loss_units)
        exact = np.isneginf(q)
        if len(q) < FEWEST_STEPS:
            self.state[p, k] = UNKNOWN
        elif exact.all():
            self.state[p, k] = EXACT
        elif np.isposinf(q).any() or exact.mean() > 0.25:
            self.state[p, k] = NONE
        else:
            kept = q[~exact]
            self.state[p, k], self.steps[p, k] = MOVES, len(kept)
            self.apart[p, k], self.scatter[p, k] = halves_apart(kept), scatter(kept)

    def confidence(self, forward: NDArray[np.bool_], relative_se: Array, loss_moves: float = 0.0) -> Array:
        """`confidence.confidence_of` for all: [P, K], NaN where unknown.

        forward      bool [P]: whether a slot's score is a damage
        relative_se  float64 [P, K]: standard error of the damage over the damage, NaN where it was not measured
        loss_moves   `confidence.loss_octaves` of the window, for damages
        """
        floor, trend, doubt = (
            np.where(forward, getattr(DAMAGE, name), getattr(NOISE, name))[:, None]
            for name in ("floor", "trend", "doubt")
        )
        of_draws = np.where(np.isfinite(relative_se), doubt * relative_se / math.log(2), 0.0)
        of_steps = self.scatter**2 * 2 / np.maximum(self.steps, 1)
        of_loss = np.where(forward, loss_moves, 0.0)[:, None]
        sigma = np.sqrt(floor**2 + (trend * self.apart) ** 2 + of_steps + of_draws**2 + of_loss**2)
        found = np.where(self.state == MOVES, erf(1 / (sigma * math.sqrt(2))), np.nan)
        return np.where(self.state == EXACT, 1.0, np.where(self.state == NONE, 0.0, found))


@njit(cache=True, nogil=True, error_model="numpy")
def _moments(
    logarithms: Array,
    nonzero: Array,
    starts: NDArray[np.int64],
    wanted: NDArray[np.bool_],
    fewest: int,
    found: Array,
) -> None:
    q = np.empty(len(logarithms))
    for p in range(len(starts) - 1):
        for k in range(wanted.shape[1]):
            if not wanted[p, k]:
                continue
            some, exact, infinite, n = 0, 0, False, 0
            for t in range(starts[p], starts[p + 1]):
                if nonzero[t] <= 0:
                    continue
                some += 1
                value = logarithms[t, k]
                if value == -np.inf:
                    exact += 1
                    continue
                infinite |= value == np.inf
                q[n] = value
                n += 1
            if some < fewest:
                continue
            if exact == some:
                found[0, p, k] = EXACT
                continue
            if infinite or exact > 0.25 * some:
                found[0, p, k] = NONE
                continue
            half, middle = n // 2, (n - 1) / 2
            total, apart, along = 0.0, 0.0, 0.0
            for i in range(n):
                total += q[i]
                along += (i - middle) * q[i]
            for i in range(half):
                apart += q[n - half + i] - q[i]
            # Places from -middle to middle have n·(n² - 1)/12 for the sum of their squares.
            mean, slope, left = total / n, along / max(n * (n * n - 1) / 12, 1.0), 0.0
            for i in range(n):
                rest = q[i] - mean - slope * (i - middle)
                left += rest * rest
            found[0, p, k], found[1, p, k], found[2, p, k] = MOVES, n, apart / max(half, 1)
            found[3, p, k] = np.sqrt(left / (n - 2)) if n > 2 else 0.0
