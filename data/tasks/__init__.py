"""The tasks that eval.py can measure. A task is one file: load, prompt, grade.

The embedded topics (data/tasks/tiny.py) and sums (data/tasks/sums.py) make their problems;
benchmarks read them from the files in which they were published (data/tasks/files.py).
data/tasks/task.py says what a benchmark has, and sums have it too.
"""

from data.tasks.arc import ARC
from data.tasks.code import HumanEval, MBPP
from data.tasks.gsm8k import GSM8K
from data.tasks.math500 import Math500
from data.tasks.mmlu import MMLU, MMLUPro, MMLUProSteps
from data.tasks.sums import Sums
from data.tasks.tiny import Tiny

BENCHMARKS = (GSM8K(), Math500(), MMLU(), MMLUPro(), MMLUProSteps(),
              ARC("arc_easy", "ARC-Easy"), ARC("arc_challenge", "ARC-Challenge"),
              HumanEval(), MBPP(), Sums())
TASKS = {"tiny": Tiny(), **{task.name: task for task in BENCHMARKS}}
