"""
mogrpo beside TRL's GRPOTrainer: the same models, prompts, group, length, steps and threads.

    pip install trl datasets                 # an optional extra, for this comparison alone
    python -m bench.trl                      # the toy world
    python -m bench.trl --policy=HuggingFaceTB/SmolLM2-135M-Instruct --prompts=prompts.jsonl \\
        --max_new_tokens=64 --rounds=1

Each way runs in a process of its own, in turns, `rounds` times; a step is what lies between the
ends of two steps: sampling, scoring, update and logging, without the first, which makes AdamW's
moments.
Printed are the medians of all steps and their ratio. Both sample at temperature 1 with a KL of beta
0.04 to a frozen copy, one epoch, in float32 on a CPU and bfloat16 on a GPU. TRL is as its defaults
are, without vLLM (a second engine beside it), and scores a step in one batch; it trains on one,
too, unless --trl_rows says otherwise (its logits of a whole step may not fit). The reward is the
mean of the reward model's sigmoids, or without one the response's length, which costs nothing.

What it is not: a comparison of what is learned, or of either on many GPUs.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass

import torch

import mogrpo
from mogrpo import CUDA, launch, require, say, write_text

@dataclass
class Config:
    policy: str = "toy"           # folder or hub id of both
    reward_model: str = ""        # folder; empty: the response's length is the reward
    prompts: str = ""             # JSONL
    group_size: int = 8           # responses to a prompt
    prompts_per_step: int = 8
    max_new_tokens: int = 48
    steps: int = 9                # of each run; the first is left out
    rounds: int = 3               # runs of each way, in turns
    threads: int = 2              # of the CPU, for each
    trl_rows: int = 0             # of one forward and backward pass of TRL; 0: all of a step
    only: str = ""                # mogrpo or trl: run this way alone, here, and print its seconds

    def __post_init__(self):
        require(self.prompts, "--prompts: a file of prompts is needed")
        require(self.steps > 1 and self.rounds > 0, "--steps must be above 1, --rounds above 0")

TOY = dict(policy="out/toy/policy", reward_model="out/toy/reward_model",
           prompts="out/toy/prompts.jsonl")

LENGTH = "def scores(record, response): return {'length': len(response) / 1000}\n"

def run_mogrpo(cfg, folder):
    """-> the times at which its steps ended."""
    write_text(f"{folder}/length_rule.py", LENGTH)
    rules = "" if cfg.reward_model else f"{folder}/length_rule.py"
    run = mogrpo.setup(mogrpo.Config(
        policy=cfg.policy, reward_model=cfg.reward_model, rules=rules, prompts=cfg.prompts,
        heldout_prompts=cfg.prompts, out_dir=f"{folder}/out", group_size=cfg.group_size,
        prompts_per_step=cfg.prompts_per_step, max_new_tokens=cfg.max_new_tokens, steps=cfg.steps,
        lr=1e-5, save_interval=0))
    run.heldout = []  # nothing is evaluated
    torch.set_num_threads(cfg.threads)
    ends = []

    def timed_step(run, step):
        metrics = mogrpo.grpo_step(run, step)
        ends.append(time.perf_counter())
        return metrics

    mogrpo.train(run, timed_step)
    return ends

def run_trl(cfg, folder):
    """-> the times at which its steps ended."""
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback)
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(cfg.threads)
    device = "cuda" if CUDA else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(cfg.policy)
    rows = [dict(prompt=mogrpo.conversation(*line)) for line in mogrpo.read_jsonl(cfg.prompts)]
    if not tokenizer.chat_template:
        rows = [dict(prompt=row["prompt"][-1]["content"]) for row in rows]

    def length(completions, **_):
        return [len(c if isinstance(c, str) else c[-1]["content"]) / 1000 for c in completions]

    @torch.no_grad()
    def mean_sigmoid(prompts, completions, **_):
        texts = []
        for prompt, completion in zip(prompts, completions):
            if isinstance(prompt, str):
                texts.append(f"{prompt}\n{completion}")
            else:
                texts.append(words.apply_chat_template(prompt + completion, tokenize=False))
        batch = words(texts, padding=True, truncation=True, return_tensors="pt").to(device)
        logits = judge(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return logits.sigmoid().mean(-1).tolist()

    if cfg.reward_model:
        words = AutoTokenizer.from_pretrained(cfg.reward_model)
        words.model_max_length = min(words.model_max_length, 1024)
        judge = AutoModelForSequenceClassification.from_pretrained(cfg.reward_model).to(device)

    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

    rows_a_step = cfg.group_size * cfg.prompts_per_step
    at_once = cfg.trl_rows or rows_a_step
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(
            cfg.policy, dtype=torch.bfloat16 if CUDA else torch.float32),
        reward_funcs=mean_sigmoid if cfg.reward_model else length,
        args=GRPOConfig(
            output_dir=folder, per_device_train_batch_size=at_once,
            gradient_accumulation_steps=rows_a_step // at_once, max_steps=cfg.steps,
            num_generations=cfg.group_size, max_completion_length=cfg.max_new_tokens, beta=0.04,
            learning_rate=1e-5, temperature=1.0, use_cpu=not CUDA, bf16=CUDA,
            gradient_checkpointing=CUDA, report_to=[], save_strategy="no", disable_tqdm=True),
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Clock()])
    trainer.train()
    return ends

def seconds_of(way, cfg):
    """Seconds of each step of a run in a process of its own."""
    flags = [f"--{name}={value}" for name, value in (asdict(cfg) | dict(only=way)).items()]
    env = dict(os.environ, OMP_NUM_THREADS=str(cfg.threads), TOKENIZERS_PARALLELISM="false",
               PYTHONPATH=os.pathsep.join([mogrpo.HERE, os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run([sys.executable, "-m", "bench.trl", *flags], env=env, text=True,
                          capture_output=True)
    require(done.returncode == 0, f"{way} failed with exit status {done.returncode} (-9: killed, "
            f"as where memory is short): {done.stderr[-300:]}")
    return json.loads(done.stdout.strip().split("\n")[-1])

def main(cfg):
    ways = dict(mogrpo=run_mogrpo, trl=run_trl)
    if cfg.only:
        with tempfile.TemporaryDirectory() as folder:
            ends = ways[cfg.only](cfg, folder)
        say(json.dumps([after - before for before, after in zip(ends, ends[1:])]))
        return
    seconds = dict(mogrpo=[], trl=[])
    for n in range(cfg.rounds):
        for way in ways:
            seconds[way] += seconds_of(way, cfg)
            median = statistics.median(seconds[way])
            say(f"round {n + 1}: {way:<7} {median:.3f} s a step, the median of {len(seconds[way])}")
    ratio = statistics.median(seconds["trl"]) / statistics.median(seconds["mogrpo"])
    say(f"TRL's step takes {ratio:.2f} times as long, {cfg.threads} threads each")


if __name__ == "__main__":
    launch(main, Config, __doc__, TOY)
