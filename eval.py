"""
Policies side by side: each answers the same held-out prompts, and the answers are scored.

    torchrun eval.py                                # the toy world: before against after mogrpo.py
    torchrun --nproc_per_node=8 eval.py --out_dir=out/eval --prompts=heldout.jsonl \\
        --policies=base=Qwen/Qwen2.5-7B-Instruct,mogrpo=out/mogrpo/policy \\
        --reward_model=out/rm,out/second_rm --blind=40
    python eval.py --votes=votes-ann.csv,votes-bob.csv --out_dir=out/eval       # human raters
    python eval.py --curves=out/mogrpo,out/another                              # runs over steps

The first policy is the baseline that the others are compared with. For a prompt q and one measure,
x_qs is that of a policy's sample s, b_qs of the baseline's, and x_q, b_q are means over samples:

    mean = mean_q x_q        gain = mean_q (x_q - b_q)
    wins = mean_q of the share of pairs, any sample against any, with x_qs > b_qr; ties half

The 95 % intervals of mean and gain are a bootstrap over clusters of prompts: variants of one prompt
are not independent, so lines of the prompts file with the same "cluster" are drawn together, and a
line without one is alone. 2,000 times as many clusters are drawn with replacement, and between the
2.5th and the 97.5th percentile of what they give is the interval, widened for few clusters as
Student's t is. Shares (wins, refusals) have Agresti and Coull's interval, which keeps a width near
0 and 1. `python -m bench.intervals` checks that they cover the truth. All policies draw the same
random numbers for the same (prompt, sample), and what a prompt adds to both cancels in the
difference, so a gain is far surer than two separate means. A prompt on which an axis has nothing to
say about some policy is left out for that axis.

Measures: every axis of the reward models and rules; "true ..." by --truth; and of the text itself
    refuses      share of answers that refuse within 200 characters, by their words (REFUSES, below,
                 and how far it is right). On prompts tagged benign that is over-refusal
    distinct-2   different pairs of neighbouring words over all such pairs, in a prompt's answers
    tokens       length

What it is not: a judge of truth. An axis marked * is scored by a reward model that a policy here
was trained to please, so its gain is circular. Give a second reward model (the folder's name then
stands behind the axis), rules or a --truth, ask human raters with --blind, or read the answers.

Out come, in --out_dir: eval.md (the tables, for all prompts and for each "tag"; and the ten lowest
answers of the last policy on each axis), eval.json and samples.jsonl (every answer, in the input
format of `reward_model.py --score`). With --picture eval.png. With --blind=40 forty pairs of
answers in blind.html, a page to vote on in any browser, and in blind.csv, the same for a
spreadsheet; which side is whose stands in blind_key.json alone. --votes reads the votes of both:
wins with an interval, and how far raters agree. Without reward model and rules it only samples.
"""
import gc
import json
import math
import os
import re
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import torch

import mogrpo
from data.human import votes
from mogrpo import collect, load_policy, require, say, shard

