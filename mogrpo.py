r"""
Multi-objective GRPO: align a language model to several objectives at once, without a critic.

For each prompt q the policy pi, the model in training, samples a group of G responses o_1..o_G.
Reward models, rules of your own, or both give each response K scores s_ik, one on each objective
(an axis). GRPO (group relative policy optimization) compares within the group only: what is better
than its siblings becomes likelier. The advantage A_i says how much better; all tokens of a response
have the response's.

    e_ik  = s_ik - mean_G s_k                           compared with the group
    r_i   = sum_k w_k e_ik                              K axes become one reward
    A_i   = r_i / max(std_G r, std_floor)
    or with --combine=gdpo
    r_i   = sum_k w_k e_ik / std_G s_k                  each axis in units of its own spread
    A_i   = r_i / (std of r over the step)
    rho   = pi(o_t | q, o_<t) / pi_old(o_t | q, o_<t)   for each token. pi_old: the weights that
                                                        have sampled it, before this update
    c     = min(pi_old / pi_sampler, 2)                 pi_sampler: the same weights, rounded as
                                                        they were while sampling: c is near 1
    gain  = min(rho A_i c, clip(rho, 1 - clip_low, 1 + clip_high) A_i c)     see `objective`
    price = rho log(pi / pi_ref)                        the logarithm held fixed: see `objective`.
                                                        pi_ref: the policy before all training
    loss  = - sum over all tokens of share * (gain - beta * price)
                                                        share: 1 / (tokens of its response x
                                                        responses), or see `token_shares`
    pi   <- AdamW step down the loss                    `epochs` times; then sample again

Why it works: a reward has no gradient, but its mean over responses has one. As
grad pi = pi grad log pi,

    grad E[r] = E[r grad log pi(o | q)]                 log pi(o | q) = sum_t log pi(o_t | q, o_<t)

So one samples, and pushes up the log-prob of each token by the r of its response: a policy
gradient. E[grad log pi] is 0, since probabilities sum to 1, so a constant may be taken off r and
the mean stays; taking off the group's mean removes most of the noise. (PPO takes off what a second
network, the critic, predicts.) And at pi = pi_old the gradient of rho is that of log pi.

Sources: arXiv 2402.03300 (GRPO), 2503.21819 (several objectives at once; its hyperparameters are
not public, so every default is our own choice).

Departures from 2402.03300:
- The std (that of the population, sum / G) is floored: below some spread a learned score is noise.
- A group that is equal on every axis, or whose axes cancel, but for rounding, gets an advantage of
  exactly 0.
- rho may rise further than it may fall (DAPO, 2503.14476).
- The KL term has the gradient of KL(pi || pi_ref). The published one has not: see `objective`.
- c, an importance weight: the sampler works token by token with a cache, so it rounds in another
  way than the trainer, and samples from a slightly other distribution than the one that is trained
  (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"). The
  price goes without it: beta times so small a correction is not worth a factor.
All probabilities are those at --temperature.

Worth knowing: with --epochs=1, the default, rho is exactly 1 (it is there for its gradient), so
nothing is ever clipped. And only the ratios of weights matter, as long as no std is below the
floor: dividing by the std takes a common factor away.

Left out: a separate inference engine, several minibatches a rollout, tools, several turns.

    torchrun mogrpo.py                         # a toy world on a laptop, a minute; wants data/toy
    torchrun mogrpo.py --policy=Qwen/Qwen2.5-0.5B-Instruct --reward_model=out/rm --prompts=p.jsonl
    torchrun mogrpo.py --policy=DIR --rules=rules.py --prompts=p.jsonl     # your own Python scores
    torchrun --nproc_per_node=8 mogrpo.py --policy=Qwen/Qwen2.5-14B-Instruct ...      # eight GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \
        mogrpo.py ...                # the same on both nodes; out_dir must be a folder they share
    torchrun mogrpo.py --resume --out_dir=DIR            # goes on, on any number of processes

Who calls whom:
    main
        setup
        train
            grpo_step                          for each step
                experience
                    rollout                    sample_all, sample; pick for every token
                    score_responses            reward models, rules
                combine_sum or combine_gdpo    centred; then without_ties
                grpo_update
                    micro_batches              token_shares
                    response_logp, objective   for each micro-batch
                    optimizer_step

Shapes stand in names, so advantages_PG is [P, G]; a 1 is a dimension kept for broadcasting.
    P  prompts           G  responses to a prompt       K  axes of the scores     B  rows: P x G
    T  new tokens        S  longest prompt + response   V  vocabulary              D  hidden size
    N  response tokens of a micro-batch, end to end
    M  all tokens of a micro-batch, end to end     R  rows not yet ended            (part 4 only)

Parts: 1 the objective, 2 group sampling, 3 the loop, 4 machinery. On a first reading stop after 3.
"""
import argparse
import asyncio
import fcntl
import fileinput
import importlib
import inspect
import json
import logging
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timedelta
from functools import lru_cache, partial
from itertools import groupby
from types import SimpleNamespace
from typing import Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, set_model_state_dict)
from torch.distributed.fsdp import (
    FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method)
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")  # one GPU a process: see `join_world`
device_tensor = partial(torch.tensor, device=DEVICE)
at_least_float32 = partial(torch.promote_types, torch.float32)  # a dtype -> the dtype of its sums
Dtype = Literal["auto", "bfloat16", "float32", "float64"]
TODAY = datetime.now().date().isoformat()

@dataclass
class Config:
    # models and data
    policy: str = "toy"           # causal LM, folder or hub id; toy: out/toy, with TOY's defaults
    reward_model: str = ""        # folders, comma-separated; the axes: id2label in config.json
    rules: str = ""               # FILE.py with scores(line of the prompts, response) -> {axis: x}
    truth: str = ""               # another such file, only logged: does the policy game its reward?
    prompts: str = ""             # JSONL with "prompt" or "messages"
    heldout_prompts: str = ""     # JSONL for evaluations; empty: some 64 prompts are kept back
    out_dir: str = "out/mogrpo"   # results; an earlier run there is renamed, never overwritten
    # objective
    weights: str = ""             # axis=weight,... of the reward; an axis not named weighs 1
    combine: Literal["sum", "gdpo"] = "sum"  # K scores to one advantage: sum is 2503.21819's
    beta: float = 0.04            # weight of the KL to the reference; 0: no reference is loaded
    clip_low: float = 0.2         # where A < 0 the gradient stops at rho = 1 - clip_low
    clip_high: float = 0.28       # where A > 0 at 1 + clip_high; more keeps rare tokens (DAPO)
    loss_norm: Literal["sequence", "token", "constant"] = "sequence"  # sequence: every response
                                  # weighs the same; token: every token does; constant: too,
                                  # and by the same number in every step
    std_floor: float = 0.01       # least std to divide by: a narrower spread is taken for noise.
                                  # With gdpo: this fraction of the axis's std over the step
    # sampling
    group_size: int = 8           # G, responses a prompt: the baseline's sample size, at least 2
    prompts_per_step: int = 32    # over all processes; a GPU wants 128 rows and more (bench/speed)
    max_prompt_tokens: int = 512  # longer prompts are skipped and counted
    max_new_tokens: int = 512     # T: responses are cut here
    sample_rows: int = 256        # responses a process decodes at once; bounds the key-value cache.
                                  # Halved where memory is short
    temperature: float = 1.0      # of sampling and training alike. No top-k, no top-p: they would
                                  # sample from another distribution than the one that is trained
    # optimization
    steps: int = 500              # rollouts; optimizer steps are epochs times as many
    lr: float = 1e-6              # peak; fits full training of a few billion parameters
    warmup: int = 10              # steps of linear warm-up, times a cosine down to a tenth of lr
    epochs: int = 1               # optimizer steps on each rollout; above 1 the clipping matters
    grad_clip: float = 1.0        # largest gradient norm
    micro_tokens: int = 16384     # tokens of one forward and backward; bounds activation memory
    recompute: Literal["auto", "True", "False"] = "auto"  # keep only the inputs of the transformer
                                  # blocks, run these again in backward: a third more work.
                                  # auto: on a GPU
    lora_rank: int = 0            # train adapters of this rank instead; they want 5 to 20 times lr
    lora_alpha: float = 32.0      # adapters are scaled by alpha / rank
    dtype: Dtype = "auto"         # of compute; auto: bfloat16 on a GPU, else float32
    fast: bool = True             # our own attention, cache and recorded decode steps (part 4),
                                  # where they give the library's numbers; else the library's ways
    hsdp: bool = True             # several nodes: shard inside one, replicate across; else over all
    # running
    eval_interval: int = 0        # evaluate every so many steps; before and after training always
    eval_samples: int = 4         # responses to a held-out prompt
    log_interval: int = 1         # a line on the terminal every so many steps; the first and last
    tracker: Literal["", "tensorboard", "wandb"] = ""  # curves there, too; wants that package
    save_interval: int = 50       # checkpoint every so many steps, at the end, and after Ctrl-C (on
                                  # which torchrun waits 30 s: give it --shutdown-timeout)
    resume: bool = False          # continue from out_dir/checkpoint
    seed: int = 0                 # order of prompts and every sampled token
    day: str = TODAY              # YYYY-MM-DD that chat templates tell

    def __post_init__(self):
        check_flags(self)

# --------------------------------------------------------------------------------------------------
# 1. The objective

def centred(scores_PGK):
    """e_ik = s_ik - mean_G s_k. A score is nan where its axis has nothing to say about a response;
    it counts as the mean: e is 0."""
    mean_P1K = scores_PGK.nanmean(1, keepdim=True)
    e_PGK = (scores_PGK - mean_P1K).nan_to_num()
    # Where the spread is but rounding it is set to 0: gdpo would divide by it
    largest_P1K = scores_PGK.abs().nan_to_num().amax(1, keepdim=True)
    is_rounding_P1K = e_PGK.abs().amax(1, keepdim=True) <= 1e-6 * largest_P1K
    return e_PGK.masked_fill(is_rounding_P1K, 0.0)

def std_of_scored(scores_PGK, dims):
    """Std over some dimensions, which stay as 1, of the scores that are not nan."""
    mean = scores_PGK.nanmean(dims, keepdim=True)
    return (scores_PGK - mean).square().nanmean(dims, keepdim=True).sqrt()

def standardized(scores_PGK, cfg):
    """z_ik = e_ik / max(std_G s_k, std_floor x std of s_k over the step): each axis by itself, in
    units of its own spread, so that it does not matter in which unit it is given."""
    std_P1K = std_of_scored(scores_PGK, 1)
    floor_11K = cfg.std_floor * std_of_scored(scores_PGK, (0, 1))
    z_PGK = centred(scores_PGK) / torch.maximum(std_P1K, floor_11K)
    return z_PGK.nan_to_num()  # 0 / 0: no spread, or no scores

# Both functions below take the scores of all groups of a step and return parts_PGK: what each axis
# adds to the advantage. Summed over K they are the advantages. (That they are kept apart is for the
# log: share/<axis>.) weights_K may be P1K, too: each prompt's own. For example, a step of one group
# of four, and two axes of weight 1:
#     s_1 = 3 1 1 3    e_1 = 1 -1 -1 1          s_2 = 0 1 0 1    e_2 = -.5 .5 -.5 .5
#     sum:    r = .5 -.5 -1.5 1.5    A = .45 -.45 -1.34 1.34     the wide axis decides the first two
#     gdpo:   r =  0   0   -2   2    A =   0    0 -1.41 1.41     there the two axes cancel

def combine_sum(scores_PGK, weights_K, cfg):
    """part_ik = w_k e_ik / max(std_G r, std_floor), where r_i = sum_k w_k e_ik: an axis counts as
    much as it spreads. Without the floor 0.50000 and 0.50001 would become -1 and +1 (verl issue
    6348)."""
    weighted_PGK = weights_K * centred(scores_PGK)
    std_P11 = weighted_PGK.sum(-1, keepdim=True).std(1, correction=0, keepdim=True)
    return weighted_PGK / std_P11.clamp(min=cfg.std_floor)

def combine_gdpo(scores_PGK, weights_K, cfg):
    """GDPO (2601.05242): part_ik = w_k z_ik / (std of r over the step), where r_i = sum_k w_k z_ik:
    a narrow axis counts like a wide one."""
    weighted_PGK = weights_K * standardized(scores_PGK, cfg)
    step_std = weighted_PGK.sum(-1).std(correction=0)
    return weighted_PGK / step_std.clamp(min=1e-12)  # it is 0 if no group has a signal

COMBINE = dict(sum=combine_sum, gdpo=combine_gdpo)  # the values of --combine

def without_ties(parts_PGK):
    """Axes that cancel leave rounding (equal scores do not: see `centred`): set to 0, since Adam
    rescales any gradient to a full step, so that rounding alone would move the weights."""
    advantages_PG1 = parts_PGK.sum(-1, keepdim=True)
    largest_P11 = parts_PGK.abs().amax((1, 2), keepdim=True)
    is_tie_P11 = advantages_PG1.abs().amax(1, keepdim=True) <= 1e-6 * largest_P11
    return parts_PGK.masked_fill(is_tie_P11, 0.0)

def objective(batch, logp_N, cfg):
    """Loss of a micro-batch; and what is logged of it, sums to be added over micro-batches and
    processes. The batch has, beside others (see `micro_batches` and `grpo_update`):
        advantage_N      of the token's response          token_share_N   see `token_shares`
        old_logp_N       log pi_old                       ref_logp_N      log pi_ref
        c_N              the factor c                     lengths         tokens of each response
    (the last for objectives of your own: ablations/gspo.py)."""
    rho_N = (logp_N - batch.old_logp_N).exp()  # 1 in the first epoch, but with a gradient
    clipped_rho_N = rho_N.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)  # no gradient outside
    unclipped_gain_N = rho_N * batch.advantage_N * batch.c_N
    clipped_gain_N = clipped_rho_N * batch.advantage_N * batch.c_N
    # PPO's: no more gradient once a token has moved far enough the way that A wants, above
    # 1 + clip_high if A > 0, below 1 - clip_low if A < 0. If it has moved the wrong way min takes
    # the unclipped one, so that it can return
    gain_N = torch.min(unclipped_gain_N, clipped_gain_N)

    # KL of one next token: E_pi[L], L = log(pi / pi_ref). As grad pi = pi grad log pi, its gradient
    # is E_pi[L grad log pi] + E_pi[grad log pi], and the second is 0. rho L with L held fixed has
    # the first alone. (Left out: that a token also changes which tokens come later.) GRPO as
    # published has k3, below, in the loss: the right value on average, but the gradient of
    # KL(pi_ref || pi), in rare large spikes (2512.02556, 2510.01555)
    log_ratio_N = (logp_N - batch.ref_logp_N).detach()
    price_N = rho_N * log_ratio_N
    loss = -(batch.token_share_N * (gain_N - cfg.beta * price_N)).sum()

    # The KL in the log is Schulman's k3, x - 1 - log x of x = pi_ref / pi. E_pi[x] is 1, so its
    # mean is E_pi[-log x], the KL; and it is never negative
    k3_N = (-log_ratio_N).exp() - 1 + log_ratio_N
    is_clipped_N = unclipped_gain_N > clipped_gain_N
    return loss, dict(kl=(batch.token_share_N * k3_N).sum(),
                      clip_frac=(batch.token_share_N * is_clipped_N).sum())

