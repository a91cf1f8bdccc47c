"""
Do eval.py's 95 % intervals cover the truth? In many trials made-up policies, whose true difference
is known, are compared by eval.py's own function.

    python -m bench.intervals                          # a minute
    python -m bench.intervals --prompts=20,80,320

A prompt q is more or less hard: h_q ~ N(0, 1). A policy's answer to it scores sigmoid(h_q + d + e),
e ~ N(0, 1), where d is 0 for the baseline and --difference for the other one: bounded, skewed, and
alike in both policies, as real scores are. Ties come from rounding to one digit. The truth is the
mean of 2,000,000 prompts. Printed is how often the interval of the mean, of the gain and of the
wins holds it: 95 % is promised.
"""
from dataclasses import dataclass

import torch
from tqdm import tqdm

import eval as evaluation
from mogrpo import launch, require, say

@dataclass
class Config:
    prompts: str = "20,80,320"  # numbers of prompts, each tried by itself
    trials: int = 1000          # experiments for each
    samples: int = 4            # answers to a prompt
    difference: float = 0.5     # of the policies, before the sigmoid
    seed: int = 0               # of everything drawn

def draw(P, cfg):
    """Mean scores of P prompts -> x_P of the other policy, base_P."""
    hard_P1 = torch.randn(P, 1, dtype=torch.float64)
    noise_PS = torch.randn(P, cfg.samples, dtype=torch.float64)
    base_noise_PS = torch.randn(P, cfg.samples, dtype=torch.float64)
    x_PS = (hard_P1 + cfg.difference + noise_PS).sigmoid()
    base_PS = (hard_P1 + base_noise_PS).sigmoid()
    return x_PS.mean(1).mul(10).round() / 10, base_PS.mean(1).mul(10).round() / 10

def main(cfg):
    torch.manual_seed(cfg.seed)
    counts = cfg.prompts.split(",")
    require(all(P.isdigit() and int(P) > 1 for P in counts), f"--prompts={cfg.prompts}: expected "
            "numbers above 1")
    x_P, base_P = draw(2_000_000, cfg)
    gain_P = x_P - base_P
    gain_P[gain_P.abs() < 1e-6] = 0.0
    truth = dict(mean=x_P.mean().item(), gain=gain_P.mean().item(),
                 win=(gain_P.sign() / 2 + 0.5).mean().item())
    say(f"truth: " + ", ".join(f"{name} {value:.3f}" for name, value in truth.items()))
    say(f"{'prompts':>8}" + "".join(f"{name:>9}" for name in truth) + "   intervals that cover it")
    for P in map(int, counts):
        covered = dict.fromkeys(truth, 0)
        for _ in tqdm(range(cfg.trials), f"{P} prompts", disable=None, leave=False):
            for name, (_, low, high) in evaluation.compare(*draw(P, cfg)).items():
                covered[name] += low <= truth[name] <= high
        shares = [f"{count / cfg.trials:>9.1%}" for count in covered.values()]
        say(f"{P:>8}" + "".join(shares))


if __name__ == "__main__":
    launch(main, Config, __doc__)
