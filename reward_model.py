"""
Supervision for multi-objective GRPO: a model that reads a prompt and a response and predicts
K alignment scores, one an axis, each in [0, 1] and higher for better. The multi-label reward
regression of arXiv 2503.21819; every default is our own choice.

    score      s_ik = sigmoid(w_k . h_i)          h_i: what the backbone makes of row i
    loss       1/K sum_k 1/|N_k| sum_(i in N_k) error(s_ik, y_ik)
               N_k: the rows that rate axis k; y_ik: their ratings, mapped to [0, 1]
    error      bce: -y log s - (1 - y) log(1 - s)        mse: (s - y)^2

    torchrun reward_model.py                             # the toy world, nothing downloaded
    torchrun --nproc_per_node=8 reward_model.py --ratings=a.jsonl,b.jsonl \\
        --backbone=Qwen/Qwen2.5-0.5B --out_dir=out/rm
    python reward_model.py --score=samples.jsonl --reward_model=out/rm --out=scored.jsonl

A rating is a line {"prompt": str, "response": str, "scores": {"safety": 0.9, "politeness": null}}.
What is null or absent is not rated and not trained, so files with different axes can be given
together. h is the last hidden state at the last token (decoders) or at the first (encoders).

Out comes a folder that AutoModelForSequenceClassification loads: its id2label names the axes, and
sigmoid(logits) are the scores. heldout.json in it says how far to trust each axis. It is no
preference (Bradley-Terry) model: ratings are regressed on as they are.

Shapes: N rows of a file, B rows of a batch, K axes.
"""
import dataclasses
import json
import math
import os
import time
from datetime import timedelta
from itertools import compress
from types import SimpleNamespace
from typing import Literal

import torch
from torch import nn
from tqdm import tqdm

from mogrpo import (
    DEVICE, TODAY, Dtype, axes_of, catch_signals, check_axes, collect, conversation, encode,
    fingerprint, heed_signals, is_held_out, is_number, join_world, launch, load_reward_model,
    load_reward_models, logits_of, open_out_dir, put_in_place, read_jsonl, require, save_checkpoint,
    save_folder, say, score, score_responses, set_threads, shard, stop_asked, to_json, write_text)

@dataclasses.dataclass
class Config:
    ratings: str = "toy"        # JSONL or .jsonl.gz files, comma-separated; toy: the toy world's
    heldout_ratings: str = ""   # files for the held-out table; empty: heldout_frac of the prompts
    heldout_frac: float = 0.1   # split by prompt: another answer to the same prompt would leak it
    axes: str = ""              # axes to train, comma-separated; empty: all that occur in "scores"
    scale: str = "0,1"          # lowest and highest rating, such as 0,4: to [0, 1]
    backbone: str = "Qwen/Qwen2.5-0.5B"  # folder or hub id of any decoder or encoder
    out_dir: str = "out/rm"     # an earlier folder there is renamed, not overwritten
    loss: Literal["bce", "mse"] = "bce"  # bce: cross-entropy, the rating as a soft label
    epochs: int = 2             # passes over the ratings; the best held-out one is kept
    batch_size: int = 32        # rows of one optimizer step, over all processes
    lr: float = 2e-5            # peak: warms up over a tenth of the steps, then falls to 0
    head_lr: float = 10.0       # the head learns at this times lr: it starts from noise
    max_tokens: int = 1024      # a longer text loses its beginning, never its response
    dtype: Dtype = "auto"       # of compute; auto: bfloat16 on a GPU, else float32
    save_interval: int = 500    # checkpoint every so many steps: no more of them can be lost
    resume: bool = False        # continue from out_dir/checkpoint
    seed: int = 0               # fresh head, order of the rows, held-out split
    day: str = TODAY            # YYYY-MM-DD that chat templates tell
    score: str = ""             # do not train: score this JSONL of prompts and responses
    reward_model: str = "out/rm"  # the folder that --score uses
    out: str = "scored.jsonl"   # where --score writes the same rows with "scores"

    # What --resume must find as it was
    kept = ("ratings", "heldout_ratings", "heldout_frac", "axes", "scale", "backbone", "loss",
            "epochs", "batch_size", "max_tokens", "seed")

    def __post_init__(self):
        low, _, high = self.scale.partition(",")
        require(is_number(low) and is_number(high) and float(low) < float(high),
                f"--scale={self.scale}: expected lowest,highest as in 0,4")
        for name in "epochs batch_size lr head_lr max_tokens save_interval".split():
            require(0 < getattr(self, name) < 1e12,
                    f"--{name}={getattr(self, name)}: must be greater than 0, nor huge")
        if self.score:  # the toy world is not built for flags that nobody reads
            vars(self).update(ratings="", backbone="", out_dir="")
            check_out(self.out, self.score)

