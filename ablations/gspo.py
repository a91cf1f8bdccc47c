"""
GSPO instead of GRPO: one ratio for a whole response, clipped as one.

    s_i   = exp(mean_t(log pi(o_t) - log pi_old(o_t)))     over the tokens of a response
    gain  = min(s_i A_i, clip(s_i, 1 - clip_low, 1 + clip_high) A_i)
    loss  = - mean_i (gain - beta mean_t s_i log(pi / pi_ref))     the logarithm held fixed

Source: 2507.18071. Its gradient is s_i A_i mean_t grad log pi, or 0 where it is clipped, and is
taken from its form for tokens (GSPO-token): each token has rho = sg(s_i) pi / sg(pi), which is s_i
in value. So everything else is mogrpo's. The means of logarithms differ from 0 by little, hence the
paper's narrow clip range; and with --epochs=1 s_i is 1, and this is GRPO: the default is 2. The
factor c of the sampler stays one of each token.

    torchrun -m ablations.gspo                                                 # the toy world
    torchrun --nproc_per_node=8 -m ablations.gspo [the flags of mogrpo.py]
"""
from dataclasses import dataclass
from types import SimpleNamespace

import torch

import mogrpo
from mogrpo import TOY, require

@dataclass
class Config(mogrpo.Config):
    clip_low: float = 3e-4        # of s_i, where A < 0
    clip_high: float = 4e-4       # where A > 0
    epochs: int = 2               # with 1 there is no ratio to speak of

    def __post_init__(self):
        super().__post_init__()
        require(self.loss_norm == "sequence", "--loss_norm: a response is one term of GSPO's mean")

def gspo_objective(batch, logp_N, cfg):
    """For run.objective: that of mogrpo, in which every log-prob of the policy and the reference
    is moved, without a gradient, to where pi / pi_old is s_i and pi / pi_ref is what it was."""
    log_ratio_N = logp_N.detach() - batch.old_logp_N
    log_s = torch.stack([log_ratio_T.mean() for log_ratio_T in log_ratio_N.split(batch.lengths)])
    lengths = torch.tensor(batch.lengths, device=logp_N.device)
    shift_N = log_s.repeat_interleave(lengths) - log_ratio_N
    moved = SimpleNamespace(**vars(batch) | dict(ref_logp_N=batch.ref_logp_N + shift_N))
    return mogrpo.objective(moved, logp_N + shift_N, cfg)

def main(cfg):
    run = mogrpo.setup(cfg)
    run.objective = gspo_objective
    mogrpo.train(run, mogrpo.grpo_step)


if __name__ == "__main__":
    mogrpo.launch(main, Config, __doc__, TOY)
