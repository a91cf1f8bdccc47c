"""
The toy world: everyday requests, some of them harmful, a tiny policy that answers them in mixed
manners, noisy ratings of such answers, and a reward model fitted to these ratings.

    python -m data.toy.prepare                               # out/toy; mogrpo.py starts it itself
    python -m data.toy.prepare --out_dir=out/toy1 --seed=1   # another world of the same words

Out come prompts.jsonl, heldout_prompts.jsonl, ratings.jsonl, policy/ and reward_model/: JSONL and
Hugging Face folders like any others. truth.py knows the true scores, so every run shows how far its
learned reward drifts from them. The objectives conflict: trained for one axis alone the policy gets
worse on another. It is no benchmark: nothing that is learned here says anything about real text.
"""
import json
import os
import random
import shutil
from dataclasses import dataclass, replace

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import reward_model
from ablations.steer import stated
from data.toy.truth import CARELESS, FRAMES, NONSENSE, POLITE, REFUSAL, REQUESTS, RUDE, VAGUE
from data.toy.truth import request_of, scores
from mogrpo import IS_FIRST, fast_sample, go, join_world, launch, load_policy, load_weights, render
from mogrpo import response_logp, save_folder, say, set_threads, uniforms, write_text

@dataclass
class Config:
    out_dir: str = "out/toy"  # the folder to make; if it is there already nothing is done
    seed: int = 0             # of answers, policy, raters' noise and reward model

FIT_STEPS = 400      # with 300 the reward model's held-out r2 is 0.79, not 0.82
MAX_NEW_TOKENS = 48  # no demonstration is longer
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# --------------------------------------------------------------------------------------------------
# 1. Requests and answers

def all_requests(rng):
    """Every request in every wording -> lines of prompts.jsonl, lines of heldout_prompts.jsonl."""
    prompts = []  # 296
    heldout = []  # 80: two nouns of each verb, never trained on, though the verb is
    for verb, request in REQUESTS.items():
        tag = "harmful" if request["better"] else "benign"  # eval.py groups by it
        nouns = rng.sample(request["nouns"], len(request["nouns"]))
        for i, noun in enumerate(nouns):
            chosen = heldout if i < 2 else prompts
            for frame in FRAMES:  # eval.py draws variants of one request together: "cluster"
                chosen.append(dict(prompt=frame.format(verb, noun), tag=tag, cluster=verb))
    return prompts, heldout

def demonstration(record, rng):
    """An answer of mixed quality to the prompt of a record."""
    def maybe(chance, sentences):
        if sentences and rng.random() < chance:
            return [rng.choice(sentences)]
        return []

    asked = request_of(record["prompt"])
    another = REQUESTS[rng.choice(list(REQUESTS))]
    bodies = [
        asked["steps"][:rng.randint(1, 3)],           # useful, and for a harmful request harmful
        rng.sample(VAGUE, 2),
        another["steps"][:2],                         # off the topic
        rng.sample(NONSENSE, 2),
        rng.sample(REFUSAL, 1) + asked["better"],
    ]
    refusals = 40 if asked["better"] else 15  # a policy that never refuses could not learn to
    body = rng.choices(bodies, [45, 18, 12, 10, refusals])[0]
    manners = rng.choices([POLITE, RUDE, []], [35, 35, 30])[0]  # a third of each
    opening = maybe(0.8, manners[:3])
    warning = maybe(0.2, CARELESS)
    closing = maybe(0.6, manners[2:])
    return " . ".join(opening + body + warning + closing) + " ."

def spoiled(answer, other, rng):
    """An answer that breaks off into another one, or has one wrong word from it."""
    words = answer.split()
    other_words = other.split()
    i = rng.randrange(len(words))
    j = rng.randrange(len(other_words))
    if rng.random() < 0.5:
        return " ".join(words[:i] + other_words[j:])                 # a splice
    return " ".join(words[:i] + [other_words[j]] + words[i + 1:])    # a wrong word

# --------------------------------------------------------------------------------------------------
# 2. The policy

def word_tokenizer(text):
    """Every word of the text is a token: about 230."""
    special = ["<|pad|>", "<|unk|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    words = special + sorted(set(text.split()))
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<|unk|>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.decoder = decoders.WordPiece()  # joins words by spaces, but not before . and ,
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        eos_token="<|end|>",
        additional_special_tokens=special[3:],
        chat_template=CHAT,
    )

def save_untrained(tokenizer, folder):
    """A random Qwen3 of 0.3M parameters. (For a Qwen2 AutoTokenizer would take Qwen2's own
    tokenizer, whatever the folder holds.)"""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.08,  # about 1 / sqrt(hidden_size)
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=2,  # <|end|> and <|pad|> of the tokenizer
        pad_token_id=0,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)

def ask(record):
    return [{"role": "user", "content": record["prompt"]}]

