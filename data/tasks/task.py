"""The parts of a benchmark: data/tasks/gsm8k.py is the shortest example.

    name, folder       its name, and the folder of its files, "" if it has none
    kind               "text", "letters" (multiple choice) or "code"
    shots              style -> worked examples in a prompt
    max_new_tokens     longest answer, unless --max_new_tokens is given
    stops              style -> texts that end an answer
    load               the rows of its files as problems, each with an id
    scored, examples   the problems to score, and the shots of one
    prompt             messages for "chat", a text for "plain"
    solution           the key of a problem's reference solution
    grade              {"strict": bool, "flexible": bool, ...} of an answer
    extract, equal     the answer in a text, and whether two are equal, for a vote
"""


def of_split(problems: list, split: str) -> list:
    """The problems of a split, by their ids."""
    return [problem for problem in problems if f"/{split}/" in problem["id"]]


def turns(problem: dict, shots: list, question, answer) -> list:
    """Messages: every shot a question and its answer, then the problem's question.

    question, answer   functions of a problem or shot that return a text
    """
    messages = []
    for shot in shots:
        messages += [{"role": "user", "content": question(shot)},
                     {"role": "assistant", "content": answer(shot)}]
    return [*messages, {"role": "user", "content": question(problem)}]


def one_text(problem: dict, shots: list, question, answer) -> str:
    """The same as one text, a blank line between the shots."""
    solved = [f"{question(shot)} {answer(shot)}\n\n" for shot in shots]
    return "".join(solved) + question(problem)


class Task:
    """The common part of most benchmarks."""
    solution = "answer"

    def reference(self, problem: dict) -> str:
        return problem[self.solution]

    def scored(self, problems: list, shots: int, style: str) -> list:
        return of_split(problems, "test")

    def examples(self, problems: list, problem: dict, count: int, style: str) -> list:
        """The first rows of the training file."""
        return of_split(problems, "train")[:count]

    def note(self, problems: list) -> str | None:
        """A warning that belongs to every result; mostly none."""
        return None

    def short(self, problem: dict) -> dict:
        """The part of a problem that its records keep, so that they can be graded without files."""
        return {"reference": problem["answer"]}

    def restore(self, record: dict) -> dict:
        """A problem from a record, as far as grading needs it."""
        return {"answer": str(record["reference"])}

    def plausible(self, problem: dict, text: str) -> bool:
        """Can the text be an answer at all? A search prefers one that can."""
        return True

    def equal(self, a: str, b: str) -> bool:
        return a == b
