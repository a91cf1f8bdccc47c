"""
Policies side by side: each answers the same held-out prompts, and the answers are scored.

    torchrun eval.py                                # the toy world: before against after mogrpo.py
    torchrun --nproc_per_node=8 eval.py --out_dir=out/eval --prompts=heldout.jsonl \\
        --policies=base=Qwen/Qwen2.5-7B-Instruct,mogrpo=out/mogrpo/policy \\
        --reward_model=out/rm --rules=rules.py

The first policy is the baseline that the others are compared with. For a prompt q and one axis, x_q
is the mean score of a policy's samples and b_q that of the baseline's. With P prompts:

    mean = mean_q x_q          interval = 1.96 std_q x_q / sqrt(P)
    gain = mean_q (x_q - b_q)  interval = 1.96 std_q (x_q - b_q) / sqrt(P)      paired by prompt
    wins = share of prompts with x_q > b_q, a tie counting half

The unit is the prompt, since answers to one prompt are not independent. All policies draw the same
random numbers for the same (prompt, sample), and what a prompt adds to both cancels in the
difference, so its interval is far narrower than that of two separate means.

Written to --out_dir: eval.json (the table, over all prompts and for each "tag"), samples.jsonl
(every answer with its scores, in the input format of `reward_model.py --score`) and, with
--picture, eval.png. Without a reward model and rules it only samples.

What it is not: a judge of truth. It measures what the reward model sees, and a policy trained
against that model may have learned to please it. Score with a second reward model, give a --truth
where there is one (the toy world has), or read the samples.
"""
import math
import os
from dataclasses import asdict, dataclass, replace

import torch

import mogrpo
from mogrpo import Policy, collect, die, require, say, shard

@dataclass
class Config:
    policies: str = "toy"         # name=folder,name=folder,...; the first is the baseline
    reward_model: str = ""        # DIR,DIR: folders whose axes score the answers
    rules: str = ""               # FILE.py: scores(record, response) -> {axis: number}, more axes
    truth: str = ""               # FILE.py of the same form: the true scores, where they are known
    prompts: str = ""             # held-out prompts, JSONL; an optional "tag" splits the table
    out_dir: str = "out/eval"     # an earlier folder there is renamed, not overwritten
    picture: bool = False         # draw the table, too: eval.png in --out_dir; wants matplotlib
    samples: int = 4              # answers a prompt; more narrow the interval only a little
    sample_rows: int = 256        # answers decoded at once; bounds the key-value cache
    max_prompt_tokens: int = 512  # longer prompts are skipped and counted
    max_new_tokens: int = 512     # answers are cut here
    temperature: float = 1.0      # of sampling; 0 takes the likeliest token every time
    dtype: str = "auto"           # float32 | bfloat16 | float64 compute; auto: bfloat16 on GPU
    seed: int = 0                 # of the random numbers that all policies share

    def __post_init__(self):
        # One clear line for each mistake, before any model is loaded
        for name in ("samples", "sample_rows", "max_prompt_tokens", "max_new_tokens"):
            value = getattr(self, name)
            require(value > 0, f"--{name}={value}: must be greater than 0")
        require(self.temperature >= 0, f"--temperature={self.temperature}: must not be negative")
        known = ", ".join(mogrpo.DTYPES)
        require(self.dtype in mogrpo.DTYPES, f"--dtype={self.dtype}: expected one of {known}")
        require(self.prompts, "--prompts: a file of held-out prompts is needed")
        folders(self.policies)  # refuses what it cannot read

# What holds while --policies=toy, unless it is typed
TOY = dict(
    policies="base=out/toy/policy,mogrpo=out/mogrpo/policy",
    reward_model="out/toy/reward_model",
    prompts="out/toy/heldout_prompts.jsonl",  # two nouns of each verb that training never saw
    truth=mogrpo.TOY["truth"],                # the rule that knows the true scores
    max_new_tokens=48,
)

def folders(policies):
    """The flag --policies -> {name: folder}, in its order."""
    paths = {}
    for pair in policies.split(","):
        name, _, folder = pair.partition("=")
        require(name and folder, f"--policies={policies}: expected name=folder,name=folder")
        require(name not in paths, f"--policies={policies}: two policies of the name {name}")
        paths[name] = folder
    return paths

# --------------------------------------------------------------------------------------------------
# 1. Statistics. P: prompts

def mean_and_interval(x_P):
    """Mean over prompts and half its 95 % interval (normal; nan for a single prompt)."""
    half = math.nan
    if len(x_P) > 1:
        half = 1.96 * x_P.std().item() / math.sqrt(len(x_P))
    return x_P.mean().item(), half

