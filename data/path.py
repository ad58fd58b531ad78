"""What a directory says of a diffusion path: its config, its trained tensors, the base it needs.

`L2DConfig` is what path.json holds, as ModelConfig is what config.json holds. diffusion.py makes
the path of it; read that next.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import load_file

from data.checkpoint import open_safetensors, read_json, write_json, write_safetensors
from data.families import choices

TIME_DISTRIBUTIONS = ("uniform", "cosmap")
# What the fields of a path.json were called before they got the names that the field uses.
OLD_NAMES = {"conditioning": "cond_dim", "schedule": "time_distribution"}


@dataclass
class L2DConfig:
    """The path's shape and its noise. `sigma` None means σ² = 16·Z, the paper's 64 at Z = 256."""
    width: int = 256                      # Z
    cond_dim: int = 256                   # S, of the time embedding
    sigma: float | None = None
    rank: int | None = 32                 # of the LoRA on the path's matrices; None: full copies
    alpha: float = 32.0
    classes: int = 0                      # topics for guidance; 0: none
    class_dropout: float = 0.2            # how often training hides the class
    time_distribution: str = "uniform"    # of the training times, see data/draws.py
    self_conditioning: bool = False       # the path reads its own previous guess
    own_reading: bool = False             # the path has keys and values of its own

    def __post_init__(self):
        choices(self.time_distribution, TIME_DISTRIBUTIONS, "time_distribution")
        for name, low in (("width", 1), ("cond_dim", 1), ("classes", 0), ("rank", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name} = {value} is out of range; allowed: {low} or more")
        if self.sigma is None:
            self.sigma = 4 * math.sqrt(self.width)


def save_path(ours: dict, config: L2DConfig, base: dict, directory: Path):
    """Write path.safetensors, then path.json; ours: name -> trained tensor."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().cpu().contiguous() for name, p in ours.items()}
    write_safetensors(tensors, directory / "path.safetensors")
    write_json({"config": asdict(config), **base}, directory / "path.json")


def read_path(directory: Path) -> dict:
    """path.json: base, base_sha256, and config as an L2DConfig.

    Raises ValueError where it was not written by us.
    """
    path = directory / "path.json"
    meta = read_json(path)
    for name in ("config", "base", "base_sha256"):
        if name not in meta:
            raise ValueError(f"{path} was not written by this version: it has no {name!r}; "
                             "train the path again with train.py")
    try:
        fields = {OLD_NAMES.get(name, name): value for name, value in meta["config"].items()}
        return {**meta, "config": L2DConfig(**fields)}
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{path} was not written by this version ({error}); "
                         "train the path again with train.py") from None


def check_base(meta: dict, found: str, base: str, directory: Path):
    """Raise ValueError unless the path was trained beside the base whose fingerprint was found."""
    wanted = meta["base_sha256"]
    if found != wanted:
        raise ValueError(
            f"the path in {directory} belongs to the base {meta['base']!r} "
            f"(sha256 {wanted[:12]}), not to {base!r} (sha256 {found[:12]}); "
            f"train one for this base with train.py --init_from={base}")


def fill(ours: dict, path: Path):
    """Copy a file into the tensors of a path. Raises ValueError unless all fit."""
    open_safetensors(path)      # says in one line what is wrong with the file
    tensors = load_file(path)
    theirs = {(name, tensor.shape) for name, tensor in tensors.items()}
    wrong = {(name, p.shape) for name, p in ours.items()} ^ theirs
    if wrong:
        names = sorted({name for name, _ in wrong})
        raise ValueError(f"{path} does not fit path.json: {len(names)} tensors differ, "
                         f"first {names[0]}; copy both files of the same training")
    for name, p in ours.items():
        p.data.copy_(tensors[name])
