"""A real finetune: the path, a LoRA of as many parameters, and nothing, on ARC's questions.

    python -m data.tasks.finetune --init_from=DIR --data_dir=DIR      what is done is kept

Every question is a turn, its letter the answer; one pass over the data unless `--updates` says
otherwise. Trains with train.py and measures with eval.py, a process each, so that what is repeated
is what a reader would type.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path

from data.command import command
from data.disk import appearing, read_json
from data.tasks import TASKS
from data.tasks.files import find_folder
from data.tasks.task import of_split

ROOT = Path(__file__).resolve().parent.parent.parent
# One rank of LoRA is 305,280 parameters of SmolLM2-135M: 123 are as many as the path's 37.6 M.
WAYS = {
    "l2d": ["--method=l2d", "--objective=paper", "--lr=1e-3"],
    "lora": ["--method=lora", "--rank=123", "--lr=1e-4"],
}


def run(*words):
    print(">", *words, flush=True)
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True)


def write_conversations(task, folder: Path, path: Path):
    """The training questions as one turn each, without worked examples."""
    with appearing(path) as part, open(part, "w", encoding="utf-8") as file:
        for problem in of_split(task.load(folder), "train"):
            messages = task.prompt(problem, [], "chat")
            messages.append({"role": "assistant", "content": problem["answer"]})
            file.write(json.dumps({"messages": messages}) + "\n")


def prepare(args, out_dir: Path) -> Path:
    task = TASKS[args.task]
    rows = out_dir / "train.jsonl"
    if not rows.exists():
        write_conversations(task, find_folder(task.folder, args.data_dir), rows)
    data = out_dir / "data"
    if not (data / "meta.json").exists():
        # a row holds two or three questions
        run("-m", "data.chat", rows, f"--tokenizer={args.init_from}", f"--out_dir={data}",
            "--block_size=256", "--val_fraction=0.1")
    return data


def make(args, way: str, data: Path, out_dir: Path):
    """Train one way, go on with it, or leave it if it is done."""
    trained = out_dir / way
    if (trained / "done").exists():
        return
    words = [*WAYS[way], f"--init_from={args.init_from}", f"--data={data}", f"--seed={args.seed}",
             f"--updates={args.updates}", "--batch_size=4", "--accumulate=1", "--warmup=20",
             "--eval_every=50", "--val_rows=48"]
    if (trained / "state.safetensors").exists():
        words = ["--init_from=resume"]
    run("train.py", *words, f"--out_dir={trained}")
    (trained / "done").touch()


def measure(args, name: str, source, out_dir: Path, *more):
    run("eval.py", f"--task={args.task}", f"--init_from={source}", f"--data_dir={args.data_dir}",
        f"--limit={args.limit}", "--shots=0", "--style=chat", f"--out={out_dir / f'eval-{name}'}",
        *more)


def show(out_dir: Path):
    for path in sorted(out_dir.glob("eval-*/summary.json")):
        for row in read_json(path)["rows"]:
            low, high = row["flexible_interval"]
            print(f"{path.parent.name:12} {row['column']:12} {100 * row['flexible']:5.1f} "
                  f"[{100 * low:.0f}, {100 * high:.0f}]   {row['nfe_per_token']:6.1f} NFE   "
                  f"{row['seconds'] / row['n']:.2f} s a question")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@command("data.tasks.finetune")
def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--init_from", required=True, help="directory of an instruction-tuned model")
    add("--data_dir", required=True, help="folder that holds arc/")
    add("--task", default="arc_easy", choices=["arc_easy", "arc_challenge"])
    add("--updates", type=int, default=500, help="of 4 rows (default: 500)")
    add("--limit", type=int, default=300, help="test questions (default: 300)")
    add("--steps", type=int, nargs="+", default=[1, 2, 4, 8], help="default: 1 2 4 8")
    add("--seed", type=int, default=42)
    add("--out_dir", default="out-finetune", help="default: out-finetune")
    args = parser.parse_args(argv)
    out_dir = Path(args.out_dir).absolute()
    out_dir.mkdir(parents=True, exist_ok=True)
    args.init_from = Path(args.init_from).absolute()
    args.data_dir = Path(args.data_dir).absolute()
    weights = args.init_from / "model.safetensors"
    before = sha256(weights)
    data = prepare(args, out_dir)
    for way in WAYS:
        make(args, way, data, out_dir)
    measure(args, "lora", out_dir / "lora", out_dir)
    measure(args, "l2d", out_dir / "l2d", out_dir, "--steps", *args.steps)
    show(out_dir)
    print("the base's file is the same before and after:", before == sha256(weights), before)


if __name__ == "__main__":
    main()
