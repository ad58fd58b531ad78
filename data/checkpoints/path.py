"""A diffusion path on disk: its config, its trained tensors, and the base that it needs.

`L2DConfig` is the content of path.json, as ModelConfig is that of config.json. Read next:
diffusion.py, which builds the path.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from data.checkpoints.weights import check_finite, digest_of
from data.system.command import check_range, choices
from data.system.disk import open_safetensors, parse_json, read_json, write_json, write_safetensors

TIME_DISTRIBUTIONS = ("uniform", "cosmap")
# What the path computes before training: nothing, as in the paper; or what the frozen model does.
STARTS = ("paper", "frozen")
# Parts of the frozen start that an ablation may leave out.
PARTS = ("difference", "estimate")

LARGEST = 1 << 16          # a larger width is a mistake and would take all memory
# (low, high, kind) of check_range
RANGES = {
    **dict.fromkeys(("width", "cond_dim", "rank", "prediction_words"), (1, LARGEST, int)),
    "classes": (0, LARGEST, int),
    "sigma": (1e-6, 1e6),
    "alpha": (0, 1e6),
    "class_dropout": (0, 1),
    **dict.fromkeys(("self_conditioning", "own_kv", "self_kv"), (False, True, bool)),
}


@dataclass
class L2DConfig:
    """The path's shape and its noise. `sigma` None means σ² = 16·Z, the paper's 64 at Z = 256."""
    width: int = 256                      # Z
    cond_dim: int = 256                   # S, of the time embedding
    sigma: float | None = None
    rank: int | None = 32                 # of the LoRA on the path's matrices; None: full copies
    alpha: float = 32.0
    classes: int = 0                      # of guidance; 0: none
    class_names: list | None = None       # None: the classes have numbers only
    class_dropout: float = 0.2            # probability that training hides the class
    time_distribution: str = "uniform"    # of the training times, see data/parts/draws.py
    self_conditioning: bool = False       # the path reads its own previous prediction
    prediction_words: int | None = None   # the likeliest, of which it reads; None: of all
    own_kv: bool = False                  # the path has keys and values of its own
    self_kv: bool = False                 # and of its own place anew at every evaluation
    start: str = "paper"                  # one of STARTS
    without: str | None = None            # one of PARTS, for an ablation
    asked_again: list | None = None       # ids of the classes that profit from it, see L2D

    def __post_init__(self):
        choices(self.time_distribution, TIME_DISTRIBUTIONS, "time_distribution")
        choices(self.start, STARTS, "start")
        if self.without is not None:
            choices(self.without, PARTS if self.start == "frozen" else (), "without")
        for name, limits in RANGES.items():
            value = getattr(self, name)
            if value is not None or name not in ("sigma", "rank", "prediction_words"):
                check_range(name, value, *limits)
        for name in ("self_conditioning", "own_kv", "self_kv"):
            if getattr(self, name) and self.start != "frozen":
                raise ValueError(f"{name} with start = {self.start!r} is not supported; "
                                 "allowed: start = 'frozen'")
        if self.prediction_words and not self.self_conditioning:
            raise ValueError(f"prediction_words = {self.prediction_words} without "
                             "self_conditioning is not supported; allowed: None")
        if self.class_names is not None:
            check_class_names(self.class_names, self.classes)
        allowed = range(self.classes or 1)
        ids = [] if self.asked_again is None else self.asked_again
        if not isinstance(ids, list) or not all(one in allowed for one in ids):
            raise ValueError(f"asked_again {repr(ids)[:60]} is not supported; "
                             f"allowed: ids below {len(allowed)}")
        if self.sigma is None:
            self.sigma = 4 * math.sqrt(self.width)


def check_class_names(names, classes: int):
    """Raise ValueError unless `names` is a list of as many different names, none of them blank."""
    texts = isinstance(names, list) and all(isinstance(name, str) and name.strip()
                                            for name in names)
    if not texts or not len(set(names)) == len(names) == classes:
        raise ValueError(f"class names {repr(names)[:60]} are not supported; "
                         f"allowed: a list of {classes} different names")


def class_number(name: str, config) -> int:
    """The number of a class that --class gives by its name, or by number.

    config  of the path, or of a model without one
    Raises ValueError for any other name or number.
    """
    classes = getattr(config, "classes", 0)
    if not classes:
        raise ValueError(f"--class {name}: this model has no classes; allowed: no --class")
    names = config.class_names or []
    choices(name, dict.fromkeys([*names, *map(str, range(classes))]), "--class")
    # first as a name: the names themselves may be numbers
    return names.index(name) if name in names else int(name)


def save_path(ours: dict, config: L2DConfig, facts: dict, directory: Path):
    """Write path.safetensors, then path.json; ours: name -> trained tensor."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().cpu().contiguous() for name, p in ours.items()}
    # in both files, so that files of two different configs are noticed
    stated = {"config": json.dumps(asdict(config))}
    write_safetensors(tensors, directory / "path.safetensors", stated)
    # and files of two different trainings
    facts = {"digest": digest_of(tensors), **facts}
    write_json({"config": asdict(config), **facts}, directory / "path.json")