def compare(x_P, base_P):
    """One measure of a policy against the baseline's -> dict of mean, ci, gain, gain_ci, win."""
    mean, half = mean_and_interval(x_P)
    gain, gain_half = mean_and_interval(x_P - base_P)  # paired: what a prompt adds to both cancels
    won_P = (x_P - base_P > 1e-6).double()
    tied_P = ((x_P - base_P).abs() <= 1e-6).double()
    win = (won_P + 0.5 * tied_P).mean().item()
    return dict(mean=mean, ci=half, gain=gain, gain_ci=gain_half, win=win)

# --------------------------------------------------------------------------------------------------
# 2. Answers. B: answers of this process, K: axes, J: true axes, M: measures, K + J + 1

def answers_of(policy, reward_models, rules, truth, cfg, rank, world):
    """A policy's answers to the prompts that it can read -> {prompt index: list of answers}, each a
    dict with M `values`. All processes call it, each answers its share, all get the whole."""
    # Each policy has its own tokenizer and chat template, so the same prompt has its own ids
    prompts = mogrpo.load_prompts(cfg.prompts, policy, cfg)
    require(prompts, f"{cfg.prompts}: no prompt has at most {cfg.max_prompt_tokens} tokens")
    own = prompts[rank::world]
    # The random numbers are the same for every policy
    rows = mogrpo.rollout(policy, own, (cfg.seed, "eval"), cfg.samples, cfg)
    scores_BK = mogrpo.score_responses(rows, reward_models, rules)
    true_BJ = mogrpo.score_responses(rows, [], truth)  # J is 0 where there is no truth
    by_prompt = {prompt["index"]: [] for prompt in own}
    for row, scores_K, true_J in zip(rows, scores_BK.tolist(), true_BJ.tolist()):
        values_M = [*scores_K, *true_J, len(row["response"])]
        prompt = row["prompt"]
        by_prompt[prompt["index"]].append(dict(
            messages=prompt["messages"],
            tag=prompt["tag"],
            response=row["text"],
            values=values_M,
        ))
    return dict(collect(list(by_prompt.items())))

# --------------------------------------------------------------------------------------------------
# 3. The table and the picture; a table is {measure: {policy: dict of `compare`}}

def show(title, table):
    """Print a line for each measure and policy."""
    say(f"\n{title}")
    say(f"{'':<20}{'policy':<17}{'mean':>8}{'95 %':>8}{'gain':>9}{'95 %':>8}{'wins':>7}")
    for measure, by_policy in table.items():
        heading = measure  # stands once, before the baseline, which has no gain
        for policy, r in by_policy.items():
            interval = f"±{r['ci']:.3f}"
            line = f"{heading:<20}{policy[:16]:<17}{r['mean']:>8.3f}{interval:>8}"
            if not heading:
                interval = f"±{r['gain_ci']:.3f}"
                line += f"{r['gain']:>+9.3f}{interval:>8}{r['win']:>7.0%}"
            say(line)
            heading = ""

def draw(path, table):
    """The table as a picture: axis by axis, with the policies side by side, mean and 95 % interval.
    An axis has one colour: a filled point is its learned score, a hollow one beside it the true."""
    import matplotlib
    matplotlib.use("Agg")  # to a file, without a screen
    from matplotlib import pyplot
    policies = list(table["tokens"])
    names = [name.removeprefix("true ") for name in table if name != "tokens"]
    axes = list(dict.fromkeys(names))  # each once, in order
    figure, plot = pyplot.subplots(figsize=(2 + 0.6 * len(axes) * len(policies), 4.5))
    ticks = []
    for i, axis in enumerate(axes):
        color = f"C{i % 10}"
        first = i * (len(policies) + 1)  # one place stays free between axes
        x = list(range(first, first + len(policies)))
        ticks += x
        for measure, shift, face in ((axis, 0.0, color), (f"true {axis}", 0.25, "white")):
            rows = list(table.get(measure, {}).values())  # none where there is no truth
            plot.errorbar(
                [at + shift for at in x[: len(rows)]],
                [r["mean"] for r in rows],
                [r["ci"] for r in rows],
                fmt="o",  # points without a line
                color=color,
                markerfacecolor=face,
                capsize=2,
            )
        above = plot.get_xaxis_transform()  # x as the points, y as a share of the height
        plot.text(first, 1.02, axis, color=color, transform=above)
    plot.set_xticks(ticks, policies * len(axes), rotation=45, ha="right")
    plot.set_ylabel("mean score, 95 % interval (hollow: true)")
    plot.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=150, bbox_inches="tight")

