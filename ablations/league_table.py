"""
The table of league.py: each rule on each twist, and its differences to `sum`.

A world (data.toy.prepare --seed) is the unit of the statistics, since rankings differ more between
worlds than between runs in one: differences are paired by world and run seed, averaged in each
world, and their 95 % intervals are eval.py's, a bootstrap over worlds, widened for few.

    *     shown: there are three worlds at least, the interval excludes 0, the sign is the same in
          all of them, and the two mean KLs are within a factor of 1.5
    kl    the same at another KL: nobody knows which rule would be better at the same one
          not shown: anything else

With three worlds that is little: where there is no difference the three signs agree one time in
four, and a bootstrap of three numbers is about their range. Of 72 differences a few have their star
by chance.

    python -m ablations.league_table                                     # of what is finished
    python -m ablations.league_table --picture=assets/league.png         # wants matplotlib
"""
import glob
import json
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from math import nan
from statistics import fmean

import torch

import mogrpo
from ablations.league_rules import RULES, TWISTS
from eval import interval
from mogrpo import require, say

@dataclass
class Config:
    out_dir: str = "out/league"   # worlds and results
    steps: int = 40               # of a run: half of the toy's are enough to tell rules apart
    picture: str = ""             # PNG to draw the table to

# --------------------------------------------------------------------------------------------------
# 1. Differences

def finished(cfg):
    """What `judge` of league.py found, run after run, beside what was played."""
    paths = sorted(glob.glob(f"{cfg.out_dir}/{cfg.steps}steps/*.json"))
    require(paths, f"{cfg.out_dir}: no run of {cfg.steps} steps is finished")
    return [json.load(open(path, encoding="utf-8")) for path in paths]

def values(results, rule, twist, measure):
    """Of each run of a rule on a twist -> {(world, seed): (measure, KL)}."""
    wanted = dict(rule=rule, twist=twist, weights="").items()
    return {(run["world"], run["seed"]): (run[measure], run["kl"])
            for run in results if run.items() >= wanted}

def difference(own, base):
    """Of two such dicts -> mean difference of the measure, its interval, and a mark."""
    gains_of = defaultdict(list)
    own_kls = []
    base_kls = []
    for world, seed in own.keys() & base.keys():
        own_score, own_kl = own[world, seed]
        base_score, base_kl = base[world, seed]
        gains_of[world].append(own_score - base_score)
        own_kls.append(own_kl)
        base_kls.append(base_kl)
    gains = [fmean(gains) for gains in gains_of.values()]
    mean, low, high = interval(torch.tensor(gains))
    mark = ""
    if len(gains) >= 3 and low * high > 0 and min(gains) * max(gains) > 0:
        ratio = fmean(own_kls) / fmean(base_kls)
        mark = "*" if 1 / 1.5 < ratio < 1.5 else "kl"
    return mean, low, high, mark

def compare(results, measure, rule, twist):
    """A rule against `sum` on a twist."""
    own, base = (values(results, name, twist, measure) for name in (rule, "sum"))
    return difference(own, base)

# --------------------------------------------------------------------------------------------------
# 2. Tables, as markdown

GAIN = "{:+.2f} [{:+.2f}, {:+.2f}]{}"  # of `difference`

def gain(results, measure, rule, twist):
    return GAIN.format(*compare(results, measure, rule, twist))

def average(results, measure, rule, twist):
    scores = [score for score, _ in values(results, rule, twist, measure).values()]
    return fmean(scores) if scores else nan

def means(results, rule, twist):
    mean, worst, kl = (average(results, name, rule, twist) for name in ("mean", "worst", "kl"))
    return f"{mean:.2f} / {worst:.2f} / {kl:.1f}"

def table(results, title, cell, rules):
    """A row for each rule, a column for each twist; empty where a run has yet to come."""
    say(f"\n{title}\n\n| | {' | '.join(TWISTS)} |\n" + "|---" * (1 + len(TWISTS)) + "|")
    for rule in rules:
        cells = []
        for twist in TWISTS:
            own, base = (values(results, name, twist, "kl") for name in (rule, "sum"))
            cells.append(cell(rule, twist) if own.keys() & base.keys() else "")
        say(f"| {rule} | {' | '.join(cells)} |")

def main(cfg):
    results = finished(cfg)
    say(f"{len(results)} runs")
    title = "mean of the true axes / worst of them / KL a response"
    table(results, title, partial(means, results), RULES)
    table(results, "mean, less that of sum", partial(gain, results, "mean"), RULES[1:])
    table(results, "worst, less that of sum", partial(gain, results, "worst"), RULES[1:])
    if cfg.picture:
        from assets import pictures
        pictures.league(cfg.picture, RULES, TWISTS, partial(average, results),
                        partial(compare, results))


if __name__ == "__main__":
    mogrpo.launch(main, Config, __doc__)
