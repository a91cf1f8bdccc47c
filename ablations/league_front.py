"""
The front of league.py: what a rule reaches as the axes' weights change.

Each of three rules trains eight policies of the plain toy world, one for each weighting below. In
one number: the volume of all scores in [0, 1]^4 that one of the eight reaches or exceeds on every
true axis. A rule whose policies all end alike has a small one; so has a rule that never ends high.

    python -m ablations.league_front        # plays what is missing, then prints the table
    python -m ablations.league_front --picture=assets/front.png     # and draws; wants matplotlib

Differences to `sum`, their intervals and marks are those of league_table.py; one run seed.
"""
from collections import defaultdict
from itertools import combinations, product
from math import prod
from statistics import fmean

import mogrpo
from ablations.league import Config, play
from ablations.league_table import GAIN, difference, finished
from ablations.play import play_all
from mogrpo import say

RULES = ("sum", "gdpo", "lagrangian")
WEIGHTINGS = [
    "",  # all weigh 1: a run of the league
    "politeness=4",
    "meaningfulness=4",
    "actionability=4",
    "safety=4",
    "actionability=8",
    "meaningfulness=4,actionability=4",
    "politeness=4,safety=4",
]

def games(cfg):
    listed = []
    for world, weights, rule in product(range(cfg.world_seeds), WEIGHTINGS, RULES):
        listed.append(dict(world=world, seed=0, twist="plain", rule=rule, weights=weights))
    return listed

def hypervolume(points):
    """Volume of all that some point is at least as good as on every axis, from 0 on: a union of
    boxes, by inclusion and exclusion."""
    volume = 0.0
    for n in range(1, len(points) + 1):
        for some in combinations(points, n):
            volume -= (-1)**n * prod(map(min, zip(*some)))
    return volume

def front(results, rule):
    """Of a rule's runs at all weightings -> {(world, seed): (hypervolume, mean KL)}."""
    runs_of = defaultdict(list)
    for run in results:
        if run["rule"] == rule and run["twist"] == "plain":
            runs_of[run["world"], run["seed"]].append(run)
    found = {}
    for pair, runs in runs_of.items():
        if len(runs) == len(WEIGHTINGS):
            volume = hypervolume([run["true"].values() for run in runs])
            found[pair] = volume, fmean(run["kl"] for run in runs)
    return found

def mean_points(results, rule):
    """Of each weighting, the rule's mean true scores over worlds."""
    points = []
    for weights in WEIGHTINGS:
        wanted = dict(rule=rule, twist="plain", weights=weights, seed=0).items()
        runs = [run["true"] for run in results if run.items() >= wanted]
        points.append({axis: fmean(run[axis] for run in runs) for axis in runs[0]})
    return points

def main(cfg):
    play_all(play, cfg, games(cfg))
    results = finished(cfg)
    base = front(results, "sum")
    say("\n| | hypervolume | KL a response | less that of sum |\n|---|---|---|---|")
    for rule in RULES:
        own = front(results, rule)
        volume, kl = map(fmean, zip(*own.values()))
        say(f"| {rule} | {volume:.3f} | {kl:.1f} | {GAIN.format(*difference(own, base))} |")
    if cfg.picture:
        from assets import pictures
        pictures.front(cfg.picture, {rule: mean_points(results, rule) for rule in RULES})


if __name__ == "__main__":
    mogrpo.launch(main, Config, __doc__)
