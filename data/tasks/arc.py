"""ARC-Easy and ARC-Challenge: science questions of school, mostly of four options (Clark 2018).

    python eval.py --task arc_easy --init_from=DIR --data_dir=DIR --limit 200

In the form of MMLU, so that a letter is scored. The harness's `arc_easy` compares the probabilities
of the options' texts instead; data/experiments/harness.py runs that.
"""

from pathlib import Path

from data.tasks.files import read_jsonl
from data.tasks.letters import ALPHABET, Letters


class ARC(Letters):
    folder = "arc"

    def __init__(self, name: str, part: str):
        self.name = name
        self.part = part       # "ARC-Easy" or "ARC-Challenge"

    def load(self, folder: Path) -> list:
        """Test rows, then training rows. Raises ValueError for missing or other files."""
        problems = []
        for split in ("Test", "Train"):
            rows = read_jsonl(folder / self.part / f"{self.part}-{split}.jsonl",
                              {"id": str, "question": dict, "answerKey": str})
            problems += [self.problem(row, split.lower()) for row in rows]
        return problems

    def problem(self, row: dict, split: str) -> dict:
        return {"id": f"{self.name}/{split}/{row['id']}", "question": row["question"]["stem"],
                "options": [choice["text"] for choice in row["question"]["choices"]],
                "answer": letter_of(row["answerKey"])}

    def chat_question(self, problem: dict) -> str:
        return f"Question:\n{problem['question']}\nChoices:\n{self.lines(problem)}\n\nAnswer:"

    def question(self, problem: dict) -> str:
        return f"Question: {problem['question']}\n{self.lines(problem)}\nAnswer:"


def letter_of(label: str) -> str:
    """Some questions number their options."""
    return ALPHABET[int(label) - 1] if label.isdigit() else label
