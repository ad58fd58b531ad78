"""The embedded topics as a task: exact answers, graded by the text behind `####`.

data/tiny/topics.py makes the problems; read that first and eval.py next.

    python eval.py --task tiny --problems 8
"""

from data.tiny.topics import (
    CLASSES, UNSEEN, LEVELS, Problem, encode_problem, final_answer, make_problem)


class Tiny:
    """Three topics, each with its levels of difficulty."""
    kind = "topics"
    classes = CLASSES
    # only here does the class add information to the prompt
    guided = ("strings",)
    # (topic, level) that no training uses
    unseen = tuple((topic, level) for topic, levels in UNSEEN.items() for level in levels)
    groups = tuple((topic, level) for topic, levels in LEVELS.items()
                   for level in levels + UNSEEN.get(topic, ()))

    def problem(self, group, index: int, seed: int = 0, split: str = "test") -> Problem:
        """Problem `index` of a group, (topic, level), in a split."""
        return make_problem(split, index, seed, *group)

    def key(self, problem: Problem) -> str:
        """A text that differs from that of every other problem."""
        return problem.prompt

    def prompt(self, problem: Problem, tokenizer) -> list:
        return tokenizer.encode_start(problem.prompt)

    def class_id(self, problem: Problem) -> int:
        return CLASSES.index(problem.label)

    def grade(self, problem: Problem, text: str, ended: bool) -> bool:
        """Is the answer exactly right, and did the model end it itself?"""
        return ended and final_answer(text) == problem.answer

    def reference(self, problem: Problem, tokenizer) -> tuple:
        """Prompt and right answer as a row for data.training.batches.collate."""
        return encode_problem(problem, tokenizer)

    def title(self, group) -> str:
        topic, level = group
        return f"{topic:9} {level:2}"

    def describe(self, problem: Problem) -> str:
        """The problem as a line to print, with the class where only that names the operation."""
        hint = f"   [class {problem.label}]" if problem.topic in self.guided else ""
        return f"{problem.topic}, level {problem.level}: {problem.prompt}{hint}"
