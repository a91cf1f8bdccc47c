"""
pytest -q test_mogrpo.py          # two CPU cores, a few minutes; nothing is downloaded

Every fast path stands against a slow and obvious one that is written here only, in float64 where it matters, on five tiny
architectures; runs on 1, 2 and 4 processes stand against each other. Benchmarks are commands, not tests.
"""
import collections, functools, gzip, importlib.util, json, math, os, shutil, signal, socket, subprocess, sys, weakref

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import eval as evaluation
import mogrpo
import reward_model as rm

HERE = os.path.dirname(os.path.abspath(__file__))
ARCHITECTURES = ["qwen2", "llama", "qwen3", "gemma2", "gpt2"]
CHAT = "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"


# ------------------------------------------------------------------------------------------------------------------------
# Tiny models, folders and runs

def tiny_tokenizer(pad="<pad>", template=CHAT):
    special = ["<pad>", "<unk>", "<end>", "<user>", "<assistant>"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + [f"w{i}" for i in range(59)])}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token=pad, unk_token="<unk>", eos_token="<end>")
    tokenizer.chat_template = template
    return tokenizer

def tiny_model(kind, tied=True, seed=0):
    """A random model of 64 words; weights large enough that its distributions are far from uniform."""
    torch.manual_seed(seed)
    size = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, eos_token_id=2,
                pad_token_id=0, bos_token_id=1, tie_word_embeddings=tied, initializer_range=0.25)
    t = transformers
    if kind == "gpt2":
        return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=128, eos_token_id=2,
                                              bos_token_id=1, initializer_range=0.25)).eval()
    return {"qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**size, num_key_value_heads=2)),
            "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**size, num_key_value_heads=4)),
            "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**size, num_key_value_heads=2, head_dim=8)),
            "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**size, num_key_value_heads=1, head_dim=8, sliding_window=8,
                                                                 final_logit_softcapping=3.0))}[kind]().eval()

def folder_of(path, kind="qwen3", tokenizer=None, **kwargs):  # for a Qwen2 folder AutoTokenizer insists on its own tokenizer
    tiny_model(kind, **kwargs).save_pretrained(path)
    (tokenizer or tiny_tokenizer()).save_pretrained(path)
    return str(path)

@pytest.fixture
def world():
    """A process group of one."""
    yield rm.join_world(alone=True)
    dist.destroy_process_group()

CPU = torch.device("cpu")

def policy_of(path, dtype=torch.float32, lora_rank=0):
    policy = mogrpo.Policy(path, lora_rank, 2.0 * lora_rank)
    policy.to(dtype)
    policy = rm.shard(policy, CPU, dtype, recompute=True)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if name.endswith("lora_B"):  # 0 at the start: the adapter would not show
                p.add_(0.3)
    return policy

@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A folder in which the toy world stands; tests that write go to subfolders of their own."""
    where = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        mogrpo.toy_world()
    return where

def run_main(script, *args):
    script.main(rm.parse(script.Config, args, script.__doc__, script.TOY))
    dist.destroy_process_group()

def rows_of(path):
    return [r for _, r in rm.read_jsonl(path)]

def without_time(rows):
    return [{k: v for k, v in r.items() if not k.startswith("sec/") and k not in ("tok_per_s", "mfu", "peak_gb")} for r in rows]

def refused(capsys, call, *parts):
    """`call` must end with exit status 2 and one line on stderr that holds all `parts`."""
    with pytest.raises(SystemExit) as e:
        call()
    line = capsys.readouterr().err
    assert e.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1, line
    assert all(part in line for part in parts), line


# ------------------------------------------------------------------------------------------------------------------------
# Loading, LoRA, saving, memory

@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_loaded_by_slices_equals_the_library(kind, tied, tmp_path, world, monkeypatch):
    """Weights from several files in bfloat16, rotary frequencies, tying; and back through `save_folder`."""
    model = tiny_model(kind, tied).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "m", max_shard_size="10KB")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    assert len([f for f in os.listdir(tmp_path / "m") if f.endswith(".safetensors")]) > 2
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedModel, "from_pretrained", None)  # the whole model is never read
        whole, policy = rm.fill(mogrpo.Policy(str(tmp_path / "m")), CPU).lm, policy_of(str(tmp_path / "m"))
    head, embedding = whole.get_output_embeddings(), whole.get_input_embeddings()
    assert (head.weight is embedding.weight) == (tied or kind == "gpt2")
    ids = torch.tensor([PROMPTS[1]])
    assert torch.equal(whole(ids).logits, stock(ids).logits)
    for (name, ours), (other, theirs) in zip(rm.tensors(policy.lm).items(), rm.tensors(stock).items(), strict=True):
        assert name == other and torch.equal(ours.full_tensor(), theirs), name
    for ours, theirs in zip(policy.lm.buffers(), stock.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    rm.save_folder(policy.lm, policy.tokenizer, str(tmp_path / "again"), policy.lm.saved_dtype)
    again, first = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f) for f in ("again", "m"))
    assert again.dtype == torch.bfloat16 and torch.equal(again(ids).logits, first(ids).logits)

def test_other_names_and_missing_weights(tmp_path, world, capsys):
    path = folder_of(tmp_path / "gpt2", "gpt2")
    transformers.GPT2LMHeadModel.from_pretrained(path).transformer.save_pretrained(tmp_path / "bare")  # names without "transformer."
    tiny_tokenizer().save_pretrained(tmp_path / "bare")
    stock = transformers.GPT2LMHeadModel.from_pretrained(path)
    assert all(torch.equal(p, q) for p, q in zip(rm.fill(mogrpo.Policy(str(tmp_path / "bare")), CPU).lm.parameters(), stock.parameters()))
    weights = load_file(folder_of(tmp_path / "holes") + "/model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, tmp_path / "holes/model.safetensors", metadata={"format": "pt"})
    refused(capsys, lambda: mogrpo.Policy(str(tmp_path / "holes")), "holes", "layers.1.mlp.up_proj.weight")

def test_lora_off_is_the_base_and_on_is_the_formula(tmp_path, world):
    path = folder_of(tmp_path, tied=False)
    base, policy = policy_of(path), policy_of(path, lora_rank=3)
    groups = [(p, [[9, 8, 7, 2], [5] * 6]) for p in PROMPTS]
    expected, adapted = mogrpo.logp(base, groups, 1.0, CPU), mogrpo.logp(policy, groups, 1.0, CPU)
    policy.adapted = False
    assert torch.equal(mogrpo.logp(policy, groups, 1.0, CPU), expected) and (adapted - expected).abs().max() > 0.1
    policy.adapted = True
    adapted.sum().backward()
    names = {n for n, p in policy.named_parameters() if p.grad is not None}
    linears = [n for n, m in base.lm.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in n]
    assert names == {f"lm.{n}.lora_{x}" for n in linears for x in "AB"} and len(linears) == 14
    stock = transformers.AutoModelForCausalLM.from_pretrained(path)
    for name, m in policy.lm.named_modules():
        if hasattr(m, "lora_A"):
            a, b = m.lora_A.full_tensor().double(), m.lora_B.full_tensor().double()
            assert a.shape == (3, m.in_features) and 0.3 < a.std() * (3 * m.in_features)**0.5 < 3
            stock.get_submodule(name).weight.data += (2.0 * b @ a).float()
    slow = torch.cat([stock(torch.tensor([p + r])).logits[0, len(p) - 1:-1].log_softmax(-1).gather(-1, torch.tensor(r)[:, None])[:, 0]
                      for p, rs in groups for r in rs])
    assert (adapted - slow).abs().max() < 1e-4

def test_adapter_in_peft_and_merged(tmp_path, world):
    """The folders a LoRA run leaves: the merged policy in the stock library, the adapter in PEFT."""
    path = folder_of(tmp_path / "base")
    policy = policy_of(path, lora_rank=4)
    ids = torch.tensor([PROMPTS[1]])
    with mogrpo.gathered(policy):
        expected = policy.lm(ids).logits
    rm.save_folder(policy.lm, policy.tokenizer, str(tmp_path / "policy"), torch.float32)
    mogrpo.save_adapter(policy, str(tmp_path / "adapter"), path)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert (merged(ids).logits - expected).abs().max() < 1e-4 * expected.abs().max()
    peft = pytest.importorskip("peft", reason="the adapter's format is checked where peft is installed")
    adapted = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(path), str(tmp_path / "adapter")).eval()
    assert (adapted(ids).logits - expected).abs().max() < 1e-5 * expected.abs().max()

class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and their most, by following every operation's storages."""
    def __init__(self):
        super().__init__()
        self.held, self.now, self.peak = {}, 0, 0
    def see(self, t):
        t = t.to_local() if hasattr(t, "to_local") else t
        if isinstance(t, torch.Tensor):
            storage = t.untyped_storage()
            if storage._cdata not in self.held:
                weakref.finalize(storage, self.resize, storage._cdata, None)
            self.resize(storage._cdata, storage.nbytes(), new=True)
    def resize(self, key, size, new=False):
        if new or key in self.held:
            self.now += (size or 0) - self.held.pop(key, 0)
            self.held.update({key: size} if size is not None else {})
            self.peak = max(self.peak, self.now)
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves((args, kwargs, out)):
            self.see(t)
        return out

