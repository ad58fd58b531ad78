"""Where and with what a number was made: all that one needs to repeat it, or to doubt it."""

import platform
import subprocess
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def commit() -> str | None:
    """The commit that is checked out, + where files differ from it; None outside a checkout."""
    # a number without the code that made it cannot be repeated
    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True,
                              text=True, check=True).stdout.strip()
    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    # an archive without git, or a machine without it
    except (OSError, subprocess.CalledProcessError):
        return None


def circumstances(model, args, start: float) -> dict:
    """All that one needs to repeat a result or to doubt it."""
    return {
        "args": vars(args),
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "threads": torch.get_num_threads(),
        "device": str(next(model.parameters()).device),
        "seconds": round(time.time() - start, 1),
        "base_sha256": getattr(model, "lm", model).fingerprint(),
    }
