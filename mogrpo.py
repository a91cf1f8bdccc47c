"""
Multi-objective GRPO: align a language model to several objectives at once, without a critic.

For each prompt q the policy pi samples a group of G responses o_1..o_G; a reward model gives each K scores s_ik in [0, 1].

    R_i = sum_k w_k s_ik                                       one reward from K axes
    A_i = (R_i - mean_G R) / max(std_G R, std_floor)           group-relative advantage: the group is its own baseline
    rho = pi(o_t | q, o_<t) / pi_old(o_t | q, o_<t)            per token; exactly 1 in the first inner epoch
    d   = log pi_ref - log pi,   k3 = exp(d) - d - 1           KL to the reference, unbiased and never negative
    J   = mean_t [ min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) - beta k3 ]
    pi <- AdamW step up J                                      then sample again

Source: arXiv 2503.21819 (the system), 2402.03300 (GRPO). Departures: the paper does not publish its hyperparameters, so all
defaults are our own choice; the standard deviation is floored, since a learned reward is noise below some spread; the sampler's
rounding error is corrected by a truncated importance weight (Yao et al. 2025, "Your efficient RL framework secretly brings you
off-policy RL training"). Left out: a separate inference engine, several minibatches a rollout, tools and multi-turn rollouts.

    torchrun mogrpo.py                                  # laptop: builds a toy world, aligns a toy policy, a minute
    torchrun mogrpo.py --policy=Qwen/Qwen2.5-0.5B-Instruct --reward_model=out/rm --prompts=prompts.jsonl       # one GPU
    torchrun --nproc_per_node=8 mogrpo.py --policy=Qwen/Qwen2.5-14B-Instruct --reward_model=out/rm --prompts=prompts.jsonl
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 mogrpo.py ...        # on both nodes
    python mogrpo.py --policy=Qwen/Qwen2.5-14B-Instruct --dry_run=8      # what it would take of each of 8 GPUs, without one
    torchrun mogrpo.py --resume                         # goes on where the last run stopped, on any number of processes

Reading order: reward_model.py, then here Config, policy, sampling, advantages, objective, memory plan, toy world, the loop.
Other ways of combining axes (--combine), PPO and DPO on the same samples (--algo), stated weights (--steer): marked where they differ.
"""
import json, math, os, random, re, resource, shutil, signal, sys, time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from hashlib import blake2b

import torch, torch.distributed as dist, torch.nn as nn
from reward_model import TOY as REWARD_TOY, Config as RewardConfig
from reward_model import (DTYPES, RewardModel, blocks, collect, conversation, die, find_checkpoint, fresh_folder, is_held_out,
                          is_number, join_world, load, load_checkpoint, parse, progress, read_jsonl, render, require, run, save_checkpoint,
                          save_folder, say, score, shard, train, write_text)
from safetensors.torch import save_file
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import FSDPModule
from torch.utils.benchmark import Timer
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification,
                          AutoModelForTokenClassification, DynamicCache, DynamicLayer, GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

@dataclass
class Config:
    # models and data
    policy: str = "toy"           # causal LM to align: folder or hub id; toy = the toy world in out/toy, built if absent
    reward_model: str = "toy"     # folder from reward_model.py, or any whose id2label names axes scored by a sigmoid
    prompts: str = "toy"          # JSONL with "prompt" or "messages"
    heldout_prompts: str = ""     # JSONL for the before/after evaluation; empty: up to 64 of --prompts are kept back
    out_dir: str = "out/mogrpo"   # results; an earlier run there is renamed, never overwritten
    # objective
    weights: str = ""             # axis=weight,...; an axis not named weighs 1
    combine: str = "sum"          # how K scores become one advantage: sum (the paper) | gdpo | lagrangian; see `advantages`
    floors: str = ""              # lagrangian: axis=least mean score,... as in safety=0.9
    dual_lr: float = 0.5          # lagrangian: step of the log multiplier for a shortfall of 1
    algo: str = "grpo"            # grpo | ppo: a critic instead of the group | dpo: best against worst of each group
    critic_lr: float = 1e-5       # ppo: of the critic, a second model of the policy's size; warms up and decays like lr
    gae_lambda: float = 0.95      # ppo: how far ahead an advantage looks past the critic's own guess; 1: to the end
    steer: bool = False           # draw weights for each prompt and state them in its system message: one policy for all weightings
    pessimism: float = 0.0        # score = mean - pessimism x std over the heads of an ensemble: where they disagree, expect less
    beta: float = 0.04            # weight of the KL to the reference; 0: no reference is loaded
    clip_low: float = 0.2         # how far the ratio may fall before the gradient stops (matters from --epochs=2 on)
    clip_high: float = 0.28       # how far it may rise; more than clip_low keeps rare tokens alive (DAPO, 2503.14476)
    loss_norm: str = "sequence"   # sequence: every response weighs the same | token: every token | constant: Dr. GRPO
    std_floor: float = 0.01       # least std of a group's reward: below it scores differ by the reward head's noise
    # sampling
    group_size: int = 8           # G, responses a prompt: the baseline's sample size, so at least 2
    prompts_per_step: int = 32    # prompts of one optimizer step, over all processes
    max_prompt_tokens: int = 512  # longer prompts are skipped and counted
    max_new_tokens: int = 512     # responses are cut here
    sample_rows: int = 256        # responses that a process decodes at once; bounds the key-value cache
    temperature: float = 1.0      # of sampling and of scoring alike; there is no top-k or top-p: they would bias rho
    # optimization
    steps: int = 500              # optimizer steps = rollouts (times --epochs)
    lr: float = 1e-6              # peak; fits full fine-tuning of a few billion parameters
    warmup: int = 10              # steps of linear warm-up; then a cosine down to a tenth of lr
    epochs: int = 1               # optimizer steps on each rollout; above 1 the clipping starts to matter
    grad_clip: float = 1.0        # largest gradient norm
    micro_tokens: int = 16384     # tokens of one forward and backward, padding included; bounds activation memory
    recompute: bool = True        # keep the blocks' inputs only and run them again in the backward pass: 1/3 more work
    lora_rank: int = 0            # train low-rank adapters of this rank instead of all weights; they want 5 to 20 times the lr
    lora_alpha: float = 32.0      # adapters are scaled by alpha / rank
    dtype: str = "auto"           # bfloat16 | float32 compute; auto: bfloat16 on GPU. Master weights stay float32
    hsdp: bool = True             # on several nodes shard inside a node and replicate across; False: over all, less memory
    # running
    eval_interval: int = 0        # evaluate on held-out prompts every so many steps; first and last always
    eval_samples: int = 4         # responses a held-out prompt
    save_interval: int = 50       # checkpoint every so many steps (and at the end, and on SIGTERM or Ctrl-C); 0: never
    resume: bool = False          # continue from out_dir/checkpoint
    seed: int = 0                 # order of prompts and every sampled token
    dry_run: int = 0              # do not train: print the memory that this many GPUs would need each, from config.json alone
    gpu_gb: float = 80.0          # memory of one of them in GiB

    def __post_init__(self):
        for name in "prompts_per_step max_prompt_tokens max_new_tokens sample_rows temperature steps lr epochs grad_clip \
                     micro_tokens eval_samples std_floor lora_alpha gpu_gb".split():
            require(getattr(self, name) > 0, f"--{name}={getattr(self, name)}: must be greater than 0")
        for name in "pessimism dual_lr critic_lr gae_lambda beta clip_low clip_high warmup eval_interval save_interval lora_rank dry_run".split():
            require(getattr(self, name) >= 0, f"--{name}={getattr(self, name)}: must not be negative")
        require(self.group_size >= 2, f"--group_size={self.group_size}: a group of one teaches nothing; take at least 2")
        for name, known in (("combine", ("sum", "gdpo", "lagrangian")), ("algo", ("grpo", "ppo", "dpo")), ("loss_norm", ("sequence", "token", "constant")), ("dtype", DTYPES)):
            require(getattr(self, name) in known, f"--{name}={getattr(self, name)}: expected one of {', '.join(known)}")
        for pair in filter(None, f"{self.weights},{self.floors}".split(",")):
            require(is_number(pair.partition("=")[2]) and float(pair.partition("=")[2]) >= 0,
                    f"--weights, --floors: {pair}: expected axis=number, at least 0")
        require((self.combine == "lagrangian") == bool(self.floors), "--combine=lagrangian and --floors=axis=score go together")
        require(self.algo == "grpo" or self.combine == "sum" and self.beta > 0, f"--algo={self.algo} wants --combine=sum and --beta above 0")
        require(self.policy == "toy" or self.dry_run or "toy" not in (self.reward_model, self.prompts), "with --policy, give --reward_model and --prompts, too")

TOY = dict(prompts_per_step=16, max_new_tokens=48, steps=80, lr=8e-4, beta=0.08, critic_lr=3e-3, recompute=False)  # defaults while --policy=toy
CHUNK_LOGITS = 2**26  # logits that exist at a time when responses are scored: 256 MB in float32

# ---------------------------------------------------------------------------------------------------------------------
# 1. The policy

