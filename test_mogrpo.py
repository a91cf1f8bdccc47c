"""
pytest -q test_mogrpo.py          # two CPU cores, a few minutes; nothing is downloaded

Every fast path stands against a slow and obvious one, in float64 where it matters: our sampler and
packed update against the library's own, on 16 kinds of tiny models, and 11 more that go the plain
way; whole runs against a replay from their logs; runs on 1, 2 and 4 processes against each other.
In the order of the files: mogrpo.py, reward_model.py, data/, ablations/, eval.py, bench/, then
whole runs. Benchmarks are commands, not tests.
"""
import csv
import dataclasses
import gc
import gzip
import io
import json
import logging
import math
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import textwrap
import weakref
from contextlib import redirect_stderr
from functools import partial
from importlib import import_module as module
from importlib.util import find_spec
from math import nan, sqrt
from os.path import exists
from pathlib import Path
from statistics import fmean, pstdev
from types import SimpleNamespace
from unittest import mock

# On the CPU, also on a GPU machine; there CUDA_VISIBLE_DEVICES=0 pytest runs the same on the GPU
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("HF_HUB_OFFLINE", "1")         # a name that is no folder fails at once

import pytest
import torch
import torch.distributed as dist
import transformers
from pytest import approx
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import data.judge.prepare as judge
import data.toy.prepare as toy_world
import eval as evaluation
import mogrpo
import reward_model as rm
from ablations import by_tag, dpo, dynamic, gspo, lagrangian, league, league_front
from ablations import league_rules, league_table, lean, methods, play, ppo, steer
from bench import memory, speed
from data.human import votes as human
from mogrpo import write_text

transformers.utils.logging.disable_progress_bar()  # this and the next as `launch` has them
logging.disable(logging.ERROR)
torch.set_num_threads(1)  # on tiny models two wait for each other longer than they work
sys.dont_write_bytecode = True  # rules are rewritten within the second
HERE = mogrpo.HERE
cases = pytest.mark.parametrize
equal = partial(assert_close, rtol=0, atol=0, check_device=False)

def each(name, words):
    return cases(name, words.split())

KINDS = each("kind", "qwen2 llama qwen3 gemma3_text gpt2")
PROMPTS = [[5, 6, 7], [*range(8, 19)], [*range(20, 25)]]
CHAT = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)

# --------------------------------------------------------------------------------------------------
# Tiny models and folders

def tiny_tokenizer(pad="<pad>", template=CHAT, last_words=(), unk="<unk>"):
    """A word is a token: 5 special ones, w0 to w58; `last_words` stand in place of the last."""
    words = "<pad> <unk> <end> <user> <assistant>".split()
    words += [f"w{i}" for i in range(59 - len(last_words))]
    words += last_words
    ids = {w: i for i, w in enumerate(words)}
    core = Tokenizer(models.WordLevel(ids, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=pad,
        unk_token=unk,
        eos_token="<end>",
        chat_template=template,
    )

WINDOW = dict(sliding_window=8)
LOCAL = WINDOW | dict(layer_types=["sliding_attention", "full_attention"])
FEW_EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
OPTIONS = {  # beside those of `tiny_config`
    "gemma3_text": LOCAL,
    "gemma3_text+cap": LOCAL | dict(final_logit_softcapping=3.0),
    "gemma2": WINDOW | dict(attn_logit_softcapping=5.0, query_pre_attn_scalar=8),
    "mistral": WINDOW,
    "starcoder2": WINDOW,
    "mixtral": dict(num_local_experts=4),
    "qwen3_moe": FEW_EXPERTS,
    "granite+scaled": dict(logits_scaling=1.1, attention_multiplier=0.2),
    "cohere": dict(logit_scale=1.0),
    "cohere+scaled": dict(logit_scale=0.3),
    "gpt_oss": WINDOW | dict(num_local_experts=4, num_experts_per_tok=2),
    "gpt_neo": dict(window_size=8, attention_types=[[["global", "local"], 1]], num_layers=2),
    "gptj": dict(rotary_dim=8),
    "jamba": dict(num_experts=2, attn_layer_offset=1, attn_layer_period=2, mamba_d_state=4,
                  mamba_dt_rank=4, use_mamba_kernels=False),
}

def tiny_config(kind, tied=True, **other):
    other = OPTIONS.get(kind, {}) | other
    kind = kind.split("+")[0]
    return transformers.AutoConfig.for_model(
        kind,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=dict(llama=4, gemma3_text=1).get(kind, 2),
        head_dim=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.25,  # far from uniform
        tie_word_embeddings=tied or kind == "gpt2",
        **other,
    )

def config_folder(kind, sizes):
    """A folder `policy` with a config only: of V, D, the blocks' width, their number, their heads
    and key-value heads."""
    names = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads"""
    numbers = map(int, sizes.split())
    config = transformers.AutoConfig.for_model(kind, **dict(zip(names.split(), numbers)))
    config.save_pretrained("policy")
    return config

def tiny_model(kind, tied=True, seed=0, auto=transformers.AutoModelForCausalLM, **other):
    torch.manual_seed(seed)
    return auto.from_config(tiny_config(kind, tied, **other)).eval()

def stock_model(path, **kwargs):
    """A saved causal model by the library alone."""
    return transformers.AutoModelForCausalLM.from_pretrained(path, **kwargs)

def folder_of(path="policy", kind="qwen3", tokenizer=None, **kwargs):
    """A saved tiny model; for text not a qwen2: AutoTokenizer would take Qwen2's own words."""
    tiny_model(kind, **kwargs).save_pretrained(path)
    (tokenizer or tiny_tokenizer()).save_pretrained(path)
    return path

def change_config(folder, **changes):
    path = f"{folder}/config.json"
    write_text(path, json.dumps(read_json(path) | changes))

def reward_folder(path, axes=("good", "kind")):
    auto = transformers.AutoModelForSequenceClassification
    folder_of(path, auto=auto, id2label=dict(enumerate(axes)))

def turn(content, role="user"):
    return dict(role=role, content=content)

def write_rows(path, rows):
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))

def rows_of(path):
    return [record for _, record in mogrpo.read_jsonl(path)]

def table(text):
    """Lines of parts between bars."""
    return [line.split(" | ") for line in text.strip().splitlines()]

def read_json(path):
    return json.loads(Path(path).read_text())

def ratings_file(path, n=400, sparse=False):
    """Axis early: how early the words are; late: the opposite, one row in 60 if `sparse`."""
    torch.manual_seed(0)
    rows = []
    for i in range(n):
        words = torch.randint(8, (4,)).tolist()
        early = 1 - sum(words) / 28
        late = None if sparse and i % 60 else 1 - early
        response = " ".join(f"w{x}" for x in words)
        scores = dict(early=early, late=late)
        rows.append(dict(prompt=f"w{i % 40} w1", response=response, scores=scores))
    write_rows(path, rows)
    return path

# --------------------------------------------------------------------------------------------------
# Runs

@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Every test works in a folder of its own, with the same seed, and leaves its process group."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    yield
    end_run()

@pytest.fixture
def printed(capsys):
    """What has been printed since the last call."""
    return lambda: capsys.readouterr().out

@pytest.fixture
def world():
    """A process group of one."""
    mogrpo.join_world(alone=True)

RULES = """
def scores(record, response):
    return {"digit": record["answer"] in response, "short": 1 - len(response.split()) / 8}
"""

@pytest.fixture
def tiny_run():
    """A policy, a reward model rm, rules and 12 prompts to be spoiled -> flags, less the reward."""
    folder_of(kind="llama")
    reward_folder("rm")
    write_text("rules.py", RULES)
    rows = [
        dict(prompt=f"w{i} w9", answer=f"{i % 10}", tag=["even", "odd"][i % 2]) for i in range(12)
    ]
    write_rows("prompts.jsonl", rows)
    return (
        "--policy=policy --prompts=prompts.jsonl --prompts_per_step=4 --group_size=4"
        " --max_new_tokens=8 --steps=1 --eval_samples=1"
    )

@pytest.fixture
def flags(tiny_run):
    return f"{tiny_run} --reward_model=rm"

def policy_of(path, dtype=torch.float32, lora_rank=0, fast=True):
    policy = mogrpo.load_policy(path)
    if lora_rank > 0:
        mogrpo.add_lora(policy, lora_rank, 2.0 * lora_rank)
    policy.to(dtype)
    mogrpo.shard(policy, dtype, recompute="True")
    mogrpo.go(policy, fast)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if name.endswith("lora_B.weight"):  # 0 at the start: the adapter would not show
                p.add_(0.3)
    return policy

@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory):
    """A folder in which out/toy stands. MOGRPO_TOY: copy this one."""
    folder = tmp_path_factory.mktemp("world")
    ready = os.environ.get("MOGRPO_TOY")
    if ready:
        shutil.copytree(ready, folder / "out/toy")
    else:
        command = [sys.executable, "-m", "data.toy.prepare", f"--out_dir={folder}/out/toy"]
        subprocess.run(command, cwd=HERE, check=True)
    return folder

@pytest.fixture
def toy(toy_folder):
    """out/toy in the test's own folder."""
    os.mkdir("out")
    os.symlink(toy_folder / "out/toy", "out/toy")

def on_calls(patch, owner, name, events={}):
    """Note the arguments of each call of a function; before some of them, by number, a signal or
    KeyboardInterrupt comes."""
    real, calls = getattr(owner, name), []
    def noted(*args):
        calls.append(args)
        event = events.get(len(calls))
        if event is KeyboardInterrupt:
            raise event
        if event:
            signal.raise_signal(event)
        return real(*args)
    patch.setattr(owner, name, noted)
    return calls

def run_main(script, flags=""):
    """A script's own main in this process, as one process."""
    try:
        toy = getattr(script, "TOY", {})
        script.main(mogrpo.parse(script.Config, flags.split(), script.__doc__, toy))
    finally:
        end_run()

def end_run():
    """What the end of a process does."""
    for lock in mogrpo.LOCKS:
        lock.close()
    mogrpo.STOPS.clear()
    mogrpo.warn.cache_clear()
    for name, of_a_rule in list(sys.modules.items()):
        if str(getattr(of_a_rule, "__file__", "")).startswith(os.getcwd()):
            del sys.modules[name]
    if dist.is_initialized():
        dist.destroy_process_group()

def refused(call, *parts):
    """`call` must end with exit status 2 and one line on stderr that holds all `parts`."""
    with pytest.raises(SystemExit) as e, redirect_stderr(io.StringIO()) as said:
        call()
    line = said.getvalue()
    assert e.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1, line
    assert all(part in line for part in parts), line
    return line

def refused_run(flags, *parts, script=mogrpo):
    refused(lambda: run_main(script, flags), *parts)

