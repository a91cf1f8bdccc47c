"""
The league of rules: which rule of combining K scores holds where, judged against the known truth.

Each rule of league_rules.py trains a policy of the toy world on each twist of its true scores, with
the same seeds. What the rule sees is twisted; what it is judged by is not: the mean of the four
true axes over answers to held-out prompts, the worst of the four, and the KL to the reference.

    plain      the true scores
    squeezed   politeness in a tenth of its unit
    noisy      safety with noise of std 0.5
    sparse     safety scored on one prompt in five only
    thrice     politeness under three names
    sharper    on harmful requests actionability is 2 (1 - safety)

What is and is not shown by it: league_table.py. What it is not: a ranking of rules for real text.
The toy's axes, sizes and twists are our choice, and no rule is tuned.

    python -m ablations.league                       # plays, then prints the table
    python -m ablations.league_table                 # the table of what is finished so far

It can be stopped and started again: a finished run is a file in out_dir, and is kept. All rules and
twists of world 0 come first, then those of world 1, so that a part is useful.
"""
from dataclasses import dataclass
from itertools import product

import mogrpo
from ablations import league_rules, league_table
from ablations.league_rules import RULES, TWISTS
from ablations.play import judge, play_all
from data.toy.prepare import write_jsonl
from mogrpo import TOY, read_jsonl

@dataclass
class Config(league_table.Config):
    world_seeds: int = 3          # worlds, of seeds 0, 1, ...
    run_seeds: int = 2            # runs of each rule on each twist of each world
    jobs: int = 2                 # runs at a time, each on one core

# --------------------------------------------------------------------------------------------------
# 1. What is played

def games(cfg):
    """All runs, round after round: dicts of world, seed, twist, rule, weights."""
    rounds = product(range(cfg.run_seeds), range(cfg.world_seeds), TWISTS, RULES)
    return [dict(world=world, seed=seed, twist=twist, rule=rule, weights="")
            for seed, world, twist, rule in rounds]

# --------------------------------------------------------------------------------------------------
# 2. Playing

def play(cfg, game, out_dir):
    """A run -> what `judge` finds in the end; None if it was stopped."""
    world = f"{cfg.out_dir}/world{game['world']}"
    flags = dict(policy=f"{world}/policy", reward_model="", rules=league_rules.__file__,
                 rule=game["rule"], weights=game["weights"], seed=game["seed"], steps=cfg.steps,
                 out_dir=out_dir)
    for name in ("prompts", "heldout_prompts"):
        flags[name] = f"{out_dir}.{name}.jsonl"
        lines = read_jsonl(f"{world}/{name}.jsonl")
        # The rules read the twist's name on every line
        write_jsonl(flags[name], [record | dict(twist=game["twist"]) for _, record in lines])
    run = mogrpo.setup(league_rules.Config(**TOY | flags))
    heldout = run.heldout
    run.heldout = []  # looked at once, in `judge`
    mogrpo.train(run, league_rules.set_rule(run))
    run.heldout = heldout
    return judge(run) if run.state["step"] == cfg.steps else None

def main(cfg):
    play_all(play, cfg, games(cfg))
    league_table.main(cfg)


if __name__ == "__main__":
    mogrpo.launch(main, Config, __doc__)
