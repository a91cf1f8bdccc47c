"""
Blind votes of human raters on pairs of answers, for eval.py: `--blind=40` makes the pairs,
`--votes` counts the votes.

    torchrun eval.py --blind=40                              # out/eval/blind.html and blind.csv
    python eval.py --votes=votes-ann.csv,votes-bob.csv       # of the pairs in out/eval

A rater sees a prompt and two answers, and says which is better or that neither is: which policy is
left is drawn for every pair and stands in blind_key.json alone. page.html shows one pair at a time
in any browser and saves votes-NAME.csv; who likes a spreadsheet better fills the last column of
blind.csv. It is the human evaluation of arXiv 2503.21819, for anyone. What it is not: a sample of
people. Two raters who are in a hurry agree with each other, too.
"""
import csv
import json
import random
from collections import Counter
from itertools import combinations

import torch

from mogrpo import HERE, die, require, say, write_text

def write_pairs(out_dir, answers, prompts, count, seed):
    """blind.html, blind.csv and blind_key.json: `count` pairs, an answer of the first policy and
    one of the last to the same prompt. `answers` is {policy: {prompt: its samples}}."""
    names = list(answers)
    compared = names[0], names[-1]
    rng = random.Random(seed)
    pairs = []
    left = {}  # pair: the policy whose answer is on the left
    for i in rng.sample(prompts, len(prompts)):
        sides = rng.sample(compared, 2)
        texts = [answers[name][i][0]["response"] for name in sides]
        if len(pairs) == count:
            break
        if texts[0] == texts[1]:
            continue  # nothing to choose
        number = str(len(pairs) + 1)
        messages = answers[sides[0]][i][0]["messages"]
        asked = "\n\n".join(message["content"] for message in messages)
        pairs.append(dict(pair=number, prompt=asked, left=texts[0], right=texts[1]))
        left[number] = sides[0]
    if len(pairs) < count:
        say(f"warning: {len(pairs)} pairs only: no more prompts have two different answers")
    with open(f"{HERE}/data/human/page.html", encoding="utf-8") as f:
        page = f.read()
    data = json.dumps(pairs).replace("<", "\\u003c")  # no answer can end the page's script
    write_text(f"{out_dir}/blind.html", page.replace("__PAIRS__", data))
    with open(f"{out_dir}/blind.csv", "w", newline="", encoding="utf-8") as f:
        sheet = csv.DictWriter(f, ["pair", "prompt", "left", "right", "vote"])
        sheet.writeheader()
        sheet.writerows(pairs)
    write_text(f"{out_dir}/blind_key.json", json.dumps(dict(policies=compared, left=left)))
    say(f"{len(pairs)} pairs for human raters: {out_dir}/blind.html, {out_dir}/blind.csv")

def read_votes(paths, key):
    """CSV files with the columns pair, vote and perhaps rater (without, a file is a rater) ->
    {pair: {rater: points of the last policy: 1 it won, 0.5 a tie, 0 it lost}}."""
    base, other = key["policies"]
    points = {}
    for path in paths.split(","):
        with open(path, newline="", encoding="utf-8-sig") as f:
            rows = list(csv.DictReader(f))
        for number, row in enumerate(rows, 1):
            where = f"{path}: vote {number}"
            pair = row.get("pair")
            require(pair in key["left"], f"{where}: its pair, {pair}, is not in blind_key.json")
            vote = (row.get("vote") or "").strip().lower()
            if vote == "":
                continue
            require(vote in ("left", "right", "tie"),
                    f"{where}: expected left, right or tie, not {vote}")
            by_rater = points.setdefault(pair, {})
            rater = row.get("rater") or path
            require(rater not in by_rater, f"{where}: {rater} has voted on pair {pair} before")
            left_is_other = key["left"][pair] == other
            if vote == "tie":
                by_rater[rater] = 0.5
            else:
                by_rater[rater] = float((vote == "left") == left_is_other)
    require(points, f"{paths}: no votes")
    return points

def agreement(points):
    """How often two raters of a pair say the same; how often they would by chance, if each drew
    from all votes; and Fleiss' kappa, what is beyond chance: 0 none, 1 always. None if no pair was
    seen by two."""
    agreed = []
    votes = Counter()
    for by_rater in points.values():
        votes.update(by_rater.values())
        agreed += [a == b for a, b in combinations(by_rater.values(), 2)]
    if not agreed:
        return None
    observed = sum(agreed) / len(agreed)
    chance = sum((n / votes.total())**2 for n in votes.values())
    kappa = (observed - chance) / (1 - chance) if chance < 1 else 1.0
    return observed, chance, kappa

def tally(out_dir, paths, interval):
    """Print who won. `interval` (eval.py's `share_interval`) is handed over: mean and 95 %
    interval. The unit is the pair, on which raters are averaged."""
    try:
        with open(f"{out_dir}/blind_key.json", encoding="utf-8") as f:
            key = json.load(f)
        points = read_votes(paths, key)
    except (OSError, ValueError, KeyError, csv.Error) as e:
        die(f"--votes={paths}: cannot be read with {out_dir}/blind_key.json: {e}")
    base, other = key["policies"]
    means = [sum(by_rater.values()) / len(by_rater) for by_rater in points.values()]
    win, low, high = interval(torch.tensor(means, dtype=torch.float64))
    votes = Counter()
    for by_rater in points.values():
        votes.update(by_rater.values())
    say(f"{other} against {base}: {len(points)} pairs, {votes.total()} votes: {votes[1.0]} won, "
        f"{votes[0.5]} tied, {votes[0.0]} lost")
    say(f"{other} wins {win:.1%}, a tie counting half; 95 % interval {low:.1%} to {high:.1%}")
    agreed = agreement(points)
    if agreed:
        observed, chance, kappa = agreed
        say(f"two raters agree on {observed:.0%} of pairs, by chance on {chance:.0%}: kappa "
            f"{kappa:.2f}")