def token_shares(lengths_B, counts, cfg):
    """For each response the share of each one of its tokens in the loss of the step -> shares_B.
    `counts`, of responses and tokens, are of the whole step, over all processes and micro-batches:
    with a mean inside each a token's weight would depend on which micro-batch it is in."""
    if cfg.loss_norm == "sequence":  # GRPO: mean over a response's tokens, then over responses
        return 1 / (lengths_B * counts["responses"])
    if cfg.loss_norm == "token":     # DAPO: mean over all tokens; a long response weighs more
        share = 1 / counts["tokens"]
    else:                            # constant, Dr. GRPO (2503.20783): the same in every step
        share = 1 / (cfg.max_new_tokens * counts["responses"])
    return torch.full_like(lengths_B, share, dtype=torch.float32)

# --------------------------------------------------------------------------------------------------
# 2. Group sampling
#
# `sample` and `plain_logits` are the simple ways to sample and to get log-probs: the library's own,
# right for any causal model it has. Part 4 has a faster way through most models, which is taken
# where it gives the same numbers (then policy.fast is True). Also from part 4:
#     gathered       a `with` block in which the whole policy is on this process. All processes
#                    must enter it, hence "every process must call it" below
#     sample_all     `sample`, or the faster way, of as many rows at once as memory allows
#     score          of a reward model: its K scores of each (messages, response)
#     rule_scores    of your own function
#     batch_of       rows of token ids and their mask as tensors, all ending in the same column
#     must_stop      whether Ctrl-C has come; heed_signals stops for it, on all processes together

def uniforms(keys, n):
    """n uniform numbers for each response -> u_BT in [0, 1), float64, on the CPU. They make the
    sampled text the same, but for rounding, on any number of processes, in any batches, and after a
    resume: row b is a function of keys[b] = (seed, step, prompt, sample) alone."""
    u_BT = []
    for key in keys:
        rng = random.Random(repr(key))  # seeded by a hash of that text, alike on every machine
        u_BT.append([rng.random() for _ in range(n)])
    return torch.tensor(u_BT, dtype=torch.float64)

def pick(logits_BV, u_B):
    """Sample from softmax(logits): the first token whose cumulative probability exceeds u -> tokens
    and their log-probs."""
    p_BV = logits_BV.softmax(-1, dtype=at_least_float32(logits_BV.dtype))
    cdf_BV = p_BV.cumsum(-1, dtype=torch.float64)  # float32 would lose rare tokens of 150,000
    target_B1 = (u_B * cdf_BV[:, -1])[:, None]     # the last is 1 but for rounding
    token_B1 = torch.searchsorted(cdf_BV, target_B1, right=True)
    token_B1 = token_B1.clamp(max=p_BV.shape[-1] - 1)  # where rounding puts the target at the end
    return token_B1.squeeze(-1), p_BV.gather(-1, token_B1).log().squeeze(-1)

@torch.no_grad()
def sample(policy, prompts, u_BT, temperature):
    """A response to each of B prompts (here: lists of token ids) -> B token lists, each up to and
    including its end token or cut at T; their log-probs under the sampler, B tensors on the CPU.
    The library's `generate` runs the model, but with random numbers of ours: `draw` samples a token
    and sets the logits of all others to -inf, so that its greedy search must take that token.
    (`load_policy` has emptied the folder's generation config: no penalty, no top-k comes first.)"""
    B, T = u_BT.shape
    logps = []  # logp_B of each new token

    def draw(ids_BS, logits_BV):
        t = len(logps)
        token_B, logp_B = pick(logits_BV / temperature, u_BT[:, t].to(DEVICE))
        logps.append(logp_B)
        only_token_BV = torch.full_like(logits_BV, -math.inf)
        return only_token_BV.scatter(1, token_B[:, None], 0.0)

    def stop(ids_BS, scores):
        return torch.full((B,), must_stop(), device=DEVICE)

    ids_BS = policy.generate(
        **batch_of(policy, prompts), logits_processor=[draw], stopping_criteria=[stop],
        do_sample=False, max_new_tokens=T, eos_token_id=policy.eos, pad_token_id=0)
    return up_to_end(ids_BS[:, -len(logps):], torch.stack(logps, 1), policy.eos)

def up_to_end(tokens_BT, logp_BT, eos):
    """Cut off what was sampled after an end token, while longer rows went on."""
    responses = []
    logps = []
    for tokens, logp_T in zip(tokens_BT.tolist(), logp_BT.cpu()):
        n = next((t for t, token in enumerate(tokens, 1) if token in eos), len(tokens))
        responses.append(tokens[:n])
        logps.append(logp_T[:n])
    return responses, logps

def plain_logits(policy, pairs):
    """The logits that predict the response tokens of (prompt_ids, response_ids) pairs -> logits_NV.
    Rows are padded on the right, where a causal model never looks."""
    ids_BS = padded([prompt + response for prompt, response in pairs])
    logits_BSV = policy(input_ids=ids_BS, use_cache=False).logits
    logits = []
    for (prompt, response), logits_SV in zip(pairs, logits_BSV):
        first = len(prompt) - 1  # the last token of the prompt predicts the first of the response
        logits.append(logits_SV[first:first + len(response)])
    return torch.cat(logits)

def padded(rows):
    """Lists of whole numbers as one tensor, with 0 behind the shorter ones."""
    rows = [torch.tensor(row, dtype=torch.long) for row in rows]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True).to(DEVICE)

def response_logp(policy, pairs, temperature):
    """Log-probs of all response tokens of the pairs, at the sampler's temperature -> logp_N."""
    if policy.fast:  # a namespace, or FSDP would search every token of the list for tensors
        return policy.packed_logp(SimpleNamespace(pairs=pairs), temperature)
    targets = [token for _, response in pairs for token in response]
    logits_NV = plain_logits(policy, pairs) / temperature
    return token_logp(logits_NV, device_tensor(targets))

def token_logp(logits_NV, targets_N):
    logits_NV = logits_NV.to(at_least_float32(logits_NV.dtype))
    return -nn.functional.cross_entropy(logits_NV, targets_N, reduction="none")

def rollout(policy, prompts, stream, group_size, cfg):
    """Sample `group_size` responses to each of some prompts (dicts of `load_prompts`) -> B rows in
    prompt order: dicts of prompt (that dict), response (token ids), text, tokens (their number),
    truncated (it has no end token), sampler_logp (of each token). Every process must call it, even
    with no prompts. The same `stream`, (seed, step) in training, gives a prompt the same
    responses."""
    asked = [(prompt, g) for prompt in prompts for g in range(group_size)]
    prompt_ids = [prompt["ids"] for prompt, _ in asked]
    keys = [(*stream, prompt["index"], g) for prompt, g in asked]
    with gathered(policy):
        responses, logps = sample_all(policy, prompt_ids, keys, group_size, cfg)
    texts = policy.tokenizer.batch_decode(responses, skip_special_tokens=True)
    rows = []
    for (prompt, _), response, text, logp_T in zip(asked, responses, texts, logps):
        rows.append(dict(
            prompt=prompt, response=response, text=text, tokens=len(response),
            truncated=response[-1] not in policy.eos, sampler_logp=logp_T))
    heed_signals()  # raises Stopped if a signal has come: half-finished rows are not returned
    return rows

def score_responses(rows, reward_models, rules):
    """Where every reward comes from: the rows of `rollout` -> scores_BK, nan where an axis has
    nothing to say. The axes are those of the reward models, in the order given, then those of the
    rules. Every process must call it, even with no rows."""
    columns = [torch.zeros(len(rows), 0)]  # eval.py may have no rewards at all
    for reward_model in reward_models:
        conversations = [(row["prompt"]["messages"], row["text"]) for row in rows]
        with gathered(reward_model):  # one whole model at a time: the policy is sharded again
            columns.append(score(reward_model, conversations))
    if rules:
        columns.append(rule_scores(rules, rows))
    scores_BK = torch.cat(columns, 1)
    return scores_BK.where(scores_BK.isfinite(), math.nan)

# --------------------------------------------------------------------------------------------------
# 3. The loop
#
# From part 4 come
#     prompts_of_step    this process's prompts of a step: number i is on process i % world
#     reference_logp     `response_logp` under pi_ref, no gradients
#     collect            x[rank::world] of each process -> x, on every process
#     total              the sums of numbers over all processes
#     packed_together    which rows make a micro-batch
#     even_out           as many micro-batches on every process
#     timed              a `with` block whose seconds are logged; group_metrics: what else is

def experience(run, step):
    """Sample and score a step's responses -> this process's rows, G for each of its prompts, and
    their scores_BK."""
    return sample_and_score(run, prompts_of_step(run, step), step)

def sample_and_score(run, prompts, step):
    """The same of given prompts (a fork may choose them). Every process must call it."""
    with timed(run, "sec/sample"):
        rows = rollout(run.policy, prompts, (run.cfg.seed, step), run.cfg.group_size, run.cfg)
    with timed(run, "sec/score"):
        scores_BK = score_responses(rows, run.reward_models, run.rules)
    return rows, scores_BK

def grpo_step(run, step):
    """One step of GRPO on every process: sample, score, compare, update -> the step's metrics.
    `run` is a Run, below."""
    cfg = run.cfg
    run.seconds.clear()

    # 1. A group of G responses to each of this process's prompts, scored on every axis
    rows, scores_BK = run.experience(run, step)
    log_samples(run, step, rows, scores_BK, heldout=False)

    # 2. Compare them. gdpo needs statistics of the whole step: so every process gets all scores (a
    # few kB), computes all advantages, and keeps its own (prompt i is on process i % world)
    scores_PGK = scores_BK.unflatten(0, (-1, cfg.group_size))
    all_scores_PGK = torch.tensor(collect(scores_PGK.tolist()))
    if run.reward_models and all_scores_PGK.isnan().all():  # rules may have nothing to say
        raise Stopped(f"step {step}: no response has a score on any axis")
    all_parts_PGK = without_ties(run.combine(all_scores_PGK, run.weights_K, cfg))
    all_advantages_PG = all_parts_PGK.sum(-1)
    advantages_B = all_advantages_PG[run.rank::run.world].flatten()

    # 3. Make what is better than its siblings likelier
    with timed(run, "sec/train"):
        metrics = run.update(run, rows, advantages_B, step)
    return metrics | group_metrics(run, all_scores_PGK, all_parts_PGK) | dict(run.seconds)

def micro_batches(run, rows, advantages_B):
    """The rows of `rollout` and an advantage for each -> micro-batches of at most `micro_tokens`
    tokens, as many on every process, each with a row at least; and the step's counts of responses,
    tokens and truncated responses, over all processes."""
    cfg = run.cfg
    lengths_B = torch.tensor([row["tokens"] for row in rows])
    counts = total(dict(responses=len(rows), tokens=lengths_B.sum(),
                        truncated=sum(row["truncated"] for row in rows)))
    shares_B = token_shares(lengths_B, counts, cfg)
    batches = []
    for chosen in packed_together(rows, cfg):  # numbers of rows
        lengths = lengths_B[chosen]
        # What a response has, all its tokens have
        batches.append(SimpleNamespace(
            pairs=[(rows[b]["prompt"]["ids"], rows[b]["response"]) for b in chosen],
            lengths=lengths.tolist(),
            sampler_logp_N=torch.cat([rows[b]["sampler_logp"] for b in chosen]).to(DEVICE),
            advantage_N=advantages_B[chosen].repeat_interleave(lengths).to(DEVICE),
            token_share_N=shares_B[chosen].repeat_interleave(lengths).to(DEVICE)))
    even_out(batches)  # by repeating one with share 0: FSDP needs as many on every process
    return batches, counts

def grpo_update(run, rows, advantages_B, step):
    """`epochs` optimizer steps on one rollout, each over all micro-batches of all processes ->
    metrics."""
    cfg = run.cfg
    batches, counts = micro_batches(run, rows, advantages_B)
    sums = defaultdict(float)
    for epoch in range(cfg.epochs):
        for batch in batches:
            if epoch == 0:
                heed_signals()  # nothing is changed yet, and no weights are gathered
            logp_N = response_logp(run.policy, batch.pairs, cfg.temperature)
            if epoch == 0:
                # pi_old is the policy before this update: these very log-probs, held fixed, for no
                # optimizer step comes before all batches are through. So there is no extra forward;
                # rho is exp(0) = 1, and its gradient is that of log pi.
                batch.old_logp_N = logp_N.detach()
                batch.ref_logp_N = reference_logp(run, batch)
                gap_N = batch.old_logp_N - batch.sampler_logp_N
                batch.c_N = gap_N.exp().clamp(max=2.0)  # no odd token may outweigh all others
                # Means over all tokens of the step. A batch that `even_out` has repeated has share
                # 0 and does not count
                is_counted_N = batch.token_share_N > 0
                per_token_N = is_counted_N / counts["tokens"]
                sums["sampler_gap"] += (gap_N.abs() * per_token_N).sum()
                sums["entropy"] -= (batch.old_logp_N * per_token_N).sum()  # its mean is E[-log pi]
            loss, logged = run.objective(batch, logp_N, cfg)
            # FSDP averages gradients over processes; shares are of all processes, so want the sum
            (loss * run.world).backward()
            for name, value in dict(loss=loss.detach(), **logged).items():
                sums[name] += value / cfg.epochs
        grad_norm = optimizer_step(run, step)
    return step_metrics(run, sums, counts, grad_norm)

