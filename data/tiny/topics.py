"""The embedded data: three topics with exact answers, all text, made from a seed.

The *base* model reads `Documents`: single facts (products, sums, one operation on a word, one step
on a map) and very few composed problems. The *diffusion path* is finetuned on `Problems`, which ask
to put the pieces together:

    chains     ab ch bc;a        h                   from a to b, to c, to h, the end: 3 hops
    math       (7*8)+15?         56+15=71 #### 71
    strings    gcab?             abcg | bacg | cabg     only the class says which

Train, validation and test problems are disjoint: a checksum of the question says where it belongs.
Every draw below is part of the data: with one call of `rng` more or less, or in another order, all
problems after it differ. Read data/tasks/tiny.py next, which grades them. Print some:

    python -m data.tiny.topics
    math      1  math      (3*5)+81?                                      15+81=96 #### 96
"""

import random
import zlib
from dataclasses import dataclass

import numpy as np

# a class id of guidance is a place in this list, and trained paths remember it
CLASSES = ("chains", "math", "sort", "reverse", "rotate")
LEVELS = {"chains": (1, 2, 3, 4, 5, 6, 7, 8), "math": (1, 2, 3), "strings": (1, 2)}
# deeper than anything that is trained on
UNSEEN = {"chains": (9, 10, 11, 12)}

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORD_LENGTH = {1: 4, 2: 6}       # by level

# Share of composed problems in the base's text: enough to show their form, far too few to learn
# how to solve them, which is left to the path.
COMPOSED = 0.004
ROW = 128                        # tokens in a row of pretraining text


@dataclass(frozen=True)
class Problem:
    """A question and its answer, both as the model reads them."""
    topic: str
    level: int
    label: str       # one of CLASSES
    prompt: str
    response: str

    @property
    def answer(self) -> str:
        return final_answer(self.response)


def final_answer(text: str) -> str:
    """What is graded: the text behind the last `####`, or all of it where there is none."""
    return text.rsplit("####", 1)[-1].strip()


# --- maps -----------------------------------------------------------------------------------------

PLACES = "abcdefghijklmnop"      # the letters of a map
CHAINS = 4                       # in a map


def make_map(rng, longest: int, places: str = PLACES, count: int = CHAINS) -> list:
    """Chains, `count` of them, that cover all places; the first has at least `longest`."""
    first = rng.randint(longest, len(places) - (count - 1))
    # the others: where the remaining places are cut
    cuts = sorted(rng.sample(range(first + 1, len(places)), count - 2))
    return cut_chains(rng.sample(places, len(places)), [first, *cuts])


def cut_chains(places: list, cuts: list) -> list:
    """The pieces of a list that is cut before these positions."""
    return [places[start:end] for start, end in zip([0, *cuts], [*cuts, len(places)])]


def draw_map(rng, chains: list, ends: bool) -> str:
    """The map as text: "ab ch bc", every place with the next one, in random order.

    ends  are marked: they lead to themselves, "hh"
    """
    pairs = []
    for chain in chains:
        following = chain[1:] + chain[-1:] if ends else chain[1:]
        pairs += [a + b for a, b in zip(chain, following)]
    rng.shuffle(pairs)
    return " ".join(pairs)


# --- one problem of each topic --------------------------------------------------------------------
#
# Each maker returns (what identifies the question, label, prompt, response). The first decides the
# split, so it leaves out what may differ between two askings of one question.

def chains_problem(rng, level: int, places: str = PLACES, count: int = CHAINS):
    """The end of the chain that a place is on, `level` hops away.

    Nothing marks the end: no pair begins with it. The base goes one hop, and does not know where
    to stop.
    """
    chains = make_map(rng, level + 1, places, count)
    place = chains[0][-1 - level]
    text = draw_map(rng, chains, ends=False)
    # the same map in another order is the same question
    key = " ".join(sorted(text.split())) + place
    return key, "chains", f"{text};{place}", chains[0][-1]


