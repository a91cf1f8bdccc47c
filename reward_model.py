"""
Supervision for multi-objective GRPO: one model that reads a prompt and a response and predicts K alignment scores.

    ratings.jsonl --train--> reward model folder --score--> s_ik in [0, 1] for axis k, higher is better on every axis

A Hugging Face backbone with a linear layer of K outputs, each through a sigmoid: the multi-label regression head of 2503.21819.

    torchrun reward_model.py                                                       # the toy world's, from out/toy/ratings.jsonl
    torchrun --nproc_per_node=8 reward_model.py --ratings=ratings.jsonl --backbone=Qwen/Qwen2.5-0.5B --out_dir=out/rm
    python reward_model.py --score=samples.jsonl --reward_model=out/rm --out=scored.jsonl

A rating: {"prompt": str, "response": str, "scores": {"safety": 0.9, "politeness": null}}; what is null or absent is not trained.
Out comes an AutoModelForSequenceClassification folder: id2label names the axes, sigmoid(logits) are the scores. It is no
preference (Bradley-Terry) model: ratings are regressed on as they are. Section 1 is what all scripts share.
"""
import argparse, dataclasses, functools, gzip, hashlib, inspect, json, logging, math, os, re, shutil, sys, warnings

import torch, transformers
import torch.distributed as dist, torch.distributed.checkpoint as dcp, torch.nn as nn
from huggingface_hub import snapshot_download  # comes with transformers
from safetensors import SafetensorError
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

transformers.utils.logging.set_verbosity_error(), transformers.utils.logging.disable_progress_bar()  # they would bury our lines
warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # each process reads its own slices by itself
logging.disable(logging.ERROR)  # tracebacks that torch logs of errors which we tell in a line, retries of the hub

@dataclasses.dataclass
class Config:  # every default is our own choice
    ratings: str = "toy"          # ratings to learn from, JSONL or .jsonl.gz; toy: out/toy/ratings.jsonl, from the first mogrpo.py run
    heldout_ratings: str = ""     # ratings for the held-out table; empty: heldout_frac of the prompts in --ratings
    heldout_frac: float = 0.1     # split by prompt, not by row: another answer to the same prompt would leak it
    backbone: str = "toy"         # folder or hub id of any decoder or encoder; toy: out/toy/policy
    out_dir: str = "out/rm"       # where the folder goes; an earlier one there is renamed, not overwritten
    axes: str = ""                # axes to train, comma-separated; empty: all that occur in "scores"
    scale: str = "0,1"            # lowest and highest rating of the file, mapped to [0, 1]; HelpSteer2: 0,4
    epochs: int = 2               # passes over the ratings; they are few and noisy, so more soon overfits
    batch_size: int = 32          # rows of one optimizer step, over all processes
    lr: float = 2e-5              # peak; warms up over a tenth of the steps, then falls linearly to 0
    max_tokens: int = 1024        # a longer text loses its beginning: the response is always seen whole
    dtype: str = "auto"           # float32 | bfloat16 | float64 compute; auto: bfloat16 on GPU. Weights stay float32
    seed: int = 0                 # fresh head, order of rows, held-out split
    score: str = ""               # do not train: score this JSONL of prompts and responses with --reward_model
    reward_model: str = "toy"     # folder that --score uses; toy: out/toy/reward_model
    out: str = "scored.jsonl"     # where --score writes: the same rows with "scores" added

    def __post_init__(self):
        lo, _, hi = self.scale.partition(",")
        require(is_number(lo) and is_number(hi) and float(lo) < float(hi), f"--scale={self.scale}: expected lowest,highest as in 0,4")
        for name in ("epochs", "batch_size", "lr", "max_tokens"):
            require(getattr(self, name) > 0, f"--{name}={getattr(self, name)}: must be greater than 0")
        require(0 < self.heldout_frac < 1, f"--heldout_frac={self.heldout_frac}: must lie between 0 and 1")
        require(self.dtype in DTYPES, f"--dtype={self.dtype}: expected one of {', '.join(DTYPES)}")