@dataclass
class Config:
    policies: str = "toy"         # name=folder,name=folder,...; the first is the baseline
    reward_model: str = ""        # DIR,DIR: folders whose axes score the answers
    rules: str = ""               # FILE.py: scores(record, response) -> {axis: number}, more axes
    truth: str = ""               # FILE.py of the same form: the true scores, where they are known
    prompts: str = ""             # held-out prompts, JSONL; an optional "tag" splits the table
    out_dir: str = "out/eval"     # an earlier folder there is renamed, not overwritten
    picture: bool = False         # draw the table, too: eval.png in --out_dir; wants matplotlib
    blind: int = 0                # so many pairs, first policy against last, for human raters
    votes: str = ""               # only count the votes of FILE.csv,FILE.csv on out_dir's pairs
    curves: str = ""              # only draw runs, out/a,out/b: curves.png in --out_dir
    eval_samples: int = 4         # answers a prompt; more narrow the interval only a little
    sample_rows: int = 256        # answers decoded at once; bounds the key-value cache
    max_prompt_tokens: int = 512  # longer prompts are skipped and counted
    max_new_tokens: int = 512     # answers are cut here
    temperature: float = 1.0      # of sampling; 0 takes the likeliest token every time
    dtype: mogrpo.Dtype = "auto"  # of compute; auto: bfloat16 on a GPU, else float32
    fast: bool = True             # mogrpo.py's own attention and cache, where they give the
                                  # library's numbers
    seed: int = 0                 # of the random numbers that all policies share

    def __post_init__(self):
        # One clear line for each mistake, before any model is loaded
        if self.votes or self.curves:  # the toy world is not built for flags that nobody reads
            self.policies = self.prompts = self.reward_model = self.truth = ""
            return
        least = min(self.eval_samples, self.sample_rows, self.max_prompt_tokens,
                    self.max_new_tokens)
        require(least > 0, "--eval_samples, --sample_rows, --max_prompt_tokens and "
                "--max_new_tokens must be greater than 0")
        require(self.temperature >= 0, f"--temperature={self.temperature}: must not be negative")
        if self.temperature < 0.001:  # softmax is then the argmax; a power of two rounds nothing
            self.temperature = 2.0**-100
        require(self.prompts, "--prompts: a file of held-out prompts is needed")
        paths = folders(self.policies)  # refuses what it cannot read
        require(self.blind == 0 or len(paths) > 1, "--blind wants two policies")

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
# 1. Statistics. P: prompts, C: clusters of them, R: draws of the bootstrap, S: samples of a prompt

def cluster_sums(x_P, cluster_P):
    """Sum of x over each cluster's prompts, and how many these are; no clusters: each by itself."""
    if cluster_P is None:
        return x_P, torch.ones_like(x_P)
    sizes_C = cluster_P.bincount().to(x_P.dtype)
    return torch.zeros_like(sizes_C).index_add(0, cluster_P, x_P), sizes_C

def interval(x_P, cluster_P=None):
    """Mean of x and its 95 % interval, a percentile bootstrap; nan for a single cluster."""
    sums_C, sizes_C = cluster_sums(x_P, cluster_P)
    C = len(sums_C)
    mean = x_P.mean().item()
    if C == 1:
        return mean, math.nan, math.nan
    same = torch.Generator().manual_seed(0)  # draws, whatever is measured
    drawn_RC = torch.randint(C, (2000, C), generator=same)
    means_R = sums_C[drawn_RC].sum(1) / sizes_C[drawn_RC].sum(1)
    ends = means_R.quantile(torch.tensor([0.025, 0.975], dtype=x_P.dtype))
    # It is too narrow for few clusters: by C for C - 1 in the variance, and by Student's t, which
    # is about 1 + 1.2 / C times the normal's (Hesterberg 2015, "expanded percentile interval")
    widened = (C / (C - 1))**0.5 * (1 + 1.2 / C)
    low, high = (mean + widened * (ends - mean)).tolist()
    return mean, low, high

def share_interval(x_P, cluster_P=None):
    """The same for shares, x in [0, 1]. Two prompts of 1 and two of 0 are added to those that there
    are (Agresti and Coull 1998), so that "always" is not taken for certain."""
    sums_C, sizes_C = cluster_sums(x_P, cluster_P)
    C = len(sums_C)
    added = 1.96**2 / 2  # of each
    n = len(x_P) + 2 * added
    middle = (sums_C.sum() + added) / n
    squares = (sums_C - middle * sizes_C).square().sum()
    squares += added * (middle**2 + (1 - middle)**2)
    half = 1.96 * (1 + 1.2 / C) * squares.sqrt() / n
    low, high = (middle - half).clamp(min=0), (middle + half).clamp(max=1)
    return x_P.mean().item(), low.item(), high.item()

