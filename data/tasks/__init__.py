"""The tasks that eval.py can measure. A task is one file: load, prompt, grade.

    groups                      the rows of its table, each a kind of problem
    problem(group, index)       one of them
    prompt(problem, tokenizer)  token ids that the model continues
    grade(problem, text, ended) is this answer right?
"""

from data.tasks.tiny import Tiny

TASKS = {"tiny": Tiny()}