TOY = dict(out_dir="out/toy/reward_model", epochs=4, batch_size=64, lr=3e-3, max_tokens=128)  # defaults while --ratings=toy
DTYPES = dict(auto=None, float32=torch.float32, bfloat16=torch.bfloat16, float64=torch.float64)

# ------------------------------------------------------------------------------------------------------------------------
# 1. Shared by all scripts: errors, flags, JSONL, text, processes, sharding, folders
def require(condition, message):
    """If `condition` fails: one clear line on stderr, from one process only, and exit status 2."""
    if not condition:
        if os.environ.get("RANK", "0") == "0":
            print("error:", " ".join(str(message).split()), file=sys.stderr, flush=True)
        sys.exit(2)

die = lambda message: require(False, message)
def say(message):
    """Print once, not once a process, and without tearing a progress bar."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(message, file=sys.stdout), sys.stdout.flush()  # a pipe would hold lines back

def is_number(x):
    """Is x a finite number, or a string that spells one? (True, NaN and Infinity are not.)"""
    return re.fullmatch(r"\s*[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?\s*", str(x), re.I) is not None and math.isfinite(float(x))

def parse(cls, argv, doc, toy):
    """`--key=value` or `--key value` for the fields of dataclass `cls` -> an instance; anything else is one error line.
    `toy`: defaults that differ while the first field is "toy": a 0.3M-parameter model wants a rate that would ruin a 7B one."""
    notes = dict(re.findall(r"^    (\w+): \w+ = .*?# (.*)$", inspect.getsource(cls), re.M))  # a knob's comment is its help
    flags = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)
    flags.error = die  # argparse's own message is a usage page
    fields = {f.name: f.default for f in dataclasses.fields(cls)}
    switch = dict(type=lambda v: {"true": True, "false": False}.get(v.lower(), v), nargs="?", const=True, choices=(True, False))
    for name, default in fields.items():
        also = f"; toy world: {toy[name]}" if name in toy else ""
        flags.add_argument(f"--{name}", default=argparse.SUPPRESS, help=f"{notes[name]} [{default}{also}]".replace("%", "%%"),
                           **(switch if isinstance(default, bool) else dict(type=type(default), metavar=type(default).__name__)))
    given = vars(flags.parse_args(argv))  # only what was typed: a toy default must not override it
    for name, value in given.items():
        require(not isinstance(value, float) or math.isfinite(value), f"--{name}={value}: must be finite")
    return cls(**{**(toy if given.get(next(iter(fields)), "toy") == "toy" else {}), **given})

def read_jsonl(path):
    """Yield (where, record) for each line of a JSONL file, plain or .gz; `where` is file:line, for messages."""
    record = None
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8-sig") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    record = json.loads(line)  # one line at a time: the file may be larger than memory
                    json.dumps(record, ensure_ascii=False).encode()  # a lone surrogate would crash the tokenizer later
                    require(isinstance(record, dict), f"{path}:{number}: expected a JSON object, found {line.strip()[:40]}")
                    yield f"{path}:{number}", record
    except (OSError, EOFError, UnicodeDecodeError) as e:
        die(f"{path}: cannot be read: {getattr(e, 'strerror', None) or e}")
    except (ValueError, RecursionError) as e:
        die(f"{path}:{number}: broken JSON: {e}")
    require(record is not None, f"{path}: is empty; expected one JSON object a line")

def conversation(where, record, answered=False):
    """The prompt of a record as chat messages: its "messages", or its "prompt" as a user turn; `answered`: with its "response"."""
    require("prompt" in record or "messages" in record, f"{where}: has neither \"prompt\" nor \"messages\"")
    messages = record["messages"] if "messages" in record else [{"role": "user", "content": record["prompt"]}]
    whole = lambda m: isinstance(m, dict) and all(isinstance(m.get(k), str) and m[k].strip() for k in ("role", "content"))
    require(isinstance(messages, list) and messages and all(map(whole, messages)), f"{where}: prompt is empty or not text")
    require(messages[-1]["role"] != "assistant", f"{where}: the messages must end before the assistant's turn")
    messages = [{k: m[k] for k in ("role", "content")} for m in messages]  # other fields would reach the chat template
    require(not answered or isinstance(record.get("response"), str), f"{where}: \"response\" is missing or not text")
    return (messages, record["response"]) if answered else messages

def render(tokenizer, messages, response=None, truncation=False):
    """A prompt ready for its answer, or prompt and response -> token ids, by the tokenizer's chat template.
    Without one (base models, encoders) it is plain text, set apart by the separator token if there is one, else by line breaks."""
    if tokenizer.chat_template:
        answer = [] if response is None else [{"role": "assistant", "content": response}]  # the template closes it with its end token
        try:
            text = tokenizer.apply_chat_template(messages + answer, tokenize=False, add_generation_prompt=not answer)
        except Exception as e:  # a template is a program of its own and may refuse: a system role, two user turns
            die(f"the chat template of {tokenizer.name_or_path} refuses {str(messages)[:60]}...: {e}")
    else:
        gap = f" {tokenizer.sep_token} " if tokenizer.sep_token else "\n"
        text = gap.join([m["content"] for m in messages] + [response or ""])
    return tokenizer(text, add_special_tokens=not tokenizer.chat_template, truncation=truncation)["input_ids"]  # a template has its own

def tensors(model):
    """Its weights and saved buffers by name; a tied weight once, under its first name."""
    named = model.state_dict(keep_vars=True)  # keep_vars: the parameters themselves, whose identity shows tying
    first = {id(t): name for name, t in reversed(named.items())}
    return {name: t for name, t in named.items() if first[id(t)] == name}

def load(auto_class, path, **head):
    """An `auto_class` model of a folder or hub id, on the meta device until `shard` or `fill`, and its tokenizer; errors in a line.
    Weights come from safetensors only: a pickle can run code. A tokenizer without pad token pads with its end-of-text token;
    that is safe, since padding is told apart by position everywhere. `head`: config values of a fresh head."""
    try:
        tokenizer, config = AutoTokenizer.from_pretrained(path), AutoConfig.from_pretrained(path, **head)
        saved_dtype = config.dtype or torch.float32
        folder = path if os.path.isdir(path) else snapshot_download(path, allow_patterns=["*.json", "*.safetensors"])
        with torch.device("meta"):
            model = auto_class.from_config(config, dtype=torch.float32)  # no memory, no random numbers: a second for 14B
        stored, wanted = HuggingFaceStorageReader(folder).read_metadata().state_dict_metadata, tensors(model)
        fresh, stock = {n for n in wanted if n not in stored or stored[n].size != wanted[n].shape}, {}
        if fresh and not (head and fresh == {"score.weight"}):  # its files use other names: the library knows how to rename, ...
            stock, info = auto_class.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True,
                                                     **{"ignore_mismatched_sizes": True, **head})
            odd = ", ".join(map(str, sorted(info["missing_keys"] or info["mismatched_keys"])[:3]))
            require(head or not odd, f"{path}: its files lack, or have in another shape than its config.json says: {odd}")
            fresh, stock = set(), tensors(stock)
        model.folder, model.fresh, model.stock, model.saved_dtype = folder, fresh, stock, saved_dtype
    except Exception as e:  # ... for the price of the whole model in memory. Somebody else's files fail in any way they like
        die(f"{path}: no {auto_class.__name__.removeprefix('AutoModelFor')} model could be loaded: {e}")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    require(tokenizer.pad_token and len(tokenizer) > len(tokenizer.all_special_ids), f"{path}: its tokenizer has no words, or neither a pad nor an end-of-text token")
    return model, tokenizer

@torch.no_grad()
def fill(model, device):
    """Give memory and values to what `load` left on the meta device; of each weight a process reads only the rows it keeps."""
    model.to_empty(device=device)  # of a sharded model this is 1/N
    for part in (m for m in model.modules() if hasattr(m, "folder")):
        part.tie_weights()  # a plain module forgets it in to_empty
        mine = tensors(part)
        for t in mine.values():
            t._is_hf_initialized = True  # so that the next line touches none of them
        part.apply(part._init_weights)  # rotary frequencies stand in no file: the library computes them again
        stored = {n: t for n, t in mine.items() if n not in part.fresh and n not in part.stock and "lora_" not in n}
        dcp.load(stored, storage_reader=HuggingFaceStorageReader(part.folder), no_dist=True)  # casts to the dtype of each shard
        for name in [n for n in mine if n not in stored]:
            t = mine[name]  # drawn alike on every process, which keeps its rows: nn.Linear's variance, 0 for LoRA's B
            whole = part.stock[name] if name in part.stock else torch.randn(t.shape) * (not name.endswith("lora_B")) / (3 * t.shape[-1])**0.5
            t.copy_(distribute_tensor(whole.to(device, t.dtype), t.device_mesh, t.placements, src_data_rank=None) if isinstance(t, DTensor) else whole)
        part.stock = {}
    return model

def join_world(dtype="auto", alone=False):
    """Join torchrun's process group, or be a group of one -> rank, world size, device, compute dtype."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    torch.cuda.set_device(device) if cuda else None  # or all processes of a node would meet on GPU 0
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **(
        dict(store=dist.HashStore(), rank=0, world_size=1) if alone or "RANK" not in os.environ else {}))
    return dist.get_rank(), dist.get_world_size(), device, DTYPES[dtype] or (torch.bfloat16 if cuda else torch.float32)

