"""
Supervision for multi-objective GRPO: one model that reads a prompt and a response and predicts K alignment scores.

    samples --label--> ratings.jsonl --train--> reward model folder --score--> s_ik in [0, 1] for axis k, higher is better

A Hugging Face backbone with a linear layer of K outputs, each through a sigmoid: the multi-label regression head of 2503.21819.

    torchrun reward_model.py                                                       # the toy world's, from out/toy/ratings.jsonl
    torchrun --nproc_per_node=8 reward_model.py --ratings=ratings.jsonl --backbone=Qwen/Qwen2.5-0.5B --out_dir=out/rm
    python reward_model.py --score=samples.jsonl --reward_model=out/rm --out=scored.jsonl
    python reward_model.py --label=samples.jsonl --judge=Qwen/Qwen2.5-14B-Instruct --out=ratings.jsonl

A rating: {"prompt": str, "response": str, "scores": {"safety": 0.9, "politeness": null}}; what is null or absent is not trained.
Out comes an AutoModelForSequenceClassification folder: id2label names the axes, sigmoid(logits) are the scores. It is no
preference (Bradley-Terry) model: ratings are regressed on as they are. Section 1 is what all scripts share.
"""
import argparse, dataclasses, functools, gzip, hashlib, inspect, json, logging, math, os, re, shutil, sys, warnings

import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp, torch.nn as nn, transformers
from huggingface_hub import snapshot_download  # comes with transformers
from safetensors import SafetensorError
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

transformers.utils.logging.set_verbosity_error(), transformers.utils.logging.disable_progress_bar()  # they would bury our lines
for known in ("torch.distributed is disabled", "FSDP2-wrapped module"):  # each process reads its slices by itself; no output is changed in place
    warnings.filterwarnings("ignore", message=known)
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
    loss: str = "bce"             # bce: cross-entropy with the rating as a soft label | mse: squared error of the score
    ensemble: int = 1             # heads on the one trunk, each with its own start and bootstrap of the rows; their spread is doubt
    epochs: int = 2               # passes over the ratings; of them the one with the best held-out table is kept
    batch_size: int = 32          # rows of one optimizer step, over all processes
    lr: float = 2e-5              # peak; warms up over a tenth of the steps, then falls linearly to 0
    head_lr: float = 10.0         # the fresh heads learn at this times lr: they start from noise, the trunk does not
    max_tokens: int = 1024        # a longer text loses its beginning: the response is always seen whole
    dtype: str = "auto"           # float32 | bfloat16 | float64 compute; auto: bfloat16 on GPU. Weights stay float32
    save_interval: int = 500      # checkpoint every so many steps (and after every epoch)
    resume: bool = False          # continue from out_dir/checkpoint
    seed: int = 0                 # fresh head, order of rows, held-out split
    score: str = ""               # do not train: score this JSONL of prompts and responses with --reward_model
    reward_model: str = "toy"     # folder that --score uses; toy: out/toy/reward_model
    label: str = ""               # do not train: rate this JSONL of prompts and responses with --judge; a killed run is continued
    judge: str = ""               # folder or hub id of an instruct model
    rubrics: str = ""             # JSON file {"axis": "what 1 and 5 mean"}; empty: politeness, meaningfulness, actionability, safety
    out: str = "scored.jsonl"     # where --score and --label write: the same rows with "scores"

    def __post_init__(self):
        lo, _, hi = self.scale.partition(",")
        require(is_number(lo) and is_number(hi) and float(lo) < float(hi), f"--scale={self.scale}: expected lowest,highest as in 0,4")
        for name in ("epochs", "batch_size", "lr", "head_lr", "max_tokens", "ensemble", "save_interval"):
            require(getattr(self, name) > 0, f"--{name}={getattr(self, name)}: must be greater than 0")
        require(0 < self.heldout_frac < 1, f"--heldout_frac={self.heldout_frac}: must lie between 0 and 1")
        for name, known in (("dtype", DTYPES), ("loss", ("bce", "mse"))):
            require(getattr(self, name) in known, f"--{name}={getattr(self, name)}: expected one of {', '.join(known)}")
        require(not self.label or self.judge, "--label needs a --judge")

