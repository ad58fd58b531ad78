"""What every benchmark has: data/tasks/gsm8k.py is the shortest example.

    name, folder       how it is called, and the folder of its files, "" where it has none
    kind               "text", "letters" (multiple choice) or "code"
    shots              style -> worked examples in a prompt
    max_new_tokens     longest answer, unless another is asked for
    stops              style -> texts that end an answer
    load               the rows of its files, each with an id
    scored, examples   which of them are asked, which are shots of one
    prompt             messages for "chat", a text for "plain"
    grade              {"strict": bool, "flexible": bool, ...} of an answer
    extract, equal     the answer in it, and whether two are the same, for a vote
"""


def of_split(problems: list, split: str) -> list:
    """Those whose id says so."""
    return [problem for problem in problems if f"/{split}/" in problem["id"]]


def turns(problem: dict, shots: list, ask, answer) -> list:
    """Messages: every shot a question and its answer, then the question; ask, answer: functions."""
    messages = []
    for shot in shots:
        messages += [{"role": "user", "content": ask(shot)},
                     {"role": "assistant", "content": answer(shot)}]
    return [*messages, {"role": "user", "content": ask(problem)}]


def one_text(problem: dict, shots: list, ask, answer) -> str:
    """The same as one text, a blank line between the shots."""
    solved = [f"{ask(shot)} {answer(shot)}\n\n" for shot in shots]
    return "".join(solved) + ask(problem)


class Task:
    """What most of them have in common."""

    def scored(self, problems: list, shots: int, style: str) -> list:
        return of_split(problems, "test")

    def examples(self, problems: list, problem: dict, count: int, style: str) -> list:
        """The first rows of the training file."""
        return of_split(problems, "train")[:count]

    def note(self, problems: list) -> str | None:
        """What must stand beside every number; mostly nothing."""
        return None

    def short(self, problem: dict) -> dict:
        """What a record keeps of a problem, so that it can be graded without the data."""
        return {"reference": problem["answer"]}

    def restore(self, record: dict) -> dict:
        """A problem from what a record kept, as far as grading needs it."""
        return {"answer": str(record["reference"])}

    def plausible(self, problem: dict, text: str) -> bool:
        """Can it be an answer at all? A search prefers one that can."""
        return True

    def equal(self, a: str, b: str) -> bool:
        return a == b
