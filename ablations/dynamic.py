"""
Dynamic sampling: a group that teaches nothing is replaced by the group of another prompt.

    dull group      A_i = 0 for all its responses: they are equal on every axis
    round 0         the step's prompts, as ever
    round 1, 2, ..  a fresh prompt for each group that is dull still, at most --extra_rounds times

Source: 2503.14476 (DAPO), for rewards of 0 and 1, where groups are all right or all wrong. There
whole batches are sampled until one is full; here only what is missing, and what is dull after the
last round stays. A step owns 1 + extra_rounds batches of the pass over the data, so that no prompt
comes twice in a pass; what is not needed of them waits for another one. Prompts and samples are a
function of (seed, step), on any number of processes: the n-th dull group of the whole step gets the
n-th prompt of the round's batch. What it is not: free, or of use where scores are learned and no
two are equal. And all that is logged of a step is of the groups that were kept: score/<axis> is no
mean over prompts any more, and eval/<axis> is.

    torchrun -m ablations.dynamic --reward_model= --rules=data/toy/truth.py    # the toy world
    torchrun --nproc_per_node=8 -m ablations.dynamic --rules=rules.py [the flags of mogrpo.py]
"""
from dataclasses import dataclass

import mogrpo
from mogrpo import TOY, collect

@dataclass
class Config(mogrpo.Config):
    extra_rounds: int = 3         # how often dull groups are sampled again

def dynamic_experience(run, step):
    """For run.experience: mogrpo's, and what replaces its dull groups. All processes go through as
    many rounds; one that misses no group samples no prompt, but takes part in the collectives."""
    cfg = run.cfg
    G = cfg.group_size
    first = (step - 1) * (1 + cfg.extra_rounds) + 1  # of the step's batches of prompts
    rows, scores_BK = mogrpo.experience(run, first)
    for batch in range(first + 1, first + 1 + cfg.extra_rounds):
        scores_PGK = scores_BK.unflatten(0, (-1, G))
        parts_PGK = mogrpo.without_ties(run.combine(scores_PGK, run.weights_K, cfg))
        has_signal = collect(parts_PGK.sum(-1).any(1).tolist())  # of every group of the step
        dull = [i for i in range(len(has_signal)) if not has_signal[i]]
        if not dull:
            break
        fresh = collect(mogrpo.prompts_of_step(run, batch))
        mine = {}  # this process's dull groups: their new prompts
        for i, prompt in zip(dull, fresh):
            if i % run.world == run.rank:
                mine[i // run.world] = prompt
        new_rows, new_BK = mogrpo.sample_and_score(run, list(mine.values()), batch)
        for n, p in enumerate(mine):  # p: which of this process's groups
            rows[p * G:(p + 1) * G] = new_rows[n * G:(n + 1) * G]
            scores_BK[p * G:(p + 1) * G] = new_BK[n * G:(n + 1) * G]
    return rows, scores_BK

def main(cfg):
    run = mogrpo.setup(cfg)
    run.experience = dynamic_experience
    mogrpo.train(run, mogrpo.grpo_step)


if __name__ == "__main__":
    mogrpo.launch(main, Config, __doc__, TOY)
