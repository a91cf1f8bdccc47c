"""
The table of league.py: each rule on each twist, and its differences to `sum`.

A world (data.toy.prepare --seed) is the unit of the statistics, since rankings differ more between
worlds than between runs in one: differences are paired by world and run seed, averaged in each
world, and their 95 % intervals are eval.py's, a bootstrap over worlds, widened for few.

    *     shown: the interval excludes 0, the sign is the same in all worlds, and the two mean KLs
          are within a factor of 1.5
    kl    the same at another KL: nobody knows which rule would be better at the same one
          not shown: anything else

With three worlds that is little: where there is no difference the three signs agree one time in
four, and a bootstrap of three numbers is about their range. Of 72 differences a few have their star
by chance.

The front: a rule's policies at eight weightings of the axes, in one number: the volume of all
scores in [0, 1]^4 that one of these policies reaches or exceeds on every true axis.

    python -m ablations.league_table                                     # of what is finished
    python -m ablations.league_table --picture=assets/league.png         # wants matplotlib
"""
import glob
import json
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from math import prod
from statistics import fmean

import torch

import mogrpo
from ablations.league_rules import TWISTS
from eval import interval
from mogrpo import require, say

@dataclass
class Config:
    out_dir: str = "out/league"   # worlds and results
    steps: int = 40               # of a run: half of the toy's are enough to tell rules apart
    picture: str = ""             # PNG to draw the table to

RULES = "sum gdpo worst geometric corr gate lagrangian".split()
FRONT = "sum gdpo lagrangian".split()
WEIGHTINGS = [
    "", "politeness=4", "meaningfulness=4", "actionability=4", "safety=4", "actionability=8",
    "meaningfulness=4,actionability=4", "politeness=4,safety=4",
]

# --------------------------------------------------------------------------------------------------
# 1. Differences. A run is known by its pair (world, seed)

def values(results, rule, twist, measure):
    """A number of each run of a rule on a twist -> {(world, seed): number}."""
    wanted = dict(rule=rule, twist=twist, weights="").items()
    return {(run["world"], run["seed"]): run[measure] for run in results if run.items() >= wanted}

def difference(own, base, own_kls, base_kls):
    """Of the runs that both have -> mean difference, its interval, and a mark."""
    pairs = sorted(own.keys() & base.keys())
    by_world = {}
    for world, seed in pairs:
        gain = own[world, seed] - base[world, seed]
        by_world.setdefault(world, []).append(gain)
    gains = [fmean(of_world) for of_world in by_world.values()]
    mean, low, high = interval(torch.tensor(gains))
    mark = ""
    if low * high > 0 and min(gains) * max(gains) > 0:  # never for nan, of a single world
        ratio = fmean(own_kls[pair] for pair in pairs) / fmean(base_kls[pair] for pair in pairs)
        mark = "*" if 1 / 1.5 < ratio < 1.5 else "kl"
    return mean, low, high, mark

def compare(results, rule, twist, measure):
    """A rule against `sum` on a twist; None before both have a run there."""
    own, base = (values(results, name, twist, measure) for name in (rule, "sum"))
    own_kls, base_kls = (values(results, name, twist, "kl") for name in (rule, "sum"))
    if own.keys() & base.keys():
        return difference(own, base, own_kls, base_kls)

# --------------------------------------------------------------------------------------------------
# 2. The front

def hypervolume(points):
    """Volume of all that some point is at least as good as on every axis, from 0 on: a union of
    boxes, by inclusion and exclusion."""
    volume = 0.0
    for n in range(1, len(points) + 1):
        for some in combinations(points, n):
            volume -= (-1)**n * prod(map(min, zip(*some)))
    return volume

def front(results, rule):
    """Of a rule's runs at all weightings -> {(world, seed): hypervolume}, {...: mean KL}."""
    runs = {}
    for run in results:
        if run["rule"] == rule and run["twist"] == "plain":
            runs.setdefault((run["world"], run["seed"]), []).append(run)
    volumes = {}
    kls = {}
    for pair, some in runs.items():
        if len(some) == len(WEIGHTINGS):
            volumes[pair] = hypervolume([run["true"].values() for run in some])
            kls[pair] = fmean(run["kl"] for run in some)
    return volumes, kls

# --------------------------------------------------------------------------------------------------
# 3. Tables, as markdown

def means(results, rule, twist):
    columns = [values(results, rule, twist, name).values() for name in ("mean", "worst", "kl")]
    return "{:.2f} / {:.2f} / {:.1f}".format(*map(fmean, columns)) if columns[0] else ""

def gain(results, measure, rule, twist):
    found = compare(results, rule, twist, measure)
    return told(*found) if found and rule != "sum" else ""

def told(mean, low, high, mark):
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]{mark}"

def table(title, cell):
    """A row for each rule, a column for each twist."""
    say(f"\n{title}\n\n| | {' | '.join(TWISTS)} |\n" + "|---" * (1 + len(TWISTS)) + "|")
    for rule in RULES:
        say(f"| {rule} | " + " | ".join(cell(rule, twist) for twist in TWISTS) + " |")

def front_table(results):
    say("\n| front | hypervolume | KL a response | less that of sum |\n|---|---|---|---|")
    base, base_kls = front(results, "sum")
    for rule in FRONT:
        volumes, kls = front(results, rule)
        if volumes.keys() & base.keys():
            found = difference(volumes, base, kls, base_kls)
            say(f"| {rule} | {fmean(volumes.values()):.3f} | {fmean(kls.values()):.1f} | "
                f"{told(*found)} |")

def main(cfg):
    results = []
    for path in sorted(glob.glob(f"{cfg.out_dir}/{cfg.steps}steps/*.json")):
        results.append(json.load(open(path)))
    require(results, f"{cfg.out_dir}: no run of {cfg.steps} steps is finished")
    say(f"{len(results)} runs")
    table("mean of the true axes / worst of them / KL a response", partial(means, results))
    table("mean, less that of sum", partial(gain, results, "mean"))
    table("worst, less that of sum", partial(gain, results, "worst"))
    front_table(results)
    if cfg.picture:
        from assets import pictures
        pictures.league(cfg.picture, results)


if __name__ == "__main__":
    mogrpo.launch(main, Config, __doc__)
