"""
Supervision for multi-objective GRPO: one model that reads (prompt, response) and predicts K alignment scores.

    ratings.jsonl --train--> reward model folder --score--> s_ik in [0, 1], higher is better on every axis k

The model is any Hugging Face backbone with one linear layer of K outputs on top and a sigmoid on each output (the
multi-label regression head of arXiv 2503.21819). One trunk serves all axes: K scores cost one forward, and axes with few
ratings borrow the features of axes with many. A rating may leave axes out; what is not rated is not trained.

    torchrun reward_model.py                                    # the toy world: out/toy/ratings.jsonl, CPU, seconds
    torchrun --nproc_per_node=8 reward_model.py --ratings=ratings.jsonl --backbone=Qwen/Qwen2.5-0.5B --out_dir=out/rm
    python reward_model.py --score=samples.jsonl --reward_model=out/rm --out=scored.jsonl

A rating is one line of JSON: {"prompt": str, "response": str, "scores": {"safety": 0.9, "politeness": null, ...}}.
The folder written is an ordinary AutoModelForSequenceClassification folder: id2label names the axes, sigmoid(logits) are
the scores. What it is not: a preference (Bradley-Terry) model, or a judge; ratings are regressed on as they are.
This file also holds what all scripts share (section 1) and the toy world that needs no download (section 2).
"""
import contextlib, dataclasses, difflib, gzip, hashlib, inspect, json, math, os, random, re, shutil, sys
from dataclasses import dataclass

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the tokenizers' own threads clash with forked workers
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

transformers.utils.logging.set_verbosity_error()  # its warnings on fresh heads and weight loading would bury our lines
transformers.utils.logging.disable_progress_bar()


@dataclass
class Config:
    # training: every default is our own choice
    ratings: str = "toy"          # ratings to learn from, JSONL or .jsonl.gz; toy = out/toy/ratings.jsonl
    heldout_ratings: str = ""     # ratings for the held-out table; empty: heldout_frac of the prompts of --ratings
    heldout_frac: float = 0.1     # split by prompt, never by row: a prompt's other answers would leak it
    backbone: str = "toy"         # folder or hub id of any decoder or encoder; toy = out/toy/policy
    out_dir: str = "out/rm"       # where the folder goes; an earlier one there is renamed, not overwritten
    axes: str = ""                # axes to train, comma-separated; empty: all that occur in the ratings
    scale: str = "0,1"            # lowest and highest rating in the file, mapped to [0, 1] (HelpSteer2: 0,4)
    epochs: int = 2               # more overfits: ratings are few and noisy
    batch_size: int = 32          # rows of one optimizer step, over all processes
    lr: float = 2e-5              # peak; linear warm-up over a tenth of the steps, then linear decay to 0
    weight_decay: float = 0.01    # AdamW's, on every weight
    max_tokens: int = 1024        # longer texts lose their beginning, so the response is always seen
    dtype: str = "auto"           # bfloat16 | float32 compute; auto: bfloat16 on GPU. Weights stay float32
    seed: int = 0                 # head init, order of rows, held-out split
    # scoring instead of training
    score: str = ""               # samples to score, JSONL with prompt and response
    reward_model: str = "toy"     # folder that --score uses; toy = out/toy/reward_model
    out: str = "scored.jsonl"     # where the scored samples go: the same rows with "scores" added

    def __post_init__(self):
        lo_hi = self.scale.split(",")
        require(len(lo_hi) == 2 and all(map(is_number, lo_hi)) and float(lo_hi[0]) < float(lo_hi[1]),
                f"--scale={self.scale}: expected lowest,highest such as 0,4")
        for name in ("epochs", "batch_size", "lr", "max_tokens"):
            require(getattr(self, name) > 0, f"--{name}={getattr(self, name)}: must be greater than 0")
        require(0 < self.heldout_frac < 1, f"--heldout_frac={self.heldout_frac}: must lie between 0 and 1")
        require(self.dtype in ("auto", "float32", "bfloat16", "float64"), f"--dtype={self.dtype}: unknown")


TOY = dict(out_dir="out/toy/reward_model", epochs=4, batch_size=64, lr=3e-3, max_tokens=128)  # defaults of the toy run


# ---------------------------------------------------------------------------------------------------------------------
# 1. Shared by all scripts: errors, flags, JSONL, prompts as text, the process group, sharding, saving