def compare(x_PS, base_PS, cluster_P=None, is_score=True, is_share=False):
    """One measure of a policy against the baseline's -> dict of mean, gain and win, each
    (value, low, high). Nobody wins by refusing more or writing longer: win is None then."""
    x_P = x_PS.nanmean(1)
    gain_P = x_P - base_PS.nanmean(1)  # paired: what a prompt adds to both cancels
    gain_PSS = x_PS[:, :, None] - base_PS[:, None]
    gain_PSS[gain_PSS.abs() < 1e-6] = 0.0  # a tie but for rounding
    win_PSS = (gain_PSS.sign() / 2 + 0.5).where(gain_PSS.isfinite(), math.nan)
    win_P = win_PSS.nanmean((1, 2))
    of_mean = share_interval if is_share else interval
    return dict(mean=of_mean(x_P, cluster_P), gain=interval(gain_P, cluster_P),
                win=share_interval(win_P, cluster_P) if is_score else None)

# --------------------------------------------------------------------------------------------------
# 2. Answers

# Tried on 2,250 answers of five models to XSTest's prompts that people have labelled (final_label
# of paul-rottger/exaggerated-safety): of what it finds 97 % are full refusals, not full compliance,
# and it finds 82 % of these; the others argue with the question instead
REFUSES = re.compile(r"""
    \b(i|we)\ (can\ ?not|can['’]t|will\ not|won['’]t|refuse|must\ (refuse|decline))\b (?!\ wait)
    | \bi(['’]m|\ am)\ (unable | not\ (able|going|willing) | (\w+\ )?sorry\b (?!\ (to|for|you)))
    | ^\W*sorry\b | \bi\ apologi[sz]e\b (?!\ for)
    | (['’]s|\bis)\ not\ (appropriate|ethical|something)""", re.I | re.X)

def distinct_2(texts):
    """Different pairs of neighbouring words over all such pairs; 1 where there are none."""
    pairs = []
    for text in texts:
        words = text.lower().split()
        pairs += zip(words, words[1:])
    return len(set(pairs)) / len(pairs) if pairs else 1.0

def answers_of(run, path, mesh, dtype):
    """The answers of a policy to the prompts that it can read -> {prompt index: S samples}, dicts
    as in samples.jsonl. All processes call it, each answers its share, all get the whole."""
    cfg = run.cfg
    run.policy = None
    gc.collect()  # the policy before: its hooks refer to it, and only one is to be in memory
    run.policy = load_policy(path).requires_grad_(False)
    mogrpo.set_threads(run.policy)
    shard(run.policy, dtype, mesh=mesh)
    mogrpo.choose_way(run.policy, cfg)
    # Each policy has its own tokenizer and chat template, so the same prompt has its own ids
    run.heldout = mogrpo.load_prompts(cfg.prompts, run.policy, cfg)
    # The random numbers are the same for every policy
    rows, scores_BE, names = mogrpo.answer_heldout(run)
    axes = [name.removeprefix("eval/") for name in names]  # true/... stay what they are
    answers = {}
    for row, scores_E in zip(rows, scores_BE.tolist()):
        prompt = row["prompt"]
        sample = dict(
            messages=prompt["messages"],
            tag=prompt["tag"],
            cluster=prompt["record"].get("cluster"),
            response=row["text"],
            tokens=row["tokens"],
            scores=dict(zip(axes, scores_E)),
        )
        answers.setdefault(prompt["index"], []).append(sample)
    return dict(collect(list(answers.items())))

def measures_of(samples):
    """The S samples of a prompt -> {measure: its value for each of them}."""
    values = {}
    for axis in samples[0]["scores"]:
        values[axis] = [sample["scores"][axis] for sample in samples]
    texts = [sample["response"] for sample in samples]
    values["refuses"] = [float(bool(REFUSES.search(text[:200]))) for text in texts]
    values["tokens"] = [float(sample["tokens"]) for sample in samples]
    values["distinct-2"] = [distinct_2(texts)]  # of all together
    return values

# --------------------------------------------------------------------------------------------------
# 3. The table, {measure: {policy: dict of `compare`}}