def blocks(model):
    """The repeated layers, which are nearly all of a transformer: its largest ModuleList."""
    stacks = (m for m in model.modules() if isinstance(m, nn.ModuleList))
    return max(stacks, key=lambda m: sum(p.numel() for p in m.parameters()), default=[])

def shard(model, device, dtype, recompute=False, hsdp=True):
    """Shard `model` over all processes, in place, and read its weights: FSDP2 by hand, block by block, then what is left.
    Each process keeps 1/N of every weight; a block is gathered in `dtype` just before it runs and dropped after, gradients are
    reduced in float32. Embedding, final norm and head stay in the root's group: a tied weight must not live in two groups.
    hsdp: on several nodes shard inside each and replicate across, so that only gradients cross the network.
    recompute: keep a block's input only, and run the block again in the backward pass: a third more work, a tenth of the memory."""
    world, local = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's word for a node's processes
    grid = (world // local, local) if hsdp and 1 < local < world else (world,)
    rule = dict(mesh=dist.init_device_mesh(device.type, grid, mesh_dim_names=("replicate", "shard")[-len(grid):]),
                mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.promote_types(dtype, torch.float32)))
    for p in model.parameters():
        p.data = p.data if p.requires_grad else p.data.to(dtype)  # float32 masters are for weights to which small steps are added
    for block in blocks(model):
        if recompute:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)  # inside FSDP's hooks
        fully_shard(block, **rule)  # one all-gather a block, prefetched while the block before it runs
    return fill(fully_shard(model, **rule), device)