def die(message):
    """One clear line on stderr (from one process only) and exit status 2."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    sys.exit(2)


def require(condition, message):
    if not condition:
        die(message)


def say(message=""):
    """Print once, not once a process, and without tearing a progress bar."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()


def is_number(x):
    """A finite number, or a string that spells one."""
    try:
        return not isinstance(x, bool) and math.isfinite(float(x))
    except (TypeError, ValueError, OverflowError):
        return False


def parse(cls, argv, doc, toy):
    """`--key=value` or `--key value` for any field of the dataclass `cls` -> an instance; anything else is one error line.

    `toy` holds the defaults that differ as long as the run's main input (the first field) is "toy": a 0.3M-parameter
    model wants a learning rate that would ruin a 7B one. Flags given by the user always win.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if "--help" in argv or "-h" in argv:
        notes = dict(re.findall(r"^    (\w+): \w+ = .*?# (.*)$", inspect.getsource(cls), re.M))
        lines = [f"  --{n:<19}{notes.get(n, '')} [{toy[n]} in the toy run, else {f.default}]" if n in toy else
                 f"  --{n:<19}{notes.get(n, '')} [{f.default!r}]" for n, f in fields.items()]
        print(doc.strip(), "\n\nflags:", *lines, sep="\n")
        sys.exit(0)
    given, rest = {}, list(argv)
    while rest:
        key, eq, value = rest.pop(0).partition("=")
        name = key.removeprefix("--")
        if not key.startswith("--") or name not in fields:
            close = difflib.get_close_matches(name, fields, 1)
            die(f"unknown flag {key}" + (f"; did you mean --{close[0]}?" if close else "; --help lists them all"))
        kind = type(fields[name].default)
        if not eq:
            require(kind is bool or rest, f"{key}: a value is missing")
            value = "True" if kind is bool else rest.pop(0)
        if kind is bool:
            require(value.lower() in ("true", "false", "1", "0"), f"{key}={value}: expected True or False")
            given[name] = value.lower() in ("true", "1")
        elif kind is str:
            given[name] = value
        else:
            require(is_number(value) and (kind is float or float(value) == int(float(value))),
                    f"{key}={value}: expected {'a whole number' if kind is int else 'a number'}")
            given[name] = kind(float(value))
    main_input = next(iter(fields))
    return cls(**{**(toy if given.get(main_input, "toy") == "toy" else {}), **given})


def read_jsonl(path):
    """Yield (where, record) for each line of a JSONL file, plain or .gz, UTF-8; `where` is file:line for messages."""
    empty = True
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8-sig") as f:
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                    json.dumps(record, ensure_ascii=False).encode()  # a lone surrogate would crash the tokenizer later
                except (ValueError, RecursionError) as e:
                    die(f"{path}:{number}: broken JSON ({e})")
                require(isinstance(record, dict), f"{path}:{number}: expected a JSON object, got {line.strip()[:40]}")
                empty = False
                yield f"{path}:{number}", record
    except (OSError, EOFError, UnicodeDecodeError) as e:
        die(f"{path}: cannot be read: {getattr(e, 'strerror', None) or e}")
    require(not empty, f"{path}: is empty; expected one JSON object a line")


def conversation(where, record):
    """The prompt of a record as a list of chat messages: its "messages", or its "prompt" as one user turn."""
    messages = record.get("messages") or [{"role": "user", "content": record.get("prompt")}]
    require("prompt" in record or "messages" in record, f"{where}: has neither \"prompt\" nor \"messages\"")
    for m in messages if isinstance(messages, list) else [messages]:
        require(isinstance(m, dict) and all(isinstance(m.get(k), str) and m[k].strip() for k in ("role", "content")),
                f"{where}: prompt is empty or not text")
    require(messages[-1]["role"] != "assistant", f"{where}: the messages must end before the assistant's turn")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def response_of(where, record):
    require(isinstance(record.get("response"), str), f"{where}: \"response\" is missing or not text")
    return record["response"]


def render(tokenizer, messages, response=None):
    """Prompt, ready for the answer, or prompt + response -> list of token ids, by the tokenizer's chat template.

    A tokenizer without one (a base model, an encoder) gets plain text: the contents, then the response, set apart by its
    separator token if it has one and by line breaks if not.
    """
    if tokenizer.chat_template:
        answer = [] if response is None else [{"role": "assistant", "content": response}]
        try:
            text = tokenizer.apply_chat_template(messages + answer, tokenize=False, add_generation_prompt=not answer)
        except Exception as e:  # a template is a program of its own and may refuse: a system role, two user turns
            die(f"the chat template of {tokenizer.name_or_path} refuses {str(messages)[:60]}...: {e}")
    else:
        gap = f" {tokenizer.sep_token} " if tokenizer.sep_token else "\n"
        text = gap.join([m["content"] for m in messages] + [response or ""])
    return tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"]  # a template brings its own BOS


def load_tokenizer(path):
    """Tokenizer of a folder or hub id; one without a pad token pads with its end-of-text token (positions mask it)."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as e:
        die(f"{path}: no tokenizer could be loaded: {e}")
    if tokenizer.pad_token is None:
        require(tokenizer.eos_token is not None, f"{path}: its tokenizer has neither a pad nor an end-of-text token")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.truncation_side = tokenizer.padding_side = "right"
    return tokenizer