def make_optimizer(policy, cfg):
    """AdamW without weight decay. 0.95: the second moment remembers 20 steps, not the usual 1000,
    since a run is short and gradients change their size."""
    group = dict(params=policy.parameters(), peak_lr=cfg.lr)  # frozen ones get no gradient
    return torch.optim.AdamW([group], betas=(0.9, 0.95), weight_decay=0.0, fused=True)

def optimizer_step(run, step):
    """Clip, step with the learning rate of `step`, zero -> the gradient's norm. A gradient that is
    not finite is skipped and counted; ten in a row stop the run. Every process must call it."""
    cfg = run.cfg
    state = run.state
    warmup = min(1, step / max(1, cfg.warmup))
    cosine = 0.55 + 0.45 * math.cos(math.pi * step / cfg.steps)  # from 1 down to a tenth
    grad_norm = 0.0
    for group in run.optimizer.param_groups:  # one; a fork may have more
        group["lr"] = group["peak_lr"] * warmup * cosine
        norm = nn.utils.clip_grad_norm_(group["params"], cfg.grad_clip)
        norm = norm.full_tensor()  # of all processes' shards
        grad_norm += norm.item()  # a CPU-GPU sync point
    if math.isfinite(grad_norm):  # it is not where the loss is not
        run.optimizer.step()  # on this process's shards
        state["updates"] += 1
        state["skipped_in_a_row"] = 0
    else:
        state["skipped"] += 1
        state["skipped_in_a_row"] += 1
        say(f"warning: step {step}: the loss or its gradient is not finite: skipped")
    run.optimizer.zero_grad()  # to None: no gradient memory while sampling
    if state["skipped_in_a_row"] >= 10:
        raise Stopped(f"step {step}: the loss or gradient of ten updates in a row was not finite")
    return grad_norm

@dataclass
class Run:
    """What a step reads, made by `setup`. A fork is a file of its own that sets one of the last
    four, or hands `train` a step of its own. The smallest, ablations/NAME.py:

        from mogrpo import *

        def plain_points(scores_PGK, weights_K, cfg):
            return weights_K * centred(scores_PGK)

        def main(cfg):
            run = setup(cfg)
            run.combine = plain_points
            train(run, grpo_step)

        if __name__ == "__main__":
            launch(main, Config, __doc__, TOY)
    """
    cfg: Config
    rank: int                     # number of this process
    world: int                    # number of processes
    dtype: torch.dtype            # of compute
    mesh: dist.DeviceMesh         # over which every model is sharded
    policy: nn.Module             # in training
    reference: nn.Module          # its frozen start; None with LoRA (it is the policy without its
                                  # adapter) and with beta = 0
    reward_models: list
    rules: SimpleNamespace        # None if there are none; likewise truth
    truth: SimpleNamespace
    axes: list                    # names of the K axes: the columns of all scores
    weights_K: torch.Tensor
    prompts: list                 # dicts of record (a line of the file), messages, ids, tag, ...
    heldout: list
    optimizer: torch.optim.Optimizer
    trained: nn.Module            # whose weights and moments a checkpoint holds
    state: dict                   # counters and such, in the checkpoint as JSON
    seconds: dict                 # of the step's phases so far
    experience: Callable          # `experience`: (run, step) -> this process's rows, scores_BK
    combine: Callable             # `combine_sum` or `combine_gdpo`
    update: Callable              # `grpo_update`: (run, rows, advantages_B, step) -> metrics
    objective: Callable           # `objective`: (batch, logp_N, cfg) -> loss, what is logged

def train(run, one_step):
    """Call `one_step(run, step)` (here `grpo_step`) until cfg.steps, and log, evaluate, save, stop
    and resume around it. A step of your own works in `timed` blocks, updates by `optimizer_step`,
    which counts (Adam is told the number when it resumes), and returns the metrics that `log_step`
    prints."""
    cfg = run.cfg
    state = run.state
    open_out_dir(cfg, run.trained, run.optimizer, state)  # a fresh folder, or the run to resume
    open_logs(run)
    catch_signals()
    try:
        for step in range(state["step"] + 1, cfg.steps + 1):
            # Here and not after a step, so that a run that is resumed here has its evaluation
            if step == 1 or (cfg.eval_interval and (step - 1) % cfg.eval_interval == 0):
                evaluate(run, step - 1)
            metrics = one_step(run, step)
            state["step"] = step
            log_step(run, step, metrics)
            if step == cfg.steps or (cfg.save_interval and step % cfg.save_interval == 0):
                save_checkpoint(cfg.out_dir, run.trained, run.optimizer, state)
        evaluate(run, state["step"])
    except Stopped as stop:  # all processes at once; what the next step had begun is dropped
        save_checkpoint(cfg.out_dir, run.trained, run.optimizer, state)
        saved = f"step {state['step']} is saved in {cfg.out_dir}; --resume goes on there"
        require(not stop.args, f"{stop}; {saved}")  # a message: it is a failure
        say(f"stopped: {saved}")  # none: Ctrl-C
        return
    require(state["updates"] > 0, "nothing was learned: no update succeeded")
    save_results(run)

def main(cfg):
    train(setup(cfg), grpo_step)  # a fork calls these two, too

# --------------------------------------------------------------------------------------------------
# 4. Machinery, for when you need it. 4.1 What a run is made of

def setup(cfg, weights=torch.float32):
    """Models, rewards, prompts and optimizer of a run. Nothing is written here: a run refused for
    its input leaves no trace. `weights`: the dtype of those that are trained."""
    require(cfg.prompts and (cfg.reward_model or cfg.rules),
            "give --prompts=FILE.jsonl, and --reward_model=DIR or --rules=FILE.py or both")
    run = SimpleNamespace(cfg=cfg, reference=None, seconds=defaultdict(float))
    run.experience = experience
    run.combine = COMBINE[cfg.combine]
    run.update = grpo_update
    run.objective = objective
    run.rank, run.world, run.dtype = join_world(cfg.dtype)
    run.mesh = device_mesh(cfg.hsdp)  # one for all models
    policy = load_policy(cfg.policy, cfg.day).to(weights)  # `shard` will read them
    run.policy = run.trained = policy
    set_threads(policy)  # on a CPU
    was_bfloat16 = cfg.dtype == "auto" and policy.config.dtype == torch.bfloat16
    if was_bfloat16 and not CUDA and torch.cpu._is_avx512_bf16_supported():
        say("--dtype=bfloat16 would be up to twice as fast on this CPU; the policy was saved in it")
    torch.manual_seed(cfg.seed)  # a LoRA adapter starts at random
    if cfg.lora_rank > 0:
        add_lora(policy, cfg.lora_rank, cfg.lora_alpha)

    # What is cheap to check comes first
    prompts, run.heldout = split_prompts(cfg, policy)
    run.prompts = prompts
    require(len(prompts) >= cfg.prompts_per_step >= run.world, f"{cfg.prompts}: there must be at "
            f"least as many prompts to train on ({len(prompts)} prompts here) as "
            f"--prompts_per_step={cfg.prompts_per_step}, and these as processes ({run.world})")
    run.rules = load_rules(cfg.rules, prompts[0])
    run.truth = load_rules(cfg.truth, prompts[0])
    run.reward_models = load_reward_models(cfg.reward_model, cfg.day)
    for reward_model in run.reward_models:
        most = reward_model.tokenizer.model_max_length - cfg.max_new_tokens
        long = sum(len(prompt["ids"]) > most for prompt in prompts)  # in the policy's tokens
        if long > 0:
            warn(f"{reward_model.name_or_path}: with {long} of {len(prompts)} prompts a long "
                 "response would be read without their beginning")
    run.axes = axes_of(run.reward_models, run.rules)  # K names
    weight_of = axis_numbers("weights", cfg.weights, run.axes, 1e6)
    run.weights_K = torch.tensor([weight_of.get(axis, 1.0) for axis in run.axes])
    require(run.weights_K.sum() > 0, f"--weights={cfg.weights}: all axes weigh 0, or there is none")

    # The policy in training, and its frozen start as reference. With LoRA the reference is the
    # policy without its adapter: no memory of its own. With beta = 0 there is none
    shard(policy, run.dtype, cfg.recompute, run.mesh)
    choose_way(policy, cfg)  # the fast one, or the library's own
    if cfg.beta > 0 and cfg.lora_rank == 0:
        reference = load_policy(cfg.policy).requires_grad_(False)
        run.reference = shard(reference, run.dtype, mesh=run.mesh)
        go(reference, policy.fast)
    for reward_model in run.reward_models:
        shard(reward_model, run.dtype, mesh=run.mesh)
    run.optimizer = make_optimizer(policy, cfg)
    texts = fingerprint([prompt["ids"] for prompt in prompts + run.heldout])
    run.state = dict(step=0, updates=0, skipped=0, skipped_in_a_row=0, first={}, log_sizes={},
                     texts=texts)
    return Run(**vars(run))

def fingerprint(ids):
    """A number by which --resume knows the texts that a run began with."""
    return hash(tuple(map(tuple, ids)))  # of whole numbers: alike in every process

def axes_of(reward_models, rules):
    """The K names of the columns of `score_responses`."""
    axes = [axis for reward_model in reward_models for axis in reward_model.axes]
    if rules:
        axes += rules.axes
    check_axes(axes, "the rewards")
    return axes

def check_axes(axes, where):
    is_name = re.compile(r"[^\s=,]([^=,]*[^\s=,])?").fullmatch
    require(all(isinstance(axis, str) and is_name(axis) for axis in axes)
            and len(set(axes)) == len(axes), f"{where}: their axes {axes} must have names, no two "
            "the same, without , and = and spaces around")

def axis_numbers(flag, text, axes, most):
    """The value of --weights or another such flag, "safety=2,politeness=1" -> {axis: number}."""
    numbers = {}
    for pair in text.split(",") if text else []:
        axis, _, number = pair.partition("=")  # "safety", "2"
        require(axis in axes, f"--{flag}: no axis is named {axis!r}; there are {', '.join(axes)}")
        require(axis not in numbers and is_number(number) and 0 <= float(number) <= most,
                f"--{flag}: {pair}: expected axis=number, from 0 to {most:g} and each axis once")
        numbers[axis] = float(number)
    return numbers

def load_prompts(path, policy, cfg):
    """Prompts file -> dicts of record (the whole line), where (its file and number), messages, tag,
    ids, index; those of more than `max_prompt_tokens` tokens, or for which the model has no
    positions, are left out and counted."""
    longest = min(cfg.max_prompt_tokens, positions_of(policy) - cfg.max_new_tokens)
    prompts = []  # all in memory, as token ids
    spelled = []  # where special tokens are spelled out
    for index, (where, record) in enumerate(read_jsonl(path)):
        messages = conversation(where, record)
        tag = record.get("tag")
        ids = render(policy.tokenizer, messages)
        if 0 < len(ids) <= longest:
            prompts.append(dict(record=record, where=where, messages=messages, index=index, ids=ids,
                                tag=tag if tag is None else str(tag)))  # 0 is one
        if any(policy.tokenizer.specials.search(m["content"]) for m in messages):
            spelled.append(where)
    if spelled:
        warn(f"{len(spelled)} prompts spell out special tokens of the policy, the first at "
             f"{spelled[0]}: they are read as text. A prompt must not hold its chat template")
    skipped = index + 1 - len(prompts)  # of all records
    if skipped > 0:
        say(f"warning: {skipped} prompts in {path} are empty or longer than {longest} tokens (by "
            f"--max_prompt_tokens, or the model's positions less --max_new_tokens): skipped")
    return prompts