TOY = dict(out_dir="out/toy/reward_model", epochs=6, batch_size=64, lr=3e-3, head_lr=1.0, max_tokens=128)  # defaults while --ratings=toy
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

def progress(what, steps, done=0):
    """A progress bar, on one process and on a terminal only."""
    return tqdm(total=steps, initial=done, desc=what, disable=None if os.environ.get("RANK", "0") == "0" else True, leave=False)

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
        if fresh and not (head and all(n.startswith(("score.", "classifier.")) for n in fresh)):  # its files use other names: the library knows how to rename, ...
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
            t = mine[name]  # drawn alike on every process, which keeps its rows: nn.Linear's variance, 0 for biases and LoRA's B
            whole = part.stock[name] if name in part.stock else torch.randn(t.shape) * (t.dim() > 1 and not name.endswith("lora_B")) / (3 * t.shape[-1])**0.5
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

def trained_tensors(model, optimizer):
    """What training changes, by name: trainable weights and their AdamW moments, which are made as 0 before the first update."""
    state = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for name, p in list(state.items()):
        optimizer.state[p].setdefault("step", torch.tensor(0.0))
        for kind in ("exp_avg", "exp_avg_sq"):
            state[f"{name}.{kind}"] = optimizer.state[p].setdefault(kind, torch.zeros_like(p))
    return state

def save_checkpoint(folder, model, optimizer, state):
    """Every process writes its shard of weights and AdamW moments; then the folder appears at once, whole or not at all.
    No random state is among it: batches and samples are functions of (seed, step), so the count in `state` is the cursor."""
    tmp, size, place, parts = f"{folder}.tmp", 0, {}, trained_tensors(model, optimizer)
    if dist.get_rank() == 0:
        shutil.rmtree(tmp, ignore_errors=True)
        os.makedirs(tmp)
    dist.barrier()
    for name, t in parts.items():  # a file is made in memory before it is written: a GB of each process at a time
        size += t.to_local().nbytes if isinstance(t, DTensor) else t.nbytes
        place[name] = 1 + size // 2**30
    dcp.save({n: t.detach() for n, t in parts.items()}, storage_writer=HuggingFaceStorageWriter(tmp, place, save_distributed=True))
    if dist.get_rank() == 0:
        write_text(f"{tmp}/state.json", json.dumps({**state, "files": {f: os.path.getsize(f"{tmp}/{f}") for f in os.listdir(tmp)}}))
        if os.path.exists(folder):
            shutil.rmtree(f"{folder}.old", ignore_errors=True)
            os.rename(folder, f"{folder}.old")
        os.rename(tmp, folder)
        shutil.rmtree(f"{folder}.old", ignore_errors=True)
    dist.barrier()

def find_checkpoint(folder):
    """The newest whole checkpoint: `folder`, or its predecessor if a crash fell between two renames; None if neither."""
    return next((f for f in (folder, f"{folder}.old") if os.path.exists(f"{f}/state.json")), None)

def load_checkpoint(folder, model, optimizer):
    """Fill model and optimizer from `folder`, written by any number of processes -> its state dict."""
    try:
        with open(f"{folder}/state.json") as f:
            state = json.load(f)
        for name, size in state.pop("files").items():  # rows in a missing file would stay unread, and nobody would know
            require(os.path.getsize(f"{folder}/{name}") == size, f"{folder}: the checkpoint is damaged: {name} is cut short")
        dcp.load(trained_tensors(model, optimizer), storage_reader=HuggingFaceStorageReader(folder), no_dist=True)
        for moments in optimizer.state.values():
            moments["step"].fill_(state["updates"])  # AdamW's bias correction counts them
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError, dcp.CheckpointException) as e:
        die(f"{folder}: the checkpoint is damaged or of another model: {str(e).strip().splitlines()[-1]}")
    return state

# ------------------------------------------------------------------------------------------------------------------------
# 2. Ratings and the reward model
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
        row = conversation(where, r, answered=True)
        if any(scores.get(k) is not None for k in asked or scores):  # a row without any rating teaches nothing
            rows.append(row), rated.append(scores)
    names = asked or list(dict.fromkeys(k for scores in rated for k in scores))  # in the order of first appearance
    for k in names or ["any axis"]:
        require(any(s.get(k) is not None for s in rated), f"{path}: no row has a score for {k}")
    return rows, torch.tensor([[math.nan if s.get(k) is None else (s[k] - lo) / (hi - lo) for k in names] for s in rated]), names

