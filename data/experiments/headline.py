"""The numbers of the README's first table, once more: every way to train, several seeds.

    python -m data.experiments.headline --seeds 42 43 44        hours on a CPU; what is done is kept
    python -m data.experiments.headline --print                 the table of what there is

Trains with train.py, measures with eval.py (a process each, so that what is repeated is what a
reader would type), and prints the mean over seeds with its range.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from data.flags.train import PRESETS
from data.results.statistics import mean, unique
from data.system.disk import read_json

ROOT = Path(__file__).resolve().parents[2]
# a LoRA of rank 98 has as many parameters as the path
WAYS = {
    "refine": [],
    "paper": ["--objective=paper"],
    "lora": ["--method=lora", "--rank=98"],
    "lora5": ["--method=lora", "--rank=98", "--updates=9500"],
    "full": ["--method=full"],
    "full5": ["--method=full", "--updates=9500"],
    "lora_refine": [],
    "full_refine": [],
}
# A path beside a model that another way has finetuned: that one is made first.
BASES = {"lora_refine": "lora", "full_refine": "full"}
MEASURE = ["--problems=100", "--steps", "1", "2", "4", "8", "16", "32", "64"]


def run(*words):
    """One command, shown before it runs. Raises CalledProcessError where it fails."""
    print(">", *words, flush=True)
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True)


def train_once(out_dir: Path, *words):
    """Train, go on where an earlier run was stopped, or leave what is done."""
    # path.json is written at every validation, so it does not say that all is done
    done = out_dir / "done"
    if done.exists():
        return
    if (out_dir / "state.safetensors").exists():
        words = ["--init_from=resume"]
    run("train.py", *words, f"--out_dir={out_dir}")
    done.touch()


def make(way: str, seed: int, out_dir: Path, more: list):
    """Train and measure one way with one seed, unless that has been done."""
    trained = out_dir / f"{way}-{seed}"
    found = out_dir / f"{way}-{seed}.json"
    words = [*WAYS[way], f"--seed={seed}", "--report=0", *more]
    if way in BASES:
        make(BASES[way], seed, out_dir, more)
        words += [f"--init_from={out_dir / BASES[way]}-{seed}", *preset_flags()]
    train_once(trained, *words)
    if not found.exists():
        run("eval.py", f"--init_from={trained}", *MEASURE, f"--out={found}")


def preset_flags() -> list:
    """The values that the embedded model is trained with: for another one train.py has others."""
    words = []
    for name, value in PRESETS["tiny"].items():
        words.append(f"--{name}" if value is True else f"--{name}={value}")
    return words


def rows(records: list) -> dict:
    """(temperature, topic, column) -> accuracy, the mean over levels; those never trained apart."""
    found = {}
    for r in records:
        topic = f"{r['topic']} far" if r["unseen"] else r["topic"]
        found.setdefault((r["temperature"], topic, r["column"]), []).append(r["accuracy"])
    return {key: mean(values) for key, values in found.items()}


def show(out_dir: Path):
    """Mean over seeds [lowest, highest] of every way, in %."""
    for way in WAYS:
        files = sorted(out_dir.glob(f"{way}-*.json"))
        if not files:
            continue
        each = [rows(read_json(path)["accuracy"]) for path in files]
        print(f"\n{way}: {len(files)} seed(s), accuracy in %, mean over levels and seeds "
              "[lowest, highest seed]")
        for temperature, topic in unique(key[:2] for key in each[0]):
            cells = []
            for column in [key[2] for key in each[0] if key[:2] == (temperature, topic)]:
                values = [100 * found[temperature, topic, column] for found in each]
                cells.append(f"{column} {mean(values):.1f} [{min(values):.1f}, {max(values):.1f}]")
            print(f"  {topic}, temperature {temperature:g}: " + "; ".join(cells))


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--out_dir", default="headline", help="default: headline")
    parser.add_argument("--print", action="store_true", help="only what there is")
    args, more = parser.parse_known_args(argv)
    out_dir = Path(args.out_dir).absolute()
    if not args.print:
        out_dir.mkdir(parents=True, exist_ok=True)
        for seed in args.seeds:
            for way in args.ways:
                make(way, seed, out_dir, more)
    show(out_dir)


if __name__ == "__main__":
    main()