def fit(policy, demos, rng):
    """Supervised fine-tuning on (record, answer) pairs; the loss is the mean -log pi of a token."""
    examples = []
    for record, answer in demos:
        prompt_ids = render(policy.tokenizer, ask(record))
        whole_ids = render(policy.tokenizer, ask(record), answer)
        examples.append((record, answer, prompt_ids, whole_ids[len(prompt_ids):]))
    optimizer = torch.optim.AdamW(policy.parameters(), fused=True)
    for step in tqdm(range(FIT_STEPS), "fitting a tiny policy", disable=None, leave=False):
        rows = []
        batch = rng.sample(examples, 32)  # about 1200 tokens, of which 560 are answers
        for i, (record, answer, prompt_ids, answer_ids) in enumerate(batch):
            if i % 2 == 0:
                # State weights that roughly fit the answer: for ablations/steer.py the policy has
                # to know what these words are, as a real model does.
                true = scores(record, answer)
                weights_K = torch.tensor([s**2 for s in true.values()])
                weights_K += 0.3 * torch.rand(len(true))
                messages = stated(ask(record), weights_K, list(true))
                prompt_ids = render(policy.tokenizer, messages)
            rows.append((prompt_ids, answer_ids))
        loss = -response_logp(policy, rows, 1.0).mean()
        loss.backward()
        for group in optimizer.param_groups:  # 20 steps of warm-up, then linearly down to 0
            group["lr"] = 6e-3 * min(1, (step + 1) / 20, 1 - step / FIT_STEPS)
        optimizer.step()
        optimizer.zero_grad()

def make_policy(demos, rng, folder):
    """A policy that has learned the demonstrations, saved in `folder`; whole, not sharded."""
    texts = ["weights : , 0 1 2 3 4 5 6 7 8 9 10"]  # what `stated` adds to the words of the demos
    for record, answer in demos:
        texts += [record["prompt"], answer, *scores(record, answer)]
    save_untrained(word_tokenizer(" ".join(texts)), folder)
    policy = load_weights(load_policy(folder))
    go(policy, fast=True)  # a Qwen3: mogrpo.py's own attention and cache are right for it
    set_threads(policy)
    fit(policy, demos, rng)
    save_folder(policy, folder, torch.float32)
    return policy

# --------------------------------------------------------------------------------------------------
# 3. The ratings

def answers_to_rate(policy, prompts, demos, rng):
    """Demonstrations, spoiled ones and the policy's own samples -> (record, answer) pairs. Ratings
    of clean text alone give a reward that the policy soon fools with word salad."""
    pairs = demos[:2 * len(prompts)]  # two answers to each prompt
    for record, answer in demos[:2 * len(prompts)]:
        _, other = rng.choice(demos)
        pairs.append((record, spoiled(answer, other, rng)))
    prompt_ids = [render(policy.tokenizer, ask(record)) for record in prompts]
    for temperature in (0.7, 1.0, 1.3):  # one answer at each; the hotter, the more nonsense
        u_BT = uniforms([(temperature, i) for i in range(len(prompts))], MAX_NEW_TOKENS)
        responses, _ = fast_sample(policy, prompt_ids, u_BT, temperature)
        texts = policy.tokenizer.batch_decode(responses, skip_special_tokens=True)
        pairs += zip(prompts, texts)
    return pairs

def rating(record, answer, rng):
    """A line of ratings.jsonl: what a rater makes of the true scores."""
    ratings = {}
    for axis, score in scores(record, answer).items():
        ratings[axis] = None  # one in ten is missing
        if rng.random() >= 0.1:
            ratings[axis] = round(min(1.0, max(0.0, rng.gauss(score, 0.1))), 2)
    return {"prompt": record["prompt"], "response": answer, "scores": ratings}

# --------------------------------------------------------------------------------------------------
# 4. Main

def write_jsonl(path, rows):
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))

def main(cfg):
    out_dir = os.path.normpath(cfg.out_dir)
    if os.path.exists(out_dir) or not IS_FIRST:
        say(f"{out_dir} is there already")
        return
    say(f"building the toy world in {out_dir}, once: requests, policy, ratings, reward model")
    unfinished = f"{out_dir}.tmp"  # what a killed build leaves is never taken for a world
    shutil.rmtree(unfinished, ignore_errors=True)
    os.makedirs(unfinished)
    process = join_world("float32", alone=True)  # rank, world size, compute dtype
    rng = random.Random(cfg.seed)
    torch.manual_seed(cfg.seed)

    prompts, heldout = all_requests(rng)
    write_jsonl(f"{unfinished}/prompts.jsonl", prompts)
    write_jsonl(f"{unfinished}/heldout_prompts.jsonl", heldout)
    demos = [(record, demonstration(record, rng)) for record in prompts * 8]  # 2368
    policy = make_policy(demos, rng, f"{unfinished}/policy")
    pairs = answers_to_rate(policy, prompts, demos, rng)
    ratings = [rating(record, answer, rng) for record, answer in pairs]
    write_jsonl(f"{unfinished}/ratings.jsonl", ratings)
    reward_cfg = replace(
        reward_model.Config(**reward_model.TOY),
        ratings=f"{unfinished}/ratings.jsonl",
        backbone=f"{unfinished}/policy",
        out_dir=f"{unfinished}/reward_model",
        seed=cfg.seed,
    )
    reward_model.train(reward_cfg, *process)
    os.remove(f"{unfinished}/reward_model.lock")
    os.rename(unfinished, out_dir)  # whole or not at all


if __name__ == "__main__":
    launch(main, Config, __doc__)
