"""The accuracy of three methods without training, to compare with every trained result.

    python -m data.experiments.untrained                    a minute of one core
    python -m data.experiments.untrained --init_from=DIR    chains of names, by a base of `hops`

The frozen model computes one hop of a chain: its answer replaces the start, and it is called again.
It does not know where a chain ends, and goes on. The embedded one knows the operations on strings
by name: the operation is put before the word. And an end shows in the map, as a place from which no
pair leads on: to choose one of them at random is right more often than never.
"""

import torch

from data.checkpoints.hub import resolve
from data.results.statistics import mean
from data.system.command import check_range, command, flag_parser
from data.tasks import TASKS
from data.tasks.chains import MOST
from data.text.answer import Stop
from data.text.tokenizer import load_tokenizer
from data.tiny.topics import LEVELS, Problem
from model import LM
from sample import Settings, generate

CALLS = (*range(1, 13), 17, 25)  # n Euler steps are n + 1 evaluations
BATCH = 128                      # prompts at a time


def answer(lm, tokenizer, prompts: list, most: int = 64) -> list:
    """The frozen model's greedy answers, of at most so many tokens."""
    ids = [tokenizer.encode_start(prompt) for prompt in prompts]
    settings = Settings(steps=0, max_new_tokens=most)
    return [found.text for at in range(0, len(ids), BATCH)
            for found in generate(lm, ids[at:at + BATCH], settings, Stop.of(tokenizer))]


def read_chain(problem) -> tuple:
    """(text before the start, start, pairs of the map, end), of letters or of names."""
    if isinstance(problem, Problem):
        told, start = problem.prompt.split(";")
        return f"{told};", start, [tuple(pair) for pair in told.split()], problem.answer
    told, start = problem["question"].rsplit(" ", 1)
    # "Rose tells Tom." for every pair, then "The news starts with"
    words = told.replace(".", "").split()[:-4]
    return f"{told} ", start, list(zip(words[::3], words[2::3])), problem["answer"]


def repeated_calls(lm, tokenizer, problems: list) -> list:
    """For each number of CALLS the share of the chains at whose end it is then; and one more share.

    That is of a walk which a rule stops: at the first place from which no pair leads on.
    """
    maps, places, pairs, ends = zip(*map(read_chain, problems))
    hops = [dict(some) for some in pairs]
    stopped = [None] * len(problems)
    reached, known = [], {}
    for call in range(1, max(CALLS) + 1):
        prompts = [f"{m}{place}" for m, place in zip(maps, places)]
        # a walk comes back to places of which the answer is known
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        known.update(zip(new, answer(lm, tokenizer, new, most=1)))
        # the answer, one token, is one hop further: the next call starts there
        places = [known[prompt].strip() for prompt in prompts]
        if call in CALLS:
            reached.append(mean(p == end for p, end in zip(places, ends)))
        stopped = [s if s or p in begun else p for s, p, begun in zip(stopped, places, hops)]
    return [*reached, mean(s == end for s, end in zip(stopped, ends))]


def shortcut(problem) -> float:
    """The probability that an end chosen at random is the right one."""
    starts, ends = zip(*read_chain(problem)[2])
    return 1 / len(set(ends) - set(starts))


def show(name: str, shares):
    print(f"{name:15}" + "".join(f"{100 * share:7.1f}" for share in shares))


@command("data.experiments.untrained")
def main(argv=None):
    parser = flag_parser("python -m data.experiments.untrained", __doc__)
    add = parser.add_argument
    add("--init_from", default="tiny",
        help="the embedded model, or one that --task=hops has finetuned (default: tiny)")
    add("--problems", type=int, default=200, help="problems of each level (default: 200)")
    args = parser.parse_args(argv)
    embedded = args.init_from == "tiny"
    words = TASKS["chains"]
    check_range("--problems", args.problems, 1, 10**6 if embedded else MOST["test"])
    torch.set_num_threads(1)        # small matrices: a second thread only waits
    lm = LM.from_pretrained(args.init_from, torch.float32, "cpu")
    tokenizer = load_tokenizer(resolve(args.init_from), lm.config.vocab_size)
    task = TASKS["tiny"]
    some = range(args.problems)
    if embedded:
        trained = LEVELS["chains"]
        chains = {level: [task.problem((topic, level), i) for i in some]
                  for topic, level in task.groups if topic == "chains"}
    else:
        trained = words.levels["train"]
        chains = {level: [words.make("test", level, i) for i in some]
                  for level in words.levels["test"]}
    print("accuracy in %: the frozen model after so many calls, or stopped by a rule, and chance")
    print(f"{'':15}" + "".join(f"{call:7}" for call in CALLS) + "   rule chance")
    rows = {}
    for level, problems in chains.items():
        rows[level] = [*repeated_calls(lm, tokenizer, problems), mean(map(shortcut, problems))]
        show(f"chains {level}", rows[level])
    for levels in (trained, [level for level in rows if level not in trained]):
        show(f"chains {min(levels)}-{max(levels)}",
             map(mean, zip(*(rows[level] for level in levels))))
    for level in LEVELS["strings"] if embedded else ():
        problems = [task.problem(("strings", level), i) for i in some]
        # in the words of the base's training text: "sort gcab: "
        prompts = [f"{problem.label} {problem.prompt[:-1]}: " for problem in problems]
        texts = answer(lm, tokenizer, prompts)
        right = mean(text.strip() == p.answer for text, p in zip(texts, problems))
        print(f"strings {level}, the operation in words: {100 * right:.1f}")


if __name__ == "__main__":
    main()