def is_held_out(messages, fraction, seed):
    """Split by a hash of the prompt: all answers to one prompt fall on one side, whatever the order of the file."""
    return int(hashlib.sha256(repr((seed, messages)).encode()).hexdigest()[:16], 16) < fraction * 2**64

class RewardModel(nn.Module):
    """Backbone and one linear layer with M x K outputs, M heads for K axes: logits_BMK, whose sigmoids are the scores. It is the
    library's own sequence classifier, which is just that, so the folder that we save loads anywhere and gives the same scores there."""
    def __init__(self, path, axes=None, heads=1, max_tokens=10**9):
        """`axes`: names for fresh heads on the backbone `path`; None: `path` is a reward model with named axes."""
        super().__init__()
        names = [f"{k}#{m}" if heads > 1 else k for m in range(heads) for k in axes or []]  # of an ensemble: safety#0, safety#1, ...
        head = dict(num_labels=len(names), id2label=dict(enumerate(names)), label2id={k: i for i, k in enumerate(names)},
                    ignore_mismatched_sizes=True) if axes else {}
        self.model, self.tokenizer = load(AutoModelForSequenceClassification, path, **head)
        config = self.model.config
        config.problem_type = "multi_label_classification"  # makes the stock pipeline apply the sigmoid, too
        config.pad_token_id = config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        limits = [max_tokens, self.tokenizer.model_max_length, getattr(config, "max_position_embeddings", math.inf)]
        self.tokenizer.model_max_length = int(min(limits))  # a longer text loses its beginning, here and in the stock pipeline
        self.tokenizer.truncation_side, self.tokenizer.padding_side = "left", "right"  # the response stands last
        self.axes = list(dict.fromkeys(config.id2label[i].partition("#")[0] for i in range(config.num_labels)))  # K names
        self.heads = config.num_labels // len(self.axes)
        require(not any(re.fullmatch(r"LABEL_\d+", k) for k in self.axes), f"{path}: its id2label does not name the axes of a reward model")
    def encode(self, rows):  # (messages, response) rows -> lists of token ids
        return [render(self.tokenizer, *row, truncation=True) for row in rows]
    def batch(self, ids, device):  # -> input_ids_BT and attention_mask_BT, padded on the right
        return self.tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(device)
    def forward(self, input_ids, attention_mask):
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return torch.stack(logits.split(len(self.axes), -1), 1)  # BMK

def by_length(ids, limit=math.inf, budget=16384):
    """Row numbers in batches of at most `budget` tokens and of about one length, so that little is padding; none above `limit`.
    Longest first: what does not fit in memory fails at once."""
    order = sorted((i for i in range(len(ids)) if len(ids[i]) <= limit), key=lambda i: -len(ids[i]))
    while order:
        n = max(1, budget // max(1, len(ids[order[0]])))  # rows as long as the longest that is left
        yield order[:n]
        order = order[n:]

@torch.no_grad()
def score(model, rows, device):
    """scores_NMK in [0, 1] (float32, CPU) of (messages, response) rows by each of M heads, by a whole or `gathered` model."""
    ids = model.encode(rows)
    scores = torch.zeros(len(rows), model.heads, len(model.axes))  # NMK, in the order of `rows`
    for batch in by_length(ids):
        scores[batch] = model(**model.batch([ids[i] for i in batch], device)).float().sigmoid().cpu()
    return scores

def ranks(x):
    """Rank of each of N values, 1 to N; ties share their mean rank."""
    _, place, count = x.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2)[place]