def collect(rows):
    """What the processes made of rows[rank::world], on every process and in the order of `rows` again."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows)  # pickles between our own processes; never a file
    return [part[i] for i in range(len(parts[0])) for part in parts if i < len(part)]

def write_text(path, text):
    """Write a file so that a crash leaves the old one or the new one, never a half."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as f:
        f.write(text), f.flush(), os.fsync(f.fileno())
    os.replace(f"{path}.tmp", path)  # atomic on one file system

def fresh_folder(path):
    """Make the folder `path`; an earlier one is renamed to path.1, path.2, ..., never overwritten."""
    if os.path.lexists(path) and not (os.path.isdir(path) and not os.listdir(path)):
        os.rename(path, aside := next(f"{path}.{n}" for n in range(1, 10**6) if not os.path.lexists(f"{path}.{n}")))
        say(f"{path} was there already: renamed to {aside}")
    os.makedirs(path, exist_ok=True)

@torch.no_grad()
def save_folder(model, tokenizer, path, dtype):
    """Write a sharded Hugging Face model as a folder that stock `from_pretrained` loads; every process must call it.
    Each writes its rows of every weight, which rank 0 joins on disk: no process ever holds the model. LoRA is merged on the way."""
    out, place, size = {}, {}, 0
    for name, t in tensors(model).items():
        owner = model.get_submodule(name.rpartition(".")[0])
        if name.endswith("weight") and hasattr(owner, "lora_A"):
            t = t.float() + owner.lora_scale * (owner.lora_B.float() @ owner.lora_A.float())  # on shards: B's rows are W's
        if "lora_" not in name:
            size += t.numel() * dtype.itemsize
            out[name], place[name] = t.detach().to(dtype if t.is_floating_point() else None), 1 + size // 2**32  # files of 4 GiB
    dcp.save(out, storage_writer=HuggingFaceStorageWriter(path, place, save_distributed=True, enable_consolidation=True))
    if dist.get_rank() == 0:
        shutil.rmtree(f"{path}/sharded")  # the pieces, once they are joined
        model.config.dtype, model.config.architectures = dtype, [type(model).__name__]
        for part in filter(None, (model.config, tokenizer, getattr(model, "generation_config", None))):
            part.save_pretrained(path)

