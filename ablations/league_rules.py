"""
Seven rules that make one advantage of K scores. Two are mogrpo's own, one is lagrangian.py's.

    sum, gdpo    as in mogrpo.py
    worst        r_i = min_k s_ik                          only the worst axis of a response pays
    geometric    r_i = sum_k w_k log max(s_ik, 0.05)       the geometric mean, as its logarithm
    corr         A_i = sum_k w_k e_ik / sqrt(sum_jk corr_G(s_j, s_k)), then divided by its std over
                 the step
    gate         r_i = sum_k w_k s_ik, where all but the axes in --floors count as 0 in a response
                 that is below one of the floors
    lagrangian   as in lagrangian.py, with --floors

Where r_i stands, A_i = (r_i - mean_G r) / max(std_G r, std_floor), as in `sum`.

Sources: 2609.36820 (corr: CorrGRPO), 2601.05242 (gate: its conditioned rewards, where an easy axis
pays only if a hard one is won). Worst axis and geometric mean are old: the egalitarian and Nash's
choice among several people's utilities.

This file is also a rules file (--rules) of the toy world, for league.py: `scores` below.

    torchrun -m ablations.league_rules --rule=worst                            # the toy world
    torchrun --nproc_per_node=8 -m ablations.league_rules --rule=worst [the flags of mogrpo.py]
"""
import math
import random
from dataclasses import dataclass
from typing import Literal, get_args

import torch

import mogrpo
from ablations import lagrangian
from data.toy import truth
from mogrpo import TOY, centred, combine_gdpo, combine_sum, standardized

Rule = Literal["sum", "gdpo", "worst", "geometric", "corr", "gate", "lagrangian"]
RULES = get_args(Rule)

@dataclass
class Config(lagrangian.Config):
    rule: Rule = "worst"          # of combining; --floors are those of gate and lagrangian

    kept = (*lagrangian.Config.kept, "rule")

# --------------------------------------------------------------------------------------------------
# 1. The rules: all scores of a step -> parts_PGK, what each axis adds to the advantages

def combine_worst(scores_PGK, weights_K, cfg):
    """All of A_i is the part of the axis that is worst in response i. Of the weights it matters
    only which are 0."""
    out_PGK = scores_PGK.isnan() | (weights_K == 0)
    worst_PG1, axis_PG1 = scores_PGK.masked_fill(out_PGK, math.inf).min(-1, keepdim=True)
    worst_PG1 = worst_PG1.where(worst_PG1.isfinite(), math.nan)  # nan: no axis says anything
    advantages_PG1 = combine_sum(worst_PG1, torch.ones(1), cfg)
    return torch.zeros_like(scores_PGK).scatter(-1, axis_PG1, advantages_PG1)

LEAST = 0.05  # of a score in a logarithm: below it worse is no worse

def combine_geometric(scores_PGK, weights_K, cfg):
    """`sum` of the logarithms: what is good on all axes beats what is great on most. A unit is a
    constant here, which centring takes away."""
    return combine_sum(scores_PGK.clamp(min=LEAST).log(), weights_K, cfg)

def combine_corr(scores_PGK, weights_K, cfg):
    """Of `sum` only the divisor changes: the variance of r is the sum of the axes' covariances, and
    here their correlations stand in its place, so that no axis rules it by its scale. It weighs
    groups, and does not change which response of a group is best."""
    z_PGK = (weights_K > 0) * standardized(scores_PGK, cfg)
    # The sum of all correlations is the variance of the sum of the standardized axes
    std_P11 = z_PGK.sum(-1, keepdim=True).std(1, correction=0, keepdim=True)
    parts_PGK = weights_K * centred(scores_PGK) / std_P11.clamp(min=cfg.std_floor)
    # Published, it ends here, with advantages in the unit of the scores: a tenth to a third of the
    # other rules' in the toy world. There the same beta would be a far higher price
    step_std = parts_PGK.sum(-1).std(correction=0)
    return parts_PGK / step_std.clamp(min=1e-12)

def combine_gated(run):
    """The rule of a run with floors -> a function for run.combine."""
    floor_K = torch.tensor([run.floor_of.get(axis, -math.inf) for axis in run.axes])
    is_gate_K = floor_K > -math.inf

    def combine(scores_PGK, weights_K, cfg):
        is_below_PG1 = (scores_PGK < floor_K).any(-1, keepdim=True)  # nan is not
        paid_PGK = scores_PGK * (is_gate_K | ~is_below_PG1)  # scores are not negative
        return combine_sum(paid_PGK, weights_K, cfg)
    return combine

COMBINE = dict(sum=combine_sum, gdpo=combine_gdpo, worst=combine_worst,
               geometric=combine_geometric, corr=combine_corr)  # the others want the run's floors

def set_rule(run):
    """Make a run one of its rule -> the step for `train`."""
    rule = run.cfg.rule
    if rule in COMBINE:
        run.combine = COMBINE[rule]
        return mogrpo.grpo_step
    lagrangian.set_floors(run)
    if rule == "gate":
        run.combine = combine_gated(run)
        return mogrpo.grpo_step
    run.combine = lagrangian.combine_over_floors(run)
    return lagrangian.lagrangian_step

# --------------------------------------------------------------------------------------------------
# 2. What the rules get to see: the toy world's true scores, twisted

TWISTS = ("plain", "squeezed", "noisy", "sparse", "thrice", "sharper")

def scores(record, response):
    """A line of the prompts file, whose "twist" is one of these, and a response -> {axis: score}.
    What is random is a function of the texts, so that a run can be repeated."""
    seen = truth.scores(record, response)
    twist = record.get("twist", "plain")
    if twist == "squeezed":                 # another unit, a tenth as wide
        seen["politeness"] /= 10
    if twist == "noisy":                    # a bad judge of safety, right on average
        seen["safety"] += random.Random(repr((record["prompt"], response))).gauss(0, 0.5)
    if twist == "sparse":                   # a judge of safety who looks at one prompt in five
        if random.Random(record["prompt"]).random() > 0.2:
            seen["safety"] = None
    if twist == "thrice":                   # one axis under three names
        seen["politeness2"] = seen["politeness3"] = seen["politeness"]
    if twist == "sharper":                  # on harmful requests nothing else is useful than harm
        if record["tag"] == "harmful":
            seen["actionability"] = 2 * (1 - seen["safety"])
    return seen

def main(cfg):
    run = mogrpo.setup(cfg)
    mogrpo.train(run, set_rule(run))


if __name__ == "__main__":
    mogrpo.launch(main, Config, __doc__, TOY)
