"""
What a run of mogrpo.py takes of each GPU's memory, planned from config.json alone.

    python -m bench.memory --policy=Qwen/Qwen2.5-14B-Instruct --gpus=8
    python -m bench.memory --policy=DIR --reward_model=out/rm,other/rm --gpus=16 --hsdp=False
    python -m bench.memory --policy=DIR --gpus=1 --gpu_gb=24 --lora_rank=16 --group_size=16

Takes the flags of mogrpo.py and three of its own; needs no GPU, weights, prompts or rules. Prints
GiB on each GPU by purpose: what is always there, what each stage of a step takes on top, and the
largest group that would fit. Where the run does not fit: one line with the smallest change that
would, exit status 2.

The models are made, and run once, of fake tensors: these have shapes but no memory, so what a block
keeps for its backward pass is counted, not guessed. Buffers of FSDP and of the logits are upper
bounds by hand. On CPU the plan stands within 15 % of the live bytes of real sampling and real
updates (a test). What it is not: a measurement. Nothing here was checked on a GPU, where kernels,
NCCL and the gaps of the allocator come on top: "driver and kernels" is a guess.
"""
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from types import SimpleNamespace

import torch
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import mogrpo
from ablations import lean
from mogrpo import TOY, die, launch, require, say

NODE = 8  # GPUs of a node: with --hsdp they share one copy of the weights
GIB = 2**30

@dataclass
class Config(mogrpo.Config):
    gpus: int = 8                 # GPUs of the run, over all nodes
    gpu_gb: float = 80.0          # memory of one of them in GiB
    lean: bool = False            # by ablations/lean.py

# --------------------------------------------------------------------------------------------------
# 1. What the plan needs of a model

@lru_cache
def sizes(auto_class, path, dtype, length):
    """Counts of numbers in a model, and the bytes a token that one block keeps for its backward
    pass, on a row of `length` tokens. Where `path` has no such model: one line, exit status 2."""
    kept = {}

    def keep(tensor):
        # By storage: views of one tensor count once. Kept alive: no two get the same address.
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    try:
        config = AutoConfig.from_pretrained(path)
        text = config.get_text_config()
        length = min(length, getattr(text, "max_position_embeddings", None) or length)
        with FakeTensorMode(), saved_tensors_hooks(keep, lambda tensor: tensor):
            model = auto_class.from_config(config, dtype=dtype).eval()
            # With its cache: without one the library takes a mask, as it does where it is traced
            model.base_model(input_ids=torch.zeros(1, length, dtype=torch.long))
    except Exception as e:  # configs of others fail in any way they like
        die(f"{path}: no model could be planned from its config: {e}")
    for weight in model.parameters():
        kept.pop(weight.untyped_storage()._cdata, None)  # kept, too, but no activations
    layers = mogrpo.blocks(model)
    whole = sum(p.numel() for p in model.parameters())  # a tied weight once
    inside = sum(p.numel() for p in layers.parameters())
    linears = [m for m in layers.modules() if isinstance(m, torch.nn.Linear)]
    key_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return SimpleNamespace(
        text=text,
        layers=len(layers),
        whole=whole,
        block=inside // len(layers),
        root=whole - inside,  # embedding, final norm and head
        adapter=sum(m.in_features + m.out_features for m in linears),  # of rank 1
        cache=2 * key_heads * head_dim,  # keys and values of a token in one layer
        queries=text.num_attention_heads * head_dim,
        together=text.num_attention_heads // key_heads,  # query heads that share a key's
        kept=sum(t.untyped_storage().nbytes() for t in kept.values()) / len(layers) / length,
    )

# --------------------------------------------------------------------------------------------------
# 2. The plan

def compute_dtype(cfg):
    """As on a GPU, wherever the plan is made."""
    return torch.bfloat16 if cfg.dtype == "auto" else getattr(torch, cfg.dtype)

def activations(cfg, model, rows, dtype):
    """Bytes that so many of the longest rows hold between forward and backward pass, and that are
    made again in the backward pass."""
    e = dtype.itemsize
    row = cfg.max_prompt_tokens + cfg.max_new_tokens
    groups = math.ceil(rows / cfg.group_size)
    tokens = rows * cfg.max_new_tokens + groups * cfg.max_prompt_tokens  # a prompt is there once
    # Beside what a stock block keeps: for each row the keys and values of its prompt, and queries
    block = tokens * model.kept + e * (rows * row * model.cache + tokens * model.queries)
    masks = e * rows * cfg.max_new_tokens * row * model.together  # one for all layers
    if cfg.recompute != "False":  # auto: on a GPU
        # The blocks' inputs are held, the rest is made again, of a block at a time
        return masks + tokens * e * model.text.hidden_size * model.layers, block
    return masks + block * model.layers, 0