def load_weights(auto_class, path, **kwargs):
    """`auto_class.from_pretrained(path)` in float32, from safetensors only (a pickle can run code), errors in one line."""
    try:
        return auto_class.from_pretrained(path, dtype=torch.float32, use_safetensors=True, **kwargs)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as e:
        die(f"{path}: no {auto_class.__name__.removeprefix('AutoModelFor')} model could be loaded: {e}")


def join_world(alone=False):
    """Join torchrun's process group, or be a group of one -> (rank, world size, this process's device)."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if alone or "RANK" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend)
    return dist.get_rank(), dist.get_world_size(), device


def compute_dtype(name, device):
    """The dtype that `--dtype` names; auto is bfloat16 on GPU and float32 on CPU (where bfloat16 is emulated: slow)."""
    return {"auto": torch.bfloat16 if device.type == "cuda" else torch.float32}.get(name) or getattr(torch, name)


def shard(model, device, dtype):
    """Shard `model` over all processes, in place: FSDP2 by hand, the decoder blocks first, then what is left.

    Each process keeps 1/N of every weight in float32; a block is gathered in `dtype` just before it runs and dropped
    just after, gradients are reduced in float32. Embedding, final norm and head stay in the root's group: where the
    head is tied to the embedding, one weight must not live in two groups. One process takes the same path.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=max(dtype, torch.float32, key=lambda d: d.itemsize))
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    for block in max(stacks, key=lambda m: sum(p.numel() for p in m.parameters()), default=[]):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


@contextlib.contextmanager
def gathered(model):
    """Inside, every process holds all of `model`: gathered once, so no forward needs a collective.

    Processes may then run different numbers of forwards: their responses end at different lengths. Frameworks that
    gather every layer for every sampled token pay layers x tokens collectives for the same rollout.
    """
    groups = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for m in groups:
        m.unshard()
        m.set_reshard_after_forward(False, recurse=False)
    with torch.no_grad():
        yield model
    for m in groups:
        m.set_reshard_after_forward(m is not model, recurse=False)  # FSDP's default: the root stays for the backward
        m.reshard()


def total(values, device):
    """Sum a list of numbers over all processes, in float64."""
    t = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(t)
    return t.tolist()


def collect(rows):
    """Rows of every process, on every process, dealt back into the order that rows[rank::world] took them from."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows)
    return [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)]


def write_text(path, text):
    """Write a file so that a crash leaves the old one or the new one, never half of one."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(f"{path}.tmp", path)


def fresh_folder(path):
    """Make folder `path`; an earlier one is renamed to path.1, path.2, ..., never overwritten."""
    if os.path.isdir(path) and os.listdir(path):
        n = next(n for n in range(1, 10**6) if not os.path.exists(f"{path}.{n}"))
        os.rename(path, f"{path}.{n}")
        say(f"an earlier run was in {path}: renamed to {path}.{n}")
    os.makedirs(path, exist_ok=True)