# --------------------------------------------------------------------------------------------------
# 4. Main

def main(cfg):
    """Answer, compare, print and write; every process calls it."""
    if cfg.picture:
        try:
            import matplotlib  # asked now, not after the hours that the answers take
        except ImportError:
            die("--picture needs matplotlib: pip install matplotlib")
    cfg = replace(cfg, temperature=max(1e-6, cfg.temperature))  # softmax at 1e-6 is the argmax
    paths = folders(cfg.policies)
    for path in paths.values():  # the toy's second one is what a run of mogrpo.py leaves
        exists = path != "out/mogrpo/policy" or os.path.isdir(path)
        require(exists, f"{path} does not exist yet; run mogrpo.py first")

    # 1. What scores: reward models, rules, the truth
    rank, world, dtype = mogrpo.join_world(cfg.dtype)
    _, record = next(mogrpo.read_jsonl(cfg.prompts))  # rules are tried on it
    rules = mogrpo.load_rules(cfg.rules, record)
    truth = mogrpo.load_rules(cfg.truth, record)
    reward_models = mogrpo.load_reward_models(cfg.reward_model, dtype)
    axes = mogrpo.axes_of(reward_models, rules)
    true_axes = [f"true {axis}" for axis in mogrpo.axes_of([], truth)]
    measures = [*axes, *true_axes, "tokens"]

    # 2. Every policy answers every prompt; only one policy is in memory at a time
    answers = {}
    mogrpo.catch_signals()
    try:
        for name, path in paths.items():
            say(f"{name}: {path} answers and is scored")
            policy = shard(Policy(path).requires_grad_(False), dtype)
            answers[name] = answers_of(policy, reward_models, rules, truth, cfg, rank, world)
    except mogrpo.Stopped:  # by a signal: the policies that are through are compared
        require(answers, "stopped before the first policy was through: there is nothing to keep")

    # 3. Compare on the prompts that all policies could read: tokenizers differ, and so do lengths
    base = next(iter(answers))
    common = [i for i in answers[base] if all(i in read for read in answers.values())]
    require(common, "no prompt is short enough for all policies")
    means_PM = {}  # by policy: each prompt's mean over its samples
    for name, by_prompt in answers.items():
        means = []
        for i in common:
            values_SM = [answer["values"] for answer in by_prompt[i]]
            means.append(torch.tensor(values_SM, dtype=torch.float64).mean(0))
        means_PM[name] = torch.stack(means)
    tags = [answers[base][i][0]["tag"] for i in common]
    tables = {}
    for tag in ["all", *sorted({str(t) for t in tags if t is not None})]:
        mask_P = torch.tensor([tag in ("all", str(t)) for t in tags])  # the tag's prompts
        table = {measure: {} for measure in measures}
        for name, x_PM in means_PM.items():
            for m, measure in enumerate(measures):
                table[measure][name] = compare(x_PM[mask_P, m], means_PM[base][mask_P, m])
        tables[tag] = table
        count = f"{int(mask_P.sum())} prompts x {cfg.samples} samples"
        show(f"{tag}: {count}; gain over {base}, paired by prompt", table)
    if rank == 0:
        write(cfg, paths, tables, answers, axes)
    say(f"\nsaved in {cfg.out_dir}: eval.json, samples.jsonl")

def write(cfg, paths, tables, answers, axes):
    """Everything into cfg.out_dir, made only now: a run that fails leaves nothing behind."""
    mogrpo.set_aside(cfg.out_dir)
    os.makedirs(cfg.out_dir)
    result = dict(policies=paths, config=asdict(cfg), table=tables)
    mogrpo.write_text(f"{cfg.out_dir}/eval.json", mogrpo.to_json(result, indent=1))
    lines = []
    for name, by_prompt in answers.items():
        for answer in sum(by_prompt.values(), []):  # of all prompts, in a row
            values_M = answer.pop("values")
            answer["tokens"] = values_M[-1]
            answer["scores"] = dict(zip(axes, values_M))  # the axes are the first K measures
            sample = dict(policy=name) | answer
            lines.append(mogrpo.to_json(sample) + "\n")
    mogrpo.write_text(f"{cfg.out_dir}/samples.jsonl", "".join(lines))
    if cfg.picture:
        draw(f"{cfg.out_dir}/eval.png", tables["all"])

if __name__ == "__main__":
    mogrpo.launch(main, Config, __doc__, TOY)
