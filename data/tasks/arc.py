"""ARC-Easy and ARC-Challenge: school science questions, mostly of four options (Clark et al. 2018).

    python eval.py --task arc_easy --init_from=DIR --data_dir=DIR --limit 200

In the form of MMLU: letters are scored. The harness's `arc_easy` compares the probabilities of the
options' texts instead; data/experiments/harness.py runs that.
"""

from pathlib import Path

from data.tasks.files import read_jsonl
from data.tasks.letters import ALPHABET, Letters, check_letter


def answer_letter(row: dict) -> str:
    """The letter of the right option; ValueError for a row without it."""
    question, key = row["question"], row["answerKey"]
    choices = question.get("choices")
    if not isinstance(question.get("stem"), str) or not isinstance(choices, list) or not all(
            isinstance(choice, dict) and isinstance(choice.get("text"), str) for choice in choices):
        raise ValueError("has no question of a stem and choices, each with a text and a label")
    # some questions number their options
    labels = [choice.get("label") for choice in choices]
    if labels.count(key) != 1:
        raise ValueError(f"has the answerKey {key[:20]!r}, but the labels {str(labels)[:60]}")
    letter = ALPHABET[labels.index(key):][:1]
    check_letter(letter, len(choices))
    return letter


class ARC(Letters):
    folder = "arc"
    trained_style = "plain"

    def __init__(self, name: str, part: str):
        self.name = name
        self.part = part       # "ARC-Easy" or "ARC-Challenge"

    def load(self, folder: Path) -> list:
        """Test rows, then training rows. Raises ValueError for missing or other files."""
        problems = []
        for split in ("Test", "Train"):
            rows = read_jsonl(folder / self.part / f"{self.part}-{split}.jsonl",
                              {"id": str, "question": dict, "answerKey": str}, answer_letter)
            for row in rows:
                question = row["question"]
                problems.append({
                    "id": f"{self.name}/{split.lower()}/{row['id']}",
                    "question": question["stem"],
                    "options": [choice["text"] for choice in question["choices"]],
                    "answer": answer_letter(row)})
        return problems

    def question(self, problem: dict) -> str:
        return f"Question: {problem['question']}\n{self.lines(problem)}\nAnswer:"

    def conversation(self, problem: dict) -> dict:
        """The right option as a text, in the harness's prompt: small models know no letters."""
        right = problem["options"][ALPHABET.index(problem["answer"])]
        return {"prompt": f"Question: {problem['question']}\nAnswer:", "response": f" {right}"}