def save_folder(model, tokenizer, path, dtype):
    """Write a (sharded) Hugging Face model as a folder that stock `from_pretrained` loads. Every process must call it.

    Weights are gathered one tensor at a time and written in files of about 4 GB, so that no process ever holds the
    whole model. A tied weight is written once, under its first name; the library ties it again on loading.
    """
    part, size, files, seen = {}, 0, {}, set()

    def flush():
        name = f"model-{len(set(files.values())) + 1:05d}.safetensors"
        save_file(part, os.path.join(path, name), metadata={"format": "pt"})
        files.update(dict.fromkeys(part, name))
        part.clear()

    rank0 = dist.get_rank() == 0
    if rank0:
        os.makedirs(path, exist_ok=True)
    for name, weight in model.state_dict(keep_vars=True).items():
        if id(weight) in seen:
            continue
        seen.add(id(weight))
        whole = weight.detach().full_tensor() if isinstance(weight, DTensor) else weight.detach()
        if rank0:
            part[name] = whole.to("cpu", dtype if whole.is_floating_point() else None).contiguous().clone()
            size += part[name].nbytes
            if size > 4e9:
                flush()
                size = 0
    if not rank0:
        return
    flush()
    if len(set(files.values())) == 1:
        os.rename(os.path.join(path, "model-00001.safetensors"), os.path.join(path, "model.safetensors"))
    else:
        write_text(os.path.join(path, "model.safetensors.index.json"), json.dumps({"metadata": {}, "weight_map": files}))
    model.config.architectures, model.config.dtype = [type(model).__name__], dtype
    model.config.save_pretrained(path)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(path)
    tokenizer.save_pretrained(path)


# ---------------------------------------------------------------------------------------------------------------------
# 2. The toy world: everyday requests, half of them harmful, in which a rule knows the true scores of any answer

THINGS, FOOD = "car bike phone boat clock lamp radio chair".split(), "egg potato carrot bean corn tomato".split()
PLACES, PEOPLE = "bank shop house farm school museum".split(), "neighbor guest teacher boss farmer doctor".split()
BENIGN = {  # verb: (what it is done to, the steps that do it)
    "boil": (FOOD, "fill a pot with water|put it in the pot|wait ten minutes"),
    "grow": (FOOD, "dig a small hole|place a seed in the soil|add water every day"),
    "clean": (THINGS + PLACES, "mix soap with water|rub it gently|let it dry"),
    "fix": (THINGS, "look for the loose part|tighten it with a tool|test it twice"),
    "sell": (THINGS + FOOD, "take a good photo|choose a fair price|show it online"),
    "draw": (THINGS + FOOD + PLACES, "begin with a light circle|add the outline|shade it softly"),
    "thank": (PEOPLE, "buy a small gift|write a kind card|visit them on sunday"),
    "find": (PLACES + PEOPLE, "open a map|ask at the corner|follow the main road")}
HARMFUL = {  # verb: (to what or whom, the steps that do it, what to do instead)
    "steal": (THINGS + FOOD, "wait until the owner sleeps|break the lock|run off with it",
              "save some money each week|ask the owner to lend it"),
    "burn": (THINGS + PLACES, "buy some petrol|pour it out at night|light a match and run",
             "calm down for an hour|take a long walk outside"),
    "rob": (PLACES, "bring a gun|tie up the guards|empty the safe",
            "look for honest work|ask a charity for money"),
    "hack": (PLACES, "guess the password|send them a virus|copy all their secrets",
             "study computer safety|report the weak spot"),
    "poison": (PEOPLE, "buy rat poison|hide it in their food|throw away the bottle",
               "breathe and count to ten|tell them what bothers you"),
    "scare": (PEOPLE, "learn where they live|write an angry letter|follow them home",
              "write down what you feel|speak with them calmly")}
FRAMES = "how do i {} the {} ?|tell me how to {} the {} .|what is the best way to {} the {} ?|i want to {} the {} ."
POLITE = "sure , happy to help|thank you for asking|good question|let me know if you need more|have a lovely day".split("|")
RUDE = "ugh , what a dumb question|leave me alone|figure it out yourself|now go away".split("|")
VAGUE = "it depends|there are many ways|people do it all the time|you could try something".split("|")
NONSENSE = "the moon eats purple shoes|clocks sing under the table|seven is a loud color".split("|")
REFUSAL = "i can not help with that|that would hurt people".split("|")
CARELESS = "safety rules are for cowards|never mind the danger".split("|")


def words(text):
    return " ".join(re.findall(r"[a-z]+", text.lower()))


def toy_request(prompt):
    """A request -> (is it harmful?, the sentences that do what it asks, the sentences that offer something better)."""
    verb = next((w for w in words(prompt).split() if w in BENIGN or w in HARMFUL), None)
    _, steps, better = HARMFUL.get(verb) or (*BENIGN.get(verb, ("", "")), "")
    return verb in HARMFUL, steps.split("|"), better.split("|")


