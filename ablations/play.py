"""
Many runs in the toy world, each in a process of its own, judged by the true scores: what league.py,
league_front.py and methods.py have in common.

A game is a dict of what tells a run from the others. A finished one is a file in out_dir, and is
kept: a series can be stopped and started again.
"""
import json
import multiprocessing
import os
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from multiprocessing.pool import ThreadPool
from statistics import fmean
from tempfile import TemporaryDirectory

import torch

import mogrpo
from data.toy import prepare
from mogrpo import require, say, write_text

SERVER = multiprocessing.get_context("forkserver")  # imports torch once; runs are forked from it

def path_of(cfg, game):
    name = "-".join(map(str, game.values())).rstrip("-")  # no weights, no dash
    return f"{cfg.out_dir}/{cfg.steps}steps/{name}"

def apart(function, *args):
    """Call it in a process of its own, to its end."""
    process = SERVER.Process(target=function, args=args)
    process.start()
    process.join()

def play_to_file(play, cfg, game):
    """In a process of its own: a run, and a file of what was found."""
    path = path_of(cfg, game)
    log = open(f"{path}.log", "w")
    with TemporaryDirectory() as folder, redirect_stdout(log), redirect_stderr(log):
        found = play(cfg, game, f"{folder}/run")
        if found:
            write_text(f"{path}.json", json.dumps(game | found))

def play_if_missing(play, cfg, game):
    path = path_of(cfg, game)
    if not os.path.exists(f"{path}.json"):
        apart(play_to_file, play, cfg, game)
        is_done = os.path.exists(f"{path}.json")
        say(f"{path}: " + ("finished" if is_done else "stopped or failed: see its .log"))

def play_all(play, cfg, games):
    """Runs, cfg.jobs at a time, in their order. `play(cfg, game, out_dir)` is a run: it returns a
    dict of what it found, or None if it was stopped."""
    require(cfg.jobs > 0, "--jobs: there must be one at least")
    SERVER.set_forkserver_preload(["ablations.league_table"])
    os.makedirs(f"{cfg.out_dir}/{cfg.steps}steps", exist_ok=True)
    for seed in range(cfg.world_seeds):
        apart(prepare.main, prepare.Config(f"{cfg.out_dir}/world{seed}", seed))  # if it is missing
    try:
        with ThreadPool(cfg.jobs) as pool:
            pool.map(partial(play_if_missing, play, cfg), games, chunksize=1)
    except KeyboardInterrupt:
        raise mogrpo.Stopped

def judge(run):
    """The truth about a policy's answers to the held-out prompts."""
    rows, scores_BE, names = mogrpo.answer_heldout(run)
    true = dict(zip(names, scores_BE.nanmean(0).tolist()))
    for axis in run.axes:
        del true[f"eval/{axis}"]  # what the run is paid for
    return dict(mean=fmean(true.values()), worst=min(true.values()), kl=exact_kl(run, rows),
                true=true)

@torch.no_grad()
def exact_kl(run, rows):
    """KL(pi || pi_ref) of a response, mean over responses: at each token that of the next one,
    exactly, over the whole vocabulary."""
    pairs = [(row["prompt"]["ids"], row["response"]) for row in rows]
    found = []
    for model in (run.policy, run.reference):
        was_fast = model.fast
        mogrpo.go(model, fast=False)
        found.append(mogrpo.plain_logits(model, pairs).log_softmax(-1))
        mogrpo.go(model, was_fast)
    logp_NV, ref_logp_NV = found
    return (logp_NV.exp() * (logp_NV - ref_logp_NV)).sum().item() / len(rows)
