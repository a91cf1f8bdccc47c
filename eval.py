"""
Policies side by side: every policy answers the same held-out prompts, the reward model scores the answers axis by axis.

    torchrun eval.py                                    # the toy world: out/toy/policy against out/mogrpo/policy
    torchrun --nproc_per_node=8 eval.py --policies=base=Qwen/Qwen2.5-7B-Instruct,mogrpo=out/mogrpo/policy \\
        --reward_model=out/rm --prompts=heldout.jsonl --out_dir=out/eval

The first policy is the one that the others are compared with. All draw the same random numbers for the same (prompt, sample),
and differences are taken prompt by prompt, so their interval is far narrower than that of two separate means. The unit is the
prompt: its samples are averaged first, since answers to one prompt are not independent. Written to --out_dir: eval.json (the
table) and samples.jsonl (every answer with its scores; it is also the input format of `reward_model.py --score`). What it is
not: a judge of truth. It measures what the reward model sees, and a policy trained against that model may have learned to
please it; score with a second reward model, or read the samples. In the toy world alone the true scores stand beside it.
"""
import json, math, os, sys
from dataclasses import asdict, dataclass

import torch

from mogrpo import Policy, load_prompts, rollout, toy_world, true_scores
from reward_model import DTYPES, RewardModel, collect, fresh_folder, join_world, parse, require, run, say, shard, write_text

@dataclass
class Config:
    policies: str = "toy"         # name=folder,... the first is the baseline; toy: base=out/toy/policy,mogrpo=out/mogrpo/policy
    reward_model: str = "toy"     # folder that scores the answers; toy: out/toy/reward_model
    prompts: str = "toy"          # held-out prompts, JSONL; an optional "tag" splits the table; toy: the held-out toy requests
    out_dir: str = "out/eval"     # eval.json and samples.jsonl; an earlier folder there is renamed, not overwritten
    samples: int = 4              # answers a prompt; more narrow the interval only as far as prompts agree
    sample_rows: int = 256        # answers that a process decodes at once; bounds the key-value cache
    max_prompt_tokens: int = 512  # longer prompts are skipped and counted
    max_new_tokens: int = 512     # answers are cut here
    temperature: float = 1.0      # of sampling; 0 takes the likeliest token every time
    dtype: str = "auto"           # float32 | bfloat16 | float64 compute; auto: bfloat16 on GPU
    seed: int = 0                 # of the random numbers that all policies share

    def __post_init__(self):
        for name in ("samples", "sample_rows", "max_prompt_tokens", "max_new_tokens"):
            require(getattr(self, name) > 0, f"--{name}={getattr(self, name)}: must be greater than 0")
        require(self.temperature >= 0, f"--temperature={self.temperature}: must not be negative")
        require(self.dtype in DTYPES, f"--dtype={self.dtype}: expected one of {', '.join(DTYPES)}")
        names = [pair.partition("=")[0] for pair in self.policies.split(",")]
        require(self.policies == "toy" or all(pair.partition("=")[2] for pair in self.policies.split(",")),
                f"--policies={self.policies}: expected name=folder,name=folder")
        require(len(set(names)) == len(names), f"--policies={self.policies}: two policies of one name")
        require(self.policies == "toy" or "toy" not in (self.reward_model, self.prompts), "with --policies, give --reward_model and --prompts, too")

TOY = dict(max_new_tokens=48)  # defaults while --policies=toy


# ------------------------------------------------------------------------------------------------------------------------
# Statistics

def mean_and_interval(x_P):
    """Mean over P prompts and half its 95 % interval (normal approximation; nan below two prompts)."""
    return x_P.mean().item(), 1.96 * x_P.std().item() / math.sqrt(len(x_P)) if len(x_P) > 1 else math.nan

def compare(values_P, base_P):
    """One axis of one policy against the baseline, both the prompts' means: mean, paired difference, win rate (a tie is half)."""
    mean, half = mean_and_interval(values_P)
    gain, gain_half = mean_and_interval(values_P - base_P)  # paired: what a prompt adds to both cancels
    wins = ((values_P - base_P > 1e-6).double() + 0.5 * ((values_P - base_P).abs() <= 1e-6)).mean().item()
    return dict(mean=mean, ci=half, gain=gain, gain_ci=gain_half, win=wins)


# ------------------------------------------------------------------------------------------------------------------------
# Main