TOY = dict(  # defaults while --ratings=toy; 0.3M parameters want a rate that would ruin 7B
    ratings="out/toy/ratings.jsonl",
    backbone="out/toy/policy",
    reward_model="out/toy/reward_model",
    out_dir="out/toy/reward_model",
    epochs=6,
    batch_size=64,
    lr=3e-3,
    head_lr=1.0,
    max_tokens=128)

# --------------------------------------------------------------------------------------------------
# 1. Ratings

def check_out(out, source):
    """An output file must be new or a regular one, in a folder that is there, and no input."""
    folder = os.path.dirname(os.path.abspath(out))
    free = os.path.isfile(out) or not os.path.lexists(out)
    require(free and os.path.isdir(folder) and os.path.realpath(out) != os.path.realpath(source),
            f"--out={out}: expected a new file or an old regular one, but not the input")

def answered(where, record):
    """A line's (messages, response), which is what reward models score."""
    require(isinstance(record.get("response"), str),
            f'{where}: "response" is missing or not text')
    return conversation(where, record), record["response"]

def read_ratings(paths, asked, scale):
    """Files, comma-separated -> rows of (messages, response), labels_NK, the K axis names.

    `asked` is a list of axes; if it is empty, all that occur are taken. Labels are in [0, 1] and
    nan where not rated, so an axis of one file is unrated in the others. A row or a score that
    cannot be used ends the program in a line."""
    low, high = map(float, scale.split(","))
    axes = dict.fromkeys(asked)  # its keys: a set that keeps the order of first appearance
    rows, ratings = [], []
    for path in paths.split(","):
        for where, record in read_jsonl(path):
            # Without "scores" any field may be one, if it was asked for by name.
            scores = record.get("scores")
            if scores is None:  # null is like absent
                scores = record if asked else {}
            require(isinstance(scores, dict), f'{where}: "scores" must be like {{"safety": 0.9}}')
            rated = {k: scores[k] for k in asked or scores if scores.get(k) is not None}
            for axis, s in rated.items():
                require(is_number(s) and low <= float(s) <= high, f"{where}: score {axis}={s} "
                        f"is not a number from {low:g} to {high:g} (--scale)")
            if rated:  # else it teaches nothing
                rows.append(answered(where, record))
                ratings.append(rated)
                axes |= rated
    require(rows, f"{paths}: no row has a score for {', '.join(axes) or 'any axis'} (--axes)")
    scores_NK = []  # in the file's scale
    for rated in ratings:
        scores_NK.append([float(rated.get(axis, math.nan)) for axis in axes])
    return rows, (torch.tensor(scores_NK) - low) / (high - low), list(axes)

def train_and_heldout(cfg):
    """-> rows and labels_NK to train on, rows and labels_NK held out, the axis names."""
    asked = cfg.axes.split(",") if cfg.axes else []
    rows, labels_NK, axes = read_ratings(cfg.ratings, asked, cfg.scale)
    check_axes(axes, cfg.ratings)
    if cfg.heldout_ratings:
        held_rows, held_NK, _ = read_ratings(cfg.heldout_ratings, axes, cfg.scale)
    else:
        held_N = torch.tensor(
            [is_held_out(messages, cfg.heldout_frac, cfg.seed) for messages, _ in rows])
        held_rows = list(compress(rows, held_N))  # those where it is true
        rows = list(compress(rows, ~held_N))      # and where it is not
        held_NK = labels_NK[held_N]
        labels_NK = labels_NK[~held_N]
    require(labels_NK.isfinite().any(0).all() and held_rows, f"{cfg.ratings}: too few prompts with "
            f"a score for each of {', '.join(axes)}, to train on some and hold out others "
            "(see --axes and --heldout_ratings)")
    say(f"reward model: {len(rows)} rated answers, {len(held_rows)} held out")
    return rows, labels_NK, held_rows, held_NK, axes

# --------------------------------------------------------------------------------------------------
# 2. Training