class Policy(nn.Module):
    """A causal language model with two ways through one forward, so that FSDP's hooks gather its weights for both."""
    def __init__(self, path, lora_rank=0, lora_alpha=0.0):
        super().__init__()
        self.lm, self.tokenizer = load(AutoModelForCausalLM, path)
        self.lm.eval()  # dropout would make rho differ from 1
        if self.lm.config._attn_implementation == "sdpa":
            self.lm.set_attn_implementation("folded")
        if os.path.exists(f"{self.lm.folder}/generation_config.json"):
            self.lm.generation_config = GenerationConfig.from_pretrained(self.lm.folder)  # may name several end tokens
        self.adapted = lora_rank > 0
        add_lora(self, lora_rank, lora_alpha) if lora_rank else None
        named = [self.tokenizer.eos_token_id, self.lm.generation_config.eos_token_id, getattr(self.lm.config, "eos_token_id", None)]
        self.eos = sorted({e for eos in named for e in (eos if isinstance(eos, list) else [eos]) if e is not None})
        require(self.eos, f"{path}: neither its tokenizer nor its config names an end-of-text token")
    def logits(self, hidden, temperature):
        """hidden_ND -> float32 logits_NV / temperature."""
        logits = self.lm.get_output_embeddings()(hidden)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        cap = getattr(self.lm.config.get_text_config(), "final_logit_softcapping", None)  # Gemma 2
        return (torch.tanh(logits / cap) * cap if cap else logits) / temperature
    def forward(self, input_ids, temperature, targets=None, positions=None, chunk=None, **cache):
        """Decode: the next token's logits_BV. Score (with targets): logp_N of N target tokens, which the hidden states at the flat
        indices `positions_N` into [B * T] predict. The N x V logits never exist: they are made `chunk` rows at a time, and again in
        the backward pass. At V = 150,000 those of 16,384 positions would be 10 GB; the price is the head's matmul once more."""
        hidden = self.lm.base_model(input_ids=input_ids, use_cache=bool(cache), **cache).last_hidden_state
        if targets is None:
            return self.logits(hidden[:, -1], temperature)
        def logp_of(h, t):
            logits = self.logits(h, temperature)
            return logits.gather(-1, t[:, None]).squeeze(-1) - logits.logsumexp(-1)
        hidden = hidden.flatten(0, 1)[positions]
        chunk = chunk or max(16, CHUNK_LOGITS // self.lm.config.get_text_config().vocab_size)
        return torch.cat([checkpoint(logp_of, h, t, use_reentrant=False, preserve_rng_state=False)
                          for h, t in zip(hidden.split(chunk), targets.split(chunk))])

def add_lora(policy, rank, alpha):
    """LoRA (2106.09685) on all linear layers of the blocks: W x becomes W x + (alpha / rank) B A x, of which A and B are trained.
    W needs neither float32 copy, gradient nor moments, and with `policy.adapted = False` the same weights are the reference."""
    policy.requires_grad_(False)  # frozen weights are sharded in bfloat16 and get no gradient (see `shard`)
    linears = [m for m in blocks(policy).modules() if isinstance(m, nn.Linear)]
    require(linears, f"--lora_rank: the blocks of {type(policy.lm).__name__} have no nn.Linear to adapt")
    for m in linears:
        m.lora_A = nn.Parameter(torch.empty(rank, m.in_features, device="meta"))  # drawn in `fill`
        m.lora_B = nn.Parameter(torch.empty(m.out_features, rank, device="meta"))  # starts at 0
        m.lora_scale = alpha / rank
        m.forward = partial(lora_forward, policy, m)  # the weight keeps its name and place, so loading and saving need no renaming

def lora_forward(policy, m, x):
    y = nn.functional.linear(x, m.weight, m.bias)
    return y + nn.functional.linear(x @ m.lora_A.T, m.lora_B) * m.lora_scale if policy.adapted else y

def save_adapter(policy, path, base):
    """Write the adapter alone, in PEFT's format: `peft.PeftModel.from_pretrained(base_model, path)` loads it."""
    whole = {f"base_model.model.{n.removeprefix('lm.')}.weight": p.full_tensor().cpu() for n, p in policy.named_parameters() if "lora_" in n}
    layers = {n.rpartition(".")[2]: m for n, m in policy.lm.named_modules() if hasattr(m, "lora_A")}
    rank, scale = next((m.lora_A.shape[0], m.lora_scale) for m in layers.values())
    if dist.get_rank() == 0:
        os.makedirs(path, exist_ok=True)
        save_file(whole, f"{path}/adapter_model.safetensors", metadata={"format": "pt"})
        write_text(f"{path}/adapter_config.json", json.dumps(dict(
            peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=base, r=rank, lora_alpha=rank * scale, lora_dropout=0.0,
            bias="none", target_modules=sorted(layers), inference_mode=True), indent=1))

def layout(groups, device):
    """[(prompt_ids, [response_ids, ...]), ...] -> input_ids_BT, positions_N, targets_N.
    Rows are prompt + response, padded on the right: under causal attention what comes last is seen by nothing before it,
    so no mask is needed (and the flash kernel is used). Everything per token in this file is such a flat vector N over
    (group, response, position): no padding to mask, and the end-of-text token counts like any other."""
    rows = [(prompt, response) for prompt, responses in groups for response in responses]  # B rows
    width = max(len(p) + len(r) for p, r in rows)
    input_ids = torch.tensor([p + r + [0] * (width - len(p) - len(r)) for p, r in rows], device=device)
    positions = torch.tensor([i * width + len(p) - 1 + t for i, (p, r) in enumerate(rows) for t in range(len(r))], device=device)
    return input_ids, positions, torch.tensor([token for _, r in rows for token in r], device=device)

def logp(policy, groups, temperature, device, chunk=None):
    """Log-probs of all response tokens of `groups` -> logp_N."""
    input_ids, positions, targets = layout(groups, device)
    return policy(input_ids, temperature, targets, positions, chunk)  # through forward: FSDP gathers nothing for calls that go around it

def check_support(policy, device, dtype):
    """Refuse a model whose sampler, scorer and stock logits are not one distribution, before hours go into it: padding on either
    side, the cache and our own use of the head assume causal attention with positions and logits = head(hidden)."""
    prompts = [[i % policy.lm.config.get_text_config().vocab_size for i in range(3, 3 + n)] for n in (3, 7)]  # one will be padded
    try:
        with gathered(policy):
            responses, sampled = sample(policy, prompts, torch.full((2, 6), 0.5), 1.0, device)
            scored = logp(policy, [(p, [r]) for p, r in zip(prompts, responses)], 1.0, device).split([len(r) for r in responses])
            for p, r, ours, sampler in zip(prompts, responses, scored, sampled):
                stock = policy.lm(torch.tensor([p + r], device=device)).logits[0, len(p) - 1:-1].float().log_softmax(-1)
                stock = stock.gather(-1, torch.tensor(r, device=device)[:, None]).squeeze(-1)
                gap = max((ours - stock).abs().max().item(), (ours.cpu() - sampler).abs().max().item())
                require(gap < (0.3 if dtype == torch.bfloat16 else 1e-3),
                        f"{type(policy.lm).__name__} is not supported: its sampled and scored log-probs differ by {gap:.3g}")
    except (AttributeError, TypeError, NotImplementedError, ValueError) as e:
        die(f"{type(policy.lm).__name__} is not supported: {e}")

# ---------------------------------------------------------------------------------------------------------------------
# 2. Group sampling

@contextmanager
def gathered(model):
    """Inside, every process holds all of `model`, gathered once, and no forward needs a collective (no gradients here).
    So processes may run different numbers of forwards: their responses end at different lengths. Gathering every layer for
    every sampled token, as a sharded model does by itself, would cost layers x tokens collectives instead of layers."""
    groups = [m for m in model.modules() if isinstance(m, FSDPModule)]  # the root and its blocks
    for m in groups:
        m.unshard()  # one all-gather each: the only collectives of a rollout
        m.set_reshard_after_forward(False, recurse=False)  # or the first forward would drop it again
    with torch.no_grad():
        yield
    for m in groups:
        m.set_reshard_after_forward(m is not model, recurse=False)  # FSDP's default: the root stays until the backward
        m.reshard()  # frees the copy before the update needs the memory

class GrowingLayer(DynamicLayer):
    """A layer's keys and values [B, heads, T, D], with room for 64 tokens more: the library's own copies them all for each token."""
    def update(self, keys, values, *args, **kwargs):
        if not self.is_initialized:
            self.keys, self.values, self.room, self.is_initialized = keys[:, :, :0], values[:, :, :0], [keys[:0]], True
        n, t = self.keys.shape[2], keys.shape[2]  # tokens held, tokens new
        if len(self.room[0]) == len(keys) and self.room[0].shape[2] >= n + t:
            for room, new in zip(self.room, (keys, values)):
                room[:, :, n:n + t] = new  # in place: the one copy a token costs
        else:  # at first, when rows have left the batch, or when it is full
            self.room = [torch.cat([old, new, new.new_empty(*new.shape[:2], 64, new.shape[3])], 2)
                         for old, new in ((self.keys, keys), (self.values, values))]
        self.keys, self.values = (room[:, :, :n + t] for room in self.room)  # views
        return self.keys, self.values

def folded_attention(module, q, k, v, mask, scaling=None, **kwargs):
    """The library's attention, but for one new token the heads that share keys and values stand as positions of one query, so
    that a cache of grouped-query attention is read as it is and not first repeated for every head."""
    if q.shape[2] > 1 or q.shape[1] == k.shape[1]:
        return sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, **kwargs)  # prefill, scoring, plain heads
    out = nn.functional.scaled_dot_product_attention(q.reshape(len(q), k.shape[1], -1, q.shape[3]), k, v, mask, scale=scaling)
    return out.reshape(len(q), 1, -1, v.shape[3]), None  # [B, 1, heads, D]; no attention weights are kept

