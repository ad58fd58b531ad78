"""The numbers of the README's first table: every training method on the embedded topics, 3 seeds.

    python -m data.experiments.headline --seeds 42 43 44    hours on a CPU; repeats no finished part
    python -m data.experiments.headline --print             the table of the results so far

Trains with train.py and measures with eval.py, a process each, by the commands that a reader would
type, and prints the mean over seeds with its range. Further flags go to train.py.
"""

import subprocess
import sys
from pathlib import Path

from data.checkpoints.state import read_state_meta
from data.flags.train import PRESETS, parse
from data.results.statistics import mean, unique
from data.system.command import command, flag_parser, flag_words
from data.system.disk import read_json

ROOT = Path(__file__).resolve().parents[2]
# a LoRA of rank 102 has as many parameters as the path
METHODS = {
    "refine": [],
    "paper": ["--objective=paper"],
    "lora": ["--method=lora", "--rank=102"],
    "lora5": ["--method=lora", "--rank=102", "--updates=14000"],
    "full": ["--method=full"],
    "full5": ["--method=full", "--updates=14000"],
    "lora_refine": [],
    "full_refine": [],
}
# A path beside a model that was finetuned by another method, which is trained first.
BASES = {"lora_refine": "lora", "full_refine": "full"}
MEASURE = ["--problems=100", "--steps", "1", "2", "4", "8", "16", "32", "64"]


def run(*words):
    """Print a command and run it; one that fails has said why, and its exit status is ours."""
    print(">", *words, flush=True)
    with subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT) as child:
        try:
            status = child.wait()
        except KeyboardInterrupt:
            # the child has it too: it saves its work first
            status = child.wait()
    if status:
        raise SystemExit(status)


def train_once(out_dir: Path, *words):
    """Train, resume a run that was stopped, or do nothing after a finished one."""
    args = vars(parse(list(map(str, words))))
    # path.json is written at every validation, so it does not mark the end
    done = out_dir / "done"
    flags = "\n".join(map(str, words))
    if done.exists():
        if done.read_text(encoding="utf-8") != flags:
            raise ValueError(f"{out_dir} was trained with other flags, which are in {done}; "
                             "choose another --out_dir, or remove it")
        return
    if (out_dir / "state.safetensors").exists():
        for name, value in read_state_meta(out_dir)["args"].items():
            if args.get(name) != value:
                raise ValueError(f"{out_dir} was begun with another --{name} ({value}, not "
                                 f"{args.get(name)}); choose another --out_dir, or remove it")
        words = ["--init_from=resume"]
    run("train.py", *words, f"--out_dir={out_dir}")
    done.write_text(flags, encoding="utf-8")


def train_and_measure(method: str, seed: int, out_dir: Path, more: list):
    """One method with one seed, unless its results exist; more: further flags of train.py."""
    trained = out_dir / f"{method}-{seed}"
    result = out_dir / f"{method}-{seed}.json"
    words = [*METHODS[method], f"--seed={seed}", "--report=0", *more]
    if method in BASES:
        train_and_measure(BASES[method], seed, out_dir, more)
        words.append(f"--init_from={out_dir / BASES[method]}-{seed}")
        # for any base but the embedded one train.py has other defaults
        for name, value in PRESETS["tiny"].items():
            words += flag_words(name, value)
    if not (trained / "done").exists():
        # of an earlier training
        result.unlink(missing_ok=True)
    train_once(trained, *words)
    if not result.exists():
        run("eval.py", f"--init_from={trained}", *MEASURE, f"--out={result}")


def accuracies(records: list) -> dict:
    """(temperature, topic, column) -> accuracy, the mean over levels; unseen levels apart."""
    found = {}
    for r in records:
        topic = f"{r['topic']} unseen" if r["unseen"] else r["topic"]
        found.setdefault((r["temperature"], topic, r["column"]), []).append(r["accuracy"])
    return {key: mean(values) for key, values in found.items()}


def show(out_dir: Path):
    """Mean over seeds [lowest, highest] of every method, in %."""
    if not any(out_dir.glob("*-*.json")):
        raise ValueError(f"{out_dir} holds no results; make them without --print")
    for method in METHODS:
        files = sorted(out_dir.glob(f"{method}-*.json"))
        if not files:
            continue
        by_seed = [accuracies(read_json(path)["accuracy"]) for path in files]
        print(f"\n{method}: {len(files)} seed(s), accuracy in %, mean over levels and seeds "
              "[lowest, highest seed]")
        for temperature, topic in unique(key[:2] for key in by_seed[0]):
            cells = []
            for column in [key[2] for key in by_seed[0] if key[:2] == (temperature, topic)]:
                values = [100 * found[temperature, topic, column] for found in by_seed]
                cells.append(f"{column} {mean(values):.1f} [{min(values):.1f}, {max(values):.1f}]")
            print(f"  {topic}, temperature {temperature:g}: " + "; ".join(cells))


@command("data.experiments.headline")
def main(argv=None):
    parser = flag_parser("python -m data.experiments.headline", __doc__)
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", help="seeds of the training (default: 42 43 44)")
    add("--methods", nargs="+", choices=list(METHODS),
        help="training methods (default: all)")
    add("--out_dir", default="headline", help="folder of all results (default: headline)")
    add("--print", action="store_true", help="the table of the results so far, nothing else")
    args, more = parser.parse_known_args(argv)
    out_dir = Path(args.out_dir).absolute()
    if args.print and (args.seeds or args.methods or more):
        raise ValueError("--print shows all results of --out_dir; allowed beside it: no other flag")
    if not args.print:
        for seed in args.seeds or (42, 43, 44):
            for method in args.methods or METHODS:
                train_and_measure(method, seed, out_dir, more)
    show(out_dir)


if __name__ == "__main__":
    main()