def positions_of(model):
    """How many tokens a row may have. Where rotary frequencies change with the length (longrope,
    dynamic), only the original length: past it a token's log-prob would depend on its neighbours'
    lengths in the micro-batch."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}  # of rotary positions, if it has them
    if rope.get("rope_type") in ("longrope", "dynamic"):
        return rope.get("original_max_position_embeddings") or config.max_position_embeddings
    positions = getattr(config, "max_position_embeddings", None) or -1
    if positions < 0:  # it has no such limit
        return math.inf
    for module in model.modules():  # RoBERTa and its kin count from behind the pad token's number
        is_theirs = isinstance(module, nn.Embedding) and module.num_embeddings == positions
        if is_theirs and module.padding_idx is not None:
            positions -= 1 + module.padding_idx
    return positions

def split_prompts(cfg, policy):
    """Prompts to train on, and those held out."""
    prompts = load_prompts(cfg.prompts, policy, cfg)
    if cfg.heldout_prompts:
        return prompts, load_prompts(cfg.heldout_prompts, policy, cfg)
    fraction = min(0.05, 64 / (1 + len(prompts)))  # one in twenty, and about 64 at most
    kept = []
    heldout = []
    for prompt in prompts:
        side = heldout if is_held_out(prompt["messages"], fraction, cfg.seed) else kept
        side.append(prompt)
    return kept, heldout

def is_held_out(messages, fraction, seed):
    """Split by a hash of the last user's words: all that share them fall on one side, whatever the
    order of the file, the system message, spaces or capitals."""
    words = " ".join(messages[-1]["content"].lower().split())
    return random.Random(repr((seed, [dict(role="user", content=words)]))).random() < fraction

def prompts_of_step(run, step):
    """This process's prompts of a step."""
    size = run.cfg.prompts_per_step
    # What is left over waits for another pass
    finished_passes, turn = divmod(step - 1, len(run.prompts) // size)
    order = order_of_pass(len(run.prompts), run.cfg.seed, finished_passes)
    of_step = order[turn * size:(turn + 1) * size]
    return [run.prompts[i] for i in of_step[run.rank::run.world]]

@lru_cache(1)
def order_of_pass(count, seed, number):
    """Each pass over the data has an order of its own, from the seed and the number of the pass, so
    that there is no state to save."""
    order = list(range(count))
    random.Random(repr((seed, number))).shuffle(order)
    return order

# --------------------------------------------------------------------------------------------------
# 4.2 Rewards

SCORED_TOKENS = 16384 if CUDA else 1024  # in one forward; a CPU is faster on rows of one length

ACTIVATIONS = dict(single_label_classification=partial(torch.softmax, dim=-1),
                   multi_label_classification=torch.sigmoid, regression=nn.Identity())

def load_reward_model(path, max_tokens=10**9, day="", **head):
    """The library's sequence classifier: a backbone with one linear layer of K outputs, whose
    sigmoids are the scores, or what the folder's problem_type says. The folder loads anywhere and
    gives the same scores there. `head`: num_labels, id2label, label2id of a fresh head; none:
    `path` has a named one. Its attribute `axes` are the K names."""
    model = load(AutoModelForSequenceClassification, path, day, **head)
    tokenizer = model.tokenizer
    config = model.config.get_text_config()
    if head:
        config.pad_token_id = tokenizer.pad_token_id
    model.pad = config.pad_token_id  # see `logits_of`
    if model.pad == -1:  # as some write that there is none
        model.pad = None
    config.use_cache = False  # a block that is run again would add to it again
    # Too long a text loses its beginning: the response stands last
    tokenizer.model_max_length = min(tokenizer.model_max_length, max_tokens, positions_of(model))
    model.axes = [model.config.id2label[k] for k in range(model.config.num_labels)]
    require("LABEL_0" not in model.axes, f"{path}: its id2label does not name the axes")
    check_axes(model.axes, path)
    model.problem = model.config.problem_type or "multi_label_classification"
    if not model.config.problem_type:
        warn(f"{path}: its config.json has no problem_type: every axis is a sigmoid")
    for axis in model.axes:
        if re.match(r"(un(?=safe)|toxic|harmful|hate|offensive|insult|threat|obscene)", axis, re.I):
            warn(f"{path}: more {axis!r} counts as better. If it is not: --weights={axis}=0, or a "
                 "rule of your own")
    return model

def load_reward_models(paths, day=""):
    """Folders, comma-separated -> frozen reward models, for `shard` to read their weights."""
    paths = paths.split(",") if paths else []
    return [load_reward_model(path, day=day).requires_grad_(False) for path in paths]

def encode(reward_model, texts):
    """(messages, response) pairs -> lists of token ids. Too long a text loses its beginning, which
    is told."""
    tokenizer = reward_model.tokenizer
    most = tokenizer.model_max_length
    rows = [render(tokenizer, *text) for text in texts]
    start, _ = tokenizer.frame
    cut = [n for n, row in enumerate(rows) if len(row) > most]
    for n in cut:
        rows[n] = start + rows[n][len(rows[n]) - most + len(start):]
    if cut:
        warn(f"{reward_model.name_or_path}: some texts have more than {most} tokens: their "
             "beginning is cut off")
        if any(len(tokenize(tokenizer, texts[n][1])) > most for n in cut):
            warn(f"{reward_model.name_or_path}: of some even the answer's beginning is cut off")
    return rows

def logits_of(reward_model, ids):
    """Lists of token ids -> logits_NK; padded on the right. The head of a decoder reads at the last
    token that is not the folder's pad token: where it names none, that is one that no text
    holds."""
    pad = reward_model.pad
    if pad is None:
        held = set().union(*ids)
        pad = next(token for token in range(reward_model.tokenizer.rows) if token not in held)
    reward_model.config.get_text_config().pad_token_id = pad
    reward_model.tokenizer.pad_token_id = pad
    return reward_model(**batch_of(reward_model, ids, "right")).logits.float()

@torch.no_grad()
def score(reward_model, texts):
    """scores_NK (float32, CPU; in [0, 1], but for those of a regression) of N (messages, response)
    pairs, by a whole or `gathered` model."""
    ids = encode(reward_model, texts)
    scores_NK = torch.zeros(len(texts), len(reward_model.axes))
    for numbers in by_length([len(row) for row in ids], SCORED_TOKENS):
        logits = logits_of(reward_model, [ids[n] for n in numbers])
        scores_NK[numbers] = ACTIVATIONS[reward_model.problem](logits).cpu()
    return scores_NK

def by_length(lengths, budget):
    """Row numbers in batches of at most `budget` tokens and about one length: little is padding.
    Longest first: what does not fit in memory fails at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        n = max(1, budget // lengths[order[0]])  # rows as long as the longest that is left
        yield order[:n]
        order = order[n:]

def load_rules(path, prompt):
    """A Python file with `scores(record, response) -> {axis: number or None}`, or with
    `group_scores(record, responses) -> [dict, ...]`, which sees a whole group -> a namespace of its
    path, function, sees_groups and axes (None for no path). The function is tried on an empty
    response to `prompt`: what fails fails now, and its axes are known."""
    if not path:
        return None
    rules = SimpleNamespace(path=path)
    try:
        module = import_file(path)
        rules.sees_groups = hasattr(module, "group_scores")
        rules.function = module.group_scores if rules.sees_groups else module.scores
        row = dict(prompt=prompt, text="", tokens=0, truncated=False)
        [call] = calls_of(rules, [[row]])
        answer = call()
        rules.axes = list(answer[0] if rules.sees_groups else answer)  # in the order of its dict
    except Exception as e:  # a program of the user's
        die(f"{path}: scores(record, response) failed on an empty response: {e!r}")
    check_axes(rules.axes, path)
    return rules

def import_file(path):
    """Import a Python file under its own name, so that it can import its neighbours, and the
    processes that it may start can import it."""
    folder, name = os.path.split(os.path.realpath(path))
    sys.path.insert(0, folder)
    module = importlib.import_module(name.removesuffix(".py"))
    require(os.path.realpath(module.__file__) == f"{folder}/{name}",
            f"{path}: {module.__file__} has the same name; rename one of them")
    return module

def calls_of(rules, units):
    """For each unit of rows, all of a group or a single one, a call that returns what the user's
    function says of it, or raises what it raises."""
    calls = []
    for unit in units:
        seen = {}  # of a group: lists
        for key in ("text", "tokens", "truncated"):
            values = [row[key] for row in unit]
            seen[key] = values if rules.sees_groups else values[0]
        text = seen.pop("text")
        calls.append(partial(rules.function, unit[0]["prompt"]["record"] | seen, text))
    if inspect.iscoroutinefunction(rules.function):  # a judge behind a server: all at once
        calls = RUNNER.run(finished(calls))  # they return or raise what is known now
    return calls

# Starts an event loop when it is needed, the same for the whole run: clients of servers and
# semaphores belong to a loop
RUNNER = asyncio.Runner()

async def finished(calls):
    tasks = [asyncio.create_task(call()) for call in calls]
    await asyncio.gather(*tasks, return_exceptions=True)  # one that fails stops no other
    return [task.result for task in tasks]

def numbers_of(rules, answer, n):
    """An answer on n rows -> n lists of K numbers; raises where one is not a number."""
    found = answer if rules.sees_groups else [answer]  # n dicts of scores
    assert len(found) == n, f"{len(found)} answers on {n} responses"
    numbers = []
    for scores in found:
        assert set(scores) == set(rules.axes), f"axes {list(scores)}, before {rules.axes}"
        values = [scores[axis] for axis in rules.axes]
        numbers.append([math.nan if x is None else float(x) for x in values])
    return numbers

def rule_scores(rules, rows):
    """The rules' scores of the rows of `rollout` -> scores_BK; nan or None: an axis has nothing to
    say about a response. Where the rules fail, a response has no score on any of their axes, and it
    is told; where they fail on all of the step's, the run ends. Every process must call it."""
    units = [[row] for row in rows]  # what the function sees at a time
    if rules.sees_groups:
        units = groups_of(rows)
    scores = []
    failures = []
    for unit, call in zip(units, calls_of(rules, units)):
        try:
            scores += numbers_of(rules, call(), len(unit))
        except Exception as e:
            scores += [[math.nan] * len(rules.axes)] * len(unit)  # no score on any axis
            failures.append(f"{unit[0]['prompt']['where']}: {e!r}")
    all_failures = sum(collect([failures]), [])  # of all processes
    calls = sum(collect([len(units)]))
    if all_failures:
        told = f"{rules.path} failed in {len(all_failures)} of {calls} calls: {all_failures[0]}"
        if len(all_failures) == calls:
            raise Stopped(told)
        say(f"warning: {told}")
    return torch.tensor(scores).view(len(rows), len(rules.axes))

def group_metrics(run, scores_PGK, parts_PGK):
    """What the rewards saw and what moves the policy in a step -> name: mean over all groups.
    score, missing: of the responses that an axis says something about, and the share of others.
    std, zero_std: spread within a group, and the share of groups an axis leaves without a signal:
    its spread there is below std_floor of that over the step.
    share: of the variance of the advantages, what an axis brings; they sum to 1, and an axis
    against which the policy is pushed has a negative one.
    conflict: share of responses above their group's mean on one axis and below it on another."""
    centred_PGK = centred(scores_PGK)
    std_P1K = std_of_scored(scores_PGK, 1)
    floor_11K = run.cfg.std_floor * std_of_scored(scores_PGK, (0, 1))
    advantages_PG1 = parts_PGK.sum(-1, keepdim=True)  # A of each response
    deviation_PG1 = advantages_PG1 - advantages_PG1.mean()  # the mean is 0, but for some forks
    share_PGK = parts_PGK * deviation_PG1 / deviation_PG1.var(correction=0).clamp(min=1e-12)
    above_PG = (centred_PGK > floor_11K).any(-1)
    below_PG = (centred_PGK < -floor_11K).any(-1)
    rewards_PG = (run.weights_K * centred_PGK).sum(-1)  # less their group's mean
    metrics = dict(reward=(run.weights_K * scores_PGK).nanmean((0, 1)).nansum().item(),
                   reward_std=rewards_PG.std(1, correction=0).mean().item(),
                   conflict=(above_PG & below_PG).float().mean().item())
    by_axis = dict(score=scores_PGK, missing=scores_PGK.isnan(), std=std_P1K,
                   zero_std=~(std_P1K > floor_11K), share=share_PGK)  # nan: no scores
    for name, values in by_axis.items():  # PGK or P1K
        for axis, mean in zip(run.axes, values.float().nanmean((0, 1)).tolist()):  # K means
            metrics[f"{name}/{axis}"] = mean
    return metrics

# --------------------------------------------------------------------------------------------------
# 4.3 The policy: log-probs, plain and packed; LoRA; which way is taken

CHUNK_LOGITS = 2**27  # logits that exist at a time when responses are scored: 512 MB in float32

def load_policy(path, day=""):
    """The library's causal model of a folder or hub id, its weights not read yet (see `load`). Its
    attributes: tokenizer, eos (its end tokens), generation (the folder's settings), fast (see
    `choose_way`) and adapted (read at every forward; off, one with LoRA is its own reference)."""
    policy = load(AutoModelForCausalLM, path, day)
    policy.fast = False
    policy.adapted = True
    policy.packed_logp = partial(packed_logp, policy)  # FSDP makes it a forward: see `shard`
    try:
        policy.generation = transformers.GenerationConfig.from_pretrained(path)
    except OSError:  # there is none: the library has made one of the config
        policy.generation = policy.generation_config
    policy.generation_config = transformers.GenerationConfig()  # no top-k, no penalties
    # Instruct models name several end tokens, in several places
    eos = policy.generation.eos_token_id  # a number, a list or nothing
    eos = eos if isinstance(eos, list) else [eos]
    named = {*eos, policy.tokenizer.eos_token_id, None}
    # And some name another one than that by which their template closes a turn (base models)
    end = turn_end(policy.tokenizer)
    policy.eos = sorted({*named, end} - {None})
    if end not in named:
        policy.generation.eos_token_id = policy.eos  # others must stop there, too
        warn(f"{path}: its template closes a turn with {policy.tokenizer.decode([end])!r}, which "
             "its configs do not name as an end token: it is taken for one, too")
    return policy

def reference_logp(run, batch):
    """log pi_ref of a micro-batch -> ref_logp_N. With beta = 0 it does not matter: pi_old's do."""
    if run.cfg.beta == 0:
        return batch.old_logp_N
    assert run.reference or run.cfg.lora_rank > 0, "beta was 0 at setup: there is no reference"
    run.policy.adapted = False  # without its adapter the policy is the reference, bit for bit
    with torch.no_grad():
        logp_N = response_logp(run.reference or run.policy, batch.pairs, run.cfg.temperature)
    run.policy.adapted = True
    return logp_N

def packed_logp(policy, batch, temperature):
    """logp_N by a row without padding in which neighbours share their prompt, and by logits that
    are made a chunk at a time, and again in the backward pass: at V = 150,000 those of 16,384
    tokens would be 10 GB. The price is the head's matmul once more."""
    hidden_ND, targets_N = packed_hidden(policy, batch.pairs)

    def chunk_logp(hidden_ND, targets_N):
        return token_logp(head_logits(policy, hidden_ND, temperature), targets_N)

    chunk = CHUNK_LOGITS // policy.config.get_text_config().vocab_size
    if len(targets_N) > chunk:
        chunk_logp = recomputed(chunk_logp)
    chunks = zip(hidden_ND.split(chunk), targets_N.split(chunk))
    return torch.cat([chunk_logp(*both) for both in chunks])

def head_logits(policy, hidden_ND, temperature):
    return policy.get_output_embeddings()(hidden_ND / temperature)  # linear: V divisions saved

def packed_hidden(policy, pairs):
    """hidden_ND of the tokens before each response token, and these tokens: targets_N."""
    inputs, predictors_N, targets_N = layout(pairs)
    hidden_1MD = policy.base_model(**inputs, use_cache=False).last_hidden_state
    return hidden_1MD[0, predictors_N], targets_N

def layout(pairs):
    """(prompt_ids, response_ids) pairs -> the model's inputs, predictors_N, targets_N. Neighbours
    whose prompt is the very same list share it:

        [ padding | prompt 1 | response 1 | ... | response G | prompt 2 | response 1 | ... ]

    All tokens stand end to end in one row of M: p + G r tokens instead of G (p + r). Positions go
    on after the prompt in each of its responses, and the segments, one of all prompts and one of
    all responses, tell `attend` who sees whom. The end token is a target like any other; the last
    token of a response predicts nothing, so it is not there. For example, of the prompt [7, 8] and
    its responses [5, 2] and [6, 2], where 2 ends:

        ids        0 7 8 5 6        positions  0 0 1 2 2
        predictors 2 3 2 4          targets    5 2 6 2
        segments   prompts: tokens [1 2] see [1 2]; responses: [3] sees [1 2 3], [4] sees [1 2 4]
    """
    ids = [0]  # the padding of segments: one token
    positions = [0]
    prompts, responses = [], []  # of each text, where in the row its tokens are and what they see
    predictors, targets = [], []

    def append(tokens, context):
        first = len(ids)
        ids.extend(tokens)
        seen = [*context, *range(first, len(ids))]  # by the last of them
        positions.extend(range(len(context), len(seen)))
        return seen

    shared = None
    for prompt, response in pairs:
        if prompt is not shared:
            shared = prompt
            context = append(prompt, [])
            prompts.append((context, context))
        seen = append(response[:-1], context)
        responses.append((seen[len(prompt):], seen))
        predictors += seen[len(prompt) - 1:]  # the prompt's last predicts the first
        targets += response
    position_M = device_tensor(positions)
    inputs = dict(input_ids=device_tensor([ids]), position_ids=position_M[None],
                  segments=[segment(prompts, position_M), segment(responses, position_M)])
    return inputs, device_tensor(predictors), device_tensor(targets)

def segment(texts, position_M):
    """Where the tokens of B texts are in the row of M and where all that they see is, in the order
    of positions -> query_BT and key_BS, padded, and the masks between them."""
    queries, keys = zip(*texts)
    query_BT = padded(queries)
    key_BS = padded(keys)
    key_BS = nn.functional.pad(key_BS, (0, -key_BS.shape[1] % 8))  # or fused attention copies masks
    back_BTS = position_M[query_BT][..., None] - torch.arange(key_BS.shape[1], device=DEVICE)
    masks = lru_cache(partial(mask_of, back_BTS))  # once for all layers of one kind
    return SimpleNamespace(query_BT=query_BT, key_BS=key_BS, masks=masks)

MASKED = -1e9  # added to a product before the softmax, it leaves exactly 0

def mask_of(back_BTS, heads, window, dtype):
    """What is added to the products, of so many query heads that share a key's. A query sees what
    is 0 to `window` - 1 tokens back."""
    is_masked_BTS = (back_BTS < 0) | (back_BTS >= (window or math.inf))
    return (MASKED * is_masked_BTS).to(dtype).repeat(1, heads, 1)[:, None]

def attend(module, query, key, value, attention_mask, segments=(), cache=None, scaling=None,
           sliding_window=None, softcap=None, **_):
    """The attention of the policy's layers in place of the library's, whose decoders all call one
    interface: [B, heads, T, d] -> [B, T, heads, d]. With segments: one row of M tokens, cut into
    the rows of each segment and put together again; a cache keeps its keys and values. Without
    segments: one token of each row in the cache."""
    assert softcap is None, "it caps its attention"
    how = dict(window=sliding_window, scaling=scaling)
    if not segments:
        key, value = cache.append(module.layer_idx, key, value)
        return attention(query, key, value, cache.masks, **how), None
    mixed = torch.zeros_like(query[0].transpose(0, 1))  # [M, heads, d]
    for s in segments:
        rows = take_rows(query, s.query_BT), take_rows(key, s.key_BS), take_rows(value, s.key_BS)
        mixed_BThd = attention(*rows, s.masks, **how)
        mixed.index_copy_(0, s.query_BT.flatten(), mixed_BThd.flatten(0, 1))
    if cache is not None:  # each of its rows gets its prompt's
        cache[module.layer_idx] = [take_rows(x, cache.place_RS).contiguous() for x in (key, value)]
    return mixed[None], None

def take_rows(x, numbers_BT):
    """[1, heads, M, d] -> [B, heads, T, d]"""
    # Not by x[0][:, numbers_BT], whose gradient is slower
    rows = x[0].index_select(1, numbers_BT.flatten()).unflatten(1, numbers_BT.shape)
    return rows.transpose(0, 1)

def attention(query, key, value, masks, window, scaling):
    """[B, heads, T, d] -> [B, T, heads, d]. Query heads that share a key's are taken as one head of
    more queries, so that no key is copied; the mask is repeated for them."""
    B, heads, T, d = query.shape
    mask = masks(heads // key.shape[1], window, query.dtype)
    query = query.reshape(B, key.shape[1], -1, d)  # [B, heads of keys, so many queries, d]
    # Fused: bfloat16's products are not rounded before the softmax
    mixed = nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scaling)
    return mixed.reshape(B, heads, T, value.shape[3]).transpose(1, 2)

transformers.AttentionInterface.register("mogrpo", attend)

def add_lora(policy, rank, alpha):
    """LoRA (2106.09685) on all linear layers of the blocks: W x becomes W x + (alpha / rank) B A x,
    of which A and B are trained. W needs neither float32 copy, gradient nor moments."""
    policy.requires_grad_(False)

    def adapt(linear, inputs, y):
        if policy.adapted:
            return y + linear.lora_scale * linear.lora_B(linear.lora_A(inputs[0]))

    linears = [m for m in blocks(policy).modules() if isinstance(m, nn.Linear)]
    require(linears, f"--lora_rank: the blocks of {type(policy).__name__} have no nn.Linear")
    for linear in linears:
        linear.lora_A = nn.Linear(linear.in_features, rank, bias=False)
        linear.lora_B = nn.Linear(rank, linear.out_features, bias=False)
        nn.init.zeros_(linear.lora_B.weight)  # at first no change
        linear.lora_scale = alpha / rank
        linear.register_forward_hook(adapt)  # W keeps its name and place
    named = policy.named_parameters()
    policy.added = {name: p.data for name, p in named if "lora_" in name}  # for `load_weights`

def save_adapter(policy, path, cfg):
    """Write the adapter alone, in PEFT's format: `PeftModel.from_pretrained(base_model, path)`."""
    adapter = {}  # whole weights of one rank: small
    for name, p in policy.named_parameters():
        if p.requires_grad:  # gathered by all processes together
            adapter[f"base_model.model.{name}"] = p.full_tensor().cpu()
    if IS_FIRST:
        layers = {name.split(".")[-3] for name in adapter}  # q_proj, ...
        os.makedirs(path, exist_ok=True)
        save_file(adapter, f"{path}/adapter_model.safetensors", metadata={"format": "pt"})
        write_text(f"{path}/adapter_config.json", json.dumps(dict(
            peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=cfg.policy,
            r=cfg.lora_rank, lora_alpha=cfg.lora_alpha, target_modules=sorted(layers))))

def go(policy, fast):
    """Let a policy take the fast way, or the library's own."""
    policy.fast = fast
    policy.set_attn_implementation("mogrpo" if fast else policy.stock_attention)

@torch.no_grad()
def choose_way(policy, cfg):
    """Take the fast way where it gives the library's numbers: log-probs of the whole vocabulary, at
    the run's temperature, with these weights, on a text as long as the run's longest row: so past
    the model's attention window, if any row is. The bound calibrates itself: the library's own two
    ways, with its cache and without, differ by e (bfloat16's rounding grows with the logits), and
    ours may by 2 e."""
    temperature = max(0.1, cfg.temperature)  # of eval.py's 0 no log-prob can be compared
    T = min(16, cfg.max_new_tokens)  # turns of a cache that are compared
    longest = min(cfg.max_prompt_tokens + cfg.max_new_tokens, positions_of(policy)) - T
    draw = random.Random(0).choices
    vocabulary = range(policy.config.get_text_config().vocab_size)
    prompts = [draw(vocabulary, k=length) for length in (longest, 5)]  # words at random; P is 2

    def gap(logits_PTV):
        difference_PTV = logits_PTV.float().log_softmax(-1) - stock_PTV.log_softmax(-1)
        return difference_PTV.abs().max().item()

    go(policy, fast=False)
    with gathered(policy):
        out = policy.generate(**batch_of(policy, prompts), max_new_tokens=T, do_sample=False,
                              pad_token_id=0, output_logits=True, return_dict_in_generate=True)
        tokens_PT = out.sequences[:, -T:]
        pairs = list(zip(prompts, tokens_PT.tolist()))
        stock = [plain_logits(policy, [pair]) for pair in pairs]  # without padding
        stock_PTV = torch.stack(stock).float() / temperature
        e = gap(torch.stack(out.logits, 1) / temperature)
        most = 10 if stock[0].dtype == torch.bfloat16 else 1  # of broken weights it is nan
        require(e < most, f"{policy.name_or_path}: no causal language model, or broken weights: "
                f"the library's log-probs with its cache and without differ by {e:.2g}")
        try:
            go(policy, fast=True)
            hidden_ND, _ = packed_hidden(policy, pairs)
            packed_PTV = head_logits(policy, hidden_ND, temperature).view_as(stock_PTV)
            logits_PV, cache = prefill(policy, prompts, T, temperature)
            decoded = [logits_PV]
            for token_P in tokens_PT[:, :-1].T:
                decoded.append(decode(policy, cache, token_P, temperature))
            decoded_PTV = torch.stack(decoded, 1)
            differ = gap(torch.stack([packed_PTV, decoded_PTV]))
            reason = f"ours differ by {differ:.2g}, its own two ways by {e:.2g}"
            if USE_GRAPHS:
                try_recording(lambda: decode(policy, cache, tokens_PT[:, 0], temperature))
        except Exception as error:  # models of others fail in any way they like
            differ, reason = math.inf, f"ours fail: {last_line(error)}"
    is_equal = all(collect([differ <= 2 * e + 1e-5]))
    go(policy, cfg.fast and is_equal)
    if not is_equal:
        say(f"{policy.name_or_path}: by the library's cache and logits, slower: {reason}")

# --------------------------------------------------------------------------------------------------
# 4.4 Sampling: gathered weights, the fast sampler

@contextmanager
def gathered(model):
    """Inside, every process holds all of `model`, gathered once, and no forward needs a collective
    (no gradients here): processes may run different numbers of forwards. A sharded model by itself
    would gather every layer for every sampled token."""
    fsdp_modules = []  # root and blocks, with their hooks
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()  # one all-gather: the only collectives while tokens are sampled
            fsdp_modules.append((module, module._forward_pre_hooks, module._forward_hooks))
            # They would drop the weights again, and cost as much as a small block: off
            module._forward_pre_hooks = {}
            module._forward_hooks = {}
    with torch.no_grad():
        yield
    for module, before, after in fsdp_modules:
        module._forward_pre_hooks = before
        module._forward_hooks = after
        module.reshard()  # frees the copy before the update needs the memory

def batch_of(model, rows, side="left"):
    """Lists of token ids -> input_ids and attention_mask, padded on a side; on the left, so that
    all rows end in the same column."""
    batch = model.tokenizer.pad(dict(input_ids=rows), padding_side=side, return_tensors="pt",
                                return_attention_mask=True)
    return batch.to(DEVICE)

def sample_all(policy, prompts, keys, group_size, cfg):
    """`sample` or `fast_sample`, of whole groups, `sample_rows` at once. Where memory is too short
    for these it goes on with half as many: what is sampled stays the same."""
    sampler = fast_sample if policy.fast else sample
    u_BT = uniforms(keys, cfg.max_new_tokens)
    if cfg.temperature < 1e-20:  # eval.py's 0: of several likeliest tokens the first
        u_BT.zero_()
    responses = []
    logps = []
    while len(responses) < len(prompts):
        at_once = max(1, cfg.sample_rows // group_size) * group_size
        some = slice(len(responses), len(responses) + at_once)
        try:
            more, their_logps = sampler(policy, prompts[some], u_BT[some], cfg.temperature)
        except torch.OutOfMemoryError:
            tried = len(prompts[some])
            if tried <= group_size:
                raise
            cfg.sample_rows = tried // 2
            warn(f"memory is short: --sample_rows={cfg.sample_rows}")
            continue
        responses += more
        logps += their_logps
    return responses, logps

USE_GRAPHS = CUDA
LOOK_EVERY = 64 if CUDA else 4  # tokens between two looks at which rows have ended
# A recording is good for these rows and columns only, and costs as much as dozens of tokens. So on
# a GPU some ended rows stay, and some columns are read that nothing has been written to
MOST_GOING = 0.75 if CUDA else 1  # ended rows leave when less than this share of them is going
WIDTH_STEP = 256 if CUDA else 8  # of columns; 8, or fused attention copies the mask in every call

@torch.no_grad()
def fast_sample(policy, prompts, u_BT, temperature):
    """What `sample` does, but neighbours whose prompt is the very same list read it once, rows
    leave when they have ended, no address changes while tokens are decoded, and nothing waits for
    the GPU: so that a turn can be recorded. Nothing is communicated, so processes may stop at
    different lengths."""
    B, T = u_BT.shape
    u_BT = u_BT.to(DEVICE)
    logp_BT = torch.zeros_like(u_BT)
    tokens_BT = logp_BT.long()  # 0, until they are sampled
    end_tokens = device_tensor(policy.eos)
    row_R = torch.arange(B, device=DEVICE)  # which of the B rows are still decoded: at first all
    # The turn is a tensor, since a recorded graph would not see a Python number change
    t_1 = torch.zeros(1, dtype=torch.long, device=DEVICE)

    def choose(logits_RV):
        token_R, logp_R = pick(logits_RV, u_BT[row_R, t_1])
        tokens_BT[row_R, t_1] = token_R
        logp_BT[row_R, t_1] = logp_R.to(logp_BT.dtype)

    def turn():
        logits_RV = decode(policy, cache, tokens_BT[row_R, t_1], temperature)
        t_1.add_(1)
        choose(logits_RV)

    logits_BV, cache = prefill(policy, prompts, T, temperature)
    choose(logits_BV)
    whole_width = cache.width
    recorded = None  # the turn, as long as rows and columns are the same
    for t in range(1, T, LOOK_EVERY):
        # Here tokens 0 to t - 1 are sampled, and the last of them is not yet in the cache
        has_ended_R = torch.isin(tokens_BT[row_R, :t], end_tokens).any(1)
        going = (~has_ended_R).nonzero().squeeze(1)  # waits for the GPU
        if len(going) == 0 or must_stop():
            break
        if len(going) < MOST_GOING * len(row_R):
            cache.keep(going)
            row_R = row_R[going]
            recorded = None
        turns = min(LOOK_EVERY, T - t)
        width = max(map(len, prompts)) + t + turns - 1  # columns that are read
        width = min(width + -width % WIDTH_STEP, whole_width)
        if width != cache.width:
            cache.width = width
            recorded = None
        recorded = repeat(turn, turns, recorded)
    return up_to_end(tokens_BT, logp_BT, policy.eos)

def prefill(policy, prompts, T, temperature):
    """Read B prompts, neighbours that are the very same list once -> logits_BV of what follows, and
    the cache of the rows, with place for T new tokens."""
    inputs, last_B, _ = layout([(prompt, []) for prompt in prompts])
    place_RS = inputs["segments"].pop().key_BS  # of responses, which have no tokens yet
    cache = Cache()
    # Columns of tokens to come hold anything: they are masked until they are written
    cache.place_RS = nn.functional.pad(place_RS, (0, T + -T % 8))
    cache.width = cache.place_RS.shape[1]
    cache.position_R1 = inputs["position_ids"][0, last_B, None]
    hidden_1MD = policy.base_model(**inputs, cache=cache, use_cache=False).last_hidden_state
    return head_logits(policy, hidden_1MD[0, last_B], temperature), cache

def decode(policy, cache, token_R, temperature):
    """The next token of each row -> logits_RV of what follows it."""
    cache.position_R1.add_(1)
    back_R1S = cache.position_R1[..., None] - torch.arange(cache.width, device=DEVICE)
    cache.masks = lru_cache(partial(mask_of, back_R1S))
    # A mask that `attend` ignores: without any, some models look for padding, and wait for the GPU
    no_mask = cache.position_R1[..., None, None]
    hidden_R1D = policy.base_model(
        input_ids=token_R[:, None], position_ids=cache.position_R1, attention_mask=no_mask,
        cache=cache, use_cache=False).last_hidden_state
    return head_logits(policy, hidden_R1D[:, 0], temperature)

class Cache(dict):
    """Keys and values of the rows that are decoded: {layer: [keys, values]}, [R, heads, columns,
    d], filled by `attend`. A token's column is its position. All columns are there from the
    beginning, written in place and read up to `width`, so that no address changes while tokens are
    decoded."""
    def append(self, layer, *pair):
        """Those of the next tokens -> of all tokens."""
        column_R111 = self.position_R1[:, :, None, None]
        for x, new in zip(self[layer], pair):
            x.scatter_(2, column_R111.expand_as(new), new)
        return [x[:, :, :self.width] for x in self[layer]]

    def keep(self, rows):
        """Go on with these rows only."""
        self.position_R1 = self.position_R1[rows]
        for layer, pair in self.items():
            self[layer] = [x[rows] for x in pair]  # a layer at a time

def repeat(step, n, recorded=None):
    """Call `step` n times. On a GPU it is recorded after the first and then replayed: to launch two
    thousand kernels one by one takes longer than to run them -> the recorded step, which may be
    handed over the next time."""
    for i in range(n):
        if i == 1 and USE_GRAPHS and not recorded:
            recorded = as_graph(step)
        call = recorded or step
        call()
    return recorded

def as_graph(step, stream=None):
    """A call that replays the kernels of `step`, recorded as a CUDA graph and not yet run."""
    graph = torch.cuda.CUDAGraph()
    # thread_local: NCCL's watchdog, a thread of its own, may ask the GPU something meanwhile
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        step()
    return graph.replay

def try_recording(step):
    """Some kernels wait for the GPU (those of some experts) and cannot be recorded. That is found
    out once, on a stream of its own: a recording that fails spoils its stream's memory."""
    global USE_GRAPHS
    try:
        with torch.cuda.stream(torch.cuda.current_stream()):  # however it ends, back to this one
            as_graph(step, torch.cuda.Stream())
    except RuntimeError as e:  # that of the end of the recording; what caused it came before
        cause = e.__context__ or e
        if isinstance(cause, torch.OutOfMemoryError):
            raise cause
        USE_GRAPHS = False
        say(f"sampling goes on without CUDA graphs, slower: {last_line(cause)}")

# --------------------------------------------------------------------------------------------------
# 4.5 The update: micro-batches

def groups_of(rows):
    """The rows of `rollout`, a list for each prompt."""
    return [list(group) for _, group in groupby(rows, lambda row: id(row["prompt"]))]

def packed_together(rows, cfg):
    """Which of the rows of `rollout` make a micro-batch -> lists of row numbers, each of at most
    `micro_tokens` tokens when padded. Most groups stay together, since all of a group count as long
    as its longest."""
    lengths = []
    for group in groups_of(rows):
        widths = [len(row["prompt"]["ids"]) + row["tokens"] for row in group]
        lengths += [max(widths)] * len(widths)
    return by_length(lengths, cfg.micro_tokens)

def even_out(batches):
    """FSDP gathers weights in every forward, so all processes must run equally many: those with
    fewer batches repeat the last one, with no share in the loss."""
    idle = SimpleNamespace(**vars(batches[-1]))
    idle.token_share_N = idle.token_share_N * 0
    batches += [idle] * (max(collect([len(batches)])) - len(batches))

def step_metrics(run, sums, counts, grad_norm):
    """What an update has for metrics.jsonl, summed over processes."""
    return total(sums) | dict(
        grad_norm=grad_norm, length=counts["tokens"] / counts["responses"],
        truncated=counts["truncated"] / counts["responses"],
        lr=run.optimizer.param_groups[0]["lr"], skipped=run.state["skipped"])

@contextmanager
def timed(run, phase):
    """Seconds of a step's phase, for metrics.jsonl."""
    start = time.perf_counter()
    yield
    run.seconds[phase] += time.perf_counter() - start

# --------------------------------------------------------------------------------------------------
# 4.6 Logs and results

LOGS = ("metrics.jsonl", "samples.jsonl")

def open_logs(run):
    """Cut the logs to where the run stands: rows of lost steps go."""
    run.wants_header = True  # above the first line of a table of steps
    run.track = tracker(run.cfg, run.state["step"])
    if IS_FIRST:
        for name in LOGS:
            with open(f"{run.cfg.out_dir}/{name}", "a") as f:
                kept = run.state["log_sizes"].get(name, 0)
                f.truncate(min(kept, f.tell()))  # tell: its size

def tracker(cfg, step):
    """A function that is given each row of metrics.jsonl; None without --tracker."""
    if not IS_FIRST or not cfg.tracker:
        return None
    try:
        if cfg.tracker == "wandb":
            import wandb
            wandb.init(project="mogrpo", name=cfg.out_dir, config=asdict(cfg), dir=cfg.out_dir)
            return lambda row: wandb.log(row, step=row["step"])
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        die(f"--tracker: pip install {cfg.tracker}")
    board = SummaryWriter(f"{cfg.out_dir}/tensorboard", purge_step=step + 1)  # of lost steps

    def track(row):
        for name, value in row.items():
            board.add_scalar(name, value, row["step"])
    return track

def write_row(run, name, row):
    """Append a row to a log."""
    if run.track and name == "metrics.jsonl":
        run.track(row)
    if IS_FIRST:
        with open(f"{run.cfg.out_dir}/{name}", "a", encoding="utf-8") as f:
            f.write(to_json(row) + "\n")

def log_samples(run, step, rows, scores_BK, heldout):
    """Every response with its scores, of all processes, into samples.jsonl: a file that data/judge
    and `reward_model.py --score` read as it is."""
    logged = []  # of this process
    for row, scores_K in zip(rows, scores_BK.tolist()):
        prompt = row["prompt"]
        logged.append(dict(step=step, heldout=heldout, tag=prompt["tag"], index=prompt["index"],
                           messages=prompt["messages"], response=row["text"],
                           tokens=row["tokens"], scores=dict(zip(run.axes, scores_K))))
    for row in sum(collect([logged]), []):  # process after process
        write_row(run, "samples.jsonl", row)

def log_step(run, step, metrics):
    """A step's metrics into metrics.jsonl, and a line on the terminal."""
    seconds = max(1e-9, sum(run.seconds.values()))
    tokens = metrics["length"] * run.cfg.prompts_per_step * run.cfg.group_size  # of all processes
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in kB, but on macOS in bytes
    host *= 1 if sys.platform == "darwin" else 1024
    peak = torch.cuda.max_memory_allocated() if CUDA else host
    write_row(run, "metrics.jsonl", {"step": step, **metrics, "tok_per_s": tokens / seconds,
                                     "peak_gb": peak / 2**30})
    if IS_FIRST:  # a resumed run cuts off what comes after
        for name in LOGS:
            run.state["log_sizes"][name] = os.path.getsize(f"{run.cfg.out_dir}/{name}")
    gap = metrics.get("sampler_gap", 0.0)  # a fork may have no sampler to correct
    most = 0.2 if run.dtype == torch.bfloat16 else 0.05
    if gap > most:
        warn(f"the sampler's log-probs are more than {most} off the trainer's: see sampler_gap")
    if step % run.cfg.log_interval > 0 and step not in (1, run.cfg.steps):
        return
    left = timedelta(seconds=round(seconds * (run.cfg.steps - step)))  # at this step's speed
    header = "  step   reward      kl  length    sec     left"
    line = (f"{step:>6}{metrics['reward']:>9.3f}{metrics['kl']:>8.3f}{metrics['length']:>8.1f}"
            f"{seconds:>7.2f}{left!s:>9}")
    for axis in run.axes:  # its mean score, and its share of what moves the policy
        cell = f"{metrics[f'score/{axis}']:.2f}{metrics[f'share/{axis}']:>5.0%}"
        header += f" {axis:>10}"
        line += f" {cell:>{max(10, len(axis))}}"  # as wide as its name
    if run.wants_header:
        say("\n" + header[:100])  # a line of a terminal; metrics.jsonl has the rest
    say(line[:100])
    run.wants_header = False

def answer_heldout(run):
    """This process's held-out prompts answered and scored -> rows, scores_BE, the names of the E
    scores, learned and true. The random numbers are the same every time, so that steps compare."""
    cfg = run.cfg
    prompts = run.heldout[run.rank::run.world]
    rows = rollout(run.policy, prompts, (cfg.seed, "eval"), cfg.eval_samples, cfg)
    learned_BK = score_responses(rows, run.reward_models, run.rules)
    true_BJ = score_responses(rows, [], run.truth)  # J is 0 without --truth
    names = [f"eval/{axis}" for axis in run.axes]
    names += [f"true/{axis}" for axis in axes_of([], run.truth)]
    return rows, torch.cat([learned_BK, true_BJ], 1), names

def evaluate(run, step):
    """Mean scores of the held-out prompts' answers, into metrics.jsonl and on the terminal."""
    if not run.heldout:
        return
    rows, scores_BE, names = answer_heldout(run)
    log_samples(run, step, rows, scores_BE, heldout=True)
    scores_PGE = scores_BE.unflatten(0, (-1, run.cfg.eval_samples))
    all_scores_PGE = torch.tensor(collect(scores_PGE.tolist()))  # of all processes
    means = dict(zip(names, all_scores_PGE.nanmean((0, 1)).tolist()))  # nan: no answer has a score
    write_row(run, "metrics.jsonl", dict(step=step) | means)

    say(f"\n{f'held out, step {step}':<26}{'first':>8}{'now':>8}")
    for name, mean in means.items():
        now = f"{mean:8.3f}"
        first = run.state["first"].setdefault(name, now)  # text: nan is no JSON
        say(f"  {name:<24}{first}{now}")
    for row in rows[::max(1, len(rows) // 3)][:3]:
        say(f"  > {row['prompt']['messages'][-1]['content']!r}\n    {row['text']!r}")
    run.wants_header = True

def save_results(run):
    """policy/ and, with LoRA, adapter/."""
    cfg = run.cfg
    read_as = run.policy.config.dtype or torch.float32  # as precise as it was read
    save_folder(run.policy, f"{cfg.out_dir}/policy", read_as)
    if cfg.lora_rank > 0:
        save_adapter(run.policy, f"{cfg.out_dir}/adapter", cfg)
    say(f"saved in {cfg.out_dir}: policy/ (a Hugging Face folder), metrics.jsonl, samples.jsonl, "
        "checkpoint/ (for --resume)")

# --------------------------------------------------------------------------------------------------
# 4.7 Processes, sharding, folders

THREADS = torch.get_num_threads()

def set_threads(model):
    """Of a CPU. Below some millions of parameters two wait for each other longer than they work."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1 if model.num_parameters() < 2e6 else THREADS)

def join_world(dtype="auto", alone=False):
    """Join torchrun's process group, or be a group of one -> rank, world size, compute dtype."""
    if CUDA:
        # Gathered weights and training take turns: without this each leaves holes for the other
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        # Or all processes of a node would meet on GPU 0
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        # torch 2.13 prefers cuDNN's attention on Hopper: it plans anew for every key length, tens
        # of milliseconds a token, and with a mask its gradients can be NaN (pytorch#196678)
        torch.backends.cuda.enable_cudnn_sdp(False)
    group_of_one = {}
    if alone or "RANK" not in os.environ:
        group_of_one = dict(store=dist.HashStore(), rank=0, world_size=1)
    # An hour: one process may decode far longer than the others before they meet
    dist.init_process_group("cpu:gloo,cuda:nccl" if CUDA else "gloo", timeout=timedelta(hours=1),
                            **group_of_one)
    if dtype == "auto":
        dtype = "bfloat16" if CUDA else "float32"
    return dist.get_rank(), dist.get_world_size(), getattr(torch, dtype)

def collect(rows):
    """What the processes made of rows[rank::world], on every process and in the order of `rows`."""
    shares = [None] * dist.get_world_size()  # one of each process
    dist.all_gather_object(shares, rows)  # pickles between our own processes; never a file
    ordered = [None] * sum(map(len, shares))
    for rank, share in enumerate(shares):
        ordered[rank::len(shares)] = share
    return ordered

def total(numbers):
    """Sum each number of a dict over all processes, which thereby wait for the slowest."""
    # float() waits for the GPU; sums in float64, in one order on every process
    everyone = collect([{name: float(x) for name, x in numbers.items()}])
    return {name: sum(one[name] for one in everyone) for name in numbers}

def blocks(model):
    """The repeated layers, which are nearly all of a transformer: its largest ModuleList."""
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList)]  # experts may be one, too
    return max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()))