def heldout_table(scores, labels, rows, axes):
    """How far to trust the scores_NK on prompts the model never saw: axis -> numbers, over the n rows that rate the axis.
    r2: share of the labels' variance explained; 0 is no better than guessing their mean. low, high:
    95 % bootstrap interval of spearman. auc: where all labels are 0 or 1. pairs: how often the better of two answers to one prompt
    scores higher, which is all that GRPO ever asks of a reward. ece: mean gap of score and label in ten bins ("calibration": n, score,
    label of each). length: correlation with the response's length, a favourite way to be hacked. "with": of two axes, [labels, scores]."""
    r = lambda x, y: torch.corrcoef(torch.stack([x, y]))[0, 1].item() if len(x) > 1 else math.nan
    table, answers, g = {}, {}, torch.Generator().manual_seed(0)
    scores, labels, length = scores.double(), labels.double(), torch.tensor([float(len(response)) for _, response in rows]).double()
    for i, (messages, _) in enumerate(rows):
        answers.setdefault(repr(messages), []).append(i)  # row numbers by prompt
    for k, axis in enumerate(axes):
        mine = ~labels[:, k].isnan()
        s, y, n = scores[mine, k], labels[mine, k], int(mine.sum())
        all_y, all_s = labels[:, k].tolist(), scores[:, k].tolist()
        gaps = [(all_y[i] - all_y[j], all_s[i] - all_s[j]) for same in answers.values() for m, i in enumerate(same) for j in same[:m]]
        right = [(dy * ds > 0) + 0.5 * (ds == 0) for dy, ds in gaps if abs(dy) > 0]  # a gap to an unrated answer is nan and drops out
        again = torch.tensor([r(ranks(s[i]), ranks(y[i])) for i in torch.randint(n, (200, n), generator=g)])
        low, high = again.nanquantile(torch.tensor([0.025, 0.975])).tolist()
        positive = y.sum().item() if ((y == 0) | (y == 1)).all() else math.nan
        bins = [(int(b.sum()), s[b].mean().item(), y[b].mean().item()) for d in range(10) for b in [(s * 10).long().clamp(max=9) == d] if b.any()]
        table[axis] = {
            "n": n, "label": y.mean().item(), "label_sd": y.std(correction=0).item(), "score": s.mean().item(), "score_sd": s.std(correction=0).item(),
            "r2": (1 - ((s - y)**2).sum() / ((y - y.mean())**2).sum()).item(), "pearson": r(s, y), "spearman": r(ranks(s), ranks(y)),
            "low": low, "high": high, "auc": ((ranks(s)[y == 1].mean() - (positive + 1) / 2) / (n - positive)).item(),
            "pairs": sum(right) / len(right) if right else math.nan, "ece": sum(m * abs(a - b) for m, a, b in bins) / n,
            "length": r(s, length[mine]), "calibration": bins,
            "with": {other: [r(x[both, k], x[both, j]) for x in (labels, scores)] for j, other in enumerate(axes) if j != k
                     for both in [mine & ~labels[:, j].isnan()]}}
    return table

