"""Commands run one after the other, each in a process of its own, so that what is repeated is what
a reader would type. headline.py and finetune.py make the tables with it.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


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