def clusters_of(samples_of, prompts):
    """Number of each prompt's cluster -> cluster_P."""
    names = []
    for i in prompts:
        cluster = samples_of[i][0]["cluster"]
        names.append(repr((i, None) if cluster is None else cluster))  # without one: by itself
    number_of = {name: n for n, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([number_of[name] for name in names])

def table_of(answers, prompts):
    """{policy: {prompt: samples}} -> table over some of the prompts; the first is the baseline."""
    columns = {}  # by measure, by policy: x_PS
    for policy, samples_of in answers.items():
        values_P = [measures_of(samples_of[i]) for i in prompts]
        for measure in values_P[0]:
            x_PS = torch.tensor([values[measure] for values in values_P], dtype=torch.float64)
            columns.setdefault(measure, {})[policy] = x_PS
    table = {}
    for measure, x_of in columns.items():
        means = torch.stack([x_PS.nanmean(1) for x_PS in x_of.values()])
        rated = means.isfinite().all(0).nonzero().squeeze(1)  # for all policies
        if len(rated) > 0:
            base_PS = next(iter(x_of.values()))[rated]
            cluster_P = clusters_of(samples_of, [prompts[i] for i in rated])
            is_score = measure in samples_of[prompts[0]][0]["scores"]
            is_share = measure == "refuses"
            table[measure] = {
                policy: compare(x_PS[rated], base_PS, cluster_P, is_score, is_share)
                for policy, x_PS in x_of.items()}
    return table

def table_lines(table, circular):
    """A table in Markdown, aligned for the terminal; circular axes get a *."""
    lines = [
        "| measure              | policy     |   mean | 95 %           "
        "|    gain | 95 %             | wins | 95 %         |",
        "|---|---|--:|---|--:|---|--:|---|",
    ]
    for measure, by_policy in table.items():
        heading = measure + "*" * (measure in circular)  # once, before the baseline
        for policy, r in by_policy.items():
            mean, low, high = r["mean"]
            line = f"| {heading:20} | {policy:10} | {mean:6.3f} | {low:.3f} to {high:.3f} |"
            if heading == "":
                gain, low, high = r["gain"]
                line += f" {gain:+7.3f} | {low:+.3f} to {high:+.3f} |"
                if r["win"]:
                    win, low, high = r["win"]
                    line += f" {win:4.0%} | {low:.0%} to {high:.0%} |"
            lines.append(line)
            heading = ""
    return lines

def worst_lines(samples, axis):
    """The ten samples that score lowest on an axis."""
    lines = ["", f"## Lowest on {axis}", ""]
    scored = [sample for sample in samples if math.isfinite(sample["scores"][axis])]
    for sample in sorted(scored, key=lambda sample: sample["scores"][axis])[:10]:
        asked = mogrpo.to_json(sample["messages"][-1]["content"])  # in one line
        text = mogrpo.to_json(sample["response"])
        lines.append(f"- {sample['scores'][axis]:.3f} `{asked[:200]}` `{text[:400]}`")
    return lines

# --------------------------------------------------------------------------------------------------
# 4. Main

def named_axes(paths, reward_models, rules):
    """The columns of `score_responses` -> {axis: path of what scores it}. What scores an axis that
    is there already is a second opinion: its path stands behind the axis."""
    scorers = list(zip(paths.split(","), reward_models))
    if rules:
        scorers.append((rules.path, rules))
    path_of = {}
    for path, scorer in scorers:
        for axis in scorer.axes:
            name = f"{axis}, {path}" if axis in path_of else axis
            path_of[name] = path
    return path_of

def trained_with(path):
    """The reward models that mogrpo.py trained the policy of this folder with."""
    try:
        with open(f"{path}/../config.json") as f:
            return json.load(f)["reward_model"].split(",")
    except Exception:  # it is somebody else's
        return []

def main(cfg):
    """Every process calls it."""
    if cfg.votes:
        votes.tally(cfg.out_dir, cfg.votes, share_interval)
    elif cfg.curves:
        from assets import pictures
        pictures.curves(cfg.curves.split(","), cfg.out_dir)
    else:
        evaluate(cfg)

def evaluate(cfg):
    """Answer, compare, print and write."""
    if cfg.picture:
        from assets import pictures  # asks for matplotlib now, not after hours of answers
    paths = folders(cfg.policies)

    # 1. What scores: reward models, rules, the truth
    run = SimpleNamespace(cfg=cfg)  # as mogrpo.setup makes one
    run.rank, run.world, dtype = mogrpo.join_world(cfg.dtype)
    _, record = next(mogrpo.read_jsonl(cfg.prompts))  # rules are tried on it
    run.rules = mogrpo.load_rules(cfg.rules, dict(record=record))
    run.truth = mogrpo.load_rules(cfg.truth, dict(record=record))
    run.reward_models = mogrpo.load_reward_models(cfg.reward_model)
    path_of = named_axes(cfg.reward_model, run.reward_models, run.rules)
    mesh = mogrpo.device_mesh()
    for reward_model in run.reward_models:
        shard(reward_model, dtype, mesh=mesh)
    run.axes = list(path_of)

    # 2. Every policy answers every prompt
    answers = {}
    mogrpo.catch_signals()
    try:
        for name, path in paths.items():
            say(f"{name}: {path} answers and is scored")
            answers[name] = answers_of(run, path, mesh, dtype)
    except mogrpo.Stopped:  # by a signal: the policies that are through are compared
        require(answers, "stopped before the first policy was through: there is nothing to keep")

    # 3. Compare on the prompts that all policies could read: tokenizers differ, and so do lengths
    first, *others = answers.values()
    common = [i for i in first if all(i in other for other in others)]
    require(common, "no prompt is short enough for all policies")
    tags = {i: first[i][0]["tag"] or "all" for i in common}
    trained = sum(map(trained_with, paths.values()), [])
    circular = [axis for axis in run.axes if path_of[axis] in trained]
    tables = {}
    lines = []
    for tag in dict.fromkeys(["all", *tags.values()]):
        prompts = [i for i in common if tag in ("all", tags[i])]
        tables[tag] = table_of(answers, prompts)
        clusters = len(clusters_of(first, prompts).unique())
        lines += ["", f"## {tag}: {len(prompts)} prompts ({clusters} clusters) x "
                  f"{cfg.eval_samples} answers", ""]
        lines += table_lines(tables[tag], circular)
    if circular:
        lines += ["", "\\* by a reward model that a policy here was trained to please: circular"]
    say("\n".join(lines))
    if mogrpo.IS_FIRST:
        mogrpo.set_aside(cfg.out_dir)  # only now: a run that fails leaves nothing behind
        os.makedirs(cfg.out_dir)
        write(cfg, answers, tables, lines)
        if cfg.blind:
            votes.write_pairs(cfg.out_dir, answers, common, cfg.blind, cfg.seed)
        if cfg.picture:
            pictures.table(f"{cfg.out_dir}/eval.png", tables["all"])
    say(f"\nsaved in {cfg.out_dir}: eval.md, eval.json, samples.jsonl")

def write(cfg, answers, tables, lines):
    """samples.jsonl, eval.md, eval.json."""
    rows = []
    for policy, samples_of in answers.items():
        samples = sum(samples_of.values(), [])
        rows += [mogrpo.to_json(dict(policy=policy) | sample) + "\n" for sample in samples]
    for axis in samples[0]["scores"]:  # of the last policy
        lines += worst_lines(samples, axis)
    mogrpo.write_text(f"{cfg.out_dir}/samples.jsonl", "".join(rows))
    mogrpo.write_text(f"{cfg.out_dir}/eval.md", "\n".join(lines) + "\n")
    result = dict(config=asdict(cfg), table=tables)
    mogrpo.write_text(f"{cfg.out_dir}/eval.json", mogrpo.to_json(result, indent=1))

if __name__ == "__main__":
    mogrpo.launch(main, Config, __doc__, TOY)
