"""
The toy's raters look at a run's samples: the loop that keeps a reward model right where the policy
has gone. A reward model is right near the texts that it was trained on; a policy leaves them.

    torchrun mogrpo.py --beta=0 --steps=300 --out_dir=out/hacked                     # 1. align
    python -m data.toy.rate --samples=out/hacked/samples.jsonl                       # 2. rate
    torchrun reward_model.py --ratings=out/toy/ratings.jsonl,out/fresh/ratings.jsonl \\
        --backbone=out/toy/policy --epochs=6 --batch_size=64 --lr=3e-3 --head_lr=1 \\
        --out_dir=out/fresh/rm                                                       # 3. refit
    torchrun mogrpo.py --beta=0 --steps=300 --reward_model=out/fresh/rm --out_dir=out/again   # 4.

Prints how often two answers to one request are ordered by their learned scores as by the truth: in
the first tenth of the run's steps and in its last, and with a rescored file (`reward_model.py
--score=out/hacked/samples.jsonl --reward_model=out/fresh/rm --out=out/fresh/scored.jsonl`) by the
new reward model. With real text, people or data/judge stand where the truth stands here.
"""
import os
import random
from dataclasses import dataclass

import torch

from data.toy.prepare import rating, write_jsonl
from data.toy.truth import scores
from mogrpo import launch, read_jsonl, require, say
from reward_model import pair_accuracy

@dataclass
class Config:
    samples: str = ""                     # samples.jsonl of a run in the toy world, or rescored
    out: str = "out/fresh/ratings.jsonl"  # ratings of the last tenth of the steps, as out/toy's are
    answers: int = 1000                   # how many of these answers are rated
    seed: int = 0                         # of which, and of the raters' noise

def record_of(row):
    return {"prompt": row["messages"][-1]["content"]}

def agreement(rows):
    """Of all pairs of answers to a request in a step whose true means differ, the share that the
    learned means order alike."""
    true = [sum(scores(record_of(row), row["response"]).values()) for row in rows]
    learned = [sum(row["scores"].values()) for row in rows]
    numbers = {}  # of the groups
    group = [numbers.setdefault((row["step"], row["index"]), len(numbers)) for row in rows]
    return pair_accuracy(torch.tensor(learned), torch.tensor(true), torch.tensor(group), noise=1e-5)

def main(cfg):
    rows = [row for _, row in read_jsonl(cfg.samples) if not row.get("heldout")]
    last = max((row["step"] for row in rows), default=0)
    require(last > 0, f"{cfg.samples}: no samples of a training step")
    early = [row for row in rows if row["step"] <= last / 10]
    late = [row for row in rows if row["step"] > last * 0.9]
    for name, some in (("first", early), ("last", late)):
        share, pairs = agreement(some)
        say(f"{name} tenth of the steps: {share:.2f} of {pairs} pairs are ordered as by the truth")
    rng = random.Random(cfg.seed)
    chosen = rng.sample(late, min(cfg.answers, len(late)))
    os.makedirs(os.path.dirname(cfg.out) or ".", exist_ok=True)
    write_jsonl(cfg.out, [rating(record_of(row), row["response"], rng) for row in chosen])
    say(f"{cfg.out}: {len(chosen)} rated answers")


if __name__ == "__main__":
    launch(main, Config, __doc__)