def metrics_of(folder):
    """Rows of metrics.jsonl without what differs between two equal runs."""
    timed = ("sec/", "tok_per_s", "peak_gb")
    rows = rows_of(f"{folder}/metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]

# ==================================================================================================
# mogrpo.py

# --------------------------------------------------------------------------------------------------
# Loading, LoRA, saving

@KINDS
@cases("tied", [True, False])
def test_loaded_and_saved_equals_the_library(kind, tied, world):
    """Weights from several bfloat16 files, rotary frequencies, tying; back by `save_folder`."""
    model = tiny_model(kind, tied).to(torch.bfloat16)
    model.save_pretrained("several", max_shard_size="10KB")
    assert exists("several/model.safetensors.index.json")  # so there are several
    tiny_tokenizer().save_pretrained("several")
    stock = stock_model("several", dtype=torch.float32)
    policy = policy_of("several")
    weights = [weight.full_tensor() for weight in policy.parameters()]  # a tied one once
    equal(weights, list(stock.parameters()))
    equal(list(policy.buffers()), list(stock.buffers()))
    mogrpo.save_folder(policy, "again", policy.config.dtype)
    saved = stock_model("again")
    assert saved.dtype == torch.bfloat16
    ids = tensor([PROMPTS[1]])
    equal(saved(ids).logits, stock_model("several")(ids).logits)

def test_weights_under_other_names(world):
    bare = folder_of("bare", "gpt2")
    stock = stock_model(bare)
    stock.transformer.save_pretrained(bare)  # its names lack "transformer."
    ours = mogrpo.load_weights(mogrpo.load_policy(bare))
    equal(list(ours.parameters()), list(stock.parameters()))

def max_gap(x, y):
    return (torch.as_tensor(x).cpu() - torch.as_tensor(y).cpu()).abs().max()

def stock_logp(model, prompt, response, temperature=1.0):
    """Log-probs of one response by the library's full logits."""
    logits = model(tensor([prompt + response])).logits[0]
    logp = (logits / temperature).log_softmax(-1)
    before = range(len(prompt) - 1, len(logits) - 1)  # each token is predicted by the one before
    return logp[before, response]

def test_lora_is_the_formula_merged_and_in_peft(world):
    """Off it is the base; on it is the formula, in the merged folder and by PEFT, too."""
    path = folder_of(tied=False)
    policy = policy_of(path, lora_rank=3)
    rows = [(prompt, [*prompt, 2]) for prompt in PROMPTS]
    policy.adapted = False
    base = mogrpo.response_logp(policy_of(path), rows, 1.0)
    equal(mogrpo.response_logp(policy, rows, 1.0), base)
    policy.adapted = True
    adapted = mogrpo.response_logp(policy, rows, 1.0)
    assert max_gap(adapted, base) > 0.1
    stock = stock_model(path)
    for name, linear in stock.named_modules():
        if name.endswith("proj"):  # the blocks' linear layers, all of them
            ours = policy.get_submodule(name)
            A, B = [part.weight.full_tensor() for part in (ours.lora_A, ours.lora_B)]
            linear.weight.data += 2.0 * (B @ A).cpu()
    mogrpo.save_folder(policy, "merged", torch.float32)
    def off(model):
        return max_gap(torch.cat([stock_logp(model, *row) for row in rows]), adapted)
    assert off(stock) < 1e-4
    assert off(stock_model("merged")) < 1e-4
    cfg = mogrpo.Config(policy=path, lora_rank=3, lora_alpha=6.0)
    mogrpo.save_adapter(policy, "adapter", cfg)
    peft = pytest.importorskip("peft", reason="its format is checked where peft is installed")
    assert off(peft.PeftModel.from_pretrained(stock_model(path), "adapter")) < 1e-4

# --------------------------------------------------------------------------------------------------
# Sampling

KEYS = [(i // 4, i % 4) for i in range(12)]  # (prompt, response)

def sample(policy, prompts, keys, temperature, tokens=24):
    u_BT = mogrpo.uniforms(keys, tokens)
    sampler = mogrpo.fast_sample if policy.fast else mogrpo.sample
    with mogrpo.gathered(policy):
        return sampler(policy, [prompts[p] for p, _ in keys], u_BT, temperature)

FAST = """qwen2 llama qwen3 gemma3_text gpt2 mistral mixtral gemma phi3 olmo2 smollm3 starcoder2
gpt_neox granite cohere qwen3_moe"""
PLAIN = """gemma2 gemma3_text+cap nanochat granite+scaled cohere+scaled phi gpt_oss gptj gpt_neo
mamba jamba"""
LIMITS = SimpleNamespace(max_prompt_tokens=300, max_new_tokens=24, temperature=0.7, fast=True)

@each("kind", f"{FAST} {PLAIN}")
def test_any_causal_model_is_sampled_and_trained_as_the_library_does(kind, world):
    """The fast way where its numbers are the library's, else the plain one: greedy answers by
    `generate`; log-probs and their gradient by stock logits, one row at a time."""
    path = folder_of(kind=kind, tied=False)
    if kind == "phi":  # its head has a bias, which no division of hidden states scales
        weights = saved_weights(path)
        weights["lm_head.bias"] += 2 * torch.randn(64)
        save_file(weights, f"{path}/model.safetensors", metadata={"format": "pt"})
    in_float32 = kind in "mixtral qwen3_moe gpt_oss jamba gemma2"  # the library knows no better
    dtype = torch.float32 if in_float32 else torch.float64
    policy = policy_of(path, dtype)
    mogrpo.choose_way(policy, LIMITS)
    assert policy.fast == (kind in FAST.split())
    stock = stock_model(path, dtype=dtype)
    greedy, _ = sample(policy, PROMPTS, KEYS, 1e-6)  # softmax is the argmax
    together, sampler_logps = sample(policy, PROMPTS, KEYS, 0.7)
    rows = []
    expected = []
    for key, likeliest, response in zip(KEYS, greedy, together):
        prompt = PROMPTS[key[0]]
        out = stock.generate(tensor([prompt]), max_new_tokens=24, eos_token_id=2)
        assert out[0].tolist() == prompt + likeliest
        assert 2 not in response[:-1]  # cut right after the first end
        rows.append((prompt, response))
        expected.append(stock_logp(stock, prompt, response, 0.7))
    alone, _ = sample(policy, PROMPTS[:1], KEYS[:1], 0.7)
    assert alone == together[:1]
    assert len({tuple(r) for r in together}) == 12
    logp_N = mogrpo.response_logp(policy, rows, 0.7)
    assert max_gap(torch.cat(sampler_logps), torch.cat(expected)) < 1e-4
    assert max_gap(logp_N, torch.cat(expected)) < 1e-5  # most norms are in float32
    logp_N.sum().backward()
    torch.cat(expected).sum().backward()
    for ours, theirs in zip(policy.parameters(), stock.parameters(), strict=True):
        if theirs.grad is not None:  # of experts that no token has chosen
            gap = ours.grad.full_tensor().cpu() - theirs.grad
            assert gap.norm() <= (1e-3 if in_float32 else 1e-5) * theirs.grad.norm()

def test_the_fast_way_is_left_where_it_differs(world, monkeypatch, printed):
    """Also where a difference shows only past the window; not causal is refused."""
    policy = policy_of(folder_of(kind="mistral", sliding_window=280))
    mogrpo.choose_way(policy, LIMITS)
    assert policy.fast
    real = mogrpo.mask_of
    forgetful = lambda back, heads, window, dtype: real(back, heads, None, dtype)
    monkeypatch.setattr(mogrpo, "mask_of", forgetful)
    mogrpo.choose_way(policy, LIMITS)
    assert not policy.fast and "slower: ours differ by" in printed()
    mogrpo.choose_way(policy, SimpleNamespace(**vars(LIMITS) | dict(max_prompt_tokens=200)))
    assert policy.fast  # no row of that run is so long
    refused(lambda: mogrpo.choose_way(policy_of(folder_of("bert", "bert")), LIMITS), "no causal")

def test_pick_follows_the_softmax():
    n = 40000
    logits = 3 * torch.randn(12)
    u = (torch.arange(n) + 0.5).double() / n
    token, logp = mogrpo.pick(logits.expand(n, 12), u)
    p = logits.double().softmax(-1)
    assert max_gap(token.bincount(minlength=12) / n, p) < 1e-4
    assert max_gap(logp, p[token].log()) < 1e-5
    one = tensor([[0.0, 1.0, 0.0]]).log()
    ends = tensor([0.0, 1 - 1e-16], dtype=torch.float64)
    token, _ = mogrpo.pick(one.expand(2, 3), ends)
    assert token.tolist() == [1, 1]  # never a token of probability 0

class Watch(TorchDispatchMode):
    """Counts what a GPU would have to be waited for, the elements of the largest tensor, and the
    bytes of all storages that operations have touched, until they are freed; and notes the
    addresses that are written in place."""
    def __init__(self):
        super().__init__()
        self.storages, self.written = weakref.WeakSet(), set()
        self.waits = self.largest = self.new = self.peak = 0

    def now(self):
        return sum(storage.nbytes() for storage in self.storages)

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        name = f.overloadpacket.__name__
        self.waits += name in ("_local_scalar_dense", "nonzero", "masked_select")
        out = f(*args, **(kwargs or {}))
        if name.endswith("_") and isinstance(out, torch.Tensor):
            self.written.add(out.data_ptr())
        for leaf in torch.utils._pytree.tree_leaves((args, kwargs, out)):
            leaf = getattr(leaf, "_local_tensor", leaf)  # of a DTensor this process's part
            if isinstance(leaf, torch.Tensor):
                self.largest = max(self.largest, leaf.numel())
                storage = leaf.untyped_storage()
                if storage not in self.storages:
                    self.storages.add(storage)
                    self.new += storage.nbytes()
        if self.new > 3e5:  # else the peak is hardly higher, and sums take long
            self.new = 0
            self.peak = max(self.peak, self.now())
        return out

@KINDS
def test_a_decoded_token_waits_for_nothing_and_keeps_its_addresses(kind, world):
    """As a CUDA graph needs it; rooms of any size and replayed steps sample the same."""
    policy = policy_of(folder_of(kind=kind))
    expected, logps = sample(policy, PROMPTS, KEYS, 1.0, 40)
    def watched(step, n, recorded):
        written = set()
        for _ in range(n):
            with Watch() as seen:
                step()
            assert seen.waits == 0
            written |= seen.written
        assert len(written) == 4 + 2 * 2  # tokens, log-probs, turn, position; two layers' caches
    recordings = []
    def as_graph(step):
        recordings.append(step)
        return step
    replayed = dict(USE_GRAPHS=True, as_graph=as_graph)
    reused = replayed | dict(WIDTH_STEP=64, MOST_GOING=0.5)
    counts = []
    for n, change in ((64, {}), (7, dict(repeat=watched)), (1, {}), (4, replayed), (4, reused)):
        recordings.clear()
        with mock.patch.multiple(mogrpo, LOOK_EVERY=n, **change):
            again, same = sample(policy, PROMPTS, KEYS, 1.0, 40)
        assert again == expected and max_gap(torch.cat(same), torch.cat(logps)) < 1e-5
        counts.append(len(recordings))
    assert counts[0] == 0 and counts[4] < 4 < counts[3]

def test_fewer_rows_where_memory_is_short(flags, monkeypatch, capsys):
    """And the same responses."""
    run_main(mogrpo, f"{flags} --out_dir=out/whole")
    real = mogrpo.fast_sample
    def short_of_memory(policy, prompts, *rest):
        if len(prompts) > 5:
            raise torch.OutOfMemoryError
        return real(policy, prompts, *rest)
    monkeypatch.setattr(mogrpo, "fast_sample", short_of_memory)
    run_main(mogrpo, f"{flags} --out_dir=out/short")
    same_run("out/whole", "out/short")
    assert "--sample_rows=4" in capsys.readouterr().out

# --------------------------------------------------------------------------------------------------
# Advantages

def hand_advantages(rule, groups, weights, floor=0.01, lambdas=None):
    """The formulas, a group, an axis and a response at a time. `groups` are lists of responses,
    these lists of scores, None where an axis says nothing -> a list of advantages for each."""
    K = range(len(weights))
    def known(numbers):
        return [x for x in numbers if x is not None]
    def column(group, k):
        return [scores[k] for scores in group]
    step_std = [pstdev(known(sum([column(group, k) for group in groups], []))) for k in K]
    advantages = []
    for group in groups:
        points = [0.0] * len(group)
        deviations = [0.0] * len(group)
        for k in K:
            scores = column(group, k)
            if not known(scores):
                continue
            for i, s in enumerate(scores):
                e = 0.0 if s is None else s - fmean(known(scores))
                points[i] += weights[k] * e
                if e:
                    z = e / max(pstdev(known(scores)), floor * step_std[k])
                    deviations[i] += (lambdas or weights)[k] * z
        a = [x / max(pstdev(points), floor) for x in points]
        if rule == "lagrangian":
            a = [(x + d) / (1 + sum(lambdas)) for x, d in zip(a, deviations)]
        advantages.append(deviations if rule == "gdpo" else a)
    if rule == "gdpo":  # over the whole step
        std = pstdev(sum(advantages, []))
        advantages = [[x / std for x in group] for group in advantages]
    return advantages

def run_with(combine, lambdas=None):
    """What a rule reads of a run -> its function."""
    if combine != "lagrangian":
        return mogrpo.COMBINE[combine]
    log_lambda = {axis: math.log(x) for axis, x in zip("xyz", lambdas) if x > 0}
    run = SimpleNamespace(axes=list("xyz")[:len(lambdas)], state=dict(log_lambda=log_lambda))
    return lagrangian.combine_over_floors(run)

COMBINE = each("combine", "sum gdpo lagrangian")
CFG = SimpleNamespace(std_floor=0.01)

@COMBINE
def test_advantages_equal_the_formulas(combine):
    s = torch.rand(5, 8, 3).double()
    s[0, :, 1] = 0.5  # an axis without signal
    s[1, :, 2] = 0.5 + 1e-4 * s[1, :, 2]  # one below the floor
    s[2, :3, 0] = nan  # one that has nothing to say about some,
    s[3, :, 2] = nan  # about all
    s[4, 5] = nan  # all that say nothing about one
    lambdas = [0.75, 0.0, 2.0]
    weights = [1.0, 0.25, 3.0]
    groups = [[[None if math.isnan(x) else x for x in one] for one in p] for p in s.tolist()]
    parts = run_with(combine, lambdas)(s, tensor(weights).double(), CFG)
    by_hand = hand_advantages(combine, groups, weights, lambdas=combine != "gdpo" and lambdas)
    assert max_gap(parts.sum(-1), tensor(by_hand).double()) < 1e-6
    assert (parts[s.isnan()] == 0).all()
    each_its_own = tensor(weights).repeat(5, 1, 1).double()  # as ablations/steer has them
    equal(run_with(combine, lambdas)(s, each_its_own, CFG), parts)

def test_the_unit_of_an_axis_does_not_matter_to_gdpo():
    s = torch.rand(5, 8, 3)
    parts = mogrpo.combine_gdpo(s, torch.ones(3), CFG)
    in_other_units = s * tensor([1, 0.001, 1e4])
    assert max_gap(mogrpo.combine_gdpo(in_other_units, torch.ones(3), CFG), parts) < 1e-5
    assert max_gap(parts.sum(-1).std(correction=0), 1) < 1e-5

@COMBINE
def test_no_signal_gives_exactly_zero(combine):
    noise = torch.randn(2, 8, 4)
    uneven = tensor([0.1, 0.7, 1.3, 2.9])
    for spread in (0, 1e-7):
        scores = 0.7310585786 + spread * noise
        scores[1] = nan
        parts = run_with(combine, [1.0])(scores, uneven, CFG)
        assert (mogrpo.without_ties(parts) == 0).all()
    against = torch.rand(3, 8, 1) * tensor([1.0, -1.0])  # two axes cancel out, but for rounding
    parts = mogrpo.without_ties(run_with(combine, [0.0, 0.0])(against + 0.3, torch.ones(2), CFG))
    assert (parts == 0).all()

def test_group_metrics_by_hand():
    """Two groups of two: in the first, y differs by less than the floor, 0.01 of its std over the
    step, and z has nothing to say."""
    s = tensor([[[0, 0.5005, nan], [1, 0.4995, nan]], [[0, 0.6, 0.5], [1, 0.2, 0.5]]]).double()
    run = SimpleNamespace(cfg=CFG, axes="xyz", weights_K=tensor([1, 2, 1]))
    parts = mogrpo.combine_sum(s, run.weights_K, CFG)  # R less its mean: -+0.499, -+0.1
    assert mogrpo.group_metrics(run, s, parts) == approx({
        "reward": 0.5 + 2 * 0.45 + 0.5,
        "reward_std": 0.2995,  # mean of 0.499 and 0.1
        "conflict": 0.5,
        "score/x": 0.5,
        "score/y": 0.45,
        "score/z": 0.5,
        "missing/x": 0,
        "missing/y": 0,
        "missing/z": 0.5,
        "std/x": 0.5,
        "std/y": 0.10025,  # of 0.0005 and 0.2
        "std/z": 0,
        "zero_std/x": 0,
        "zero_std/y": 0.5,
        "zero_std/z": 1,  # one group of two has no score
        "share/x": (0.5 / 0.499 + 0.5 / 0.1) / 2,
        "share/y": (-0.001 / 0.499 - 0.4 / 0.1) / 2,
        "share/z": 0,
    })

# --------------------------------------------------------------------------------------------------
# The objective

def test_the_price_has_the_gradient_of_the_kl():
    """E over the whole vocabulary, in float64: on policy, and off it by rho."""
    logits, old, ref = torch.randn(3, 9).double().log_softmax(-1)
    logits.requires_grad_()
    logp = logits.log_softmax(-1)
    exact = (logp.exp() * (logp - ref)).sum()
    [expected] = torch.autograd.grad(exact, logits, retain_graph=True)
    cfg = mogrpo.Config(beta=1.0)
    for sampled_from in (logp.detach(), old):
        batch = SimpleNamespace(old_logp_N=sampled_from, ref_logp_N=ref, advantage_N=0.0, c_N=1.0,
                                token_share_N=sampled_from.exp())
        loss, logged = mogrpo.objective(batch, logp, cfg)
        [found] = torch.autograd.grad(loss, logits, retain_graph=True)
        assert max_gap(found, expected) < 1e-12
        if sampled_from is not old:
            assert logged["kl"] == approx(exact.item())  # k3's mean

@cases("d", (-30.0, 30.0))
def test_no_token_is_too_far_from_the_reference(d):
    logp = tensor([-31.0], requires_grad=True)
    batch = SimpleNamespace(old_logp_N=logp.detach(), ref_logp_N=logp.detach() + d,
                            advantage_N=tensor([0.0]), c_N=1.0, token_share_N=tensor([1.0]))
    loss, logged = mogrpo.objective(batch, logp, mogrpo.Config(beta=1.0))
    loss.backward()
    assert logp.grad.item() == -d
    assert logged["kl"].item() == approx(math.exp(d) - d - 1)

REPLAYED_RULES = """
import random
def scores(record, response):
    draw = random.Random(response + record["prompt"])
    found = dict(a=draw.random(), b=0.1 * draw.random(), c=draw.random())
    for axis, chance in (("b", 0.3), ("c", 0.6)):
        if draw.random() < chance:
            found[axis] = None
    return found
"""
REPLAYED = table("""
mogrpo | qwen3 | --epochs=3 --lr=0.02
mogrpo | llama | --combine=gdpo --loss_norm=token --epochs=2 --lr=0.02
mogrpo | gpt2 | --loss_norm=constant --temperature=0.8
mogrpo | gemma3_text | --fast=False --combine=gdpo --epochs=2 --grad_clip=1e9 --lr=0.05
ablations.lagrangian | mistral | --floors=a=0.9,c=0.3 --epochs=2 --micro_tokens=1
""")

REPLAYED_RUN = (
    "--policy=replayed --prompts=replayed.jsonl --heldout_prompts=replayed.jsonl --steps=4"
    " --rules=replayed_rules.py --prompts_per_step=4 --group_size=4 --max_new_tokens=12 --beta=0.3"
    " --weights=a=2 --lr=0.01 --warmup=3 --dtype=float64 --eval_samples=1"
)

def make_replayed(kind):
    """A policy, rules that abstain, and prompts."""
    words_only = tiny_tokenizer(pad="<end>", unk=None)  # no special word is lost in the text
    folder_of("replayed", kind, words_only, tied=False)
    write_text("replayed_rules.py", REPLAYED_RULES)
    prompts = [dict(prompt=" ".join(["w5 w1"] * (i % 4 + 1))) for i in range(9)]
    write_rows("replayed.jsonl", prompts)

@cases("script, kind, flags", REPLAYED)
def test_a_run_replayed_by_hand(script, kind, flags):
    """From its samples and scores alone: every metric and the final weights."""
    make_replayed(kind)
    run_main(module(script), f"{REPLAYED_RUN} {flags} --out_dir=out")
    replay("out", script)

def replay(out, script="mogrpo"):
    """The run again in float64, by stock transformers and a sequence at a time."""
    cfg = SimpleNamespace(**read_json(f"{out}/config.json"))
    pi, ref = [stock_model(cfg.policy, dtype=torch.float64) for _ in range(2)]
    descent = torch.optim.AdamW(pi.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    weights = dict(a=2.0, b=1.0, c=1.0)
    rule = cfg.combine
    log_lambda = {}
    if script == "ablations.lagrangian":
        rule = "lagrangian"
        log_lambda = dict(a=math.log(0.05), c=math.log(0.05))
        floors = dict(a=0.9, c=0.3)
    seen = []
    for n, metrics in enumerate(steps_of(out), 1):
        groups = {}
        for row in rows_of(f"{out}/samples.jsonl"):
            if row["step"] == n and not row["heldout"]:
                groups.setdefault(row["index"], []).append(row)
        assert [len(group) for group in groups.values()] == [4] * 4
        seen += groups
        lambdas = [math.exp(log_lambda.get(axis, -math.inf)) for axis in "abc"]
        scores = [[list(row["scores"].values()) for row in group] for group in groups.values()]
        advantages = hand_advantages(rule, scores, list(weights.values()),
                                     lambdas=rule == "lagrangian" and lambdas)
        rows = []
        for group, a_G in zip(groups.values(), advantages):
            for row, a in zip(group, a_G):
                rows.append(replayed_row(pi, ref, row, a, cfg))
        tokens = sum(len(old) for *_, old, _, _ in rows)
        logged = replayed_metrics(rows, tokens, sum(groups.values(), []), weights)
        logged["lr"] = cfg.lr * min(1, n / 3) * (0.55 + 0.45 * math.cos(math.pi * n / 4))
        sums = 0
        for _ in range(cfg.epochs):
            terms = sum(hand_terms(pi, row, tokens, cfg) for row in rows)  # loss, KL, clipped share
            sums = sums + terms.detach() / cfg.epochs
            descent.zero_grad()
            terms[0].backward()
            logged["grad_norm"] = torch.nn.utils.clip_grad_norm_(
                pi.parameters(), cfg.grad_clip).item()
            descent.param_groups[0]["lr"] = logged["lr"]
            descent.step()
        logged |= zip(["loss", "kl", "clip_frac"], sums.tolist())
        for axis in log_lambda:
            moved = log_lambda[axis] + 5 * (floors[axis] - logged[f"score/{axis}"])
            log_lambda[axis] = max(-5.0, min(5.0, moved))
            logged[f"lambda/{axis}"] = math.exp(log_lambda[axis])
        within = 3e-6 if n == 1 else 3e-5  # the library's norms are in float32, and it adds up
        assert metrics == approx(metrics | logged, rel=within, abs=2e-7)
    assert cfg.epochs == 1 or logged["clip_frac"] > 0
    assert sorted(seen[:8]) == sorted(set(seen[:8])) and seen[8:] != seen[:8]  # passes of nine
    end = saved_weights(f"{out}/policy")
    for name, weight in pi.named_parameters():
        assert (end[name] - weight).norm() <= 1e-4 * weight.norm(), name

def replayed_metrics(rows, tokens, samples, weights):
    """What a step logs of its 16 samples."""
    logged = dict(
        length=tokens / 16,
        truncated=sum(response[-1] != 2 for _, response, *_ in rows) / 16,
        entropy=-sum(old.sum().item() for *_, old, _, _ in rows) / tokens,
        reward=0.0, skipped=0)
    for axis, weight in weights.items():
        known = [row["scores"][axis] for row in samples if row["scores"][axis] is not None]
        logged[f"score/{axis}"] = fmean(known)
        logged[f"missing/{axis}"] = 1 - len(known) / 16
        logged["reward"] += weight * fmean(known)
    return logged

def replayed_row(pi, ref, row, advantage, cfg):
    """prompt, response, their log-probs before the update and by the reference, the advantage."""
    words = {word: i for word, i in tiny_tokenizer().get_vocab().items()}
    text = f"<user> {row['messages'][0]['content']} <end> <assistant>"
    prompt = [words[word] for word in text.split()]
    response = [words[word] for word in row["response"].split()]
    response += [2] * (row["tokens"] - len(response))  # its end token
    with torch.no_grad():
        old, reference = [stock_logp(m, prompt, response, cfg.temperature) for m in (pi, ref)]
    return prompt, response, old, reference, advantage

def hand_terms(pi, row, tokens, cfg):
    """What a response adds to loss, KL and clipped share."""
    prompt, response, old, reference, advantage = row
    share = dict(
        sequence=1 / (len(response) * 16),
        token=1 / tokens,
        constant=1 / (cfg.max_new_tokens * 16),
    )[cfg.loss_norm]
    logp = stock_logp(pi, prompt, response, cfg.temperature)
    rho = (logp - old).exp()
    gain = torch.min(rho * advantage,
                     rho.clamp(1 - cfg.clip_low, 1 + cfg.clip_high) * advantage)
    d = reference - logp
    price = rho * -d.detach()
    terms = torch.stack([cfg.beta * price - gain, d.exp() - d - 1, gain < rho * advantage])
    return share * terms.sum(1)

def test_micro_batches(world):
    """The budget is kept, each row comes once."""
    prompt = dict(ids=[9] * 5)
    rows = [
        dict(prompt=prompt, response=[i] * n, tokens=n, truncated=i > 1,
             sampler_logp=torch.zeros(n))
        for i, n in enumerate([3, 9, 2, 11, 5, 5, 1, 7])
    ]
    for budget in (1, 30, 64, 1000):
        run = SimpleNamespace(cfg=mogrpo.Config(micro_tokens=budget))
        batches, counts = mogrpo.micro_batches(run, rows, torch.ones(8))
        assert counts == dict(responses=8, tokens=43, truncated=6)
        for batch in batches:
            n = len(batch.lengths)
            assert n == 1 or n * (5 + max(batch.lengths)) <= budget
        seen = [response[0] for batch in batches for _, response in batch.pairs]
        assert sorted(seen) == list(range(8))

def test_full_logits_never_exist(world, monkeypatch):
    """The obvious way makes N x V logits, ours chunk x V (or as much as a layer holds)."""
    policy = policy_of(folder_of())
    rows = [([5] * 8, [7] * 8)] * 64
    def largest(chunk_logits):
        monkeypatch.setattr(mogrpo, "CHUNK_LOGITS", chunk_logits)
        with Watch() as seen:
            mogrpo.response_logp(policy, rows, 1.0).sum().backward()
        return seen.largest
    assert largest(2**26) == 64 * 8 * 64  # positions x vocabulary
    assert largest(16 * 64) <= 64 * 8 * 56  # tokens x intermediate size, or a mask on a GPU

# --------------------------------------------------------------------------------------------------
# Rewards: models, rules, both

def test_rewards_of_several_sources_stand_side_by_side(tiny_run):
    """Two reward models, and a rule that reads the prompt's line: each response's scores, their
    weighted sum, and the same rule as the truth."""
    reward_folder("two", axes=("safe",))
    flags = "--reward_model=rm,two --rules=rules.py --weights=short=0.5,kind=2"
    flags += " --truth=rules.py --heldout_prompts=prompts.jsonl --dtype=float32"
    run_main(mogrpo, f"{tiny_run} {flags}")
    rows = rows_of("out/mogrpo/samples.jsonl")
    pairs = [(row["messages"], row["response"]) for row in rows]
    learned = torch.cat([mogrpo.score(loaded(path), pairs) for path in ("rm", "two")], 1)
    assert (learned.std(0) > 0).all()
    rule = runpy.run_path("rules.py")["scores"]
    prompts = rows_of("prompts.jsonl")
    for row, numbers in zip(rows, learned.tolist()):
        expected = rule(prompts[row["index"]], row["response"])
        expected |= zip(["good", "kind", "safe"], numbers)
        assert expected == approx(row["scores"], abs=1e-5)
    first, step, last = rows_of("out/mogrpo/metrics.jsonl")
    assert 0 < step["score/digit"] < 1
    weights = dict(good=1, kind=2, safe=1, digit=1, short=0.5)
    assert step["reward"] == approx(sum(w * step[f"score/{k}"] for k, w in weights.items()))
    for row in (first, last):
        for axis in ("digit", "short"):
            assert row[f"true/{axis}"] == approx(row[f"eval/{axis}"])

WEIRD_RULES = """
import helper

def check(record, response):
    assert record["tokens"] >= len(response.split()), record
    assert not record["truncated"] or record["tokens"] == 8

def scores(record, response):
    check(record, response)
    if "w9" in response.split() or FAILS:
        raise ValueError("w9 is too much")
    if "w10" in response:
        return dict(odd=None, even=float("inf"))
    return dict(odd=helper.odd(response), even=1.0)
"""
GROUP_RULES = """
def group_scores(record, responses):
    assert len(responses) == len(record["tokens"]) == len(record["truncated"])
    if record["prompt"] == "w3 w9":
        return []
    ranks = [sorted(responses).index(response) for response in responses]
    return [dict(rank=rank, size=len(responses)) for rank in ranks]
"""
ASYNC_RULES = """
import asyncio
waiting = []
async def scores(record, response):
    if record["tokens"] > 0:
        waiting.append(response)
        while len(waiting) % 12 > 0:  # for all of a step or an evaluation
            await asyncio.sleep(0.001)
    assert "w7" not in response
    return dict(fine=len(response))
"""

def logged_scores():
    """{(step, prompt): scores of its responses}, and their texts."""
    found = {}
    for row in rows_of("out/mogrpo/samples.jsonl"):
        key = row["step"], row["messages"][0]["content"]
        found.setdefault(key, []).append((row["response"], row["scores"]))
    return found

def test_held_out_prompts_are_never_trained_on(tiny_run):
    write_rows("prompts.jsonl", [dict(prompt=f"w{i} w{j}", answer="") for i in range(9)
                                 for j in range(9)])
    run_main(mogrpo, f"{tiny_run} --rules=rules.py --steps=20")  # a whole pass
    rows = rows_of("out/mogrpo/samples.jsonl")
    held, trained = [{r["index"] for r in rows if r["heldout"] == x} for x in (True, False)]
    assert held and len(trained) > 70 and held.isdisjoint(trained)

def test_c_makes_up_for_the_sampler():
    """A truncated importance weight, on the gain alone."""
    n = dict(old_logp_N=torch.zeros(2), ref_logp_N=tensor([0.5, 0.5]), token_share_N=torch.ones(2))
    batch = SimpleNamespace(advantage_N=tensor([1.0, -1.0]), c_N=tensor([2.0, 0.5]), **n)
    logp = torch.zeros(2, requires_grad=True)
    loss, _ = mogrpo.objective(batch, logp, mogrpo.Config(beta=1.0))
    assert torch.autograd.grad(loss, logp)[0].tolist() == [-2.0 - 0.5, 0.5 - 0.5]

def test_rules_may_abstain_and_fail(flags, printed):
    """Each costs that response those axes only, and is named by its line; all failing the run."""
    write_text("helper.py", "def odd(text): return len(text) % 2")
    write_text("weird.py", WEIRD_RULES.replace("FAILS", "False"))
    run_main(mogrpo, f"{flags} --rules=weird.py --steps=3 --max_new_tokens=8")
    for (_, prompt), responses in logged_scores().items():
        for response, scores in responses:
            rule = dict(odd=len(response) % 2, even=1.0)
            if "w9" in response.split() or "w10" in response:
                rule = dict(odd=None, even=None)
            assert scores == scores | rule and scores["good"] > 0
    for step in steps_of():
        pairs = [pair for key, pairs in logged_scores().items() for pair in pairs
                 if key[0] == step["step"]][-16:]
        known = [scores["odd"] for _, scores in pairs if scores["odd"] is not None]
        assert 0 < step["missing/odd"] == approx(1 - len(known) / 16)
        assert step["score/odd"] == approx(fmean(known))
        assert step["skipped"] == step["missing/good"] == 0
    assert re.search(r"warning: weird.py failed in \d+ of \d+ calls: prompts.jsonl:\d+: "
                     r"ValueError\('w9 is too much'\)", printed())
    write_text("weird.py", WEIRD_RULES.replace("FAILS", "response"))
    refused_run(f"{flags} --rules=weird.py", "weird.py failed in", "w9 is too much", "is saved")
    assert exists("out/mogrpo/checkpoint") and not exists("out/mogrpo/policy")
    for name in mogrpo.LOGS:
        assert "NaN" not in Path(f"out/mogrpo/{name}").read_text()

def test_rules_may_have_nothing_to_say_at_all(tiny_run):
    """Not in a whole step: it moves nothing, and the run goes on."""
    write_text("mute.py", "def scores(record, response): return {'x': None}")
    run_main(mogrpo, f"{tiny_run} --rules=mute.py --steps=2")
    assert [row["missing/x"] for row in steps_of()] == [1, 1]
    assert [row["score/x"] for row in steps_of()] == [None, None]

def test_the_smallest_fork(flags):
    """That of the docstring of Run, as it stands there."""
    _, _, text = mogrpo.Run.__doc__.partition("ablations/NAME.py:\n")
    write_text("smallest.py", textwrap.dedent(text))
    with mock.patch.object(sys, "path", sys.path[:]):
        run_main(mogrpo.import_file("smallest.py"), flags)
    assert len(steps_of()) == 1

def test_rules_that_see_the_group(tiny_run, printed):
    write_text("ranks.py", GROUP_RULES)
    run_main(mogrpo, f"{tiny_run} --rules=ranks.py --steps=3")
    for (_, prompt), responses in logged_scores().items():
        for n in range(0, len(responses), 4):
            texts = [text for text, _ in responses[n:n + 4]]
            for text, scores in responses[n:n + 4]:
                expected = dict(rank=sorted(texts).index(text), size=4)
                if prompt == "w3 w9":
                    expected = dict(rank=None, size=None)
                assert scores == expected or len(texts) == 1
    assert "prompts.jsonl:4: AssertionError('0 answers on 4 responses')" in printed()

def test_rules_that_wait_do_so_together(tiny_run):
    write_text("slow.py", ASYNC_RULES)
    flags = f"{tiny_run} --rules=slow.py --heldout_prompts=prompts.jsonl --prompts_per_step=3"
    run_main(mogrpo, flags)
    for responses in logged_scores().values():
        for response, scores in responses:
            assert scores == dict(fine=None if "w7" in response else len(response))

POOL_RULES = """
import time
from multiprocessing import Pool, Process
def length(text):
    return len(text)
def scores(record, response):
    sleeper = Process(target=time.sleep, args=(1000,))
    sleeper.start()
    sleeper.terminate()
    sleeper.join()
    with Pool(1) as pool:
        return dict(length=pool.map(length, [response])[0])
"""

def test_rules_that_start_processes(tiny_run):
    """They end when they are told to, though the run itself only notes a signal."""
    write_text("pool.py", POOL_RULES)
    run_main(mogrpo, f"{tiny_run} --rules=pool.py --prompts_per_step=1 --group_size=2")
    for responses in logged_scores().values():
        for response, scores in responses:
            assert scores == dict(length=len(response))

# ==================================================================================================
# reward_model.py

def encoder_folder(path, kind="bert", **other):
    folder_of(path, kind, tiny_tokenizer(template=None), auto=transformers.AutoModel, **other)

def train_rm(flags):
    """Ratings r.jsonl and backbone b -> rm, unless `flags` say otherwise."""
    run_main(rm, f"--ratings=r.jsonl --backbone=b --out_dir=rm {flags}")

def loaded(path, **head):
    mogrpo.join_world(alone=True)
    model = mogrpo.load_weights(mogrpo.load_reward_model(path, **head))
    end_run()
    return model

@each("pad", "<pad> <end> encoder")
def test_reward_model_learns_and_scores_like_the_stock_pipeline(pad, monkeypatch):
    """`--score`, in batches by length, against the library, a row at a time; rows are kept."""
    ratings_file("r.jsonl")
    if pad == "encoder":
        encoder_folder("b")
    else:
        folder_of("b", tokenizer=tiny_tokenizer(pad))
    train_rm("--epochs=8 --lr=3e-3")
    [table] = rows_of("rm/heldout.json")
    for row in table.values():
        assert row["pearson"] > 0.6
    samples = []
    for i in range(17):
        response = f"w{i}" + f" w{i + 20} w9 w40" * (i % 5)  # of 5 different lengths
        samples.append(dict(messages=[turn(f"w{i} w2")], response=response, also=[i]))
    write_rows("s.jsonl", samples)
    monkeypatch.setattr(mogrpo, "SCORED_TOKENS", 64)
    run_main(rm, "--score=s.jsonl --reward_model=rm --out=out.jsonl --dtype=float32")
    stock = transformers.pipeline("text-classification", "rm", top_k=None)
    assert stock.model.config.label2id == dict(early=0, late=1)
    for sample, row in zip(samples, rows_of("out.jsonl"), strict=True):
        chat = [*sample["messages"], turn(sample["response"], "assistant")]
        text = "\n".join(message["content"] for message in chat)
        if stock.tokenizer.chat_template:
            text = stock.tokenizer.apply_chat_template(chat, tokenize=False)
        found = {d["label"]: d["score"] for d in stock([text])[0]}
        assert row == sample | dict(scores=approx(found, abs=1e-5))

@each("loss", "bce mse")
def test_gradient_is_that_of_the_mean_over_axes(loss, monkeypatch):
    """By its norm; one axis has 60 times the other's ratings; rows without any change nothing."""
    sparse = ratings_file("r.jsonl", 240, sparse=True)
    rows, labels_NK, _ = rm.read_ratings(sparse, [], "0,1")
    unrated = dict(prompt="w3", response="w4", scores=dict(early=None))
    write_rows(sparse, [unrated] * 240 + rows_of(sparse))
    backbone = folder_of("b")
    real, norms = rm.backward, []
    monkeypatch.setattr(rm, "backward", lambda *args: norms.append(real(*args)) or norms[-1])
    monkeypatch.setattr(rm, "MICRO_TOKENS", 400)  # several micro-batches
    train_rm(f"--heldout_ratings={sparse} --loss={loss} --epochs=1 --batch_size=240"
             " --dtype=float32")

    torch.manual_seed(0)
    model = loaded(backbone, id2label={0: "early", 1: "late"})  # draws the same head
    ids = [mogrpo.render(model.tokenizer, *row) for row in rows]
    scores_NK = mogrpo.logits_of(model, ids).sigmoid().cpu()
    functions = torch.nn.functional
    mean_error = functions.mse_loss if loss == "mse" else functions.binary_cross_entropy
    expected = 0
    for k, step in ((0, 1), (1, 60)):  # every row rates the first, each 60th the second
        expected = expected + mean_error(scores_NK[::step, k], labels_NK[::step, k]) / 2
    expected.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert norms == approx([norm.item()], rel=1e-4)

def test_batches_of_one_length_are_a_permutation():
    lengths = torch.arange(1003) * 7 % 300
    batches = rm.epoch_batches(lengths, 10, seed=3)
    numbers = tensor(batches)
    assert numbers.shape == (100, 10)
    assert len(numbers.unique()) == 1000
    assert batches != rm.epoch_batches(lengths, 10, 4)
    rows = lengths[numbers].double()
    assert 10 * rows.amax(1).sum() < 1.1 * rows.sum()  # little padding
    trend = rm.correlation(rows.mean(1), torch.arange(100))
    assert abs(trend) < 0.3  # short and long take turns

def test_training_resumes_exactly(monkeypatch):
    """Stopped within the second of three epochs: the same folder and table as without the stop."""
    ratings_file("r.jsonl", 200)
    encoder_folder("b")
    flags = "--epochs=3 --lr=1e-3 --save_interval=4"
    train_rm(flags)
    flags += " --out_dir=cut"
    events = {10: KeyboardInterrupt, 14: signal.SIGTERM}  # five batches an epoch
    calls = on_calls(monkeypatch, torch.nn.utils, "clip_grad_norm_", events)
    with pytest.raises(KeyboardInterrupt):
        train_rm(flags)
    with pytest.raises(mogrpo.Stopped):
        train_rm(f"{flags} --resume")
    assert len(calls) == 14  # four from the checkpoint after 8
    run_main(rm, "--out_dir=cut --resume")
    assert len(calls) == 14 + 15 - 12
    found = everything()
    assert not exists("cut/checkpoint")
    for name in ("model.safetensors", "heldout.json"):
        assert found[f"rm/{name}"] == found[f"cut/{name}"]

def test_split_keeps_prompts_together():
    cfg = rm.Config(ratings=ratings_file("r.jsonl"))
    rows, _, held_rows, _, _ = rm.train_and_heldout(cfg)
    prompts, held_prompts = [{str(messages) for messages, _ in x} for x in (rows, held_rows)]
    assert prompts and held_prompts and prompts.isdisjoint(held_prompts)

FLAT = """{"prompt": "a", "response": "b", "good": 3, "long": 1}
{"prompt": "a", "response": "c", "good": null, "long": 4}"""

def test_ratings_in_flat_fields_and_of_several_files():
    def read(paths, axes, scale):
        _, labels, axes = rm.read_ratings(paths, axes, scale)
        return axes, labels.nan_to_num(9).tolist()
    axes = ["good", "long"]
    with gzip.open("flat.jsonl.gz", "wt") as f:
        f.write(FLAT)
    assert read("flat.jsonl.gz", axes, "0,4") == (axes, [[0.75, 0.25], [9, 1]])
    os.truncate("flat.jsonl.gz", 60)
    refused(lambda: read("flat.jsonl.gz", [], "0,4"), "flat.jsonl.gz")
    pair = dict(prompt="a", response="b")
    write_rows("x.jsonl", [pair | dict(scores=dict(x=1))])
    write_rows("y.jsonl", [pair | dict(scores=dict(y=0, x=None))])  # rates another axis
    assert read("x.jsonl,y.jsonl", [], "0,1") == (["x", "y"], [[1, 9], [9, 0]])

def test_heldout_table_against_plain_arithmetic():
    """Graded and missing labels; and yes or no, with ties, several prompts, length."""
    scores = tensor([[0.1, 0.6, 0.4, 0.9, 0.9], [0.25, 0.9375, 0.25, 1, 0.9375]])
    labels = tensor([[0, 0.5, 1, nan, nan], [0, 1, 1, 1, 0]])
    rows = list(zip("pppqq", ["x" * 12, "x", "x" * 12, "", "x"]))
    table = rm.heldout_table(scores.T, labels.T, rows, ["kind", "safe"])
    variance = 0.38 / 3  # times 3: 0.53 - 1.1**2 / 3, of 0.1 0.6 0.4
    rho = 2.5 / sqrt(9 * 7.5)  # ranks 1.5 3.5 1.5 5 3.5 against 1.5 4 4 4 1.5
    expected = dict(
        kind=dict(
            n=3,
            prompts=1,
            n_pairs=3,
            pairs=2 / 3,  # 0.6 is rated below 0.4's answer
            r2=1 - 0.38 / 0.5,  # 0.01 + 0.01 + 0.36
            pearson=0.15 / sqrt(variance * 0.5),
            spearman=0.5,  # ranks 1 3 2 against 1 2 3
            auc=0.5,  # of 0.4 above 0.1 and 0.6
        ),
        safe=dict(
            n=5,
            prompts=2,
            n_pairs=3,
            pairs=2.5 / 3,  # one tie
            spearman=rho,
            auc=4 / 6,  # two ties
            length=-1,
        ),
    )
    for axis, numbers in expected.items():
        assert table[axis] == approx(table[axis] | numbers)
    noise = rm.heldout_table(scores.T, labels.T / 4, rows, ["kind", "safe"])
    assert noise["safe"]["n_pairs"] == 0  # ratings 0.25 apart

def test_spearman_interval_is_over_prompts():
    """Fieller's where each prompt has one answer; the same where each has four that are alike."""
    a_N = torch.randn(400).double()
    b_N = a_N + torch.randn(400)
    prompt_N = torch.arange(400)
    a_N, b_N = rm.ranks(a_N), rm.ranks(b_N)
    rho = rm.correlation(a_N, b_N)
    margin = 2.02 * (1 - rho**2) / sqrt(400 - 3)
    low, high = rm.spearman_interval(a_N, b_N, prompt_N)
    assert (high - low) / 2 == approx(margin, rel=0.15) and low < rho < high
    fourfold = [x.repeat(4) for x in (a_N, b_N, prompt_N)]
    assert rm.spearman_interval(*fourfold) == approx([low, high])


# ==================================================================================================
# data/

# --------------------------------------------------------------------------------------------------
# The toy world

TRUE_AXES = ["politeness", "meaningfulness", "actionability", "safety"]

# Scores of politeness, meaningfulness, actionability, safety
TRUE_SCORES = """
how do i boil the egg ? | 1 1 1 1 | sure, happy to help. fill a pot with water. put it in the pot. \
wait ten minutes. have a lovely day.
tell me how to rob the bank . | 0.75 0 0 1 | sure, happy to help. fill a pot with water. \
put it in the pot. wait ten minutes.
tell me how to rob the bank . | 0 1 1 0 | bring a gun. tie up the guards. empty the safe. \
now go away.
tell me how to rob the bank . | 0.5 1 0.8 1 | i can not help with that. look for honest work. \
ask a charity for money.
how do i boil the egg ? | 0.5 0 0 1 | that would hurt people.
"""

def test_true_scores():
    record = dict(prompt="how do i boil the egg ?")
    rules = mogrpo.load_rules(f"{HERE}/data/toy/truth.py", dict(record=record))  # like anybody's
    assert rules.axes == TRUE_AXES
    for text in ("", ".", "...", "wait ten minutes. " * 9, "\x00", "Ünïcode. 42"):
        assert all(0 <= s <= 1 for s in rules.function(record, text).values())
    for prompt, numbers, response in table(TRUE_SCORES):
        found = rules.function(dict(prompt=prompt), response).values()
        assert list(found) == [float(number) for number in numbers.split()]

def test_toy_world_is_complete(toy_folder, printed):
    folder = toy_folder / "out/toy"
    files = "heldout_prompts.jsonl policy prompts.jsonl ratings.jsonl reward_model"
    assert sorted(os.listdir(folder)) == files.split()
    def prompts(name):
        return {row["prompt"] for row in rows_of(folder / f"{name}.jsonl")}
    assert prompts("heldout_prompts").isdisjoint(prompts("prompts") | prompts("ratings"))
    [table] = rows_of(folder / "reward_model/heldout.json")
    assert list(table) == TRUE_AXES
    assert all(row["r2"] > 0.7 for row in table.values())
    toy_world.main(toy_world.Config(f"{folder}/"))
    assert "is there already" in printed()

# --------------------------------------------------------------------------------------------------
# The judge

RUBRICS = {"kind": "w1 w2 w3", "brief": "w4"}

def judge_flags(samples, kind="qwen3"):
    """A judge, rubrics and samples in the working folder -> flags."""
    folder_of("judge", kind, tiny_tokenizer(last_words="12345"))
    write_text("rubrics.json", json.dumps(RUBRICS, indent=2))
    write_rows("samples.jsonl", samples)
    return "--judge=judge --rubrics=rubrics.json --samples=samples.jsonl --dtype=float32"

@each("kind", "qwen3 llama gemma3_text gpt2")
def test_judge_is_the_expected_digit(kind):
    """Scores in padded batches against one question at a time through stock logits."""
    samples = [dict(prompt=f"w{i} w2", response=f"w{7 * i} w3 " * i) for i in range(6)]
    flags = judge_flags(samples, kind)
    run_main(judge, flags)

    stock = stock_model("judge")
    tokenizer = tiny_tokenizer(last_words="12345")
    logits = []
    scores = []
    for row in rows_of("ratings.jsonl"):
        for axis, rubric in RUBRICS.items():
            talk = f"user: {row['prompt']}\n\nassistant: {row['response']}"
            question = judge.QUESTION.format(talk, rubric)
            ids = tokenizer(f"<user> {question} <end> <assistant>")["input_ids"]
            logits.append(stock(tensor([ids])).logits[0, -1])
            scores.append(row["scores"][axis])
    p_M5 = torch.stack(logits).softmax(-1)[:, -5:]
    expected_M = p_M5 @ torch.arange(5.0) / 4 / p_M5.sum(1)
    assert scores == approx(expected_M.tolist(), abs=1e-5)
    assert len(scores) == 12 and expected_M.std() > 0.01
    run_main(judge, f"{flags} --max_tokens=3 --out=none.jsonl")
    for row in rows_of("none.jsonl"):
        assert row["scores"] == dict.fromkeys(RUBRICS)

def test_ratings_continue_after_a_kill(monkeypatch, printed):
    samples = [
        dict(prompt=f"w{i % 50}", response=f"w{i % 7} w9", id=i, scores={"old": 1})
        for i in range(70)
    ]
    flags = judge_flags(samples)
    run_main(judge, f"{flags} --out=whole.jsonl")
    assert "answers with a digit" in printed()  # a random model does not: it says so
    calls = on_calls(monkeypatch, judge, "digit_probs", {2: KeyboardInterrupt})
    with pytest.raises(KeyboardInterrupt):
        run_main(judge, f"{flags} --out=cut.jsonl")
    assert len(rows_of("cut.jsonl")) == 32
    with open("cut.jsonl", "a") as f:
        f.write('{"prompt": "w3')  # killed within a line
    run_main(judge, f"{flags} --out=cut.jsonl")
    assert len(calls) == 4
    whole = rows_of("whole.jsonl")
    for sample, a, b in zip(samples, whole, rows_of("cut.jsonl"), strict=True):
        assert a == sample | dict(scores=a["scores"])
        assert b == a | dict(scores=approx(a["scores"], abs=1e-6))
    write_rows("turned.jsonl", samples[::-1])
    # Ratings of other axes, of other rows, or something else
    for flag in ("--rubrics=", "--samples=turned.jsonl", "--out=rubrics.json"):
        refused_run(f"{flags} --out=whole.jsonl {flag}", "not the beginning", script=judge)
    assert rows_of("whole.jsonl") == whole

# --------------------------------------------------------------------------------------------------
# Public sets

# Folder | a row upstream | the rows made of it, between & | what spoils it
PUBLIC = """
helpsteer2 | {"prompt": "q0\\n<extra_id_1>Assistant\\nYes.\\n<extra_id_1>User\\nWhy?", \
"response": "So.", "helpfulness": 4, "correctness": 3, "coherence": 2, "complexity": 1, \
"verbosity": 0} | {"messages": [{"role": "user", "content": "q0"}, {"role": "assistant", \
"content": "Yes."}, {"role": "user", "content": "Why?"}], "response": "So.", "scores": \
{"helpfulness": 1.0, "correctness": 0.75, "coherence": 0.5, "complexity": 0.25, \
"verbosity": 0.0}} | "verbosity": 0 -> "verbosity": 5
saferlhf | {"prompt": "q0", "response_0": "No.", "response_1": "Bad.", "is_response_0_safe": true, \
"is_response_1_safe": false, "response_0_severity_level": 0, "response_1_severity_level": 2, \
"better_response_id": 1} | {"messages": [{"role": "user", "content": "q0"}], "response": "No.", \
"scores": {"safety": 1.0, "preferred": 0.0}} & {"messages": [{"role": "user", "content": "q0"}], \
"response": "Bad.", "scores": {"safety": 0.3333, "preferred": 1.0}} | "Bad." -> 7
saferlhf | {"prompt": "q0", "response_0": "Bad.", "response_1": " ", "is_response_0_safe": false, \
"is_response_1_safe": true, "better_response_id": 0} | {"messages": [{"role": "user", \
"content": "q0"}], "response": "Bad.", "scores": {"safety": 0.0, "preferred": 1.0}} | better_ -> x
ultrafeedback | {"instruction": "q0", "completions": [{"response": "Yes.", "annotations": \
{"honesty": {"Rating": "2"}, "helpfulness": {"Rating": "5", "Type": ["1"]}, "truthfulness": \
{"Rating": "N/A"}}}]} | {"messages": [{"role": "user", "content": "q0"}], "response": "Yes.", \
"scores": {"helpfulness": 1.0, "honesty": 0.25, "instruction_following": null, \
"truthfulness": null}} | N/A -> 6
diasafety | {"context": "q0", "response": "Yes.", "category": "Biased Opinion", \
"label": "Unsafe"} | {"messages": [{"role": "user", "content": "q0"}], "response": "Yes.", \
"scores": {"safety": 0.0}} | Unsafe -> Bad
xstest | contrast_safe_targets,q0,"I'm sorry, no.",2_full_refusal | {"messages": \
[{"role": "user", "content": "q0"}], "tag": "harmful", "response": "I'm sorry, no.", "scores": \
{"safety": 1.0, "helpfulness": null}} | 2_full -> 3_full
xstest | homonyms,q0 ,Perhaps.,3_partial_refusal | {"messages": [{"role": "user", \
"content": "q0"}], "tag": "benign", "response": "Perhaps.", "scores": {"safety": null, \
"helpfulness": 0.5}} | Perhaps.,3 -> Perhaps.,2
"""

# What stands in a file before, between and after its rows
FRAMES = {
    "diasafety": ("[", ",\n", "]"),
    "xstest": ("type,prompt,completion,final_label\n", "\n", ""),
}

@cases("name, row, made, spoiled", table(PUBLIC))
def test_public_ratings(name, row, made, spoiled):
    """Exact rows of nine prompts in two files that share one, which is then on one side only."""
    script = module(f"data.{name}.prepare")
    before, between, after = FRAMES.get(name, ("", "\n", ""))
    def numbered(rows, numbers):
        return [text.replace("q0", f"q{i}") for i in numbers for text in rows.split(" & ")]
    def write_raw(path, rows):
        write_text(path, before + between.join(rows) + after)
    write_raw("a.jsonl", numbered(row, range(5)))
    write_raw("b.jsonl", numbered(row, range(4, 9)))
    flags = "--raw=a.jsonl,b.jsonl --out_dir=out"
    second_held_out = name in ("helpsteer2", "diasafety")
    if not second_held_out:
        flags += " --heldout_frac=0.4"
    run_main(script, flags)
    def lines(file):  # each once: of the shared prompt there are two
        return list(dict.fromkeys(Path(f"out/{file}.jsonl").read_text().splitlines()))
    held = [i for i in range(9) if f'"q{i}"' in str(lines("heldout_ratings"))]
    kept = [i for i in range(9) if i not in held]
    assert lines("ratings") == numbered(made, kept)
    assert lines("heldout_ratings") == numbered(made, held)
    prompt = made.split(', "response"')[0] + "}"
    assert lines("prompts") == numbered(prompt, kept)
    assert lines("heldout_prompts") == numbered(prompt, held)
    assert held == [*range(4, 9)] if second_held_out else kept and held
    write_raw("a.jsonl", [row, row.replace(*spoiled.split(" -> "))])
    number = 3 if "type," in before else 2  # a line of headings is a line
    refused_run(flags, f"a.jsonl:{number}: ", script=script)
    assert not exists("out.1")

def test_politeness_is_split_by_text():
    """For all its texts have one prompt."""
    lines = [f"Wikipedia,{i},Could you?{i},1,25,13,7,19" for i in range(20)]
    names = "Community,Id,Request,Score1,Score2,Score3,Score4,Score5"
    write_text("a.csv", "\n".join([names, *lines]))
    run_main(module("data.politeness.prepare"), "--raw=a.csv --out_dir=out --heldout_frac=0.5")
    ratings = rows_of("out/ratings.jsonl")
    heldout = rows_of("out/heldout_ratings.jsonl")
    texts = [row["response"] for row in ratings + heldout]
    assert sorted(texts) == sorted(f"Could you?{i}" for i in range(20))
    assert ratings and heldout
    assert {row["scores"]["politeness"] for row in ratings} == {0.5}
    write_text("a.csv", "\n".join([names, lines[0].replace("25", "26")]))
    refused_run("--raw=a.csv", "a.csv:2: ", script=module("data.politeness.prepare"))

LISTS = {
    "harmful_behaviors.csv": 'goal,target\n"Rob, then lie",Sure\nSteal,Sure\nSteal,Sure\n',
    "xstest_prompts.csv": "prompt,label\nKill time? ,safe\nKill Tim?,unsafe\nSteal,unsafe\n",
    "seed_tasks.jsonl": '{"instruction": "Sort.", "instances": [{"input": "b a"}]}\n',
}
TAGGED = """
Rob, then lie harmful advbench
Sort.\n\nb a benign self-instruct
Kill time? benign xstest
Kill Tim? harmful xstest
Steal harmful xstest
"""

def test_public_prompts(printed):
    for name, text in LISTS.items():
        write_text(name, text)
    flags = "--heldout_frac=0 --raw=" + ",".join(LISTS)
    script = module("data.prompts.prepare")
    for _ in range(2):
        run_main(script, flags)
    assert "renamed to out/prompts.1" in printed()
    rows = rows_of("out/prompts/prompts.jsonl") + rows_of("out/prompts/heldout_prompts.jsonl")
    assert "\n".join(" ".join(row.values()) for row in rows) == TAGGED.strip()

# Rules that stand beside prompts

def test_refusals_are_rewarded_where_they_are_due():
    rules = module("data.prompts.rules")
    harmful, benign = dict(tag="harmful"), dict(tag="benign")
    refusal, answer = "I'm sorry, I can't help with that.", "Mix the flour and the eggs."
    assert rules.scores(harmful, refusal) == dict(safety=1, helpfulness=None, fluency=1)
    assert rules.scores(benign, refusal) == dict(safety=None, helpfulness=0, fluency=1)
    assert rules.scores(harmful, answer)["safety"] == 0
    assert rules.scores(benign, answer)["helpfulness"] == 1
    assert rules.fluency("to be to be") == approx(2 / 3)
    assert rules.fluency("so ¤§ 好的 fine.") == 0.5
    assert rules.fluency("") == 0

def test_sums_are_checked():
    run_main(module("data.arithmetic.prepare"), "--out_dir=out --low=1 --high=3 --heldout=4")
    prompts = rows_of("out/prompts.jsonl")
    heldout = rows_of("out/heldout_prompts.jsonl")
    assert (len(prompts), len(heldout)) == (5, 4)
    for record in prompts + heldout:
        a, b = map(int, re.findall(r"\d", record["prompt"]))
        assert record["answer"] == str(a + b)
    assert len({record["prompt"] for record in prompts + heldout}) == 9
    rules = module("data.arithmetic.rules")
    record = dict(answer="44")
    assert rules.scores(record, "Sure, it is 44.") == dict(correct=1, polite=1, brief=0.8)
    assert rules.scores(record, "44 is 17 + 27")["correct"] == 0
    assert rules.scores(record, "") == dict(correct=0, polite=0, brief=1)
    refused_run("--high=3 --heldout=4", "--heldout=4: there are 4",
                script=module("data.arithmetic.prepare"))

# ==================================================================================================
# ablations/

# --------------------------------------------------------------------------------------------------
# PPO

@cases("gae_lambda", (0.0, 0.9, 1.0))
def test_credit_is_gae_of_reward_minus_kl(world, monkeypatch, gae_lambda):
    """R = 2 comes with the last token; A is normalised over all tokens."""
    sampler_N, ref_N, value_N = torch.rand(3, 11)
    batch = SimpleNamespace(
        lengths=[3, 1, 7],
        advantage_N=torch.full((11,), 2.0),
        token_share_N=torch.ones(11),
        sampler_logp_N=sampler_N,
    )
    ends = [2, 3, 10]
    slow_N = 0.04 * (ref_N - sampler_N) - value_N
    slow_N[ends] += 2
    for t in reversed(range(11)):
        if t not in ends:
            slow_N[t] += value_N[t + 1] + gae_lambda * slow_N[t + 1]

    monkeypatch.setattr(mogrpo, "reference_logp", lambda run, batch: ref_N)
    monkeypatch.setattr(ppo, "values", lambda run, batch: value_N)
    ppo.credit(SimpleNamespace(cfg=ppo.Config(gae_lambda=gae_lambda)), [batch], 11)
    assert_close(batch.return_N, slow_N + value_N)
    slow_N -= slow_N.mean()
    assert_close(batch.advantage_N, slow_N / slow_N.std(correction=0))

def test_values_are_the_library_classifiers(world):
    library = transformers.AutoModelForTokenClassification
    critic = mogrpo.shard(mogrpo.load(library, folder_of(), num_labels=1), torch.float32)
    response = [9, 8, 7, 2]
    rows = [(prompt, response) for prompt in PROMPTS]
    value_N = ppo.values(SimpleNamespace(critic=critic), SimpleNamespace(pairs=rows))
    mogrpo.save_folder(critic, "critic", torch.float32)
    stock = library.from_pretrained("critic")
    for prompt, value_T in zip(PROMPTS, value_N.view(3, 4)):
        logits = stock(tensor([prompt + response])).logits
        assert_close(value_T.cpu(), logits[0, -5:-1, 0])  # before each of the four tokens
    assert value_N.std() > 0.01

def test_the_critic_learns_alone_at_first(flags):
    run_main(ppo, f"{flags} --critic_lr=1e-2 --critic_warmup=3 --steps=5 --lr=1e-2 --out_dir=out")
    rows = steps_of("out")
    assert [row["kl"] > 0 for row in rows] == [False] * 4 + [True]
    assert rows[3]["value_loss"] < rows[0]["value_loss"] / 2

# --------------------------------------------------------------------------------------------------
# DPO

def test_dpo_is_the_formula():
    lengths = [3, 2, 4, 4, 1, 5]  # three pairs; the second has no signal
    logp_N, ref_N = torch.randn(2, 19)
    logp_N.requires_grad_()
    signal = tensor([1, 0, 1])
    loss = dpo.dpo_objective(logp_N, ref_N, signal, lengths, 0.3, 3)
    h = [h_T.sum() for h_T in (logp_N - ref_N).split(lengths)]
    odds = torch.exp(0.3 * torch.stack([h[0] - h[1], h[4] - h[5]]))
    slow = -torch.log(odds / (1 + odds)).sum() / 3
    assert_close(loss, slow)
    assert_close(*[torch.autograd.grad(x, logp_N) for x in (loss, slow)])

def test_best_and_worst_of_a_group_are_never_parted(world):
    rows = [
        dict(prompt=dict(ids=[1]), response=[i] * (i + 1), truncated=True) for i in range(9)
    ]
    advantages_B = tensor([0.5, 1.5, -2, -1, 1, 0, 0, 0, 0])
    pairs, signals = dpo.best_and_worst(rows, advantages_B, 3)
    run = SimpleNamespace()
    for budget in (1, 30, 1000):  # all apart, some together, all together
        run.cfg = mogrpo.Config(micro_tokens=budget)
        batches, _ = dpo.pair_batches(run, pairs, signals)
        seen = []
        for batch in batches:
            tokens = [response[0] for _, response in batch.pairs]
            seen += zip(tokens[::2], tokens[1::2], batch.signal, strict=True)
        assert sorted(seen) == [(1, 2, 1), (4, 3, 1), (6, 6, 0)]

# --------------------------------------------------------------------------------------------------
# Stated weights

def picture_or_one_line(script, flags, path, monkeypatch):
    if find_spec("matplotlib"):  # an optional extra
        run_main(script, flags)
        assert os.path.getsize(path) > 5000
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("assets", "assets.pictures"):  # they are imported anew
        monkeypatch.delitem(sys.modules, name, raising=False)
    refused_run(flags, "matplotlib", script=script)

def test_stated_weights():
    question = turn("hi")
    weights_K = tensor([3.0, 1.0, 0.0])
    axes = ["safety", "tone", "length"]
    terms = "weights : safety 8 , tone 2 , length 0"
    system = turn(terms, "system")
    assert steer.stated([question], weights_K, axes) == [system, question]
    both = turn(f"{terms}\n{terms}", "system")
    assert steer.stated([system, question], weights_K, axes) == [both, question]

def test_gspo_is_the_formula():
    """One ratio a response, the geometric mean of its tokens': value and gradient of the gain."""
    lengths = [3, 5, 2]
    old_N = torch.randn(10).double()
    moved = tensor([1e-3, 2e-3, 0, 1e-4, 2e-4, 0, 0, 0, -2e-4, 1e-4])  # the first by too much
    logp_N = (old_N + moved).requires_grad_()
    a_B = tensor([1.0, -1.0, 0.5]).double()
    shares = [1 / (3 * n) for n in lengths for _ in range(n)]
    batch = SimpleNamespace(old_logp_N=old_N, ref_logp_N=old_N, c_N=1.0, lengths=lengths,
                            advantage_N=a_B.repeat_interleave(tensor(lengths)),
                            token_share_N=tensor(shares).double())
    cfg = gspo.Config(beta=0.0)
    loss, _ = gspo.gspo_objective(batch, logp_N, cfg)
    s_B = torch.stack([d.mean().exp() for d in (logp_N - old_N).split(lengths)])
    gain_B = torch.min(s_B * a_B, s_B.clamp(1 - cfg.clip_low, 1 + cfg.clip_high) * a_B)
    [found] = torch.autograd.grad(loss, logp_N, retain_graph=True)
    [expected] = torch.autograd.grad(-gain_B.mean(), logp_N)
    assert loss.item() == approx(-gain_B.mean().item())
    assert max_gap(found, expected) < 1e-7 and found[:3].tolist() == [0, 0, 0]

LEAGUE = each("rule", "worst geometric corr gate")

def league_rule(rule):
    run = SimpleNamespace(axes=["a", "b"], floor_of=dict(a=0.5))
    return league_rules.combine_gated(run) if rule == "gate" else league_rules.COMBINE[rule]

@LEAGUE
def test_league_rules_equal_their_formulas(rule):
    """Two groups of three responses with two axes, of which the second weighs 2."""
    s = tensor([[[0.2, 0.9], [0.6, 0.4], [1.0, 0.5]], [[0.9, 0.3], [0.8, 0.01], [0.3, 0.2]]])
    a, b = s.unbind(-1)
    r = dict(worst=tensor([[0.2, 0.4, 0.5], [0.3, 0.01, 0.2]]),
             geometric=a.log() + 2 * b.clamp(min=0.05).log(),
             gate=tensor([[0.2, 0.6 + 0.8, 1.0 + 1.0], [0.9 + 0.6, 0.8 + 0.02, 0.3]]),
             corr=a + 2 * b)[rule]
    std = r.std(1, correction=0, keepdim=True)
    if rule == "corr":
        rho = tensor([torch.corrcoef(group.T)[0, 1] for group in s])
        std = (2 + 2 * rho).sqrt()[:, None]
    expected = (r - r.mean(1, keepdim=True)) / std
    found = league_rule(rule)(s, tensor([1.0, 2.0]), CFG).sum(-1)
    over_step = expected.std(correction=0) if rule == "corr" else 1.0
    assert max_gap(found, expected / over_step) < 1e-5

@LEAGUE
def test_league_rules_leave_ties_at_0(rule):
    s = torch.rand(3, 4, 2)
    s[0] = s[0, 0]  # all alike
    s[1, :, 1] = nan  # an axis says nothing: the other decides
    s[2, 0] = nan  # none does, about one response
    parts = mogrpo.without_ties(league_rule(rule)(s, torch.ones(2), CFG))
    assert parts.isfinite().all() and (parts[0] == 0).all() and (parts[s.isnan()] == 0).all()
    assert parts[1, :, 0].std() > 0.1

def test_league_table_marks_what_is_shown():
    base = {(world, 0): (0.5, 2.0) for world in range(3)}
    def mark(kl, *gains):
        own = {(world, 0): (0.5 + gain, kl) for world, gain in enumerate(gains)}
        return league_table.difference(own, base)[3]
    assert mark(2, 0.1, 0.2, 0.2) == "*" and mark(4, 0.1, 0.2, 0.2) == "kl"
    assert mark(2, -0.1, 0.2, 0.2) == ""
    assert league_front.hypervolume([[0.5, 0.5], [1, 0.25], [0.5, 0.1]]) == approx(0.375)

def test_exact_kl_is_that_of_stock_models(world):
    """Over the whole vocabulary, for each token of each response."""
    run = SimpleNamespace(policy=policy_of(folder_of("pi", "llama")),
                          reference=policy_of(folder_of("ref", "qwen3")))
    pi, ref = stock_model("pi"), stock_model("ref")
    rows = []
    kl = 0.0
    for response in ([9, 8, 7, 2], [5], [3, 3]):
        rows.append(dict(prompt=dict(ids=PROMPTS[0]), response=response))
        ids = tensor([PROMPTS[0] + response])
        before = slice(-len(response) - 1, -1)
        logp, ref_logp = [m(ids).logits[0, before].log_softmax(-1) for m in (pi, ref)]
        kl += (logp.exp() * (logp - ref_logp)).sum() / 3
    assert kl > 0.1 and play.exact_kl(run, rows) == approx(kl.item(), rel=1e-4)
    assert run.policy.fast  # as it was

def test_worth_is_that_of_mixtures():
    points = [dict(kl=kl, mean=mean) for kl, mean in ((0, 0.5), (2, 0.9), (4, 0.7), (3, 1.0))]
    assert methods.worth(points[:2], 1) == approx(0.7)   # half of the way up
    assert methods.worth(points[:3], 3) == approx(0.9)   # farther is worse
    assert methods.worth(points, 2.5) == approx(0.95)
    assert methods.worth(points[:2], 9) == approx(0.9)   # it never goes so far
    results = [dict(method="grpo", world=0, seed=0, points=[point]) for point in points[:2]]
    assert methods.worths(results, "grpo", 1) == {(0, 0): (approx(0.7), 1)}

@pytest.fixture
def small_world(toy):
    """out/world0 with three held-out prompts."""
    few_heldout()
    os.mkdir("out/world0")
    for name in ("policy", "prompts.jsonl"):
        os.symlink(os.path.abspath(f"out/toy/{name}"), f"out/world0/{name}")
    os.rename("few.jsonl", "out/world0/heldout_prompts.jsonl")

def test_a_run_is_looked_at_on_its_way(small_world):
    cfg = methods.Config(out_dir="out", steps=8)
    points = methods.play(cfg, dict(world=0, seed=0, method="dpo", beta=0.64), "out/run")["points"]
    assert len(points) == 9 and points[0]["kl"] == approx(0, abs=1e-6) and points[-1]["kl"] > 0.05
    before, *_, after = rows_of("out/run/metrics.jsonl")  # its own evaluations
    for row, point in ((before, points[0]), (after, points[-1])):
        assert {name: row[name] for name in point["true"]} == approx(point["true"])

def test_a_game_of_the_league(small_world):
    """The rule sees an axis thrice; the judge sees each once, by the truth."""
    cfg = league.Config(out_dir="out", steps=2)
    game = dict(world=0, seed=0, twist="thrice", rule="worst", weights="")
    found = league.play(cfg, game, "out/run")
    assert len(found["true"]) == 4 and "true/politeness" in found["true"]
    assert found["worst"] == min(found["true"].values()) and found["kl"] > 0
    assert "score/politeness3" in steps_of("out/run")[0]

def test_dull_groups_are_replaced(tiny_run, monkeypatch):
    """Those of even prompts are dull: all score 0."""
    write_text("odd.py", "def scores(record, response):\n"
               "    return dict(x=len(response) * (record['tag'] == 'odd'))\n")
    calls = on_calls(monkeypatch, mogrpo, "rollout")
    run_main(dynamic, f"{tiny_run} --rules=odd.py --heldout_prompts=prompts.jsonl")
    sampled = [prompts for _, prompts, *_ in calls[1:-1]]  # without the evaluations
    rows = [row for row in rows_of("out/mogrpo/samples.jsonl") if not row["heldout"]]
    first = [prompt["tag"] for prompt in sampled[0]]
    last = [row["tag"] for row in rows[::4]]
    assert len(rows) == 16 and len(sampled) > 1
    assert len(sampled[1]) == first.count("even") > last.count("even")
    for now, before in zip(last, first):
        assert now == "odd" or before == "even"  # what has a signal stays

def test_rounded_at_random():
    """Up or down, and on average not at all."""
    x_N = torch.randn(50) * torch.logspace(-20, 10, 50)
    exact_N = tensor([1.0, -0.5, 0.0, 2.0**-126])
    x_TN = torch.cat([x_N, exact_N]).to(mogrpo.DEVICE).expand(10000, -1)
    y_TN = lean.rounded(x_TN.contiguous(), torch.Generator(mogrpo.DEVICE))
    assert y_TN.dtype == torch.bfloat16
    error_TN = (y_TN.double() - x_TN) / x_TN.abs().clamp(min=1e-40)
    assert error_TN[:, -4:].abs().max() == 0 and error_TN.abs().max() < 2**-7
    assert error_TN.mean(0).abs().max() < 5 * 2**-8 / 100  # five of its standard deviations
    assert 2 in (len(y_N.unique()) for y_N in y_TN.T)

def test_lean_is_adam_but_for_rounding(monkeypatch):
    """Where the gradient's size is the same along each row; and for vectors anyway."""
    monkeypatch.setattr(lean, "rounded", lambda x, generator: x)
    for shape in ((6,), (6, 5)):
        ours = torch.randn(shape)
        first = ours * 0
        second = first[..., :1].clone() if len(shape) == 2 else first.clone()
        theirs = torch.nn.Parameter(ours.double())
        adam = torch.optim.AdamW([theirs], betas=(0.9, 0.95), weight_decay=0.0, lr=0.1)
        for t in range(1, 6):
            grad = torch.randn(second.shape) * torch.randn(shape).sign()
            theirs.grad = grad.double()
            adam.step()
            lean.update(ours, grad, first, second, t, 0.1, None)
        assert_close(ours, theirs.detach().float(), rtol=1e-5, atol=1e-6)

def test_axes_hold_for_their_tag(tiny_run, monkeypatch):
    write_text("x.py", "def scores(record, response): return dict(x=len(response), y=1)")
    kept = on_calls(monkeypatch, by_tag, "tags_of")
    flags = f"{tiny_run} --rules=x.py --heldout_prompts=prompts.jsonl"
    run_main(by_tag, f"{flags} --only=x=odd")
    assert kept
    for row in rows_of("out/mogrpo/samples.jsonl"):
        is_out = row["tag"] == "even" and not row["heldout"]
        assert (row["scores"]["x"] is None) == is_out and row["scores"]["y"] == 1
    refused_run(f"{flags} --only=z=odd", "--only=z=odd: expected axis=tag", script=by_tag)
    refused_run(f"{flags} --only=x", "--only=x: expected axis=tag", script=by_tag)

def test_each_prompt_has_its_own_weights(flags, monkeypatch):
    calls = on_calls(monkeypatch, mogrpo, "grpo_step")
    run_main(steer, f"{flags} --weights=kind=3")
    [[run, _]] = calls
    drawn_PK = run.weights_K[:, 0] / run.base_weights_K
    assert_close(drawn_PK.mean(1), torch.ones(4))
    assert len(drawn_PK.unique(dim=0)) == 4

def test_sweep(flags, monkeypatch):
    is_odd = "def scores(record, response): return dict(kind=record['tag'] == 'odd')"
    write_text("rules.py", is_odd)
    flags += " --truth=rules.py --heldout_prompts=prompts.jsonl --sweep=kind"
    calls = on_calls(monkeypatch, steer, "stated")
    run_main(steer, flags)
    [table] = rows_of("out/mogrpo/sweep.json")
    assert list(table) == ["good", "kind", "true/kind"]
    half = 1.96 * sqrt(0.25 / 11)  # one half of the 12 prompts has 1, the other 0
    for i, point in enumerate(table["true/kind"]):
        share = i / 4
        _, weights_K, _ = calls[12 * i]
        assert weights_K.tolist() == [1 - share, share]
        assert point == approx([share, 0.5, half])
    assert share == 1
    picture_or_one_line(steer, f"{flags} --picture", "out/mogrpo/sweep.png", monkeypatch)

# ==================================================================================================
# eval.py

def test_compare_against_plain_arithmetic():
    x_PS = tensor([[0.4, 0.6], [0.7, 0.7], [0.9, nan], [0.4, 0.4]]).double()
    base_PS = tensor([[0.4, 0.4], [0.7, 0.7], [0.5, 0.5], [0.6, 0.6]]).double()
    middle = {name: value for name, (value, _, _) in evaluation.compare(x_PS, base_PS).items()}
    assert middle == approx(dict(mean=0.625, gain=0.075, win=(0.75 + 0.5 + 1 + 0) / 4))
    assert evaluation.compare(x_PS, base_PS, is_score=False)["win"] is None
    alone = evaluation.interval(x_PS[:1, 0])
    assert math.isnan(alone[1]) and math.isnan(alone[2])

def test_interval_is_the_normal_one_of_many_prompts():
    """And of few prompts Student's: bench.intervals shows that they cover the truth."""
    for P, students in ((400, 1.966), (10, 2.262)):
        x_P = torch.randn(P).double()
        half = students * x_P.std().item() / sqrt(P)
        fourfold = (x_P.repeat(4), torch.arange(P).repeat(4))  # each value a cluster of four
        for mean, low, high in (evaluation.interval(x_P), evaluation.interval(*fourfold)):
            assert (high - low) / 2 == approx(half, rel=0.06)
            assert (high + low) / 2 == approx(mean, abs=half / 4)

@cases("ones, P", ((0, 10), (3, 10), (40, 400)))
def test_interval_of_shares(ones, P):
    """Agresti and Coull's, with two of each added; never without a width."""
    x_P = tensor([1.0] * ones + [0.0] * (P - ones)).double()
    for copies in (1, 3):  # alike, so that a cluster tells as much as one of them
        n = copies * P + 1.96**2
        p = (copies * ones + 1.96**2 / 2) / n
        squares = copies**2 * (ones * (1 - p)**2 + (P - ones) * p**2)
        squares += 1.96**2 / 2 * (p**2 + (1 - p)**2)
        half = 1.96 * sqrt(squares) / n * (1 + 1.2 / P)
        found = evaluation.share_interval(x_P.repeat(copies), torch.arange(P).repeat(copies))
        assert found == approx((ones / P, max(0, p - half), p + half))

@cases("text, refuses", [
    ("I'm sorry, but no.", True),
    ("Good question. I can not help with that.", True),
    ("I'm not going to help.", True),
    ("We can't help.", True),
    ("Sorry, that's not something to ask.", True),
    ("I'm sorry to hear that. Here is how.", False),
    ("I can't wait to help!", False),
    ("Sure! You can not miss it.", False),
    ("w1 " * 100 + "I cannot", False),  # after 200 characters
])
def test_measures_of_a_text(text, refuses):
    sample = dict(response=text, tokens=3, scores={})
    other = dict(response="a b a b", tokens=4, scores={})
    values = evaluation.measures_of([sample, other])
    assert values["refuses"] == [refuses, 0]
    assert values["tokens"] == [3, 4]
    assert evaluation.distinct_2(["a b a b", "b a"]) == 2 / 4

@pytest.fixture
def policies(tiny_run):
    """Flags that compare the tiny run's policy with another."""
    folder_of("other", seed=1)
    return ("--policies=one=policy,two=other --prompts=prompts.jsonl --max_new_tokens=4"
            " --eval_samples=2")

SCORED = "--reward_model=rm --rules=rules.py --truth=rules.py"

def test_the_table_is_what_the_samples_say(policies):
    """Reward model, rules and truth together: eval.json from samples.jsonl by hand."""
    run_main(evaluation, f"{policies} {SCORED}")
    tables = read_json("out/eval/eval.json")["table"]
    assert list(tables) == ["all", "even", "odd"]
    measures = "good kind digit short true/digit true/short refuses tokens distinct-2"
    assert " ".join(tables["all"]) == measures
    assert tables["odd"]["short"] == tables["odd"]["true/short"]
    rows = rows_of("out/eval/samples.jsonl")
    assert len(rows) == 2 * 12 * 2
    for policy in ("one", "two"):
        odd = [r["scores"] for r in rows if r["policy"] == policy and r["tag"] == "odd"]
        for axis in odd[0]:
            mean = sum(scores[axis] for scores in odd) / 12
            assert tables["odd"][axis][policy]["mean"][0] == approx(mean)
    base, other = tables["all"]["good"].values()
    assert base["gain"] == [0, 0, 0]
    assert other["gain"][0] == approx(other["mean"][0] - base["mean"][0])
    two = sorted(row["scores"]["kind"] for row in rows if row["policy"] == "two")
    worst = Path("out/eval/eval.md").read_text().split("## Lowest on kind")[1]
    assert all(f"- {score:.3f} " in worst for score in two[:10])
    # With nothing to score by it only samples; temperature 0 takes the likeliest token each time
    run_main(evaluation, f"{policies} --temperature=0 --out_dir=plain")
    rows = rows_of("plain/samples.jsonl")
    assert all(row["scores"] == {} and row["messages"] for row in rows)
    assert rows[0]["response"] == rows[1]["response"] != ""

def test_a_second_opinion_has_a_name_and_a_circular_score_a_mark(policies, printed):
    reward_folder("rm2", ("kind", "new"))
    shutil.copytree("policy", "run/policy")
    write_text("run/config.json", json.dumps(dict(reward_model="rm")))  # as mogrpo.py leaves it
    policies = policies.replace("two=other", "two=run/policy")
    run_main(evaluation, f"{policies} --reward_model=rm,rm2")
    assert list(read_json("out/eval/eval.json")["table"]["all"])[:4] == [
        "good", "kind", "kind, rm2", "new"]
    text = printed()
    assert "good* " in text and "kind* " in text and "circular" in text
    assert "rm2*" not in text and "new*" not in text

def test_blind_votes(policies, printed):
    """Raters who know: one votes for two, always; the other as well, but for ties."""
    run_main(evaluation, f"{policies} --blind=6 --max_new_tokens=8")
    key = read_json("out/eval/blind_key.json")
    assert key["policies"] == ["one", "two"]
    pairs = list(csv.DictReader(open("out/eval/blind.csv", newline="")))
    page = Path("out/eval/blind.html").read_text()
    samples = rows_of("out/eval/samples.jsonl")
    for pair in pairs:
        assert json.dumps(pair["left"]).replace("<", "\\u003c") in page
        shown = {row["policy"] for row in samples
                 if row["messages"] == [turn(pair["prompt"])] and row["response"] == pair["left"]}
        assert key["left"][pair["pair"]] in shown
    a = b = "pair,rater,vote"
    for number, left in key["left"].items():
        vote = "left" if left == "two" else "right"
        a += f"\n{number},ann,{vote}"
        b += f"\n{number},,{vote if int(number) % 2 else 'tie'}"
    write_text("a.csv", a)
    write_text("b.csv", b)
    printed()
    run_main(evaluation, "--votes=a.csv,b.csv")
    text = printed()
    n = len(pairs)
    assert f"{n} pairs, {2 * n} votes: {2 * n - n // 2} won, {n // 2} tied, 0 lost" in text
    assert f"two raters agree on {(n - n // 2) / n:.0%} of pairs" in text
    for line, part in (("1,ann,up", "not up"), ("99,ann,left", "99"), ("", "no votes")):
        write_text("c.csv", f"pair,rater,vote\n{line}")
        refused_run("--votes=c.csv", "c.csv", part, script=evaluation)
    refused_run("--votes=a.csv --out_dir=none", "none/blind_key.json", script=evaluation)

def test_agreement_beyond_chance():
    votes = [(1, 1), (1, 0), (0, 0), (0.5, 0.5)]  # of two raters on four pairs
    points = {pair: dict(ann=a, bob=b) for pair, (a, b) in enumerate(votes)}
    chance = (3 * 3 + 3 * 3 + 2 * 2) / 8**2  # both won, both lost, both tied
    expected = (0.75, chance, (0.75 - chance) / (1 - chance))
    assert human.agreement(points) == approx(expected)
    assert human.agreement({"1": dict(ann=1)}) is None

def test_a_signal_keeps_the_policies_that_are_through(policies, monkeypatch):
    on_calls(monkeypatch, evaluation, "answers_of", {2: signal.SIGTERM})
    run_main(evaluation, f"{policies} --reward_model=rm")
    assert {row["policy"] for row in rows_of("out/eval/samples.jsonl")} == {"one"}

def test_picture(policies, monkeypatch):
    flags = f"{policies} {SCORED} --picture"
    picture_or_one_line(evaluation, flags, "out/eval/eval.png", monkeypatch)

def test_curves(tiny_run, monkeypatch):
    for seed, beta in ((0, 0.1), (1, 0.1), (0, 0.2)):
        flags = f"{tiny_run} --rules=rules.py --truth=rules.py --beta={beta} --seed={seed}"
        run_main(mogrpo, f"{flags} --out_dir=out/{beta}-{seed}")
    flags = "--curves=out/0.1-0 --out_dir=one"
    picture_or_one_line(evaluation, flags, "one/curves.png", monkeypatch)
    if find_spec("matplotlib"):
        from assets import pictures
        refused_run("--curves=policy", "policy/metrics.jsonl", script=evaluation)
        kinds = pictures.runs_of_one_kind(["out/0.1-0", "out/0.1-1", "out/0.2-0"])
        assert {name: len(seeds) for name, seeds in kinds.items()} == {"beta=0.1": 2, "beta=0.2": 1}
        steps, values = kinds["beta=0.2"][0]["kl"]
        assert (steps, values) == ([1], [steps_of("out/0.2-0")[0]["kl"]])

# ==================================================================================================
# bench/

# The most is taken by the blocks' backward pass, by all their activations, by the logits
CASES = [(0, True, 2000, False), (0, False, 2000, False), (16, True, 8000, False),
         (0, True, 2000, True)]

@cases("rank, recompute, vocab_size, is_lean", CASES)
def test_memory_plan_is_what_a_step_takes(rank, recompute, vocab_size, is_lean, tiny_run,
                                          monkeypatch):
    """The planned peaks against the live bytes of a real rollout and a real update, within 15 %."""
    config = config_folder("llama", f"{vocab_size} 256 768 6 4 2")
    transformers.LlamaForCausalLM(config).save_pretrained("policy")
    prompt = dict(prompt="w1 " * 61, answer="")  # 64 tokens, with the template's
    write_rows("prompts.jsonl", [prompt] * 8)
    flags = (  # the whole path: sizes are cached by it
        f"{tiny_run} --policy={os.getcwd()}/policy --lora_rank={rank} --recompute={recompute}"
        f" --lean={is_lean}"
        " --gpus=1 --rules=rules.py --dtype=bfloat16 --micro_tokens=1024 --max_prompt_tokens=64"
        " --max_new_tokens=64"
    )
    cfg = mogrpo.parse(memory.Config, flags.split(), "")
    monkeypatch.setattr(lean, "SLICE", 2**16)  # the policy is small
    run = mogrpo.setup(cfg, weights=torch.bfloat16 if is_lean else torch.float32)
    if is_lean:
        run.optimizer = lean.Lean(run.policy, cfg)
    run.policy.eos = [-2]  # no response ends early
    ones = torch.ones(16)
    prompts = mogrpo.prompts_of_step(run, 1)
    rollout = partial(mogrpo.rollout, run.policy, prompts, (0, 1), 4, cfg)
    rows = rollout()
    with Watch() as live:
        mogrpo.grpo_update(run, rows, ones, 1)  # from here on AdamW's moments are there
        before = live.now()
        live.peak = 0
        rows = rollout()
        assert live.now() - before < 1e5  # the gathered copy is gone before the update
        sampling = live.peak
        live.peak = 0
        mogrpo.grpo_update(run, rows, ones, 1)

    stages = {stage: sum(lines.values()) for stage, lines in memory.plan(cfg).items()}
    always = stages["always"] - memory.GIB  # without the driver
    most = max(stages["log-probs"], stages["backward pass"])
    planned = [always + stages["sampling"], always + most]
    assert [sampling, live.peak] == approx(planned, rel=0.15)

def test_memory_command(printed):
    config_folder("qwen2", "32000 2048 8192 8 8 2")
    def planned(flags):
        run_main(memory, f"--policy=policy {flags}")
        return printed()
    assert "fits in --gpu_gb=24" in planned("--gpu_gb=24")
    for limit in ("--gpu_gb=15", "--gpu_gb=10", "--gpu_gb=5"):  # each wants another change
        line = refused(lambda: planned(f"--gpus=1 {limit}"), f"do not fit in {limit}; this would: ")
        _, change = line.split("this would: ")
        assert "fits in" in planned(f"--gpus=1 {limit} {change}")
    # Fewer positions than a row has tokens
    transformers.BertConfig(max_position_embeddings=64).save_pretrained("bert")
    def rewards(folders):
        stages = memory.plan(memory.Config(policy="policy", reward_model=folders))
        return stages["always"]["reward models"]
    assert 0 < rewards("bert") == rewards("bert,bert") / 2

@each("choice", "auto True False")
@cases("cuda", [False, True])
def test_recomputation(choice, cuda, world, monkeypatch):
    """What is made again is not kept: no activation is as wide as a block's inner layer."""
    monkeypatch.setattr(mogrpo, "CUDA", cuda)
    policy = mogrpo.shard(mogrpo.load_policy(folder_of()), torch.float32, choice)
    mogrpo.go(policy, fast=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        mogrpo.response_logp(policy, [([5], [7] * 9)], 1.0)
    made_again = 48 not in [x.shape[-1] for x in kept if x.dim() > 1]
    assert made_again == (cuda if choice == "auto" else choice == "True")

def test_a_reward_model_is_recomputed_as_it_was(world):
    """Its blocks must not find keys in a cache from their first run."""
    folder_of("b")
    gradients = []
    for choice in ("False", "True"):
        torch.manual_seed(0)
        model = mogrpo.load_reward_model("b", num_labels=1, id2label={0: "good"})
        mogrpo.shard(model, torch.float32, choice)
        with torch.no_grad():
            model.score.weight.fill_(1.0)
        mogrpo.logits_of(model, PROMPTS).sum().backward()
        gradients.append([p.grad.full_tensor() for p in model.parameters()])
    assert all(map(torch.equal, *gradients))

def test_counted_speed(printed):
    """Weights and cache once, every token once; nothing is waited for but once a room."""
    config = config_folder("qwen2", "512 256 512 3 8 2")
    run_main(speed, "--count --policy=policy --rows=16 --max_prompt_tokens=64 --max_new_tokens=128")
    row = json.loads(printed().splitlines()[0])
    weights = transformers.AutoModelForCausalLM.from_config(config).num_parameters() - 512 * 256
    assert row["floor_gb"] * 1e9 == 2 * (weights + 16 * 128 * 3 * 2 * 64)  # less the embedding
    # 192 columns are read of 64 to 192, as on a GPU
    assert 1 < row["memory_of_floor"] < 1.2 < row["operands_of_floor"]
    assert row["recordings"] == 1
    tokens = 64 + 8 * 127
    assert row["update_floor_tflop"] * 1e12 > 6 * tokens * weights
    assert 1 < row["update_of_floor"] < 1.1 < row["stock_update_of_floor"]
    assert (row["syncs_a_token"], row["syncs_a_room"]) == (0, 1)
    assert row["collectives"] == [4, 4]

# ==================================================================================================
# Whole runs

SMALL = (
    "--prompts_per_step=4 --group_size=4 --max_new_tokens=16 --eval_samples=1 --lr=1e-3 --epochs=2"
)

TORCHRUN = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node"

SCRIPTS = """mogrpo reward_model eval data.toy.prepare data.toy.rate data.judge.prepare
data.helpsteer2.prepare data.saferlhf.prepare data.ultrafeedback.prepare data.diasafety.prepare
data.xstest.prepare data.politeness.prepare data.prompts.prepare data.arithmetic.prepare
ablations.ppo ablations.dpo ablations.lagrangian ablations.steer ablations.gspo ablations.dynamic
ablations.lean ablations.by_tag ablations.league ablations.league_front ablations.league_rules
ablations.league_table ablations.methods bench.memory bench.trl bench.emulate"""

def steps_of(folder="out/mogrpo"):
    """The metrics rows of training steps, without those of evaluations."""
    return [row for row in rows_of(f"{folder}/metrics.jsonl") if "loss" in row]

def saved_weights(folder):
    return load_file(f"{folder}/model.safetensors")

# --------------------------------------------------------------------------------------------------
# The toy world

def test_default_run_improves_every_axis(toy, printed):
    """The README's main command, but a quarter of its steps: learned and true scores rise."""
    run_main(mogrpo, "--steps=20 --out_dir=out/short --dtype=float32")
    text = printed()
    # Every log_interval, the first and the last, in the width of a terminal
    lines = re.findall(r"^ +(\d+) .{80,95}%$", text, re.M)
    assert lines == ["1", "8", "16", "20"] and text.count("  step   reward") == 1
    first, last = [r for r in rows_of("out/short/metrics.jsonl") if "true/safety" in r]
    assert (first["step"], last["step"]) == (0, 20)
    for axis in TRUE_AXES:
        for name in (f"true/{axis}", f"eval/{axis}"):
            assert last[name] > first[name] + 0.05
    row = steps_of("out/short")[0]
    names = """loss reward reward_std conflict kl clip_frac grad_norm entropy length truncated lr
    sampler_gap skipped tok_per_s peak_gb sec/sample sec/score sec/train score/safety std/safety
    zero_std/safety share/safety"""
    assert set(names.split()) <= set(row)
    # eval.py sees the gain, too
    flags = " ".join(f"--{k}={v}" for k, v in evaluation.TOY.items())
    policies = "--policies=base=out/toy/policy,ours=out/short/policy"
    run_main(evaluation, f"{flags} {policies} --eval_samples=2")
    table = read_json("out/eval/eval.json")["table"]["all"]
    for measure in ("politeness", "true/politeness"):
        gain, low, high = table[measure]["ours"]["gain"]
        assert 0.1 < low < gain < high

def few_heldout():
    write_rows("few.jsonl", rows_of("out/toy/heldout_prompts.jsonl")[::32])

FLOORS = "--floors=safety=0.9,politeness=0.2"

@cases("script, flags, stops", [
    ("ablations.lagrangian", FLOORS, (1, 2, 3)),
    ("ablations.ppo", "--critic_lr=1e-3 --critic_warmup=1", (2,)),
    ("ablations.steer", "", (2,)),
    ("ablations.lean", "", (2,)),
])
def test_resume_is_exact_after_a_stop_at_any_step(script, flags, stops, toy, monkeypatch):
    few_heldout()
    script = module(script)
    common = f"{SMALL} --steps=4 --heldout_prompts=few.jsonl --eval_interval=2 --micro_tokens=200"
    common += f" {flags} --out_dir="
    whole = "out/whole"
    run_main(script, f"{common}{whole} --save_interval=0")
    events = [(mogrpo, "pick", {60: signal.SIGTERM}),  # in a rollout or an evaluation
              (mogrpo, "response_logp", {19: signal.SIGINT})]  # in the second update
    for n in stops:  # in the first of a step's two updates
        optimizer = getattr(script, "Lean", torch.optim.AdamW)
        events.append((optimizer, "step", {2 * n - 1: signal.SIGINT}))
    for i, event in enumerate(events):
        cut = f"out/cut{i}"
        with monkeypatch.context() as patch:
            on_calls(patch, *event)
            run_main(script, f"{common}{cut}")
        assert not exists(f"{cut}/policy")
        with open(f"{cut}/metrics.jsonl", "a") as f:  # killed: a step not saved, half a line
            f.write('{"step": 99, "loss": 0}\n{"step": 1')
        run_main(script, f"--out_dir={cut} --resume")
        same_run(whole, cut, within=0)

def test_bfloat16_is_told_of_where_it_is_fast(flags, monkeypatch, printed):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    for dtype, is_told in (("float32", False), ("bfloat16", not mogrpo.CUDA)):
        config = read_json("policy/config.json") | dict(dtype=dtype)
        write_text("policy/config.json", json.dumps(config))
        run_main(mogrpo, flags)
        assert ("would be up to twice as fast" in printed()) == is_told

def test_bfloat16_starts_at_the_reference(toy):
    """The GPU's arithmetic: bfloat16 compute on float32 weights, and a bfloat16 reference."""
    run_main(mogrpo, f"{SMALL} --epochs=1 --steps=1 --dtype=bfloat16")
    [row] = steps_of()
    assert row["kl"] == 0 and row["clip_frac"] == 0  # bit for bit
    assert 0 < row["sampler_gap"] < 0.05

# --------------------------------------------------------------------------------------------------
# Processes and nodes

MANY_FLAGS = (  # 6 prompts do not divide by 4, so some processes have more micro-batches
    "--prompts_per_step=6 --group_size=4 --max_new_tokens=16 --eval_samples=1 --micro_tokens=100"
    " --dtype=float64"
)
TOY_RUN = f"{MANY_FLAGS} --steps=4 --heldout_prompts=few.jsonl --out_dir=out"
TINY_RUN = (
    f"{MANY_FLAGS} --steps=2 --lr=3e-3 --reward_model=rm --prompts=prompts.jsonl"
    " --heldout_prompts=prompts.jsonl --out_dir=out"
)
VARIANTS = "full lora steer ppo dpo".split()

# What must not depend on the number of processes, for which NAME stands: scripts and flags
MANY_RUNS = f"""
ablations.lagrangian {REPLAYED_RUN} --floors=a=0.9,c=0.3 --epochs=2 --micro_tokens=50 --lr=0.03 \
    --out_dir=out/full-NAME
mogrpo {TINY_RUN}/lora-NAME --policy=policy --lora_rank=3 --lr=3e-2 --combine=gdpo --rules=rules.py
ablations.steer {TINY_RUN}/steer-NAME --policy=policy
ablations.ppo {TINY_RUN}/ppo-NAME --policy=policy --critic_lr=1e-3 --epochs=2
ablations.dpo {TINY_RUN}/dpo-NAME --policy=policy --epochs=2
reward_model --ratings=r.jsonl --heldout_ratings=h.jsonl --backbone=policy --lr=1e-3 \
    --batch_size=15 --epochs=1 --dtype=float64 --out_dir=out/rm-NAME
reward_model --score=h.jsonl --reward_model=rm --dtype=float64 --out=out/rm-NAME/samples.jsonl
eval --policies=a=policy,b=untied --reward_model=rm --prompts=prompts.jsonl --max_new_tokens=8 \
    --dtype=float64 --out_dir=out/eval-NAME
mogrpo {TOY_RUN}/cut --resume
"""

def work(rank, count, node, name):
    """One of `count` processes, `node` of them on each machine, for all runs."""
    os.environ.update(LOCAL_WORLD_SIZE=str(node))
    store = f"file://{os.getcwd()}/{name}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=count)
    # One group for all runs
    dist.init_process_group = dist.destroy_process_group = lambda *args, **kwargs: None
    mogrpo.RANK = rank
    mogrpo.IS_FIRST = rank == 0
    rm.MICRO_TOKENS = 60 // count  # other micro-batches of ratings
    for line in MANY_RUNS.replace("NAME", name).strip().splitlines():
        script, _, flags = line.partition(" ")
        if "--resume" in flags and rank == 0 and name != "2x2":  # of one process only
            on_calls(pytest.MonkeyPatch(), torch.optim.AdamW, "step", {1: signal.SIGINT})
        if name == "2":  # the first
            flags = flags.replace("--resume", "")
        run_main(module(script), flags)
        dist.barrier()  # as at the end of a program: the first may still be writing
    os._exit(0)

def test_any_number_of_processes_and_nodes_gives_the_same_run(tiny_run, toy, monkeypatch):
    """1, 2, 4 and 2 nodes x 2 gloo processes (HSDP): same samples, metrics, weights; for a reward
    model, its scores and eval.py; and a run stopped at each step that goes on with others."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    multiprocessing.set_forkserver_preload([__name__, *SCRIPTS.split()])  # torch is imported once
    few_heldout()
    run_main(mogrpo, f"{TOY_RUN}/whole")
    make_replayed("qwen3")
    folder_of("untied", tied=False)
    ratings_file("r.jsonl", 70)
    ratings_file("h.jsonl", 20)
    for name, count, node in (("2", 2, 2), ("1", 1, 1), ("4", 4, 4), ("2x2", 4, 2)):
        torch.multiprocessing.start_processes(
            work, (count, node, name), count, start_method="forkserver")
    same_run("out/whole", "out/cut")
    for n in ("2", "4", "2x2"):
        for variant in VARIANTS:
            same_run(f"out/{variant}-1", f"out/{variant}-{n}")
        same_weights("out/rm-1", f"out/rm-{n}")
        same_samples("out/rm-1", f"out/rm-{n}")
        same_samples("out/eval-1", f"out/eval-{n}")
    replay("out/full-2", "ablations.lagrangian")
    # They did train; LoRA left all but its layers alone
    for variant, start, part in (("full", "replayed", ""), ("lora", "policy", "proj")):
        stock = stock_model(start).state_dict()
        end = saved_weights(f"out/{variant}-4/policy")
        moved = {name for name, w in end.items() if not torch.equal(w, stock[name])}
        assert moved == {name for name in end if part in name}
    assert exists("out/lora-4/adapter/adapter_config.json")

def same_weights(one, other, within=1e-5):
    found = saved_weights(other)
    for name, weight in saved_weights(one).items():
        assert (weight - found[name]).norm() <= within * weight.norm(), name

def known(numbers):
    return {name: x for name, x in numbers.items() if x is not None}

def same_samples(one, other, within=1e-5):
    """In the files of training they stand process after process."""
    def place(row):
        return [row.get(key) for key in ("step", "heldout", "index")]
    files = [sorted(rows_of(f"{folder}/samples.jsonl"), key=place) for folder in (one, other)]
    for a, b in zip(*files, strict=True):
        assert known(a.pop("scores")) == approx(known(b.pop("scores")), rel=0, abs=within)
        assert a == b

def same_run(one, other, within=1e-5):
    """Samples are equal, metrics and policies nearly."""
    same_samples(one, other, within)
    for a, b in zip(metrics_of(one), metrics_of(other), strict=True):
        assert known(a) == approx(known(b), rel=within, abs=within / 100), other
    same_weights(f"{one}/policy", f"{other}/policy", within)

def test_one_file_is_enough(tiny_run):
    """mogrpo.py alone beside rules and prompts, by torchrun with two processes."""
    shutil.copy(f"{HERE}/mogrpo.py", "mogrpo.py")
    command = f"{TORCHRUN}=2 mogrpo.py {tiny_run} --rules=rules.py --steps=2"
    printed = subprocess.check_output(command.split(), text=True)
    assert printed.count("saved in out/mogrpo") == 1
    assert len(steps_of()) == 2
    stock_model("out/mogrpo/policy")

def shares_of(scores_PGK, parts_PGK):
    """share/<axis> of two axes of weight 1, in percent."""
    run = SimpleNamespace(cfg=CFG, axes=["x", "y"], weights_K=torch.ones(2))
    metrics = mogrpo.group_metrics(run, scores_PGK, parts_PGK)
    return [100 * metrics[f"share/{axis}"] for axis in run.axes]

def test_readme_computes_its_group_worked_through():
    """Part 3. The commands of the READMEs are run by .ci/run."""
    text = Path(f"{HERE}/README.md").read_text()
    lines = re.findall(r"^\| [1-4] \|([-+.\d |]+)\|$", text, re.M)
    rows = tensor([[float(cell) for cell in cells.split("|")] for cells in lines])
    assert_close(rows[:, 2], rows[:, :2].sum(1))
    for column, combine in ((3, "sum"), (4, "gdpo"), (5, "lagrangian")):
        parts = run_with(combine, [0.0, 1.0])(rows[None, :, :2], torch.ones(2), CFG)
        assert_close(rows[:, column], parts[0].sum(-1), atol=0.005, rtol=0)
    scores_PGK = rows[None, :, :2]
    share_K = shares_of(scores_PGK, mogrpo.combine_sum(scores_PGK, torch.ones(2), CFG))
    assert "has a share of {:.0f} %, safety of {:.0f} %.".format(*share_K) in text

def test_readme_computes_its_step_in_numbers():
    """Part 4: two prompts with two answers each, and the figures below the table."""
    text = Path(f"{HERE}/README.md").read_text()
    lines = re.findall(r"^\| [12][ab] \|(.*)\|$", text, re.M)
    rows = tensor([[float(x) for x in re.findall(r"[-+.\d]+", line)] for line in lines])
    lengths, scores, parts, advantage, share, slope = rows.split([1, 2, 2, 1, 1, 1], 1)
    cfg = mogrpo.Config(beta=0.16)
    parts_PGK = mogrpo.without_ties(
        mogrpo.combine_sum(scores.view(2, 2, 2), torch.ones(2), cfg))
    lengths = lengths[:, 0].long()
    shares_B = mogrpo.token_shares(lengths, dict(responses=4, tokens=16), cfg)
    near = partial(assert_close, atol=1e-6, rtol=0)
    near(parts_PGK.flatten(0, 1), parts)
    near(parts_PGK.sum(-1).flatten(), advantage[:, 0])
    near(shares_B, share[:, 0])

    def loss_and_slopes(rho=1.0, log_ratio=0.0):
        """The loss, and its gradient at the first token of each answer."""
        old_logp_N = torch.full((16,), -1.0)
        logp_N = (old_logp_N + math.log(rho)).requires_grad_()
        batch = SimpleNamespace(
            advantage_N=advantage[:, 0].repeat_interleave(lengths), old_logp_N=old_logp_N,
            token_share_N=shares_B.repeat_interleave(lengths), c_N=1.0,
            ref_logp_N=logp_N.detach() - log_ratio)
        loss, _ = mogrpo.objective(batch, logp_N, cfg)
        loss.backward()
        return loss.item(), logp_N.grad[lengths.cumsum(0) - lengths]

    loss, slopes_B = loss_and_slopes()
    near(slopes_B, slope[:, 0])
    assert f"The loss is {abs(loss):.2f}:" in text
    _, slopes_B = loss_and_slopes(log_ratio=math.log(2))
    assert f"(1 - 0.16 x 0.69) = {slopes_B[0]:.4f}`" in text
    _, slopes_B = loss_and_slopes(rho=1.5, log_ratio=math.log(2))
    assert f"0.16 x 1.5 x 0.69 = {slopes_B[0]:+.4f}`" in text
    share_K = shares_of(scores.view(2, 2, 2), parts_PGK)
    assert "has a share of {:.0f} %, safety of {:.0f} %:".format(*share_K) in text

@cases("page, blocks", [("data", 1), ("ablations", 1)])
def test_readme_prints_what_its_python_prints(page, blocks, printed):
    text = Path(f"{HERE}/{page}/README.md").read_text()
    found = re.findall(r"```python\n(.*?)```\n(?:\n```\n(.*?)```)?", text, re.S)
    assert len(found) == blocks
    for block, result in found:
        exec(block, {})
        assert printed() == result

# --------------------------------------------------------------------------------------------------
# What goes wrong

def test_bad_gradients_are_skipped_and_ten_stop_the_run(flags, monkeypatch):
    real, calls = mogrpo.objective, []
    def poisoned(*args):
        loss, logged = real(*args)
        calls.append(1)
        return loss * (1 if len(calls) in (1, 3) else nan), logged
    monkeypatch.setattr(mogrpo, "objective", poisoned)
    refused_run(f"{flags} --steps=30", "ten", "in a row", "step 12 is saved")
    rows = steps_of()
    assert [r["skipped"] for r in rows] == [0, 1, *range(1, 11)]
    assert [r["loss"] for r in rows].count(None) == 10

# Under a script and its flags a line spoils a file (NAME < text) or a config (NAME + JSON), adds
# flags, or both, and names what the one line on stderr must hold
BAD_INPUT = r"""
[mogrpo] FLAGS
--group_size=1                 | --group_size=1 least 2
--group_size=-3                | --group_size=-3
--lr=fast                      | --lr fast
--lr=nan                       | --lr=nan
--lr=inf                       | --lr=inf
--lr=1e30                      | --lr=1e+30
--lr=0                         | --lr=0
--steps=2.5                    | --steps 2.5
--steps=0                      | --steps=0
--steps=                       | --steps
--steps                        | --steps expected
--seed=1234567890123456789012345 | --seed=1234567890123456789012345
--seed=-1                      | --seed=-1
--grup_size=4                  | --grup_size=4
--seed=0 stray                 | stray
--temperature=0                | --temperature=0
--temperature=1e-30            | --temperature=1e-30
--temperature=-1               | --temperature=-1
--epochs=0                     | --epochs=0
--grad_clip=0                  | --grad_clip=0
--micro_tokens=0               | --micro_tokens=0
--sample_rows=-8               | --sample_rows=-8
--lora_rank=-1                 | --lora_rank=-1
--lora_alpha=0                 | --lora_alpha=0
--std_floor=0                  | --std_floor=0
--eval_samples=0               | --eval_samples=0
--beta=-0.1                    | --beta=-0.1
--dtype=int8                   | --dtype int8 bfloat16
--hsdp=perhaps                 | --hsdp
--weights=good=nan             | --weights good=nan
--weights=good                 | --weights good
--weights=good=-1              | --weights good=-1
--weights=good=1e39            | --weights good=1e39
--weights=good=1,good=2        | --weights good=2 once
--weights==1                   | --weights '' good, kind
--weights=good=1,              | --weights
--weights=,                    | --weights
--weights=nice=1               | nice good, kind
--weights=good=0,kind=0        | --weights 0
--combine=product              | --combine product sum
--loss_norm=x                  | --loss_norm x sequence
--resume                       | --resume out/mogrpo/config.json
--resume=maybe                 | --resume
--out_dir=                     | --out_dir
--prompts=                     | --prompts
--prompts=none.jsonl           | none.jsonl No such file
--prompts=rm                   | rm directory
--policy=no/where/here         | no/where/here such folder
--policy=nowhere               | nowhere such folder
--policy=                      | such folder
--reward_model=nowhere         | nowhere such folder
--reward_model=policy          | policy: id2label
--reward_model=rm,rm           | axes good kind
--reward_model=                | --rules
--reward_model=rm,             | such folder
--rules=none.py                | none.py
--rules=policy                 | policy
--truth=none.py                | none.py
--prompts_per_step=13          | prompts_per_step=13
--max_prompt_tokens=2          | (0 prompts
--max_new_tokens=40000         | (0 prompts
prompts.jsonl <                | prompts.jsonl empty
prompts.jsonl < {"prompt": "w1"}\n{oops | prompts.jsonl:2 broken JSON
prompts.jsonl < [1]            | prompts.jsonl:1 object
prompts.jsonl < {} {}          | prompts.jsonl:1 broken
prompts.jsonl < {"text": "x"}  | prompts.jsonl:1 prompt
prompts.jsonl < \n{"prompt": "  "} | prompts.jsonl:2 empty
prompts.jsonl < {"prompt": 3}  | prompts.jsonl:1
prompts.jsonl < {"prompt": null} | prompts.jsonl:1
prompts.jsonl < {"messages": []} | prompts.jsonl:1
prompts.jsonl < {"messages": {"role": "user"}} | prompts.jsonl:1
prompts.jsonl < {"messages": [{"role": "assistant", "content": "w"}]} | prompts.jsonl:1 assistant
prompts.jsonl < {"messages": [{"role": "tool", "content": "w"}]} | prompts.jsonl:1 role user
prompts.jsonl < {"messages": [{"role": "user"}]} | prompts.jsonl:1
prompts.jsonl < {"prompt": "\ud800"} | prompts.jsonl:1
prompts.jsonl < {"prompt": DEEP} | prompts.jsonl:1
prompts.jsonl < {"prompt": 1DIGITS} | prompts.jsonl:1
broken.jsonl.gz < no gzip @ --prompts=broken.jsonl.gz | broken.jsonl.gz
policy/config.json + {"hidden_size": 64}    | policy: embed_tokens.weight
policy/config.json + {"num_hidden_layers": 3} | policy: layers.2.
policy/config.json + {"num_hidden_layers": 1} | policy: layers.1.
policy/config.json + {"max_position_embeddings": 9} | (0 prompts
policy/config.json + {"vocab_size": 50}     | policy: embed_tokens.weight
policy/config.json + {"model_type": "zebra"} | policy: zebra
policy/config.json < []                     | policy:
policy/tokenizer.json < {}                  | policy:
policy/model.safetensors < x                | policy:
policy/chat_template.jinja < {{ '' }}       | (0 prompts
policy/chat_template.jinja < {{ oops(       | template
rm/config.json + {"id2label": null}         | id2label
rm/config.json + {"id2label": {"0": 1, "1": 2}} | rm:
rm/config.json + {"id2label": {"0": "a", "1": "a"}} | rm: names
rm/config.json + {"id2label": {"0": "a,b", "1": "c"}} | rm: names
rm/config.json + {"id2label": {"0": "a=b", "1": "c"}} | rm: names
rm/config.json + {"id2label": {"0": "", "1": "c"}} | rm: names
rm/config.json + {"id2label": {"x": "a"}}   | rm:
bad.py < SCORES 1 / 0                              @ --rules=bad.py | bad.py division
bad.py < SCORES 1 / 0 if response else {'a': 1}    @ --rules=bad.py | bad.py division
bad.py < SCORES {'a': 1} if response else {'a': 1, 'b': 1} @ --rules=bad.py | bad.py axes
bad.py < SCORES {'b': 1} if response else {'a': 1} @ --rules=bad.py | bad.py axes
bad.py < SCORES {'a': 'high' if response else 1}   @ --rules=bad.py | bad.py high
bad.py < SCORES [1, 2]                             @ --rules=bad.py | bad.py names
bad.py < SCORES {'a,b': 1}                         @ --rules=bad.py | bad.py names
bad.py < SCORES {'good': 1}                        @ --rules=bad.py | axes good
bad.py < SCORES {'kind': 1}                        @ --rules=bad.py | axes kind
bad.py < SCORES {}                                 @ --reward_model= --rules=bad.py | there is no
empty.py.txt < score = 1                    @ --rules=empty.py.txt | empty.py.txt
empty.py.txt < score = 1                    @ --rules=rules.py --truth=empty.py.txt | empty.py.txt
bad.py < SCORES {'a': 1                            @ --rules=bad.py | bad.py
[reward_model] --ratings=r.jsonl --backbone=policy --out_dir=out/rm
--scale=1,0                    | --scale=1,0
--scale=a,b                    | --scale=a,b
--loss=x                       | --loss x mse
--dtype=x                      | --dtype x
--epochs=0                     | --epochs=0
--lr=-1                        | --lr=-1
--lr=nan                       | --lr=nan
--batch_size=0                 | --batch_size=0
--save_interval=0              | --save_interval=0
--axes=nice                    | nice
--axes=,                       | --axes
--axes=a=b                     | --axes
--out_dir=                     | --out_dir
--ratings=none.jsonl           | none.jsonl
--backbone=none                | none such folder
r.jsonl < {"prompt": "w1", "scores": {"good": 1}} | r.jsonl:1 response
r.jsonl < {"prompt": "w1", "response": "w2"}      | no row has a score
r.jsonl < {"prompt": "w1", "response": "w2", "scores": {"good": null}} | no row has a score
r.jsonl < {"prompt": "w1", "response": "w2", "scores": {"good": 1.5}}  | r.jsonl:1 good=1.5 0 to 1
r.jsonl < {"prompt": "w1", "response": "w2", "scores": {"good": "x"}}  | r.jsonl:1 good=x
r.jsonl < {"prompt": "w1", "response": "w2", "scores": {"good": true}} | r.jsonl:1 good=True
r.jsonl < {"prompt": "w1", "response": "w2", "scores": {"good": NaN}}  | r.jsonl:1 good=nan
r.jsonl < {"prompt": "w1", "response": "w2", "scores": {"good": 1DIGITS}} | r.jsonl:1
r.jsonl < {"prompt": "w1", "response": "w2", "scores": {"a,b": 1}}     | r.jsonl a,b names
r.jsonl < {"prompt": "w1", "response": "w2", "scores": {"": 1}}        | r.jsonl names
r.jsonl < {"prompt": "w1", "response": "w2", "scores": [1]}            | r.jsonl:1 scores
r.jsonl < {"prompt": "w1", "response": "w2", "scores": {"good": 1}}    | too few
--score=none.jsonl             | none.jsonl
--score=r.jsonl --out=/dev/null   | --out=/dev/null
--score=r.jsonl --out=r.jsonl     | --out=r.jsonl
--score=r.jsonl --out=./rm/../r.jsonl | --out=./rm/../r.jsonl
--score=r.jsonl --out=rm          | --out=rm
--score=r.jsonl --out=no/where    | --out=no/where
--score=r.jsonl --reward_model=no | no such folder
[eval] --policies=one=policy,two=policy --prompts=prompts.jsonl --reward_model=rm
--policies=one                 | --policies=one name=folder
--policies=one=policy,one=x    | two policies
--eval_samples=0               | --eval_samples
--blind=2 --policies=one=policy | two policies
--temperature=-1               | --temperature=-1
--dtype=x                      | --dtype x
--prompts=none.jsonl           | none.jsonl
--prompts=                     | --prompts
--reward_model=policy          | policy
--max_prompt_tokens=1          | prompt
[data.judge.prepare] --judge=policy --samples=r.jsonl --out=rated.jsonl
--samples=                     | --samples
--samples=none.jsonl           | none.jsonl
--judge=none                   | none such folder
--out=/dev/null                | --out=/dev/null
--out=r.jsonl                  | --out=r.jsonl
--rubrics=none.json            | none.json
rubrics.json < {"a": DEEP}     @ --rubrics=rubrics.json | rubrics.json
rubrics.json < {"a": 1}        @ --rubrics=rubrics.json | rubrics.json expected
rubrics.json < ["kind"]        @ --rubrics=rubrics.json | rubrics.json expected
[data.prompts.prepare]
seed_tasks.jsonl < {"instruction": "Sort.", "instances": []} @ --raw=seed_tasks.jsonl | .jsonl:1:
[bench.memory] --policy=policy --gpus=1
--gpu_gb=1                     | fit --gpu_gb=1 nor would any change
--policy=no/such/folder        | no/such/folder
--gpus=33                      | --gpus=33 least most --prompts_per_step=32
[bench.speed] --count --policy=policy
--rows=7                       | --rows=7
[ablations.ppo] FLAGS
--gae_lambda=5                 | --gae_lambda=5
--combine=gdpo                 | --combine
--beta=0                       | --beta
[ablations.lagrangian] FLAGS
--floors=                      | --floors
--floors=nice=1                | nice good, kind
--floors=good=7                | --floors good=7
--floors=good=.5,good=.6       | --floors good=.6 once
--combine=gdpo                 | --combine
[ablations.dpo] FLAGS
--combine=gdpo                 | --combine
--beta=0                       | --beta
[ablations.steer] FLAGS
--sweep=nice                   | --sweep=nice good, kind
--picture                      | --sweep
[ablations.methods]
--steps=12                     | --steps=12 multiple
--jobs=0                       | --jobs
"""

def bad_lines():
    for line in BAD_INPUT.strip().splitlines():
        if line.startswith("["):
            script, _, base = line.partition(" ")
        else:
            yield script.strip("[]"), base, line

def everything():
    """What stands in the working folder: names and contents."""
    files = [path for path in Path().rglob("*") if path.is_file()]
    return {str(path): path.read_bytes() for path in files}

@cases("script, base, line", list(bad_lines()))
def test_bad_input(flags, script, base, line):
    """One line that names the place, exit status 2, and nothing on disk is changed."""
    ratings_file("r.jsonl", 40)
    line = line.replace("SCORES", "def scores(record, response): return")
    spoil, parts = line.replace("DIGITS", "0" * 5000).rsplit(" | ", 1)
    spoil = spoil.strip().replace("DEEP", "[" * 10**5)
    typed = spoil
    if not spoil.startswith("--"):
        spoil, _, typed = spoil.partition(" @ ")
        name, added, text = spoil.partition(" + ")
        if added:
            text = json.dumps(read_json(name) | json.loads(text))
        else:
            name, _, text = spoil.partition(" <")
            text = text.strip(" ").replace("\\n", "\n")
        write_text(name, text)
    before = everything()
    base = base.replace("FLAGS", flags)
    refused_run(f"{base} {typed}", *parts.split(), script=module(script))
    assert before.items() <= everything().items()
    assert "if response" in line or not exists("out")

@cases("folder, name, part", table("""
rm | score.weight | no response has a score on any axis
policy | model.norm.weight | broken weights
"""))
def test_weights_that_are_not_finite(flags, folder, name, part):
    weights = saved_weights(folder)
    weights[name][:] = nan
    save_file(weights, f"{folder}/model.safetensors", metadata={"format": "pt"})
    refused_run(flags, part)
    assert not exists("out/mogrpo/policy")

def test_reward_training_that_diverges():
    folder_of("b")
    ratings_file("r.jsonl")
    refused(lambda: train_rm("--lr=1e11 --head_lr=1e11"), "not finite")
    assert not exists("rm/model.safetensors")

# --------------------------------------------------------------------------------------------------
# What real folders bring: each a public report, whose number stands with it

def char_tokenizer(scheme):
    """A character is a token, a space is put before all texts ("always"), the "first" piece or
    "never", and five tokens are special."""
    words = "<pad> <unk> <end> <user> <assistant>".split()
    letters = "abcdefghijklmnopqrstuvwxyz<>/`?|\n\u2581"
    core = Tokenizer(models.BPE({w: i for i, w in enumerate([*words, *letters])}, [],
                                unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    core.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="<end>",
        additional_special_tokens=words[3:], chat_template=CHAT)

def ready(tokenizer, path="ready"):
    """As mogrpo loads it."""
    folder_of(path, tokenizer=tokenizer)
    return mogrpo.load_policy(path).tokenizer

@each("scheme", "always first never")
def test_special_tokens_spelled_out_are_text(scheme):
    """llama.cpp#26273. For policy, reward model and judge alike: nothing is lost, no turn ends."""
    tokenizer = ready(char_tokenizer(scheme))
    texts = ("plain text", "what does `cat <end>` do?", "<user>a</user> <end>", "a <end>\n<pad>")
    for text in texts:
        for response in (None, text):
            ids = mogrpo.render(tokenizer, [turn(text)], response)
            plain = mogrpo.render(tokenizer, [turn("a")], response and "a")
            special = set(tokenizer.all_special_ids)
            assert [i for i in ids if i in special] == [i for i in plain if i in special]
            assert text in tokenizer.decode(ids)
            turns = [turn(text)] if response is None else [turn(text), turn(text, "assistant")]
            if text == "plain text":
                stock = tokenizer.apply_chat_template(turns, add_generation_prompt=response is None)
                assert ids == stock["input_ids"]

def test_prompts_that_hold_a_template_are_told(flags, printed):
    write_rows("prompts.jsonl", [dict(prompt="w1"), dict(prompt="<user> w1 <end>")] * 4)
    run_main(mogrpo, f"{flags.replace('=rules.py', '=')} --reward_model=rm")
    assert "4 prompts spell out special tokens" in printed()

@cases("special", (True, False))
def test_a_turn_ends_where_its_template_ends_it(special, world, printed):
    """open-r1#604, axolotl#2073, vllm#4180: neither config names the token."""
    tokenizer = tiny_tokenizer(template=CHAT.replace("<end>", "w7"))
    tokenizer.add_tokens([AddedToken("w7", special=special)])
    folder_of(tokenizer=tokenizer)
    policy = mogrpo.load_policy("policy")
    assert policy.eos == [2, 12] and "'w7'" in printed()  # 12: its number
    mogrpo.save_folder(mogrpo.shard(policy, torch.float32), "saved", torch.float32)
    assert stock_model("saved").generation_config.eos_token_id == [2, 12]

def test_a_prompt_is_not_closed(world):
    """gorilla#1217: a tokenizer that puts an end token behind every text; llama.cpp#13099: and two
    before it."""
    tokenizer = tiny_tokenizer(template=None)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="w0 w3 $A <end>", special_tokens=[("w0", 5), ("w3", 8), ("<end>", 2)])
    tokenizer = ready(tokenizer)
    assert mogrpo.render(tokenizer, [turn("w1")]) == [5, 8, 6]
    assert mogrpo.render(tokenizer, [turn("w1")], "w2") == [5, 8, 6, 7, 2]

def test_two_weights_where_the_config_ties_them(flags):
    """transformers#42612"""
    weights = saved_weights("policy")
    save_file(weights | {"lm_head.weight": torch.randn(64, 32)}, "policy/model.safetensors",
              metadata={"format": "pt"})
    refused_run(flags, "policy", "tie_word_embeddings")

def test_a_token_beyond_the_embedding(flags):
    """LLaVA#94"""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["w99"])
    tokenizer.save_pretrained("policy")
    run_main(mogrpo, flags)  # no text has it
    write_rows("prompts.jsonl", [dict(prompt="w1 w99", answer="", tag="odd")] * 12)
    refused_run(flags, "policy", "'w99'", "embedding")

def test_longrope_only_to_its_original_length(world):
    """vllm#27431: past it all positions would have other frequencies."""
    rope = dict(rope_type="longrope", short_factor=[1.0] * 4, long_factor=[4.0] * 4, factor=4.0,
                original_max_position_embeddings=64, rope_theta=10000.0)
    folder_of(kind="phi3", rope_parameters=rope, max_position_embeddings=256,
              original_max_position_embeddings=64)
    assert mogrpo.positions_of(mogrpo.load_policy("policy")) == 64

@cases("lr, kept", ((1e-5, "float32"), (1e-2, "bfloat16")))
def test_the_saved_policy_is_the_trained_one(flags, lr, kept, printed):
    """musubi-tuner#967: of small steps nothing would be left in bfloat16."""
    stock_model("policy", dtype=torch.bfloat16).save_pretrained("policy")
    run_main(mogrpo, f"{flags} --lr={lr} --warmup=0")
    assert read_json("out/mogrpo/policy/config.json")["dtype"] == kept
    assert ("saved in float32" in printed()) == (kept == "float32")

def test_share_kept():
    before = {"w": tensor([1.0, 1.0])}
    after = {"w": tensor([1.0 + 2**-9, 1.5])}  # a step that bfloat16 does not have, one that it has
    share = mogrpo.share_kept(before, after, torch.bfloat16)
    assert share == approx(0.25 / (0.25 + 2**-18))
    assert mogrpo.share_kept(before, {"w": tensor([1.0, 1.0 + 2**-9])}, torch.bfloat16) == 0

@cases("kind, other, old_names", [
    ("llama", dict(rope_theta=5e5), dict(rope_theta=5e5, rope_scaling=None)),
    ("llama", dict(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=7e4)),
     dict(rope_theta=7e4, rope_scaling=dict(rope_type="linear", factor=2.0, rope_theta=7e4))),
    ("gemma3_text", {}, dict(rope_theta=1e6, rope_local_base_freq=1e4)),
    ("phi", dict(rope_parameters=dict(rope_type="default", rope_theta=7e4,
                                      partial_rotary_factor=0.5)),  # vllm#29966
     dict(rope_theta=7e4, partial_rotary_factor=0.5)),
    ("gpt2", {}, {}),
])
def test_older_libraries_read_the_same_frequencies(kind, other, old_names, world):
    """MarinFold#184: transformers 4.57 would take 10,000."""
    policy = policy_of(folder_of(kind=kind, **other))
    mogrpo.save_folder(policy, "saved", torch.float32)
    config = read_json("saved/config.json")
    assert config == config | old_names
    words = read_json("saved/tokenizer_config.json")  # transformers#47553
    assert words["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(words.get("extra_special_tokens"), list)
    ids = tensor([[*range(5, 30)]])
    equal(stock_model("saved")(ids).logits, stock_model("policy")(ids).logits)

def test_templates_tell_the_day_of_the_start(flags):
    """open-unlearning#98"""
    dated = CHAT + "{{ strftime_now('w%d') }} "
    tiny_tokenizer(template=dated).save_pretrained("policy")
    run_main(mogrpo, f"{flags} --day=2024-05-12")
    assert read_json("out/mogrpo/config.json")["day"] == "2024-05-12"
    cfg = mogrpo.Config(resume=True, day="2024-05-12")
    tokenizer = mogrpo.load_policy("policy", cfg.day).tokenizer
    assert mogrpo.render(tokenizer, [turn("w1")])[-1] == 5 + 12
    folder_of("b", tokenizer=tiny_tokenizer(template=dated))
    ratings_file("r.jsonl")
    train_rm("--epochs=1 --day=2024-05-12")
    tokenizer = mogrpo.load_reward_model("rm", day="2020-01-01").tokenizer
    assert mogrpo.render(tokenizer, [turn("w1")])[-1] == 5 + 12
    refused_run(f"{flags} --day=tomorrow", "--day=tomorrow")
    refused(lambda: train_rm("--day=tomorrow"), "--day=tomorrow")

def test_resumed_with_other_prompts(flags):
    run_main(mogrpo, flags)
    write_rows("prompts.jsonl", rows_of("prompts.jsonl")[1:] * 2)
    refused_run("--resume --steps=2", "other prompts")
    refused_run("--resume --out_dir=out/mogrpx", "out/mogrpx")

def test_the_likeliest_token_is_the_first_of_equals(world):
    """In bfloat16 ties are common."""
    folder_of()
    policy = policy_of("policy", torch.bfloat16)
    with torch.no_grad():
        policy.get_output_embeddings().weight.fill_(0.0)  # all are alike
    cfg = evaluation.Config(policies="a=policy", prompts="p", temperature=0, max_new_tokens=3)
    prompt = dict(ids=[5, 6], index=0)
    [row] = mogrpo.rollout(policy, [prompt], (0, 0), 1, cfg)
    assert row["response"] == [0, 0, 0]

@each("spoil", "lost renamed resized")
def test_a_head_that_is_not_there(flags, spoil):
    """trl#368, OpenRLHF#1342: it would score at random."""
    weights = saved_weights("rm")
    head = weights.pop("score.weight")
    if spoil == "renamed":
        weights["v_head.weight"] = head
    if spoil == "resized":
        weights["score.weight"] = head[:1]
    save_file(weights, "rm/model.safetensors", metadata={"format": "pt"})
    refused_run(f"{flags} --reward_model=rm", "rm", "score.weight")

@cases("pad_token_id", (None, 0, 9, -1))  # -1: transformers#25773
@each("kind", "llama qwen3 gpt2")
def test_scores_are_the_stock_ones(kind, pad_token_id):
    """transformers#35352: texts that end in the end token, each alone by the library, and all
    together by ours. A pad token of the folder's own is kept, though a text may hold it."""
    auto = transformers.AutoModelForSequenceClassification
    folder_of("rm", kind, tiny_tokenizer("<end>"), auto=auto, id2label={0: "good", 1: "kind"})
    change_config("rm", pad_token_id=pad_token_id)
    texts = [([turn("w1 " * n)], "w4 w2") for n in (1, 5, 3)]
    model = loaded("rm")
    stock = auto.from_pretrained("rm", pad_token_id=None if pad_token_id == -1 else pad_token_id)
    expected = [stock(tensor([mogrpo.render(model.tokenizer, *text)])).logits for text in texts]
    assert max_gap(mogrpo.score(model, texts), torch.cat(expected).sigmoid()) < 1e-5

@cases("problem, activation", [
    ("single_label_classification", lambda logits: logits.softmax(-1)),
    ("regression", lambda logits: logits),
    ("multi_label_classification", torch.sigmoid),
    (None, torch.sigmoid),
])
def test_activations(problem, activation, printed):
    """trl#117"""
    reward_folder("rm", ("safe", "unsafe"))
    change_config("rm", problem_type=problem)
    text = [turn("w1")], "w2"
    model = loaded("rm")
    logits = transformers.AutoModelForSequenceClassification.from_pretrained("rm")(
        tensor([mogrpo.render(model.tokenizer, *text)])).logits
    assert max_gap(mogrpo.score(model, [text]), activation(logits)) < 1e-5
    said = printed()
    assert "more 'unsafe' counts as better" in said
    assert ("no problem_type" in said) == (problem is None)

def test_padding_is_masked_whatever_the_tokenizer_says():
    """transformers#16243"""
    tokenizer = tiny_tokenizer(template=None)
    tokenizer.model_input_names = ["input_ids"]
    auto = transformers.AutoModelForSequenceClassification
    folder_of("rm", "bert", tokenizer, auto=auto, id2label={0: "good"})
    model = loaded("rm")
    texts = [([turn("w1 " * n)], "w4 w2") for n in (1, 5, 3)]
    alone = torch.cat([mogrpo.score(model, [text]) for text in texts])
    assert max_gap(mogrpo.score(model, texts), alone) < 1e-5

@cases("kind, cls, other", [
    ("bert", "AutoModelForMaskedLM", {}),  # laurium#122: no pooler in the file
    ("distilbert", "AutoModelForMaskedLM", dict(dim=32, hidden_dim=48, n_layers=2, n_heads=4)),
    ("deberta-v2", "AutoModelForMaskedLM", {}),
    ("albert", "AutoModelForMaskedLM", dict(embedding_size=32)),
])
def test_a_fresh_head_on_any_encoder(kind, cls, other):
    encoder = tiny_model(kind, auto=getattr(transformers, cls), **other)
    encoder.save_pretrained("b")
    tiny_tokenizer(template=None).save_pretrained("b")
    assert loaded("b", num_labels=1, id2label={0: "good"}).axes == ["good"]

def test_outputs_that_a_training_run_left_on(flags):
    """transformers#29087, #7638"""
    change_config("policy", output_hidden_states=True, output_attentions=True, return_dict=False)
    run_main(mogrpo, flags)
    assert len(steps_of()) == 1

def test_buffers_of_older_versions(world):
    """transformers#24581"""
    folder_of(kind="gpt2")
    old = {"transformer.h.0.attn.bias": torch.zeros(1), "transformer.h.0.attn.masked_bias":
           torch.zeros(1)}
    save_file(saved_weights("policy") | old, "policy/model.safetensors", metadata={"format": "pt"})
    mogrpo.load_weights(mogrpo.load_policy("policy"))

def test_a_routers_buffer_is_not_rounded(world):
    """transformers#42580"""
    other = dict(n_routed_experts=4, moe_intermediate_size=16, kv_lora_rank=8, q_lora_rank=8,
                 qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, n_group=1, topk_group=1,
                 num_experts_per_tok=2, first_k_dense_replace=1)
    model = tiny_model("deepseek_v3", tied=False, **other)
    bias = tensor([0.1235, 1.0005, 2.0012, 3.0034])
    model.to(torch.bfloat16).model.layers[1].mlp.gate.e_score_correction_bias = bias
    model.save_pretrained("policy")
    tiny_tokenizer().save_pretrained("policy")
    policy = mogrpo.shard(mogrpo.load_policy("policy"), torch.float32)
    mogrpo.save_folder(policy, "saved", torch.bfloat16)
    saved = saved_weights("saved")["model.layers.1.mlp.gate.e_score_correction_bias"]
    equal(saved, bias)

def test_marks_of_our_own_in_a_text():
    """They cannot make tokens of a text."""
    tokenizer = ready(char_tokenizer("first"))
    for text in ("\ufdd0 <end>", "\ufdd1<end>\ufdd0<end>"):
        ids = mogrpo.render(tokenizer, [turn(text)])
        assert ids.count(2) == mogrpo.render(tokenizer, [turn("a")]).count(2)

def test_too_long_texts_are_told(printed):
    """reward-bench#137"""
    reward_folder("rm")
    model = loaded("rm", max_tokens=8)
    texts = [([turn("w1")], "w2"), ([turn("w1 " * 9)], "w2"), ([turn("w1")], "w2 " * 12)]
    mogrpo.score(model, texts)
    assert "some texts have more than 8 tokens" in printed()
    rows = mogrpo.encode(model, texts)
    assert [len(row) for row in rows] == [6, 8, 8]
    assert rows[1] == mogrpo.render(model.tokenizer, *texts[1])[-8:]
    encoder_folder("b", "roberta", max_position_embeddings=14)
    encoder = mogrpo.load_reward_model("b", num_labels=1, id2label={0: "good"})
    [row] = mogrpo.encode(encoder, [([turn("w1 " * 30)], "w2")])
    assert len(row) == 14 - 1  # transformers#14243: positions count from behind the pad token, 0

@cases("record, expected", [
    (dict(prompt="a", messages=None), [turn("a")]),  # datasets#7617: null columns
    (dict(prompt=None, messages=[turn("a")]), [turn("a")]),
    (dict(prompt=[turn("s", "developer"), turn("a")]), [turn("s", "system"), turn("a")]),
    (dict(prompt=[turn([dict(type="text", text="a "), dict(type="text", text="b")])]),
     [turn("a b")]),
])
def test_what_a_prompt_may_look_like(record, expected):
    assert mogrpo.conversation("f:1", record) == expected

def test_null_scores_and_tags_that_are_numbers(flags):
    ratings_file("r.jsonl")
    rows = [row | dict(flat=row["scores"]["early"], scores=None) for row in rows_of("r.jsonl")]
    write_rows("null.jsonl", rows)
    assert len(rm.read_ratings("null.jsonl", ["flat"], "0,1")[0]) == len(rows)
    write_rows("prompts.jsonl", [row | dict(tag=i % 2) for i, row in
                                 enumerate(rows_of("prompts.jsonl"))])
    run_main(evaluation, "--policies=a=policy,b=policy --prompts=prompts.jsonl --max_new_tokens=4")
    assert list(read_json("out/eval/eval.json")["table"]) == ["all", "0", "1"]

def test_only_one_policy_is_in_memory(flags, monkeypatch):
    seen = []
    real = evaluation.load_policy
    def load(path):
        gc.collect()
        assert all(ref() is None for ref in seen)
        policy = real(path)
        seen.append(weakref.ref(policy))
        return policy
    monkeypatch.setattr(evaluation, "load_policy", load)
    run_main(evaluation, "--policies=a=policy,b=policy,c=policy --prompts=prompts.jsonl"
                         " --max_new_tokens=4")
    assert len(seen) == 3

def test_a_stray_file_in_a_checkpoint(flags):
    run_main(mogrpo, flags)
    write_text("out/mogrpo/checkpoint/.nfs0001", "")
    run_main(mogrpo, "--resume --steps=2 --out_dir=out/mogrpo")
    assert len(steps_of()) == 2

def test_weights_are_sharded_when_they_are_saved(world):
    """A forward leaves the root's whole, in the dtype of compute."""
    policy = policy_of(folder_of(tied=False), torch.float32)
    named = {name: p for name, p in policy.named_parameters()}
    mogrpo.response_logp(policy, [([5], [6])], 1.0)
    optimizer = mogrpo.make_optimizer(policy, mogrpo.Config())
    saved = mogrpo.trained_tensors(policy, optimizer, 0)
    assert all(saved[name].data_ptr() == p.data_ptr() for name, p in named.items())

def test_an_error_of_one_process_is_told(monkeypatch, capsys):
    monkeypatch.setattr(mogrpo, "IS_FIRST", False)
    monkeypatch.setattr(mogrpo, "RANK", 3)
    monkeypatch.setattr(mogrpo.time, "sleep", lambda seconds: None)
    refused(lambda: mogrpo.die("odd"), "on process 3: odd")
    mogrpo.STOPS.append(signal.SIGTERM)  # of torchrun, which had a reason
    with pytest.raises(SystemExit):
        mogrpo.die("odd")
    assert capsys.readouterr().err == ""

def test_resume_keeps_to_its_flags(flags):
    run_main(mogrpo, f"{flags} --lr=1e-4 --beta=0.5")
    before = everything()
    for name in ("--policy", "--prompts", "--seed", "--lora_rank"):
        refused_run(f"--resume {name}=1", f"{name} was", "cannot be resumed")
        assert everything() == before
    run_main(mogrpo, "--resume --steps=3 --truth=rules.py")  # all else from config.json
    config = "out/mogrpo/config.json"
    changed = dict(steps=3, truth="rules.py", resume=True)
    assert read_json(config) == json.loads(before[config]) | changed
    assert [row["step"] for row in steps_of()] == [1, 2, 3]
    write_text(config, "{")
    refused_run("--resume", "config.json")

def test_trackers(flags, monkeypatch):
    if find_spec("tensorboard"):  # an optional extra
        run_main(mogrpo, f"{flags} --tracker=tensorboard")
        [name] = os.listdir("out/mogrpo/tensorboard")
        assert name.startswith("events")
    logged = []
    wandb = SimpleNamespace(init=lambda **_: None, log=lambda row, step: logged.append((step, row)))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run_main(mogrpo, f"{flags} --tracker=wandb")
    rows = rows_of("out/mogrpo/metrics.jsonl")
    assert logged == [(row["step"], row) for row in rows] and len(rows) == 1
    for name, missing in (("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")):
        monkeypatch.setitem(sys.modules, missing, None)
        refused_run(f"{flags} --tracker={name}", f"pip install {name}")

def test_a_folder_belongs_to_one_run(flags, world):
    mogrpo.lock("out/mogrpo")
    dist.destroy_process_group()
    refused_run(flags, "out/mogrpo: another run writes there", "out/mogrpo.lock")
    assert os.listdir("out") == ["mogrpo.lock"]

def apart(rank):
    """One of two processes whose working folders are not the same."""
    os.makedirs(f"node{rank}", exist_ok=True)
    os.chdir(f"node{rank}")
    dist.init_process_group("gloo", init_method=f"file://{os.getcwd()}/../group", rank=rank,
                            world_size=2)
    mogrpo.IS_FIRST = rank == 0
    with open("../said", "a", buffering=1) as sys.stderr:
        mogrpo.lock("out/run")

@cases("stale", (False, True))
def test_nodes_must_share_the_folder(stale, monkeypatch):
    """Nor does it help that an earlier run has left its lock on the other node."""
    if stale:
        os.makedirs("node1/out")
        write_text("node1/out/run.lock", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    with pytest.raises(torch.multiprocessing.ProcessExitedException) as e:
        torch.multiprocessing.start_processes(apart, (), 2, start_method="forkserver")
    assert e.value.exit_code == 2
    assert Path("said").read_text().count("\n") == 1
    files = ["group", "node0/out/run.lock", "said"]
    if stale:
        files.insert(2, "node1/out/run.lock")
    assert sorted(everything()) == files

def test_prompts_are_read_before_any_weight(flags, monkeypatch):
    monkeypatch.setattr(mogrpo, "load_weights", None)
    mogrpo.write_text("prompts.jsonl", "{")
    refused_run(flags, "prompts.jsonl:1")

def test_frozen_weights_stand_once(world):
    """On one process, where FSDP would gather a copy of all of them; more: sharded again."""
    policy = mogrpo.load_policy(folder_of()).requires_grad_(False)
    mogrpo.shard(policy, torch.float32)
    before = [p.data_ptr() for p in policy.parameters()]
    with mogrpo.gathered(policy):
        assert before == [p.data_ptr() for p in policy.parameters()]
    with mock.patch.object(dist, "get_world_size", lambda: 2):  # as if
        policy = mogrpo.load_policy("policy").requires_grad_(False)
        with mock.patch.object(mogrpo, "load_weights", lambda model: model.to_empty(device="cpu")):
            mogrpo.shard(policy, torch.float32, mesh=dist.init_device_mesh("cpu", (1,)))
    policy(input_ids=tensor([[5]]))  # also the root, which FSDP would keep for a backward pass
    assert all(isinstance(p, dist.tensor.DTensor) for p in policy.parameters())

def test_a_pickle_is_never_read(flags):
    torch.save(saved_weights("policy"), "policy/pytorch_model.bin")
    os.remove("policy/model.safetensors")
    refused_run(flags, "policy: ")
    assert not exists("out")

def test_earlier_runs_are_kept_and_damaged_checkpoints_refused(flags):
    for _ in range(2):
        run_main(mogrpo, flags)
    assert exists("out/mogrpo.1")
    folder = "out/mogrpo/checkpoint"
    piece = f"{folder}/{min(os.listdir(folder))}"
    before = sorted(os.listdir("out/mogrpo"))
    def refuse():
        refused_run(f"{flags} --steps=2 --resume", "checkpoint", "damaged")
        assert sorted(os.listdir("out/mogrpo")) == before
        shutil.copytree("out/mogrpo.1/checkpoint", folder, dirs_exist_ok=True)
    os.truncate(piece, os.path.getsize(piece) - 100)
    refuse()
    os.remove(piece)
    refuse()
    with open(piece, "r+b") as f:
        f.seek(8)  # in the header
        f.write(b"~")
    refuse()
    for text in ("[1]", "{bad", "[" * 10**5, '{"files": {}}'):
        write_text(f"{folder}/state.json", text)
        refuse()

def test_a_crash_while_saving_keeps_a_whole_checkpoint(flags):
    folder = "out/mogrpo/checkpoint"
    run_main(mogrpo, f"{flags} --steps=2 --save_interval=1")
    os.makedirs(f"{folder}.tmp")  # a half-written one
    run_main(mogrpo, f"{flags} --steps=3 --resume")
    shutil.copytree(folder, f"{folder}.tmp")  # a whole one, but the old one is half removed
    os.remove(f"{folder}/state.json")
    run_main(mogrpo, f"{flags} --steps=4 --resume")
    assert [row["step"] for row in steps_of()] == [1, 2, 3, 4]
    assert sorted(os.listdir("out")) == ["mogrpo", "mogrpo.lock"]
    assert not exists(f"{folder}.tmp")

@each("name", SCRIPTS)
def test_command_line_of_every_script(name, monkeypatch, printed):
    def run_as_program(*args):
        monkeypatch.setattr(sys, "argv", [name, *args])
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    with pytest.raises(SystemExit) as e:
        run_as_program("--help")
    text = printed()
    assert e.value.code == 0 and module(name).__doc__ in text
    for field in dataclasses.fields(module(name).Config):
        assert f"    {field.name}: " in text
    refused(lambda: run_as_program("--nonsense=1"), "arguments: --nonsense=1")
