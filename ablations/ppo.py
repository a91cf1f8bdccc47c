"""
PPO instead of GRPO, on the same samples and rewards: a critic takes the place of the group.

Every response is an episode of its own, a token is an action, and the reward R comes with the last.

    r_t       = beta (log pi_ref - log pi_old),  + R at the last token   a token pays for its KL
    delta_t   = r_t + V_t+1 - V_t                                        after the last token V is 0
    A_t       = sum_l gae_lambda^l delta_t+l                             GAE (1506.02438)
    return_t  = A_t + V_t                                                what the critic should say
    A        <- (A - mean) / max(std, std_floor)                         over all tokens of the step
    rho       = pi / pi_old                                              pi_old: as it was sampled
    loss      = - sum_t share_t min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)
    loss_V    = sum_t share_t (V_t - return_t)^2 / 2                     of the critic

Source: 2203.02155 (InstructGPT), as the baseline of 2503.21819. V is a second model, the policy's
body with one output a token, and all of it is trained (with --lora_rank, too): as many weights,
gradients and moments again. Each model's gradient is clipped by itself. Groups are still sampled,
but their means do nothing; share/<axis> in metrics.jsonl is what it would be to GRPO. A fresh
critic guesses wrong: with a small gae_lambda, or without --critic_warmup, the policy learns from
its errors. What it is not: tuned. There is no discount, no clipped value loss and no adaptive beta,
and an inner epoch is one optimizer step on all rows.

    torchrun -m ablations.ppo                                                  # the toy world
    torchrun --nproc_per_node=8 -m ablations.ppo --critic_lr=1e-5 [the flags of mogrpo.py]
"""
from collections import defaultdict
from copy import copy
from dataclasses import dataclass

import torch
from transformers import AutoModelForTokenClassification

import mogrpo
from mogrpo import require

@dataclass
class Config(mogrpo.Config):
    critic_lr: float = 1e-5       # peak, of the critic; warms up and decays like lr
    gae_lambda: float = 1.0       # how far A looks past the critic's own guess; 1: to the end
    critic_warmup: int = 0        # first steps, in which the critic learns alone

    def __post_init__(self):
        super().__post_init__()
        require(self.combine == "sum" and self.beta > 0, "PPO wants --combine=sum, --beta above 0")
        require(self.gae_lambda <= 1, f"--gae_lambda={self.gae_lambda}: must be from 0 to 1")

TOY = {**mogrpo.TOY, "critic_lr": 3e-3, "critic_warmup": 10}  # defaults while --policy=toy

def reward_itself(scores_PGK, weights_K, cfg):
    """For run.combine: no group, no baseline. An axis without a score counts as its mean."""
    mean_11K = scores_PGK.nanmean((0, 1), keepdim=True)
    return weights_K * scores_PGK.where(scores_PGK.isfinite(), mean_11K)

def values(run, batch):
    """What the critic expects, before each response token, that the rest will earn -> value_N."""
    return mogrpo.plain_logits(run.critic, batch.pairs).squeeze(-1)  # where pi's logits would stand

def gae(reward_N, value_N, lengths, gae_lambda):
    """r_t and V_t of the tokens of responses of these lengths -> A_N, not yet normalised."""
    advantages = []
    for reward_T, value_T in zip(reward_N.split(lengths), value_N.split(lengths)):
        delta_T = reward_T - value_T
        delta_T[:-1] += value_T[1:]  # nothing follows the last token
        t = torch.arange(len(delta_T)).to(delta_T)
        discount_TT = (gae_lambda ** (t - t[:, None])).triu()  # gae_lambda^l at [t, t + l]
        advantages.append(discount_TT @ delta_T)  # one product: no loop over tokens
    return torch.cat(advantages)

@torch.no_grad()
def credit(run, batches, tokens):
    """Give each of the step's tokens (`tokens` over all processes) an advantage and a return of its
    own; it comes with the R of its response. Takes a forward of the reference and of the critic."""
    cfg = run.cfg
    for batch in batches:
        batch.ref_logp_N = mogrpo.reference_logp(run, batch)
        value_N = values(run, batch)
        last = torch.tensor(batch.lengths).cumsum(0) - 1  # where each response ends in N
        reward_N = cfg.beta * (batch.ref_logp_N - batch.sampler_logp_N)
        reward_N[last] += batch.advantage_N[last]
        batch.old_logp_N = batch.sampler_logp_N
        batch.c_N = 1.0
        batch.advantage_N = gae(reward_N, value_N, batch.lengths, cfg.gae_lambda)
        batch.return_N = batch.advantage_N + value_N
    # Batches of share 0 are repeats, which only even out the processes
    own_N = torch.cat([batch.advantage_N[batch.token_share_N > 0] for batch in batches])
    sums = mogrpo.total(dict(first=own_N.sum(), second=own_N.square().sum()))
    mean = sums["first"] / tokens
    std = max(sums["second"] / tokens - mean**2, cfg.std_floor**2) ** 0.5
    for batch in batches:
        batch.advantage_N = (batch.advantage_N - mean) / std

def ppo_update(run, rows, rewards_B, step):
    """`epochs` optimizer steps of policy and critic on one rollout -> metrics of the last one."""
    cfg = run.cfg
    batches, counts = mogrpo.micro_batches(run, rows, rewards_B)
    credit(run, batches, counts["tokens"])
    without_kl = copy(cfg)
    without_kl.beta = 0.0  # the rewards have it
    for epoch in range(cfg.epochs):
        sums = defaultdict(float)
        for batch in batches:
            logp_N = mogrpo.response_logp(run.policy, batch.pairs, cfg.temperature)
            loss, logged = run.objective(batch, logp_N, without_kl)
            is_trained = step > cfg.critic_warmup  # else its gradient is 0, and so is Adam's step
            (loss * is_trained * run.world).backward()  # FSDP averages gradients over processes
            error_N = values(run, batch) - batch.return_N
            value_loss = (batch.token_share_N * error_N**2).sum() / 2
            (value_loss * run.world).backward()  # the policy's activations are gone by now
            logged |= dict(loss=loss.detach(), value_loss=value_loss.detach())
            for name, value in logged.items():
                sums[name] += value
        grad_norm = mogrpo.optimizer_step(run, step)  # the sum of both models' norms
    return mogrpo.step_metrics(run, sums, counts, grad_norm)

def add_critic(run):
    """Make a run one of PPO."""
    cfg = run.cfg
    # The critic's head is drawn alike on every process: `setup` has seeded them
    critic = mogrpo.load(AutoModelForTokenClassification, cfg.policy, num_labels=1)
    run.critic = mogrpo.shard(critic, run.dtype, cfg.recompute, run.mesh)
    run.trained = torch.nn.ModuleDict(dict(policy=run.policy, critic=run.critic))  # checkpointed
    run.optimizer.add_param_group(dict(params=list(critic.parameters()), peak_lr=cfg.critic_lr))
    run.combine = reward_itself
    run.update = ppo_update

def main(cfg):
    run = mogrpo.setup(cfg)
    add_critic(run)
    mogrpo.train(run, mogrpo.grpo_step)


if __name__ == "__main__":
    mogrpo.launch(main, Config, __doc__, TOY)