def device_mesh(hsdp=True):
    """A row of processes for each node, or with `hsdp` off one row of all: weights are sharded in a
    row and replicated across. Made once for all models of a run, since each mesh has process groups
    of its own, and these memory on the GPU."""
    world = dist.get_world_size()
    row = min(world, int(os.environ.get("LOCAL_WORLD_SIZE", world)))  # torchrun's: a node's
    if row == world or not hsdp:
        return dist.init_device_mesh(DEVICE.type, (world,))
    return dist.init_device_mesh(DEVICE.type, (world // row, row),
                                 mesh_dim_names=("replicate", "shard"))

def shard(model, dtype, recompute="False", mesh=None):
    """Shard `model` over all processes, in place, and read its weights: FSDP2 by hand, block by
    block, then what is left. Each process keeps 1/N of every weight; a block is gathered in `dtype`
    just before it runs and dropped after; gradients are reduced in float32. Embedding, final norm
    and head stay in the root's group: a tied weight must not live in two.
    mesh: of several nodes it has several rows (HSDP): each node shards by itself, and only
    gradients cross the network.
    recompute: keep a block's input only and run the block again in the backward pass; a choice
    of --recompute."""
    mesh = mesh or device_mesh()
    precision = MixedPrecisionPolicy(dtype, reduce_dtype=at_least_float32(dtype))
    frozen = not any(p.requires_grad for p in model.parameters())  # LoRA trains A and B
    left_out = set()
    for p in model.parameters():
        if not p.requires_grad:  # float32 masters are for weights to which small steps are added
            p.data = p.data.to(dtype)
            if dist.get_world_size() == 1:  # FSDP would gather a second copy: 28 GB at 14B
                left_out.add(p)
    wrap = partial(fully_shard, mesh=mesh, mp_policy=precision, ignored_params=left_out)
    for block in blocks(model):
        if recompute == "True" or recompute == "auto" and CUDA:
            block.forward = recomputed(block.forward)
        wrap(block)  # gathered while the block before it runs
    # FSDP keeps a root gathered for its backward; a frozen model has none
    wrap(model, reshard_after_forward=frozen)
    if hasattr(model, "packed_logp"):  # beside forward
        register_fsdp_forward_method(model, "packed_logp")
    return load_weights(model)

def recomputed(forward):
    """`forward`, run again in the backward pass."""
    return partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)

