"""The embedded data: three topics with exact answers, all text, made from a seed.

The *base* model reads `Documents`: single facts (products, sums, words turned around, a small made-up world) and very few
composed problems. The *diffusion path* is finetuned on `Problems`, which ask to put the pieces together:

    math       (7*8)+15?                                  56+15=71 #### 71
    strings    gcab?                                      abcg | bacg | cabg     only the class says which
    knowledge  A goat B owl C fox, pet of Mira:            goat #### A

Train, validation and test problems are disjoint: a checksum of the question says where it belongs. Print some:

    python -m data.tiny.topics
"""

import random
import zlib
from dataclasses import dataclass

import numpy as np

CLASSES = ("math", "sort", "reverse", "rotate", "knowledge")     # class ids of guidance, in this order
LEVELS = {"math": (1, 2, 3), "strings": (1, 2), "knowledge": (1, 2)}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORD_LENGTH = {1: 4, 2: 6}
OPERATIONS = {"sort": sorted, "reverse": reversed, "rotate": lambda word: word[1:] + word[:1]}
COMPOSED = 0.004                                                 # share of composed problems in the base's text
ROW = 128                                                        # tokens in a row of pretraining text


@dataclass(frozen=True)
class Problem:
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


# --- the made-up world ------------------------------------------------------------------------------------------------

VALUES = {
    "home": ("Tolbek", "Sorn", "Velm", "Harn", "Quill", "Dros", "Ankar", "Fenby"),
    "pet": ("goat", "owl", "fox", "cat", "hen", "mule", "toad", "swan"),
    "food": ("soup", "rice", "plum", "corn", "fig", "bread", "leek", "nuts"),
    "work": ("baker", "smith", "miner", "nurse", "pilot", "judge", "monk", "actor"),
    "hue": ("red", "blue", "green", "gold", "pink", "gray", "white", "black"),
}
SENTENCES = {
    "home": "{} lives in {}.", "pet": "{} has a {}.", "food": "{} likes {}.", "work": "{} is a {}.", "hue": "{} wears {}.",
    "friend": "{} walks with {}.",
}


def make_world() -> dict:
    """name -> {attribute: value}, friends included; always the same world."""
    rng = random.Random("the world of tiny")
    first, last = ("Mi", "To", "Ka", "Le", "Su", "Bo", "Ri", "Na", "Ge", "Du"), ("ra", "vo", "lin", "des", "ma", "pek")
    names = [a + b for a in first for b in last]
    world = {name: {attribute: rng.choice(values) for attribute, values in VALUES.items()} for name in names}
    ring = rng.sample(names, len(names))
    for name, friend in zip(ring, ring[1:] + ring[:1]):
        world[name]["friend"] = friend
    return world


WORLD = make_world()


def options(rng, attribute: str, right: str):
    """Three choices in random order and the letter of the right one."""
    wrong = rng.sample([value for value in VALUES[attribute] if value != right], 2)
    choices = rng.sample(wrong + [right], 3)
    return " ".join(f"{letter} {choice}" for letter, choice in zip("ABC", choices)), "ABC"[choices.index(right)]


# --- one problem of each topic: (what identifies it, label, prompt, response) ------------------------------------------

def math_problem(rng, level: int):
    """level 1: (a*b)±c, 2: (a*b)±(c*d), 3: (a*b)±(c*d)±e; no step falls below zero."""
    products = [(rng.randint(2, 9), rng.randint(2, 9)) for _ in range((1, 2, 2)[level - 1])]
    values = [a * b for a, b in products] + [rng.randint(2, 99)] * (level != 2)
    shown = [f"({a}*{b})" for a, b in products] + [str(values[-1])] * (level != 2)
    signs, totals = [], [values[0]]
    for value in values[1:]:
        signs.append(rng.choice("+-") if totals[-1] >= value else "+")
        totals.append(totals[-1] + (value if signs[-1] == "+" else -value))
    prompt = shown[0] + "".join(sign + term for sign, term in zip(signs, shown[1:])) + "?"
    lines = [str(total) + "".join(f"{sign}{value}" for sign, value in zip(signs[i:], values[i + 1:]))
             for i, total in enumerate(totals)]
    return prompt, "math", prompt, f"{'='.join(lines)} #### {totals[-1]}"


def strings_problem(rng, level: int):
    """A word of different letters whose three results differ, and one of the three operations."""
    label = rng.choice(list(OPERATIONS))
    while True:
        word = "".join(rng.sample(LETTERS, WORD_LENGTH[level]))
        results = {name: "".join(change(word)) for name, change in OPERATIONS.items()}
        if len(set(results.values())) == 3:
            return word, label, f"{word}?", results[label]


