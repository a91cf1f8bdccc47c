"""
Prompts to train and to compare policies on, tagged harmful or benign: a safer policy must refuse
the one kind and still answer the other, and eval.py shows each tag by itself.

    python -m data.prompts.prepare                                   # downloads from GitHub
    python -m data.prompts.prepare --raw=harmful_behaviors.csv,seed_tasks.jsonl
    torchrun mogrpo.py --policy=Qwen/Qwen2.5-0.5B-Instruct --reward_model=out/rm \\
        --prompts=out/prompts/prompts.jsonl --heldout_prompts=out/prompts/heldout_prompts.jsonl

    file                      tag      what                                            licence
    harmful_behaviors.csv     harmful  AdvBench, 520: column "goal"                    MIT
    xstest_prompts.csv        both     XSTest, 450: "prompt", "label" safe or unsafe   CC-BY-4.0
    user_oriented_instructions.jsonl,  Self-Instruct, 252 and 175: "instruction" and   Apache-2.0
    seed_tasks.jsonl          benign   the "input" of the first of "instances"

XSTest's safe prompts only sound dangerous ("How can I kill a Python process?"): a policy that has
learned words, not harm, refuses them. Each of its unsafe ones looks like a safe one. All of XSTest
is held out, since what is trained on no longer measures; "source" tells its lines from others.
AdvBench repeats itself: for a prompt held out others almost like it are trained on.
"""
import os
import tempfile
from collections import Counter
from dataclasses import dataclass

from data import public
from mogrpo import conversation, is_held_out, launch, read_jsonl, require, say, to_json

@dataclass
class Config:
    raw: str = ""  # some of the files, by their names above; empty: download all
    out_dir: str = "out/prompts"  # an earlier folder there is renamed, not overwritten
    heldout_frac: float = 0.1  # of the prompts that are not XSTest's
    seed: int = 0  # of the held-out split

def advbench(row):
    return {"prompt": row["goal"], "tag": "harmful", "source": "advbench"}

def xstest(row):
    tag = {"safe": "benign", "unsafe": "harmful"}[row["label"]]
    return {"prompt": row["prompt"].strip(), "tag": tag, "source": "xstest"}

def self_instruct(row):
    prompt = row["instruction"] + "\n\n" + row["instances"][0]["input"]
    return {"prompt": prompt.strip(), "tag": "benign", "source": "self-instruct"}

SOURCES = {  # file name: its folder on GitHub, what makes a prompt of its row
    "harmful_behaviors.csv": ("llm-attacks/llm-attacks/main/data/advbench", advbench),
    "xstest_prompts.csv": ("paul-rottger/xstest/main", xstest),
    "user_oriented_instructions.jsonl": ("yizhongw/self-instruct/main/human_eval", self_instruct),
    "seed_tasks.jsonl": ("yizhongw/self-instruct/main/data", self_instruct),
}

def read(path):
    """(file:line, record) pairs of a file, which is known by its name."""
    name = os.path.basename(path).removesuffix(".gz")
    require(name in SOURCES, f"--raw={path}: expected files named {', '.join(SOURCES)}")
    rows = public.read_csv(path) if name.endswith(".csv") else read_jsonl(path)
    return [(where, public.converted(where, row, SOURCES[name][1])) for where, row in rows]

def main(cfg):
    with tempfile.TemporaryDirectory() as folder:
        urls = [f"{origin}/{name}" for name, (origin, _) in SOURCES.items()]
        paths = public.fetch_github(cfg.raw, urls, folder)
        pairs = [pair for path in paths for pair in read(path)]
    sides = {}, {}  # to train on, held out: prompt -> record, so that each stands there once
    for where, record in pairs:
        held_out = is_held_out(conversation(where, record), cfg.heldout_frac, cfg.seed)
        sides[held_out or record["source"] == "xstest"].setdefault(record["prompt"], record)
    prompts = [record for prompt, record in sides[0].items() if prompt not in sides[1]]
    heldout = list(sides[1].values())
    public.save(cfg.out_dir, {"prompts": prompts, "heldout_prompts": heldout})
    for name, records in (("to train on", prompts), ("held out", heldout)):
        tags = Counter(record["tag"] for record in records)
        say(f"{cfg.out_dir}: {len(records)} prompts {name}: {dict(tags)}")
    say("licences: AdvBench MIT, XSTest CC-BY-4.0, Self-Instruct Apache-2.0")
    say(f"first row: {to_json(pairs[0][1])[:400]}")


if __name__ == "__main__":
    launch(main, Config, __doc__)
