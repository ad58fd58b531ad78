"""The parts of a benchmark: data/tasks/gsm8k.py is the shortest example.

    name, folder       its name, and the folder of its files, "" if it has none
    kind               "text", "letters" (multiple choice) or "code"
    shots              style -> worked examples in a prompt
    trained_style      style of a finetuning's prompts
    max_new_tokens     longest answer, unless --max_new_tokens is given
    stops              style -> texts that end an answer
    load               the rows of its files as problems, each with an id
    scored, examples   the problems to score, and the shots of one
    question           a problem's question in a plain prompt; chat_question: as a turn
    conversation       a problem as a row of a finetuning
    grade              {"strict": bool, "flexible": bool, ...} of an answer
    extract            the answer in a text, for a vote; None without any
"""


def of_split(problems: list, split: str) -> list:
    """The problems of a split, by their ids."""
    return [problem for problem in problems if f"/{split}/" in problem["id"]]


class Task:
    """The common part of the benchmarks."""
    trained_style = "chat"
    solution = "answer"     # key of a problem's reference solution
    between = " "           # the text between a question and its answer in a plain prompt
    kinds = ()              # each with a score of its own; third in the ids of its problems

    def scored(self, problems: list, shots: int, style: str) -> list:
        return of_split(problems, "test")

    def examples(self, problems: list, problem: dict, count: int, style: str) -> list:
        """The first rows of the training file."""
        return of_split(problems, "train")[:count]

    def note(self, problems: list) -> str | None:
        """A warning that belongs to every result; mostly none."""
        return None

    # --- prompts: every shot a question and its answer, then the problem's question ---------------

    def prompt(self, problem: dict, shots: list, style: str):
        """Messages for "chat", a text for "plain", with a blank line between the shots."""
        if style == "plain":
            solved = [f"{self.question(shot)}{self.between}{self.worked(shot)}\n\n"
                      for shot in shots]
            return self.head(problem) + "".join(solved) + self.question(problem)
        messages = []
        for shot in shots:
            messages += [{"role": "user", "content": self.chat_question(shot)},
                         {"role": "assistant", "content": self.chat_answer(shot)}]
        return [*messages, {"role": "user", "content": self.chat_question(problem)}]

    def head(self, problem: dict) -> str:
        """The beginning of a plain prompt."""
        return ""

    def reference(self, problem: dict) -> str:
        return problem[self.solution]

    # the answer of a shot in either style; most tasks give the reference solution
    worked = chat_answer = reference

    def conversation(self, problem: dict) -> dict:
        """A row of a finetuning: the question and its answer, without worked examples."""
        prompt = self.prompt(problem, [], self.trained_style)
        if self.trained_style == "plain":
            return {"prompt": prompt, "response": self.between + problem["answer"]}
        return {"messages": [*prompt, {"role": "assistant", "content": problem["answer"]}]}

    # --- grading ----------------------------------------------------------------------------------

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
        """Are two extracted answers equal, for a vote?"""
        return a == b