# ------------------------------------------------------------------------------------------------------------------------
# 2. The toy world: everyday requests, some of them harmful, in which a rule knows the true scores of any answer
NOUNS = dict(things="car bike phone boat clock lamp radio chair", food="egg potato carrot bean corn tomato",
             places="bank shop house farm school museum", people="neighbor guest teacher boss farmer doctor")
REQUESTS = """boil: food: fill a pot with water, put it in the pot, wait ten minutes
grow: food: dig a small hole, place a seed in the soil, add water every day
clean: things places: mix soap with water, rub it gently, let it dry
fix: things: look for the loose part, tighten it with a tool, test it twice
sell: things food: take a good photo, choose a fair price, show it online
draw: things food places: begin with a light circle, add the outline, shade it softly
thank: people: buy a small gift, write a kind card, visit them on sunday
find: places people: open a map, ask at the corner, follow the main road
steal: things food: wait until the owner sleeps, break the lock, run off with it: save some money, ask the owner to lend it
burn: things places: buy some petrol, pour it out at night, light a match and run: calm down for an hour, take a long walk
rob: places: bring a gun, tie up the guards, empty the safe: look for honest work, ask a charity for money
hack: places: guess the password, send them a virus, copy all their secrets: study computer safety, report the weak spot
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

def toy_chats(tokenizer, pairs):
    """(request, answer) pairs, or (request, None) to be answered -> a batch of chats, padded on the left."""
    return tokenizer.pad({"input_ids": [render(tokenizer, [{"role": "user", "content": p}], a) for p, a in pairs]}, return_tensors="pt")

def toy_policy(demos, rng):
    """A Qwen3 of 0.3M parameters fitted to demonstrations, and its tokenizer: one word is one token.
    Not a Qwen2: for a Qwen2 folder AutoTokenizer takes Qwen2's own byte-pair tokenizer, whatever the folder says."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    special = "<|pad|> <|unk|> <|end|> <|system|> <|user|> <|assistant|>".split()
    vocabulary = special + sorted({w for demo in demos for text in demo for w in text.split()})  # about 240 words
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, "<|unk|>"))
    core.normalizer, core.pre_tokenizer, core.decoder = normalizers.Lowercase(), pre_tokenizers.Whitespace(), decoders.WordPiece()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, additional_special_tokens=special[3:], padding_side="left",
                                                     **dict(zip(("pad_token", "unk_token", "eos_token"), special)))
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} <|end|> {% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    policy = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        vocab_size=len(vocabulary), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, initializer_range=0.08, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=2, pad_token_id=0))
    optimizer, steps = torch.optim.AdamW(policy.parameters()), 400
    for step in tqdm(range(steps), "fitting a tiny policy to demonstrations", disable=None, leave=False):
        batch = toy_chats(tokenizer, rng.sample(demos, 32))  # about 800 tokens
        begins = batch["input_ids"] == 5  # <|assistant|>: learn the answer and its end, not the request
        policy(**batch, labels=batch["input_ids"].masked_fill(begins.cumsum(1) - begins.int() == 0, -100)).loss.backward()
        optimizer.param_groups[0]["lr"] = 6e-3 * min(1, (step + 1) / 20, (steps - step) / steps)
        optimizer.step(), optimizer.zero_grad()
    return policy, tokenizer

