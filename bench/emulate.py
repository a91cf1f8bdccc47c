"""
The CUDA path without a GPU: whole runs on an emulated CUDA device beside the same runs on the CPU.

    CUDALESS=/path/to/cudaless.py python -m bench.emulate          # some three minutes

The harness is a program from elsewhere that puts a CUDA device made of host memory into torch and
runs a script on it: real values, device checks, streams, graph capture and replay, NCCL's rules. It
is started as `python $CUDALESS SCRIPT flags` or `torchrun $CUDALESS SCRIPT flags`; with
CUDALESS_REPORT=FILE.{rank}.json it leaves a list "races" there. What it cannot show is rounding,
speed and real kernels. Where there is a GPU no harness is needed: `pytest` runs on it.

Equal means: the same responses, and all metrics within 1e-4 but for those of time and memory.
"""
import glob
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass

from mogrpo import HERE, launch, read_jsonl, require, say, write_text

@dataclass
class Config:
    out_dir: str = "out/emulate"  # of all runs
    only: str = ""                # the names of some, comma-separated

SMALL = "--steps=3 --dtype=float32 --eval_samples=1"
# Many small rooms, over which a recording is kept while few rows end and columns are enough
SCRIPT = """import mogrpo
mogrpo.LOOK_EVERY = 4
mogrpo.WIDTH_STEP = 16
mogrpo.MOST_GOING = 0.3
mogrpo.launch(mogrpo.main, mogrpo.Config, "", mogrpo.TOY)
"""

# name -> processes, script and flags; {folder} is the run's own, {here} the project's
RUNS = dict(
    default=(1, f"{{here}}/mogrpo.py {SMALL}"),
    resume=(1, "{here}/mogrpo.py --resume --steps=5"),  # goes on with a copy of default's
    rooms=(1, f"{{folder}}/rooms.py {SMALL}"),
    lora=(1, f"{{here}}/mogrpo.py {SMALL} --lora_rank=4 --lr=4e-3"),
    gdpo=(1, f"{{here}}/mogrpo.py {SMALL} --combine=gdpo --epochs=2 --rules={{folder}}/length.py"),
    plain=(1, f"{{here}}/mogrpo.py {SMALL} --fast=False"),
    ppo=(1, f"-m ablations.ppo {SMALL} --critic_warmup=1"),
    dpo=(1, f"-m ablations.dpo {SMALL}"),
    lagrangian=(1, f"-m ablations.lagrangian {SMALL} --floors=safety=0.9"),
    reward=(1, "{here}/reward_model.py --epochs=1 --dtype=float32"),
    eval=(1, "{here}/eval.py --policies=a=out/toy/policy,b=out/toy/policy --dtype=float32"
             " --prompts=out/toy/heldout_prompts.jsonl --reward_model=out/toy/reward_model"
             " --eval_samples=1 --max_new_tokens=48"),
    two=(2, f"{{here}}/mogrpo.py {SMALL}"),
    four=(4, f"-m ablations.dpo {SMALL}"),
)

def run(name, device, folder):
    """One run -> its output folder; a failure ends it all."""
    count, command = RUNS[name]
    out = f"{folder}/{name}-{device}"
    if "--resume" in command:
        shutil.copytree(f"{folder}/default-{device}", out, dirs_exist_ok=True)
    words = [sys.executable]
    if count > 1:
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                 f"--nproc_per_node={count}"]
    if device == "cuda":
        words.append(os.environ["CUDALESS"])
    words += command.format(here=HERE, folder=folder).split() + [f"--out_dir={out}"]
    env = dict(os.environ, PYTHONPATH=HERE, CUDALESS_REPORT=f"{out}.races.{{rank}}.json")
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    require(done.returncode == 0, f"{name} on {device}: {done.stderr[-300:]}")
    return out

def numbers_of(out):
    """All numbers of a run's logs and tables that must be equal, and all responses."""
    numbers = []
    responses = []
    for path in sorted(glob.glob(f"{out}/*.json*")):
        if os.path.basename(path) != "config.json":
            for _, record in read_jsonl(path) if path.endswith(".jsonl") else [(0, load(path))]:
                responses.append(record.get("response"))
                collect_numbers(record, numbers)
    return numbers, responses

def load(path):
    with open(path) as f:
        return json.load(f)

def collect_numbers(value, numbers):
    """Append every number in nested lists and dicts, but for times and memory."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if not name.startswith(("sec/", "tok_per_s", "peak_gb", "config", "sampler_gap")):
                collect_numbers(inner, numbers)
    elif isinstance(value, list):
        for inner in value:
            collect_numbers(inner, numbers)
    elif isinstance(value, float | int):
        numbers.append(value)

def main(cfg):
    require(os.path.exists(os.environ.get("CUDALESS", "")), "CUDALESS: give the harness's path")
    names = cfg.only.split(",") if cfg.only else list(RUNS)
    require(set(names) <= set(RUNS), f"--only: there are {', '.join(RUNS)}")
    folder = os.path.abspath(cfg.out_dir)
    os.makedirs(folder, exist_ok=True)
    write_text(f"{folder}/length.py", "def scores(record, response):\n"
               "    return dict(length=len(response) / 1000)\n")
    write_text(f"{folder}/rooms.py", SCRIPT)
    failed = []
    for name in names:
        (a, said), (b, said_there) = [numbers_of(run(name, device, folder))
                                      for device in ("cpu", "cuda")]
        reports = glob.glob(f"{folder}/{name}-cuda.races.*")
        races = sum((load(path)["races"] for path in reports), [])
        gap = max((abs(x - y) / max(1, abs(x)) for x, y in zip(a, b)), default=math.inf)
        ok = len(a) == len(b) and gap < 1e-4 and said == said_there and not races
        say(f"{name:<12} {'equal' if ok else 'DIFFERS'}: {len(a)} numbers within {gap:.1e}, "
            f"{len(said)} rows, {len(races)} races")
        if not ok:
            failed.append(name)
    require(not failed, f"the emulated device differs in {', '.join(failed)}")


if __name__ == "__main__":
    launch(main, Config, __doc__)
