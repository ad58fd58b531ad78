"""A real finetune: a path, a LoRA of as many parameters, and nothing, measured side by side.

    python -m data.experiments.finetune --init_from=DIR     hours on a CPU; what is done is kept

Every training question is a turn, its answer the reply. It runs train.py and eval.py,
so that what is repeated is what a reader would type. The task has to be one at which the base is
neither at chance nor perfect: sums (data/tasks/sums.py) for a small instruction-tuned model.
"""

import argparse
import hashlib
import json
from pathlib import Path

from data.experiments.headline import run, train_once
from data.system.command import command
from data.system.disk import appearing, read_json
from data.tasks import TASKS
from data.tasks.files import find_folder
from data.tasks.task import of_split

# One rank of LoRA is 305,280 parameters of SmolLM2-135M: 123 are as many as the path's 37.6 M.
WAYS = {
    "l2d": ["--method=l2d", "--objective=paper", "--lr=1e-3", "--cache_frozen"],
    "lora": ["--method=lora", "--rank=123", "--lr=1e-4"],
    # our own two departures, one by one, which are no part of the comparison at equal size: a path
    # with a reading of its own has more parameters
    "own": ["--method=l2d", "--objective=paper", "--own_kv", "--lr=1e-3", "--cache_frozen"],
    "refine": ["--method=l2d", "--objective=refine", "--own_kv", "--unroll=8", "--lr=1e-3",
               "--ema=0.98", "--cache_frozen"],
}


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
        # a row holds several questions
        run("-m", "data.text.chat", rows, f"--tokenizer={args.init_from}", f"--out_dir={data}",
            "--block_size=256", "--val_fraction=0.1")
    return data


def train_ways(args, data: Path, out_dir: Path):
    for way in args.ways:
        train_once(out_dir / way, *WAYS[way], f"--init_from={args.init_from}", f"--data={data}",
                   f"--seed={args.seed}", f"--updates={args.updates}", "--batch_size=4",
                   "--accumulate=1", "--warmup=20", f"--eval_every={args.eval_every}",
                   "--val_rows=48")


def measure(args, way: str, out_dir: Path):
    """Greedy and at temperature 1; the frozen model stands beside every path."""
    out = out_dir / f"eval-{way}"
    words = ["--temperatures", "0", "1", "--shots=0", "--style=chat", f"--limit={args.limit}"]
    if args.data_dir:
        words.append(f"--data_dir={args.data_dir}")
    if "--method=l2d" in WAYS[way]:
        words += ["--steps", *args.steps]
    # where records are there already, eval.py goes on with them
    run("eval.py", f"--task={args.task}", f"--init_from={out_dir / way}", f"--out={out}", *words)


def show(out_dir: Path):
    """Flexible accuracy in % [95 % interval], strict beside it."""
    for path in sorted(out_dir.glob("eval-*/summary.json")):
        for row in read_json(path)["rows"]:
            low, high = row["flexible_interval"]
            print(f"{path.parent.name[5:]:8} {row['column']:10} T={row['temperature']:g}  "
                  f"{100 * row['flexible']:5.1f} [{100 * low:.0f}, {100 * high:.0f}]  "
                  f"strict {100 * row['strict']:5.1f}  {row['nfe_per_token']:5.1f} NFE a token  "
                  f"{row['seconds'] / row['n']:.3f} s a question")


def show_losses(out_dir: Path, ways: list):
    """Held-out loss before, at the end, and in each tenth of t."""
    for way in ways:
        lines = (out_dir / way / "log.jsonl").read_text(encoding="utf-8").splitlines()
        entries = [json.loads(line) for line in lines]
        looks = [entry for entry in entries if "val_loss" in entry]
        seconds = [entry["seconds"] for entry in entries if "seconds" in entry]
        print(f"{way:8} held-out loss {looks[0]['val_loss']:.3f} -> {looks[-1]['val_loss']:.3f}, "
              f"{seconds[-1]:.0f} s; by tenth of t {looks[-1].get('by_tenth', '-')}")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@command("data.experiments.finetune")
def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--init_from", required=True, help="directory of an instruction-tuned model")
    add("--data_dir", help="where the files of a benchmark are; sums has none")
    add("--task", default="sums", choices=["sums", "arc_easy", "arc_challenge", "gsm8k"])
    add("--ways", nargs="+", default=["l2d", "lora"], choices=list(WAYS))
    add("--updates", type=int, default=150, help="of 4 rows (default: 150, one epoch of sums)")
    add("--eval_every", type=int, default=50, help="updates between validations (default: 50)")
    add("--limit", type=int, default=300, help="test questions (default: 300)")
    add("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="default: 1 2 4 8 16")
    add("--seed", type=int, default=42)
    add("--out_dir", default="out-finetune", help="default: out-finetune")
    args = parser.parse_args(argv)
    out_dir = Path(args.out_dir).absolute()
    out_dir.mkdir(parents=True, exist_ok=True)
    args.init_from = Path(args.init_from).absolute()
    if args.data_dir:
        args.data_dir = Path(args.data_dir).absolute()
    weights = args.init_from / "model.safetensors"
    before = sha256(weights)
    data = prepare(args, out_dir)
    train_ways(args, data, out_dir)
    for way in args.ways:
        measure(args, way, out_dir)
    show_losses(out_dir, args.ways)
    show(out_dir)
    print("the base's file is the same before and after:", before == sha256(weights), before)


if __name__ == "__main__":
    main()