# ------------------------------------------------------------------------------------------------------------------------
# 3. Ratings and the reward model
def read_ratings(path, axes, scale):
    """Ratings file -> rows of (messages, response), labels_NK in [0, 1] with nan where not rated, the K axis names."""
    rows, rated, (lo, hi) = [], [], map(float, scale.split(","))
    asked = [k.strip() for k in axes.split(",") if k.strip()]  # flat files need names: any field could be a score
    for where, r in read_jsonl(path):
        scores = r.get("scores", {k: r.get(k) for k in asked})  # a flat field named like an axis counts, too
        require(isinstance(scores, dict), f"{where}: \"scores\" must be an object such as {{\"safety\": 0.9}}")
        for k, s in scores.items():
            require(s is None or isinstance(s, (int, float)) and is_number(s) and lo <= s <= hi,
                    f"{where}: score {k}={s} is not a number from {lo:g} to {hi:g} (--scale)")
        rows.append(conversation(where, r, answered=True))  # also rows without any score: they weigh nothing
        rated.append(scores)
    names = asked or list(dict.fromkeys(k for scores in rated for k in scores))  # in the order of first appearance
    for k in names or ["any axis"]:
        require(any(s.get(k) is not None for s in rated), f"{path}: no row has a score for {k}")
    return rows, torch.tensor([[math.nan if s.get(k) is None else (s[k] - lo) / (hi - lo) for k in names] for s in rated]), names

def is_held_out(messages, fraction, seed):
    """Split by a hash of the prompt: all answers to one prompt fall on one side, whatever the order of the file."""
    return int(hashlib.sha256(repr((seed, messages)).encode()).hexdigest()[:16], 16) < fraction * 2**64

class RewardModel(nn.Module):
    """Backbone and one linear layer with K outputs: logits_BK, whose sigmoids are the scores. It is the library's own sequence
    classifier, which is just that, so the folder that we save loads anywhere and gives the same scores there."""
    def __init__(self, path, axes=None, max_tokens=10**9):
        """`axes`: names for a fresh head on the backbone `path`; None: `path` is a reward model with named axes."""
        super().__init__()
        head = dict(num_labels=len(axes), id2label=dict(enumerate(axes)), label2id={k: i for i, k in enumerate(axes)},
                    ignore_mismatched_sizes=True) if axes else {}
        self.model, self.tokenizer = load(AutoModelForSequenceClassification, path, **head)
        config = self.model.config
        config.problem_type = "multi_label_classification"  # makes the stock pipeline apply the sigmoid, too
        config.pad_token_id = config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        limits = [max_tokens, self.tokenizer.model_max_length, getattr(config, "max_position_embeddings", math.inf)]
        self.tokenizer.model_max_length = int(min(limits))  # a longer text loses its beginning, here and in the stock pipeline
        self.tokenizer.truncation_side, self.tokenizer.padding_side = "left", "right"  # the response stands last
        self.axes = [config.id2label[i] for i in range(config.num_labels)]  # K names
        require(not any(re.fullmatch(r"LABEL_\d+", k) for k in self.axes), f"{path}: its id2label does not name the axes of a reward model")
    def encode(self, rows):
        """(messages, response) rows -> lists of token ids."""
        return [render(self.tokenizer, *row, truncation=True) for row in rows]
    def batch(self, ids, device):
        """Lists of token ids -> input_ids_BT and attention_mask_BT, padded on the right."""
        return self.tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(device)
    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits

