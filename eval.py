"""
Policies side by side: every policy answers the same held-out prompts, the reward model scores the answers axis by axis.

    torchrun eval.py                                    # the toy world: out/toy/policy against out/mogrpo/policy
    torchrun --nproc_per_node=8 eval.py --policies=base=Qwen/Qwen2.5-7B-Instruct,mogrpo=out/mogrpo/policy \\
        --reward_model=out/rm --prompts=heldout.jsonl --out_dir=out/eval
    torchrun eval.py --policies=steered=out/mogrpo/policy --reward_model=out/toy/reward_model --prompts=out/toy/heldout_prompts.jsonl \\
        --max_new_tokens=48 --sweep=safety --picture    # a policy trained with --steer, along the weight of safety

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

from mogrpo import Policy, load_prompts, rollout, stated, toy_world, true_scores
from reward_model import DTYPES, RewardModel, collect, die, fresh_folder, join_world, parse, render, require, run, say, shard, write_text

@dataclass
class Config:
    policies: str = "toy"         # name=folder,... the first is the baseline; toy: base=out/toy/policy,mogrpo=out/mogrpo/policy
    reward_model: str = "toy"     # folder that scores the answers; empty: only write them; toy: out/toy/reward_model
    prompts: str = "toy"          # held-out prompts, JSONL; an optional "tag" splits the table; toy: the held-out toy requests
    out_dir: str = "out/eval"     # eval.json and samples.jsonl; an earlier folder there is renamed, not overwritten
    sweep: str = ""               # an axis: state its weight as 0, 1/4, ... 1 of the whole to policies trained with --steer
    picture: bool = False         # draw the table, too: eval.png in --out_dir; wants matplotlib
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
STEPS = (0.0, 0.25, 0.5, 0.75, 1.0)  # shares of the swept axis; the others have the rest in equal parts


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

def answer(policy, file, weights_K, reward_model, cfg, rank, world, device):
    """All processes: the policy's answers to the prompts of `file` -> {index: dict}; `weights_K`: to state, or None."""
    prompts = load_prompts(file, policy.tokenizer, cfg.max_prompt_tokens)  # by each policy's own tokenizer and chat template
    require(prompts, f"{file}: no prompt is short enough for --max_prompt_tokens={cfg.max_prompt_tokens}")
    mine = prompts[rank::world]  # each process its share
    if weights_K is not None:
        mine = [dict(p, ids=render(policy.tokenizer, stated(p["messages"], weights_K, reward_model.axes))) for p in mine]
    groups, *_ = rollout(policy, reward_model, mine, [(cfg.seed, "eval", p["index"]) for p in mine], cfg.samples, cfg,
                         device)
    found = collect([{**{k: g[k] for k in ("index", "messages", "tag", "text", "ended")}, "scores": g["scores_GK"].tolist(),
                      "tokens": [len(r) for r in g["responses"]]} for g in groups])
    return {a["index"]: a for a in found}

def show(title, table):
    """Print one line for each measure and policy; the first policy is the baseline."""
    say(f"\n{title}\n{'':<20}{'policy':<17}{'mean':>8}{'95 %':>8}{'gain':>9}{'95 %':>8}{'wins':>7}")
    for measure, by_policy in table.items():
        for i, (name, r) in enumerate(by_policy.items()):
            line = f"{'' if i else measure:<20}{name[:16]:<17}{r['mean']:>8.3f}{'±' + format(r['ci'], '.3f'):>8}"
            say(line + (f"{r['gain']:>+9.3f}{'±' + format(r['gain_ci'], '.3f'):>8}{r['win']:>7.0%}" if i else ""))

