"""Records graded again, without a model: `python eval.py --regrade IN.jsonl --out OUT.jsonl`.

A record has benchmark, id and output. Its problem comes from the published files, or, if there are
none, from the reference in the record.
"""

from data.results.statistics import pass_at_k
from data.system.command import choices
from data.tasks import BENCHMARKS, TASKS
from data.tasks.files import find_folder
from data.tasks.sandbox import NOTICE

# Other names for a task in records.
NAMES = {"math": "math500"}


class Grader:
    """Called with a record, it returns its verdict; a task's files are read at its first record."""

    def __init__(self, data_dir: str | None, allow_code: bool, seconds: float):
        self.data_dir = data_dir
        self.allow_code = allow_code
        self.seconds = seconds
        self.problems = {}       # task name -> id -> problem

    def __call__(self, record: dict) -> dict:
        name = record.get("benchmark")
        output = record.get("output")
        if name == "pass_at_k":
            counts = output if isinstance(output, dict) else {}
            n, c, k = (counts.get(key) for key in "nck")
            whole = all(isinstance(count, int) for count in (n, c, k))
            if not whole or not 0 <= c <= n <= 10_000 or k < 1:
                raise ValueError("a record of pass_at_k needs an output with whole numbers n, c "
                                 "and k, 0 <= c <= n <= 10000 and k >= 1")
            return {"pass_at_k": pass_at_k(n, c, k)}
        task = TASKS[choices(NAMES.get(name, name), [one.name for one in BENCHMARKS], "benchmark")]
        for key in ("id", "output"):
            if not isinstance(record.get(key), str):
                raise ValueError(f"a record of {name} has no {key}; allowed: lines with "
                                 "benchmark, id and output")
        problem = self.problem(task, record)
        if record.get("choices") == "letters":
            right = output == problem["answer"]
            return {"strict": right, "flexible": right, "letter": output}
        if task.kind != "code":
            return task.grade(problem, output)
        if not self.allow_code:
            raise ValueError(f"{name} runs programs that a model wrote, which needs "
                             f"--allow_code_execution; {NOTICE}")
        return task.grade(problem, output, self.seconds)

    def problem(self, task, record: dict) -> dict:
        """The problem of a record; ValueError if neither files nor record hold it."""
        if task.name not in self.problems:
            try:
                folder = find_folder(task.folder, self.data_dir)
            except ValueError:
                # files that were named, or that grading needs, have to be there
                if self.data_dir or task.kind == "code" or "reference" not in record:
                    raise
                return task.restore(record)
            self.problems[task.name] = {one["id"]: one for one in task.load(folder)}
        known = self.problems[task.name]
        if record["id"] not in known:
            raise ValueError(f"{task.name} has no problem {record['id']!r}; "
                             "allowed: ids such as " + next(iter(known)))
        return known[record["id"]]
