"""
What a token and an update cost: counted from config.json alone, or timed on this machine.

    python -m bench.speed --count --policy=Qwen/Qwen2.5-14B-Instruct      # seconds, on any machine
    python -m bench.speed --policy=Qwen/Qwen2.5-0.5B-Instruct --rows=32,64,128,256    # timed here
    python -m bench.speed --predict=h100 --gpus=8 --policy=Qwen/Qwen2.5-7B-Instruct   # on paper

Takes the flags of bench/memory.py and some of its own, below; of --policy only config.json is read,
the weights are random, no row ends early, and all prompts have --max_prompt_tokens tokens. One JSON
line for each number of rows, then a table.

Counted: the model is run once on fake tensors, which have shapes but no memory, and every operation
is looked at. Floor of a decoded token: all weights that it needs, and the keys and values of all
rows so far, read once. Floor of an update: each token that is needed (a group's prompt once)
forward and backward once, attention included. "From memory" leaves out results of less than 25 MB,
half of an H200's second-level cache, which the next operation finds there; "all operands" does
not. The update is counted without --recompute, which adds the forward of all blocks. "Stock" is a
step of the library's `generate`, and its padded rows in training. What it is not: a measurement. A
kernel is an operation that is not a view.

Timed: a token against the roofline (the floor's bytes at the bandwidth of a copy in the same run),
an update, AdamW's step included, against the floor's FLOPs at the rate of a matrix product in the
same run, and on a GPU the peak of memory beside bench/memory.py's plan.

Predicted: what was counted, divided by the rates of a GPU's data sheet and by the shares of them
that such programs reach, which are guesses, see `predicted`: a step's seconds on each of --gpus
GPUs of one node, each with --rows responses of full length, trained whole.
"""
import json
import statistics
import time
from copy import deepcopy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, DynamicCache

import mogrpo
from bench import memory
from mogrpo import CUDA, DEVICE, TOY, die, join_world, launch, say

@dataclass
class Config(memory.Config):
    gpus: int = 1                 # bench/memory.py's, for the plan of the peak
    max_prompt_tokens: int = 256  # of every prompt
    count: bool = False           # count from config.json instead of timing
    rows: str = "128"             # responses decoded at once; several with commas
    predict: Literal["", "h100", "h200"] = ""  # count, and predict the seconds of a step there

# --------------------------------------------------------------------------------------------------
# 1. The floors

def shape_of(lm):
    """What the floors need of a model."""
    text = lm.config.get_text_config()
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    embedding = lm.get_input_embeddings().weight
    head = lm.get_output_embeddings().weight
    read = sum(p.numel() for p in lm.parameters())
    if embedding is not head:
        read -= embedding.numel()  # of it a token needs one row
    return SimpleNamespace(
        read=read,
        head=head.numel(),
        vocabulary=len(head),
        blocks=sum(p.numel() for p in mogrpo.blocks(lm).parameters() if p.dim() > 1),
        layers=text.num_hidden_layers,
        queries=heads * width,
        key_heads=getattr(text, "num_key_value_heads", None) or heads,
        width=width)

def decode_floor(lm, rows, columns):
    """Bytes of a token of `rows` rows that have `columns` tokens each."""
    m = shape_of(lm)
    cache = 2 * m.layers * m.key_heads * m.width  # keys and values of one token
    return lm.dtype.itemsize * (m.read + rows * columns * cache)

def update_floor(lm, G, P, R):
    """FLOPs of the update by a group of G responses of R tokens to a prompt of P. Two a weight and
    token are forward, four backward; where logits come in chunks, the head's forward is twice."""
    m = shape_of(lm)
    tokens = P + G * (R - 1)  # nothing follows the last one
    pairs = P * (P + 1) / 2 + G * (R - 1) * (P + R / 2)  # of a token and one that it sees
    blocks = 2 * tokens * m.blocks + 4 * pairs * m.queries * m.layers
    head = 2 * G * R * m.head
    in_chunks = G * R * m.vocabulary > mogrpo.CHUNK_LOGITS
    return 3 * (blocks + head) + in_chunks * head