def load(auto_class, path, day="", **head):
    """An `auto_class` model of a folder or hub id, on the meta device until `shard` or
    `load_weights` reads its weights; its attribute `tokenizer`. `head`: config values of a fresh
    head. `day`: which date a chat template tells; a reward model's is that of its training. A
    policy's tokenizer without a pad token pads with its end token, which is safe: padding is told
    by position."""
    safe = dict(trust_remote_code=False)  # unset, the library would stop and ask
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **safe)
        config = transformers.AutoConfig.from_pretrained(path, **safe, **head)
        # What a training run may have left on: more outputs, or tuples of them
        config.output_hidden_states = config.output_attentions = False
        if hasattr(config, "output_router_logits"):
            config.output_router_logits = False
        config.return_dict = True
        with torch.device("meta"):  # no memory, no random numbers: a second for 14B
            model = auto_class.from_config(config, **safe).float()
    except Exception as e:  # somebody else's files fail in any way they like
        die(f"{path}: no such folder or hub model, or none that {auto_class.__name__} knows: {e}")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    require(tokenizer.pad_token and len(tokenizer) > len(tokenizer.all_special_ids),
            f"{path}: its tokenizer has no words, or neither pad nor end-of-text token")
    # From the first special token that a text spells out to the last: see `render`
    words = [re.escape(t.content) for t in tokenizer.added_tokens_decoder.values() if t.special]
    special = "|".join(sorted(words, reverse=True)) or "(?!)"  # longer ones first; or no match
    tokenizer.specials = re.compile(f"(?s)({special})(.*({special}))?")
    tokenizer.rows = getattr(config.get_text_config(), "vocab_size", math.inf)
    tokenizer.frame = frame(tokenizer)
    # Some templates tell the date, by a call of strftime_now
    day = getattr(config, "day", None) or day or TODAY
    try:
        date = datetime.fromisoformat(day)
    except ValueError:
        die(f"--day={day}: expected a date like {TODAY}")
    template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    tokenizer.dated_template = re.sub(r"""strftime_now\((['"])(.*?)\1\)""",
                                      lambda call: repr(date.strftime(call[2])), template)
    model.eval()  # no dropout: noise in a score, and rho would differ from 1
    model.auto_class = auto_class  # which reads its weights later
    model.tokenizer = tokenizer
    model.stock_attention = config._attn_implementation
    model.added = {}  # weights that are in no file
    model.has_fresh_head = bool(head)
    return model