def base_facts(lm, sha256: str) -> dict:
    """The identity of a frozen model in path.json: its name, weights and settings."""
    return {"base": lm.directory, "base_sha256": sha256, "base_config": lm.config.numbers}


def read_path(directory: Path) -> dict:
    """path.json, its config as an L2DConfig. Raises ValueError for a file of another form.

    tokenizer and updates are None where it was not saved by train.py.
    """
    path = directory / "path.json"
    meta = {"tokenizer": None, "updates": None, **read_json(path)}
    # a base that was never on disk has no name
    kinds = {"config": dict, "base": (str, type(None)), "base_sha256": str, "base_config": dict,
             "digest": str, "tokenizer": (str, type(None)), "updates": (int, type(None))}
    try:
        for name, kind in kinds.items():
            if name not in meta or not isinstance(meta[name], kind):
                raise TypeError(f"it has no valid {name!r}")
        return {**meta, "config": L2DConfig(**meta["config"])}
    except (TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} was not written by this version ({error}); "
                         "train the path again with train.py") from None


def check_base(meta: dict, lm, directory: Path):
    """Raise ValueError unless the path was trained beside this model."""
    found = base_facts(lm, lm.fingerprint())
    known = f"the path in {directory} belongs to the base {meta['base']!r}"
    if found["base_sha256"] != meta["base_sha256"]:
        raise ValueError(
            f"{known} (sha256 {meta['base_sha256'][:12]}), not to {lm.directory!r} "
            f"(sha256 {found['base_sha256'][:12]}); "
            f"train one for this base with train.py --init_from={lm.directory}")
    # the same weights compute something else with another config.json
    ours, theirs = found["base_config"], meta["base_config"]
    changed = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    if changed:
        raise ValueError(f"{known}, whose config.json has changed since ({', '.join(changed)}); "
                         "restore the right one")


def check_tokenizer(meta: dict, tokenizer, directory: Path):
    """Raise ValueError unless the path was trained with this tokenizer."""
    if meta["tokenizer"] not in (None, tokenizer.fingerprint):
        raise ValueError(f"the path in {directory} was trained with another tokenizer than "
                         f"{meta['base']!r} now holds; restore the right one")


def check_trained(meta: dict, directory: Path):
    """Raise ValueError for a path without an update: its predictions would be noise."""
    if meta["updates"] == 0:
        raise ValueError(f"the path in {directory} was not trained yet (0 updates); "
                         f"go on with train.py --init_from=resume --out_dir={directory}")


def fill(ours: dict, meta: dict, directory: Path):
    """Copy path.safetensors into the tensors of a path.

    meta  of read_path
    Raises ValueError unless all fit, are finite, and are those of path.json.
    """
    path = directory / "path.safetensors"
    file = open_safetensors(path)
    shapes = {(name, tuple(file.get_slice(name).get_shape())) for name in file.keys()}
    wrong = {(name, tuple(p.shape)) for name, p in ours.items()} ^ shapes
    if wrong:
        names = sorted({name for name, _ in wrong})
        raise ValueError(f"{path} does not fit path.json: {len(names)} tensors differ, "
                         f"first {names[0]}; copy both files of the same training")
    tensors = {name: file.get_tensor(name) for name in ours}
    if meta["digest"] != digest_of(tensors):
        raise ValueError(f"{path} is damaged, or of another training than path.json; "
                         "copy both files of the same training")
    stated = parse_json((file.metadata() or {}).get("config", "null"), f"the metadata of {path}")
    # fields that are younger than the file have their default
    theirs = isinstance(stated, dict) and {**asdict(L2DConfig()), **stated}
    if theirs != asdict(meta["config"]):
        raise ValueError(f"{path} was trained with another config than path.json says; "
                         "copy both files of the same training")
    for name, p in ours.items():
        tensor = tensors[name]
        if not tensor.is_floating_point():
            raise ValueError(f"{name} in {path} is of type {tensor.dtype}; "
                             "copy both files of the same training")
        check_finite(name, tensor, path, "copy or download it again")
        p.data.copy_(tensor)