def math_problem(rng, level: int):
    """level 1: (a*b)±c, 2: (a*b)±(c*d), 3: (a*b)±(c*d)±e; no step falls below zero."""
    terms = []
    for _ in range(1 if level == 1 else 2):
        a = rng.randint(2, 9)
        b = rng.randint(2, 9)
        terms.append((f"({a}*{b})", a * b))
    # drawn on level 2 as well, where it is unused: without it the draws after it would change
    number = rng.randint(2, 99)
    if level != 2:
        terms.append((str(number), number))

    prompt, total = terms[0]
    totals = [total]
    rest = []
    for text, value in terms[1:]:
        # negative numbers would be one thing more to learn, for no insight gained
        sign = rng.choice("+-") if total >= value else "+"
        total += value if sign == "+" else -value
        prompt += sign + text
        rest.append(f"{sign}{value}")
        totals.append(total)
    prompt += "?"
    # the answer shortens the sum from the left: 35+56-22=91-22=69
    steps = [str(total) + "".join(rest[i:]) for i, total in enumerate(totals)]
    return prompt, "math", prompt, f"{'='.join(steps)} #### {total}"


# rotate: abcd -> bcda
OPERATIONS = {"sort": sorted, "reverse": reversed, "rotate": lambda word: word[1:] + word[:1]}


def strings_problem(rng, level: int):
    """A word of different letters whose three results differ, and one of the three operations."""
    label = rng.choice(list(OPERATIONS))
    while True:
        word = "".join(rng.sample(LETTERS, WORD_LENGTH[level]))
        results = {name: "".join(change(word)) for name, change in OPERATIONS.items()}
        # where two results agree, the right answer would not show which operation was understood
        if len(set(results.values())) == 3:
            # the word alone identifies it: trained on in one class, it is not tested in another
            return word, label, f"{word}?", results[label]


# the topics to draw from, by their shares
TOPICS = ("chains", *["math"] * 4, "strings")

MAKERS = {"chains": chains_problem, "math": math_problem, "strings": strings_problem}


def split_of(key: str) -> str:
    """Where a question belongs, for ever: one tenth each to test and validation."""
    # a checksum and not `hash`, which differs from process to process
    bucket = zlib.crc32(key.encode()) % 10
    return {0: "test", 1: "val"}.get(bucket, "train")


def make_problem(split: str, index: int, seed: int = 0, topic: str | None = None,
                 level: int | None = None) -> Problem:
    """Problem `index` of a split ("train", "val", "test"); topic, level: None draws one."""
    # the arguments are the seed, so problem 7 can be made without the seven before it
    rng = random.Random(f"{seed}/{split}/{index}/{topic}/{level}")
    if not topic:
        topic = rng.choice(TOPICS)
    # until chance hits the split: mostly at once for "train", in ten tries for the others
    while True:
        chosen = level or rng.choice(LEVELS[topic])
        key, label, prompt, response = MAKERS[topic](rng, chosen)
        if split_of(key) == split:
            return Problem(topic, chosen, label, prompt, response)


# --- what the base reads --------------------------------------------------------------------------

def arithmetic_fact(rng) -> str:
    """A product, a sum or a difference: 42+17=59."""
    a = rng.randint(2, 9)
    b = rng.randint(2, 9)
    low = rng.randint(0, 99)
    high = rng.randint(0, 180)
    # half of them in brackets, as in the problems
    product = f"({a}*{b})" if rng.random() < 0.5 else f"{a}*{b}"
    total = high + low
    return rng.choice((f"{product}={a * b}", f"{high}+{low}={total}", f"{total}-{low}={high}"))


def word_fact(rng) -> str:
    """A word before and after an operation: sort kqp: kpq."""
    name = rng.choice(list(OPERATIONS))
    # not only the lengths of the problems, 4 and 6: the operation is to be learned
    word = "".join(rng.sample(LETTERS, rng.randint(3, 6)))
    return f"{name} {word}: {''.join(OPERATIONS[name](word))}"


