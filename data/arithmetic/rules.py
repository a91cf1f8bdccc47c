"""
Rewards by rule for data/arithmetic/prepare.py:

    correct    1 if the last number of the answer is the right one: verifiable, and hard
    polite     1 if a polite word occurs in it: easy
    brief      1 / (1 + characters / 60): easiest. With an equal weight it starves the hard one:
               --weights=correct=2,brief=0 leaves it out
"""
import re

POLITE = re.compile(r"\b(please|thanks?|welcome|glad|happy to|sure|certainly|of course)\b", re.I)

def scores(record, response):
    numbers = re.findall(r"\d+", response.replace(",", ""))
    return {
        "correct": float(numbers[-1:] == [record["answer"]]),
        "polite": float(bool(POLITE.search(response))),
        "brief": 1 / (1 + len(response) / 60),
    }
