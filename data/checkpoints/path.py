"""What a directory says of a diffusion path: its config, its trained tensors, the base it needs.

`L2DConfig` is what path.json holds, as ModelConfig is what config.json holds. diffusion.py makes
the path of it; read that next.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from data.checkpoints.families import choices
from data.checkpoints.weights import check_finite
from data.system.disk import open_safetensors, parse_json, read_json, write_json, write_safetensors

TIME_DISTRIBUTIONS = ("uniform", "cosmap")
# What earlier versions called things: fields of path.json, and the beginnings of tensors' names.
OLD_FIELDS = {"conditioning": "cond_dim", "schedule": "time_distribution", "own_reading": "own_kv"}
OLD_TENSORS = {"merge": "time_gate", "from_guess": "from_prediction"}

LARGEST = 1 << 16          # of a width: more would be a mistake, and take all memory
RANGES = {
    "width": (int, 1, LARGEST),
    "cond_dim": (int, 1, LARGEST),
    "rank": (int, 1, LARGEST),
    "classes": (int, 0, LARGEST),
    "sigma": ((int, float), 1e-6, 1e6),
    "alpha": ((int, float), 0, 1e6),
    "class_dropout": ((int, float), 0, 1),
    "self_conditioning": (bool, False, True),
    "own_kv": (bool, False, True),
}


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
    time_distribution: str = "uniform"    # of the training times, see data/parts/draws.py
    self_conditioning: bool = False       # the path reads its own previous prediction
    own_kv: bool = False             # the path has keys and values of its own

    def __post_init__(self):
        choices(self.time_distribution, TIME_DISTRIBUTIONS, "time_distribution")
        for name, (types, low, high) in RANGES.items():
            value = getattr(self, name)
            # what a file says may be of any type; to Python True is a number
            right = isinstance(value, types) and isinstance(value, bool) == (types is bool)
            if value is None and name in ("sigma", "rank"):
                continue
            if not right or not low <= value <= high:
                raise ValueError(f"{name} = {str(value)[:60]} is out of range; allowed: "
                                 f"{low} to {high}")
        if self.sigma is None:
            self.sigma = 4 * math.sqrt(self.width)


def save_path(ours: dict, config: L2DConfig, facts: dict, directory: Path):
    """Write path.safetensors, then path.json; ours: name -> trained tensor."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().cpu().contiguous() for name, p in ours.items()}
    # in both files, so that two of different trainings are noticed
    stated = {"config": json.dumps(asdict(config))}
    write_safetensors(tensors, directory / "path.safetensors", stated)
    write_json({"config": asdict(config), **facts}, directory / "path.json")


def base_facts(lm, sha256: str) -> dict:
    """What path.json keeps of a frozen model, to know it again: name, weights and numbers."""
    return {"base": lm.directory, "base_sha256": sha256, "base_config": lm.config.numbers}


def read_path(directory: Path) -> dict:
    """path.json: config as an L2DConfig, the facts of the base, and of its tokenizer.

    base_config and tokenizer are None in the first ones. Raises ValueError where it was not written
    by us.
    """
    path = directory / "path.json"
    meta = read_json(path)
    # a base that was never on disk has no name
    for name, kind in (("config", dict), ("base", (str, type(None))), ("base_sha256", str)):
        if name not in meta or not isinstance(meta[name], kind):
            raise ValueError(f"{path} was not written by this version: it has no {name!r}; "
                             "train the path again with train.py")
    try:
        config = L2DConfig(**renamed(meta["config"]))
    except (TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} was not written by this version ({error}); "
                         "train the path again with train.py") from None
    later = {"base_config": None, "tokenizer": None, "updates": None}
    for name, kind in (("base_config", dict), ("tokenizer", str), ("updates", int)):
        if not isinstance(meta.get(name), (kind, type(None))):
            raise ValueError(f"{path}: {name!r} is not valid; train the path again with train.py")
    return {**later, **meta, "config": config}


def renamed(config: dict) -> dict:
    """The fields of a config under the names that they have today."""
    return {OLD_FIELDS.get(name, name): value for name, value in config.items()}


def check_base(meta: dict, lm, directory: Path):
    """Raise ValueError unless the path was trained beside this very model."""
    found = base_facts(lm, lm.fingerprint())
    known = f"the path in {directory} belongs to the base {meta['base']!r}"
    if found["base_sha256"] != meta["base_sha256"]:
        raise ValueError(
            f"{known} (sha256 {meta['base_sha256'][:12]}), not to {lm.directory!r} "
            f"(sha256 {found['base_sha256'][:12]}); "
            f"train one for this base with train.py --init_from={lm.directory}")
    # the same weights compute something else where config.json says so
    wanted = meta["base_config"] or found["base_config"]
    changed = [name for name in found["base_config"] | wanted
               if found["base_config"].get(name) != wanted.get(name)]
    if changed:
        raise ValueError(f"{known}, whose config.json has changed since ({', '.join(changed)}); "
                         "put the right one back")


def check_tokenizer(meta: dict, tokenizer, directory: Path):
    """Raise ValueError unless the path was trained on the ids of this tokenizer."""
    if meta["tokenizer"] not in (None, tokenizer.fingerprint):
        raise ValueError(f"the path in {directory} was trained with another tokenizer than "
                         f"{meta['base']!r} now holds; put the right one back")


def check_trained(meta: dict, directory: Path):
    """Raise ValueError for a path that no update has changed: its guesses would be noise."""
    if meta["updates"] == 0:
        raise ValueError(f"the path in {directory} was not trained yet (0 updates); "
                         f"go on with train.py --init_from=resume --out_dir={directory}")


def fill(ours: dict, path: Path, config: L2DConfig):
    """Copy a file into the tensors of a path. Raises ValueError unless all fit and are finite."""
    file = open_safetensors(path)      # says in one line what is wrong with the file
    # name today -> name in the file
    theirs = {}
    for name in file.keys():
        module, _, rest = name.partition(".")
        theirs[f"{OLD_TENSORS.get(module, module)}.{rest}"] = name
    shapes = {(name, tuple(file.get_slice(theirs[name]).get_shape())) for name in theirs}
    wrong = {(name, tuple(p.shape)) for name, p in ours.items()} ^ shapes
    if wrong:
        names = sorted({name for name, _ in wrong})
        raise ValueError(f"{path} does not fit path.json: {len(names)} tensors differ, "
                         f"first {names[0]}; copy both files of the same training")
    # older files do not repeat it
    stated = parse_json((file.metadata() or {}).get("config", "null"), f"the metadata of {path}")
    if stated is not None and renamed(stated) != asdict(config):
        raise ValueError(f"{path} was trained with another config than path.json says; "
                         "copy both files of the same training")
    for name, p in ours.items():
        tensor = file.get_tensor(theirs[name])
        if not tensor.is_floating_point():
            raise ValueError(f"{name} in {path} is of type {tensor.dtype}; "
                             "copy both files of the same training")
        check_finite(name, tensor, path)
        p.data.copy_(tensor)
