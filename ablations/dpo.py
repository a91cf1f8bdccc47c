"""
DPO instead of GRPO, on the same samples and rewards: of each group only the best response and the
worst are trained on. The pairs are sampled anew for every step.

    h     = log pi(o | q) - log pi_ref(o | q)          of a whole response: summed over its tokens
    loss  = - mean_pairs log sigmoid(beta (h_best - h_worst))

Source: 2305.18290, as the baseline of 2503.21819; on fresh pairs it is called online DPO
(2402.04792). A group without signal adds nothing, but stays in the mean. Here beta is DPO's own:
the smaller, the farther from the reference a pair may pull, and it wants a tuning of its own. What
it is not: DPO on a file of preferences. There is no ratio, so nothing is clipped, and --loss_norm
plays no part.

    torchrun -m ablations.dpo                                                  # the toy world
    torchrun --nproc_per_node=8 -m ablations.dpo [the flags of mogrpo.py]
"""
from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch.nn.functional import logsigmoid

import mogrpo
from mogrpo import DEVICE, TOY, require

@dataclass
class Config(mogrpo.Config):
    def __post_init__(self):
        super().__post_init__()
        require(self.combine == "sum" and self.beta > 0, "DPO wants --combine=sum, --beta above 0")

def best_and_worst(rows, advantages_B, group_size):
    """The B rows of a rollout -> pairs (best row, worst row), one a group, and of each whether it
    has a signal: a group of equals has no best."""
    pairs = []
    signals = []
    for first in range(0, len(rows), group_size):
        advantages_G = advantages_B[first:first + group_size]  # in the order of their rewards
        best = int(advantages_G.argmax())
        worst = int(advantages_G.argmin())
        pairs.append((rows[first + best], rows[first + worst]))
        signals.append(float(advantages_G[best] > advantages_G[worst]))
    return pairs, signals

def pair_batches(run, pairs, signals):
    """Pairs -> micro-batches of whole pairs, as many on every process, and the counts of the step.
    A batch has `pairs` (best, worst, best, worst, ...), signals, each token's share in the KL."""
    responses = [row["response"] for pair in pairs for row in pair]
    truncated = sum(row["truncated"] for pair in pairs for row in pair)
    counts = dict(responses=len(responses), tokens=sum(map(len, responses)), truncated=truncated)
    counts = mogrpo.total(counts)
    widths = []  # tokens of the longer row of a pair
    for pair in pairs:
        widths.append(max(len(row["prompt"]["ids"]) + len(row["response"]) for row in pair))
    batches = []
    for numbers in mogrpo.by_length(widths, run.cfg.micro_tokens // 2):
        chosen = [row for n in numbers for row in pairs[n]]
        tokens = sum(len(row["response"]) for row in chosen)
        batches.append(SimpleNamespace(
            pairs=[(row["prompt"]["ids"], row["response"]) for row in chosen],
            signal=torch.tensor([signals[n] for n in numbers], device=DEVICE),
            token_share_N=torch.full((tokens,), 1 / counts["tokens"], device=DEVICE)))
    mogrpo.even_out(batches)
    return batches, counts

def dpo_objective(logp_N, ref_logp_N, signal, lengths, beta, pairs):
    """Loss of responses of these lengths that come best, worst, best, worst, ...; `pairs` is the
    number of them in the whole step. A pair of signal 0 adds nothing."""
    h_of_token_N = logp_N - ref_logp_N
    h = torch.stack([h_T.sum() for h_T in h_of_token_N.split(lengths)])  # one a response
    h_best, h_worst = h.view(-1, 2).unbind(1)
    return -(signal * logsigmoid(beta * (h_best - h_worst))).sum() / pairs

def dpo_update(run, rows, advantages_B, step):
    """`epochs` optimizer steps on the pairs of one rollout -> metrics of the last one. Its kl,
    length and truncated are of the pairs, so no means over what the policy says."""
    cfg = run.cfg
    pairs, signals = best_and_worst(rows, advantages_B, cfg.group_size)
    batches, counts = pair_batches(run, pairs, signals)
    for epoch in range(cfg.epochs):
        sums = defaultdict(float)
        for batch in batches:
            logp_N = mogrpo.response_logp(run.policy, batch.pairs, cfg.temperature)
            if epoch == 0:
                batch.ref_logp_N = mogrpo.reference_logp(run, batch)
            lengths = [len(response) for _, response in batch.pairs]
            signal = batch.signal * (batch.token_share_N[0] > 0)  # a repeat evens out processes
            loss = dpo_objective(logp_N, batch.ref_logp_N, signal, lengths, cfg.beta,
                                 counts["responses"] / 2)
            (loss * run.world).backward()  # FSDP averages gradients over processes
            d_N = batch.ref_logp_N - logp_N.detach()
            sums["loss"] += loss.detach()
            sums["kl"] += (batch.token_share_N * (d_N.exp() - d_N - 1)).sum()  # k3, by token
        grad_norm = mogrpo.optimizer_step(run, step)
    return mogrpo.step_metrics(run, sums, counts, grad_norm)

def main(cfg):
    run = mogrpo.setup(cfg)
    run.update = dpo_update
    mogrpo.train(run, mogrpo.grpo_step)


if __name__ == "__main__":
    mogrpo.launch(main, Config, __doc__, TOY)