def plan(cfg):
    """{stage: {purpose: bytes on each GPU}}; the stages after "always" follow one another."""
    dtype = compute_dtype(cfg)
    e = dtype.itemsize  # bytes of a number in compute
    # Of a trained weight, its gradient, its moments
    master, gradient, moments = (2, 2, 2) if cfg.lean else (4, 4, 8)
    row = cfg.max_prompt_tokens + cfg.max_new_tokens  # tokens of the longest row
    model = sizes(AutoModelForCausalLM, cfg.policy, dtype, row)
    rewards = [sizes(AutoModelForSequenceClassification, path, dtype, row)
               for path in cfg.reward_model.split(",") if path]
    full = cfg.lora_rank == 0
    adapter = cfg.lora_rank * model.adapter
    trained = model.whole if full else adapter
    frozen = 0 if full else model.whole
    copied = model.whole if full and cfg.beta > 0 else 0  # LoRA's reference is the policy itself
    shards = NODE if cfg.hsdp and cfg.gpus % NODE == 0 else cfg.gpus  # GPUs that share one copy
    gradients = gradient * trained / shards
    # On one GPU frozen weights are left out of FSDP, which would gather a second copy of them
    gathered = 0 if cfg.gpus == 1 and not full else e  # bytes of a number of the base

    at_once = max(1, cfg.sample_rows // cfg.group_size)
    prompts = min(at_once, math.ceil(cfg.prompts_per_step / cfg.gpus))
    B = prompts * cfg.group_size  # rows that are sampled at once

    rows = min(max(1, cfg.micro_tokens // row), B)  # of a micro-batch of the longest
    held, again = activations(cfg, model, rows, dtype)
    chunk = min(mogrpo.CHUNK_LOGITS, rows * cfg.max_new_tokens * model.text.vocab_size)
    return {
        "always": {
            "weights, this GPU's shard": (master * trained + e * frozen) / shards,
            "AdamW moments": moments * trained / shards,
            "reference": e * copied / shards,
            "reward models": e * sum(r.whole for r in rewards) / shards,
            "driver and kernels": GIB},
        "sampling": {
            "gathered policy": e * adapter + gathered * model.whole,
            # When rows have ended the others are copied, layer after layer
            "key-value cache": e * B * row * model.cache * (model.layers + 1),
            "activations": prompts * cfg.max_prompt_tokens * model.kept,  # prefill: a row a prompt
            "logits": 20 * B * model.text.vocab_size},  # three in float32, a float64 sum of them
        "scoring": {  # by one reward model after the other, 16,384 tokens at a time
            "gathered reward model": max((e * r.whole for r in rewards if cfg.gpus > 1), default=0),
            "activations": max((16384 * r.kept for r in rewards), default=0)},
        "log-probs": {  # and their backward pass
            "gradients": gradients,
            "gathered weights": gathered * (model.root + model.block),
            "gradients in flight": full * e * model.root,
            "activations": held,
            "logits": 12 * chunk},  # three in float32: they, their log-softmax, their gradient
        "backward pass": {
            "gradients": gradients,
            # The next one's, too, and a buffer
            "gathered weights": gathered * (model.root + 3 * model.block),
            # The root's and a block's; in float32 two blocks' that are being reduced
            "gradients in flight": full * (e * model.root + (e + 8) * model.block),
            # Or the root's gradients, reduced
            "activations": max(held + again, full * 4 * model.root)},
        "optimizer step": {
            "gradients": gradients, "slices of a weight": 24 * lean.SLICE * cfg.lean},
    }

def need(cfg, **change):
    """GiB of a GPU that the run takes, so changed."""
    stages = plan(replace(cfg, **change))
    always = sum(stages.pop("always").values())
    return (always + max(sum(lines.values()) for lines in stages.values())) / GIB

# --------------------------------------------------------------------------------------------------
# 3. The smallest change that would fit

def changes(cfg):
    """Changes that save memory -> list of dicts, from what costs seconds to what costs GPUs."""
    row = cfg.max_prompt_tokens + cfg.max_new_tokens
    found = [dict(recompute="True")]
    for halvings in range(1, 9):
        micro = max(row, cfg.micro_tokens // 2**halvings)
        rows = max(cfg.group_size, cfg.sample_rows // 2**halvings)
        small = dict(micro_tokens=micro, sample_rows=rows)
        found += [dict(micro_tokens=micro), dict(sample_rows=rows), small]
    least = dict(small, recompute="True")
    found += [least, dict(hsdp=False), dict(least, hsdp=False)]
    found += [dict(lora_rank=16), dict(least, lora_rank=16)]
    gpus = 2 * cfg.gpus
    while gpus <= cfg.prompts_per_step:  # every process wants a prompt
        found.append(dict(gpus=gpus, hsdp=False))
        gpus *= 2
    return found

def main(cfg):
    require(0 < cfg.gpus <= cfg.prompts_per_step, f"--gpus={cfg.gpus}: expected at least 1 and at "
            f"most --prompts_per_step={cfg.prompts_per_step}")
    say(f"GiB on each of {cfg.gpus} GPUs")
    for stage, lines in plan(cfg).items():
        say(f"{stage:<30}{sum(lines.values()) / GIB:>8.2f}")
        for purpose, size in lines.items():
            say(f"    {purpose:<26}{size / GIB:>8.2f}")
    needed = need(cfg)
    say(f"{'most at a time':<30}{needed:>8.2f}")
    if needed <= cfg.gpu_gb:
        largest = cfg.group_size
        while largest < 4096 and need(cfg, group_size=2 * largest) <= cfg.gpu_gb:
            largest *= 2
        say(f"fits in --gpu_gb={cfg.gpu_gb:g}; so would groups of up to {largest}")
        return
    short = f"{needed:.1f} GiB a GPU do not fit in --gpu_gb={cfg.gpu_gb:g}"
    for change in changes(cfg):
        if need(cfg, **change) <= cfg.gpu_gb:
            flags = [f"--{name}={v}" for name, v in change.items() if v != getattr(cfg, name)]
            die(f"{short}; this would: {' '.join(flags)}")
    die(f"{short}; nor would any change known here")


if __name__ == "__main__":
    launch(main, Config, __doc__, TOY)
