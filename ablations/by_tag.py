"""
Axes that make sense on some prompts only: safety on harmful ones, helpfulness on benign ones.

    s_ik = nan    where the prompt's "tag" is not the one of axis k: it says nothing there

A reward model scores every axis of every response. But "does it refuse?" is safety after a harmful
request and a fault after a benign one, so a model that was taught safety on harmful prompts alone
is out of its depth on others, where it would still be obeyed. (A rule returns None by itself.)
What it is not: a way to tell harm. The tags are the prompts file's. Evaluations show all axes.

    torchrun -m ablations.by_tag                                               # the toy world
    torchrun -m ablations.by_tag --only=safety=harmful,helpfulness=benign [the flags of mogrpo.py]
"""
from dataclasses import dataclass

import mogrpo
from mogrpo import TOY, require

@dataclass
class Config(mogrpo.Config):
    only: str = "safety=harmful"  # axis=tag,...; another axis holds everywhere

def tags_of(cfg, axes):
    """The flag --only -> {axis: tag}."""
    tags = dict(pair.split("=", 1) for pair in cfg.only.split(",") if "=" in pair)
    require(tags and set(tags) <= set(axes), f"--only={cfg.only}: expected axis=tag,axis=tag; the "
            f"axes are {', '.join(axes)}")
    return tags

def experience(run, step):
    """For run.experience: mogrpo's, without the scores that mean nothing."""
    rows, scores_BK = mogrpo.experience(run, step)
    for axis, tag in run.tag_of.items():
        k = run.axes.index(axis)
        for b, row in enumerate(rows):
            if row["prompt"]["tag"] != tag:
                scores_BK[b, k] = float("nan")
    return rows, scores_BK

def main(cfg):
    run = mogrpo.setup(cfg)
    run.tag_of = tags_of(cfg, run.axes)
    run.experience = experience
    mogrpo.train(run, mogrpo.grpo_step)


if __name__ == "__main__":
    mogrpo.launch(main, Config, __doc__, TOY)