# --------------------------------------------------------------------------------------------------
# 2. Counting

L2 = 25e6  # bytes
SPARSE = ("embedding", "index", "index_select", "gather", "searchsorted", "scatter_", "index_put_",
          "index_copy_")

class Count(TorchDispatchMode):
    """Counts, of the operations run inside: kernels; bytes; those of them that come from memory, as
    `lasting` tensors do; FLOPs of products and attention; and what the CPU must wait for."""
    def __init__(self, lasting=()):
        super().__init__()
        self.lasting = {t.untyped_storage()._cdata for t in lasting}
        self.kernels = self.bytes = self.memory = self.flops = self.syncs = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        name = f.overloadpacket.__name__
        if name == "_local_scalar_dense":  # .item(): a fake tensor has no answer
            self.syncs += 1
            return 1
        if name == "nonzero":
            self.syncs += 1
            return torch.arange(len(args[0]))[:, None]  # all
        out = f(*args, **(kwargs or {}))
        aliases = [r.alias_info for r in f._schema.returns if r.alias_info]
        if f.namespace != "aten" or name == "_unsafe_view" or any(not a.is_write for a in aliases):
            return out  # a view, or no operation on numbers
        self.kernels += 1
        self.flops += flops(name, [t.shape for t in args if isinstance(t, torch.Tensor)])
        touched = tree_leaves((args, kwargs, out))
        if name in SPARSE:  # of a table or a cache only what is asked for
            touched = 2 * [args[-1] if name.endswith("_") else out]
        for t in touched:
            if isinstance(t, torch.Tensor):
                size = bytes_of(t)
                self.bytes += size
                if size > L2 or t.untyped_storage()._cdata in self.lasting:
                    self.memory += size
        return out

def bytes_of(tensor):
    """What is read of it; an expanded dimension is no more memory."""
    size = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride()):
        if stride > 0:
            size *= length
    return size

def flops(name, shapes):
    if name in ("mm", "bmm"):
        return 2 * shapes[0].numel() * shapes[1][-1]
    if name == "addmm":
        return 2 * shapes[1].numel() * shapes[2][-1]
    if name.endswith("attention_for_cpu"):  # two products
        return 4 * shapes[0].numel() * shapes[1][-2]
    if name.endswith("attention_for_cpu_backward"):  # and five; shapes[0] is the gradient's
        return 10 * shapes[1].numel() * shapes[2][-2]
    return 0

def policy_of(config, dtype, device):
    """A policy of a config alone."""
    def load(auto_class, path, day):
        with torch.device(device):
            model = auto_class.from_config(config, dtype=dtype)
        model.stock_attention = config._attn_implementation
        model.tokenizer = SimpleNamespace(eos_token_id=0, chat_template=None)
        model.added = {}
        return model

    with patch.object(mogrpo, "load", load):
        policy = mogrpo.load_policy("")
    mogrpo.go(policy, fast=True)
    policy.eos = [-2]  # no token: no row ends
    return policy

def random_weights(lm):
    return {name: torch.randn(w.shape) / 50 for name, w in lm.state_dict().items()}

