"""
What the scripts for public sets share: fetch upstream's files, turn its rows into ours, split by
prompt, write. Where the files are and what a row means stands in each folder's prepare.py.
"""
import csv
import fileinput
import json
import os
from urllib.request import urlretrieve

from huggingface_hub import hf_hub_download

from mogrpo import die, is_held_out, is_number, last_line, read_jsonl, require, say, set_aside
from mogrpo import to_json, write_text
from reward_model import answered

def fetch(raw, repo, names):
    """Paths of a set's files: those of --raw, or downloaded from the hub, once, into its cache."""
    if raw:
        return raw.split(",")
    try:
        return [hf_hub_download(repo, name, repo_type="dataset") for name in names]
    except OSError as e:
        die(f"{repo} cannot be downloaded, see --raw: {last_line(e)}")

def fetch_github(raw, urls, folder):
    """The same of files on GitHub, downloaded into `folder` every time. A url: owner/repository/
    branch/path."""
    if raw:
        return raw.split(",")
    paths = [f"{folder}/{os.path.basename(url)}" for url in urls]
    for url, path in zip(urls, paths):
        try:
            urlretrieve(f"https://raw.githubusercontent.com/{url}", path)
        except OSError as e:
            die(f"{url} cannot be downloaded from GitHub, see --raw: {last_line(e)}")
    return paths

def read_csv(path):
    """(file:line, row) pairs, as of read_jsonl."""
    try:
        with fileinput.hook_compressed(path, "r", encoding="utf-8-sig") as f:
            reader = csv.DictReader(f)
            rows = [(f"{path}:{reader.line_num}", row) for row in reader]
    except Exception as e:  # files fail in any way they like
        die(f"{path}: unreadable or broken CSV: {e}")
    require(rows, f"{path}: has no rows")
    return rows

def read_json(path):
    """(file:number, row) pairs of a file that is one JSON list."""
    try:
        with fileinput.hook_compressed(path, "r", encoding="utf-8-sig") as f:
            rows = json.load(f)
    except Exception as e:
        die(f"{path}: unreadable or broken JSON: {e}")
    require(rows and isinstance(rows, list), f"{path}: expected a JSON list with rows in it")
    return [(f"{path}:{number}", row) for number, row in enumerate(rows, 1)]

def score(rating, worst, best):
    """A rating -> [0, 1]."""
    low, high = sorted((worst, best))
    if not is_number(rating) or not low <= float(rating) <= high:
        raise ValueError(f"{rating!r} is no number from {low} to {high}")
    return round(abs(float(rating) - worst) / (high - low), 4)

def converted(where, row, convert):
    """convert(row); a row that is not as upstream writes them ends the program in a line."""
    try:
        return convert(row)
    except Exception as e:  # of a missing field, another type, a value out of range
        die(f"{where}: not a row of this set, whose fields --help names: {e!r}")

def read(paths, convert, rows_of=read_jsonl):
    """The lines of the ratings file that convert(row) makes of each row of rows_of(path). Those
    with a turn or an answer of no text are left out: nobody wrote it, so its rating says nothing,
    and a policy could learn from it that silence is safe."""
    records = []
    empty = 0
    for path in paths:
        for where, row in rows_of(path):
            for record in converted(where, row, convert):
                texts = [turn["content"] for turn in record["messages"]] + [record["response"]]
                if "" in [str(text).strip() for text in texts]:
                    empty += 1
                else:
                    answered(where, record)  # or it ends here, in a line
                    records.append(record)
    say(f"{len(records)} rated answers read; left out, since they are empty: {empty}")
    return records

def split(records, fraction, seed):
    """-> records to train on, records held out; all of a prompt on one side."""
    sides = [], []  # not held out, held out
    for record in records:
        sides[is_held_out(record["messages"], fraction, seed)].append(record)
    return sides

def save(out_dir, files):
    """Write `files`, name -> records, as a folder; an earlier one is renamed, not overwritten."""
    out_dir = os.path.normpath(out_dir)
    unfinished = f"{out_dir}.tmp"
    os.makedirs(unfinished, exist_ok=True)
    for name, records in files.items():
        lines = [to_json(record) + "\n" for record in records]
        write_text(f"{unfinished}/{name}.jsonl", "".join(lines))
    set_aside(out_dir)
    os.rename(unfinished, out_dir)  # whole or not at all

def prompts_of(records):
    """Lines of a prompts file: each of their prompts once, with its tag, if it has one."""
    prompts = {}
    for record in records:
        line = {key: record[key] for key in ("messages", "tag") if key in record}
        prompts[repr(record["messages"])] = line
    return list(prompts.values())

def write(out_dir, train, heldout, licence):
    """Ratings and prompts, to train on and held out -> out_dir; say what they are."""
    held_prompts = {repr(record["messages"]) for record in heldout}
    ratings = [record for record in train if repr(record["messages"]) not in held_prompts]
    require(ratings and heldout, "too few prompts: some are needed to train on and some held out")
    prompts = prompts_of(ratings)
    save(out_dir, {
        "ratings": ratings,
        "heldout_ratings": heldout,
        "prompts": prompts,
        "heldout_prompts": prompts_of(heldout),
    })
    say(f"{out_dir}: {len(ratings)} ratings of {len(prompts)} prompts; held out {len(heldout)} of "
        f"{len(held_prompts)}; left out, since their prompt is held out: "
        f"{len(train) - len(ratings)}")
    for axis in ratings[0]["scores"]:
        scores = [record["scores"][axis] for record in ratings]
        rated = [s for s in scores if s is not None]
        say(f"  {axis:<22}mean {sum(rated) / max(1, len(rated)):.3f} of {len(rated)}")
    say(f"licence: {licence}")
    say(f"first row: {to_json(ratings[0])[:400]}")