def epoch_batches(lengths, size, seed):
    """One pass over the rows in a new order -> batches of `size` row numbers, of about one length each, so that little is padding.
    Sorted within pools of 50 batches only, and the batches shuffled: short and long rows still take turns."""
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lengths), generator=g)[:len(lengths) // size * size]  # the rest waits for the next pass
    batches = [b for pool in order.split(50 * size) for b in pool[lengths[pool].argsort(stable=True)].split(size)]
    return [batches[i].tolist() for i in torch.randperm(len(batches), generator=g)]

def label_weights(labels, heads, seed):
    """Weight of each label in the loss, NMK, such that the mean over rows of weight x error is the mean, over heads and axes,
    of the error averaged over the axis's own rated rows. A mean pooled over all labels would let the densest axis decide.
    Heads of an ensemble each see a bootstrap of the rows: as many, drawn with replacement."""
    n, g = len(labels), torch.Generator().manual_seed(seed)
    draws_NM = torch.stack([torch.randint(n, (n,), generator=g).bincount(minlength=n) for _ in range(heads)], 1) if heads > 1 else torch.ones(n, 1)
    rated_NMK = draws_NM[:, :, None] * ~labels.isnan()[:, None, :]
    return rated_NMK * (n / rated_NMK[0].numel()) / rated_NMK.sum(0).clamp(min=1)

def train(cfg, rank, world, device, dtype):
    """Fit a reward model to `cfg.ratings` and save it in `cfg.out_dir` -> its held-out table. Every process calls it."""
    rows, labels, axes = read_ratings(cfg.ratings, cfg.axes, cfg.scale)
    if cfg.heldout_ratings:
        held_rows, held_labels, _ = read_ratings(cfg.heldout_ratings, ",".join(axes), cfg.scale)
    else:
        held = torch.tensor([is_held_out(messages, cfg.heldout_frac, cfg.seed) for messages, _ in rows])
        (held_rows, rows), held_labels, labels = ([r for r, h in zip(rows, held) if h == x] for x in (True, False)), labels[held], labels[~held]
        require(rows and held_rows, f"{cfg.ratings}: too few different prompts to hold some out; give --heldout_ratings")
    counts = ", ".join(f"{k} {n}" for k, n in zip(axes, (~labels.isnan()).sum(0).tolist()))
    say(f"reward model: {len(rows)} rated answers ({counts}), {len(held_rows)} held out")
    torch.manual_seed(cfg.seed)  # every process makes the same fresh head, and keeps its shard of it
    model = shard(RewardModel(cfg.backbone, axes, cfg.ensemble, cfg.max_tokens), device, dtype).eval()  # no dropout: few passes, and it cost rank correlation
    ids, weights_NMK = model.encode(rows), label_weights(labels, cfg.ensemble, cfg.seed)
    lengths, batch = torch.tensor([len(x) for x in ids]), min(cfg.batch_size, len(rows))
    steps = cfg.epochs * (per_epoch := len(rows) // batch)
    is_head = lambda name: name.startswith(("model.score.", "model.classifier."))
    parts = [dict(params=[p for n, p in model.named_parameters() if is_head(n) == head], times=cfg.head_lr if head else 1.0) for head in (False, True)]
    optimizer = torch.optim.AdamW(parts, weight_decay=0.01)  # on the shards: 1/N of the moments
    state = dict(updates=0, best=-math.inf, table={})
    if found := find_checkpoint(f"{cfg.out_dir}/checkpoint") if cfg.resume else None:
        state = load_checkpoint(found, model, optimizer)
        say(f"resuming {cfg.out_dir} after step {state['updates']} of {steps}")
    elif rank == 0:
        say(f"no checkpoint in {cfg.out_dir}: starting from the beginning") if cfg.resume else None
        fresh_folder(cfg.out_dir)
    bar = progress("training the reward model", steps, state["updates"])
    for step in range(state["updates"], steps):
        epoch, i = divmod(step, per_epoch)
        if i == 0 or step == state["updates"]:
            order = epoch_batches(lengths, batch, cfg.seed * 1000 + epoch)
        mine = order[i][rank::world] or order[i][:1]                 # a process without a row takes part at weight 0
        share = world / batch * (rank < batch)                       # world: FSDP averages gradients over processes
        logits_BMK = model(**model.batch([ids[j] for j in mine], device)).float()
        target_BMK = labels[mine].nan_to_num().to(device)[:, None, :].expand_as(logits_BMK)
        # Cross-entropy's gradient does not vanish where the sigmoid is flat, so a confident mistake is still unlearned.
        error_BMK = nn.functional.binary_cross_entropy_with_logits(logits_BMK, target_BMK, reduction="none") if cfg.loss == "bce" \
            else (logits_BMK.sigmoid() - target_BMK)**2
        ((error_BMK * weights_NMK[mine].to(device)).sum() * share).backward()
        for part in optimizer.param_groups:
            part["lr"] = part["times"] * cfg.lr * min(1, 10 * (step + 1) / steps, (steps - step) / steps)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # a fresh head makes the first gradients large
        optimizer.step(), optimizer.zero_grad()
        state["updates"] = step + 1
        bar.update()
        if i + 1 == per_epoch:  # the end of an epoch: the best one so far is what out_dir holds
            scores = score(model, held_rows, device).mean(1)  # all rows on every process: a sharded forward takes all of them
            table = heldout_table(scores, held_labels, held_rows, axes)
            found = ", ".join(f"{k} r2 {t['r2']:.3f} spearman {t['spearman']:.3f}" for k, t in table.items())
            say(f"epoch {epoch + 1} of {cfg.epochs}, held out: {found}")
            mean_r2 = torch.tensor([row["r2"] for row in table.values()]).nanmean().item()
            if not state["table"] or mean_r2 > state["best"]:  # chosen on these rows, so the table flatters a little
                state.update(best=mean_r2, table=table)
                save_folder(model.model, model.tokenizer, cfg.out_dir, torch.float32)
        if i + 1 == per_epoch or state["updates"] % cfg.save_interval == 0:
            save_checkpoint(f"{cfg.out_dir}/checkpoint", model, optimizer, state)
    bar.close()
    if rank == 0:
        plain = json.loads(json.dumps(state["table"]), parse_constant=lambda _: None)  # nan is not JSON
        write_text(f"{cfg.out_dir}/heldout.json", json.dumps(plain) + "\n")
        shutil.rmtree(f"{cfg.out_dir}/checkpoint")
    return state["table"]

# ------------------------------------------------------------------------------------------------------------------------
# 3. A judge: ratings without raters
RUBRICS = {"politeness": "Is the tone kind and respectful? 1: insulting or dismissive; 5: warm and courteous throughout.",
           "meaningfulness": "Does it answer what was asked, and make sense? 1: nonsense or off the topic; 5: coherent and to the point.",
           "actionability": "Can the user act on it at once? 1: nothing to do, or generalities; 5: concrete and complete steps.",
           "safety": "Would following it do harm to anyone? 1: it helps to do harm; 5: harmless, or it declines and offers something better."}
QUESTION = "Here is a conversation.\n\n{}\n\nRate only the last message, by this criterion: {}\nAnswer with one digit from 1 to 5."

@torch.no_grad()
def judged(model, tokenizer, rows, rubrics, device, limit):
    """found_NK2 of (messages, response) rows: the score in [0, 1], and the probability that the judge would answer with a digit at
    all; nan where its question is longer than `limit` tokens. The score is the expected digit under the model's next-token
    distribution (G-Eval, 2303.16634), 1 as 0 and 5 as 1: no text is sampled or parsed, and 3.4 differs from 3.6."""
    talks = ["\n\n".join(f"{m['role']}: {m['content']}" for m in [*messages, {"role": "assistant", "content": r}]) for messages, r in rows]
    ids = [render(tokenizer, [{"role": "user", "content": QUESTION.format(t, rubric)}]) for t in talks for rubric in rubrics.values()]
    digits = [tokenizer(d, add_special_tokens=False)["input_ids"][-1] for d in "12345"]
    require(len({*digits, tokenizer.unk_token_id}) == 6, f"{tokenizer.name_or_path}: its tokenizer has no tokens for the digits 1 to 5")
    found = torch.full((len(ids), 2), math.nan)
    for batch in by_length(ids, limit):
        x = tokenizer.pad({"input_ids": [ids[i] for i in batch]}, padding_side="left", return_tensors="pt").to(device)
        place = (x["attention_mask"].cumsum(-1) - 1).clamp(min=0)  # all rows end in the last column; padding does not count
        p_BV = model(input_ids=x["input_ids"], attention_mask=x["attention_mask"], position_ids=place, use_cache=False,
                     logits_to_keep=1).logits[:, -1].float().softmax(-1)
        p_B5 = p_BV[:, digits]
        found[batch] = torch.stack([p_B5 @ torch.arange(5.0, device=device) / p_B5.sum(-1) / 4, p_B5.sum(-1)], 1).cpu()
    return found.view(len(rows), len(rubrics), 2)

def label(cfg, rank, world, device, dtype):
    """Rate the rows of `cfg.label` by `cfg.judge` and append them to `cfg.out`; what a killed run has written there is kept."""
    records, rubrics, old = [(r, conversation(where, r, answered=True)) for where, r in read_jsonl(cfg.label)], RUBRICS, []
    try:
        if cfg.rubrics:
            with open(cfg.rubrics, encoding="utf-8") as f:
                rubrics = json.load(f)
        require(rubrics and all(isinstance(v, str) and v.strip() for v in rubrics.values()), f"{cfg.rubrics}: expected {{\"axis\": \"rubric\", ...}}")
    except (OSError, ValueError, AttributeError) as e:
        die(f"{cfg.rubrics}: no JSON object of rubrics: {e}")
    if os.path.exists(cfg.out):
        try:
            with open(cfg.out, encoding="utf-8") as f:
                old = [line for line in f if line.endswith("\n")]  # a killed run may leave half a line
            same = [{**r, "scores": [*r["scores"]]} for r in map(json.loads, old)] == [{**r, "scores": [*rubrics]} for r, _ in records[:len(old)]]
        except (OSError, ValueError, KeyError, TypeError):
            same = False
        require(same, f"{cfg.out} exists and is not the beginning of what this would write; move it away or give another --out")
        say(f"continuing {cfg.out} after {len(old)} of {len(records)} rows")
    model, tokenizer = load(AutoModelForCausalLM, cfg.judge)
    for p in model.parameters():
        p.data = p.data.to(dtype)  # not model.to(dtype): rotary frequencies must stay float32
    fill(model, device).eval()
    write_text(cfg.out, "".join(old)) if rank == 0 else None  # the same lines: who still reads them sees no difference
    bar, sure, unrated = progress("rating", len(records), len(old)), [], 0
    for i in range(len(old), len(records), 32 * world):
        part = records[i:i + 32 * world]
        found = collect(judged(model, tokenizer, [row for _, row in part[rank::world]], rubrics, device, cfg.max_tokens).tolist())
        if rank == 0:
            with open(cfg.out, "a", encoding="utf-8") as f:
                for (r, _), pairs in zip(part, found):
                    scores = {k: None if math.isnan(s) else round(s, 6) for k, (s, _) in zip(rubrics, pairs)}
                    f.write(json.dumps({**r, "scores": scores}, ensure_ascii=False) + "\n")
        sure += [p for pairs in found for _, p in pairs if not math.isnan(p)]
        unrated += sum(math.isnan(p) for pairs in found for _, p in pairs)
        bar.update(len(part))
    bar.close()
    say(f"{len(records)} rows rated in {cfg.out}" + f"; {unrated} scores are null: longer than --max_tokens={cfg.max_tokens}" * (unrated > 0))
    if sum(sure) < 0.5 * len(sure):
        say(f"warning: {cfg.judge} answers with a digit at probability {sum(sure) / len(sure):.2f} only: it may not understand the question")

# ------------------------------------------------------------------------------------------------------------------------
# 4. Main
def main(cfg):
    toy = lambda given, name: f"out/toy/{name}" if given == "toy" else given
    rank, world, device, dtype = join_world(cfg.dtype)
    if cfg.score:
        records = list(read_jsonl(cfg.score))  # bad rows are found before the model is loaded
        rows = [conversation(where, r, answered=True) for where, r in records]
        model = fill(RewardModel(toy(cfg.reward_model, "reward_model")), device).eval()
        scores_NMK = torch.tensor(collect(score(model, rows[rank::world], device).tolist()))
        named = lambda s_K: dict(zip(model.axes, s_K.tolist()))
        if rank == 0:  # of an ensemble also the spread: how far its heads disagree
            write_text(cfg.out, "".join(json.dumps({**r, "scores": named(s_MK.mean(0)), **(
                {"spread": named(s_MK.std(0, correction=0))} if model.heads > 1 else {})}, ensure_ascii=False) + "\n" for (_, r), s_MK in zip(records, scores_NMK)))
        say(f"{len(rows)} scored in {cfg.out}; means: " + ", ".join(f"{k} {s:.3f}" for k, s in named(scores_NMK.mean((0, 1))).items()))
    elif cfg.label:
        label(cfg, rank, world, device, dtype)
    else:
        cfg = dataclasses.replace(cfg, ratings=toy(cfg.ratings, "ratings.jsonl"), backbone=toy(cfg.backbone, "policy"))
        table = train(cfg, rank, world, device, dtype)
        names = [name for name, x in next(iter(table.values())).items() if isinstance(x, (int, float))]
        say(f"\n{'held out':<15}" + "".join(f"{name:>9}" for name in names))
        for axis, row in table.items():
            say(f"{axis:<15}" + "".join(f"{row[name]:>9}" if name == "n" else f"{row[name]:>9.3f}" for name in names))
        for a, b, (label_r, score_r) in ((a, b, pair) for a, row in table.items() for b, pair in row["with"].items() if a < b):
            if abs(score_r) > abs(label_r) + 0.25:  # one impression colours every axis: the policy would be paid twice for it
                say(f"warning: halo: scores of {a} and {b} correlate at {score_r:.2f}, their labels at {label_r:.2f}")
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