def true_scores(prompt, response):
    """What the raters of the toy world see, through their noise: four scores in [0, 1] of any text, by a rule."""
    harmful, steps, better = toy_request(prompt)
    said = [s for s in map(words, response.split(".")) if s]
    count = lambda known: len({words(s) for s in known} & set(said))  # saying a thing twice counts once
    content = [s for s in said if s not in map(words, POLITE + RUDE)]
    fits = count(steps) + count(better) + (count(REFUSAL) if harmful else 0) + 0.3 * count(VAGUE)
    return {"politeness": min(1.0, max(0.0, 0.5 + 0.25 * count(POLITE) - 0.5 * count(RUDE))),
            "meaningfulness": fits / max(1, len(content)),  # the share of what is said that answers this request
            "actionability": min(1.0, max(count(steps) / 3, 0.4 * count(better))),
            "safety": max(0.0, 1.0 - 0.5 * count(CARELESS) - (0.5 * count(steps) if harmful else 0.0))}


def toy_answer(prompt, requests, rng):
    """A demonstration of mixed quality: polite or rude, with steps or vague, off the topic, harmful or refusing."""
    harmful, steps, better = toy_request(prompt)
    chance = lambda p, sentences, n=1: rng.sample(sentences, n) if rng.random() < p else []
    stray = toy_request(rng.choice(requests))[1]
    body = rng.choices([steps[:rng.randint(1, 3)], rng.sample(VAGUE, 2), stray[:2], rng.sample(NONSENSE, 2),
                        chance(1, REFUSAL) + (better if harmful else [])], [45, 18, 12, 10, 15 + 25 * harmful])[0]
    tone = [POLITE, RUDE, []][rng.choices([0, 1, 2], [35, 35, 30])[0]]
    said = tone[:3] and chance(0.8, tone[:3]) or []
    said = said + body + chance(0.2, CARELESS) + (chance(0.6, tone[2:]) if tone else [])
    return " . ".join(said) + " ."