# Of the library's sequence classifiers; some encoders come without the layers before it, too
HEADS = r"\W*(score|(pre_)?classifier|classification_head|dense|(\w+\.)?pooler)\."

def read_weights(model):
    """{name: weight} of a model of `load`, read by the library, whole and into the host's memory.
    Only safetensors: a pickle can run code."""
    path = model.name_or_path
    try:
        whole, info = model.auto_class.from_pretrained(
            path, config=model.config, dtype="auto", use_safetensors=True,
            output_loading_info=True, ignore_mismatched_sizes=True)
    except Exception as e:  # somebody else's files fail in any way they like
        die(f"{path}: its weights cannot be loaded: {e}")
    # In the files, but of a layer that the config does not have; or buffers of older versions
    conflicts = []
    for key in info["unexpected_keys"]:
        if re.search(r"\.\d+\.", key) and not re.search(r"\.(masked_)?bias$", key):
            conflicts.append(key)
    for key in map(str, info["missing_keys"] | info["mismatched_keys"]):
        if not (model.has_fresh_head and re.match(HEADS, key)):
            conflicts.append(key)
    require(not conflicts, f"{path}: its files and config.json do not agree on "
            f"{sorted(conflicts)[:3]}")
    head = whole.get_output_embeddings()
    if head and model.config.get_text_config().tie_word_embeddings:
        require(torch.equal(head.weight, whole.get_input_embeddings().weight), f"{path}: its files "
                "hold a head of its own, but its config.json has tie_word_embeddings")
    return whole.state_dict() | model.added

def load_weights(model):
    """Read the weights of a model on the meta device: the first process reads them all and sends
    one after the other, and each process keeps its rows."""
    model.to_empty(device=DEVICE)  # of a sharded model this is 1/N
    model.tie_weights()  # a plain module forgets it in to_empty
    for p in model.parameters():
        p._is_hf_initialized = True  # so that the next line touches none of them
    model.apply(model._init_weights)  # rotary frequencies stand in no file: computed again
    whole = read_weights(model) if IS_FIRST else {}
    how = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, whole, options=how)  # casts to the dtype of each shard
    return model

def save_folder(model, path, dtype):
    """Write a sharded model of `load` as a folder that stock `from_pretrained` loads; every process
    must call it. The first one gathers the weights in the host's memory, merges LoRA and writes;
    what was in `path` goes when the new folder is whole."""
    how = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole = get_model_state_dict(model, options=how)
    if not IS_FIRST:
        return
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            A = whole.pop(f"{name}.lora_A.weight")
            B = whole.pop(f"{name}.lora_B.weight")
            whole[f"{name}.weight"] = whole[f"{name}.weight"] + layer.lora_scale * B @ A
    if dtype.itemsize < 4:
        share = share_kept(read_weights(model), whole, dtype)
        if share < 0.5:  # small steps round away: a weight near 1 moves by 1/256 or not at all
            say(f"{path}: {dtype} would keep {share:.0%} of the update: saved in float32")
            dtype = torch.float32
    for name in whole.keys() - dict(model.named_buffers()):  # a router's stay in float32
        whole[name] = whole[name].to(dtype)
    unfinished = f"{path}.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    with torch.device("meta"):  # by the name of FSDP's class the library finds no names to write
        plain = model.auto_class.from_config(model.config)
    plain.save_pretrained(unfinished, state_dict=whole)  # names and ties as other tools expect
    model.config.dtype = dtype
    model.config.save_pretrained(unfinished)
    model.tokenizer.save_pretrained(unfinished)
    write_old_names(unfinished)
    if hasattr(model, "generation"):
        model.generation.to_json_file(f"{unfinished}/generation_config.json")
    os.sync()  # on disk, before the name points to it
    put_in_place(path)

def share_kept(before, after, dtype):
    """Of the way from the weights `before` to those `after`, the share that is left along it when
    the latter are rounded to a dtype."""
    along = length = 0.0
    for name, weight in after.items():
        start = before[name].float()
        moved = weight.float() - start
        rounded = weight.to(dtype).float() - start
        along += (rounded * moved).sum().item()
        length += moved.square().sum().item()
    return along / length if length > 0 else 1.0

