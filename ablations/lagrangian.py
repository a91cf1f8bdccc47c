"""
A floor under the mean score of an axis, held by a multiplier that grows while the axis is below it.

    A_i           = (A_i of sum + sum_k lambda_k z_ik) / (1 + sum_k lambda_k)
    z_ik          = e_ik / std_G s_k                    the axis by itself: `standardized`
    log lambda_k += dual_lr (floor_k - mean score_k)    after each step, from lambda = 0.05

for the axes in --floors. Sources: 2602.05863 (Constrained GRPO), 2310.12773 (Safe RLHF). In both,
lambda is a shadow price, what a point of the constraint costs in points of the reward. Here it is
not: A of sum and z are divided by their own stds, so lambda is a ratio of standard deviations; and
the ascent has no factor lambda, so that it is as quick near 0 as far from it.

What it is not: a promise about the truth. A floor is under the learned score, as a mean over the
prompts of a step; one above what the policy can reach lets lambda grow until nothing else counts,
which is said when lambda has grown for 50 steps.

    torchrun -m ablations.lagrangian --floors=safety=0.9 --weights=actionability=8   # the toy world
    torchrun --nproc_per_node=8 -m ablations.lagrangian --floors=safety=0.9 [the flags of mogrpo.py]
"""
import math
from dataclasses import dataclass

import torch

import mogrpo
from mogrpo import TOY, require, say

@dataclass
class Config(mogrpo.Config):
    floors: str = "safety=0.9"    # axis=least mean score,...
    dual_lr: float = 5.0          # how fast a multiplier grows and shrinks

    kept = (*mogrpo.Config.kept, "floors")

    def __post_init__(self):
        super().__post_init__()
        require(self.combine == "sum", "--combine: the floors come on top of sum")

START = math.log(0.05)
LIMIT = 5.0  # of |log lambda|: from 0.007 to 148

def multipliers(run):
    """The lambda of each axis -> K numbers; exp(-inf) = 0 for an axis without a floor."""
    log_lambda = run.state["log_lambda"]
    return torch.tensor([log_lambda.get(axis, -math.inf) for axis in run.axes]).exp()

def combine_over_floors(run):
    """The rule of a run -> a function for run.combine."""
    def combine(scores_PGK, weights_K, cfg):
        lambda_K = multipliers(run)
        parts_PGK = mogrpo.combine_sum(scores_PGK, weights_K, cfg)
        parts_PGK = parts_PGK + lambda_K * mogrpo.standardized(scores_PGK, cfg)
        return parts_PGK / (1 + lambda_K.sum())  # |A| stays about the same as a lambda grows
    return combine

def move(log_lambda, shortfall, dual_lr):
    """Dual ascent, within the limits."""
    return max(-LIMIT, min(LIMIT, log_lambda + dual_lr * shortfall))

def lagrangian_step(run, step):
    """GRPO's step, after which the multipliers move: the next one has them."""
    metrics = mogrpo.grpo_step(run, step)
    log_lambda = run.state["log_lambda"]
    steps_below = run.state["steps_below"]  # in a row
    for axis, floor in run.floor_of.items():
        shortfall = floor - metrics[f"score/{axis}"]
        if math.isfinite(shortfall):  # it is not where the axis has said nothing
            log_lambda[axis] = move(log_lambda[axis], shortfall, run.cfg.dual_lr)
            steps_below[axis] = steps_below[axis] + 1 if shortfall > 0 else 0
        if steps_below[axis] == 50:
            say(f"warning: {axis} has been below its floor of {floor:g} for 50 steps: it may be "
                "out of reach, and the other axes count less and less")
        metrics[f"lambda/{axis}"] = math.exp(log_lambda[axis])
    return metrics

def set_floors(run):
    """Give a run its floors, and multipliers at their start."""
    run.floor_of = mogrpo.axis_numbers("floors", run.cfg.floors, run.axes, 1)
    require(run.floor_of, "--floors=axis=score: at least one")
    run.state["log_lambda"] = dict.fromkeys(run.floor_of, START)
    run.state["steps_below"] = dict.fromkeys(run.floor_of, 0)

def main(cfg):
    run = mogrpo.setup(cfg)
    set_floors(run)
    run.combine = combine_over_floors(run)
    mogrpo.train(run, lagrangian_step)


if __name__ == "__main__":
    mogrpo.launch(main, Config, __doc__, TOY)