def draw(path, table, sweep):
    """The table as a picture: every measure's mean and 95 % interval, by policy or, along a sweep, by the stated weight."""
    import matplotlib.pyplot as plt
    measures = [m for m in table if m != "tokens"]
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for i, m in enumerate(measures):
        rows = list(table[m].values())
        for j in range(0, len(rows), len(STEPS) if sweep else len(rows)):  # along a sweep every policy has a line of its own
            part = rows[j:j + len(STEPS)] if sweep else rows
            x = STEPS if sweep else [p + 0.6 * (i / len(measures) - 0.5) for p in range(len(rows))]
            axes.errorbar(x, [r["mean"] for r in part], [r["ci"] for r in part], label=None if j else m, color=f"C{i}", marker="o",
                          linestyle="-" if sweep else "", capsize=2)
    if sweep:
        axes.set_xlabel(f"stated weight of {sweep}")
    else:
        axes.set_xticks(range(len(table[m])), list(table[m]))
    axes.set_ylabel("mean score, 95 % interval"), axes.set_ylim(-0.02, 1.02), axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=150, bbox_inches="tight")

def main(cfg):
    if cfg.picture:
        try:
            import matplotlib
            matplotlib.use("Agg")  # to a file, without a screen
        except ImportError:
            die("--picture needs matplotlib: pip install matplotlib")
    is_toy = cfg.prompts in ("toy", "out/toy/heldout_prompts.jsonl")  # where the truth is known
    if is_toy:
        toy_world()
    place = lambda given, name: f"out/toy/{name}" if given == "toy" else given
    policies = "base=out/toy/policy,mogrpo=out/mogrpo/policy" if cfg.policies == "toy" else cfg.policies
    policies = dict(pair.split("=", 1) for pair in policies.split(","))
    if cfg.policies == "toy":
        require(os.path.isdir("out/mogrpo/policy"), "out/mogrpo/policy does not exist yet; run mogrpo.py first")
    rank, world, device, dtype = join_world(cfg.dtype)

    # 1. Every policy answers every prompt; the answers are scored as they come
    reward_model = None
    if cfg.reward_model:
        reward_model = shard(RewardModel(place(cfg.reward_model, "reward_model")).eval().requires_grad_(False), device, dtype)
    axes, answers, file = reward_model.axes if reward_model else [], {}, place(cfg.prompts, "heldout_prompts.jsonl")
    require(not cfg.sweep or cfg.sweep in axes and len(axes) > 1, f"--sweep={cfg.sweep}: the reward model's axes are {', '.join(axes)}")
    for name, path in policies.items():
        say(f"{name}: {path} answers and is scored")
        policy = shard(Policy(path).requires_grad_(False), device, dtype)  # frozen: bfloat16 shards on GPU
        for share in STEPS if cfg.sweep else (None,):  # a sweep makes five policies of one
            weights_K = torch.tensor([share if k == cfg.sweep else (1 - share) / (len(axes) - 1) for k in axes]) if cfg.sweep else None
            answers[name + f" {share}" * bool(cfg.sweep)] = answer(policy, file, weights_K, reward_model, cfg, rank, world, device)

    # 2. What is compared: each prompt's mean over its samples, on the prompts that all policies could read
    common = sorted(set.intersection(*map(set, answers.values())))  # tokenizers differ, and so do limits
    require(common, "no prompt is short enough for all policies")
    measures = {name: {} for name in answers}
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
    base, result = next(iter(answers)), {}
    tags = [answers[base][i]["tag"] for i in common]
    for tag in ["all", *sorted({t for t in tags if t is not None}, key=str)]:
        mine = torch.tensor([tag in ("all", t) for t in tags])  # a mask over the common prompts
        result[str(tag)] = {m: {name: compare(measures[name][m][mine], measures[base][m][mine]) for name in answers}
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
        if cfg.picture:
            draw(f"{cfg.out_dir}/eval.png", result["all"], cfg.sweep)
    say(f"\nsaved in {cfg.out_dir}: eval.json, samples.jsonl{', eval.png' * cfg.picture}")

if __name__ == "__main__":
    run(main, parse(Config, sys.argv[1:], __doc__, TOY))