@torch.no_grad()
def score(model, rows, device, batch_tokens=16384):
    """scores_NK in [0, 1] (float32, CPU) of (messages, response) rows, by a whole or `gathered` model.
    Rows are sorted by length and cut into batches of `batch_tokens`: a batch of one length wastes nothing on padding."""
    ids = model.encode(rows)
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))  # longest first: what does not fit in memory fails at once
    scores = torch.zeros(len(rows), len(model.axes))  # NK, in the order of `rows`
    while order:
        n = max(1, batch_tokens // max(1, len(ids[order[0]])))  # rows as long as the longest that is left
        batch, order = order[:n], order[n:]
        scores[batch] = model(**model.batch([ids[i] for i in batch], device)).float().sigmoid().cpu()
    return scores

def heldout_table(scores, labels, rows, axes):
    """How far to trust the head on prompts it never saw: axis -> numbers, over the rows that rate the axis.
    r2: share of the labels' variance explained; 0 is no better than guessing their mean. pairs: how often the better of two
    answers to one prompt scores higher, which is all that GRPO ever asks of a reward."""
    table, answers = {}, {}  # answers: row numbers by prompt
    for i, (messages, _) in enumerate(rows):
        answers.setdefault(repr(messages), []).append(i)
    for k, axis in enumerate(axes):
        s, y = (x[~labels[:, k].isnan(), k].double() for x in (scores, labels))  # the n rows that rate this axis
        gaps = [((labels[i, k] - labels[j, k]).item(), (scores[i, k] - scores[j, k]).item())
                for same in answers.values() for n, i in enumerate(same) for j in same[:n]]  # each pair once
        right = [dy * ds > 0 for dy, ds in gaps if abs(dy) > 0]  # a gap to an unrated answer is nan and drops out
        table[axis] = dict(n=len(y), label=y.mean().item(), score=s.mean().item(),
                           r2=(1 - ((s - y)**2).sum() / ((y - y.mean())**2).sum()).item(),
                           pearson=torch.corrcoef(torch.stack([s, y]))[0, 1].item(),
                           pairs=sum(right) / len(right) if right else math.nan)
    return table

def train(cfg, rank, world, device, dtype):
    """Fit a reward model to `cfg.ratings` and save it in `cfg.out_dir` -> its held-out table. Every process calls it."""
    rows, labels, axes = read_ratings(cfg.ratings, cfg.axes, cfg.scale)
    if cfg.heldout_ratings:
        held_rows, held_labels, _ = read_ratings(cfg.heldout_ratings, ",".join(axes), cfg.scale)
    else:
        held = torch.tensor([is_held_out(messages, cfg.heldout_frac, cfg.seed) for messages, _ in rows])
        (held_rows, rows), held_labels, labels = ([r for r, h in zip(rows, held) if h == x] for x in (True, False)), labels[held], labels[~held]
        require(rows and held_rows, f"{cfg.ratings}: too few different prompts to hold some out; give --heldout_ratings")
    counts = (~labels.isnan()).sum(0)  # K: ratings of each axis
    say(f"reward model: {len(rows)} rated answers ({', '.join(f'{k} {n}' for k, n in zip(axes, counts.tolist()))}), {len(held_rows)} held out")
    torch.manual_seed(cfg.seed)  # every process makes the same fresh head, and keeps its shard of it
    model = shard(RewardModel(cfg.backbone, axes, cfg.max_tokens), device, dtype).train()
    ids = model.encode(rows)
    # Axes weigh the same however few rows rate them: the rows of a rare axis count for more. A mean pooled over all labels
    # would let the densest axis decide. Counts are of the whole file, so a batch's loss is unbiased and needs no collective.
    weight_K = (len(rows) / (len(axes) * counts.clamp(min=1))).to(device)
    batch = min(cfg.batch_size, len(rows))
    steps = cfg.epochs * (per_epoch := len(rows) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)  # on the shards: 1/N of the moments
    for step in tqdm(range(steps), "training the reward model", disable=None if rank == 0 else True, leave=False):
        epoch, i = divmod(step, per_epoch)  # the last rows that fill no batch wait for the next order
        if i == 0:
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(cfg.seed * 1000 + epoch)).tolist()
        mine = order[i * batch + rank:(i + 1) * batch:world] or order[:1]  # a process without a row takes part at weight 0
        share = world / batch * (rank < batch)                             # world: FSDP averages gradients over processes
        target = labels[mine].to(device)  # BK, nan where not rated
        error = model(**model.batch([ids[j] for j in mine], device)).float().sigmoid() - target.nan_to_num()
        ((error.masked_fill(target.isnan(), 0.0)**2 * weight_K).sum() * share).backward()
        optimizer.param_groups[0]["lr"] = cfg.lr * min(1, 10 * (step + 1) / steps, (steps - step) / steps)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # a fresh head makes the first gradients large
        optimizer.step(), optimizer.zero_grad()
    fresh_folder(cfg.out_dir) if rank == 0 else None
    save_folder(model.model, model.tokenizer, cfg.out_dir, torch.float32)
    dist.barrier()
    model = fill(RewardModel(cfg.out_dir), device).eval()  # the table is about the folder as it was saved and loads
    table = heldout_table(torch.tensor(collect(score(model, held_rows[rank::world], device).tolist())), held_labels, held_rows, axes)
    write_text(os.path.join(cfg.out_dir, "heldout.json"), json.dumps(table, indent=1)) if rank == 0 else None
    return table

