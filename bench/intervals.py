"""
Do eval.py's 95 % intervals cover the truth? In many trials made-up policies, whose true difference
is known, are compared by eval.py's own function.

    python -m bench.intervals                          # a minute
    python -m bench.intervals --cluster=4              # prompts that are variants of one
    python -m bench.intervals --difference=3           # nearly all wins

A prompt q is more or less hard: h_q ~ N(0, 1), half of its variance from its cluster of --cluster
prompts. A policy's answer to it scores sigmoid(h_q + d + e), e ~ N(0, 1), where d is 0 for the
baseline and --difference for the other one: bounded, skewed, and alike in both policies, as real
scores are. Ties come from rounding to one digit. And a rare thing, a refusal say, happens where
another draw of that kind is above 2. The truth is the mean of 300,000 prompts. Printed is how
often the interval of the mean, of the gain, of the wins and of the rare share holds it: 95 % is
promised.
"""
from collections import Counter
from dataclasses import dataclass

import torch
from tqdm import tqdm

import eval as evaluation
from mogrpo import launch, require, say

@dataclass
class Config:
    prompts: str = "20,80,320"  # numbers of prompts, each tried by itself
    cluster: int = 1            # prompts of a cluster
    trials: int = 1000          # experiments for each
    samples: int = 4            # answers to a prompt
    difference: float = 0.5     # of the policies, before the sigmoid; at 3 nearly all are wins
    seed: int = 0               # of everything drawn

def hardness(P, cfg):
    """h of P prompts, and which cluster each is of -> h_P1, cluster_P."""
    cluster_P = torch.arange(P) // cfg.cluster
    own_P = torch.randn(P, dtype=torch.float64)
    shared_C = torch.randn(P, dtype=torch.float64)  # more than there are clusters
    return ((own_P + shared_C[cluster_P]) / 2**0.5)[:, None], cluster_P

def draw(P, cfg):
    """One experiment -> scores x_PS of the other policy, base_PS, cluster_P, rare_P."""
    hard_P1, cluster_P = hardness(P, cfg)
    noise_PS = torch.randn(P, cfg.samples, dtype=torch.float64)
    base_noise_PS = torch.randn(P, cfg.samples, dtype=torch.float64)
    x_PS = (hard_P1 + cfg.difference + noise_PS).sigmoid()
    base_PS = (hard_P1 + base_noise_PS).sigmoid()
    rare_P = (hardness(P, cfg)[0] > 2).double().squeeze(1)
    return x_PS.mul(10).round() / 10, base_PS.mul(10).round() / 10, cluster_P, rare_P

def measured(P, cfg):
    """The intervals of one experiment."""
    x_PS, base_PS, cluster_P, rare_P = draw(P, cfg)
    found = evaluation.compare(x_PS, base_PS, cluster_P)
    return found | dict(rare=evaluation.share_interval(rare_P, cluster_P))

def main(cfg):
    torch.manual_seed(cfg.seed)
    counts = cfg.prompts.split(",")
    require(all(P.isdigit() and int(P) > 1 for P in counts), f"--prompts={cfg.prompts}: expected "
            "numbers above 1")
    truth = Counter()
    for _ in range(300):
        for name, (value, _, _) in measured(1000, cfg).items():
            truth[name] += value / 300
    say("truth: " + ", ".join(f"{name} {value:.3f}" for name, value in truth.items()))
    say(f"{'prompts':>8}" + "".join(f"{name:>9}" for name in truth) + "   intervals that cover it")
    for P in map(int, counts):
        covered = dict.fromkeys(truth, 0)
        for _ in tqdm(range(cfg.trials), f"{P} prompts", disable=None, leave=False):
            for name, (_, low, high) in measured(P, cfg).items():
                covered[name] += low <= truth[name] <= high
        shares = [f"{count / cfg.trials:>9.1%}" for count in covered.values()]
        say(f"{P:>8}" + "".join(shares))


if __name__ == "__main__":
    launch(main, Config, __doc__)
