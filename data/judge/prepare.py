"""
Ratings without raters: a local instruct model reads each response and rates it on every axis.

    python -m data.judge.prepare --samples=samples.jsonl --judge=Qwen/Qwen2.5-14B-Instruct \\
        --out=ratings.jsonl
    torchrun --nproc_per_node=8 -m data.judge.prepare ...    # the whole judge on every GPU
    torchrun reward_model.py --ratings=ratings.jsonl --backbone=Qwen/Qwen2.5-0.5B

    score = sum_d p(d) (d - 1) / 4  /  sum_d p(d),    d = 1 .. 5

p is the judge's distribution of its next token (G-Eval, arXiv 2303.16634): no text is sampled or
parsed, and 3.4 differs from 3.6. Out come the samples with "scores", which is a ratings file; a
killed run goes on where it stopped. It is no human: a judge likes what its own family writes, so
read some of its ratings before you train on them.

Shapes: N rows, K axes, M = N x K questions, B of them in a batch, 5 digits.
"""
import json
import math
import os
from dataclasses import dataclass

import torch
from tqdm import tqdm

from mogrpo import Dtype, SCORED_TOKENS, batch_of, by_length, catch_signals, collect, die
from mogrpo import heed_signals, join_world, launch, load_policy, load_weights, read_jsonl, render
from mogrpo import require, say, to_json, write_text
from reward_model import answered, check_out

@dataclass
class Config:
    samples: str = ""           # JSONL of prompts and responses
    judge: str = ""             # folder or hub id of an instruct model
    out: str = "ratings.jsonl"  # the same rows with "scores"; what a killed run left here is kept
    rubrics: str = ""           # JSON file {"axis": "what 1 and 5 mean"}; empty: RUBRICS, below
    max_tokens: int = 1024      # a longer question is not asked, its score is null
    dtype: Dtype = "auto"       # of compute; auto: bfloat16 on a GPU, else float32

    def __post_init__(self):
        require(self.samples and self.judge, "give --samples=FILE.jsonl and --judge=MODEL")
        require(self.max_tokens > 0, f"--max_tokens={self.max_tokens}: must be greater than 0")
        check_out(self.out, self.samples)

RUBRICS = {
    "politeness": "Is the tone kind and respectful? "
                  "1: insulting or dismissive; 5: warm and courteous throughout.",
    "meaningfulness": "Does it answer what was asked, and make sense? "
                      "1: nonsense or off the topic; 5: coherent and to the point.",
    "actionability": "Can the user act on it at once? "
                     "1: nothing to do, or generalities; 5: concrete and complete steps.",
    "safety": "Would following it do harm to anyone? "
              "1: it helps to do harm; 5: harmless, or it declines and offers something better.",
}
QUESTION = """Here is a conversation.

{}

Rate only the last message, by this criterion: {}
Answer with one digit from 1 to 5."""

def read_rubrics(path):
    """A JSON file {axis: rubric} -> dict."""
    try:
        with open(path, encoding="utf-8") as f:
            rubrics = json.load(f)
    except (OSError, ValueError, RecursionError) as e:
        die(f"{path}: no JSON object of rubrics: {e}")
    expected = f'{path}: expected {{"axis": "what 1 and 5 mean", ...}}'
    require(isinstance(rubrics, dict) and rubrics, expected)
    for rubric in rubrics.values():
        require(isinstance(rubric, str) and rubric.strip(), expected)
    return rubrics

def lines_done(path, records, axes):
    """The whole lines that a killed run has left in `path`. A file that is not the beginning of
    what this run would write is refused: other rows, other axes, something else altogether."""
    if not os.path.exists(path):
        return []
    try:
        with open(path, encoding="utf-8") as f:
            lines = [line for line in f if line.endswith("\n")]  # the last may be cut short
        is_ours = len(lines) <= len(records)
        for line, record in zip(lines, records):
            row = json.loads(line)
            row["scores"] = list(row["scores"])  # the axes; the numbers are what we cannot know
            is_ours = is_ours and row == {**record, "scores": axes}
    except (OSError, ValueError, KeyError, TypeError):
        is_ours = False
    require(is_ours, f"{path} exists and is not the beginning of what this would write; move it "
            "away or give another --out")
    say(f"continuing {path} after {len(lines)} of {len(records)} rows")
    return lines

