"""
Full training in 6 bytes a weight, not 16: a 7B policy on one GPU of 80 GB, 14B on one of 141 GB.

    bytes a weight            mogrpo.py                  here
    weights                   4  (float32 masters)       2  (bfloat16, rounded at random)
    gradients                 4                          2
    AdamW's first moment      4                          2  (bfloat16, rounded at random)
    its second moment         4                          0  (one number for a row of a matrix)

Nearest rounding would lose a small step: a bfloat16 near 1 moves by 1/256 or not at all, and lr is
1e-6. Rounded up or down at random, in proportion to what lies between, weights are right on average
(2010.06192). And the second moment is nearly the same along a row of a matrix, so its mean will do
(Adam-mini, 2406.16793, which takes larger parts). Rows lie whole on one process: so any number of
processes computes the same moments.

The price: the noise of rounding; and gradients of several micro-batches are added up in bfloat16.
What is left out: no gradient is applied before all of them are there (block by block, as LOMO does:
2 bytes less), since the norm that they are clipped by is that of all, over all micro-batches.

    torchrun -m ablations.lean                         # the toy world: the same to learn, in less
    torchrun -m ablations.lean --policy=Qwen/Qwen2.5-7B-Instruct --sample_rows=128 ...   # one GPU
    python -m bench.memory --policy=Qwen/Qwen2.5-7B-Instruct --gpus=1 --lean --sample_rows=128
"""
from dataclasses import dataclass

import torch

import mogrpo
from mogrpo import DEVICE, TOY, require

@dataclass
class Config(mogrpo.Config):
    def __post_init__(self):
        super().__post_init__()
        require(self.lora_rank == 0, "--lora_rank: adapters are small; mogrpo.py has them")

BETAS = 0.9, 0.95      # as `make_optimizer` has them
SLICE = 2**24          # numbers of a weight that are updated at once: they take 0.4 GB for a moment

def rounded(x, generator):
    """float32 -> bfloat16, up or down at random so that the mean is x: a bfloat16 is the upper half
    of a float32's bits, and what is added to the lower half overflows as often as it should."""
    noise = torch.randint(2**16, x.shape, dtype=torch.int32, device=DEVICE, generator=generator)
    bits = x.view(torch.int32) + noise
    return bits.bitwise_and(-2**16).view(torch.float32).bfloat16()

class Lean(torch.optim.Optimizer):
    """AdamW without decay, as above. Its state has AdamW's names, so that checkpoints hold it."""

    def __init__(self, policy, cfg):
        super().__init__([dict(params=policy.parameters(), peak_lr=cfg.lr, lr=0.0)], {})
        for p in self.param_groups[0]["params"]:
            row = p.detach()[:, :1] if p.dim() == 2 else p.detach()
            self.state[p] = dict(
                step=torch.zeros(()), exp_avg=torch.zeros_like(p.detach()),
                exp_avg_sq=torch.zeros_like(row, dtype=torch.float32))

    @torch.no_grad()
    def step(self):
        [group] = self.param_groups
        generator = torch.Generator(DEVICE)
        for number, p in enumerate(group["params"]):
            if p.grad is None:
                continue
            state = self.state[p]
            state["step"] += 1
            t = int(state["step"])
            generator.manual_seed(hash((t, number, mogrpo.RANK)))  # resumed runs round the same
            whole = (p, p.grad, state["exp_avg"], state["exp_avg_sq"])
            mine = [x.to_local() for x in whole]  # this process's rows
            rows = max(1, SLICE // p[0].numel())
            for slices in zip(*(x.split(rows) for x in mine)):
                update(*slices, t, group["lr"], generator)

def update(weight, grad, first, second, t, lr, generator):
    """Adam on some rows, in float32, in place."""
    grad = grad.float()
    square = grad.square()
    if weight.dim() == 2:
        square = square.mean(1, keepdim=True)
    beta1, beta2 = BETAS
    mean = first.float().lerp(grad, 1 - beta1)
    second.lerp_(square, 1 - beta2)
    scale = (second / (1 - beta2**t)).sqrt() + 1e-8
    step = mean / (1 - beta1**t) / scale
    first.copy_(rounded(mean, generator))
    weight.copy_(rounded(weight.float() - lr * step, generator))

def main(cfg):
    run = mogrpo.setup(cfg, weights=torch.bfloat16)
    run.optimizer = Lean(run.policy, cfg)
    mogrpo.train(run, mogrpo.grpo_step)


if __name__ == "__main__":
    mogrpo.launch(main, Config, __doc__, TOY)
