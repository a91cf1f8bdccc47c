"""
A rule against what a policy does when no axis asks for sense: to repeat itself, or to spill signs.
It goes beside a reward model, and knows nothing of grammar or meaning:

    torchrun mogrpo.py --reward_model=out/rm --rules=data/prompts/fluency.py \\
        --weights=fluency=0.3 [...]

    fluency    share of word pairs that are new, times share of words that are of Latin letters
"""
import re

from eval import distinct_2

PLAIN = re.compile(r"\W*[A-Za-z0-9'’.,/-]{1,20}\W*")

def fluency(text):
    """In [0, 1]."""
    words = text.split()
    plain = [word for word in words if PLAIN.fullmatch(word)]
    return distinct_2([text]) * len(plain) / max(1, len(words))

def scores(record, response):
    return {"fluency": fluency(response)}