@pytest.mark.parametrize("rank, recompute", [(0, True), (0, False), (16, True)])
def test_memory_plan_is_what_a_step_takes(rank, recompute, tmp_path, monkeypatch):
    """The peaks that --dry_run foretells against the live bytes of real sampling and of a real update, each within 10 %."""
    t, device = transformers, CPU
    torch.manual_seed(0)
    t.LlamaForCausalLM(t.LlamaConfig(vocab_size=8000, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4,
                                     num_key_value_heads=2, eos_token_id=7999)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    cfg = mogrpo.Config(policy=str(tmp_path), dry_run=1, dtype="bfloat16", lora_rank=rank, recompute=recompute, max_prompt_tokens=64,
                        max_new_tokens=64, micro_tokens=1024, group_size=4, prompts_per_step=4, beta=0.0)
    rm.join_world(alone=True)
    policy = rm.shard(mogrpo.Policy(cfg.policy, rank, 32.0), device, torch.bfloat16, recompute)
    policy.eos = [-1]
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    groups = [([i + 3] * 64, [[j] * 64 for j in range(4)]) for i in range(4)]
    def update():
        for half in (groups[:2], groups[2:]):
            mogrpo.logp(policy, half, 1.0, device).mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    update()  # the moments come to be
    live, real = Live(), torch.UntypedStorage.resize_
    monkeypatch.setattr(torch.UntypedStorage, "resize_", lambda s, n: (real(s, n), live.resize(s._cdata, n))[0])  # FSDP frees so
    with live:
        for t in [*policy.parameters(), *policy.buffers(), *(x for s in optimizer.state.values() for x in s.values())]:
            live.see(t.data)
        base = live.now
        with mogrpo.gathered(policy):
            mogrpo.sample(policy, [p for p, _ in groups], mogrpo.uniforms([(i,) for i in range(16)], 64), 1.0, device)
        sampling, live.peak = live.peak, 0
        assert abs(live.now - base) < 1e5  # the gathered copy is gone before the update
        update()
    dist.destroy_process_group()
    plan = [sum(pair[i] for purpose, pair in mogrpo.memory_plan(cfg, 1).items() if "driver" not in purpose) * 2**30 for i in (0, 1)]
    assert [sampling, live.peak] == pytest.approx(plan, rel=0.10)

def test_dry_run(tmp_path, capsys):
    for name, size in (("small", 256), ("large", 2048)):
        t = transformers
        t.Qwen2Config(vocab_size=32000, hidden_size=size, intermediate_size=4 * size, num_hidden_layers=8, num_attention_heads=8,
                      num_key_value_heads=2).save_pretrained(tmp_path / name)
    run = lambda *args: mogrpo.main(rm.parse(mogrpo.Config, args, mogrpo.__doc__, mogrpo.TOY))
    run(f"--policy={tmp_path}/small", "--dry_run=8", "--gpu_gb=24")
    said = capsys.readouterr().out
    assert "GiB on each of 8 GPUs" in said and "fits in --gpu_gb=24" in said and "key-value cache" in said
    policy = f"--policy={tmp_path}/large"
    for gb in (13, 9, 6.5):  # ever harder: the change that is named must itself fit
        refused(capsys, lambda: run(policy, "--dry_run=1", f"--gpu_gb={gb}"), f"do not fit in --gpu_gb={gb}", "this would: --")
        with pytest.raises(SystemExit):
            run(policy, "--dry_run=1", f"--gpu_gb={gb}")
        change = capsys.readouterr().err.split("this would: ")[1].split()
        run(policy, "--dry_run=1", f"--gpu_gb={gb}", *change)
        assert "fits in" in capsys.readouterr().out
    refused(capsys, lambda: run(policy, "--dry_run=1", "--gpu_gb=1"), "nor would any change")
    refused(capsys, lambda: run("--policy=no/such/folder", "--dry_run=1"), "no/such/folder")
    transformers.BertConfig(max_position_embeddings=64).save_pretrained(tmp_path / "bert")  # fewer places than a row has tokens
    run(f"--policy={tmp_path}/bert", f"--reward_model={tmp_path}/bert", "--dry_run=2")
    assert "fits in" in capsys.readouterr().out

def test_flops_are_those_of_the_matrix_products(tmp_path, world):
    """The work that `mfu` counts against torch's own counter, which leaves out the CPU's attention kernel."""
    path = folder_of(tmp_path, tied=False)
    groups = [([5] * 20, [[7] * 30] * 4)]
    for rank, passes in ((0, 3), (2, 2)):
        policy = rm.shard(mogrpo.Policy(path, rank, 1.0), CPU, torch.float32)
        def counted(backward):
            with FlopCounterMode(display=False) as counter:
                out = mogrpo.logp(policy, groups, 1.0, CPU)
                out.sum().backward() if backward else None
            return counter.get_total_flops()
        pairs = sum(i + 1 for i in range(50)) * 4  # (query, key) pairs of 4 rows; 2 products of width 4 heads x 8 in 2 layers
        ours = mogrpo.train_flops(policy, groups, mogrpo.Config(beta=0.0, lora_rank=rank)) / passes - 2 * 2 * 2 * 32 * pairs
        assert ours == pytest.approx(counted(False), rel=0.02)
        assert ours == pytest.approx(counted(True) / passes, rel=0.12)  # it also counts the head's recomputation and the adapter


# ------------------------------------------------------------------------------------------------------------------------
# Sampling

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18], [20, 21, 22, 23, 24]]

@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_greedy_equals_generate(kind, tmp_path, world):
    path = folder_of(tmp_path, kind)
    policy, stock = policy_of(path), transformers.AutoModelForCausalLM.from_pretrained(path)
    mogrpo.check_support(policy, CPU, torch.float32)
    with mogrpo.gathered(policy):
        ours, _ = mogrpo.sample(policy, PROMPTS, torch.full((6, 20), -1.0, dtype=torch.float64), 1.0, CPU)
    for i, p in enumerate(PROMPTS):
        expected = stock.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p), dtype=torch.long), do_sample=False,
                                  max_new_tokens=20)[0, len(p):].tolist()
        assert ours[2 * i] == ours[2 * i + 1] == expected

@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_sampled_equals_rescored(kind, tmp_path, world):
    policy = policy_of(folder_of(tmp_path, kind, tied=False))
    u = mogrpo.uniforms([(0, p, g) for p in range(3) for g in range(4)], 24)
    with mogrpo.gathered(policy):
        responses, sampled = mogrpo.sample(policy, PROMPTS, u, 0.8, CPU)
    groups = [(p, responses[4 * i:4 * i + 4]) for i, p in enumerate(PROMPTS)]
    scored = mogrpo.logp(policy, groups, 0.8, CPU)
    assert (scored - torch.cat(sampled)).abs().max() < 1e-4
    assert len({len(r) for r in responses}) > 1 and all(2 not in r[:-1] for r in responses)  # cut right after the first end

def test_sample_does_not_depend_on_its_batch(tmp_path, world):
    policy = policy_of(folder_of(tmp_path))
    keys = [(7, p, g) for p in range(3) for g in range(4)]
    with mogrpo.gathered(policy):
        together, _ = mogrpo.sample(policy, PROMPTS, mogrpo.uniforms(keys, 24), 1.0, CPU)
        alone = [mogrpo.sample(policy, [PROMPTS[k[1]]], mogrpo.uniforms([k], 24), 1.0, CPU)[0][0] for k in keys]
    assert together == alone and len(set(map(tuple, together))) == 12

def test_pick_follows_the_softmax():
    torch.manual_seed(0)
    n, temperature = 40000, 0.7
    logits = torch.randn(12) * 2
    token, logp = mogrpo.pick((logits / temperature).expand(n, 12), torch.rand(n, dtype=torch.float64))
    p = (logits.double() / temperature).exp()
    p = p / p.sum()
    chi2 = ((token.bincount(minlength=12) - n * p)**2 / (n * p)).sum().item()
    assert chi2 < 31.3  # 99.9 % quantile of chi-square with 11 degrees of freedom
    assert torch.allclose(logp.double(), p[token].log(), atol=1e-5)
    for u in (0.0, 1 - 1e-16):  # the ends of the interval never fall on a token of probability 0
        token, _ = mogrpo.pick(torch.tensor([[-math.inf, 0.0, -math.inf]]), torch.tensor([u], dtype=torch.float64))
        assert token.item() == 1

def test_rollout_calls_no_collective(tmp_path):
    """Weights are gathered once, whatever the number of tokens: collectives of a fake group of 4 are counted in the dispatcher."""
    from torch.testing._internal.distributed.fake_pg import FakeStore
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    class Collectives(TorchDispatchMode):
        n = 0
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            self.n += "c10d" in f.namespace
            return f(*args, **(kwargs or {}))
    policy, counts = policy_of(folder_of(tmp_path)), []
    policy.eos = [63]
    for n in (8, 64):
        with Collectives() as mode, mogrpo.gathered(policy):
            mogrpo.sample(policy, PROMPTS, mogrpo.uniforms([(0,), (1,), (2,)], n), 1.0, CPU)
        counts.append(mode.n)
    dist.destroy_process_group()
    assert counts[0] == counts[1] == 3  # one a block, and one for the rest

def test_unsupported_models_are_refused(tmp_path, world, capsys):
    t = transformers
    small = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, eos_token_id=2)
    bert = t.BertLMHeadModel(t.BertConfig(**small, num_attention_heads=4, intermediate_size=48, initializer_range=0.25))
    cohere = t.CohereForCausalLM(t.CohereConfig(**small, num_attention_heads=4, intermediate_size=48, logit_scale=0.1, pad_token_id=0,
                                                bos_token_id=1, initializer_range=0.25))
    for name, model in (("bert", bert), ("cohere", cohere)):  # not causal; logits that are not head(hidden)
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
        refused(capsys, lambda: mogrpo.check_support(policy_of(str(tmp_path / name)), CPU, torch.float32), "not supported")


# ------------------------------------------------------------------------------------------------------------------------
# Advantages and the objective

def combined(scores, weights, lambdas=None, floor=0.01, **flags):
    """`mogrpo.advantages` for weights_K or weights_PK -> rewards, advantages, parts."""
    weights = weights.expand(len(scores), -1) if weights.dim() == 1 else weights
    flags = {**flags, **(dict(floors="a=1") if flags.get("combine") == "lagrangian" else {})}
    lambdas = torch.zeros(scores.shape[-1], dtype=scores.dtype) if lambdas is None else lambdas
    return mogrpo.advantages(scores, weights, mogrpo.Config(std_floor=floor, **flags), lambdas, CPU)

def slow_advantages(s, w, floor, combine, lambdas):
    """The table of formulas by loops over plain numbers: s[p][g][k], w[p][k] -> a[p][g]."""
    P, G, K = len(s), len(s[0]), len(s[0][0])
    mean, std = lambda x: sum(x) / len(x), lambda x: math.sqrt(sum((v - sum(x) / len(x))**2 for v in x) / len(x))
    z = [[[(s[p][g][k] - mean([s[p][h][k] for h in range(G)])) / max(floor, std([s[p][h][k] for h in range(G)])) for k in range(K)]
          for g in range(G)] for p in range(P)]
    r = [[sum(w[p][k] * s[p][g][k] for k in range(K)) for g in range(G)] for p in range(P)]
    normal = [[(r[p][g] - mean(r[p])) / max(floor, std(r[p])) for g in range(G)] for p in range(P)]
    if combine == "sum":
        return normal
    if combine == "lagrangian":
        return [[(normal[p][g] + sum(lambdas[k] * z[p][g][k] for k in range(K))) / (1 + sum(lambdas)) for g in range(G)] for p in range(P)]
    a = [[sum(w[p][k] * z[p][g][k] for k in range(K)) for g in range(G)] for p in range(P)]
    spread = std([x for row in a for x in row])
    return [[x / spread for x in row] for row in a]

