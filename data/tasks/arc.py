"""ARC-Easy and ARC-Challenge: school science questions, mostly of four options (Clark et al. 2018).

    python eval.py --task arc_easy --init_from=DIR --data_dir=DIR --limit 200

In the form of MMLU: letters are scored. The harness's `arc_easy` compares the probabilities of the
options' texts instead; data/experiments/harness.py runs that.
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
            for row in rows:
                question, label = row["question"], row["answerKey"]
                problems.append({
                    "id": f"{self.name}/{split.lower()}/{row['id']}",
                    "question": question["stem"],
                    "options": [choice["text"] for choice in question["choices"]],
                    # some questions number their options
                    "answer": ALPHABET[int(label) - 1] if label.isdigit() else label})
        return problems

    def question(self, problem: dict) -> str:
        return f"Question: {problem['question']}\n{self.lines(problem)}\nAnswer:"