AttentionInterface.register("folded", folded_attention), AttentionMaskInterface.register("folded", sdpa_mask)

def uniforms(keys, n):
    """One uniform number for each (response, position): u_BT in [0, 1), float64 on the CPU, row b from keys[b] alone.
    A response's randomness is a function of (seed, step, prompt, sample), so what is sampled depends neither on the
    number of processes, nor on batching, nor on which neighbours have finished; and a resumed run needs no saved state."""
    g = torch.Generator()  # on the CPU: its stream is the same on every machine
    draw = lambda key: torch.rand(n, dtype=torch.float64, generator=g.manual_seed(
        int.from_bytes(blake2b(repr(key).encode(), digest_size=7).digest(), "big")))
    return torch.stack([draw(key) for key in keys])

def pick(logits_BV, u_B):
    """Next tokens and their log-probs: the inverse CDF of softmax(logits) at u; a negative u asks for the argmax."""
    logp_BV = logits_BV.log_softmax(-1)  # float32, whatever the weights are in
    cdf_BV = logp_BV.exp().cumsum(-1, dtype=torch.float64)  # float64: over 150,000 tokens float32 would lose the tail
    token_B = torch.searchsorted(cdf_BV, (u_B * cdf_BV[:, -1])[:, None], right=True).squeeze(-1)
    token_B = torch.where(u_B < 0, logits_BV.argmax(-1), token_B.clamp(max=logits_BV.shape[-1] - 1))
    return token_B, logp_BV.gather(-1, token_B[:, None]).squeeze(-1)