@pytest.mark.parametrize("combine", ("sum", "gdpo", "lagrangian"))
def test_advantages_equal_the_formulas(combine, world):
    g = torch.Generator().manual_seed(0)
    s = torch.rand(5, 8, 3, dtype=torch.float64, generator=g)
    s[0, :, 1] = 0.5  # an axis without signal
    s[1, :, 2] = 0.5 + 1e-4 * s[1, :, 2]  # one below the floor
    w = torch.rand(5, 3, dtype=torch.float64, generator=g) + 0.1
    lambdas = torch.tensor([0.7, 0.0, 2.0], dtype=torch.float64) if combine == "lagrangian" else torch.zeros(3, dtype=torch.float64)
    rewards, a, parts = combined(s, w, lambdas, combine=combine)
    slow = slow_advantages(s.tolist(), w.tolist(), 0.01, combine, lambdas.tolist())
    assert torch.allclose(a, torch.tensor(slow, dtype=torch.float64), atol=1e-9) and torch.allclose(parts.sum(-1), a)
    assert torch.allclose(rewards, (s * w[:, None]).sum(-1)) and a.abs().max() > 0.3

def test_one_axis_is_textbook_grpo(world):
    one = torch.tensor([[[0.2], [0.4], [0.9], [0.1]]])
    r = one[0, :, 0].double()
    for combine in ("sum", "gdpo"):  # a batch of one group: its z-score is the group's
        got = combined(one, torch.ones(1), combine=combine, floor=1e-6)[1][0].double()
        assert torch.allclose(got, (r - r.mean()) / r.std(correction=0), atol=1e-5)

@pytest.mark.parametrize("combine", ("sum", "gdpo", "lagrangian"))
def test_no_signal_gives_exactly_zero(combine, world):
    same = torch.full((1, 8, 4), 0.7310585786)
    assert (combined(same, torch.tensor([0.1, 0.7, 1.3, 2.9]), combine=combine)[1] == 0).all()
    assert (combined(same + 1e-7 * torch.randn(1, 8, 4), torch.ones(4), combine=combine)[1] == 0).all()
    noise = combined(same + 1e-5 * torch.randn(1, 8, 4), torch.ones(4), combine=combine)[1]
    if combine in ("sum", "lagrangian"):
        assert 0 < noise.abs().max() < 0.02  # a spread far below the floor hardly moves the policy

def test_group_metrics_against_plain_arithmetic(world):
    g = torch.Generator().manual_seed(0)
    s = torch.rand(6, 8, 3, generator=g, dtype=torch.float64)
    s[..., 2] = 1 - s[..., 0] + 0.05 * s[..., 2]  # the third axis opposes the first
    s[0, :, 1] = 0.5
    rewards, a, parts = combined(s, torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64))
    row = mogrpo.group_metrics(s, rewards, parts, ["x", "y", "z"], 0.01, CPU)
    assert row["zero_std/y"] == pytest.approx(1 / 6) and row["score/x"] == pytest.approx(s[..., 0].mean().item())
    off = (s - s.mean(1, keepdim=True)).reshape(-1, 3)
    assert row["corr/z~x"] == pytest.approx(float(torch.corrcoef(off.T)[0, 2]), abs=1e-6) and row["corr/z~x"] < -0.9
    opposed = sum(abs(u) > 0.01 and abs(v) > 0.01 and u * v < 0 for u, v in off[:, [0, 2]].tolist()) / 48
    assert row["conflict/z~x"] == pytest.approx(opposed) and opposed > 0.8 and row["conflict"] >= opposed
    variance = (a**2).mean().item()
    shares = [(parts[..., k] * a).mean().item() / variance for k in range(3)]
    assert [row[f"share/{k}"] for k in "xyz"] == pytest.approx(shares) and sum(shares) == pytest.approx(1) and shares[2] < 0 < shares[0]
    assert not any("~" in k for k in mogrpo.group_metrics(s[..., :1], rewards, parts[..., :1], ["x"], 0.01, CPU))

def test_ppo_parts(tmp_path, world):
    """GAE by its recursion, and the critic's values by the library's token classifier."""
    g = torch.Generator().manual_seed(0)
    lengths, lam = [3, 1, 7, 2], 0.9
    r, v = torch.rand(13, generator=g, dtype=torch.float64), torch.rand(13, generator=g, dtype=torch.float64)
    slow, at = [], 0
    for n in lengths:
        ahead, out = 0.0, []
        for t in reversed(range(at, at + n)):
            ahead = r[t] + (v[t + 1] if t + 1 < at + n else 0.0) - v[t] + lam * ahead
            out.append(float(ahead))
        slow, at = slow + out[::-1], at + n
    assert mogrpo.gae(r, v, lengths, lam).tolist() == pytest.approx(slow, abs=1e-6)
    for lam in (0.0, 1.0):  # one step ahead; the whole rest
        first = mogrpo.gae(r, v, lengths, lam)[0].item()
        assert first == pytest.approx((r[0] + v[1] - v[0] if lam == 0 else r[:3].sum() - v[0]).item(), abs=1e-6)
    path = folder_of(tmp_path / "p")
    critic = rm.load(transformers.AutoModelForTokenClassification, path, num_labels=1)[0].eval()
    critic = rm.shard(critic, CPU, torch.float32)
    groups = [(p, [[9, 8, 7, 2], [5] * 6]) for p in PROMPTS]
    rm.save_folder(critic, tiny_tokenizer(), str(tmp_path / "c"), torch.float32)
    stock = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "c").eval()
    expected = torch.cat([stock(torch.tensor([p + x])).logits[0, len(p) - 1:-1, 0] for p, xs in groups for x in xs])
    assert torch.allclose(mogrpo.values(critic, groups, CPU), expected, atol=1e-5) and expected.std() > 0.01
    assert stock.score.bias.item() == 0

def test_dpo_equals_the_formula():
    g = torch.Generator().manual_seed(0)
    lengths = [3, 2, 4, 4, 1, 5]  # three pairs, better then worse; the second has no signal
    rows = [([1], [[5] * n for n in lengths[i:i + 2]]) for i in (0, 2, 4)]
    logp = torch.randn(19, generator=g, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(19, generator=g, dtype=torch.float64)
    advantage = torch.cat([torch.full((n,), a) for n, a in zip(lengths, (1.0, -1.0, 0.0, 0.0, 1.2, -0.8))])
    mogrpo.dpo_objective(logp, ref, advantage, torch.full((19,), 0.1), rows, 0.3, 6).backward()
    assert mogrpo.dpo_objective(logp, ref, advantage, torch.zeros(19), rows, 0.3, 6) == 0  # a repeated batch
    other, start, loss = logp.detach().clone().requires_grad_(), [0, 3, 5, 9, 13, 14, 19], 0.0
    for pair in (0, 4):
        gain = [sum(other[t] - ref[t] for t in range(start[i], start[i + 1])) for i in (pair, pair + 1)]
        loss = loss - torch.log(1 / (1 + torch.exp(-0.3 * (gain[0] - gain[1])))) / 3
    loss.backward()
    assert torch.allclose(logp.grad, other.grad, atol=1e-12) and (logp.grad[5:13] == 0).all()
    items = [dict(ids=[1] * 5, responses=[[3] * n, [4] * (12 - n)], sampled=[torch.zeros(n), torch.zeros(12 - n)], advantages_G=torch.tensor([1., -1.]))
             for n in (2, 5, 11)]
    for budget in (1, 30, 40, 1000):  # pairs are never cut
        assert all(len(rs) == 2 for b in mogrpo.micro_batches(items, budget, 2) for _, rs in b["rows"])

def test_stated_weights():
    talk = [{"role": "user", "content": "hi"}]
    said = mogrpo.stated(talk, torch.tensor([3.0, 1.0, 0.0]), ["safety", "tone", "length"])
    assert said == [{"role": "system", "content": "weights : safety 8 , tone 2 , length 0"}, *talk]
    merged = mogrpo.stated([{"role": "system", "content": "be brief"}, *talk], torch.ones(2), ["a", "b"])
    assert merged == [{"role": "system", "content": "be brief\nweights : a 5 , b 5"}, *talk]

def slow_loss(stock, ref, groups, advantages, old, sampled, norm, cfg):
    """The objective from the formulas, one token at a time, in float64, on the library's own full logits."""
    n_responses, n_tokens = sum(len(rs) for _, rs in groups), sum(len(r) for _, rs in groups for r in rs)
    loss, i = 0.0, 0
    for (prompt, responses), a_G in zip(groups, advantages):
        for response, a in zip(responses, a_G.tolist()):
            ids = torch.tensor([prompt + response])
            pi = (stock(ids).logits[0] / cfg.temperature).log_softmax(-1)
            pi_ref = (ref(ids).logits[0] / cfg.temperature).log_softmax(-1).detach()
            for t, token in enumerate(response):
                lp, lr = pi[len(prompt) - 1 + t, token], pi_ref[len(prompt) - 1 + t, token]
                was = lp.detach() if old is None else old[i]
                rho, tis = (lp - was).exp(), min(2.0, math.exp((was - sampled[i]).item()))
                surrogate = torch.minimum(rho * a * tis, rho.clamp(1 - cfg.clip_low, 1 + cfg.clip_high) * a * tis)
                k3 = (lr - lp).exp() - (lr - lp) - 1
                weight = {"sequence": 1 / (len(response) * n_responses), "token": 1 / n_tokens,
                          "constant": 1 / (n_responses * cfg.max_new_tokens)}[norm]
                loss, i = loss - weight * (surrogate - cfg.beta * k3), i + 1
    return loss

def fast_gradient(policy, reference, groups, advantages, old, sampled, norm, cfg, budget):
    """The same by the functions of the loop, in micro-batches of `budget` tokens -> loss, gradients by name."""
    device, start, items = CPU, 0, []
    for (p, rs), a in zip(groups, advantages):
        cut = [len(r) for r in rs]
        parts = sampled[start:start + sum(cut)].split(cut)
        items.append(dict(ids=p, responses=rs, sampled=list(parts), advantages_G=a,
                          old=list((sampled if old is None else old)[start:start + sum(cut)].split(cut))))
        start += sum(cut)
    lengths = [len(r) for _, rs in groups for r in rs]
    olds = {(tuple(p), tuple(r)): o for g in items for p, r, o in zip([g["ids"]] * 99, g["responses"], g["old"])}
    loss = 0.0
    for b in mogrpo.micro_batches(items, budget):
        assert sum(len(rs) for _, rs in b["rows"]) * max(len(p) + len(r) for p, rs in b["rows"] for r in rs) <= max(
            budget, max(len(p) + len(r) for p, rs in b["rows"] for r in rs))
        new = mogrpo.logp(policy, b["rows"], cfg.temperature, device)
        was = new.detach() if old is None else torch.cat([olds[tuple(p), tuple(r)] for p, rs in b["rows"] for r in rs])
        weight = mogrpo.token_weights(b["rows"], norm, cfg.max_new_tokens, len(lengths), sum(lengths))
        a = b["advantage"] * (was - b["sampled"]).exp().clamp(max=2.0)
        ref = mogrpo.logp(reference, b["rows"], cfg.temperature, device).detach()
        part, _, _ = mogrpo.objective(new, was, ref, a, weight, cfg, cfg.beta)
        part.backward()
        loss += part.item()
    grads = {n.removeprefix("lm."): p.grad.full_tensor().clone() for n, p in policy.named_parameters()}
    policy.zero_grad()
    return loss, grads

@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("norm", ["sequence", "token", "constant"])
def test_loss_and_gradient_equal_the_formulas(kind, norm, tmp_path, world):
    path = folder_of(tmp_path / "a", kind, tokenizer=tiny_tokenizer(pad="<end>"))  # pad = end: the end must still be trained
    other = folder_of(tmp_path / "b", kind, seed=1)
    cfg = mogrpo.Config(beta=0.3, temperature=0.9, max_new_tokens=12)
    policy, reference = policy_of(path, torch.float64), policy_of(other, torch.float64)
    stock, ref = (transformers.AutoModelForCausalLM.from_pretrained(p, dtype=torch.float64) for p in (path, other))
    g = torch.Generator().manual_seed(0)
    groups = [(p, [torch.randint(3, 64, (n,), generator=g).tolist() + [2] for n in lengths])
              for p, lengths in zip(PROMPTS, ((3, 9, 1, 5), (7, 0, 2, 11), (4, 4, 8, 6)))]
    n = sum(len(r) for _, rs in groups for r in rs)
    advantages = torch.randn(3, 4, generator=g, dtype=torch.float64)
    at = torch.cat([stock(torch.tensor([p + r])).logits[0, len(p) - 1:-1].div(0.9).log_softmax(-1).gather(-1, torch.tensor(r)[:, None])[:, 0]
                    for p, rs in groups for r in rs]).detach()
    sampled = at + 0.5 * torch.randn(n, generator=g, dtype=torch.float64)          # a sampler that is off
    for old in (None, at + 0.4 * torch.randn(n, generator=g, dtype=torch.float64)):  # first inner epoch; a later one, with clipping
        stock.zero_grad()
        expected = slow_loss(stock, ref, groups, advantages, old, sampled, norm, cfg)
        expected.backward()
        slow = dict(stock.named_parameters())
        for budget in (10**6, 64, 1):  # everything at once, a few rows, one row a micro-batch
            loss, grads = fast_gradient(policy, reference, groups, advantages, old, sampled, norm, cfg, budget)
            assert loss == pytest.approx(expected.item(), rel=1e-7)  # the library's norms compute in float32
            for name, grad in grads.items():
                assert (grad - slow[name].grad).norm() <= 1e-6 * slow[name].grad.norm() + 1e-12, name

def test_full_logits_never_exist(tmp_path, world):
    """The largest tensor of a forward and backward pass: N x V for the obvious way, chunk x V (or a weight) for ours."""
    class Largest(TorchDispatchMode):
        size = 0
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            self.size = max([self.size] + [t.numel() for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor)])
            return out
    policy = policy_of(folder_of(tmp_path))
    def largest(chunk):
        groups = [([5] * 8, [[7] * 56] * 8)]
        with Largest() as mode:
            mogrpo.logp(policy, groups, 1.0, CPU, chunk).sum().backward()
        return mode.size
    assert largest(10**6) >= 8 * 56 * 64     # all positions x vocabulary
    assert largest(16) <= 8 * 64 * 48        # no more than the network itself holds: rows x length x intermediate size


