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
import json
import multiprocessing
import os
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from itertools import product
from multiprocessing.pool import ThreadPool
from statistics import fmean
from tempfile import TemporaryDirectory

import torch

import mogrpo
from ablations import league_rules, league_table
from ablations.league_rules import RULES, TWISTS
from data.toy import prepare
from mogrpo import TOY, read_jsonl, say, write_text

@dataclass
class Config(league_table.Config):
    world_seeds: int = 3          # worlds, of seeds 0, 1, ...
    run_seeds: int = 2            # runs of each rule on each twist of each world
    jobs: int = 2                 # runs at a time, each on one core

# --------------------------------------------------------------------------------------------------
# 1. What is played

def games(cfg):
    """All runs, round after round: dicts of world, seed, twist, rule, weights."""
    listed = []
    rounds = product(range(cfg.run_seeds), range(cfg.world_seeds), TWISTS, RULES)
    for seed, world, twist, rule in rounds:
        listed.append(dict(world=world, seed=seed, twist=twist, rule=rule, weights=""))
    return listed

def path_of(cfg, game):
    name = "-".join(map(str, game.values())).rstrip("-")  # no weights, no dash
    return f"{cfg.out_dir}/{cfg.steps}steps/{name}"

def build_world(cfg, world):
    """A toy world, and for each twist its prompts with the twist's name on every line."""
    folder = f"{cfg.out_dir}/world{world}"
    apart(prepare.main, prepare.Config(folder, world))  # nothing if it is there
    for twist, name in product(TWISTS, ("prompts", "heldout_prompts")):
        with open(f"{folder}/{name}.{twist}.jsonl", "w") as f:
            for _, record in read_jsonl(f"{folder}/{name}.jsonl"):
                f.write(json.dumps(record | dict(twist=twist)) + "\n")

# --------------------------------------------------------------------------------------------------
# 2. Playing

SERVER = multiprocessing.get_context("forkserver")  # imports torch once; runs are forked from it

def apart(function, *args):
    """Call it in a process of its own, to its end."""
    process = SERVER.Process(target=function, args=args)
    process.start()
    process.join()

def play(cfg, game):
    """A run, in a process of its own -> a file of what came out."""
    path = path_of(cfg, game)
    world = f"{cfg.out_dir}/world{game['world']}"
    log = open(f"{path}.log", "w")
    with TemporaryDirectory() as folder, redirect_stdout(log), redirect_stderr(log):
        flags = dict(policy=f"{world}/policy", reward_model="", rules=league_rules.__file__,
                     prompts=f"{world}/prompts.{game['twist']}.jsonl",
                     heldout_prompts=f"{world}/heldout_prompts.{game['twist']}.jsonl",
                     rule=game["rule"], weights=game["weights"], seed=game["seed"],
                     steps=cfg.steps, out_dir=f"{folder}/run")
        run = mogrpo.setup(league_rules.Config(**TOY | flags))
        heldout = run.heldout
        run.heldout = []  # looked at once, in `judge`
        mogrpo.train(run, league_rules.set_rule(run))
        run.heldout = heldout
        if run.state["step"] == cfg.steps:  # it was not stopped
            write_text(f"{path}.json", json.dumps(game | judge(run)))

def judge(run):
    """The truth about a policy's answers to the held-out prompts."""
    rows, scores_BE, names = mogrpo.answer_heldout(run)
    true = dict(zip(names, scores_BE.nanmean(0).tolist()))
    for axis in run.axes:
        del true[f"eval/{axis}"]  # twisted
    return dict(mean=fmean(true.values()), worst=min(true.values()), kl=exact_kl(run, rows),
                true=true)

@torch.no_grad()
def exact_kl(run, rows):
    """KL(pi || pi_ref) of a response, mean over responses: at each token that of the next one,
    exactly, over the whole vocabulary."""
    pairs = [(row["prompt"]["ids"], row["response"]) for row in rows]
    mogrpo.go(run.policy, fast=False)
    mogrpo.go(run.reference, fast=False)
    logp_NV = mogrpo.plain_logits(run.policy, pairs).log_softmax(-1)
    ref_logp_NV = mogrpo.plain_logits(run.reference, pairs).log_softmax(-1)
    return (logp_NV.exp() * (logp_NV - ref_logp_NV)).sum().item() / len(rows)

def play_if_missing(cfg, game):
    path = path_of(cfg, game)
    if not os.path.exists(f"{path}.json"):
        apart(play, cfg, game)
        is_done = os.path.exists(f"{path}.json")
        say(f"{path}: " + ("finished" if is_done else "stopped or failed: see its .log"))

def play_all(cfg, listed):
    """Runs, some at a time, in their order."""
    SERVER.set_forkserver_preload(["ablations.league_table"])
    os.makedirs(f"{cfg.out_dir}/{cfg.steps}steps", exist_ok=True)
    for world in range(cfg.world_seeds):
        build_world(cfg, world)
    try:
        with ThreadPool(cfg.jobs) as pool:
            pool.map(partial(play_if_missing, cfg), listed, chunksize=1)
    except KeyboardInterrupt:
        raise mogrpo.Stopped

def main(cfg):
    play_all(cfg, games(cfg))
    league_table.main(cfg)


if __name__ == "__main__":
    mogrpo.launch(main, Config, __doc__)
