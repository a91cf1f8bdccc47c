"""
Stanford politeness corpus, its Wikipedia part (arXiv 1306.6078): 4,353 requests that editors made
of each other, each rated by five people. The authors ask to be cited; the file names no licence.

    python -m data.politeness.prepare                                # downloads from GitHub
    python -m data.politeness.prepare --raw=wikipedia.annotated.csv
    torchrun reward_model.py --ratings=out/politeness/ratings.jsonl,[...] \\
        --heldout_ratings=out/politeness/heldout_ratings.jsonl,[...]

A row upstream is "Request", "Score1" to "Score5", each from 1 (rude) to 25 (polite), and more.

    politeness   the mean of the five, mapped to [0, 1]

Nobody asked for these texts, so a prompt is made up, the same before each: "Write a message to
another editor." Hence they are split by text and not by prompt, and there is no prompts.jsonl.
These are requests, not answers: whether a reward model of them can tell a polite answer is for
--score on answers of your own to show.
"""
import tempfile
from dataclasses import dataclass

from data import public
from mogrpo import is_held_out, launch, require, say

@dataclass
class Config:
    raw: str = ""  # upstream's file on disk; empty: download it
    out_dir: str = "out/politeness"  # an earlier folder there is renamed, not overwritten
    heldout_frac: float = 0.1  # of the texts
    seed: int = 0  # of the held-out split

URL = "sudhof/politeness/python3/corpora/wikipedia.annotated.csv"  # by one of the authors
PROMPT = "Write a message to another editor."

def records(row):
    rated = [public.score(row[f"Score{i}"], worst=1, best=25) for i in range(1, 6)]
    return [{
        "messages": [{"role": "user", "content": PROMPT}],
        "response": row["Request"],
        "scores": {"politeness": round(sum(rated) / 5, 4)},
    }]

def main(cfg):
    with tempfile.TemporaryDirectory() as folder:
        paths = public.fetch_github(cfg.raw, [URL], folder)
        ratings = public.read(paths, records, public.read_csv)
    sides = [], []  # not held out, held out
    for record in ratings:
        text = [{"role": "user", "content": record["response"]}]
        sides[is_held_out(text, cfg.heldout_frac, cfg.seed)].append(record)
    train, heldout = sides
    require(train and heldout, "too few texts: some are needed to train on and some held out")
    public.save(cfg.out_dir, {"ratings": train, "heldout_ratings": heldout})
    say(f"{cfg.out_dir}: {len(train)} ratings; held out {len(heldout)}")


if __name__ == "__main__":
    launch(main, Config, __doc__)