def step_fact(rng) -> str:
    """One step on a map, the question of all chains of one hop: ab ch bc hh;c h."""
    chains, pairs = small_map(rng)
    place = rng.choice(rng.choice(chains))
    return f"{pairs};{place}{dict(pairs.split())[place]}"


def steps_fact(rng) -> str:
    """Several single steps on one map, from anywhere to anywhere: ab ch bc hh,ch,hh,ab."""
    chains, pairs = small_map(rng)
    # "ab" leads from a to b
    following = dict(pairs.split())
    steps = [place + following[place] for place in rng.sample(sum(chains, []), 4)]
    return ",".join([pairs, *steps])


def small_map(rng) -> tuple:
    """(chains, text) of a map that need not have all places: few are easier to learn from."""
    count = rng.randint(4, len(PLACES))
    places = rng.sample(PLACES, count)
    chains = cut_chains(places, sorted(rng.sample(range(1, count), CHAINS - 1)))
    # an end leads to itself, as everywhere in the base's text
    return chains, draw_map(rng, chains, ends=True)


# a map is five times as long as a sum: about half of the tokens are of maps
FACTS = (*[arithmetic_fact] * 6, *[word_fact] * 2, *[step_fact] * 2, *[steps_fact] * 2)


def make_document(rng) -> str:
    """One fact or story; rarely a composed problem with its answer."""
    if rng.random() < COMPOSED:
        # of the training split: the base must not have read what the path is tested on
        topic = rng.choice(("math", "strings"))
        problem = make_problem("train", rng.randrange(1 << 30), topic=topic)
        return f"{problem.prompt}{problem.response}"
    return rng.choice(FACTS)(rng)


# --- as data sets ---------------------------------------------------------------------------------
#
# dataset[i] is a row as data/training/batches.py says; mask is 1 on the tokens to be predicted.

def encode_problem(problem: Problem, tokenizer) -> tuple:
    """A row for data.training.batches.collate: a problem and its answer, end token included."""
    prompt = tokenizer.encode_start(problem.prompt)
    # encoded apart from the prompt, as a model writes it; the end is predicted too, or a model
    # would not know where to stop
    response = [*tokenizer.encode(problem.response), tokenizer.eos_id]
    mask = np.repeat([0, 1], [len(prompt), len(response)])
    class_id = CLASSES.index(problem.label)
    return np.array(prompt + response), mask, np.ones_like(mask), class_id


class Problems:
    """Finetuning examples; row i is problem i of the split."""
    classes = CLASSES

    def __init__(self, tokenizer, split: str = "train", seed: int = 0):
        self.tokenizer = tokenizer
        self.split = split
        self.seed = seed

    def __len__(self):
        # problems are made on demand, so any number would do
        return 200_000 if self.split == "train" else 2_000

    def __getitem__(self, index: int):
        return encode_problem(make_problem(self.split, index, self.seed), self.tokenizer)


class Documents(Problems):
    """Pretraining text: row i is ROW tokens of documents, numbered from 1."""
    classes = ()

    def __getitem__(self, index: int):
        rng = random.Random(f"{self.seed}/{self.split}/text/{index}")
        ids, mask, documents = [], [], []
        # from 1: 0 is padding
        number = 1
        while len(ids) < ROW:
            document = [*self.tokenizer.encode_start(make_document(rng)), self.tokenizer.eos_id]
            ids += document
            # no token precedes the first, so it cannot be predicted
            mask += [0] + [1] * (len(document) - 1)
            documents += [number] * len(document)
            number += 1
        # the last document is cut, so that all rows have one length and need no padding
        return np.array(ids[:ROW]), np.array(mask[:ROW]), np.array(documents[:ROW])


def main():
    for topic, levels in LEVELS.items():
        for level in levels:
            for index in range(2):
                one = make_problem("train", index, topic=topic, level=level)
                print(f"{topic:9} {level}  {one.label:9} {one.prompt:46} {one.response}")
    rng = random.Random(0)
    for _ in range(12):
        print(make_document(rng))


if __name__ == "__main__":
    main()