def epoch_batches(lengths_N, size, seed):
    """One pass over the rows in a new order -> batches of `size` row numbers, each of about one
    length, so that little is padding; short and long ones take turns. Rows left over wait for the
    next pass."""
    g = torch.Generator().manual_seed(seed)
    N = len(lengths_N)
    order = torch.randperm(N, generator=g)[:N // size * size]
    batches = order[lengths_N[order].argsort(stable=True)].view(-1, size)  # equals stay shuffled
    return batches[torch.randperm(len(batches), generator=g)].tolist()

def make_optimizer(model, cfg):
    """AdamW on this process's shards: 1/world of the moments. The head has a rate of its own."""
    trunk = dict(params=[], peak_lr=cfg.lr)
    head = dict(params=[], peak_lr=cfg.lr * cfg.head_lr)
    for name, p in model.named_parameters():
        is_head = name.startswith(("score.", "classifier.", "classification_head."))
        group = head if is_head else trunk
        group["params"].append(p)
    return torch.optim.AdamW([trunk, head], fused=True)

def keep_the_best(cfg, model, state, rows, labels_NK):
    """Score the held-out rows at the end of an epoch; save the model if none was better."""
    # Every process scores all rows: a sharded forward takes all of them.
    table = heldout_table(score(model, rows), labels_NK, rows, model.axes)
    r2_K = torch.tensor([row["r2"] for row in table.values()])
    r2 = max(-1e9, r2_K.nanmean().item())  # -1e9: no axis has one
    say(f"after {state['step']} steps, held-out r2: {r2:.3f}")
    # Chosen on these rows, so the table flatters the model a little.
    if r2 >= state["r2"]:
        state.update(table=json.loads(to_json(table)), r2=r2)  # None for nan, also when resumed
        # out_dir itself holds the checkpoint until the end
        save_folder(model, f"{cfg.out_dir}.tmp", torch.float32)

MICRO_TOKENS = 16384  # padded tokens of one forward and backward: bounds activation memory

def backward(model, batch, ids, labels_NK, axis_weights_K, cfg, rank, world):
    """Gradient of the loss of a batch (row numbers), of which every process takes its share -> its
    norm; no more than 1 is left of it."""
    # As many micro-batches on every process
    at_once = max(2, MICRO_TOKENS // max(len(ids[i]) for i in batch))  # rows
    count = math.ceil(len(batch) / world / at_once)
    for numbers in torch.tensor(batch[rank::world]).tensor_split(count):
        logits_BK = logits_of(model, [ids[i] for i in numbers])
        labels_BK = labels_NK[numbers].to(DEVICE)
        target_BK = labels_BK.nan_to_num()
        if cfg.loss == "mse":
            errors_BK = (logits_BK.sigmoid() - target_BK)**2
        else:  # its gradient does not vanish where the sigmoid is flat: it unlearns mistakes
            errors_BK = nn.functional.binary_cross_entropy_with_logits(
                logits_BK, target_BK, reduction="none")
        errors_BK = errors_BK * labels_BK.isfinite()  # 0 where it is not rated
        loss = (errors_BK.sum(0) * axis_weights_K).mean() / len(batch)
        (loss * world).backward()  # FSDP averages the gradients over processes
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # a fresh head's first are large
    return norm.full_tensor().item()

def tell_progress(clock, step, steps):
    """A line every half a minute: a log that is no terminal shows no bar."""
    now = time.monotonic()
    if now > clock.told + 30:
        clock.told = now
        seconds = (now - clock.start) / (step - clock.first) * (steps - step)
        say(f"step {step} of {steps}, {timedelta(seconds=round(seconds))} left")

def train(cfg, rank, world, dtype):
    """Fit a reward model to `cfg.ratings` and save it in `cfg.out_dir` -> its held-out table.
    Every process calls it, with what `join_world` gave it."""
    rows, labels_NK, held_rows, held_NK, axes = train_and_heldout(cfg)
    torch.manual_seed(cfg.seed)  # the head starts at random
    head = dict(
        id2label=dict(enumerate(axes)),
        label2id={axis: k for k, axis in enumerate(axes)},
        problem_type="multi_label_classification")  # the stock pipeline then takes sigmoids, too
    model = load_reward_model(cfg.backbone, cfg.max_tokens, cfg.day, **head)
    model.config.day = cfg.day  # that its chat template told: `load` reads it
    set_threads(model)
    shard(model, dtype, "auto")
    optimizer = make_optimizer(model, cfg)
    ids = encode(model, rows)
    lengths_N = torch.tensor(list(map(len, ids)))
    # Each axis counts as the mean over its own rated rows: a mean over all labels would let the
    # densest axis decide.
    axis_weights_K = 1 / labels_NK.isfinite().float().mean(0).to(DEVICE)
    # Every process needs a row of each batch: all must enter the same collectives.
    batch_size = min(cfg.batch_size, len(rows))
    require(batch_size >= world, f"--batch_size={batch_size}: fewer rows than processes")
    per_epoch = len(rows) // batch_size
    steps = cfg.epochs * per_epoch
    # Batches are functions of (seed, epoch): the count of steps says where a run stood.
    state = dict(step=0, updates=0, sound=-1, table={}, r2=-1e9,  # table, r2: the best one's
                 texts=fingerprint(ids))
    open_out_dir(cfg, model, optimizer, state)
    catch_signals()
    clock = SimpleNamespace(first=state["step"], start=time.monotonic(), told=time.monotonic())
    for epoch in range(state["step"] // per_epoch, cfg.epochs):
        batches = epoch_batches(lengths_N, batch_size, cfg.seed * 1000 + epoch)
        left = batches[state["step"] % per_epoch:]  # a resumed run has done some
        title = f"epoch {epoch + 1} of {cfg.epochs}"
        for batch in tqdm(left, title, disable=rank > 0 or None, leave=False):
            step = state["step"]
            tell_progress(clock, step, steps)
            if stop_asked() or step % cfg.save_interval == 0:  # at 0: a full disk shows at once
                say(f"step {step} of {steps}")
                save_checkpoint(cfg.out_dir, model, optimizer, state)
                heed_signals()
            norm = backward(model, batch, ids, labels_NK, axis_weights_K, cfg, rank, world)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * min(1, 10 * (step + 1) / steps, 1 - step / steps)
            if math.isfinite(norm):
                optimizer.step()
                state["updates"] += 1
                state["sound"] = step  # the last that was
            else:
                say(f"warning: step {step}: the loss or its gradient is not finite: skipped")
            require(step - state["sound"] < 10, "ten steps in a row were skipped: the loss or "
                    "its gradient is not finite; try a smaller --lr")
            optimizer.zero_grad()
            state["step"] += 1
        keep_the_best(cfg, model, state, held_rows, held_NK)
    if rank == 0:  # the best one takes the place of the checkpoint
        write_text(f"{cfg.out_dir}.tmp/heldout.json", to_json(state["table"]))
        put_in_place(cfg.out_dir)
    return state["table"]

# --------------------------------------------------------------------------------------------------
# 3. How far to trust it

def correlation(x_N, y_N):
    """Pearson's; nan for fewer than two values."""
    return torch.corrcoef(torch.stack([x_N, y_N]))[0, 1].item()

def ranks(x_N):
    """Rank of each value, 1 to N; ties share their mean rank."""
    _, which, count = x_N.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2)[which]  # of each different value, then of each

def roc_auc(scores_N, labels_N):
    """How often an answer labelled above 0.5 scores above one that is not."""
    rank_N = ranks(scores_N)
    good_N = labels_N > 0.5
    gap = rank_N[good_N].mean() - rank_N[~good_N].mean()
    return 0.5 + gap.item() / len(rank_N)  # the gap is N / 2 if all good ones are above the others

def pair_accuracy(scores_N, labels_N, prompt_N, noise=0.25):
    """How often the better of two answers to one prompt scores higher, equal scores counting half;
    and the number of such pairs. Labels that differ by `noise` or less count as rater noise."""
    wins = []
    for prompt in prompt_N.unique():
        same = prompt_N == prompt
        better = labels_N[same, None] > labels_N[same] + noise  # each pair once
        score_gap = scores_N[same, None] - scores_N[same]
        wins += (score_gap[better].sign() / 2 + 0.5).tolist()
    return torch.tensor(wins).mean().item(), len(wins)

def spearman_interval(a_N, b_N, prompt_N):
    """95 % interval of the correlation of two lists of ranks: a bootstrap over prompts, since two
    answers to one prompt are not independent."""
    def correlation_of(sums_R6):  # of 1, a, b, aa, bb, ab
        a, b, aa, bb, ab = (sums_R6[:, 1:] / sums_R6[:, :1]).T
        return (ab - a * b) / ((aa - a * a) * (bb - b * b)).sqrt()

    a_N, b_N = a_N.double(), b_N.double()
    products_N6 = torch.stack([torch.ones_like(a_N), a_N, b_N, a_N**2, b_N**2, a_N * b_N], 1)
    sums_Q6 = torch.zeros(int(prompt_N.max()) + 1, 6).double().index_add(0, prompt_N, products_N6)
    drawn_RQ = torch.randint(len(sums_Q6), (1000, len(sums_Q6)),
                             generator=torch.Generator().manual_seed(0))
    sums_R6 = torch.stack([sums_Q6[drawn_Q].sum(0) for drawn_Q in drawn_RQ])
    return correlation_of(sums_R6).nanquantile(torch.tensor([0.025, 0.975]).double()).tolist()

def axis_row(scores_N, labels_N, rows):
    """The table's row of one axis, from the rows that rate it."""
    prompts = [repr(messages) for messages, _ in rows]
    number_of = {prompt: n for n, prompt in enumerate(dict.fromkeys(prompts))}
    prompt_N = torch.tensor([number_of[prompt] for prompt in prompts])
    score_rank_N, label_rank_N = ranks(scores_N), ranks(labels_N)
    low, high = spearman_interval(score_rank_N, label_rank_N, prompt_N)
    pairs, count = pair_accuracy(scores_N, labels_N, prompt_N)
    variance = labels_N.var(correction=0).item() or math.nan  # 0: nothing to explain
    lengths_N = torch.tensor([len(response) for _, response in rows]).double()  # characters
    return {
        "n": len(rows),
        "prompts": len(number_of),
        "label": labels_N.mean().item(),
        "label_sd": labels_N.std(correction=0).item(),
        "score": scores_N.mean().item(),
        "score_sd": scores_N.std(correction=0).item(),
        # share of the labels' variance explained; 0: no better than guessing their mean
        "r2": 1 - ((scores_N - labels_N)**2).mean().item() / variance,
        "pearson": correlation(scores_N, labels_N),
        "spearman": correlation(score_rank_N, label_rank_N),
        "low": low,  # spearman's 95 % interval
        "high": high,
        "auc": roc_auc(scores_N, labels_N),
        "pairs": pairs,  # all that GRPO asks of a reward
        "n_pairs": count,
        "length": correlation(scores_N, lengths_N)}  # a favourite way to be hacked

def heldout_table(scores, labels, rows, axes):
    """How far to trust scores_NK of prompts that the model never saw: axis -> a row of numbers."""
    scores, labels = scores.double(), labels.double()  # sums over many rows
    table = {}
    for k, axis in enumerate(axes):
        rated_N = labels[:, k].isfinite()
        table[axis] = axis_row(
            scores[rated_N, k], labels[rated_N, k], list(compress(rows, rated_N)))
    return table

def show(table):
    """Print the table; a dash: too few rows, or all the same."""
    names = list(next(iter(table.values())))
    say(f"\n{'held out':<15}" + "".join(f"{name:>9}" for name in names))
    for axis, row in table.items():
        line = f"{axis:<15}"
        for number in row.values():
            cell = f"{number:.3f}" if isinstance(number, float) else number or "-"
            line += f"{cell:>9}"
        say(line)

# --------------------------------------------------------------------------------------------------
# 4. Main

def score_file(cfg, rank, world, dtype):
    """The rows of `cfg.score` with their "scores" -> `cfg.out`."""
    records = list(read_jsonl(cfg.score))  # (file:line, record) pairs
    rows = []  # as those of mogrpo.py's rollouts
    for record in records:
        messages, response = answered(*record)
        rows.append(dict(prompt=dict(messages=messages), text=response))
    models = [shard(model, dtype) for model in load_reward_models(cfg.reward_model)]
    scores = collect(score_responses(rows[rank::world], models, None).tolist())
    lines = []
    for (_, record), scores_K in zip(records, scores):
        record["scores"] = dict(zip(axes_of(models, None), scores_K))
        lines.append(to_json(record) + "\n")
    if rank == 0:
        write_text(cfg.out, "".join(lines))
    say(f"{len(rows)} scored in {cfg.out}")

def main(cfg):
    process = join_world(cfg.dtype)  # rank, world size, compute dtype
    if cfg.score:
        score_file(cfg, *process)
    else:
        show(train(cfg, *process))
        say(f"\nsaved in {cfg.out_dir}, a Hugging Face sequence-classification folder")

if __name__ == "__main__":
    launch(main, Config, __doc__, TOY)
