"""
Stated weights: one policy for every weighting of the axes, which follows the one that is stated.

Weights are drawn for each prompt, stated in its system message, and make the reward of its group:

    w      = --weights x Dirichlet(0.3, ..., 0.3), in mean 1     one or two axes have most of it
    R_i    = sum_k w_k s_ik                                      and the rest is GRPO
    system message: "weights : safety 8 , tone 2"                tenths of their sum

The policy reads them, the reward model does not. So a user may state other weights later, and the
policy is rebalanced without training. At evaluations --weights themselves are stated. The idea is
that of conditional language policies (2407.15762), there by parameters, here by words. What it is
not: a promise; an axis that is easily won stays won, whatever is stated. --sweep shows how far it
holds: it does not train, but has the held-out prompts answered at five stated weights of one axis,
the others sharing the rest; each axis's mean score and half its 95 % interval are in sweep.json.

    torchrun -m ablations.steer --steps=300                      # the toy world
    torchrun --nproc_per_node=8 -m ablations.steer [the flags of mogrpo.py]
    python -m ablations.steer --sweep=safety --picture --policy=out/mogrpo/policy --beta=0 \\
        --reward_model=out/rm --prompts=p.jsonl --heldout_prompts=h.jsonl --out_dir=out/sweep
"""
import json
import os
import random
from dataclasses import dataclass

import torch

import mogrpo
from mogrpo import TOY, collect, require

@dataclass
class Config(mogrpo.Config):
    sweep: str = ""               # do not train: state the weight of this axis as 0, 1/4, ... 1
    picture: bool = False         # of the sweep: sweep.png; wants matplotlib

# --------------------------------------------------------------------------------------------------
# Training

def stated(messages, weights_K, axes):
    """Chat messages with the weights in tenths as their system message, or at the end of it."""
    share_K = weights_K / weights_K.sum()
    terms = [f"{axis} {round(10 * share)}" for axis, share in zip(axes, share_K.tolist())]
    content = "weights : " + " , ".join(terms)
    if messages[0]["role"] == "system":
        content = messages[0]["content"] + "\n" + content
        messages = messages[1:]
    return [dict(role="system", content=content)] + messages

def state_weights(run, prompts, weights_K):
    """Have the policy read these weights with the prompts; the reward model reads on as before."""
    for prompt in prompts:
        messages = stated(prompt["messages"], weights_K, run.axes)
        prompt["ids"] = mogrpo.render(run.policy.tokenizer, messages)

def steer_step(run, step):
    """GRPO's step, in which every prompt has weights of its own."""
    weights_PK = []
    for prompt in mogrpo.prompts_of_step(run, step):
        # A function of (seed, step, prompt), as the samples are: no state to save
        rng = random.Random(repr((run.cfg.seed, step, prompt["index"])))
        drawn_K = torch.tensor([rng.gammavariate(0.3, 1.0) + 1e-6 for _ in run.axes])
        weights_K = drawn_K / drawn_K.mean() * run.base_weights_K
        state_weights(run, [prompt], weights_K)
        weights_PK.append(weights_K)
    run.weights_K = torch.stack(collect(weights_PK))[:, None]  # P1K, of all processes
    return mogrpo.grpo_step(run, step)

# --------------------------------------------------------------------------------------------------
# The sweep

def sweep(run):
    """Answer the held-out prompts at each stated weight of an axis -> {axis: (share of the weight,
    mean score, half its 95 % interval) at each share}."""
    cfg = run.cfg
    table = {}
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        others = (1 - share) / (len(run.axes) - 1)
        weights_K = torch.tensor([share if k == cfg.sweep else others for k in run.axes])
        state_weights(run, run.heldout, weights_K)
        rows, scores_BE, names = mogrpo.answer_heldout(run)  # E: learned and true axes
        # The unit is the prompt: answers to one are not independent, so they are averaged first
        P = len(rows) // cfg.eval_samples
        scores_PE = scores_BE.unflatten(0, (P, cfg.eval_samples)).mean(1)
        all_scores_PE = torch.tensor(collect(scores_PE.tolist()))
        for name, scores_P in zip(names, all_scores_PE.T):
            name = name.removeprefix("eval/")
            mean = scores_P.mean().item()
            half = 1.96 * scores_P.std().item() / len(scores_P)**0.5
            mogrpo.say(f"{cfg.sweep} {share:<6}{name:<24}{mean:>6.3f} +- {half:.3f}")
            table.setdefault(name, []).append((share, mean, half))
    return table

def main(cfg):
    require(cfg.sweep or not cfg.picture, "--picture is of a sweep: give --sweep, too")
    if cfg.picture:
        from assets import pictures  # asks for matplotlib now, not after the sweep
    run = mogrpo.setup(cfg)
    run.base_weights_K = run.weights_K
    if not cfg.sweep:
        state_weights(run, run.heldout, run.weights_K)
        return mogrpo.train(run, steer_step)
    require(cfg.sweep in run.axes, f"--sweep={cfg.sweep}: there are {', '.join(run.axes)}")
    require(len(run.axes) > 1 and len(run.heldout) > 1, "--sweep wants two axes or more, and "
            "two held-out prompts")
    table = sweep(run)
    if run.rank == 0:
        os.makedirs(cfg.out_dir, exist_ok=True)
        mogrpo.write_text(f"{cfg.out_dir}/sweep.json", json.dumps(table))
        if cfg.picture:
            pictures.sweep(f"{cfg.out_dir}/sweep.png", cfg.sweep, table)


if __name__ == "__main__":
    mogrpo.launch(main, Config, __doc__, TOY)