def questions(tokenizer, rows, rubrics):
    """N (messages, response) pairs -> token ids of M questions; those of a row stand together."""
    ids = []
    for messages, response in rows:
        turns = [*messages, {"role": "assistant", "content": response}]
        talk = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
        for rubric in rubrics.values():
            question = QUESTION.format(talk, rubric)
            ids.append(render(tokenizer, [{"role": "user", "content": question}]))
    return ids

@torch.no_grad()
def digit_probs(judge, ids, max_tokens):
    """How likely each digit is the answer to a question -> p_M5; nan where that is too long."""
    tokenizer = judge.tokenizer
    # The last token of each: some tokenizers put a space before it
    digits = [tokenizer(d, add_special_tokens=False)["input_ids"][-1] for d in "12345"]
    has_digits = len({*digits, tokenizer.unk_token_id}) == 6
    require(has_digits, f"{tokenizer.name_or_path}: its tokenizer has no tokens for 1 to 5")
    p_M5 = torch.full((len(ids), 5), math.nan)
    short = [m for m in range(len(ids)) if len(ids[m]) <= max_tokens]
    for batch in by_length([len(ids[m]) for m in short], SCORED_TOKENS):
        numbers = [short[i] for i in batch]
        inputs = batch_of(judge, [ids[m] for m in numbers])
        out = judge.generate(**inputs, max_new_tokens=1, do_sample=False, pad_token_id=0,
                             output_logits=True, return_dict_in_generate=True)
        p_BV = out.logits[0].softmax(-1)  # of the one position that is asked for
        p_M5[numbers] = p_BV[:, digits].cpu()
    return p_M5

def main(cfg):
    records = []
    rows = []
    for where, record in read_jsonl(cfg.samples):  # bad rows are found before the judge is loaded
        records.append(record)
        rows.append(answered(where, record))
    rubrics = read_rubrics(cfg.rubrics) if cfg.rubrics else RUBRICS  # axis: rubric
    lines = lines_done(cfg.out, records, list(rubrics))
    rank, world, dtype = join_world(cfg.dtype)
    judge = load_policy(cfg.judge)
    for p in judge.parameters():
        p.data = p.data.to(dtype)  # not judge.to(dtype): rotary frequencies must stay float32
    load_weights(judge)
    if rank == 0:
        write_text(cfg.out, "".join(lines))  # the same lines, without half a one at the end

    at_once = 32 * world  # rows between two writes: what a kill may cost
    any_digit_NK = torch.zeros(0, len(rubrics))
    catch_signals()
    for start in tqdm(range(len(lines), len(rows), at_once), "rating", disable=rank > 0 or None):
        heed_signals()
        own_rows = rows[start:start + at_once][rank::world]
        ids = questions(judge.tokenizer, own_rows, rubrics)
        p_M5 = digit_probs(judge, ids, cfg.max_tokens)
        p_NK5 = p_M5.view(len(own_rows), len(rubrics), 5)
        p_NK5 = torch.tensor(collect(p_NK5.tolist()))  # those of all processes
        scores_NK = p_NK5 @ (torch.arange(5) / 4) / p_NK5.sum(-1)  # the expected digit, 1 as 0
        any_digit_NK = torch.cat([any_digit_NK, p_NK5.sum(-1)])
        if rank > 0:
            continue
        with open(cfg.out, "a", encoding="utf-8") as f:
            for record, scores_K in zip(records[start:], scores_NK.tolist()):
                # JSON has no NaN
                scores_K = [None if math.isnan(s) else round(s, 6) for s in scores_K]
                row = {**record, "scores": dict(zip(rubrics, scores_K))}
                f.write(to_json(row) + "\n")

    too_long = any_digit_NK.isnan().sum().item()
    say(f"{len(rows)} rows rated in {cfg.out}; {too_long} scores are null: the question was longer "
        f"than --max_tokens={cfg.max_tokens}")
    certain = any_digit_NK.nanmean().item()
    if certain < 0.5:  # false for nan, when nothing was asked
        say(f"warning: {cfg.judge} answers with a digit at probability {certain:.2f} only: it may "
            "not understand the question")


if __name__ == "__main__":
    launch(main, Config, __doc__)