# ------------------------------------------------------------------------------------------------------------------------
# The reward model

def ratings_file(path, n=400, sparse=False):
    """Ratings whose first axis is how early the words are, whose second is the opposite; `sparse`: the second is rarely rated."""
    g = torch.Generator().manual_seed(0)
    with open(path, "w") as f:
        for i in range(n):
            w = torch.randint(0, 8, (4,), generator=g).tolist()
            s = 1 - sum(w) / (7 * len(w))
            f.write(json.dumps({"prompt": f"w{i % 40} w1", "response": " ".join(f"w{x}" for x in w), "scores":
                                {"early": s, "late": None if sparse and i % 60 else 1 - s}}) + "\n")
    return str(path)

def encoder_folder(path):
    t = transformers
    torch.manual_seed(0)
    t.BertModel(t.BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
                             initializer_range=0.25)).save_pretrained(path)
    tiny_tokenizer(template=None).save_pretrained(path)
    return str(path)

@pytest.fixture(scope="session", params=["decoder", "decoder, pad = end", "encoder", "encoder, three heads"])
def trained(request, tmp_path_factory):
    """A small reward model trained by the command's own function -> folder, its held-out table."""
    where = tmp_path_factory.mktemp("rm")
    backbone = encoder_folder(where / "b") if "encoder" in request.param else folder_of(
        where / "b", tokenizer=tiny_tokenizer(pad="<end>" if "end" in request.param else "<pad>"))
    world = rm.join_world(alone=True)
    table = rm.train(rm.Config(ratings=ratings_file(where / "r.jsonl"), backbone=backbone, out_dir=str(where / "rm"), epochs=12, lr=3e-3,
                               ensemble=3 if "heads" in request.param else 1), *world)
    dist.destroy_process_group()
    return str(where / "rm"), table

SAMPLES = [([{"role": "user", "content": f"w{i} w2"}], " ".join(f"w{(i * j) % 59}" for j in range(1 + 3 * (i % 5)))) for i in range(17)]

def test_reward_model_learns_and_loads_in_stock(trained):
    path, table = trained
    assert all(row["pearson"] > 0.6 and row["n"] > 0 for row in table.values()), table
    model = rm.fill(rm.RewardModel(path), CPU).eval()
    ours = rm.score(model, SAMPLES, CPU).flatten(1)  # all heads
    stock = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    names = list(stock.config.id2label.values())
    assert model.axes == ["early", "late"] and names == (model.axes if model.heads == 1 else [f"{k}#{m}" for m in range(3) for k in model.axes])
    texts = [tokenizer.apply_chat_template(m + [{"role": "assistant", "content": r}], tokenize=False) if tokenizer.chat_template
             else m[0]["content"] + "\n" + r for m, r in SAMPLES]
    pipe = transformers.pipeline("text-classification", model=stock, tokenizer=tokenizer, top_k=None)
    for row, text in zip(ours, texts):
        with torch.no_grad():
            logits = stock(**{k: v for k, v in tokenizer(text, return_tensors="pt").items() if k != "token_type_ids"}).logits[0]
        assert torch.allclose(row, logits.sigmoid(), atol=1e-5)
        assert {d["label"]: d["score"] for d in pipe([text])[0]} == pytest.approx(dict(zip(names, row.tolist())), abs=1e-5)

def test_score_does_not_depend_on_the_batch(trained, monkeypatch):
    model = rm.fill(rm.RewardModel(trained[0]), CPU).eval()
    alone, real = torch.cat([rm.score(model, [s], CPU) for s in SAMPLES]), rm.by_length
    assert alone.shape == (17, model.heads, 2) and (model.heads == 1 or alone.std(1).mean() > 1e-3)  # heads of an ensemble do differ
    for tokens in (1, 64, 10**6):
        monkeypatch.setattr(rm, "by_length", functools.partial(real, budget=tokens))
        assert torch.allclose(rm.score(model, SAMPLES, CPU), alone, atol=1e-5)

@pytest.mark.parametrize("loss", ["bce", "mse"])
def test_unrated_rows_change_nothing_and_rare_axes_weigh_the_same(loss, tmp_path, world, monkeypatch):
    sparse, backbone = ratings_file(tmp_path / "r.jsonl", n=240, sparse=True), folder_of(tmp_path / "b")
    held = ratings_file(tmp_path / "h.jsonl", 40)
    seen = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: seen.append(
        [p.grad.full_tensor().clone() for part in self.param_groups for p in part["params"]]))
    def gradient(path, heads=1):
        seen.clear()
        rm.train(rm.Config(ratings=path, heldout_ratings=held, backbone=backbone, out_dir=str(tmp_path / "o"), loss=loss, epochs=1,
                           batch_size=240, ensemble=heads), *world)
        return seen[0]
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: None)
    both = gradient(sparse)
    # By hand: the mean over an axis's rated rows, then over axes; an axis has 60 times the other's labels
    torch.manual_seed(0)
    model = rm.fill(rm.RewardModel(backbone, ["early", "late"]), CPU)
    rows, labels, _ = rm.read_ratings(sparse, "", "0,1")
    error = 0.0
    predicted = model(**model.batch(model.encode(rows), "cpu")).sigmoid()[:, 0]
    for k in range(2):
        rated = [i for i in range(240) if not math.isnan(labels[i, k])]
        assert len(rated) == (240, 4)[k]
        of = {"mse": lambda p, y: (p - y)**2, "bce": lambda p, y: -y * p.log() - (1 - y) * (1 - p).log()}[loss]
        error = error + sum(of(predicted[i, k], labels[i, k]) for i in rated) / len(rated) / 2
    error.backward()
    for ours, p in zip(both, model.parameters()):
        assert (ours - p.grad).norm() <= 1e-4 * p.grad.norm() + 1e-7
    with open(sparse, "a") as f:
        f.writelines(json.dumps({"prompt": "w3", "response": "w4", "scores": {"early": None}}) + "\n" for _ in range(240))
    assert all(torch.equal(ours, more) for ours, more in zip(both, gradient(sparse)))

def test_weights_of_an_ensemble_are_a_bootstrap():
    labels = torch.rand(500, 2)
    labels[5:, 1] = math.nan  # 100 times more ratings of the first axis
    one, many = rm.label_weights(labels, 1, 0), rm.label_weights(labels, 4, 0)
    assert one.shape == (500, 1, 2) and many.shape == (500, 4, 2) and (many[5:, :, 1] == 0).all()
    assert torch.allclose(one.mean(0), torch.full((1, 2), 0.5)) and torch.allclose(one[:, 0, 0], torch.full((500,), 0.5))
    rated = many.sum(0) > 0  # a head may have drawn none of five rows
    assert torch.allclose(many.mean(0)[rated], torch.full((int(rated.sum()),), 1 / 8)) and rated.sum() >= 7
    share = (many[:, :, 0] > 0).float().mean(0)  # of the rows that a head sees: 1 - 1/e
    assert ((share - 0.632).abs() < 0.06).all() and not torch.equal(many[:, 0], many[:, 1])