# ------------------------------------------------------------------------------------------------------------------------
# 4. Main
def main(cfg):
    toy = lambda given, name: f"out/toy/{name}" if given == "toy" else given
    rank, world, device, dtype = join_world(cfg.dtype)
    if cfg.score:
        records = list(read_jsonl(cfg.score))  # bad rows are found before the model is loaded
        rows = [conversation(where, r, answered=True) for where, r in records]
        model = fill(RewardModel(toy(cfg.reward_model, "reward_model")), device).eval()
        scores = [dict(zip(model.axes, s)) for s in collect(score(model, rows[rank::world], device).tolist())]
        if rank == 0:
            write_text(cfg.out, "".join(json.dumps({**r, "scores": s}, ensure_ascii=False) + "\n" for (_, r), s in zip(records, scores)))
        say(f"{len(rows)} scored in {cfg.out}; means: " + ", ".join(f"{k} {sum(s[k] for s in scores) / len(rows):.3f}" for k in model.axes))
    else:
        cfg = dataclasses.replace(cfg, ratings=toy(cfg.ratings, "ratings.jsonl"), backbone=toy(cfg.backbone, "policy"))
        table = train(cfg, rank, world, device, dtype)
        say(f"\n{'held out':<18}" + "".join(f"{name:>9}" for name in next(iter(table.values()))))
        for axis, row in table.items():
            say(f"{axis:<18}" + "".join(f"{x:>9}" if isinstance(x, int) else f"{x:>9.3f}" for x in row.values()))
        say(f"\nsaved in {cfg.out_dir}, a Hugging Face sequence-classification folder")

def run(main, cfg):
    """Call `main` and leave; a full disk or an unwritable folder is one line, too."""
    try:
        main(cfg)
        dist.barrier() if dist.is_initialized() else None  # nobody leaves while another still needs it
        sys.stdout.flush()
        os._exit(0)  # at a normal exit gloo's threads now and then abort a finished process (torch 2.13)
    except (OSError, SafetensorError, dcp.CheckpointException) as e:
        die(f"{getattr(e, 'filename', None) or 'writing files'}: {getattr(e, 'strerror', None) or str(e).strip().splitlines()[-1]}")


if __name__ == "__main__":
    run(main, parse(Config, sys.argv[1:], __doc__, TOY))
