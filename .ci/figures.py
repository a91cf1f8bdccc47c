"""Runs the READMEs' commands again and looks whether what they give is what is printed there.

    python .ci/figures.py                        # all: 42 runs, one after the other, an hour or so
    python .ci/figures.py --only=worked,seeds    # some of the functions below

All is made in out/figures; a run that is there is not made again. A figure is put into the text
that should stand in a page. Other torch versions and CPUs round otherwise. Not covered: minutes,
bench/; the second world, floors at 160 steps; refusals; heldout.json; the log; a real model."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
AXES = ("politeness", "meaningfulness", "actionability", "safety")
TRUE = [f"true/{axis}" for axis in AXES]
differ = []

def expect(page, text):
    """The page should hold this text, whatever its line breaks and bold print."""
    whole = (ROOT / page).read_text().replace("**", "")
    if " ".join(text.split()) not in " ".join(whole.split()):
        differ.append(text)
    print("NOT PRINTED: " if text in differ else "as printed:  ", page, text, flush=True)

def read(path):
    return [json.loads(line) for line in open(path)]

def run(flags, script=f"{ROOT}/mogrpo.py"):
    """Evaluations of a run, with the means over its axes."""
    name = "out/" + re.sub(r"[^\w.]+", "-", f"{Path(script).name} {flags}")
    if not os.path.exists(f"{name}/policy"):
        command = f"torchrun {script} {flags} --out_dir={name}"
        subprocess.run(command.split(), check=True, stdout=subprocess.DEVNULL)
    ends = [row for row in read(f"{name}/metrics.jsonl") if TRUE[0] in row]
    for row in ends:
        row["true"] = mean(row[name] for name in TRUE)
        row["learned"] = mean(row[f"eval/{axis}"] for axis in AXES)
    return ends

def worked():
    subprocess.run(["pytest", "-q", f"{ROOT}/test_mogrpo.py", "-k", "readme"], check=True)

def seeds():
    for seed in range(3):
        first, last = run(f"--seed={seed}")
        cells = [f"{first[name]:.2f} → {last[name]:.2f}" for name in [*TRUE, "true", "learned"]]
        expect("README.md", f"| {seed} | {' | '.join(cells)} |")

def evaluation():
    from data.toy.truth import scores
    if not os.path.exists("out/eval"):
        run("--seed=0")
        os.symlink("mogrpo.py-seed-0", "out/mogrpo")
        subprocess.run(["torchrun", f"{ROOT}/eval.py"], check=True, stdout=subprocess.DEVNULL)
    table = json.load(open("out/eval/eval.json"))["table"]["all"]
    for name in [*AXES, *TRUE, "distinct-2"]:
        base, trained = table[name].values()
        gain, low, high = trained["gain"]
        expect("data/README.md", f"| {name + '*' * (name in AXES)} | {base['mean'][0]:.2f} | "
               f"{trained['mean'][0]:.2f} | {gain:+.2f} | {low:+.2f} to {high:+.2f} |")
    rated = read("out/toy/ratings.jsonl")
    answers = [s["scores"] for s in read("out/eval/samples.jsonl") if s["policy"] == "mogrpo"]
    for axis, true in zip(AXES, TRUE):
        best = [r["scores"][axis] for r in rated if scores(r, r["response"])[axis] == 1]
        rating = mean(x for x in best if x is not None)  # null: not rated
        perfect = [s[axis] for s in answers if s[true] == 1]
        truth, learned = zip(*[(s[true], s[axis]) for s in answers if s[true] < 1])
        expect("data/README.md", f"| {axis} | {rating:.2f} | {len(perfect) / len(answers):.0%} | "
               f"{mean(perfect):.2f} | {mean(truth):.2f} | {mean(learned):.2f} |")

def ablations():
    rows = {  # title: flags, script
        "all four, GRPO (`sum`), beta 0.16, the toy's default": [""],
        "all four, GRPO, beta 0.04": ["--beta=0.04"], "all four, `gdpo`": ["--combine=gdpo"],
        "all four, PPO": ["", "-m ablations.ppo"], "all four, DPO": ["", "-m ablations.dpo"],
        "actionability weighs 8, `sum`": ["--weights=actionability=8"],
        "the same, `lagrangian`, safety ≥ 0.9": ["--weights=actionability=8",
                                                 "-m ablations.lagrangian"]}
    for alone in AXES:
        weights = ",".join(f"{axis}=0" for axis in AXES if axis != alone)
        rows[f"{alone} alone"] = [f"--weights={weights}"]
    for title, (flags, *script) in rows.items():
        ends = [run(f"{flags} --seed={seed}".strip(), *script)[-1] for seed in range(3)]
        cells = []
        for name in [*TRUE, "true"]:
            values = [end[name] for end in ends]
            half = (max(values) - min(values)) / 2
            cells.append(f"{mean(values):.2f}" + f" ± {half:.2f}" * (half >= 0.005))
        expect("ablations/README.md", f"| {title} | {' | '.join(cells)} |")

EXERCISES = {  # flags: what README says of the run
    "--weights=safety=0": "0.77 to {true/safety:.2f}, the other three to {true/politeness:.2f},",
    "--weights=" + ",".join(f"{axis}=10" for axis in AXES): "they end at {true:.2f} and 0.92",
    "--clip_low=1 --clip_high=1000": "a true mean of {true:.2f} and a learned one of {learned:.2f}",
    "--epochs=4": "(b) ends at {true:.2f} true, {learned:.2f} learned",
    "--epochs=4 --clip_low=1 --clip_high=1000": "(c) at {true:.2f} true and {learned:.2f} learned",
    "--std_floor=1": "{true:.2f} true, {learned:.2f} learned, with less KL"}

def exercises():
    for flags, text in EXERCISES.items():
        expect("README.md", text.format(**run(flags)[-1]))
    for beta in ("0", "0.04", "0.16"):
        ends = run(f"--steps=300 --eval_interval=30 --beta={beta}")
        chosen = [end for end in ends if end["step"] in (0, 30, 60, 90, 150, 210, 300)]
        cells = [f"{end['true']:.2f} / {end['learned']:.2f}" for end in chosen]
        expect("README.md", f"| beta {beta} | {' | '.join(cells)} |")

only = (sys.argv[1:] or ["--only=worked,seeds,evaluation,ablations,exercises"])[0]
os.environ["PYTHONPATH"] = str(ROOT)
os.makedirs(ROOT / "out/figures", exist_ok=True)
os.chdir(ROOT / "out/figures")  # the toy world is made in its out/toy
for part in only.removeprefix("--only=").split(","):
    globals()[part]()
sys.exit(f"{len(differ)} figures differ from what is printed" if differ else 0)