def test_batches_of_one_length_are_a_permutation():
    lengths = torch.randint(1, 300, (1003,), generator=torch.Generator().manual_seed(1))
    batches = rm.epoch_batches(lengths, 10, seed=3)
    rows = [i for b in batches for i in b]
    assert len(batches) == 100 and len(set(rows)) == 1000 and all(len(b) == 10 for b in batches)
    assert batches == rm.epoch_batches(lengths, 10, 3) != rm.epoch_batches(lengths, 10, 4)
    padding = sum(10 * max(lengths[b]) - lengths[b].sum() for b in batches) / lengths.sum()
    means = torch.tensor([lengths[b].float().mean() for b in batches])
    assert padding < 0.1 and abs(torch.corrcoef(torch.stack([means, torch.arange(100.0)]))[0, 1]) < 0.3  # short and long take turns

def test_training_resumes_exactly(tmp_path, monkeypatch):
    """Stopped within the second of three epochs: the same folder and table as without the stop."""
    common = [f"--ratings={ratings_file(tmp_path / 'r.jsonl', 200)}", f"--backbone={encoder_folder(tmp_path / 'b')}", "--epochs=3", "--lr=1e-3",
              "--save_interval=4", "--ensemble=2"]
    run_main(rm, *common, f"--out_dir={tmp_path}/whole")
    real, calls = torch.nn.utils.clip_grad_norm_, []
    def interrupt(*args):
        calls.append(1)
        if len(calls) == 10:  # five or six batches an epoch
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_main(rm, *common, f"--out_dir={tmp_path}/cut")
    dist.destroy_process_group()
    with open(tmp_path / "cut/checkpoint/state.json") as f:
        assert json.load(f)["updates"] == 8
    run_main(rm, *common, f"--out_dir={tmp_path}/cut", "--resume")
    assert len(calls) == 10 + 15 - 8 and not os.path.exists(tmp_path / "cut/checkpoint")
    a, b = (transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / d) for d in ("whole", "cut"))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert open(tmp_path / "whole/heldout.json").read() == open(tmp_path / "cut/heldout.json").read()

def test_split_keeps_prompts_together_and_flat_fields_load(tmp_path):
    rows, labels, axes = rm.read_ratings(ratings_file(tmp_path / "r.jsonl"), "", "0,1")
    sides = collections.defaultdict(set)
    for m, _ in rows:
        sides[m[0]["content"]].add(rm.is_held_out(m, 0.3, 0))
    assert all(len(s) == 1 for s in sides.values()) and {True, False} == set.union(*sides.values())
    with gzip.open(tmp_path / "flat.jsonl.gz", "wt") as f:
        f.write(json.dumps({"prompt": "a", "response": "b", "helpfulness": 3, "verbosity": 1}) + "\n")
        f.write(json.dumps({"prompt": "a", "response": "c", "helpfulness": None, "verbosity": 4}) + "\n")
    _, labels, axes = rm.read_ratings(tmp_path / "flat.jsonl.gz", "helpfulness,verbosity", "0,4")
    assert axes == ["helpfulness", "verbosity"] and labels[0].tolist() == [0.75, 0.25] and labels[1, 0].isnan() and labels[1, 1] == 1

def test_heldout_table_against_plain_arithmetic():
    scores, labels = torch.tensor([[0.1], [0.6], [0.4], [0.9]]), torch.tensor([[0.0], [0.5], [1.0], [float("nan")]])
    row = rm.heldout_table(scores, labels, [("p", ""), ("p", ""), ("p", ""), ("q", "")], ["a"])["a"]
    assert row["n"] == 3 and row["pairs"] == pytest.approx(2 / 3)  # 0.6 is rated below 0.4's answer
    assert row["r2"] == pytest.approx(1 - (0.01 + 0.01 + 0.36) / 0.5, abs=1e-6)
    x, y = [0.1, 0.6, 0.4], [0.0, 0.5, 1.0]
    mx, my = sum(x) / 3, sum(y) / 3
    assert row["pearson"] == pytest.approx(sum((a - mx) * (b - my) for a, b in zip(x, y)) / math.sqrt(
        sum((a - mx)**2 for a in x) * sum((b - my)**2 for b in y)), abs=1e-6)
    assert row["spearman"] == pytest.approx(0.5) and math.isnan(row["auc"])  # ranks 1 3 2 against 1 2 3

def test_heldout_table_on_many_rows():
    """Ties, AUC, calibration, the interval, length and halo, each against its definition by loops."""
    g = torch.Generator().manual_seed(0)
    x = torch.rand(300, generator=g)
    labels = torch.stack([(torch.rand(300, generator=g) < x).float(), torch.rand(300, generator=g)], 1)
    labels[::3, 1] = math.nan
    scores = torch.stack([(x * 20).round() / 20, (x * 20).round() / 20], 1)  # ties; and one impression for both axes: halo
    rows = [([{"role": "user", "content": str(i % 100)}], "x" * int(30 * (1 - v))) for i, v in enumerate(x)]
    table = rm.heldout_table(scores, labels, rows, ["safe", "kind"])
    safe, kind, s, y = table["safe"], table["kind"], scores[:, 0].tolist(), labels[:, 0].tolist()
    rank = lambda v: [sum(b < a for b in v) + (sum(b == a for b in v) + 1) / 2 for a in v]
    assert rm.ranks(scores[:, 0]).tolist() == rank(s)
    pearson = lambda a, b: float(torch.corrcoef(torch.tensor([a, b], dtype=torch.float64))[0, 1])
    assert safe["spearman"] == pytest.approx(pearson(rank(s), rank(y))) and safe["low"] < safe["spearman"] < safe["high"]
    assert 0.05 < safe["high"] - safe["low"] < 0.3 and math.isnan(kind["auc"]) and (safe["n"], kind["n"]) == (300, 200)
    pairs = [(a > b) + 0.5 * (a == b) for a, p in zip(s, y) if p == 1 for b, q in zip(s, y) if q == 0]
    assert safe["auc"] == pytest.approx(sum(pairs) / len(pairs)) and 0.6 < safe["auc"] < 0.95
    same = [(s[i] - s[j]) * (y[i] - y[j]) for i in range(300) for j in range(i) if i % 100 == j % 100 and y[i] != y[j]]
    assert safe["pairs"] == pytest.approx(sum((d > 0) + 0.5 * (d == 0) for d in same) / len(same))
    bins = collections.defaultdict(list)
    for a, b in zip(scores[:, 0].double().tolist(), y):
        bins[min(9, int(a * 10))].append((a, b))
    means = [(len(v), sum(a for a, _ in v) / len(v), sum(b for _, b in v) / len(v)) for _, v in sorted(bins.items())]
    assert [n for n, *_ in safe["calibration"]] == [n for n, *_ in means] and len(means) == 10
    assert safe["ece"] == pytest.approx(sum(n * abs(a - b) for n, a, b in means) / 300) and safe["ece"] < 0.1
    assert safe["length"] < -0.95 and safe["with"]["kind"][1] == pytest.approx(1) and abs(safe["with"]["kind"][0]) < 0.2

def test_halo_is_warned_of(tmp_path, monkeypatch, capsys):
    table = {a: {"n": 3, "r2": 0.5, "with": {b: [0.1, score]}} for a, b, score in (("safe", "kind", 0.8), ("kind", "safe", 0.8))}
    monkeypatch.setattr(rm, "train", lambda *a: table)
    run_main(rm)
    assert capsys.readouterr().out.count("halo") == 1
    table["kind"]["with"]["safe"] = table["safe"]["with"]["kind"] = [0.7, 0.8]
    run_main(rm)
    assert "halo" not in capsys.readouterr().out

def test_score_command_keeps_the_rows(trained, tmp_path):
    with open(tmp_path / "s.jsonl", "w") as f:
        f.writelines(json.dumps({"messages": m, "response": r, "id": i}) + "\n" for i, (m, r) in enumerate(SAMPLES))
    run_main(rm, f"--score={tmp_path}/s.jsonl", f"--reward_model={trained[0]}", f"--out={tmp_path}/out.jsonl")
    out = rows_of(tmp_path / "out.jsonl")
    expected = rm.score(rm.fill(rm.RewardModel(trained[0]), CPU).eval(), SAMPLES, CPU)
    assert [r["id"] for r in out] == list(range(17)) and [r["response"] for r in out] == [r for _, r in SAMPLES]
    table = lambda name: torch.tensor([list(r[name].values()) for r in out])
    assert torch.allclose(table("scores"), expected.mean(1), atol=1e-5)
    if expected.shape[1] > 1:
        spread = ((expected - expected.mean(1, keepdim=True))**2).mean(1)**0.5
        assert torch.allclose(table("spread"), spread, atol=1e-5) and spread.max() > 1e-3
    else:
        assert "spread" not in out[0]

def judge_folder(path, kind="qwen3", tied=True):
    tokenizer = tiny_tokenizer()
    vocabulary = [t for t, _ in sorted(tokenizer.get_vocab().items(), key=lambda p: p[1])]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary[:-5] + list("12345"))}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    other = transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="<end>")
    other.chat_template = CHAT
    return folder_of(path, kind, tokenizer=other, tied=tied)

@pytest.mark.parametrize("kind", ["qwen3", "llama", "gemma2", "gpt2"])
def test_judge_is_the_expected_digit(kind, tmp_path, world):
    """Scores in padded batches against one question at a time through stock logits, in float64."""
    path = judge_folder(tmp_path, kind)
    model, tokenizer = rm.load(transformers.AutoModelForCausalLM, path)
    model = rm.fill(model, CPU).eval()
    rubrics = {"kind": "w1 w2 w3", "brief": "w4"}
    rows = [(m, r) for m, r in SAMPLES[:6]]
    found = rm.judged(model, tokenizer, rows, rubrics, CPU, 10**6)
    stock = transformers.AutoModelForCausalLM.from_pretrained(path).double()
    for i, (messages, response) in enumerate(rows):
        for j, rubric in enumerate(rubrics.values()):
            talk = f"user: {messages[0]['content']}\n\nassistant: {response}"
            ids = tokenizer.apply_chat_template([{"role": "user", "content": rm.QUESTION.format(talk, rubric)}], add_generation_prompt=True, return_dict=False)
            logits = stock(torch.tensor([ids])).logits[0, -1]
            p = [math.exp(logits[tokenizer.convert_tokens_to_ids(d)] - logits.logsumexp(0)) for d in "12345"]
            assert found[i, j, 0].item() == pytest.approx(sum(n * q for n, q in enumerate(p)) / sum(p) / 4, abs=1e-5)
            assert found[i, j, 1].item() == pytest.approx(sum(p), abs=1e-5)
    assert found[:, :, 0].std() > 0.01 and rm.judged(model, tokenizer, rows, rubrics, CPU, 3).isnan().all()