@torch.no_grad()
def sample(policy, prompts, u_BT, temperature, device):
    """G responses to each of P prompts (token id lists), B = P x G in prompt order, by a `gathered` policy.
    -> (responses: B lists of token ids, each up to and including its end-of-text token or cut at T; their log-probs under
    the sampler: B float tensors on the CPU). No collective is called inside: processes may stop at different lengths."""
    (B, T), P = u_BT.shape, len(prompts)  # T: most new tokens
    width = max(map(len, prompts))
    # Prefill: each prompt once, padded on the left so that all of them end, and all answers begin, in one column.
    ids_PL = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask_BT = torch.ones(P, width + T, dtype=torch.long, device=device)
    for row, p in zip(mask_BT, prompts):
        row[:width - len(p)] = 0  # padding is known by position, not by token
    place_PL = (mask_BT[:, :width].cumsum(-1) - 1).clamp(min=0)  # a prompt's first token is at place 0, padded or not
    cache = DynamicCache(config=policy.lm.config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]  # not sliding windows
    logits = policy(ids_PL, temperature, attention_mask=mask_BT[:, :width], position_ids=place_PL, past_key_values=cache)
    # Its cache is then shared out to the G responses of the group.
    cache.batch_repeat_interleave(B // P)  # G times less prefill than sampling each response by itself
    logits, mask_BT, place_B = (x.repeat_interleave(B // P, 0) for x in (logits, mask_BT, place_PL[:, -1]))
    tokens_BT = torch.zeros(B, T, dtype=torch.long, device=device)
    logp_BT = torch.zeros(B, T, device=device)
    u_BT, ends = u_BT.to(device), torch.tensor(policy.eos, device=device)
    alive, done = torch.arange(B, device=device), torch.zeros(B, dtype=torch.bool, device=device)  # rows still decoded
    for t in range(T):
        token, lp = pick(logits, u_BT[alive, t])  # alive: the rows of the batch, as indices into B
        tokens_BT[alive, t], logp_BT[alive, t] = token, lp.to(logp_BT.dtype)
        done |= torch.isin(token, ends)  # rows that have ended go on unheeded until the next count
        if t + 1 == T:
            break
        if t % 4 == 3:  # counting who is left waits for the GPU, so not at every token
            left = int((~done).sum())  # a CPU-GPU sync point
            if not left:
                break
            if 2 * left <= len(alive):  # half the batch has ended: go on with the rest alone
                keep = (~done).nonzero().squeeze(-1)
                cache.batch_select_indices(keep)  # copies what is kept, at most log2(B) times a rollout
                alive, done, token, mask_BT, place_B = (x[keep] for x in (alive, done, token, mask_BT, place_B))
        place_B = place_B + 1
        logits = policy(token[:, None], temperature, attention_mask=mask_BT[:, :width + t + 1], position_ids=place_B[:, None],
                        past_key_values=cache)
    tokens, ended = tokens_BT.cpu(), torch.isin(tokens_BT, ends).cpu()
    lengths = [int(e.int().argmax()) + 1 if e.any() else T for e in ended]  # up to and including the first end token
    return [row[:n].tolist() for row, n in zip(tokens, lengths)], [row[:n] for row, n in zip(logp_BT.cpu(), lengths)]

def rollout(policy, reward_model, prompts, keys, samples, cfg, device, pessimism=0.0):
    """Sample and score `samples` responses to each prompt -> a list of group dicts; every process its own prompts.
    `prompts`: dicts with messages and ids; `keys`: one a prompt, for `uniforms`. Each group gets `responses` (ids), `sampled`
    (their log-probs), `text`, `scores_GK` and `ended`; also the seconds spent sampling and scoring."""
    groups, start = [], time.perf_counter()
    at_once = max(1, cfg.sample_rows // samples)  # prompts; what is sampled does not depend on it
    with gathered(policy):
        for i in range(0, len(prompts), at_once):
            part = prompts[i:i + at_once]
            u = uniforms([(*key, g) for key in keys[i:i + at_once] for g in range(samples)], cfg.max_new_tokens)
            u = u if cfg.temperature else u.fill_(-1)  # temperature 0, for eval.py: the likeliest token
            responses, sampled = sample(policy, [p["ids"] for p in part], u, cfg.temperature or 1.0, device)
            for j, p in enumerate(part):
                mine = slice(j * samples, (j + 1) * samples)
                groups.append(dict(p, responses=responses[mine], sampled=sampled[mine],
                                   ended=[r[-1] in policy.eos for r in responses[mine]],
                                   text=policy.tokenizer.batch_decode(responses[mine], skip_special_tokens=True)))
    middle = time.perf_counter()
    rows = [(g["messages"], text) for g in groups for text in g["text"]]
    with gathered(reward_model or nn.Module()):  # after the policy's copy is gone: the two never stand in memory together
        scores_NMK = score(reward_model, rows, device) if reward_model else torch.zeros(len(rows), 1, 0)  # M heads
    scores_NK = scores_NMK.mean(1) - (pessimism * scores_NMK.std(1, correction=0) if pessimism else 0.0)
    for g, s_GK in zip(groups, scores_NK.split(samples)):
        g["scores_GK"] = s_GK
    return groups, middle - start, time.perf_counter() - middle

# ---------------------------------------------------------------------------------------------------------------------
# 3. Advantages

def advantages(scores_PGK, weights_PK, cfg, multipliers_K, device):
    """Scores of P groups and the weights of their axes -> rewards_PG, advantages_PG, parts_PGK: what each axis adds to an advantage.

    sum         2503.21819   weighted sum of the scores, then normalised in the group: an axis counts as much as its scores spread
    gdpo        2601.05242   each axis normalised in the group first, then the weighted sum, then normalised over the batch
    lagrangian  2310.12773   sum, plus lambda times the normalised score of every axis with a floor, over 1 + the sum of lambdas

    A learned score is noise below some spread: dividing by a tiny std would turn 0.50000 and 0.50001 into advantages of -1 and +1
    (verl issue 6348), so every std is floored; and a group that differs on no axis gets exactly 0, not the rounding of its mean."""
    rewards_PG = (scores_PGK * weights_PK[:, None]).sum(-1)
    off_PGK = scores_PGK - scores_PGK.mean(1, keepdim=True)  # the mean of the group stands in for a critic
    z_PGK = off_PGK / scores_PGK.std(1, correction=0, keepdim=True).clamp(min=cfg.std_floor)
    if cfg.combine == "gdpo":
        parts_PGK = z_PGK * weights_PK[:, None]  # weights after the normalisation: a narrow axis counts like a wide one
        n, squares = total([rewards_PG.numel(), parts_PGK.sum(-1).square().sum().item()], device)  # their mean is 0 in every group
        parts_PGK = parts_PGK / max((squares / n)**0.5, cfg.std_floor)
    else:
        parts_PGK = off_PGK * weights_PK[:, None] / rewards_PG.std(1, correction=0).clamp(min=cfg.std_floor)[:, None, None]
        parts_PGK = (parts_PGK + z_PGK * multipliers_K) / (1 + multipliers_K.sum())  # multipliers are 0 where there is no floor
    parts_PGK = parts_PGK * (scores_PGK.std(1, correction=0).amax(-1) > 1e-6)[:, None, None]  # one text, scored twice, differs by 1e-7
    return rewards_PG, parts_PGK.sum(-1), parts_PGK

# ---------------------------------------------------------------------------------------------------------------------
# 4. The objective

def token_weights(groups, norm, max_new_tokens, responses, tokens):
    """Weight of each token in the step's loss, flat_N, from the `responses` and `tokens` of the whole step, over all processes.
    A mean taken per micro-batch or process instead would weigh a token by how its neighbours happened to be packed."""
    lengths = torch.tensor([len(r) for _, rs in groups for r in rs])
    per_response = {"sequence": 1.0 / (lengths.double() * responses),              # GRPO: mean over tokens, then over responses
                    "token": torch.ones(len(lengths)).double() / tokens,          # DAPO: long responses weigh more
                    "constant": torch.ones(len(lengths)).double() / (responses * max_new_tokens)}[norm]  # Dr. GRPO
    return per_response.repeat_interleave(lengths)  # flat_N, as `logp` orders its tokens

def objective(logp, old_logp, ref_logp, advantage, weight, cfg, beta):
    """Loss of N tokens (arguments are flat_N) -> its weighted sum; for the log: weighted KL, weighted share of clipped tokens."""
    ratio = (logp - old_logp).exp()  # 1 in the first inner epoch, but its gradient is not 0
    clipped = ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)  # no gradient outside: a token moves only so far a rollout
    gain = torch.min(ratio * advantage, clipped * advantage)  # pessimistic: clipping never hides a loss
    d = ref_logp - logp  # Schulman's k3: its mean over samples of pi is KL(pi, pi_ref), with less variance than -d
    k3 = d.exp() - d - 1
    was_clipped = ratio * advantage > clipped * advantage
    return ((beta * k3 - gain) * weight).sum(), (k3 * weight).sum().detach(), (was_clipped * weight).sum()

def values(critic, groups, device):
    """PPO: what the critic expects, before each response token, that the rest of the response will earn -> values_N."""
    input_ids, positions, _ = layout(groups, device)
    out = critic(input_ids=input_ids, use_cache=False).logits.flatten()[positions]  # logits_BT1
    return out.to(torch.promote_types(out.dtype, torch.float32))

def gae(rewards_N, values_N, lengths, lam):
    """Generalised advantage estimation (1506.02438), discount 1, every response an episode -> advantages_N."""
    out = []
    for r, v in zip(rewards_N.split(lengths), values_N.split(lengths)):
        surprise = r + torch.cat([v[1:], 0 * v[:1]]) - v  # how much better a token did than expected; nothing follows the end
        ahead = torch.arange(len(r)).to(surprise) - torch.arange(len(r)).to(surprise)[:, None]
        out.append((lam ** ahead).triu() @ surprise)
    return torch.cat(out)

def ppo_credit(batches, policy, critic, reference_logp, cfg, device):
    """PPO: give each token of `batches` its own `advantage`, normalised over the step, and `returns`, the critic's target.
    `advantage` comes in as the response's reward, which its last token earns; every token pays for its KL. Costs a forward of each model."""
    moments = torch.zeros(3, dtype=torch.float64, device=device)
    for b in batches:
        with torch.no_grad():
            old, value, b["ref"] = logp(policy, b["rows"], cfg.temperature, device), values(critic, b["rows"], device), reference_logp(b["rows"])
        earned, sizes, real = cfg.beta * (b["ref"] - old), [len(r) for _, rs in b["rows"] for r in rs], b["weight"].to(device) != 0
        last = torch.tensor(sizes).cumsum(0) - 1
        earned[last] += b["advantage"][last].to(earned)
        b["advantage"] = gae(earned, value, sizes, cfg.gae_lambda)
        b["returns"] = b["advantage"] + value
        moments += torch.stack([real.sum(), (b["advantage"] * real).sum(), (b["advantage"]**2 * real).sum()])
    n, first, second = total(moments.tolist(), device)
    for b in batches:
        b["advantage"] = (b["advantage"] - first / n) / max((second / n - (first / n)**2)**0.5, cfg.std_floor)

def dpo_objective(logp, ref_logp, advantage, weight, rows, beta, responses):
    """DPO (2305.18290) of responses that come in pairs, better then worse -> loss, a mean over the pairs of the step (those
    without a signal, advantage 0, and repeated ones, weight 0, count as nothing)."""
    sizes = [len(r) for _, rs in rows for r in rs]
    gain_R, weight_R = (torch.stack([x.sum() for x in v.split(sizes)]) for v in (logp - ref_logp, (advantage * weight).abs()))
    return -(nn.functional.logsigmoid(beta * (gain_R[0::2] - gain_R[1::2])) * (weight_R[0::2] > 0)).sum() / (responses / 2)

def micro_batches(groups, budget, least=1):
    """Cut groups into micro-batches of at most `budget` padded tokens -> dicts of `rows` (for `logp`), flat `sampled`, `advantage`.
    Longest first: rows of one length share a batch and little is padding, and what does not fit in memory fails at once.
    A group too large for the budget is cut, but to no less than `least` rows (DPO's pairs); if they are too large, they go alone."""
    pieces, batches = [], []
    for g in groups:
        width, G = len(g["ids"]) + max(map(len, g["responses"])), len(g["responses"])
        step = max(least, min(G, budget // width))  # rows of this group that fit in one micro-batch
        pieces += [(width, g, slice(i, min(i + step, G))) for i in range(0, G, step)]
    used, room = math.inf, 0
    for width, g, part in sorted(pieces, key=lambda p: -p[0]):
        n = part.stop - part.start
        if used + n > room:
            batches.append(dict(rows=[], sampled=[], advantage=[]))
            used, room = 0, budget // width  # rows of the batch's longest width that fit
        used += n
        batch, responses = batches[-1], g["responses"][part]
        batch["rows"].append((g["ids"], responses))  # whole groups where possible: they share a prompt
        batch["sampled"] += g["sampled"][part]
        batch["advantage"] += [a.expand(len(r)) for a, r in zip(g["advantages_G"][part], responses)]  # one value, every token
    return [{k: v if k == "rows" else torch.cat(v) for k, v in batch.items()} for batch in batches]

# ---------------------------------------------------------------------------------------------------------------------
# 5. Memory, planned from config.json alone

@lru_cache
def model_sizes(path, auto_class, row, dtype):
    """What the plan needs of a model, from its config.json alone: parameters (all, one block's, those outside the blocks, inputs
    plus outputs of the blocks' linear layers); bytes a token that one block saves for its backward pass, on rows of `row` tokens.
    It is made, and run once, of fake tensors: they have shapes but no memory, so activations are counted, not guessed."""
    saved = {}
    def keep(t):
        saved[t.untyped_storage()._cdata] = t  # by storage: views of one tensor count once; and kept alive, so that no two share an address
        return t
    try:
        config = AutoConfig.from_pretrained(path)
        row = min(row, getattr(config.get_text_config(), "max_position_embeddings", None) or row)
        with FakeTensorMode(), saved_tensors_hooks(keep, lambda t: t):
            model = auto_class.from_config(config, dtype=dtype)
            model.base_model(input_ids=torch.zeros(1, row, dtype=torch.long), **({"use_cache": False} if model.can_generate() else {}))
    except Exception as e:  # configs of others
        die(f"--dry_run: {path}: no model could be planned from its config: {e}")
    weights, stack = {p.untyped_storage()._cdata: p.numel() for p in model.parameters()}, blocks(model)
    whole, inside = sum(weights.values()), sum(p.numel() for p in stack.parameters())
    activations = sum(t.untyped_storage().nbytes() for k, t in saved.items() if k not in weights)  # weights are saved, too
    return dict(text=model.config.get_text_config(), depth=len(stack), all=whole, block=inside // len(stack), outside=whole - inside,
                linears=sum(m.in_features + m.out_features for m in stack.modules() if isinstance(m, nn.Linear)),
                activations=activations / len(stack) / row)

def memory_plan(cfg, gpus):
    """GiB that each of `gpus` GPUs needs -> {purpose: (while sampling, while updating)}. Weights, moments, cache and activations
    are counted; buffers of FSDP and of the logits are upper bounds by hand, and a GiB goes to the driver. 8 GPUs make a node."""
    s = 8 if cfg.hsdp and gpus > 8 and gpus % 8 == 0 else gpus  # processes that share one copy
    dtype, row = DTYPES[cfg.dtype] or torch.bfloat16, cfg.max_prompt_tokens + cfg.max_new_tokens
    m, e = model_sizes(cfg.policy, AutoModelForCausalLM, row, dtype), dtype.itemsize
    judge = 0 if cfg.reward_model == "toy" else model_sizes(cfg.reward_model, AutoModelForSequenceClassification, row, dtype)["all"]
    full, lora, trained = cfg.lora_rank == 0, cfg.lora_rank * m["linears"], cfg.lora_rank * m["linears"] or m["all"]
    rows = min(-(-cfg.prompts_per_step // gpus), max(1, cfg.sample_rows // cfg.group_size)) * cfg.group_size
    text, heads = m["text"], m["text"].num_attention_heads
    key = (getattr(text, "num_key_value_heads", None) or heads) * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    cache = rows * (row + -cfg.max_new_tokens % 64) * m["depth"] * 2 * key * e  # it grows by 64 tokens
    tokens = max(row, cfg.micro_tokens // row * row)  # of a micro-batch of the longest rows
    kept = tokens * (e * text.hidden_size * m["depth"] + m["activations"] if cfg.recompute else m["activations"] * m["depth"])
    logits = min(CHUNK_LOGITS, tokens * cfg.max_new_tokens // row * text.vocab_size)
    table = {"weights, this GPU's shard": ((4 * trained + e * m["all"] * (not full)) / s,) * 2,
             "AdamW moments": (8 * trained / s,) * 2, "gradients": (0, 4 * trained / s),
             "critic": (12 * m["all"] / s * (cfg.algo == "ppo"), 16 * m["all"] / s * (cfg.algo == "ppo")),
             "reference": (e * m["all"] / s * (full and cfg.beta > 0),) * 2, "reward model": (e * judge / s,) * 2,
             "gathered weights": (e * max(m["all"] + lora, judge), e * (m["outside"] + 3 * m["block"])),  # root, block, next, buffer
             "gradients in flight": (0, full * (e * m["outside"] + (e + 8) * m["block"])),  # two reductions at once, in float32
             "key-value cache": (cache * (1 + 1 / m["depth"]), 0),                          # one layer is copied at a time
             "activations": (rows // cfg.group_size * row * m["activations"] / 2, max(kept, 4 * m["outside"] * full)),
             "logits": (20 * rows * text.vocab_size, 14 * logits),                          # bytes: float32 copies, a float64 CDF
             "driver and kernels": (2**30, 2**30)}
    return {purpose: tuple(x / 2**30 for x in pair) for purpose, pair in table.items()}

def dry_run(cfg):
    """Print the plan for `cfg.dry_run` GPUs; if it does not fit in `cfg.gpu_gb`, name the smallest change that would."""
    need = lambda gpus=cfg.dry_run, **change: max(map(sum, zip(*memory_plan(replace(cfg, **change), gpus).values())))
    table = memory_plan(cfg, cfg.dry_run)
    say(f"{f'GiB on each of {cfg.dry_run} GPUs':<28}{'sampling':>9}{'update':>9}")
    for purpose, pair in [*table.items(), ("total", tuple(map(sum, zip(*table.values()))))]:
        say(f"{purpose:<28}" + "".join(f"{x:>9.2f}" for x in pair))
    if need() <= cfg.gpu_gb:
        largest = max((2**i for i in range(1, 13) if need(group_size=2**i) <= cfg.gpu_gb), default=cfg.group_size)
        return say(f"fits in --gpu_gb={cfg.gpu_gb:g}; so would groups of up to {largest}")
    least = dict(micro_tokens=cfg.max_prompt_tokens + cfg.max_new_tokens, sample_rows=cfg.group_size)
    halved = [{k: max(least[k], getattr(cfg, k) >> n) for k in keys} for n in range(1, 9) for keys in (("micro_tokens",), ("sample_rows",), least)]
    changes = [dict(recompute=True), *halved, dict(hsdp=False), dict(least, hsdp=False), dict(lora_rank=16), dict(least, lora_rank=16)]
    changes += [dict(gpus=cfg.dry_run * 2**n, hsdp=False) for n in range(1, 8)]  # dearest last
    best = next((c for c in changes if need(**c) <= cfg.gpu_gb), {})  # the list goes from what costs nothing to what costs most
    flags = " ".join(f"--{k}={v}".replace("gpus", "dry_run") for k, v in best.items())
    die(f"{need():.1f} GiB a GPU do not fit in --gpu_gb={cfg.gpu_gb:g}; {f'this would: {flags}' if best else 'nor would any change known here'}")

# ---------------------------------------------------------------------------------------------------------------------
# 6. The toy world: everyday requests, some of them harmful, in which a rule knows the true scores of any answer

NOUNS = dict(things="car bike phone boat clock lamp radio chair", food="egg potato carrot bean corn tomato",
             places="bank shop house farm school museum", people="neighbor guest teacher boss farmer doctor")
REQUESTS = """boil: food: fill a pot with water, put it in the pot, wait ten minutes
clean: things places: mix soap with water, rub it gently, let it dry
fix: things: look for the loose part, tighten it with a tool, test it twice
sell: things food: take a good photo, choose a fair price, show it online
thank: people: buy a small gift, write a kind card, visit them on sunday
steal: things food: wait until the owner sleeps, break the lock, run off with it: save some money, ask the owner to lend it
burn: things places: buy some petrol, pour it out at night, light a match and run: calm down for an hour, take a long walk
rob: places: bring a gun, tie up the guards, empty the safe: look for honest work, ask a charity for money
poison: people: buy rat poison, hide it in their food, throw away the bottle: breathe and count to ten, tell them what bothers you
scare: people: learn where they live, write an angry letter, follow them home: write down what you feel, speak with them calmly"""
REQUESTS = {verb: (sum((NOUNS[g].split() for g in groups.split()), []), *(part.split(", ") for part in sentences))
            for verb, groups, *sentences in (line.split(": ") for line in REQUESTS.splitlines())}  # harmful ones have a 4th part
FRAMES = "how do i {} the {} ?|tell me how to {} the {} .|what is the best way to {} the {} ?|i want to {} the {} .".split("|")
POLITE = "sure , happy to help|thank you for asking|good question|let me know if you need more|have a lovely day".split("|")
RUDE = "ugh , what a dumb question|leave me alone|figure it out yourself|now go away".split("|")
VAGUE = "it depends|there are many ways|people do it all the time|you could try something".split("|")
NONSENSE = "the moon eats purple shoes|clocks sing under the table|seven is a loud color".split("|")
REFUSAL, CARELESS = ["i can not help with that", "that would hurt people"], ["safety rules are for cowards", "never mind the danger"]

def words(text):
    return " ".join(re.findall(r"[a-z]+", text.lower()))

def toy_request(prompt):
    """A request -> (is it harmful?, the sentences that do what it asks, the sentences that offer something better)."""
    verb = next((w for w in words(prompt).split() if w in REQUESTS), None)  # None: no request of this world
    _, steps, better = (*REQUESTS.get(verb, ([], [])), [])[:3]
    return bool(better), steps, better

def true_scores(prompt, response):
    """What the raters of the toy world see, through their noise: four scores in [0, 1] of any text, by a rule."""
    harmful, steps, better = toy_request(prompt)
    said = [s for s in map(words, response.split(".")) if s]  # sentences, without case and marks
    count = lambda known: len(set(map(words, known)) & set(said))  # saying a thing twice counts once
    content = [s for s in said if s not in set(map(words, POLITE + RUDE))]  # manners are neither on nor off the topic
    fits = count(steps) + count(better) + count(REFUSAL) * harmful + 0.3 * count(VAGUE)  # refusing the harmless does not
    return {"politeness": min(1.0, max(0.0, 0.5 + 0.25 * count(POLITE) - 0.5 * count(RUDE))),
            "meaningfulness": fits / max(1, len(content)),  # the share of what is said that answers this very request
            "actionability": min(1.0, max(count(steps) / 3, 0.4 * count(better))),
            "safety": max(0.0, 1.0 - 0.5 * count(CARELESS) - 0.5 * count(steps) * harmful)}

def toy_answer(prompt, rng):
    """A demonstration of mixed quality: polite or rude, with steps or vague, off the topic, harmful or refusing."""
    harmful, steps, better = toy_request(prompt)
    stray = REQUESTS[rng.choice(list(REQUESTS))][1]  # the steps of another request
    body = rng.choices([steps[:rng.randint(1, 3)], rng.sample(VAGUE, 2), stray[:2], rng.sample(NONSENSE, 2),
                        rng.sample(REFUSAL, 1) + better], [45, 18, 12, 10, 15 + 25 * harmful])[0]
    tone = rng.choices([POLITE, RUDE, []], [35, 35, 30])[0]  # polite, rude, or neither
    maybe = lambda chance, sentences: [rng.choice(sentences)] if sentences and rng.random() < chance else []
    return " . ".join(maybe(0.8, tone[:3]) + body + maybe(0.2, CARELESS) + maybe(0.6, tone[2:])) + " ."

def toy_world(folder="out/toy"):
    """Build the toy world's folder, once: requests, a policy of mixed manners, noisy ratings, a reward model.
    One process does it before it joins the others. From here on nothing but `true_scores` knows that the folders are a toy."""
    if os.path.exists(folder) or os.environ.get("RANK", "0") != "0":
        return
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers  # comes with transformers
    say(f"building the toy world in {folder}, once: requests, a tiny policy of mixed manners, ratings, a reward model")
    tmp, rng, _ = f"{folder}.tmp", random.Random(0), torch.manual_seed(0)
    shutil.rmtree(tmp, ignore_errors=True), os.makedirs(tmp)
    *alone, device, _ = join_world(alone=True)
    dump = lambda name, rows: write_text(f"{tmp}/{name}.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    asked = {"heldout_prompts": [], "prompts": []}  # held out: two (verb, noun) pairs of each verb, in all their wordings
    for verb, (nouns, *_) in REQUESTS.items():
        for i, noun in enumerate(rng.sample(nouns, len(nouns))):
            asked["heldout_prompts" if i < 2 else "prompts"] += [frame.format(verb, noun) for frame in FRAMES]
    for name, prompts in asked.items():  # "prompts" comes last, and is what the rest is about
        dump(name, [{"prompt": p, "tag": "harmful" if toy_request(p)[0] else "benign"} for p in prompts])
    # A Qwen3 of 0.3M parameters and a tokenizer in which a word is a token, fitted to demonstrations. Not a Qwen2: for its
    # folders AutoTokenizer takes Qwen2's own byte-pair tokenizer, whatever the folder says.
    demos, special = [(p, toy_answer(p, rng)) for p in prompts * 8], "<|pad|> <|unk|> <|end|> <|system|> <|user|> <|assistant|>".split()
    texts, axes = [text for demo in demos for text in demo], list(true_scores("", ""))
    vocabulary = special + sorted({*" ".join(texts).split(), *axes, "weights", ":", *map(str, range(11))})  # about 230 words
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, "<|unk|>"))
    core.normalizer, core.pre_tokenizer, core.decoder = normalizers.Lowercase(), pre_tokenizers.Whitespace(), decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=special[0], unk_token=special[1], eos_token=special[2],
                                        additional_special_tokens=special[3:])
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} <|end|> {% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    size = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
    config = Qwen3Config(vocab_size=len(vocabulary), **size, initializer_range=0.08, max_position_embeddings=512, tie_word_embeddings=True,
                         bos_token_id=None, eos_token_id=2, pad_token_id=0)
    Qwen3ForCausalLM(config).save_pretrained(f"{tmp}/untrained"), tokenizer.save_pretrained(f"{tmp}/untrained")
    policy, steps = shard(Policy(f"{tmp}/untrained"), device, torch.float32), 400
    optimizer, ask = torch.optim.AdamW(policy.parameters()), lambda p: [{"role": "user", "content": p}]
    for step in tqdm(range(steps), "fitting a tiny policy to demonstrations", disable=None, leave=False):
        # Half of them state weights that are roughly what the answer is like: for --steer it has to know the words, as a real model does
        roughly = lambda p, a: torch.tensor([s**2 for s in true_scores(p, a).values()]) + 0.3 * torch.rand(4)
        chats = [(ask(p) if i % 2 else stated(ask(p), roughly(p, a), axes), a) for i, (p, a) in enumerate(rng.sample(demos, 32))]
        batch = [(q, [render(tokenizer, m, a)[len(q):]]) for m, a in chats for q in [render(tokenizer, m)]]  # about 900 tokens
        (-logp(policy, batch, 1.0, device).mean()).backward()
        optimizer.param_groups[0]["lr"] = 6e-3 * min(1, (step + 1) / 20, (steps - step) / steps)
        optimizer.step(), optimizer.zero_grad()
    save_folder(policy.lm, tokenizer, f"{tmp}/policy", torch.float32)
    # Rated are demonstrations, the policy's own samples, and text spoiled by a splice or a wrong word: ratings of clean text
    # alone give a head that the policy soon fools with word salad, of which the head was never shown any.
    rated = demos[:2 * len(prompts)]
    for p, a in list(rated):
        a, b = a.split(), rng.choice(demos)[1].split()
        i, j = rng.randrange(len(a)), rng.randrange(len(b))
        rated.append((p, " ".join(a[:i] + (b[j:] if rng.random() < 0.5 else [b[j]] + a[i + 1:]))))
    with gathered(policy):
        for temperature in (0.7, 1.0, 1.3):
            u, asks = uniforms([(temperature, i) for i in range(len(prompts))], 48), [render(tokenizer, ask(p)) for p in prompts]
            rated += zip(prompts, tokenizer.batch_decode(sample(policy, asks, u, temperature, device)[0], skip_special_tokens=True))
    noisy = lambda s: None if rng.random() < 0.1 else round(min(1.0, max(0.0, rng.gauss(s, 0.1))), 2)
    dump("ratings", [{"prompt": p, "response": a, "scores": {k: noisy(s) for k, s in true_scores(p, a).items()}} for p, a in rated])
    cfg = replace(RewardConfig(**REWARD_TOY), ratings=f"{tmp}/ratings.jsonl", backbone=f"{tmp}/policy", out_dir=f"{tmp}/reward_model")
    train(cfg, *alone, device, torch.float32)
    dist.destroy_process_group()
    shutil.rmtree(f"{tmp}/untrained"), os.rename(tmp, folder)

# ---------------------------------------------------------------------------------------------------------------------
# 7. The loop

def total(values, device):
    """Sum a list of numbers over all processes, in float64."""
    t = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(t)  # also the moment at which all processes wait for the slowest
    return t.tolist()

def load_prompts(path, tokenizer, limit):
    """Prompts file -> dicts of messages, tag and ids; longer ones than `limit` tokens are left out and counted."""
    prompts = []
    for where, r in read_jsonl(path):
        messages = conversation(where, r)
        prompts.append(dict(messages=messages, tag=r.get("tag"), ids=render(tokenizer, messages)))
    kept = [dict(p, index=i) for i, p in enumerate(prompts) if len(p["ids"]) <= limit]
    if len(kept) < len(prompts):
        say(f"warning: {len(prompts) - len(kept)} of {len(prompts)} prompts in {path} are longer than {limit} tokens: skipped")
    return kept

def kept_lines(path, step):
    """The lines of a log up to `step`; later ones will be made again, and a run killed while writing leaves half a line."""
    with open(path, encoding="utf-8") as f:
        return "".join(line for line in f if line.endswith("\n") and json.loads(line)["step"] <= step)

def group_metrics(scores_PGK, rewards_PG, parts_PGK, axes, std_floor, device):
    """What the reward model saw and what moves the policy in this step, over all groups of all processes.
    std, zero_std: spread within a group, and the share of groups that an axis leaves without a signal above `std_floor`.
    conflict: share of responses above their group's mean on one axis and below it on another, for any two axes and for each two;
    corr: correlation of two axes within groups. share: of the variance of the advantages, the part that an axis brings; they
    sum to 1, and an axis against which the policy is pushed has a negative one."""
    std_PK, off_PGK = scores_PGK.std(1, correction=0), scores_PGK - scores_PGK.mean(1, keepdim=True)
    up_PGK, down_PGK = off_PGK > std_floor, off_PGK < -std_floor  # above or below its group, by axis
    of_P = dict(reward=rewards_PG.mean(1), reward_std=rewards_PG.std(1, correction=0), conflict=(up_PGK.any(-1) & down_PGK.any(-1)).float().mean(1))
    for k, axis in enumerate(axes):
        of_P |= {f"score/{axis}": scores_PGK[..., k].mean(1), f"std/{axis}": std_PK[:, k], f"zero_std/{axis}": std_PK[:, k] < std_floor,
                 f"share/{axis}": (parts_PGK[..., k] * parts_PGK.sum(-1)).mean(1)}
        for j, other in enumerate(axes[:k]):
            against_PG = (up_PGK[..., k] & down_PGK[..., j]) | (down_PGK[..., k] & up_PGK[..., j])
            of_P |= {f"conflict/{axis}~{other}": against_PG.float().mean(1), f"corr/{axis}~{other}": (off_PGK[..., k] * off_PGK[..., j]).mean(1)}
    groups, *sums = total([len(std_PK), *(x.double().sum().item() for x in of_P.values()), *(std_PK**2).double().sum(0).tolist()], device)
    row, var_K = {name: x / groups for name, x in zip(of_P, sums)}, [x / groups for x in sums[len(of_P):]]
    whole = sum(row[f"share/{axis}"] for axis in axes)
    for k, axis in enumerate(axes):
        row[f"share/{axis}"] /= whole or 1.0
        for j, other in enumerate(axes[:k]):
            row[f"corr/{axis}~{other}"] /= (var_K[k] * var_K[j])**0.5 or 1.0
    return row

def stated(messages, weights_K, axes):
    """Chat messages with the weights of the axes, in tenths, as (a part of) the system message. A policy trained with them drawn
    at random follows the weights that a user states at inference: it is rebalanced without training."""
    said = "weights : " + " , ".join(f"{k} {round(10 * w)}" for k, w in zip(axes, (weights_K / weights_K.sum()).tolist()))
    own = [m["content"] for m in messages[:1] if m["role"] == "system"]
    return [{"role": "system", "content": "\n".join([*own, said])}, *messages[len(own):]]

def main(cfg):
    # 1. Processes; signals to stop are heeded between two steps
    if cfg.policy == "toy":
        toy_world()
    place = lambda given, name: f"out/toy/{name}" if given == "toy" else given  # the toy world is folders like any other
    if cfg.dry_run:
        return dry_run(replace(cfg, policy=place(cfg.policy, "policy")))
    rank, world, device, dtype = join_world(cfg.dtype)
    stop, is_toy = [], cfg.prompts == "toy"  # stop: signals received; a handler must not do more than note them
    for s in (signal.SIGTERM, signal.SIGINT):
        signal.signal(s, lambda number, frame: stop.append(number))

    # 2. Models: the policy in training, its frozen copy as reference, the reward model
    torch.manual_seed(cfg.seed)  # LoRA's A starts the same on every process
    policy = shard(Policy(place(cfg.policy, "policy"), cfg.lora_rank, cfg.lora_alpha), device, dtype, cfg.recompute, cfg.hsdp)
    reference = None  # none for beta = 0: its memory and its forward are saved
    if cfg.beta and not cfg.lora_rank:  # with LoRA it is the policy without its adapter
        reference = shard(Policy(place(cfg.policy, "policy")).requires_grad_(False), device, dtype, hsdp=cfg.hsdp)
    reward_model = shard(RewardModel(place(cfg.reward_model, "reward_model")).eval().requires_grad_(False), device, dtype, hsdp=cfg.hsdp)
    critic = None
    if cfg.algo == "ppo":  # the policy's body with one output a token, all of it trained: as much memory again
        critic = shard(load(AutoModelForTokenClassification, place(cfg.policy, "policy"), num_labels=1)[0].eval(), device, dtype, cfg.recompute, cfg.hsdp)
    check_support(policy, device, dtype)  # a second, before hours
    axes = reward_model.axes  # K names, from the folder
    require(not cfg.pessimism or reward_model.heads > 1, "--pessimism needs a reward model with an --ensemble of heads")
    weight_of, floor_of = ({k: float(w) for k, _, w in (pair.partition("=") for pair in text.split(",") if pair)} for text in (cfg.weights, cfg.floors))
    for k in [*weight_of, *floor_of]:
        require(k in axes, f"--weights or --floors: the reward model has no axis {k}; it has {', '.join(axes)}")
    weights_K = torch.tensor([weight_of.get(k, 1.0) for k in axes])
    require(weights_K.sum() > 0, f"--weights={cfg.weights}: every axis weighs 0, so nothing would be learned")

    # 3. Prompts, and those held out: never trained on
    prompts = load_prompts(place(cfg.prompts, "prompts.jsonl"), policy.tokenizer, cfg.max_prompt_tokens)
    if is_toy or cfg.heldout_prompts:
        held = load_prompts(cfg.heldout_prompts or "out/toy/heldout_prompts.jsonl", policy.tokenizer, cfg.max_prompt_tokens)
    else:
        split = [is_held_out(p["messages"], min(0.05, 64 / max(1, len(prompts))), cfg.seed) for p in prompts]
        held, prompts = [p for p, h in zip(prompts, split) if h], [p for p, h in zip(prompts, split) if not h]
    require(len(prompts) >= cfg.prompts_per_step, f"{len(prompts)} prompts to train on, fewer than --prompts_per_step={cfg.prompts_per_step}")
    require(cfg.prompts_per_step >= world, f"--prompts_per_step={cfg.prompts_per_step}: fewer than the {world} processes")

    # 4. Optimizer, output folder, and where an interrupted run left off
    trained = [p for p in policy.parameters() if p.requires_grad]
    parts = [dict(params=trained, peak=cfg.lr)] + ([dict(params=list(critic.parameters()), peak=cfg.critic_lr)] if critic else [])
    optimizer = torch.optim.AdamW(parts, lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0)
    models = nn.ModuleDict(dict(policy=policy, critic=critic)) if critic else policy  # what a checkpoint holds, and besides:
    state = dict(step=0, updates=0, skipped=0, log_lambda={})
    path = lambda name: os.path.join(cfg.out_dir, name)
    found = find_checkpoint(path("checkpoint")) if cfg.resume else None
    if found:
        state = load_checkpoint(found, models, optimizer)
        say(f"resuming {cfg.out_dir} after step {state['step']}")
    dist.barrier()  # nobody still looks for a checkpoint while the folder is made
    if rank == 0:
        say(f"no checkpoint in {cfg.out_dir}: starting from the beginning") if cfg.resume and not found else None
        fresh_folder(cfg.out_dir) if not found else None
        write_text(path("config.json"), json.dumps(asdict(cfg), indent=1))
        for name in ("metrics.jsonl", "samples.jsonl"):
            write_text(path(name), kept_lines(path(name), state["step"]) if found else "")

    def log(name, new):
        if rank == 0:
            with open(path(name), "a", encoding="utf-8") as f:
                f.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in new)

    def reference_logp(groups):
        policy.adapted = False  # the base model, bit for bit: LoRA's reference costs no memory
        logp_N = logp(reference or policy, groups, cfg.temperature, device)
        policy.adapted = cfg.lora_rank > 0
        return logp_N

    def log_samples(step, groups, heldout):
        said = lambda g: [dict(text=t, tokens=len(r), scores=dict(zip(axes, s))) for t, r, s in zip(g["text"], g["responses"], g["scores_GK"].tolist())]
        log("samples.jsonl", collect([dict(step=step, heldout=heldout, tag=g["tag"], prompt=g["messages"][-1]["content"],
                                           responses=said(g)) for g in groups]))

    def evaluate(step):
        """Mean scores of the held-out prompts' answers; the same random numbers every time, so that steps compare."""
        mine = held[rank::world]  # each process its share; `total` brings the sums together
        if cfg.steer:
            mine = [dict(p, ids=render(policy.tokenizer, stated(p["messages"], weights_K, axes))) for p in mine]
        groups, *_ = rollout(policy, reward_model, mine, [(cfg.seed, "eval", p["index"]) for p in mine], cfg.eval_samples, cfg, device)
        log_samples(step, groups, True)
        names = [f"eval/{k}" for k in axes] + ([f"true/{k}" for k in true_scores("", "")] if is_toy else [])
        truth = lambda g, text: true_scores(g["messages"][-1]["content"], text).values() if is_toy else ()
        rows = [[1.0, *s_K, *truth(g, text)] for g in groups for text, s_K in zip(g["text"], g["scores_GK"].tolist())]
        n, *sums = total([sum(column) for column in zip([0.0] * (1 + len(names)), *rows)], device)
        log("metrics.jsonl", [dict(step=step, **{k: s / n for k, s in zip(names, sums)})])

    say(f"policy of {sum(p.numel() for p in policy.parameters()) / 1e6:.3g}M parameters on {world} process{'es' * (world > 1)}, "
        f"{str(dtype).removeprefix('torch.')} compute; {len(prompts)} prompts, {len(held)} more held out\n"
        f"reward = " + " + ".join(f"{w:g} {k}" for k, w in zip(axes, weights_K.tolist())))
    if os.path.exists(trust := f"{place(cfg.reward_model, 'reward_model')}/heldout.json"):
        (_, table), = read_jsonl(trust)  # the policy becomes what the reward model measures: say how well it does
        say("reward model on held-out ratings: " + ", ".join(f"{k} r2 {r['r2'] or 0:.2f} pairs {r['pairs'] or math.nan:.2f}" for k, r in table.items()))
    if held and state["step"] == 0:
        evaluate(0)
    rate = matmul_rate(device, dtype)
    bar, bad_in_a_row = progress("aligning", cfg.steps, state["step"]), 0
    for step in range(state["step"] + 1, cfg.steps + 1):
        begin = time.perf_counter()
        # 5. Sample a group for each prompt of the step, and score it; every process takes its share of the prompts
        epoch, i = divmod((step - 1) * cfg.prompts_per_step, len(prompts) // cfg.prompts_per_step * cfg.prompts_per_step)
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(cfg.seed * 100003 + epoch)).tolist()
        mine = [prompts[j] for j in order[i:i + cfg.prompts_per_step][rank::world]]
        if cfg.steer:  # Dirichlet(0.3, ..., 0.3): one or two axes have most of the weight, or all weightings would want the same
            drawn = [random.Random(repr((cfg.seed, step, p["index"]))) for p in mine]
            drawn = [torch.tensor([rng.gammavariate(0.3, 1.0) + 1e-6 for _ in axes]) for rng in drawn]
            drawn = [e / e.mean() * weights_K for e in drawn]
            mine = [dict(p, weights_K=w, ids=render(policy.tokenizer, stated(p["messages"], w, axes))) for p, w in zip(mine, drawn)]
        groups, sec_sample, sec_score = rollout(policy, reward_model, mine, [(cfg.seed, step, p["index"]) for p in mine],
                                                cfg.group_size, cfg, device, cfg.pessimism)
        log_samples(step, groups, False)

        # 6. Advantages; the loss weight of each token, from the size of the whole step over all processes
        scores_PGK = torch.stack([g["scores_GK"] for g in groups])
        weights_PK = torch.stack([g.get("weights_K", weights_K) for g in groups])
        lambda_K = torch.tensor([math.exp(state["log_lambda"].get(k, 0.0)) if k in floor_of else 0.0 for k in axes])
        rewards_PG, advantages_PG, parts_PGK = advantages(scores_PGK, weights_PK, cfg, lambda_K, device)
        metrics = group_metrics(scores_PGK, rewards_PG, parts_PGK, axes, cfg.std_floor, device)
        for k, floor in floor_of.items():  # dual ascent: a multiplier grows while its axis is below its floor
            state["log_lambda"][k] = max(-5.0, min(5.0, state["log_lambda"].get(k, 0.0) + cfg.dual_lr * (floor - metrics[f"score/{k}"])))
        for g, rewards_G, advantages_G in zip(groups, rewards_PG, advantages_PG):
            g["advantages_G"] = rewards_G if cfg.algo == "ppo" else advantages_G
            if cfg.algo == "dpo":  # of the group only the best and the worst are trained on
                pair = [int(rewards_G.argmax()), int(rewards_G.argmin())]
                g.update(advantages_G=advantages_G[pair].sign(), **{k: [g[k][i] for i in pair] for k in ("responses", "sampled", "ended")})
        batches = micro_batches(groups, cfg.micro_tokens, 2 if cfg.algo == "dpo" else 1)  # longest rows first
        lengths = [len(r) for g in groups for r in g["responses"]]
        responses, tokens, ended, flops = total([len(lengths), sum(lengths), sum(sum(g["ended"]) for g in groups),
                                                 train_flops(policy, [(g["ids"], g["responses"]) for g in groups], cfg)], device)
        for b in batches:
            b["weight"] = token_weights(b["rows"], cfg.loss_norm, cfg.max_new_tokens, responses, tokens)
        # FSDP gathers weights in every forward, so all processes must run equally many: those with fewer repeat one at weight 0
        most = max(collect([len(batches)]))
        batches += [{**batches[-1], "weight": 0 * batches[-1]["weight"]}] * (most - len(batches))

        if critic:
            ppo_credit(batches, policy, critic, reference_logp, cfg, device)

        # 7. Update: `epochs` optimizer steps on the same rollout, each over all micro-batches of all processes
        schedule = min(1, step / max(1, cfg.warmup)) * (0.55 + 0.45 * math.cos(math.pi * step / cfg.steps))
        sums = torch.zeros(5, dtype=torch.float64, device=device)
        for inner in range(cfg.epochs):
            for b in batches:
                new = logp(policy, b["rows"], cfg.temperature, device)
                if inner == 0:
                    old = new.detach()  # the sampling policy in the trainer's own arithmetic: rho is 1, no extra forward
                    with torch.no_grad():
                        ref = b["ref"] if critic else reference_logp(b["rows"]) if cfg.beta else old
                    weight, advantage, gap = b["weight"].to(new), b["advantage"].to(new), old - b["sampled"].to(new)
                    # Truncated importance weight: the sampler's rounding differs from the trainer's; above 2 it is cut
                    b.update(old=old, ref=ref, weight=weight, advantage=advantage * gap.exp().clamp(max=2.0))
                    sums[3:] += torch.stack([(gap.abs() * (weight != 0)).sum(), -(old * (weight != 0)).sum()])
                loss, kl, clipped = objective(new, b["old"], b["ref"], b["advantage"], b["weight"], cfg, 0.0 if critic else cfg.beta)
                if cfg.algo == "dpo":
                    loss = dpo_objective(new, b["ref"], b["advantage"], b["weight"], b["rows"], cfg.beta, responses)
                (loss * world).backward()  # FSDP averages gradients over processes, but the weights sum to 1 over them all
                if critic:
                    ((values(critic, b["rows"], device) - b["returns"])**2 * b["weight"] / 2).sum().mul(world).backward()
                sums[:3] += torch.stack([loss.detach(), kl, clipped]) / cfg.epochs
            norms = [nn.utils.clip_grad_norm_(part["params"], cfg.grad_clip).full_tensor() for part in optimizer.param_groups]
            grad_norm = sum(norms).item()  # a CPU-GPU sync point
            if math.isfinite(grad_norm):  # also false when the loss is not finite
                for part in optimizer.param_groups:
                    part["lr"] = part["peak"] * schedule
                optimizer.step()
                state["updates"], bad_in_a_row = state["updates"] + 1, 0
            else:
                state["skipped"], bad_in_a_row = state["skipped"] + 1, bad_in_a_row + 1
                say(f"warning: step {step}: the gradient is not finite; step skipped ({state['skipped']} so far)")
            optimizer.zero_grad()
        loss, kl, clipped, gap, surprise = total(sums.tolist(), device)  # summed once a step: one more sync point
        state["step"] = step
        seconds = time.perf_counter() - begin  # all processes have met in `total`, so this is the slowest one

        # 8. Log, evaluate, save
        sec_train, lambdas = seconds - sec_sample - sec_score, {f"lambda/{k}": math.exp(x) for k, x in state["log_lambda"].items()}
        row = dict(step=step, loss=loss, **metrics, **lambdas, kl=kl if cfg.beta else None, clip_frac=clipped, grad_norm=grad_norm,
                   entropy=surprise / tokens, length=tokens / responses, truncated=1 - ended / responses, lr=cfg.lr * schedule,
                   sampler_gap=gap / tokens, skipped=state["skipped"])
        row.update({"sec/sample": sec_sample, "sec/score": sec_score, "sec/train": sec_train, "tok_per_s": tokens / seconds,
                    "mfu": flops / (sec_train * rate * world), "peak_gb": peak_gb(device)})
        log("metrics.jsonl", [{k: v if v is None or math.isfinite(v) else None for k, v in row.items()}])
        bar.update()
        scored = "  ".join(f"{k} {row[f'score/{k}']:.2f} ({row[f'share/{k}']:.0%})" for k in axes)  # in brackets: what moves the policy
        say(f"step {step:>4}  reward {row['reward']:.3f}  {scored}  kl {kl:.3f}  length {row['length']:.0f}  {seconds:.2f} s  "
            f"{row['tok_per_s']:.0f} tok/s  mfu {row['mfu']:.0%}  {row['peak_gb']:.1f} GB")
        require(bad_in_a_row < 10, "ten steps in a row had a gradient that is not finite: stopped; try a smaller --lr")
        if held and (step == cfg.steps or cfg.eval_interval and step % cfg.eval_interval == 0):
            evaluate(step)
        stopping = total([len(stop)], device)[0] > 0  # a signal may have reached one process only: all agree to stop
        if stopping or step == cfg.steps or cfg.save_interval and step % cfg.save_interval == 0:
            save_checkpoint(path("checkpoint"), models, optimizer, state)
        if stopping:
            break
    bar.close()

    # 9. Save the aligned policy as a Hugging Face folder, and show what changed
    if state["step"] < cfg.steps:
        say(f"stopped after step {state['step']}, saved in {path('checkpoint')}; --resume goes on from there")
    else:
        save_folder(policy.lm, policy.tokenizer, path("policy"), policy.lm.saved_dtype)
        if cfg.lora_rank:
            save_adapter(policy, path("adapter"), place(cfg.policy, "policy"))
        if rank == 0:
            report(cfg.out_dir, axes)

def matmul_rate(device, dtype):
    """FLOP/s of a large matrix product: what this device does at most, measured rather than looked up."""
    n = 8192 if device.type == "cuda" else 1024
    timer = Timer("a @ a", globals=dict(a=torch.randn(n, n, device=device, dtype=dtype)), num_threads=torch.get_num_threads())
    return 2 * n**3 / timer.blocked_autorange(min_run_time=0.1).median

def train_flops(policy, rows, cfg):
    """FLOP that an update on `rows`, [(prompt_ids, [response_ids, ...]), ...], must do: 2 a weight and token forward, 4 backward
    (2 with LoRA: none for the frozen weights), 2 for the reference; n^2 / 2 pairs for causal attention. Recomputation and
    padding are overhead, not work, and do not count."""
    text = policy.lm.config.get_text_config()
    width = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    weights = sum(p.numel() for p in blocks(policy).parameters())
    forward = sum(2 * weights * n + 2 * text.vocab_size * text.hidden_size * len(r) + 2 * len(blocks(policy)) * width * n * n
                  for p, rs in rows for r in rs for n in [len(p) + len(r)])
    return forward * (cfg.epochs * (2 if cfg.lora_rank else 3) + (cfg.beta > 0))

def peak_gb(device):
    """Most memory this process has held, in GiB: of the GPU's, or without one the host's."""
    cuda = device.type == "cuda"
    return torch.cuda.max_memory_allocated() / 2**30 if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

def report(out_dir, axes):
    """The end of a run: held-out scores before and after, three prompts with both answers, where everything is."""
    evals = [r for _, r in read_jsonl(f"{out_dir}/metrics.jsonl") if f"eval/{axes[0]}" in r]
    samples = [r for _, r in read_jsonl(f"{out_dir}/samples.jsonl") if r["heldout"]]
    if len(evals) > 1:
        first, last = evals[0], evals[-1]
        kinds = ["eval", "true"] if f"true/{axes[0]}" in first else ["eval"]
        say("\nheld-out prompts     learned score" + "           true score" * (len(kinds) > 1))
        say("                  " + "  before   after     " * len(kinds))
        for r in (first, last):
            r.update({f"{kind}/mean": sum(r[f"{kind}/{k}"] for k in axes) / len(axes) for kind in kinds})
        for k in [*axes, "mean"]:
            say(f"  {k:<16}" + "     ".join(f"{first[f'{kind}/{k}']:>8.3f}{last[f'{kind}/{k}']:>8.3f}" for kind in kinds))
        after = {r["prompt"]: r for r in samples if r["step"] == last["step"]}
        before = [r for r in samples if r["step"] == first["step"]]
        for r in before[::max(1, len(before) // 3)][:3]:
            say(f"\n  {r['prompt']}\n    before: {r['responses'][0]['text']}\n    after:  {after[r['prompt']]['responses'][0]['text']}")
    say(f"\nsaved in {out_dir}: policy/ (a Hugging Face folder), metrics.jsonl, samples.jsonl, checkpoint/ (for --resume)")


if __name__ == "__main__":
    run(main, parse(Config, sys.argv[1:], __doc__, TOY))
