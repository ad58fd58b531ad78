"""What every benchmark has: data/tasks/gsm8k.py is the shortest example.

    name, folder       how it is called, and the folder of its files
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


class Task:
    """What most of them have in common."""

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