def test_labels_continue_after_a_kill(tmp_path, monkeypatch, capsys):
    judge, n = judge_folder(tmp_path / "judge"), 70
    with open(tmp_path / "s.jsonl", "w") as f:
        f.writelines(json.dumps({"prompt": f"w{i % 50}", "response": f"w{i % 7} w9", "id": i, "scores": {"old": 1}}) + "\n" for i in range(n))
    with open(tmp_path / "rubrics.json", "w") as f:
        json.dump({"kind": "w1 w2", "brief": "w3"}, f, indent=2)
    args = [f"--label={tmp_path}/s.jsonl", f"--judge={judge}", f"--rubrics={tmp_path}/rubrics.json"]
    run_main(rm, *args, f"--out={tmp_path}/whole.jsonl")
    assert "answers with a digit" in capsys.readouterr().out  # a random model does not: it is told
    real, calls = rm.judged, []
    def killed(*a):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*a)
    monkeypatch.setattr(rm, "judged", killed)
    with pytest.raises(KeyboardInterrupt):
        run_main(rm, *args, f"--out={tmp_path}/cut.jsonl")
    dist.destroy_process_group()
    assert len(rows_of(tmp_path / "cut.jsonl")) == 32
    with open(tmp_path / "cut.jsonl", "a") as f:
        f.write('{"prompt": "w3')  # killed within a line
    run_main(rm, *args, f"--out={tmp_path}/cut.jsonl")
    whole, cut = (rows_of(tmp_path / f"{name}.jsonl") for name in ("whole", "cut"))
    assert [r["id"] for r in cut] == list(range(n)) and len(calls) == 4 and list(cut[0]["scores"]) == ["kind", "brief"]
    for a, b in zip(whole, cut, strict=True):
        assert {**a, "scores": 0} == {**b, "scores": 0} and a["scores"] == pytest.approx(b["scores"], abs=1e-6)
    rows, labels, axes = rm.read_ratings(tmp_path / "whole.jsonl", "", "0,1")  # and it is a ratings file
    assert axes == ["kind", "brief"] and len(rows) == n and not labels.isnan().any()
    before = open(tmp_path / "whole.jsonl").read()
    for change in (["--rubrics="], [f"--label={tmp_path}/whole.jsonl"]):  # other axes, other rows
        capsys.readouterr()
        refused(capsys, lambda: run_main(rm, *args, f"--out={tmp_path}/whole.jsonl", *change) if "label" not in change[0] else
                run_main(rm, *args[1:], f"--out={tmp_path}/s.jsonl", *change), "not the beginning")
        dist.destroy_process_group()
    assert open(tmp_path / "whole.jsonl").read() == before

# ------------------------------------------------------------------------------------------------------------------------
# The toy world and whole runs

def test_true_scores():
    ask, rob = "how do i boil the egg ?", "tell me how to rob the bank ."
    good = "sure, happy to help. fill a pot with water. put it in the pot. wait ten minutes. have a lovely day."
    assert list(mogrpo.true_scores(ask, good).values()) == [1, 1, 1, 1]
    assert mogrpo.true_scores(rob, good)["meaningfulness"] == 0
    bad = mogrpo.true_scores(rob, "bring a gun. tie up the guards. empty the safe. now go away.")
    assert bad == {"politeness": 0, "meaningfulness": 1, "actionability": 1, "safety": 0}
    kind = mogrpo.true_scores(rob, "i can not help with that. look for honest work. ask a charity for money.")
    assert kind == {"politeness": 0.5, "meaningfulness": 1, "actionability": 0.8, "safety": 1}
    assert mogrpo.true_scores(ask, "that would hurt people.")["meaningfulness"] == 0  # refusing a harmless request
    for text in ("", ".", "...", "wait ten minutes. " * 9, "\x00", "Ünïcode. 42"):
        assert all(0 <= s <= 1 for s in mogrpo.true_scores(ask, text).values())

def test_toy_world_is_complete(toy):
    assert sorted(os.listdir(toy / "out/toy")) == ["heldout_prompts.jsonl", "policy", "prompts.jsonl", "ratings.jsonl", "reward_model"]
    seen, held = ({r["prompt"] for r in rows_of(toy / f"out/toy/{n}.jsonl")} for n in ("prompts", "heldout_prompts"))
    assert not seen & held and not {r["prompt"] for r in rows_of(toy / "out/toy/ratings.jsonl")} & held
    with open(toy / "out/toy/reward_model/heldout.json") as f:
        assert all(row["r2"] > 0.7 for row in json.load(f).values())

def test_default_run_improves_every_axis(toy, monkeypatch, capsys):
    """The README's main command, but half its steps: all true scores rise on held-out prompts, and it says so."""
    monkeypatch.chdir(toy)
    run_main(mogrpo, "--steps=40", "--out_dir=out/short")
    evals = [r for r in rows_of("out/short/metrics.jsonl") if "true/safety" in r]
    assert [r["step"] for r in evals] == [0, 40]
    for k in ("politeness", "meaningfulness", "actionability", "safety"):
        assert evals[1][f"true/{k}"] > evals[0][f"true/{k}"] + 0.05 and evals[1][f"eval/{k}"] > evals[0][f"eval/{k}"] + 0.05
    row = [r for r in rows_of("out/short/metrics.jsonl") if "loss" in r][0]
    names = "loss reward reward_std conflict kl clip_frac grad_norm entropy length truncated lr sampler_gap tok_per_s mfu peak_gb".split()
    assert set(names + ["score/safety", "std/safety", "zero_std/safety", "sec/sample", "sec/score", "sec/train"]) <= set(row)
    assert abs(row["kl"]) < 1e-6 and row["clip_frac"] == 0 and row["sampler_gap"] < 1e-4  # rho is 1 and pi is pi_ref at first
    said = capsys.readouterr().out
    assert "before" in said and "out/short" in said and said.count("\nstep ") == 40
    stock = transformers.AutoModelForCausalLM.from_pretrained("out/short/policy")
    world = rm.join_world(alone=True)
    policy = rm.fill(mogrpo.Policy("out/short/policy"), CPU)
    ids = torch.tensor([[5, 9, 30, 41, 2]])
    assert torch.equal(stock(ids).logits, policy.lm(ids).logits)
    restored = rm.shard(mogrpo.Policy("out/toy/policy"), *world[2:])
    state = mogrpo.load_checkpoint("out/short/checkpoint", restored, torch.optim.AdamW(restored.parameters()))
    for (name, p), q in zip(restored.named_parameters(), policy.parameters()):
        assert torch.equal(p.full_tensor(), q), name
    assert state["step"] == 40
    dist.destroy_process_group()
    # eval.py on what the run left
    run_main(evaluation, "--policies=base=out/toy/policy,ours=out/short/policy", "--reward_model=out/toy/reward_model",
             "--prompts=out/toy/heldout_prompts.jsonl", "--samples=2", "--max_new_tokens=48", "--out_dir=out/compared")
    with open("out/compared/eval.json") as f:
        table = json.load(f)["table"]
    assert list(table) == ["all", "benign", "harmful"]
    rows = rows_of("out/compared/samples.jsonl")
    for name in ("base", "ours"):
        mean = sum(r["scores"]["safety"] for r in rows if r["policy"] == name) / sum(r["policy"] == name for r in rows)
        assert table["all"]["safety"][name]["mean"] == pytest.approx(mean, abs=1e-6)
    assert table["all"]["politeness"]["ours"]["gain"] > 0.1 and table["all"]["politeness"]["base"]["gain"] == 0

def test_compare_against_plain_arithmetic():
    x, b = [0.5, 0.7, 0.9, 0.4], [0.4, 0.7, 0.5, 0.6]
    got = evaluation.compare(torch.tensor(x, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))
    half = lambda v: 1.96 * math.sqrt(sum((e - sum(v) / 4)**2 for e in v) / 3 / 4)
    d = [p - q for p, q in zip(x, b)]
    assert got == pytest.approx(dict(mean=0.625, ci=half(x), gain=0.075, gain_ci=half(d), win=(2 + 0.5) / 4))

SMALL = ["--prompts_per_step=4", "--group_size=4", "--max_new_tokens=16", "--eval_samples=1", "--lr=1e-3", "--epochs=2"]

def stop_after(n, monkeypatch):
    """Let the next run in this process be interrupted, as by Ctrl-C, during its n-th step -> a list that counts its steps."""
    real, calls = getattr(mogrpo.group_metrics, "__wrapped__", mogrpo.group_metrics), []
    @functools.wraps(real)
    def interrupt(*args):
        calls.append(1)
        if len(calls) == n:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)
    monkeypatch.setattr(mogrpo, "group_metrics", interrupt)
    return calls

@pytest.mark.parametrize("flags, stops", [([], (1, 2, 3)), (["--algo=ppo", "--critic_lr=1e-3"], (2,)),
                                          (["--combine=lagrangian", "--floors=safety=0.9,politeness=0.2", "--steer"], (2,))])
def test_resume_is_exact_after_a_stop_at_any_step(flags, stops, toy, monkeypatch):
    monkeypatch.chdir(toy)
    heldout, name = "out/few.jsonl", f"-{len(flags)}"
    with open("out/toy/heldout_prompts.jsonl") as f, open(heldout, "w") as g:
        g.writelines(f.readlines()[::16])
    common = [*SMALL, "--steps=4", f"--heldout_prompts={heldout}", "--eval_interval=2", *flags]
    run_main(mogrpo, *common, f"--out_dir=out/whole{name}", "--save_interval=0")
    for n in stops:
        folder = f"out/cut{n}{name}"
        calls = stop_after(n, monkeypatch)
        run_main(mogrpo, *common, f"--out_dir={folder}")
        assert not os.path.exists(f"{folder}/policy") and len(calls) == n
        with open(f"{folder}/metrics.jsonl", "a") as f:
            f.write(json.dumps({"step": 99, "loss": 0}) + "\n" + '{"step": 1')  # a killed run: steps logged but not saved, half a line
        stop_after(99, monkeypatch)
        run_main(mogrpo, *common, f"--out_dir={folder}", "--resume")
        assert without_time(rows_of(f"{folder}/metrics.jsonl")) == without_time(rows_of(f"out/whole{name}/metrics.jsonl"))
        assert rows_of(f"{folder}/samples.jsonl") == rows_of(f"out/whole{name}/samples.jsonl")
        a, b = (transformers.AutoModelForCausalLM.from_pretrained(f"{d}/policy") for d in (folder, f"out/whole{name}"))
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    if "--combine=lagrangian" in flags:  # dual ascent: up while below the floor, down while above
        rows = [r for r in rows_of(f"out/whole{name}/metrics.jsonl") if "loss" in r]
        for k, floor in (("safety", 0.9), ("politeness", 0.2)):
            expected = [math.exp(0.5 * sum(floor - r[f"score/{k}"] for r in rows[:i + 1])) for i in range(4)]
            assert [r[f"lambda/{k}"] for r in rows] == pytest.approx(expected)
        assert rows[-1]["lambda/safety"] > 1 > rows[-1]["lambda/politeness"]

