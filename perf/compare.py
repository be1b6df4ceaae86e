"""Two runs against each other: what moved beyond noise, and what slid.

A movement is old time / new time: above 1 is faster. An absolute number moves from machine to machine and from day to
day, ratios within one run hold; so a provider's movement is normalised: divided by the geometric mean of its peers'
movements over all points that both runs have. Without a common peer the raw movement is all there is, and is judged.
Noise is twice the standard error of both medians, from the samples' median absolute deviation: samples that differ by 5 %
still pin a median of seven down to about 2 %. What no point shows alone, all together do: the geometric mean is judged too.
"""

import math
import statistics

from dataclasses import dataclass, field

from perf import PerfError, results
from perf.table import geometric_mean

NOISE_FLOOR = 0.01
SLIDE = 0.02


@dataclass(frozen=True)
class Movement:
    measure: str
    point: object
    old_ms: float
    new_ms: float
    noise: float  # of the movement, at least NOISE_FLOOR
    peers: float  # the peers' movement

    @property
    def raw(self):
        return self.old_ms / self.new_ms

    @property
    def normalised(self):
        return self.raw / self.peers

    @property
    def moved(self):
        return abs(self.normalised - 1) > self.noise

    @property
    def below_mark(self):
        return self.normalised < 1 - SLIDE

    @property
    def slid(self):
        return self.moved and self.below_mark

    def line(self):
        what = self.point.label() + ("" if self.measure == "kernel" else f" {self.measure}")
        return (
            f"{what:<46} {self.old_ms:10.4f} {self.new_ms:10.4f} {self.raw - 1:+8.1%} {self.normalised - 1:+11.1%} {self.noise:7.1%}"
        )


HEADER = f"{'point':<46} {'old ms':>10} {'new ms':>10} {'raw':>8} {'normalised':>11} {'noise':>7}"


@dataclass
class Comparison:
    provider: str
    movements: list
    peers: dict  # {peer: its movement}
    lost: list = field(default_factory=list)  # labels that OLD has and NEW tried in vain
    unmatched: int = 0  # points in one file only

    @property
    def exit_code(self):
        return 1 if self.lost or self.slid_together or any(movement.slid for movement in self.movements) else 0

    @property
    def slid_together(self):
        return bool(self.movements) and geometric_mean(movement.normalised for movement in self.movements) < 1 - SLIDE


def median_error(samples):
    """The standard error of the samples' median over the median, as for a normal distribution of their MAD's width."""
    median = statistics.median(samples)
    deviation = statistics.median(abs(sample - median) for sample in samples)
    return 1.4826 * 1.2533 * deviation / math.sqrt(len(samples)) / median


def compare(old, new, provider):
    before, after = results.by_problem(old), results.by_problem(new)
    for name, run in (("OLD", before), ("NEW", after)):
        if not any(provider in measured for measured in run.values()):
            raise PerfError(f"{name} has no measurement of {provider}")
    common = [problem for problem in before if problem in after]
    if not common:
        raise PerfError("the two runs have no point in common")

    movements_of = {}
    for problem in common:
        for name in before[problem].keys() & after[problem].keys():
            movement = before[problem][name]["median_ms"] / after[problem][name]["median_ms"]
            movements_of.setdefault(name, []).append(movement)
    peers = {name: geometric_mean(found) for name, found in sorted(movements_of.items()) if name != provider}
    all_peers = [movement for name, found in movements_of.items() if name != provider for movement in found]
    by_peers = geometric_mean(all_peers) if all_peers else 1.0

    movements, lost = [], []
    for problem in common:
        measure, point = problem
        was, is_ = before[problem].get(provider), after[problem].get(provider)
        if was is not None and is_ is None:
            lost.append(point.label())
        elif was is not None:
            noise = max(2 * math.hypot(*(median_error(run["samples_ms"]) for run in (was, is_))), NOISE_FLOOR)
            movements.append(Movement(measure, point, was["median_ms"], is_["median_ms"], noise, by_peers))
    return Comparison(provider, movements, peers, lost, len(before.keys() ^ after.keys()))


def run(old_path, new_path, provider):
    """Prints the comparison; returns the exit code: 1 where a point slid or was lost, else 0."""
    old, new = results.read(old_path), results.read(new_path)
    comparison = compare(old, new, provider)
    for name, path, data in (("OLD", old_path, old), ("NEW", new_path, new)):
        commit = (data["source"].get("commit") or "unknown commit")[:12] + (" (dirty)" if data["source"].get("dirty") else "")
        print(f"{name}  {path}: {data['date']}, {data['machine']['gpu']}, {commit}" + ("" if data["complete"] else ", INCOMPLETE"))
    report(comparison)
    return comparison.exit_code


def report(comparison):
    movements, provider = comparison.movements, comparison.provider
    if comparison.peers:
        each = ", ".join(f"{name} {movement - 1:+.1%}" for name, movement in comparison.peers.items())
        print(f"the peers moved ({each}); normalised is {provider}'s movement with theirs taken out")
    else:
        print("no peer is in both runs: raw movements are judged, and another machine or day moves those too")
    if comparison.unmatched:
        print(f"{comparison.unmatched} points are in one of the runs only and aren't compared")

    sections = (
        (f"SLID by more than {SLIDE:.0%}, beyond noise", [m for m in movements if m.slid]),
        ("moved beyond noise", [m for m in movements if m.moved and not m.slid]),
        (f"slower by more than {SLIDE:.0%}, but within noise: measure again", [m for m in movements if m.below_mark and not m.moved]),
    )
    for title, chosen in sections:
        if chosen:
            print(f"\n{title}\n{HEADER}")
            for movement in sorted(chosen, key=lambda movement: movement.normalised):
                print(movement.line())
    for label in comparison.lost:
        print(f"\nLOST {label}: OLD has a number of {provider}, NEW tried the point and has none")

    slid = sum(movement.slid for movement in movements)
    verdict = f"{slid} slid, {len(comparison.lost)} lost" if comparison.exit_code else "nothing slid"
    if comparison.slid_together:
        verdict += f", all together slid by more than {SLIDE:.0%}"
    if movements:
        raw = geometric_mean(movement.raw for movement in movements)
        normalised = geometric_mean(movement.normalised for movement in movements)
        verdict += f"; geometric mean raw {raw - 1:+.1%}, normalised {normalised - 1:+.1%}"
    print(f"\n{provider}: {len(movements)} points compared, {verdict}")
