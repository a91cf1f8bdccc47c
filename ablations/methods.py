"""
GRPO, PPO and DPO at equal KL, in the toy world, paid by its true scores.

The same beta is three things in the three, so each is trained at four betas and looked at eight
times on the way. A look is a point: the KL of a response to the reference, exactly, and the mean
true score. Who answers with one policy in some cases and with another in the rest reaches all that
lies between their points (KL is convex: it can only be less). So what a method is worth at a KL of
x nats is the highest that the lines between its points, of all betas, come at x or before. That is
a little less than what a beta made for x would give.

Differences to GRPO, their intervals and marks are those of league_table.py: paired by world and
run seed, a bootstrap over worlds.

`points` is GRPO that does not divide by the group's std, as Dr. GRPO (2503.20783): its std_floor is
1, above almost all of them. PPO has gae_lambda = 1 and a critic that learns alone in the first ten
steps, which are extra. Not tuned, in any of them: lr, clipping, the size of a group. DPO's betas
are on its own scale.

    python -m ablations.methods        # plays what is missing, [hours]; then prints the table

Seconds are medians of a step's update over all runs, of which `jobs` run side by side in turns of
the methods: look at their ratios.
"""
from collections import defaultdict
from dataclasses import dataclass
from itertools import product
from statistics import fmean, median

import mogrpo
from ablations import dpo, ppo
from ablations.league_table import GAIN, difference, finished
from ablations.play import judge, play_all
from mogrpo import require, say

@dataclass
class Config:
    out_dir: str = "out/methods"  # worlds and results
    steps: int = 80               # of a run; PPO has its critic's first ones beside
    world_seeds: int = 3          # worlds, of seeds 0, 1, ...
    run_seeds: int = 2            # runs of each method at each beta in each world
    jobs: int = 2                 # runs at a time, each on one core

    def __post_init__(self):
        require(self.steps > 0 and self.steps % LOOKS == 0, f"--steps={self.steps}: must be a "
                f"multiple of {LOOKS}")

# They end at some 5, 4, 3 and 2 nats
BETAS = dict(grpo=(0.16, 0.32, 0.45, 0.64), points=(0.06, 0.12, 0.18, 0.26),
             ppo=(0.04, 0.16, 0.32, 0.64), dpo=(0.64, 2.5, 10.0, 40.0))
LOOKS = 8                         # of a run
KLS = (1, 2, 3, 4, 5)             # nats of a response
CRITIC_ALONE = 10                 # steps

def games(cfg):
    listed = []
    rounds = product(range(cfg.run_seeds), range(cfg.world_seeds), zip(*BETAS.values()))
    for seed, world, betas in rounds:
        for method, beta in zip(BETAS, betas):
            listed.append(dict(world=world, seed=seed, method=method, beta=beta))
    return listed

def play(cfg, game, out_dir):
    """A run -> its points and the median seconds of an update; None if it was stopped."""
    world = f"{cfg.out_dir}/world{game['world']}"
    is_ppo = game["method"] == "ppo"
    alone = CRITIC_ALONE if is_ppo else 0
    flags = dict(policy=f"{world}/policy", reward_model="", rules=ppo.TOY["truth"],
                 prompts=f"{world}/prompts.jsonl", heldout_prompts=f"{world}/heldout_prompts.jsonl",
                 beta=game["beta"], seed=game["seed"], steps=cfg.steps + alone,
                 critic_warmup=alone, out_dir=out_dir)
    if game["method"] == "points":
        flags["std_floor"] = 1.0
    run = mogrpo.setup(ppo.Config(**ppo.TOY | flags))
    if is_ppo:
        ppo.add_critic(run)
    if game["method"] == "dpo":
        run.update = dpo.dpo_update
    points = [judge(run)]
    seconds = []

    def watched_step(run, step):
        metrics = mogrpo.grpo_step(run, step)
        seconds.append(metrics["sec/train"])
        if step > alone and (step - alone) % (cfg.steps // LOOKS) == 0:
            points.append(judge(run))
        return metrics

    mogrpo.train(run, watched_step)
    if run.state["step"] < run.cfg.steps:
        return None
    return dict(points=points, seconds=median(seconds))

def worth(points, most):
    """The highest mean that a mixture of two of the points has at a KL of at most `most`."""
    within = [point for point in points if point["kl"] <= most]
    best = max(point["mean"] for point in within)  # the start's KL is 0
    for start, end in product(within, points):
        if end["kl"] > most:
            part = (most - start["kl"]) / (end["kl"] - start["kl"])
            best = max(best, start["mean"] + part * (end["mean"] - start["mean"]))
    return best

def worths(results, method, most):
    """-> {(world, seed): (worth of the points of all betas, KL)}, for `difference`."""
    points_of = defaultdict(list)
    for run in results:
        if run["method"] == method:
            points_of[run["world"], run["seed"]] += run["points"]
    return {pair: (worth(points, most), most) for pair, points in points_of.items()}

def main(cfg):
    play_all(play, cfg, games(cfg))
    results = finished(cfg)
    kls = " | ".join(f"KL {most}" for most in KLS)
    say(f"\n{len(results)} runs\n\n| | {kls} | an update, s |\n" + "|---" * (2 + len(KLS)) + "|")
    for method in BETAS:
        cells = []
        for most in KLS:
            own, base = (worths(results, name, most) for name in (method, "grpo"))
            cell = f"{fmean(mean for mean, _ in own.values()):.3f}"
            if method != "grpo":
                cell += " " + GAIN.format(*difference(own, base))
            cells.append(cell)
        seconds = median(run["seconds"] for run in results if run["method"] == method)
        say(f"| {method} | {' | '.join(cells)} | {seconds:.3f} |")


if __name__ == "__main__":
    mogrpo.launch(main, Config, __doc__)
