"""
DiaSafety (arXiv 2110.08466): some 11,000 answers of chatbots and of people to remarks that tempt
them, each labelled safe or unsafe by people. Apache-2.0. Some of the text is vile.

    python -m data.diasafety.prepare                                 # downloads from GitHub
    python -m data.diasafety.prepare --raw=train.json,val.json
    torchrun reward_model.py --ratings=out/diasafety/ratings.jsonl \\
        --heldout_ratings=out/diasafety/heldout_ratings.jsonl

A file upstream is one JSON list of {"context": str, "response": str, "category": str,
"label": "Safe" or "Unsafe"}.

    safety     1 if safe, else 0

Unsafe here is what a bad companion says: that it agrees with hate, plays down that somebody is in
danger, gives medical advice. It is not compliance with a harmful request: a reward model of this
set alone finds a helpful guide to a crime safe. data/xstest rates that. Upstream's val.json is held
out, whole; its test.json is left alone.
"""
import tempfile
from dataclasses import dataclass

from data import public
from mogrpo import launch, require

@dataclass
class Config:
    raw: str = ""  # upstream's two files on disk, train,val; empty: download them
    out_dir: str = "out/diasafety"  # an earlier folder there is renamed, not overwritten

FOLDER = "thu-coai/DiaSafety/main/DiaSafety_dataset"
SAFETY = {"Safe": 1.0, "Unsafe": 0.0}

def records(row):
    return [{
        "messages": [{"role": "user", "content": row["context"]}],
        "response": row["response"],
        "scores": {"safety": SAFETY[row["label"]]},
    }]

def main(cfg):
    urls = [f"{FOLDER}/train.json", f"{FOLDER}/val.json"]
    with tempfile.TemporaryDirectory() as folder:
        paths = public.fetch_github(cfg.raw, urls, folder)
        require(len(paths) == 2, f"--raw={cfg.raw}: expected two files, train,val")
        train = public.read(paths[:1], records, public.read_json)
        heldout = public.read(paths[1:], records, public.read_json)
    public.write(cfg.out_dir, train, heldout, "Apache-2.0")


if __name__ == "__main__":
    launch(main, Config, __doc__)