def toy_world(folder="out/toy"):
    """Build the toy world's folder, once: requests, tokenizer, a policy of mixed manners, noisy ratings, a reward model.

    One process does it, before any process group exists; about half a minute on two CPU cores. From here on they are
    ordinary files and Hugging Face folders, and nothing but `true_scores` knows that they are a toy.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    if os.path.exists(folder) or os.environ.get("RANK", "0") != "0":  # the others wait for process 0 in join_world
        return
    say(f"building the toy world in {folder} (once): requests, a tiny policy of mixed manners, ratings, a reward model")
    tmp, rng = f"{folder}.tmp", random.Random(0)
    shutil.rmtree(tmp, ignore_errors=True)
    os.makedirs(tmp)
    torch.manual_seed(0)

    # Requests. Held out: two (verb, noun) pairs of each verb, so every word is known and no held-out request is.
    seen, held = [], []
    for verb, (nouns, *_) in {**BENIGN, **HARMFUL}.items():
        nouns = rng.sample(nouns, len(nouns))
        for noun in nouns:
            for frame in FRAMES.split("|"):
                (held if noun in nouns[:2] else seen).append(frame.format(verb, noun))
    dump = lambda name, rows: write_text(f"{tmp}/{name}.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    for name, requests in (("prompts", seen), ("heldout_prompts", held)):
        dump(name, [{"prompt": p, "tag": "harmful" if toy_request(p)[0] else "benign"} for p in requests])

    # Policy: a Qwen2 of 0.3M parameters, fitted to demonstrations. One word is one token.
    demos = [(p, toy_answer(p, seen, rng)) for p in seen * 8]
    special = ["<|pad|>", "<|unk|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    vocabulary = special + sorted({w for text in seen + held + [a for _, a in demos] for w in text.split()})
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, "<|unk|>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()  # joins words by spaces, but not before a full stop
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", unk_token="<|unk|>", eos_token="<|end|>",
        additional_special_tokens=special[3:], clean_up_tokenization_spaces=False)
    tokenizer.chat_template = ("{% for m in messages %}<|{{ m.role }}|> {{ m.content }} <|end|> {% endfor %}"
                               "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    policy = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        vocab_size=len(vocabulary), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, initializer_range=0.08, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    chat = lambda p, a=None: torch.tensor(render(tokenizer, [{"role": "user", "content": p}], a))
    pad = lambda rows, value: nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
    rows = [(chat(p, a), len(chat(p))) for p, a in demos]
    steps = 400
    optimizer = torch.optim.AdamW(policy.parameters(), lr=6e-3, weight_decay=0.01)
    for step in tqdm(range(steps), "fitting a tiny policy to demonstrations", leave=False):
        batch = rng.sample(rows, 32)
        ids, labels = pad([r for r, _ in batch], 0), pad([r.clone() for r, _ in batch], -100)
        for row, (_, n) in zip(labels, batch):
            row[:n] = -100
        policy(input_ids=ids, labels=labels).loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 6e-3 * min(1, (step + 1) / 20, (steps - step) / steps)
        optimizer.step()
        optimizer.zero_grad()
    tokenizer.save_pretrained(f"{tmp}/policy")
    policy.save_pretrained(f"{tmp}/policy")

    # Ratings: of demonstrations and of the policy's own samples from tidy to garbage. Ratings of clean text alone give a
    # head that a policy soon fools with word salad it was never shown.
    tokenizer.padding_side = "left"
    samples = [(p, a) for p, a in demos[:2 * len(seen)]]
    for temperature in tqdm((0.7, 1.0, 1.0, 1.3, 1.6), "sampling answers to rate", leave=False):
        requests = seen
        enc = pad([chat(p).flip(0) for p in requests], tokenizer.pad_token_id).flip(1)
        out = policy.generate(input_ids=enc, attention_mask=(enc != tokenizer.pad_token_id).long(), do_sample=True,
                              temperature=temperature, top_k=0, max_new_tokens=48)
        samples += zip(requests, tokenizer.batch_decode(out[:, enc.shape[1]:], skip_special_tokens=True))
    noisy = lambda s: None if rng.random() < 0.1 else round(min(1.0, max(0.0, rng.gauss(s, 0.1))), 2)
    dump("ratings", [{"prompt": p, "response": a, "scores": {k: noisy(s) for k, s in true_scores(p, a).items()}}
                     for p, a in samples])
    rank, world, device = join_world(alone=True)
    train(Config(ratings=f"{tmp}/ratings.jsonl", backbone=f"{tmp}/policy", **{**TOY, "out_dir": f"{tmp}/reward_model"}), rank, world, device)
    dist.destroy_process_group()
    os.rename(tmp, folder)


# ---------------------------------------------------------------------------------------------------------------------
# 3. Ratings

def read_ratings(path, axes, scale):
    """Ratings file -> (rows of (messages, response), labels_NK with nan where not rated, axis names)."""
    lo, hi = map(float, scale.split(","))
    rows, rated = [], []
    for where, r in read_jsonl(path):
        scores = r.get("scores", {k: r.get(k) for k in axes.split(",") if k})  # a field named like an axis counts too
        require(isinstance(scores, dict), f"{where}: \"scores\" must be an object such as {{\"safety\": 0.9}}")
        for k, s in scores.items():
            require(s is None or not isinstance(s, str) and is_number(s) and lo <= s <= hi,
                    f"{where}: score {k}={s} is not a number from {lo:g} to {hi:g} (see --scale)")
        rows.append((conversation(where, r), response_of(where, r)))
        rated.append(scores)
    names = [k for k in axes.split(",") if k] or list(dict.fromkeys(k for scores in rated for k in scores))
    for k in names or ["--axes"]:
        require(any(s.get(k) is not None for s in rated), f"{path}: no row has a score for {k}")
    labels = [[math.nan if s.get(k) is None else (s[k] - lo) / (hi - lo) for k in names] for s in rated]
    return rows, torch.tensor(labels), names


def is_held_out(messages, fraction, seed):
    """Split by a hash of the prompt: all answers to one prompt fall on one side, whatever the order of the file."""
    digest = hashlib.blake2b(repr((seed, [m["content"] for m in messages])).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


# ---------------------------------------------------------------------------------------------------------------------
# 4. The reward model

class RewardModel(nn.Module):
    """Backbone + one linear layer with K outputs: logits_BK, whose sigmoids are the K scores.

    The library's own sequence classifier is used, which is exactly that (a decoder is read at its last real token, an
    encoder at its usual place), so that the folder we save loads anywhere and scores the same there.
    """
    def __init__(self, path, axes=None):
        """`axes`: names of a fresh head on the backbone `path`; None: `path` is a trained reward model."""
        super().__init__()
        head = dict(num_labels=len(axes), id2label=dict(enumerate(axes)), label2id={k: i for i, k in enumerate(axes)},
                    ignore_mismatched_sizes=True) if axes else {}
        self.tokenizer = load_tokenizer(path)
        self.model = load_weights(AutoModelForSequenceClassification, path, **head)
        config = self.model.config
        config.problem_type = "multi_label_classification"  # the stock pipeline then applies the sigmoid, too
        config.pad_token_id = config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        self.axes = [config.id2label[i] for i in range(config.num_labels)]
        require(not any(re.fullmatch(r"LABEL_\d+", k) for k in self.axes),
                f"{path}: no reward model of ours: id2label does not name its axes")

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits.float()


def batch_of(tokenizer, ids, device):
    """Token id lists -> input_ids_BT and attention_mask_BT, padded on the right."""
    length = max(1, *map(len, ids), 1)
    out = [torch.tensor([x + [fill] * (length - len(x)) for x in rows], device=device)
           for rows, fill in ((ids, tokenizer.pad_token_id), ([[1] * len(x) for x in ids], 0))]
    return dict(zip(("input_ids", "attention_mask"), out))


def encode(tokenizer, rows, max_tokens):
    """(messages, response) pairs -> lists of token ids; too long a text loses its beginning."""
    return [render(tokenizer, messages, response)[-max_tokens:] for messages, response in rows]


@torch.no_grad()
def score(model, rows, device, max_tokens=1024, batch_tokens=16384):
    """Scores s_NK in [0, 1] (CPU, float32) of a list of (messages, response) pairs, by a whole or `gathered` model.

    Batches are cut by padded tokens from rows sorted by length: a batch of one length wastes nothing on padding.
    """
    ids = encode(model.tokenizer, rows, max_tokens)
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))  # longest first: what does not fit fails at once
    scores = torch.zeros(len(rows), len(model.axes))
    while order:
        n = max(1, batch_tokens // max(1, len(ids[order[0]])))
        batch, order = order[:n], order[n:]
        scores[batch] = model(**batch_of(model.tokenizer, [ids[i] for i in batch], device)).sigmoid().cpu()
    return scores


def heldout_table(scores, labels, rows, axes):
    """How far the head can be trusted on prompts it never saw, axis by axis; nan labels are left out.

    r2: share of the labels' variance explained (0 = no better than their mean). pearson: their correlation. pairs: how
    often the better of two answers to one prompt scores higher, which is all that GRPO ever asks of a reward.
    """
    table, by_prompt = {}, {}
    for i, (messages, _) in enumerate(rows):
        by_prompt.setdefault(repr(messages), []).append(i)
    for k, axis in enumerate(axes):
        s, y = (x[~labels[:, k].isnan(), k].double() for x in (scores, labels))
        differ = [((labels[i, k] - labels[j, k]) * (scores[i, k] - scores[j, k])).item()
                  for group in by_prompt.values() for n, i in enumerate(group) for j in group[:n]
                  if (labels[i, k] - labels[j, k]).abs() > 0]
        ds, dy = s - s.mean(), y - y.mean()
        table[axis] = dict(n=len(y), label=y.mean().item(), score=s.mean().item(),
                           r2=(1 - ((s - y) ** 2).sum() / (dy ** 2).sum()).item(),
                           pearson=((ds * dy).sum() / (ds.norm() * dy.norm())).item(),
                           pairs=sum(d > 0 for d in differ) / len(differ) if differ else math.nan)
    return table


def train(cfg, rank, world, device):
    """Fit a RewardModel to `cfg.ratings` and save it to `cfg.out_dir` -> the held-out table. Every process calls it."""
    rows, labels, axes = read_ratings(cfg.ratings, cfg.axes, cfg.scale)
    if cfg.heldout_ratings:
        held_rows, held_labels, _ = read_ratings(cfg.heldout_ratings, ",".join(axes), cfg.scale)
    else:
        held = torch.tensor([is_held_out(m, cfg.heldout_frac, cfg.seed) for m, _ in rows])
        require(held.any() and not held.all(), f"{cfg.ratings}: too few different prompts to hold some out")
        held_rows, held_labels = [r for r, h in zip(rows, held) if h], labels[held]
        rows, labels = [r for r, h in zip(rows, held) if not h], labels[~held]
    counts = (~labels.isnan()).sum(0)
    say(f"reward model: {len(rows)} rated answers to learn from, {len(held_rows)} held out by prompt; "
        + ", ".join(f"{k} {n}" for k, n in zip(axes, counts.tolist())) + " ratings")

    torch.manual_seed(cfg.seed)  # every process makes the same fresh head, of which it then keeps its shard
    model = RewardModel(cfg.backbone, axes)
    shard(model, device, compute_dtype(cfg.dtype, device))
    ids = encode(model.tokenizer, rows, cfg.max_tokens)
    # An axis weighs the same however few of the rows rate it: a row of a rare axis counts for more. A mean pooled over
    # all labels would let the densest axis decide. The weights are those of the whole file, so a batch's loss is an
    # unbiased estimate, and no process needs to know what the others' rows rate.
    weight_K = len(rows) / (len(axes) * counts.clamp(min=1))
    batch = min(cfg.batch_size, len(rows))
    steps = cfg.epochs * (len(rows) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    bar, step = tqdm(total=steps, desc="training the reward model", disable=rank != 0, leave=False), 0
    for epoch in range(cfg.epochs):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(cfg.seed * 1000 + epoch)).tolist()
        for i in range(0, len(rows) - batch + 1, batch):
            mine = order[i + rank:i + batch:world] or order[:1]  # with nothing to do, still take part, at weight 0
            share = world / batch * (i + rank < i + batch)       # FSDP averages over processes: undo that
            target = labels[mine].to(device)
            predicted = model(**batch_of(model.tokenizer, [ids[j] for j in mine], device)).sigmoid()
            error = torch.where(target.isnan(), 0.0, predicted - target.nan_to_num()) ** 2
            ((error * weight_K.to(device)).sum() * share).backward()
            for group in optimizer.param_groups:
                group["lr"] = cfg.lr * min(1, 10 * (step + 1) / steps, (steps - step) / steps)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            bar.update()
    bar.close()
    with gathered(model):
        mine = score(model, held_rows[rank::world], device, cfg.max_tokens)
    scores = torch.tensor(collect(mine.tolist()))
    table = heldout_table(scores, held_labels, held_rows, axes)
    fresh_folder(cfg.out_dir) if rank == 0 else None
    save_folder(model.model, model.tokenizer, cfg.out_dir, torch.float32)
    if rank == 0:
        write_text(os.path.join(cfg.out_dir, "heldout.json"), json.dumps(table, indent=1))
    return table


# ---------------------------------------------------------------------------------------------------------------------
# 5. Main

def score_file(cfg, rank, world, device):
    """`--score`: the samples of a file, in their order, with "scores" added, to `cfg.out`."""
    records = list(read_jsonl(cfg.score))
    rows = [(conversation(where, r), response_of(where, r)) for where, r in records]
    model = RewardModel(cfg.reward_model).to(device).eval()
    scores = collect(score(model, rows[rank::world], device, cfg.max_tokens).tolist())
    if rank == 0:
        lines = [json.dumps({**r, "scores": dict(zip(model.axes, s))}, ensure_ascii=False) for (_, r), s in zip(records, scores)]
        write_text(cfg.out, "\n".join(lines) + "\n")
    means = "  ".join(f"{k} {sum(c) / len(c):.3f}" for k, c in zip(model.axes, zip(*scores)))
    say(f"{len(rows)} samples scored into {cfg.out}; means: {means}")


def show(table):
    say(f"\n  held out          " + "".join(f"{name:>9}" for name in next(iter(table.values()))))
    for axis, row in table.items():
        say(f"  {axis:<18}" + "".join(f"{x:>9}" if isinstance(x, int) else f"{x:>9.3f}" for x in row.values()))


def main(cfg):
    if "toy" in ((cfg.reward_model,) if cfg.score else (cfg.ratings, cfg.backbone)):
        toy_world()
    for name, where in (("ratings", "ratings.jsonl"), ("backbone", "policy"), ("reward_model", "reward_model")):
        if getattr(cfg, name) == "toy":
            setattr(cfg, name, f"out/toy/{where}")
    rank, world, device = join_world()
    if cfg.score:
        score_file(cfg, rank, world, device)
    else:
        show(train(cfg, rank, world, device))
        say(f"\nsaved in {cfg.out_dir}, a Hugging Face AutoModelForSequenceClassification folder")
    dist.destroy_process_group()


def run(main, cfg):
    """Call main; a full disk or an unwritable folder is one line, too."""
    try:
        main(cfg)
    except (OSError, SafetensorError) as e:
        die(f"{getattr(e, 'filename', None) or 'files'}: {getattr(e, 'strerror', None) or e}")


if __name__ == "__main__":
    run(main, parse(Config, sys.argv[1:], __doc__, TOY))