def knowledge_problem(rng, level: int):
    """level 1: an attribute of somebody; level 2: of somebody's friend, whose name the answer writes down first."""
    name, attribute = rng.choice(list(WORLD)), rng.choice(list(VALUES))
    who, middle = (name, "") if level == 1 else (WORLD[name]["friend"], f"{WORLD[name]['friend']} ")
    right = WORLD[who][attribute]
    choices, letter = options(rng, attribute, right)
    asked = f"{attribute} of {'friend of ' * (level - 1)}{name}"
    return asked, "knowledge", f"{choices}, {asked}:", f" {middle}{right} #### {letter}"


MAKERS = {"math": math_problem, "strings": strings_problem, "knowledge": knowledge_problem}


def split_of(key: str) -> str:
    """Where a question belongs, for ever: one tenth each to test and validation."""
    return ("test", "val")[bucket] if (bucket := zlib.crc32(key.encode()) % 10) < 2 else "train"


def make_problem(split: str, index: int, seed: int = 0, topic: str | None = None, level: int | None = None) -> Problem:
    """Problem `index` of a split ("train", "val", "test"), of one topic and level or of a random one."""
    rng = random.Random(f"{seed}/{split}/{index}/{topic}/{level}")
    topic = topic or rng.choice(("math", "math", "strings", "knowledge"))
    while True:
        chosen = level or rng.choice(LEVELS[topic])
        key, label, prompt, response = MAKERS[topic](rng, chosen)
        if split_of(key) == split:
            return Problem(topic, chosen, label, prompt, response)


# --- what the base reads ----------------------------------------------------------------------------------------------

def arithmetic_fact(rng) -> str:
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    low, high = rng.randint(0, 99), rng.randint(0, 180)
    product = f"({a}*{b})" if rng.random() < 0.5 else f"{a}*{b}"
    return rng.choice((f"{product}={a * b}", f"{high}+{low}={high + low}", f"{high + low}-{low}={high}"))


def word_fact(rng) -> str:
    name, word = rng.choice(list(OPERATIONS)), "".join(rng.sample(LETTERS, rng.randint(3, 6)))
    return f"{name} {word}: {''.join(OPERATIONS[name](word))}"


def world_fact(rng) -> str:
    name = rng.choice(list(WORLD))
    facts = WORLD[name]
    if rng.random() < 0.5:
        attribute = rng.choice(list(facts))
        return f"{attribute} of {name}: {facts[attribute]}"
    return " ".join(SENTENCES[attribute].format(name, facts[attribute]) for attribute in rng.sample(list(facts), 3))


def choice_fact(rng) -> str:
    attribute = rng.choice(list(VALUES))
    right = rng.choice(VALUES[attribute])
    choices, letter = options(rng, attribute, right)
    return f"{choices}, find {right}: {right} #### {letter}"


def make_document(rng) -> str:
    """One fact or story; rarely a composed problem with its answer."""
    if rng.random() < COMPOSED:
        problem = make_problem("train", rng.randrange(1 << 30))
        return f"{problem.prompt}{problem.response}"
    return rng.choice((arithmetic_fact, arithmetic_fact, arithmetic_fact, word_fact, world_fact, choice_fact))(rng)


# --- as data sets: dataset[i] -> (ids, mask, segments, class id); mask is 1 on the tokens to be predicted ---------------

def encode_problem(problem: Problem, tokenizer) -> tuple:
    """(ids, mask, segments, class id) of a problem and its answer, end token included."""
    prompt, response = tokenizer.encode_start(problem.prompt), [*tokenizer.encode(problem.response), tokenizer.eos_id]
    mask = np.repeat([0, 1], [len(prompt), len(response)])
    return np.array(prompt + response), mask, np.ones_like(mask), CLASSES.index(problem.label)


class Problems:
    """Finetuning examples; row i is problem i of the split."""

    def __init__(self, tokenizer, split: str = "train", seed: int = 0):
        self.tokenizer, self.split, self.seed = tokenizer, split, seed

    def __len__(self):
        return {"train": 200_000}.get(self.split, 2_000)

    def __getitem__(self, index: int):
        return encode_problem(make_problem(self.split, index, self.seed), self.tokenizer)


class Documents(Problems):
    """Pretraining text: row i is ROW tokens of documents, each in a segment of its own."""

    def __getitem__(self, index: int):
        rng, ids, mask, segments = random.Random(f"{self.seed}/{self.split}/text/{index}"), [], [], []
        while len(ids) < ROW:
            document = [*self.tokenizer.encode_start(make_document(rng)), self.tokenizer.eos_id]
            segments += [segments[-1] + 1 if segments else 1] * len(document)
            mask += [0] + [1] * (len(document) - 1)
            ids += document
        return np.array(ids[:ROW]), np.array(mask[:ROW]), np.array(segments[:ROW]), 0


def main():
    for topic, levels in LEVELS.items():
        for level in levels:
            for index in range(2):
                problem = make_problem("train", index, topic=topic, level=level)
                print(f"{topic:9} {level}  {problem.label:9} {problem.prompt:46} {problem.response}")
    rng = random.Random(0)
    print("\n".join(make_document(rng) for _ in range(12)))


if __name__ == "__main__":
    main()
