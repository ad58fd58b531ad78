"""The tasks that eval.py can measure, one file each: load, prompt, grade.

    task        the parts of every benchmark
    tiny        the embedded topics
    text        held-out examples of one's own data
    sums        sums and products as questions, generated; chains: of names, in words
    gsm8k       the shortest benchmark, read it first
    math500     MATH-500; its grader is in math/
    mmlu, arc   multiple choice; letters: the letter that an answer means
    code        HumanEval, MBPP; sandbox, sandbox_child: running programs of a model
    files       published data sets, fetched and read
    prompting   problems to prompts, fewer shots where they do not fit
    grading     records graded again

May import text, parts, checkpoints, results, system, tiny.
"""

from data.tasks.arc import ARC
from data.tasks.chains import Chains, Hops
from data.tasks.code import HumanEval, MBPP
from data.tasks.gsm8k import GSM8K
from data.tasks.math500 import Math500
from data.tasks.mmlu import MMLU, MMLUPro, MMLUProSteps
from data.tasks.sums import HardSums, Sums
from data.tasks.text import Text
from data.tasks.tiny import Tiny

BENCHMARKS = (GSM8K(), Math500(), MMLU(), MMLUPro(), MMLUProSteps(),
              ARC("arc_easy", "ARC-Easy"), ARC("arc_challenge", "ARC-Challenge"),
              HumanEval(), MBPP(), Sums(), HardSums(),
              Chains(), Hops())
TASKS = {"tiny": Tiny(), "text": Text(), **{task.name: task for task in BENCHMARKS}}