def test_bfloat16_starts_at_the_reference(toy, monkeypatch):
    """The GPU's arithmetic: policy (float32 weights, bfloat16 compute) and bfloat16 reference must agree bit for bit at first."""
    monkeypatch.chdir(toy)
    run_main(mogrpo, *SMALL, "--epochs=1", "--steps=1", "--dtype=bfloat16", "--eval_samples=1", "--out_dir=out/half")
    row = [r for r in rows_of("out/half/metrics.jsonl") if "loss" in r][0]
    assert row["kl"] == 0 and row["clip_frac"] == 0 and 0 < row["sampler_gap"] < 0.05

WORKER = """
import json, os, signal, sys
sys.path.insert(0, HERE)
import mogrpo, reward_model as rm
world = rm.join_world("float64")          # one group for all runs: what differs is the algorithm, not the rounding
mogrpo.join_world = rm.join_world = lambda dtype: world
real = mogrpo.group_metrics
for stop_in, args in json.loads(sys.argv[1]):
    steps = []
    def group_metrics(*a):                # a signal that reaches one process only, in the middle of a step
        steps.append(1)
        if len(steps) == stop_in and world[0] == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*a)
    mogrpo.group_metrics = group_metrics
    script = rm if args[0][:7] in ("--ratin", "--score") else mogrpo
    script.main(rm.parse(script.Config, args, script.__doc__, script.TOY))
mogrpo.dist.barrier()
os._exit(0)
"""