def count_decode(policy, rows, G, P, T):
    """A decoded token of so many rows -> the Count of one in each room of T tokens, how often a
    room waits for the GPU, and how often a rollout records the token."""
    caches = []
    counts = []
    waits = []
    recordings = []

    class NotedCache(mogrpo.Cache):
        def __init__(self):
            super().__init__()
            caches.append(self)

    def one_of_many(decode, steps, recorded):
        waits.append(whole.syncs)
        lasting = [x for pair in caches[0].values() for x in pair]
        with Count([*policy.parameters(), *lasting]) as count:
            decode()
        counts.append(count)
        if not recorded:
            recordings.append(decode)
        if len(counts) * mogrpo.LOOK_EVERY >= T:
            raise EOFError  # fake tokens could not be read
        return decode

    room = min(64, max(1, T // 2))  # 64 on a GPU; two of them show what is between
    changes = dict(LOOK_EVERY=room, WIDTH_STEP=256, Cache=NotedCache, repeat=one_of_many)
    with patch.multiple(mogrpo, **changes), torch.no_grad(), Count() as whole:
        try:
            groups = [[[5] * P] * G for _ in range(rows // G)]
            mogrpo.fast_sample(policy, sum(groups, []), torch.zeros(rows, T + 1), 1.0)
        except EOFError:
            return counts, waits[-1] - waits[-2], len(recordings)

@torch.no_grad()
def count_stock_decode(lm, rows, columns):
    """A token of the library's `generate`."""
    m = shape_of(lm)
    cache = DynamicCache(config=lm.config)
    for layer in range(m.layers):
        past = torch.zeros(rows, m.key_heads, columns - 1, m.width, dtype=lm.dtype)
        cache.update(past, past.clone(), layer)
    mask = torch.ones(rows, columns, dtype=torch.long)
    lasting = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    with Count([*lm.parameters(), *lasting]) as count:
        out = lm(mask[:, -1:], attention_mask=mask, position_ids=mask.cumsum(1)[:, -1:] - 1,
                 past_key_values=cache, use_cache=True, logits_to_keep=1)
        torch.multinomial(out.logits[:, -1].float().softmax(-1), 1)
    return count

def count_update(policy, G, P, R):
    """Forward and backward of one group -> their Count."""
    prompt = [5] * P  # one object: shared
    with Count(policy.parameters()) as count:
        mogrpo.response_logp(policy, [(prompt, [5] * R)] * G, 1.0).sum().backward()
    policy.zero_grad()
    return count

def count_stock_update(lm, G, P, R):
    ids = torch.zeros(G, P + R, dtype=torch.long)
    with Count() as count:
        logits = lm(ids, use_cache=False, logits_to_keep=R + 1).logits
        logits.float().logsumexp(-1).sum().backward()
    return count.flops

class Collectives(TorchDispatchMode):
    """Counts what processes do together."""
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        self.count += f.namespace == "c10d"
        return f(*args, **(kwargs or {}))

def count_collectives(config, tokens):
    """Of a rollout on 8 processes, by a narrow model of as many layers."""
    config = deepcopy(config)
    text = config.get_text_config()
    text.head_dim = 8
    text.hidden_size = 8 * text.num_attention_heads
    text.intermediate_size = 64
    text.vocab_size = 64
    text.bos_token_id = text.eos_token_id = text.pad_token_id = 0
    policy = policy_of(config, torch.float32, "cpu")
    with patch.object(mogrpo, "load_weights", lambda model: model):  # it has its weights
        policy = mogrpo.shard(policy, torch.float32)
    with Collectives() as seen, mogrpo.gathered(policy):
        mogrpo.fast_sample(policy, [[5]] * 2, torch.rand(2, tokens).double(), 1.0)
    return seen.count

def counted(cfg, config, rows):
    """-> {name: number}"""
    G, P, T = cfg.group_size, cfg.max_prompt_tokens, cfg.max_new_tokens
    dtype = memory.compute_dtype(cfg)
    with FakeTensorMode(allow_non_fake_inputs=True):
        policy = policy_of(config, dtype, "cpu")
        counts, waits, recordings = count_decode(policy, rows, G, P, T)
        update = count_update(policy, G, P, T)
        mogrpo.go(policy, fast=False)
        stock = count_stock_decode(policy, rows, P + T // 2)
        stock_update = count_stock_update(policy, G, P, T)
        floor = decode_floor(policy, rows, P + T // 2)
        update_once = update_floor(policy, G, P, T)
    mean = {name: statistics.mean(getattr(count, name) for count in counts)
            for name in ("kernels", "bytes", "memory", "syncs")}
    return dict(
        rows=rows,
        weights_gb=dtype.itemsize * policy.num_parameters() / 1e9,
        floor_gb=floor / 1e9,
        memory_of_floor=mean["memory"] / floor,
        operands_of_floor=mean["bytes"] / floor,
        kernels=mean["kernels"],
        syncs_a_token=mean["syncs"],
        syncs_a_room=waits,
        recordings=recordings,
        stock_memory_of_floor=stock.memory / floor,
        stock_operands_of_floor=stock.bytes / floor,
        stock_kernels=stock.kernels,
        update_floor_tflop=update_once / 1e12,  # of one group
        update_of_floor=update.flops / update_once,
        update_gb=update.memory / 1e9,
        update_kernels=update.kernels,
        stock_update_of_floor=stock_update / update_once)

# --------------------------------------------------------------------------------------------------
# 3. Timing

def seconds(work, times=5):
    """Median, after one run to warm up."""
    found = []
    for _ in range(times + 1):
        finish()
        start = time.perf_counter()
        work()
        finish()
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])

def finish():
    if CUDA:
        torch.cuda.synchronize()

def machine(dtype):
    """Bytes a second of a copy, FLOPs a second of a matrix product."""
    n = 2**28 if CUDA else 2**25
    source = torch.ones(n, device=DEVICE)
    target = torch.empty_like(source)
    copied = 8 * n / seconds(lambda: target.copy_(source))  # read and written
    n = 8192 if CUDA else 2048
    square = torch.ones(n, n, dtype=dtype, device=DEVICE)
    return copied, 2 * n**3 / seconds(lambda: square @ square)

def timed(cfg, policy, optimizer, rows, copied, product):
    """-> {name: number}"""
    G, P, T = cfg.group_size, cfg.max_prompt_tokens, cfg.max_new_tokens
    groups = [[[5 + i] * P] * G for i in range(rows // G)]
    prompts = sum(groups, [])  # of each row
    tokens = []  # seconds of each
    real = mogrpo.repeat

    def clocked(decode, steps, recorded):
        finish()
        start = time.perf_counter()
        recorded = real(decode, steps, recorded)
        finish()
        tokens.append((time.perf_counter() - start) / steps)
        return recorded

    def rollout():
        with mogrpo.gathered(policy):
            return mogrpo.fast_sample(policy, prompts, torch.rand(rows, T).double(), 1.0)[0]

    with patch.object(mogrpo, "repeat", clocked):
        rollout()  # warms up
        tokens.clear()
        start = time.perf_counter()
        responses = rollout()
        finish()
        sampling = time.perf_counter() - start
    pairs = list(zip(prompts, responses))

    def update():
        for numbers in mogrpo.by_length(rows * [P + T], cfg.micro_tokens):
            batch = [pairs[i] for i in numbers]
            mogrpo.response_logp(policy, batch, 1.0).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    token = statistics.mean(tokens)
    update_seconds = seconds(update, 3)
    floor = decode_floor(policy, rows, P + T // 2) / copied
    return dict(
        rows=rows,
        decoded_tokens_a_second=rows / token,
        of_roofline=floor / token,
        sampling_seconds=sampling,
        prefill_seconds=sampling - token * (T - 1),
        update_seconds=update_seconds,
        update_of_product=rows / G * update_floor(policy, G, P, T) / product / update_seconds)

# --------------------------------------------------------------------------------------------------
# 4. Prediction

# By the data sheets: bytes of memory and bfloat16 FLOPs a second. NVLink 4 has 450 GB/s one way
SHEETS = dict(h100=(3.35e12, 989e12), h200=(4.8e12, 989e12))
# Guesses: the shares of these that programs like this one reach
MEMORY_SHARE, PRODUCT_SHARE, LINK_SHARE = 0.8, 0.6, 0.6
# and seconds: what a replayed kernel takes beside its bytes, what it takes to launch one, and what
# a recording waits beside its launches
KERNEL, LAUNCH, RECORDING = 1.5e-6, 10e-6, 0.03

def predicted(cfg, row):
    """Seconds of a step, of what was `counted` for a GPU's rows -> {name: number}."""
    memory_rate, product_rate = SHEETS[cfg.predict]
    memory_rate *= MEMORY_SHARE
    product_rate *= PRODUCT_SHARE
    P, T, groups = cfg.max_prompt_tokens, cfg.max_new_tokens, row["rows"] / cfg.group_size
    weights = 1e9 * row["weights_gb"]
    gather = weights * (1 - 1 / cfg.gpus) / (450e9 * LINK_SHARE)

    token = 1e9 * row["floor_gb"] * row["memory_of_floor"] / memory_rate + row["kernels"] * KERNEL
    recording = row["recordings"] * (row["kernels"] * LAUNCH + RECORDING)
    prefill = weights * groups * P / product_rate  # 2 FLOPs for the 2 bytes of each weight

    # Products and all the rest take turns. A group's forward and backward; forward once more, to
    # save memory; and the reference's forward
    update = row["update_of_floor"] * row["update_floor_tflop"] * 1e12 / product_rate
    update += row["update_gb"] * 1e9 / memory_rate
    update *= groups * (1 + 1 / 3 + 1 / 3)
    batches = -(-row["rows"] * (P + T) // cfg.micro_tokens)
    # Weights are gathered forward, again, backward and for the reference; gradients have 4 bytes
    exchange = batches * gather * (4 + 2)
    seconds = dict(gather=gather, prefill=prefill, recording=recording, decoding=token * T)
    seconds["train"] = max(update, exchange, batches * 2 * row["update_kernels"] * LAUNCH)
    step = sum(seconds.values())
    found = {f"sec/{name}": value for name, value in seconds.items()}
    return found | {"sec/step": step, "tokens_a_gpu_a_second": (P + T) * row["rows"] / step}

def main(cfg):
    try:
        config = AutoConfig.from_pretrained(cfg.policy)
        rows = [int(n) for n in cfg.rows.split(",")]
        assert all(n % cfg.group_size == 0 for n in rows) and min(rows) > 0
        assert cfg.max_new_tokens > 1
    except Exception as e:
        die(f"--policy={cfg.policy}, --rows={cfg.rows}: expected a folder with a config.json and "
            f"multiples of --group_size={cfg.group_size}, and --max_new_tokens above 1: {e}")
    found = []
    if cfg.count or cfg.predict:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
        # Tensors without memory are the host's, also on a machine with a GPU
        with patch.multiple(mogrpo, DEVICE=torch.device("cpu"), USE_GRAPHS=False):
            for n in rows:
                found.append(counted(cfg, config, n))
                collectives = [count_collectives(config, tokens) for tokens in (8, 80)]
                found[-1]["collectives"] = collectives
                if cfg.predict:
                    found[-1] |= predicted(cfg, found[-1])
    else:
        _, _, dtype = join_world(cfg.dtype)
        copied, product = machine(dtype)
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        policy = policy_of(config, torch.float32, "meta")
        with patch.object(mogrpo, "read_weights", random_weights):
            mogrpo.shard(policy, dtype, cfg.recompute)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0, fused=True)
        say(f"a copy moves {copied / 1e9:.0f} GB/s, a product makes {product / 1e12:.2f} TFLOP/s")
        for n in rows:
            found.append(timed(cfg, policy, optimizer, n, copied, product))
        if CUDA:  # the probe of the machine was freed and is not in it
            peak = torch.cuda.max_memory_allocated() / memory.GIB
            planned = memory.need(cfg, prompts_per_step=max(rows) // cfg.group_size, beta=0.0)
            say(f"peak of memory {peak:.1f} GiB, planned {planned:.1f}")
    for row in found:
        say(json.dumps(row))
    for name in found[0]:
        say(f"{name:<26}" + "".join(f"{show(row[name]):>12}" for row in found))

def show(value):
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    launch(main, Config, __doc__, TOY)
