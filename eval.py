"""
Policies side by side: every policy answers the same held-out prompts, the reward model scores the answers axis by axis.

    torchrun eval.py                                    # the toy world: out/toy/policy against out/mogrpo/policy
    torchrun --nproc_per_node=8 eval.py --policies=base=Qwen/Qwen2.5-7B-Instruct,mogrpo=out/mogrpo/policy \\
        --reward_model=out/rm --prompts=heldout.jsonl --out_dir=out/eval

The first policy is the one that the others are compared with. All draw the same random numbers for the same (prompt, sample),
and differences are taken prompt by prompt, so their interval is far narrower than that of two separate means. The unit is the
prompt: its samples are averaged first, since answers to one prompt are not independent. Written to --out_dir: eval.json (the
table) and samples.jsonl (every answer with its scores; it is also the input format of `reward_model.py --score`). What it is
not: a judge of truth. It measures what the reward model sees, and a policy trained against that model may have learned to
please it; score with a second reward model, or read the samples. In the toy world alone the true scores stand beside it.
"""
import json, math, os, sys
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mogrpo import Policy, load_prompts, rollout
from reward_model import (DTYPES, RewardModel, collect, fresh_folder, join_world, parse, require, run, say, shard, toy_world,
                          true_scores, write_text)

@dataclass
class Config:
    policies: str = "toy"         # name=folder,... the first is the baseline; toy: base=out/toy/policy,mogrpo=out/mogrpo/policy
    reward_model: str = "toy"     # folder that scores the answers; toy: out/toy/reward_model
    prompts: str = "toy"          # held-out prompts, JSONL; an optional "tag" splits the table; toy: the held-out toy requests
    out_dir: str = "out/eval"     # eval.json and samples.jsonl; an earlier folder there is renamed, not overwritten
    samples: int = 4              # answers a prompt; more narrow the interval only as far as prompts agree
    batch_prompts: int = 32       # prompts answered at once, over all processes; bounds the memory of the cache
    max_prompt_tokens: int = 512  # longer prompts are skipped and counted
    max_new_tokens: int = 512     # answers are cut here
    temperature: float = 1.0      # of sampling; 0 takes the likeliest token every time
    dtype: str = "auto"           # float32 | bfloat16 | float64 compute; auto: bfloat16 on GPU
    seed: int = 0                 # of the random numbers that all policies share

    def __post_init__(self):
        for name in ("samples", "batch_prompts", "max_prompt_tokens", "max_new_tokens"):
            require(getattr(self, name) > 0, f"--{name}={getattr(self, name)}: must be greater than 0")
        require(self.temperature >= 0, f"--temperature={self.temperature}: must not be negative")
        require(self.dtype in DTYPES, f"--dtype={self.dtype}: expected one of {', '.join(DTYPES)}")
        names = [pair.partition("=")[0] for pair in self.policies.split(",")]
        require(self.policies == "toy" or all(pair.partition("=")[2] for pair in self.policies.split(",")),
                f"--policies={self.policies}: expected name=folder,name=folder")
        require(len(set(names)) == len(names), f"--policies={self.policies}: two policies of one name")
        require(self.policies == "toy" or "toy" not in (self.reward_model, self.prompts), "with --policies, give --reward_model and --prompts, too")

TOY = dict(max_new_tokens=48)  # defaults while --policies=toy


# ------------------------------------------------------------------------------------------------------------------------
# Statistics

def mean_and_interval(x_P):
    """Mean over P prompts and half its 95 % interval (normal approximation; nan below two prompts)."""
    return x_P.mean().item(), 1.96 * x_P.std().item() / math.sqrt(len(x_P)) if len(x_P) > 1 else math.nan

def compare(values_P, base_P):
    """One axis of one policy against the baseline, both the prompts' means: mean, paired difference, win rate (a tie is half)."""
    mean, half = mean_and_interval(values_P)
    gain, gain_half = mean_and_interval(values_P - base_P)
    wins = ((values_P - base_P > 1e-6).double() + 0.5 * ((values_P - base_P).abs() <= 1e-6)).mean().item()
    return dict(mean=mean, ci=half, gain=gain, gain_ci=gain_half, win=wins)