def answer(path, file, reward_model, cfg, rank, world, device, dtype):
    """All processes: the answers of the policy at `path` to the prompts of `file` -> a list of dicts, one a prompt."""
    policy = shard(Policy(path).requires_grad_(False), device, dtype)  # frozen: bfloat16 shards on GPU
    prompts = load_prompts(file, policy.tokenizer, cfg.max_prompt_tokens)  # by each policy's own tokenizer and chat template
    require(prompts, f"{file}: no prompt is short enough for --max_prompt_tokens={cfg.max_prompt_tokens}")
    mine = prompts[rank::world]  # each process its share
    groups, *_ = rollout(policy, reward_model, mine, [(cfg.seed, "eval", p["index"]) for p in mine], cfg.samples, cfg,
                         device)
    return collect([{**{k: g[k] for k in ("index", "messages", "tag", "text", "ended")}, "scores": g["scores_GK"].tolist(),
                     "tokens": [len(r) for r in g["responses"]]} for g in groups])

def show(title, table):
    """Print one line for each measure and policy; the first policy is the baseline."""
    say(f"\n{title}\n{'':<20}{'policy':<12}{'mean':>8}{'95 %':>8}{'gain':>9}{'95 %':>8}{'wins':>7}")
    for measure, by_policy in table.items():
        for i, (name, r) in enumerate(by_policy.items()):
            line = f"{'' if i else measure:<20}{name[:11]:<12}{r['mean']:>8.3f}{'±' + format(r['ci'], '.3f'):>8}"
            say(line + (f"{r['gain']:>+9.3f}{'±' + format(r['gain_ci'], '.3f'):>8}{r['win']:>7.0%}" if i else ""))

def main(cfg):
    is_toy = cfg.prompts == "toy"
    if is_toy:
        toy_world()
    place = lambda given, name: f"out/toy/{name}" if given == "toy" else given
    policies = "base=out/toy/policy,mogrpo=out/mogrpo/policy" if cfg.policies == "toy" else cfg.policies
    policies = dict(pair.split("=", 1) for pair in policies.split(","))
    if cfg.policies == "toy":
        require(os.path.isdir("out/mogrpo/policy"), "out/mogrpo/policy does not exist yet; run mogrpo.py first")
    rank, world, device, dtype = join_world(cfg.dtype)

    # 1. Every policy answers every prompt; the answers are scored as they come
    reward_model = shard(RewardModel(place(cfg.reward_model, "reward_model")).eval().requires_grad_(False), device, dtype)
    axes, answers = reward_model.axes, {}
    for name, path in policies.items():
        say(f"{name}: {path} answers and is scored")
        answers[name] = {a["index"]: a for a in answer(path, place(cfg.prompts, "heldout_prompts.jsonl"), reward_model, cfg, rank,
                                                       world, device, dtype)}

    # 2. What is compared: each prompt's mean over its samples, on the prompts that all policies could read
    common = sorted(set.intersection(*map(set, answers.values())))  # tokenizers differ, and so do limits
    require(common, "no prompt is short enough for all policies")
    measures = {name: {} for name in policies}
    for name, of in answers.items():
        rows = [of[i] for i in common]
        for k, axis in enumerate(axes):
            measures[name][axis] = [[s[k] for s in a["scores"]] for a in rows]
        if is_toy:
            truth = [[true_scores(a["messages"][-1]["content"], text) for text in a["text"]] for a in rows]
            measures[name].update({f"true {k}": [[t[k] for t in ts] for ts in truth] for k in truth[0][0]})
        measures[name]["tokens"] = [a["tokens"] for a in rows]
        measures[name] = {m: torch.tensor(x_PS, dtype=torch.float64).mean(1) for m, x_PS in measures[name].items()}

    # 3. The table, over all prompts and for each tag
    base, result = next(iter(policies)), {}
    tags = [answers[base][i]["tag"] for i in common]
    for tag in ["all", *sorted({t for t in tags if t is not None}, key=str)]:
        mine = torch.tensor([tag in ("all", t) for t in tags])  # a mask over the common prompts
        result[str(tag)] = {m: {name: compare(measures[name][m][mine], measures[base][m][mine]) for name in policies}
                            for m in measures[base]}
        show(f"{tag}: {int(mine.sum())} prompts x {cfg.samples} samples; gain over {base}, paired by prompt", result[str(tag)])
    if rank == 0:
        fresh_folder(cfg.out_dir)  # only now: a run that fails leaves nothing behind
        clean = json.loads(json.dumps(result), parse_constant=lambda _: None)  # nan (a single prompt's interval) is not JSON
        write_text(f"{cfg.out_dir}/eval.json", json.dumps({"policies": policies, "config": asdict(cfg), "table": clean}, indent=1))
        write_text(f"{cfg.out_dir}/samples.jsonl", "".join(json.dumps(
            dict(policy=name, messages=a["messages"], tag=a["tag"], response=text, tokens=n, scores=dict(zip(axes, s))),
            ensure_ascii=False) + "\n" for name, of in answers.items() for a in of.values()
            for text, n, s in zip(a["text"], a["tokens"], a["scores"])))
    say(f"\nsaved in {cfg.out_dir}: eval.json, samples.jsonl")

if __name__ == "__main__":
    run(main, parse(Config, sys.argv[1:], __doc__, TOY))
