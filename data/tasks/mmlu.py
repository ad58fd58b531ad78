"""MMLU (57 subjects, four options) and MMLU-Pro (14 categories, up to ten).

    python eval.py --task mmlu --init_from=DIR --data_dir=DIR --limit 200

Chat: the turns of the official L2D code, answered by a letter. Plain: the text of
lm-evaluation-harness. There MMLU-Pro is answered step by step, which is another task here,
`mmlu_pro_cot`: its numbers and those of letters alone cannot be compared. See letters.py.
"""

import re
from pathlib import Path

from data.system.disk import present
from data.tasks.files import read_csv, read_jsonl
from data.tasks.letters import Letters, check_letter
from data.tasks.task import of_split
from data.text.answer import cut

HEAD = "The following are multiple choice questions (with answers) about"
PRO_STRICT = re.compile(r"answer is \(?([A-J])\)?")


def same_subject(problems: list, problem: dict) -> list:
    return [one for one in problems if one["subject"] == problem["subject"]]


def check_csv(row: list):
    check_letter(row[5], 4)


def check_pro(row: dict):
    check_letter(row["answer"], len(row["options"]))


class MMLU(Letters):
    name = "mmlu"
    folder = "mmlu"

    def load(self, folder: Path) -> list:
        """Test rows, then the five shots of every subject."""
        problems = []
        for split in ("test", "dev"):
            paths = sorted((folder / split).glob(f"*_{split}.csv"))
            if not paths:
                raise ValueError(f"{folder / split} holds no *_{split}.csv; "
                                 "use the folders as published")
            for path in paths:
                subject = path.name.removesuffix(f"_{split}.csv")
                problems += [{"id": f"mmlu/{split}/{subject}/{number}", "subject": subject,
                              "question": row[0].strip(), "options": row[1:5], "answer": row[5]}
                             for number, row in enumerate(read_csv(path, 6, check_csv))]
        return problems

    def examples(self, problems: list, problem: dict, count: int, style: str) -> list:
        return same_subject(of_split(problems, "dev"), problem)[:count]

    def head(self, problem: dict) -> str:
        return f"{HEAD} {problem['subject'].replace('_', ' ')}.\n\n"

    def question(self, problem: dict) -> str:
        return f"{problem['question']}\n{self.lines(problem)}\nAnswer:"


class MMLUPro(MMLU):
    """Shots are the validation rows of the same category, or the category's last test rows."""
    name = "mmlu_pro"
    folder = "mmlu_pro"

    def load(self, folder: Path) -> list:
        """Test rows, then the validation rows if they are there."""
        needed = {"question_id": int, "question": str, "options": list, "answer": str,
                  "category": str}
        problems = []
        for split in ("test", "validation"):
            path = folder / f"{split}.jsonl"
            # published apart, and often missing
            if split == "validation" and not present(path):
                break
            # options without blanks, as the harness writes them
            problems += [{"id": f"mmlu_pro/{split}/{row['question_id']}", **row,
                          "subject": row["category"],
                          "options": [option.strip() for option in row["options"]]}
                         for row in read_jsonl(path, needed, check_pro)]
        return problems

    def note(self, problems: list) -> str | None:
        """A warning where the shots are not the published ones."""
        if of_split(problems, "validation"):
            return None
        return ("note: the validation rows are missing, so the shots are the last five test rows "
                "of each category, which are not scored: not comparable with published numbers")

    def examples(self, problems: list, problem: dict, count: int, style: str) -> list:
        same = same_subject(problems, problem)
        return (of_split(same, "validation") or same[-5:])[:count]

    def scored(self, problems: list, shots: int, style: str) -> list:
        test = of_split(problems, "test")
        if self.note(problems) is None:
            return test
        categories = {one["subject"]: one for one in test}
        taken = {shot["id"] for one in categories.values() for shot in same_subject(test, one)[-5:]}
        return [one for one in test if one["id"] not in taken]

    def chat_question(self, problem: dict) -> str:
        return f"Question:\n{problem['question']}\nChoices:\n{self.lines(problem)}"

    def question(self, problem: dict) -> str:
        return f"Question:\n{problem['question']}\nOptions:\n{self.lines(problem)}\nAnswer:"

    def strict(self, problem: dict, text: str) -> bool:
        """The first claim in the harness's form."""
        found = PRO_STRICT.search(cut(text, ("Question:",)))
        return bool(found) and found[1] == problem["answer"]


class MMLUProSteps(MMLUPro):
    """Answers with their reasoning, as in the harness: version 3.1 of its `mmlu_pro`."""
    name = "mmlu_pro_cot"
    kind = "text"
    max_new_tokens = 2048
    stops = {"chat": ("Question:",), "plain": ("Question:",)}

    def prompt(self, problem: dict, shots: list, style: str):
        """The same words in both styles; in turns the system says the first of them."""
        prompt = super().prompt(problem, shots, style)
        if style == "chat":
            prompt.insert(0, {"role": "system", "content": self.head(problem).strip()})
        return prompt

    def head(self, problem: dict) -> str:
        return (f"{HEAD} {problem['subject']}. Think step by step and then finish your answer with "
                '"the answer is (X)" where X is the correct letter choice.\n')

    def question(self, problem: dict) -> str:
        return f"{super().question(problem)} Let's think step by step."

    def worked(self, shot: dict) -> str:
        """The published reasoning without its first words, which end the question."""
        text = shot.get("cot_content") or f"The answer is ({shot['answer']})."
        return text.removeprefix("A: Let's think step by step.").strip()

    chat_question, chat_answer = question, worked
