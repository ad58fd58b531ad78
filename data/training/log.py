"""The numbers of a training: a JSON object a line in log.jsonl, a bar, a line per validation.

train.py calls it; the time left follows from the pace so far, of updates and validations apart.
"""

import json
import os
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from data.system import processes
from data.system.disk import check_regular, naming


def tenth_sums(losses, t) -> torch.Tensor:
    """(2, 10) float64: sum and number of the losses (N,) in each tenth of their times t (N,)."""
    if t is None:
        t = torch.zeros_like(losses)
    # t = 1 belongs to the last tenth
    tenths = (t * 10).long().clamp_max(9).cpu()
    weights = torch.stack((losses, torch.ones_like(losses))).cpu().double()
    return torch.stack([torch.bincount(tenths, some, minlength=10) for some in weights])


def by_tenth(sums) -> list:
    """Mean loss in each tenth; None for an empty one."""
    return [round(loss / count, 4) if count else None for loss, count in sums.T.tolist()]


class Log:
    """Append to out_dir/log.jsonl; `done` of `updates` updates were made before this run."""

    def __init__(self, out_dir, done: int, updates: int, eval_every: int):
        self.first = done
        self.updates = updates
        self.eval_every = eval_every
        self.pauses = []        # seconds of every validation, saving included
        self.start = time.time()
        self.losses = []        # of this run
        # one process writes
        path = os.devnull if processes.number() else Path(out_dir) / "log.jsonl"
        if path != os.devnull:
            check_regular(path)
        self.file = open(path, "a", encoding="utf-8")
        self.bar = tqdm(total=updates, initial=done, disable=None, mininterval=0.5)

    @property
    def seconds(self) -> float:
        return time.time() - self.start

    def write(self, entry: dict):
        with naming(self.file.name):
            print(json.dumps(entry), file=self.file, flush=True)

    def add(self, update: int, loss: float, **numbers):
        """One update."""
        self.losses.append(loss)
        self.bar.update()
        self.bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        self.write({"update": update, "loss": round(loss, 5), **numbers,
                    "seconds": round(self.seconds, 2)})
        # an estimate long before the second validation
        if len(self.losses) == 10:
            tqdm.write(f"at the pace of the first 10 updates:{self.pace()}")

    def show(self, result: dict):
        """One validation: an aligned line, with the mean loss of the last 50 updates."""
        self.write(result)
        last = self.losses[-50:]
        recent = f"{sum(last) / len(last):6.3f}" if last else "     -"
        line = (f"update {result['update']:6}/{self.updates}  loss(50) {recent}"
                f"  val {result['val_loss']:6.3f}")
        if "by_tenth" in result:
            numbers = ["  -  " if loss is None else f"{loss:5.2f}" for loss in result["by_tenth"]]
            line += "  by tenth of t " + " ".join(numbers)
        tqdm.write(line + self.pace())

    def pace(self) -> str:
        """Time per update and time left; "" before the first update."""
        done = len(self.losses)
        if not done:
            return ""
        each = (self.seconds - sum(self.pauses)) / done
        now = self.first + done
        left = each * (self.updates - now)
        if self.pauses:
            # one at each multiple of eval_every, and one at the end
            coming = (self.updates - 1) // self.eval_every - now // self.eval_every + 1
            left += max(0, coming) * sum(self.pauses) / len(self.pauses)
        return f"  {1000 * each:5.0f} ms/update  {left / 60:5.1f} min left"

    @contextmanager
    def pause(self):
        """Around a validation and saving."""
        start = time.time()
        yield
        self.pauses.append(time.time() - start)

    def close(self):
        self.bar.close()
        self.file.close()
