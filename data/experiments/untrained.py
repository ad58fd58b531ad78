"""The accuracy of three methods without training, to compare with every trained result.

    python -m data.experiments.untrained              a minute of one core

The frozen model computes one hop of a chain: its answer replaces the start, and it is called again.
It does not know where a chain ends, and goes on. It knows the operations on strings by name: the
operation is put before the word. And an end shows in the map, as a letter that no pair begins with:
to choose one of them at random is right more often than never.
"""

import torch

from data.checkpoints.hub import resolve
from data.results.statistics import mean
from data.system.command import check_range, command, flag_parser
from data.tasks import TASKS
from data.text.answer import Stop
from data.text.tokenizer import load_tokenizer
from data.tiny.topics import LEVELS
from model import LM
from sample import Settings, generate

CALLS = (*range(1, 13), 17)      # n Euler steps are n + 1 evaluations


def answer(lm, tokenizer, prompts: list) -> list:
    """The frozen model's greedy answers."""
    ids = [tokenizer.encode_start(prompt) for prompt in prompts]
    return [found.text for found in generate(lm, ids, Settings(steps=0), Stop.of(tokenizer))]


def repeated_calls(lm, tokenizer, problems: list) -> list:
    """For each number of CALLS the share of the chains at whose end it is then; and one more share.

    That is of a walk which a rule stops: at the first place that no pair begins with.
    """
    maps, places = zip(*(problem.prompt.split(";") for problem in problems))
    starts = [{before for before, _ in text.split()} for text in maps]
    stopped = [None] * len(problems)
    reached = []
    for call in range(1, max(CALLS) + 1):
        # the answer is one hop further: the next call starts there
        answers = answer(lm, tokenizer, [f"{m};{place}" for m, place in zip(maps, places)])
        places = [text[:1] for text in answers]
        if call in CALLS:
            reached.append(mean(p == problem.answer for p, problem in zip(places, problems)))
        stopped = [s if s or p in begun else p for s, p, begun in zip(stopped, places, starts)]
    return [*reached, mean(s == problem.answer for s, problem in zip(stopped, problems))]


def shortcut(problem) -> float:
    """The probability that an end chosen at random is the right one."""
    starts, ends = zip(*problem.prompt.split(";")[0].split())
    return 1 / len(set(ends) - set(starts))


def show(name: str, shares):
    print(f"{name:15}" + "".join(f"{100 * share:7.1f}" for share in shares))


@command("data.experiments.untrained")
def main(argv=None):
    parser = flag_parser("python -m data.experiments.untrained", __doc__)
    parser.add_argument("--problems", type=int, default=200,
                        help="problems of each level (default: 200)")
    args = parser.parse_args(argv)
    check_range("--problems", args.problems, 1, 10**6)
    torch.set_num_threads(1)        # small matrices: a second thread only waits
    lm = LM.from_pretrained("tiny", torch.float32, "cpu")
    tokenizer = load_tokenizer(resolve("tiny"), lm.config.vocab_size)
    task = TASKS["tiny"]
    print("accuracy in %: the frozen model after so many calls, or stopped by a rule, and chance")
    print(f"{'':15}" + "".join(f"{call:7}" for call in CALLS) + "   rule chance")
    rows = []
    for topic, level in task.groups:
        problems = [task.problem((topic, level), i) for i in range(args.problems)]
        if topic == "chains":
            rows.append([*repeated_calls(lm, tokenizer, problems), mean(map(shortcut, problems))])
            show(f"chains {level}", rows[-1])
        if topic == "strings":
            # in the words of the base's training text: "sort gcab: "
            prompts = [f"{problem.label} {problem.prompt[:-1]}: " for problem in problems]
            texts = answer(lm, tokenizer, prompts)
            right = mean(text.strip() == p.answer for text, p in zip(texts, problems))
            print(f"strings {level}, the operation in words: {100 * right:.1f}")
    trained = len(LEVELS["chains"])
    show(f"chains 1-{trained}", map(mean, zip(*rows[:trained])))
    show(f"chains {trained + 1}-{len(rows)}", map(mean, zip(*rows[trained:])))


if __name__ == "__main__":
    main()