def torchrun(processes, nodes, runs):
    """All `runs`, [(stop in this step or 0, arguments), ...], by `nodes` agents on this machine with `processes` each."""
    with open("worker.py", "w") as f:
        f.write(WORKER.replace("HERE", repr(HERE)))
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    agents = [subprocess.Popen([sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc_per_node={processes}",
                                "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}", "worker.py", json.dumps(runs)],
                               env={**env, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
              for _ in range(nodes)]
    for agent in agents:
        said, _ = agent.communicate()
        assert agent.returncode == 0, said[-3000:]

def test_any_number_of_processes_and_nodes_gives_the_same_run(toy, monkeypatch):
    """1, 2, 4 and 2 nodes x 2 gloo processes (HSDP): same samples, metrics and weights after 3 steps, for full training and LoRA,
    tied and untied; and a run that is stopped twice and goes on with other numbers of processes, 2 -> 1 -> 4."""
    monkeypatch.chdir(toy)
    # 6 prompts do not divide by 4
    common = ["--prompts_per_step=6", "--group_size=4", "--max_new_tokens=16", "--eval_samples=1", "--steps=3", "--micro_tokens=300"]
    t = transformers
    t.Qwen3ForSequenceClassification(t.Qwen3Config(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, intermediate_size=48, pad_token_id=0, num_labels=2, id2label={0: "good", 1: "kind"},
        initializer_range=0.3)).save_pretrained("tiny/rm")
    tiny_tokenizer().save_pretrained("tiny/rm")
    with open("tiny/prompts.jsonl", "w") as f:
        f.writelines(json.dumps({"prompt": f"w{i} w{i + 1}"}) + "\n" for i in range(24))
    variants = []
    for tied in (True, False):
        folder = folder_of(f"tiny/{tied}", tied=tied)
        for lora in (0, 3):
            variants.append((f"{tied}-{lora}", [*common, f"--policy={folder}", "--reward_model=tiny/rm", "--prompts=tiny/prompts.jsonl",
                                                f"--lora_rank={lora}", f"--lr={3e-2 if lora else 3e-3}"]))
    cut = [*common, "--out_dir=out/cut"]
    def reward(n):
        """A reward model trained on 70 rows in batches of 15, and its scores of other rows, by n processes."""
        return [(0, [f"--ratings={ratings_file('tiny/r.jsonl', 70)}", f"--heldout_ratings={ratings_file('tiny/h.jsonl', 20)}", "--ensemble=2",
                     "--backbone=tiny/True", "--batch_size=15", "--lr=1e-3", f"--out_dir=out/rm{n}"]),
                (0, ["--score=tiny/h.jsonl", "--reward_model=out/rm1", f"--out=out/scored{n}"])]
    base = ["--policy=tiny/True", "--reward_model=tiny/rm", "--prompts=tiny/prompts.jsonl", "--lr=3e-3", *common, "--steps=2"]
    variants += [("gdpo", [*base, "--combine=gdpo"]), ("lagrangian", [*base, "--combine=lagrangian", "--floors=good=0.9"]), ("steer", [*base, "--steer"]),
                 ("ppo", [*base, "--algo=ppo", "--critic_lr=1e-3", "--epochs=2"]), ("dpo", [*base, "--algo=dpo", "--epochs=2"])]
    for name, processes, nodes, extra in (("1", 1, 1, []), ("2", 2, 1, [(1, cut)]), ("4", 4, 1, []), ("2x2", 2, 2, [])):
        torchrun(processes, nodes, [*reward(name), (0, [*common, f"--out_dir=out/n{name}-toy"]), *extra,
                                    *((0, [*args, f"--out_dir=out/n{name}-{v}"]) for v, args in variants)])
    torchrun(1, 1, [(1, [*cut, "--resume"])])
    torchrun(4, 1, [(0, [*cut, "--resume"])])
    for v in ("toy", *(v for v, _ in variants)):
        one = f"out/n1-{v}"
        for other in (f"out/n{n}-{v}" for n in ("2", "4", "2x2")):
            same_run(one, other)
    same_run("out/n1-toy", "out/cut")
    one = t.AutoModelForSequenceClassification.from_pretrained("out/rm1").state_dict()
    for n in ("2", "4", "2x2"):
        other = t.AutoModelForSequenceClassification.from_pretrained(f"out/rm{n}").state_dict()
        assert all((one[k] - other[k]).norm() <= 1e-5 * one[k].norm() for k in one)
        for a, b in zip(rows_of("out/scored1"), rows_of(f"out/scored{n}"), strict=True):
            assert a["response"] == b["response"] and all(a[k] == pytest.approx(b[k], abs=1e-5) for k in ("scores", "spread"))
    start = {n: t.AutoModelForCausalLM.from_pretrained(f"tiny/{n}").state_dict() for n in ("True", "False")}
    for v, _ in variants[:4]:  # they did train, and LoRA left all but the blocks' linear layers alone
        end = t.AutoModelForCausalLM.from_pretrained(f"out/n4-{v}/policy").state_dict()
        moved = {n for n, w in start[v.split("-")[0]].items() if not torch.equal(w, end[n])}
        assert moved == {n for n in end if "0" in v.split("-")[1] or "proj" in n}, moved
        assert os.path.exists(f"out/n4-{v}/adapter/adapter_config.json") == v.endswith("3")

def same_run(one, other):
    """Two runs' samples are equal, their metrics and their policies nearly."""
    samples = [[(r["step"], r["prompt"], [x["text"] for x in r["responses"]]) for r in rows_of(f"{d}/samples.jsonl")] for d in (one, other)]
    assert samples[0] == samples[1]
    for a, b in zip(*(without_time(rows_of(f"{d}/metrics.jsonl")) for d in (one, other)), strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-7)
        assert a.get("grad_norm", 0) == pytest.approx(b.get("grad_norm", 0), rel=1e-5)
    a, b = (transformers.AutoModelForCausalLM.from_pretrained(f"{d}/policy").state_dict() for d in (one, other))
    for name in a:
        assert (a[name] - b[name]).norm() <= 1e-5 * a[name].norm(), (other, name)

def test_bad_gradients_are_skipped_and_ten_stop_the_run(toy, monkeypatch, capsys):
    monkeypatch.chdir(toy)
    real, calls = mogrpo.objective, []
    def poisoned(*args):
        loss, kl, clipped = real(*args)
        calls.append(1)
        return loss * (math.nan if len(calls) in bad else 1.0), kl, clipped
    monkeypatch.setattr(mogrpo, "objective", poisoned)
    bad = {2}
    args = [*SMALL, "--epochs=1", "--micro_tokens=100000", "--heldout_prompts=out/one.jsonl"]
    with open("out/one.jsonl", "w") as f:
        f.write('{"prompt": "how do i boil the egg ?"}\n')
    run_main(mogrpo, *args, "--steps=3", "--out_dir=out/bad1")
    rows = [r for r in rows_of("out/bad1/metrics.jsonl") if "loss" in r]
    assert [r["skipped"] for r in rows] == [0, 1, 1] and rows[1]["loss"] is None and rows[2]["loss"] is not None
    bad, _ = set(range(100)), calls.clear()
    capsys.readouterr()
    refused_with = lambda: run_main(mogrpo, *args, "--steps=30", "--out_dir=out/bad2")
    refused(capsys, refused_with, "ten steps in a row")
    assert len(calls) == 10
    dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------------------------------
# Bad input

@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Good small files and folders, to be spoiled one at a time."""
    monkeypatch.chdir(tmp_path)
    folder_of("policy")
    t = transformers
    t.Qwen3ForSequenceClassification(t.Qwen3Config(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, intermediate_size=48, pad_token_id=0, num_labels=2, id2label={0: "good", 1: "kind"})).save_pretrained("rm")
    tiny_tokenizer().save_pretrained("rm")
    with open("prompts.jsonl", "w") as f:
        f.writelines(json.dumps({"prompt": f"w{i} w{i + 1}"}) + "\n" for i in range(12))
    yield ["--policy=policy", "--reward_model=rm", "--prompts=prompts.jsonl", "--prompts_per_step=4", "--group_size=2", "--max_new_tokens=4",
           "--steps=1"]
    if dist.is_initialized():
        dist.destroy_process_group()

@pytest.mark.parametrize("flags, parts", [
    (["--group_size=1"], ["--group_size=1", "at least 2"]), (["--group_size=-3"], ["--group_size=-3"]), (["--lr=fast"], ["--lr", "fast"]),
    (["--lr=nan"], ["--lr=nan"]), (["--steps=2.5"], ["--steps", "2.5"]), (["--grup_size=4"], ["--grup_size=4"]), (["stray"], ["stray"]),
    (["--weights=good=nan"], ["--weights", "good=nan"]), (["--combine=lagrangian"], ["--floors"]), (["--floors=good=1"], ["--combine=lagrangian"]),
    (["--combine=lagrangian", "--floors=nice=1"], ["nice", "good, kind"]), (["--algo=ppo", "--combine=gdpo"], ["--algo=ppo", "sum"]), (["--algo=dpo", "--beta=0"], ["--beta"]),
    (["--algo=rloo"], ["grpo, ppo, dpo"]), (["--pessimism=1"], ["--ensemble"]), (["--weights=nice=1"], ["nice", "good, kind"]), (["--weights=good"], ["--weights"]), (["--weights=good=0,kind=0"], ["--weights", "0"]),
    (["--combine=product"], ["--combine=product", "sum"]), (["--loss_norm=x"], ["--loss_norm=x", "sequence"]), (["--resume=maybe"], ["--resume"]),
    (["--prompts=none.jsonl"], ["none.jsonl", "No such file"]), (["--policy=no/where/here"], ["no/where/here"]), (["--reward_model=policy"], ["policy", "score.weight"]),
    (["--prompts_per_step=13"], ["prompts_per_step=13"]), (["--max_prompt_tokens=2"], ["0 prompts"]), (["--temperature=0"], ["--temperature=0"])])
def test_bad_flags(bench, capsys, flags, parts):
    refused(capsys, lambda: run_main(mogrpo, *bench, *flags), *parts)
    assert not os.path.exists("out")

@pytest.mark.parametrize("content, parts", [
    ("", ["bad.jsonl", "empty"]), ("{\"prompt\": \"w1\"}\n{oops\n", ["bad.jsonl:2", "broken JSON"]), ("[1]\n", ["bad.jsonl:1", "object"]),
    ("{\"text\": \"x\"}\n", ["bad.jsonl:1", "prompt"]), ("\n{\"prompt\": \"  \"}\n", ["bad.jsonl:2", "empty"]), ("{\"prompt\": 3}\n", ["bad.jsonl:1"]),
    ("{\"messages\": []}\n", ["bad.jsonl:1"]), ("{\"messages\": [{\"role\": \"assistant\", \"content\": \"w\"}]}\n", ["bad.jsonl:1", "assistant"]),
    ("{\"prompt\": \"\\ud800\"}\n", ["bad.jsonl:1"]), (b"\xff\xfe\x00", ["bad.jsonl"])])
def test_bad_prompts(bench, capsys, content, parts):
    with open("bad.jsonl", "wb") as f:
        f.write(content if isinstance(content, bytes) else content.encode())
    refused(capsys, lambda: run_main(mogrpo, *bench, "--prompts=bad.jsonl"), *parts)

@pytest.mark.parametrize("row, parts", [
    ({"prompt": "w1", "scores": {"good": 1}}, ["response"]), ({"prompt": "w1", "response": "w2", "scores": {"good": 1.5}}, ["good=1.5", "0 to 1"]),
    ({"prompt": "w1", "response": "w2", "scores": {"good": "high"}}, ["good=high"]), ({"prompt": "w1", "response": "w2", "scores": [1]}, ["scores"]),
    ({"prompt": "w1", "response": "w2", "scores": {"good": True}}, ["good=True"]), ({"prompt": "w1", "response": "w2"}, ["no row has a score"]),
    ({"prompt": "w1", "response": "w2", "scores": {"good": None}}, ["no row has a score"]), ({"prompt": "w1", "response": "w2", "scores": {"good": 1}}, ["too few"])])
def test_bad_ratings(bench, capsys, row, parts):
    with open("ratings.jsonl", "w") as f:
        f.write(json.dumps(row) + "\n")
    refused(capsys, lambda: run_main(rm, "--ratings=ratings.jsonl", "--backbone=policy", "--out_dir=out"), *parts)
    assert not os.path.exists("out")

def test_spoiled_folders(bench, capsys):
    shutil.copytree("rm", "unnamed")
    with open("rm/config.json") as f, open("unnamed/config.json", "w") as g:
        g.write(f.read().replace('"good"', '"LABEL_0"').replace('"kind"', '"LABEL_1"'))
    refused(capsys, lambda: run_main(mogrpo, *bench, "--reward_model=unnamed"), "unnamed", "id2label")
    dist.destroy_process_group()
    for name, old, new, part in (("narrow", '"hidden_size": 32', '"hidden_size": 64', "embed_tokens.weight"),
                                 ("deep", '"num_hidden_layers": 2', '"num_hidden_layers": 3', "num_hidden_layers"),
                                 ("foreign", '"qwen3"', '"zebra"', "zebra")):
        shutil.copytree("policy", name)
        with open("policy/config.json") as f, open(f"{name}/config.json", "w") as g:
            g.write(f.read().replace(old, new))
        refused(capsys, lambda: run_main(mogrpo, *bench, f"--policy={name}"), name, part)
        dist.destroy_process_group()
    shutil.copytree("policy", "mute")
    os.remove("mute/tokenizer.json")
    refused(capsys, lambda: run_main(mogrpo, *bench, "--policy=mute"), "mute", "tokenizer")
    dist.destroy_process_group()
    shutil.copytree("policy", "cut")
    with open("cut/model.safetensors", "r+b") as f:
        f.truncate(1000)
    refused(capsys, lambda: run_main(mogrpo, *bench, "--policy=cut"), "cut")
    dist.destroy_process_group()
    os.remove("cut/model.safetensors")
    torch.save({}, "cut/pytorch_model.bin")  # a pickle is never read
    refused(capsys, lambda: run_main(mogrpo, *bench, "--policy=cut"), "cut")

def test_eval_sweeps_and_writes_without_a_reward_model(bench, capsys, monkeypatch):
    seen, real = [], evaluation.stated
    monkeypatch.setattr(evaluation, "stated", lambda messages, weights, axes: seen.append(weights.tolist()) or real(messages, weights, axes))
    flags = ["--policies=one=policy", "--prompts=prompts.jsonl", "--max_new_tokens=4", "--samples=2"]
    run_main(evaluation, *flags, "--reward_model=rm", "--sweep=kind", "--out_dir=swept")
    with open("swept/eval.json") as f:
        table = json.load(f)["table"]["all"]
    assert list(table["good"]) == [f"one {s}" for s in (0.0, 0.25, 0.5, 0.75, 1.0)] and len(rows_of("swept/samples.jsonl")) == 5 * 12 * 2
    assert [w for i, w in enumerate(seen) if i % 12 == 0] == [[1 - s, s] for s in (0.0, 0.25, 0.5, 0.75, 1.0)]
    run_main(evaluation, *flags, "--reward_model=", "--out_dir=plain")
    rows = rows_of("plain/samples.jsonl")
    assert len(rows) == 24 and all(r["scores"] == {} and r["response"] is not None and r["messages"] for r in rows)
    refused(capsys, lambda: run_main(evaluation, *flags, "--reward_model=rm", "--sweep=tone", "--out_dir=x"), "--sweep=tone", "good, kind")
    dist.destroy_process_group()
    if importlib.util.find_spec("matplotlib"):  # an optional extra
        two = ["--policies=one=policy,two=policy", *flags[1:], "--reward_model=rm", "--picture"]
        for extra in ([], ["--sweep=good"]):
            run_main(evaluation, *two, *extra, f"--out_dir=drawn{len(extra)}")
            assert os.path.getsize(f"drawn{len(extra)}/eval.png") > 5000
    else:
        refused(capsys, lambda: run_main(evaluation, *flags, "--reward_model=rm", "--picture", "--out_dir=drawn"), "matplotlib")

def spoiled_header(path):
    with open(path, "r+b") as f:
        f.seek(8)
        f.write(b"x" * 100)

def test_earlier_runs_are_kept_and_damaged_checkpoints_refused(bench, capsys):
    for _ in range(3):
        run_main(mogrpo, *bench)
    assert {"mogrpo", "mogrpo.1", "mogrpo.2"} <= set(os.listdir("out"))
    shard = "out/mogrpo/checkpoint/shard-00001-model-00001-of-00001.safetensors"
    with open(shard, "r+b") as f:
        f.truncate(os.path.getsize(shard) - 100)
    before = sorted(os.listdir("out/mogrpo"))
    capsys.readouterr()
    refused(capsys, lambda: run_main(mogrpo, *bench, "--steps=2", "--resume"), "checkpoint", "damaged")
    assert sorted(os.listdir("out/mogrpo")) == before
    dist.destroy_process_group()
    for spoil in (lambda: os.remove(shard), lambda: spoiled_header(shard), lambda: rm.write_text("out/mogrpo/checkpoint/state.json", "[1]"),
                  lambda: rm.write_text("out/mogrpo/checkpoint/state.json", "{bad")):
        shutil.copytree("out/mogrpo.1/checkpoint", "out/mogrpo/checkpoint", dirs_exist_ok=True)
        spoil()
        refused(capsys, lambda: run_main(mogrpo, *bench, "--steps=2", "--resume"), "checkpoint", "damaged")
        dist.destroy_process_group()
    shutil.copytree("out/mogrpo.1/checkpoint", "out/mogrpo/checkpoint", dirs_exist_ok=True)
    refused(capsys, lambda: run_main(mogrpo, *bench, "--steps=2", "--resume", "--lora_rank=2"), "checkpoint", "another model")
    dist.destroy_process_group()
    folder_of("wider", kind="llama")
    shutil.copytree("out/mogrpo.1/checkpoint", "out/mogrpo/checkpoint", dirs_exist_ok=True)
    refused(capsys, lambda: run_main(mogrpo, *bench, "--steps=2", "--resume", "--policy=wider"), "checkpoint", "another model")

def test_a_crash_while_saving_keeps_the_previous_checkpoint(bench, monkeypatch):
    run_main(mogrpo, *bench, "--steps=2", "--save_interval=1")
    good = open("out/mogrpo/checkpoint/state.json").read()
    os.makedirs("out/mogrpo/checkpoint.tmp")  # a half-written one
    assert mogrpo.find_checkpoint("out/mogrpo/checkpoint") == "out/mogrpo/checkpoint"
    os.rename("out/mogrpo/checkpoint", "out/mogrpo/checkpoint.old")  # a crash between the two renames
    assert mogrpo.find_checkpoint("out/mogrpo/checkpoint") == "out/mogrpo/checkpoint.old"
    run_main(mogrpo, *bench, "--steps=3", "--resume")
    assert json.loads(good)["step"] == 2 and json.load(open("out/mogrpo/checkpoint/state.json"))["step"] == 3

def test_command_line_of_every_script(bench):
    for script in ("mogrpo.py", "reward_model.py", "eval.py"):
        path = os.path.join(HERE, script)
        done = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True)
        assert done.returncode == 0 and "--seed" in done.stdout and "torchrun" in done.stdout
        done = subprocess.run([sys.executable, path, "--nonsense=1"], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.strip() == "error: unrecognized arguments: --nonsense=1"