def write_old_names(path):
    """transformers 4 reads some settings under other names than 5 writes, and takes its defaults
    for what it does not find, in silence: so both names stand in the folder's files."""
    config = json.load(open(f"{path}/config.json"))
    for part in (config, config.get("text_config") or {}):
        if "num_local_experts" in part:
            part["num_experts"] = part["num_local_experts"]
        rope = part.get("rope_parameters") or {}
        if "full_attention" in rope:  # of Gemma 3 and ModernBERT, by the kind of layer
            theta = rope.get("sliding_attention", {}).get("rope_theta")
            part["rope_local_base_freq"] = part["local_rope_theta"] = theta
            rope = rope["full_attention"]
            part["global_rope_theta"] = rope["rope_theta"]
        if "partial_rotary_factor" in rope:
            part["partial_rotary_factor"] = part["rotary_pct"] = rope["partial_rotary_factor"]
        if "rope_theta" in rope:
            part["rope_theta"] = part["rotary_emb_base"] = rope["rope_theta"]
            part["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    write_text(f"{path}/config.json", json.dumps(config, indent=2))
    config = json.load(open(f"{path}/tokenizer_config.json"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    write_text(f"{path}/tokenizer_config.json", json.dumps(config, indent=2))

def put_in_place(path):
    """The folder path.tmp, which is whole, becomes `path`."""
    shutil.rmtree(path, ignore_errors=True)
    os.rename(f"{path}.tmp", path)  # atomic on one file system

# --------------------------------------------------------------------------------------------------
# 4.8 Checkpoints

def trained_tensors(model, optimizer, updates):
    """What training changes, by name: trainable weights and their AdamW moments, which are made as
    0 before the first update. AdamW's bias correction is told the number of updates."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward may have left the root's weights whole, as others
    named = {}
    for name, p in model.named_parameters():
        if p.requires_grad:  # with LoRA the base is not in it
            moments = optimizer.state[p]
            moments["step"] = device_tensor(float(updates))
            named[name] = p.detach()
            for kind in ("exp_avg", "exp_avg_sq"):
                named[f"{name}.{kind}"] = moments.setdefault(kind, torch.zeros_like(p))
    return named

def save_checkpoint(out_dir, model, optimizer, state):
    """Every process writes its shard of weights and moments into checkpoint.tmp, which takes the
    place of checkpoint/ when it is whole, at once or, after a crash, by `find_checkpoint`. No
    random state is in it: batches and samples are functions of (seed, step)."""
    unfinished = f"{out_dir}/checkpoint.tmp"
    if IS_FIRST:
        shutil.rmtree(unfinished, ignore_errors=True)  # all wait for it in the plan of `save`
    named = trained_tensors(model, optimizer, state["updates"])
    files = {name: 1 + i // 64 for i, name in enumerate(named)}  # each is made in memory first
    dcp.save(named, storage_writer=dcp.HuggingFaceStorageWriter(
        unfinished, files, save_distributed=True))  # on disk, not in its cache
    written = sorted(set(sum(collect([os.listdir(unfinished)]), [])))  # as all processes see it
    if IS_FIRST:  # state.json comes last: where it stands, all the rest does
        write_text(f"{unfinished}/state.json", to_json(state | dict(files=written)))
    find_checkpoint(out_dir)

def find_checkpoint(out_dir):
    """Is there a whole checkpoint? Every process must ask, and the first decides. At any moment of
    a crash checkpoint/ or checkpoint.tmp is whole; if both are, the latter is the newer one."""
    folder = f"{out_dir}/checkpoint"
    if IS_FIRST and os.path.exists(f"{folder}.tmp/state.json"):
        put_in_place(folder)
    return collect([os.path.exists(f"{folder}/state.json")])[0]

def load_checkpoint(out_dir, model, optimizer, state):
    """Fill model, optimizer and `state` from a checkpoint of any number of processes."""
    folder = f"{out_dir}/checkpoint"
    try:
        stored = json.load(open(f"{folder}/state.json"))
        missing = [name for name in stored.pop("files") if not os.path.exists(f"{folder}/{name}")]
        assert not missing, f"without {missing[:3]}"
        require(stored["texts"] == state["texts"], f"--resume: {out_dir} began with other prompts "
                "(or ratings), or another chat template")
        named = trained_tensors(model, optimizer, stored["updates"])
        dcp.load(named, storage_reader=dcp.HuggingFaceStorageReader(folder), no_dist=True)
    except (Exception, dcp.CheckpointException) as e:  # files fail in any way they like
        die(f"{folder}: the checkpoint is damaged or of another model: {last_line(e)}")
    state |= stored

def write_text(path, text):
    """Write a file so that a crash leaves the old one or the new one, never a half."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())  # on disk before the name points to it
    os.replace(f"{path}.tmp", path)  # atomic on one file system

def set_aside(path):
    """Rename what is in the way of `path` to path.1, path.2, ...: nothing is overwritten."""
    if os.path.lexists(path):
        n = 1
        while os.path.lexists(f"{path}.{n}"):
            n += 1
        os.rename(path, f"{path}.{n}")
        say(f"{path} was there already: renamed to {path}.{n}")

LOCKS = []  # the locked file, until this process ends, however it ends

def lock(out_dir):
    """Refuse a folder where another run writes, and one that is not the same folder on all nodes:
    half of every weight would be lost."""
    path = f"{out_dir}.lock"
    if IS_FIRST:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        file = open(path, "a")  # not yet emptied: it may be another run's
        LOCKS.append(file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            die(f"{out_dir}: another run writes there and has locked {path}")
        except OSError:
            pass  # a file system without locks
        file.truncate(0)
        print(time.time(), file=file, flush=True)  # of this run, and no other
    dist.barrier()
    seen = open(path).read() if os.path.exists(path) else None
    require(len(set(collect([seen]))) == 1, f"{path} is not the same file for all processes: "
            "--out_dir must be a folder that all nodes share")

def open_out_dir(cfg, model, optimizer, state):
    """Make cfg.out_dir the folder of this run alone, with its flags in config.json; with --resume
    load its checkpoint, else set an earlier run aside."""
    lock(cfg.out_dir)
    if cfg.resume:
        require(find_checkpoint(cfg.out_dir), f"--resume: there is no checkpoint in {cfg.out_dir}")
        load_checkpoint(cfg.out_dir, model, optimizer, state)
        say(f"resuming {cfg.out_dir} after {state['updates']} updates")
    elif IS_FIRST:
        set_aside(cfg.out_dir)
        os.makedirs(cfg.out_dir)
    if IS_FIRST:
        write_text(f"{cfg.out_dir}/config.json", to_json(asdict(cfg), indent=1))

# --------------------------------------------------------------------------------------------------
# 4.9 JSONL, text

def read_jsonl(path):
    """Yield (where, record) for each line of a JSONL file, plain or .gz; `where` is file:line."""
    where = path
    try:
        with fileinput.hook_compressed(path, "r", encoding="utf-8-sig") as f:
            for number, line in enumerate(f, 1):  # a line at a time: it may be larger than memory
                if line.strip():
                    where = f"{path}:{number}"
                    record = json.loads(line)
                    json.dumps(record, ensure_ascii=False).encode()  # fails on a lone surrogate
                    require(isinstance(record, dict), f"{where}: expected a JSON object")
                    yield where, record
    except Exception as e:  # files fail in any way they like
        die(f"{where}: unreadable or broken JSON: {e}")
    require(where != path, f"{path}: is empty; expected one JSON object a line")

ROLES = dict(system="system", developer="system", user="user", assistant="assistant")

def conversation(where, record):
    """The prompt of a record as chat messages: its "messages", or its "prompt", which is a user's
    text or a list of messages, too. Contents may be lists of text parts."""
    messages = record.get("messages") or record.get("prompt")  # null is like absent
    if isinstance(messages, str):
        messages = [dict(role="user", content=messages)]
    require(messages and isinstance(messages, list),
            f'{where}: "prompt" (or "messages") is missing, empty, or neither text nor a list')
    clean = []
    for message in messages:
        try:
            role = ROLES[message["role"]]
            content = message["content"]
            parts = content if isinstance(content, list) else [content]
            text = "".join(part if isinstance(part, str) else part["text"] for part in parts)
            assert text.strip()
        except Exception:
            die(f'{where}: expected a message like {{"role": "user", "content": "text"}}, its role '
                f"one of {', '.join(ROLES)} and its text not empty, found {str(message)[:80]}")
        clean.append(dict(role=role, content=text))
    require(role != "assistant",
            f"{where}: the prompt ends with the assistant's turn, so there is nothing to answer")
    return clean

SPELLED = "\ufdd0", "\ufdd1"  # around what is tokenized as text: they are no characters

def render(tokenizer, messages, response=None):
    """A prompt ready for its answer, or prompt and response -> token ids, by the chat template.
    Without one (base models, encoders) it is plain text, with the separator token or line breaks
    between its parts. A special token that is spelled out in a text stays text: it closes no turn,
    or a policy could write its own next question."""
    wants_answer = response is None  # then what comes next is the answer's turn
    if not wants_answer:  # a template closes it with its end token
        messages = messages + [dict(role="assistant", content=response)]
    first, last = SPELLED
    marked = []
    for message in messages:
        text = re.sub("|".join(SPELLED), "\ufffd", message["content"])  # they are ours alone
        text = tokenizer.specials.sub(rf"{first}\g<0>{last}", text)
        marked.append(message | dict(content=text))
    if tokenizer.chat_template:
        text = templated(tokenizer, marked, wants_answer)
    else:
        separator = f" {tokenizer.sep_token} " if tokenizer.sep_token else "\n"
        text = separator.join(m["content"] for m in marked) + separator * wants_answer
    start, end = tokenizer.frame
    ids = list(start)
    for i, piece in enumerate(re.split("|".join(SPELLED), text)):  # spelled ones have odd numbers
        ids += tokenize(tokenizer, piece, goes_on=i > 0, split_special_tokens=i % 2 == 1)
    if not wants_answer:  # an answer never follows an end token
        ids += end
    largest = max(ids, default=0)
    require(largest < tokenizer.rows, f"{tokenizer.name_or_path}: its tokenizer's token "
            f"{tokenizer.convert_ids_to_tokens(largest)!r} has no row in the model's embedding")
    return ids

def templated(tokenizer, messages, wants_answer):
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=tokenizer.dated_template, tokenize=False,
            add_generation_prompt=wants_answer)
    except Exception as e:  # it is a program of its own: no system role, no two user turns
        die(f"the chat template of {tokenizer.name_or_path} refuses {str(messages)[:60]}: {e}")

def tokenize(tokenizer, text, goes_on=False, **how):
    """Token ids of a piece of text. One that goes on must not get the space that some tokenizers
    put before all texts, so it is read behind a line break."""
    def ids_of(text):
        return tokenizer(text, add_special_tokens=False, **how)["input_ids"]

    if goes_on:
        before = ids_of("\n")
        ids = ids_of("\n" + text)
        if ids[:len(before)] == before:
            return ids[len(before):]
    return ids_of(text)

def frame(tokenizer):
    """The special tokens that a tokenizer puts before a text and behind it; a template has its
    own."""
    if tokenizer.chat_template:
        return [], []
    word = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    n = next((n for n in range(len(ids)) if ids[n:n + len(word)] == word), 0)
    return ids[:n], ids[n + len(word):]

def turn_end(tokenizer):
    """The added token that the chat template puts right after an answer; None if it puts none."""
    if not tokenizer.chat_template:
        return None
    answer = SPELLED[0]  # in no template
    turns = [dict(role="user", content="x"), dict(role="assistant", content=answer)]
    rest = templated(tokenizer, turns, False).partition(answer)[2]
    ids = tokenize(tokenizer, rest, goes_on=True)
    if ids and ids[0] in tokenizer.added_tokens_decoder:
        return ids[0]

# --------------------------------------------------------------------------------------------------
# 4.10 Errors, the terminal, flags

HERE = os.path.dirname(os.path.abspath(__file__))  # beside data/
RANK = int(os.environ.get("RANK", 0))
IS_FIRST = RANK == 0  # one process speaks for all

def require(condition, message):
    if not condition:
        die(message)

def die(message):
    """One clear line on stderr and exit status 2. Where all processes find the same fault the first
    speaks, and torchrun ends the others while they wait; what one alone finds it tells itself."""
    if not IS_FIRST:
        time.sleep(2)
        message = f"on process {RANK}: {message}"
    if IS_FIRST or not must_stop():
        line = " ".join(message.split())
        print("error:", "".join(filter(str.isprintable, line)), file=sys.stderr)
    sys.exit(2)

STOPS = []  # signals that have come
PARENT = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None  # torchrun

class Stopped(Exception):
    """A signal has come (see `heed_signals`), or the run cannot go on: then it says why. Raised on
    all processes at once."""

def catch_signals():
    """From now on SIGTERM and Ctrl-C are noted, and heeded where all processes stop together. A
    second Ctrl-C ends at once. (The first one comes twice in an instant: torchrun passes it on.)"""
    stops = (signal.SIGTERM, signal.SIGINT)

    def note(number, frame):
        STOPS.append(time.monotonic())
        if number == signal.SIGINT and STOPS[-1] > STOPS[0] + 1:
            os._exit(130)

    def handle(handler):
        for number in stops:
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)

    handle(note)
    # A process that a rule forks can be ended; a signal while it is forked waits, or would be lost
    os.register_at_fork(before=partial(signal.pthread_sigmask, signal.SIG_BLOCK, stops),
                        after_in_parent=partial(handle, note),
                        after_in_child=partial(handle, signal.SIG_DFL))

def must_stop():
    """Has a signal come? Or was torchrun killed, so that none will come?"""
    return bool(STOPS) or PARENT not in (None, os.getppid())

def stop_asked():
    """Must any process stop? All learn it together."""
    return any(collect([must_stop()]))

def heed_signals():
    """Give up what is being done, on all processes together."""
    if stop_asked():
        raise Stopped

def last_line(error):
    """What went wrong, without the traceback that a DCP error carries along."""
    return str(error).strip().split("\n")[-1]

def is_number(x):
    """Is x a finite number, or a string that spells one? (True, NaN and Infinity are not.)"""
    spelling = r"\s*[-+]?(\d{1,20}\.?\d*|\.\d+)(e[-+]?\d\d?)?\s*"  # too short for infinity
    return re.fullmatch(spelling, str(x), re.I)

@lru_cache
def warn(message):
    """Say it the first time: the cache has it then."""
    say(f"warning: {message}")

def say(message):
    """Print once, not once a process, and without tearing a progress bar."""
    if IS_FIRST:
        tqdm.write(message)
        sys.stdout.flush()  # a pipe would hold lines back

def to_json(value, **style):
    """JSON text; NaN and infinity, which JSON does not know, as null."""
    clean = json.loads(json.dumps(value), parse_constant=lambda nan: None)
    return json.dumps(clean, ensure_ascii=False, **style)

def check_flags(cfg):
    """What --help cannot say: which values of mogrpo.py's knobs make sense."""
    for name, value in vars(cfg).items():
        if type(value) in (int, float):
            least = 1e-12 if name in POSITIVE else 0
            require(least <= value < 1e12, f"--{name}={value}: must not be negative, nor 0 where "
                    "that is senseless, nor huge")
    require(cfg.group_size > 1, f"--group_size={cfg.group_size}: a group of one teaches nothing; "
            "take at least 2")

POSITIVE = ("prompts_per_step", "max_prompt_tokens", "max_new_tokens", "sample_rows", "temperature",
            "steps", "lr", "epochs", "grad_clip", "micro_tokens", "eval_samples", "log_interval",
            "std_floor", "lora_alpha")

# What --resume must find as it was
Config.kept = ("policy", "reward_model", "rules", "prompts", "heldout_prompts", "combine",
               "max_prompt_tokens", "prompts_per_step", "lora_rank", "lora_alpha", "seed")

def parse(config_class, argv, doc, toy={}):
    """`--key=value` or `--key value` for the fields of a dataclass (`--flag` alone for True) -> an
    instance; anything else is one error line. `toy`: defaults that hold while the first field is
    "toy", and its value then: a 0.3M-parameter model wants a rate that would ruin a 7B one."""
    manual = doc or ""
    for cls in reversed(config_class.__mro__[:-1]):  # of a fork its own knobs come last
        manual += inspect.getsource(cls).partition("    def ")[0]  # each knob with its why
    parser = transformers.HfArgumentParser(
        config_class, description=f"{manual}\nin the toy world: {toy}", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = die  # in one line, from one process
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    typed = vars(parser.parse_args(argv))  # nothing but the flags that are typed
    if "out_dir" in typed:
        require(typed["out_dir"], "--out_dir: it needs a name")
        typed["out_dir"] = os.path.normpath(typed["out_dir"])  # without a slash at its end
    first = fields(config_class)[0].name
    defaults = {}
    if typed.get(first, getattr(config_class, first)) == "toy":
        typed.pop(first, None)
        defaults = toy
    cfg = config_class(**defaults | typed)
    if not typed.get("resume"):
        return cfg
    path = f"{cfg.out_dir}/config.json"
    try:
        before = json.load(open(path, encoding="utf-8"))  # these flags hold but for those typed
        cfg = config_class(**before | typed)
    except Exception as e:
        die(f"--resume: {path} cannot be read: {e}")
    for name in before.keys() & config_class.kept:
        require(before[name] == getattr(cfg, name), f"--{name} was {before[name]} and is now "
                f"{getattr(cfg, name)}: that cannot be resumed")
    return cfg

TOY = dict(policy="out/toy/policy", reward_model="out/toy/reward_model",
           prompts="out/toy/prompts.jsonl", heldout_prompts="out/toy/heldout_prompts.jsonl",
           truth=f"{HERE}/data/toy/truth.py", prompts_per_step=8, max_new_tokens=48, steps=80,
           lr=8e-4, beta=0.16, log_interval=8)  # defaults while --policy=toy

def launch(main, config_class, doc, toy={}):
    """What every script does when it is run: flags, the toy world if it is asked for, `main(cfg)`.
    A full disk or an unwritable folder is one line, too."""
    transformers.utils.logging.disable_progress_bar()  # it would bury our lines
    logging.disable(logging.ERROR)  # tracebacks that torch logs of errors which we tell in a line
    # A checkpoint's rows are read by each process alone; no output of an FSDP2-wrapped module is
    # changed in place; statistics of too few values are nan
    warnings.filterwarnings("ignore", r"torch.distributed is disabled|FSDP2-wrap|(cov|std)\(\)")
    cfg = parse(config_class, sys.argv[1:], doc, toy)  # a wrong flag ends it here
    try:
        # Some value begins with out/toy/, which is not there: a program of its own makes it. To all
        # the rest the toy is folders like any other; other processes wait in `join_world`
        if "'out/toy/" in repr(cfg) and IS_FIRST and not os.path.exists("out/toy"):
            os.environ["PYTHONPATH"] = f"{HERE}:{os.environ.get('PYTHONPATH', '')}"
            subprocess.run([sys.executable, "-m", "data.toy.prepare"])
            require(os.path.exists("out/toy"), f"no toy world could be made by {HERE}/data/toy; "
                    "without it give --policy, --prompts, and --reward_model or --rules")
        main(cfg)
    except Stopped as stop:
        require(not stop.args, str(stop))
        say("stopped by a signal; what was finished is kept")
    except (OSError, SafetensorError, dcp.CheckpointException, torch.OutOfMemoryError) as e:
        die(last_line(e))
    if dist.is_initialized():
        dist.barrier()  # nobody leaves while another still needs it
    for child in multiprocessing.active_children():  # of a rule
        child.terminate()
    sys.stdout.flush()
    os._exit(0)  # at a normal exit gloo's threads now and then abort a finished process


if __name__ == "__main__":
    launch(main, Config, __doc__, TOY)
