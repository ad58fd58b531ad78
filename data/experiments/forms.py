"""Chains of a form that no training has seen: other separators, other numbers of places and chains.

    python -m data.experiments.forms                  ten minutes of one core
    python -m data.experiments.forms --init_from=DIR --problems 50

In % of the problems of levels 1 to 8, greedy: the frozen model, the path after 2, 8 and 16 steps.
The training has 16 places in four chains, its pairs in random order with one space between them.
"""

import random

import torch

from data.results.statistics import mean
from data.system.command import check_range, command, flag_parser
from data.text.answer import Stop
from data.tiny.topics import CLASSES, LETTERS, LEVELS, chains_problem, make_problem
from sample import Settings, generate, load_model

STEPS = (0, 2, 8, 16)
# text of the pairs -> another text
TEXTS = {
    "as trained": lambda pairs: pairs,
    "pairs by alphabet": lambda pairs: " ".join(sorted(pairs.split())),
    "commas": lambda pairs: pairs.replace(" ", ","),
    "a pair a line": lambda pairs: pairs.replace(" ", "\n"),
}
# (places, chains) of other maps
SHAPES = ((12, 4), (20, 4), (16, 2), (16, 6))


def problem_of(level: int, index: int, places: int, chains: int) -> tuple:
    """(prompt, answer) on a map of another size."""
    rng = random.Random(f"forms/{level}/{index}/{places}/{chains}")
    *_, prompt, answer = chains_problem(rng, level, LETTERS[:places], chains)
    return prompt, answer


def measure(model, tokenizer, problems: list):
    """Accuracy at every number of STEPS, of problems (prompt, answer)."""
    prompts = [tokenizer.encode_start(prompt) for prompt, _ in problems]
    class_ids = [CLASSES.index("chains")] * len(problems)
    for steps in STEPS:
        answers = generate(model, prompts, Settings(steps=steps), Stop.of(tokenizer), class_ids)
        yield mean(found.text.strip() == answer for found, (_, answer) in zip(answers, problems))


@command("data.experiments.forms")
def main(argv=None):
    parser = flag_parser("python -m data.experiments.forms", __doc__)
    parser.add_argument("--init_from", default="tiny",
                        help="the shipped path, or directory of another one (default: tiny)")
    parser.add_argument("--problems", type=int, default=30,
                        help="problems of each level (default: 30)")
    args = parser.parse_args(argv)
    check_range("--problems", args.problems, 1)
    torch.set_num_threads(1)        # small matrices: a second thread only waits
    model, tokenizer = load_model(args.init_from)
    rows = {name: [] for name in TEXTS}
    asked = [(level, index) for level in LEVELS["chains"] for index in range(args.problems)]
    for level, index in asked:
        problem = make_problem("test", index, 0, "chains", level)
        pairs, place = problem.prompt.split(";")
        for name, change in TEXTS.items():
            rows[name].append((f"{change(pairs)};{place}", problem.answer))
    for places, chains in SHAPES:
        rows[f"{places} places, {chains} chains"] = [
            problem_of(level, index, places, chains) for level, index in asked]
    print(f"{'steps':20}" + "".join(f"{steps:7}" for steps in STEPS))
    for name, problems in rows.items():
        shares = measure(model, tokenizer, problems)
        print(f"{name:20}" + "".join(f"{100 * share:7.1f}" for share in shares))


if __name__ == "__main__":
    main()
