"""
Sums, whose answer a rule can check: "What is 17 + 27?" for all pairs of --low to --high.

    python -m data.arithmetic.prepare
    torchrun mogrpo.py --policy=HuggingFaceTB/SmolLM2-135M-Instruct \\
        --rules=data/arithmetic/rules.py --weights=correct=2,brief=0 \\
        --prompts=out/arithmetic/prompts.jsonl \\
        --heldout_prompts=out/arithmetic/heldout_prompts.jsonl --max_new_tokens=32 [...]

A line is {"prompt": str, "answer": str}: mogrpo.py hands it to the rules whole.
"""
import random
from dataclasses import dataclass

from data import public
from mogrpo import launch, require, say

@dataclass
class Config:
    out_dir: str = "out/arithmetic"  # an earlier folder there is renamed, not overwritten
    low: int = 2
    high: int = 29
    heldout: int = 64  # pairs that are not trained on, though 17 + 27 may be and 27 + 17 not
    seed: int = 0  # of which are held out

def main(cfg):
    numbers = range(cfg.low, cfg.high + 1)
    sums = []
    for a in numbers:
        for b in numbers:
            sums.append({"prompt": f"What is {a} + {b}?", "answer": str(a + b)})
    require(0 < cfg.heldout < len(sums), f"--heldout={cfg.heldout}: there are {len(sums)} pairs")
    random.Random(cfg.seed).shuffle(sums)
    prompts, heldout = sums[cfg.heldout:], sums[:cfg.heldout]
    public.save(cfg.out_dir, {"prompts": prompts, "heldout_prompts": heldout})
    say(f"{cfg.out_dir}: {len(prompts)} prompts to train on, {len(heldout)} held out")


if __name__ == "__main__":
    launch(main, Config, __doc__)
