"""The diffusion path beside a frozen language model, its training objective and its velocity field: all of L2D.

Time runs from noise (t = 0) to data (t = 1): x_0 ~ N(0, σ²I), x_1 = V_y the vector of the next token, x_t between them.
A language model trained with cross-entropy already answers at t = 0, where x_t says nothing. The path reads the frozen
model's keys and values, sees x_t, and adds to the last hidden state with a weight that is exactly zero at t = 0.
Equation numbers are those of "Large Language Models to Diffusion Finetuning" (ICML 2025). Read solvers.py before and
model.py after this file. Run alone it shows the loss by t of a freshly made path, which equals the frozen model's:

    python diffusion.py
"""

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file

from data.checkpoint import open_safetensors, read_json, write_json, write_safetensors
from model import LM, MLP, LoRA, choices

FREQUENCIES = 128          # of the time sinusoid, as the official code has it
IGNORE = -100              # target of a position that does not count in the loss
SCHEDULES = ("uniform", "cosmap")
ESTIMATES = ("argmax", "sample", "average")


@dataclass
class L2DConfig:
    """The path's shape and how its noise is drawn. `sigma` None means σ² = 16·Z, the paper's 64 at Z = 256."""
    width: int = 256                 # Z
    conditioning: int = 256          # S
    sigma: float | None = None
    rank: int | None = 32            # of the LoRA on the path's matrices; None: full trainable copies
    alpha: float = 32.0
    classes: int = 0                 # topics for guidance; 0: none
    class_dropout: float = 0.2       # how often training hides the class
    schedule: str = "uniform"        # of the training times, see `draw_times`

    def __post_init__(self):
        choices(self.schedule, SCHEDULES, "schedule")
        for name, value, least in (("width", self.width, 1), ("conditioning", self.conditioning, 1), ("classes", self.classes, 0),
                                   ("rank", 1 if self.rank is None else self.rank, 1)):
            if value < least:
                raise ValueError(f"{name} = {value} is out of range; allowed: {least} or more")
        self.sigma = 4 * math.sqrt(self.width) if self.sigma is None else self.sigma


def draw_times(shape, schedule: str, generator: torch.Generator | None) -> torch.Tensor:
    """Training times t in [0, 1): uniform, or "cosmap", which spends more of them near 1 (the paper's appendix)."""
    u = torch.rand(shape, generator=generator, device=generator.device if generator else None)
    # t = 1 − 1/(tan(πu/2) + 1)
    return u if schedule == "uniform" else 1 - 1 / (torch.tan(math.pi / 2 * u) + 1)


def two_layers(inside: int, middle: int, outside: int, bias: bool = True, zero: bool = False) -> nn.Sequential:
    """Linear, SiLU, Linear; `zero` starts the last layer at zero, so that nothing is added before training."""
    net = nn.Sequential(nn.Linear(inside, middle), nn.SiLU(), nn.Linear(middle, outside, bias=bias))
    if zero:
        for p in net[2].parameters():
            nn.init.zeros_(p)
    return net


def adapt(linear: nn.Linear | None, config: L2DConfig):
    """A trainable stand-in for a frozen matrix: the matrix plus LoRA, or a full copy."""
    if linear is None:
        return None
    if config.rank is not None:
        return LoRA(linear, config.rank, config.alpha)
    copy = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device=linear.weight.device)
    copy.load_state_dict(linear.state_dict())
    return copy


class PathBlock(nn.Module):
    """One layer of the diffusion path: its own queries and MLP, the frozen layer's norms, keys and values."""

    def __init__(self, block, hidden_size: int, config: L2DConfig):
        super().__init__()
        self.frozen = (block,)       # a tuple hides it from the module tree: the frozen model owns it
        self.q, self.o = adapt(block.q, config), adapt(block.o, config)
        mlp = block.mlp
        self.mlp = MLP(adapt(mlp.gate, config), adapt(mlp.up, config), adapt(mlp.down, config), mlp.act)
        self.modulation = two_layers(config.conditioning, config.conditioning, 6 * hidden_size, zero=True)

    def forward(self, h, modulation, attend):
        block = self.frozen[0]
        a1, s1, g1, a2, s2, g2 = modulation.chunk(6, dim=-1)
        # h ← h + g1·O(attention(Q((w + a1)·norm(h) + s1), frozen K, V))
        h = h + g1 * self.o(attend(self.q(block.norm_attn(h, a1, s1))))  # (..., C)
        # h ← h + g2·MLP((w + a2)·norm(h) + s2)
        return h + g2 * self.mlp(block.norm_mlp(h, a2, s2))              # (..., C)


class L2D(nn.Module):
    """A frozen language model `.lm` and a trainable diffusion path beside it."""

    def __init__(self, lm: LM, config: L2DConfig):
        super().__init__()
        self.lm, self.config = lm.requires_grad_(False).eval(), config
        c, z, s = lm.config.hidden_size, config.width, config.conditioning
        self.to_z = nn.Linear(c, z)                                     # W of Eq. 5; with a bias, as the official code
        self.from_z = two_layers(z, s, c)
        self.time = two_layers(2 * FREQUENCIES, s, s)
        self.class_embedding = nn.Embedding(config.classes + 1, s) if config.classes else None   # last row: no class
        self.blocks = nn.ModuleList(PathBlock(block, c, config) for block in lm.blocks)
        self.merge = two_layers(s, s, c, bias=False, zero=True)         # g of Eq. 6; a last bias would cancel in w_d
        self._vocabulary = None
        self.to(next(lm.parameters()).device)

    def train(self, mode: bool = True):
        super().train(mode)
        self.lm.eval()
        return self

    @cached_property
    def base_sha256(self) -> str:
        """Fingerprint of the frozen weights: they never change, so they are hashed once and not at every save."""
        return self.lm.fingerprint()

    def path_parameters(self) -> dict:
        """Name -> tensor of everything that is trained; the frozen model is not in it."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("lm.")}

    # --- diffusion vocabulary ---

    def vectors(self, ids):
        """Rows V_y of the diffusion vocabulary for token ids of any shape: (...) -> (..., Z) float32 of norm √Z."""
        e = self.lm.embed(ids).to(self.to_z.weight.dtype)
        # V_y = √Z · (W e_y) / ‖W e_y‖                                  (paper Eq. 5)
        return math.sqrt(self.config.width) * F.normalize(self.to_z(e), dim=-1)

    def vocabulary(self) -> torch.Tensor:
        """All of V, (V, Z) float32. Computed once per model while sampling (no gradient, weights unchanged)."""
        ids = torch.arange(self.lm.config.vocab_size, device=self.to_z.weight.device)
        if torch.is_grad_enabled():
            return self.vectors(ids)
        state = (self.to_z.weight._version, self.to_z.bias._version, self.to_z.weight.data_ptr())
        if self._vocabulary is None or self._vocabulary[0] != state:
            self._vocabulary = (state, self.vectors(ids))
        return self._vocabulary[1]

    # --- network ---

    def embed_time(self, t, class_ids=None):
        """e(t), (..., S): sinusoid of raw t, two layers, plus the class embedding. None: the null class."""
        # sinusoid(t) = [cos(ω_i t), sin(ω_i t)], ω_i = 10000^(−i/128)
        omega = 10000 ** (-torch.arange(FREQUENCIES, device=t.device) / FREQUENCIES)
        angles = t[..., None].float() * omega
        e = self.time(torch.cat((angles.cos(), angles.sin()), dim=-1))
        if self.class_embedding is None:
            return e
        null = torch.full_like(t, self.config.classes, dtype=torch.long)
        return e + self.class_embedding(null if class_ids is None else class_ids.expand_as(null))

    def modulate(self, t, class_ids=None):
        """All that depends on t (and class) alone: L tensors (..., 6·C) and the merge weight w_d (..., C)."""
        e, e0 = self.embed_time(t, class_ids), self.embed_time(torch.zeros_like(t), class_ids)
        # w_d(t) = g(e(t)) − g(e(0))                                    (paper Eq. 6)
        w_d = self.merge(e) - self.merge(e0)
        w_d = w_d * (t > 0)[..., None]    # zero at t = 0 to the bit, however the device orders its sums
        with self.autocast():             # the time itself and the difference above need float32, these large layers do not
            return [block.modulation(e) for block in self.blocks], w_d

    def path(self, x_t, t, modulations, positions, attend):
        """The diffusion path's hidden state (..., C). attend(layer, q) looks at the frozen keys and values."""
        t, sigma = t[..., None], self.config.sigma
        # u = x_t / √((1−t)²σ² + t²): unit variance at every t
        u = x_t.float() / ((1 - t) ** 2 * sigma ** 2 + t ** 2).sqrt()   # (..., Z)
        h = self.from_z(u) + self.lm.position_rows(positions)           # (..., C)
        for layer, (block, modulation) in enumerate(zip(self.blocks, modulations)):
            h = block(h, modulation, lambda q: attend(layer, q))
        return h

    def merged(self, hidden, h, w_d):
        # logits = head(norm_f(h_LM + w_d(t)·h))                        (paper Eq. 6; the caller applies norm_f and head)
        return hidden + (w_d * h).to(hidden.dtype)                      # (..., C)

    def autocast(self):
        """bfloat16 arithmetic for the path where the frozen model is bfloat16; its own weights stay float32."""
        weight = self.lm.embed.weight
        return torch.autocast(weight.device.type, torch.bfloat16, enabled=weight.dtype == torch.bfloat16)

    def denoise(self, context, x_t, t, modulated):
        """Logits (B, T, V) at states x_t (B, T, Z) of the context's current tokens; t broadcasts to (B, T)."""
        modulations, w_d = modulated
        with self.autocast():
            h = self.path(x_t, t, modulations, context.positions, context.attend)
        return self.lm.logits(self.merged(context.hidden, h, w_d))

    def forward(self, ids, x_t, t, class_ids=None):
        """Logits (B, T, V) = f(x_t, t, c) at every position.

        ids (B, T) tokens so far, x_t (B, T, Z) noisy vector of the *next* token of each position, t (B, T) in [0, 1],
        class_ids (B,) or (B, T) in [0, classes], None for the null class. Raises ValueError for other shapes.
        """
        expected = (*ids.shape, self.config.width)
        if x_t.shape != expected or t.shape != ids.shape:
            raise ValueError(f"x_t has shape {tuple(x_t.shape)} and t {tuple(t.shape)}; allowed: {expected} and {expected[:2]}")
        return self.denoise(self.lm.context(ids), x_t, t, self.modulate(t, self.spread(class_ids, ids)))

    def spread(self, class_ids, ids):
        """class_ids (B,) or (B, T) -> (B, T); None stays None."""
        if class_ids is None:
            return None
        self.check_classes(class_ids)
        return class_ids[:, None].expand_as(ids) if class_ids.dim() == 1 else class_ids

    def check_classes(self, class_ids):
        """Raise ValueError for classes that the path was not made with."""
        some = class_ids.flatten().tolist()[:4]
        if not self.config.classes:
            raise ValueError(f"class ids {some} were given, but this path has no classes; allowed: None")
        if class_ids.min() < 0 or class_ids.max() > self.config.classes:
            raise ValueError(f"class ids {some} are out of range; allowed: 0 to {self.config.classes}")

    # --- objective ---

    def loss(self, ids, targets, class_ids=None, generator=None, t=None, noise=None, segments=None):
        """Mean cross-entropy over the positions that count (paper Eq. 3); see `token_losses`."""
        return self.token_losses(ids, targets, class_ids, generator, t, noise, segments)[0].mean()

    def token_losses(self, ids, targets, class_ids=None, generator=None, t=None, noise=None, segments=None):
        """L = −log f(x_t, t, c)_y for every target y that counts: (losses (N,), times (N,)), N such positions.

        ids, targets (B, T), targets[b, k] the token after ids[b, k] or IGNORE; t (B, T) in [0, 1] and noise (B, T, Z) of unit
        variance are drawn independently for every position from `generator` where not given. segments as in Context.
        """
        # 1. Which positions count: only there is the path evaluated, the frozen model everywhere.
        where = (targets != IGNORE).nonzero(as_tuple=True)              # two tensors (N,)
        y = targets[where]
        # 2. Time and noise, one draw per position, so that one pass teaches N noise levels.
        device = generator.device if generator else None
        t = draw_times(ids.shape, self.config.schedule, generator) if t is None else t
        noise = torch.randn(*ids.shape, self.config.width, generator=generator, device=device) if noise is None else noise
        t, noise = (value.to(ids.device)[where] for value in (t, noise))
        class_ids = self.hide_classes(self.spread(class_ids, ids), generator)
        # 3. The frozen model reads the text once, without gradient.
        with torch.no_grad():
            context = self.lm.context(ids, segments)
        # 4. Noisy vector of the right token; the gradient also goes through V_y.
        # x_t = t·x_1 + (1−t)·x_0,  x_1 = V_y,  x_0 = σ·noise
        x_t = t[:, None] * self.vectors(y) + (1 - t[:, None]) * self.config.sigma * noise
        # 5. The path guesses the token, and the guess is scored like any language model's.
        modulations, w_d = self.modulate(t, None if class_ids is None else class_ids[where])
        with self.autocast():
            h = self.path(x_t, t, modulations, context.positions[where], attend_at(context, where))
        return self.lm.losses(self.merged(context.hidden[where], h, w_d), y), t

    def hide_classes(self, class_ids, generator):
        """Replace some classes by the null class, position by position as the official code does (training only)."""
        if class_ids is None or not self.training:
            return class_ids
        hidden = torch.rand(class_ids.shape, generator=generator, device=generator.device if generator else None)
        return class_ids.masked_fill((hidden < self.config.class_dropout).to(class_ids.device), self.config.classes)

    # --- on disk ---

    def save(self, directory: str | Path):
        """Write path.safetensors (the trained tensors alone) and path.json (config, name and fingerprint of the base)."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {name: p.detach().cpu().contiguous() for name, p in self.path_parameters().items()}
        write_safetensors(tensors, directory / "path.safetensors")
        meta = {"config": asdict(self.config), "base": self.lm.directory, "base_sha256": self.base_sha256}
        write_json(meta, directory / "path.json")

    @classmethod
    def load(cls, directory: str | Path, lm: LM | None = None, dtype: torch.dtype | None = None,
             device: str | None = None) -> "L2D":
        """Read a path; without `lm`, load the base that it names. Raises ValueError for another base or a damaged file."""
        directory = Path(directory)
        meta = read_path_json(directory)
        lm = LM.from_pretrained(meta["base"], dtype, device) if lm is None else lm
        ours = lm.fingerprint()
        if ours != meta["base_sha256"]:
            raise ValueError(f"the path in {directory} belongs to the base {meta['base']!r} (sha256 {meta['base_sha256'][:12]}), "
                             f"not to {lm.directory!r} (sha256 {ours[:12]}); "
                             f"train one for this base with train.py --init_from={lm.directory}")
        model = cls(lm, meta["config"])
        open_safetensors(directory / "path.safetensors")                # says in one line what is wrong with the file
        tensors, ours = load_file(directory / "path.safetensors"), model.path_parameters()
        shapes = lambda tensors: {(name, tensor.shape) for name, tensor in tensors.items()}
        if wrong := sorted({name for name, _ in shapes(ours) ^ shapes(tensors)}):
            raise ValueError(f"{directory / 'path.safetensors'} does not fit path.json: {len(wrong)} tensors differ, "
                             f"first {wrong[0]}; copy both files of the same training")
        with torch.no_grad():
            for name, p in ours.items():
                p.copy_(tensors[name])
        return model.eval()


def read_path_json(directory: Path) -> dict:
    """path.json, its config as an L2DConfig. Raises ValueError with one line where something is missing or unknown."""
    meta = read_json(directory / "path.json")
    try:
        return {"base": meta["base"], "base_sha256": meta["base_sha256"], "config": L2DConfig(**meta["config"])}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{directory / 'path.json'} was not written by this version ({error}); "
                         "train the path again with train.py") from None


def attend_at(context, where):
    """Attention for queries (N, H·D) of the positions `where` only: put them in their places, look, take them out."""
    def attend(layer, q):
        places = q.new_zeros(*context.positions.shape, q.shape[-1])
        return context.attend(layer, places.index_put(where, q))[where]
    return attend


class Flow:
    """The velocity field of Algorithm 1 for the current tokens of a batch: what `odeint` integrates.

    estimate     "argmax", "sample" or "average": how logits become the clean point x̂
    temperature  of that estimate, > 0, or "1-t"; argmax does not use it
    class_ids    (B,) or None; guidance w: 1 is conditional, 0 unconditional, above 1 pushes towards the class
    generators   one torch.Generator per sequence, for "sample"
    """

    def __init__(self, l2d: L2D, context, estimate="argmax", temperature=1.0, class_ids=None, guidance=1.0, generators=None):
        self.l2d, self.context, self.generators, self.temperature = l2d, context, generators, temperature
        self.estimate, self.tables = choices(estimate, ESTIMATES, "estimate"), {}
        self.weights = [(guidance, class_ids), (1 - guidance, None)] if class_ids is not None else [(1.0, None)]
        self.weights = [(weight, ids) for weight, ids in self.weights if weight != 0]
        self.parts, self.part_rows = context, None
        self.watch = None            # a list to keep sequence 0's (conditional) guesses in

    @property
    def cost(self) -> int:
        """Network evaluations per call: two with guidance, else one."""
        return len(self.weights)

    def set_context(self, context, class_ids, generators):
        """Go on with the next token (and perhaps fewer sequences); what depends on t alone is kept."""
        self.context, self.generators, self.part_rows = context, generators, None
        if class_ids is not None:
            self.weights = [(weight, ids if ids is None else class_ids) for weight, ids in self.weights]

    def modulated(self, t, class_ids):
        """Modulation at t: looked up where t is a float shared by the batch, computed where each sequence has its own."""
        device = self.context.hidden.device
        classes = self.l2d.config.classes
        if torch.is_tensor(t):
            t = t.float()[:, None]                                      # (n, 1)
            return self.l2d.modulate(t, None if class_ids is None else class_ids[:, None])
        if t not in self.tables:                                        # one row per class, the null class last
            every = torch.arange(classes + 1, device=device)
            self.tables[t] = self.l2d.modulate(torch.full((classes + 1,), t, device=device), every if classes else None)
        modulations, w_d = self.tables[t]
        rows = torch.tensor([classes], device=device) if class_ids is None else class_ids
        return [m[rows][:, None] for m in modulations], w_d[rows][:, None]

    def guesses(self, t, x, rows):
        """Yield (weight, logits (n, T, V)) for the conditional and the unconditional network, as far as needed."""
        if rows is not self.part_rows:      # keys and values are copied only when other sequences are asked for
            whole = len(rows) == len(self.context.hidden)
            self.parts, self.part_rows = self.context if whole else self.context.rows(rows), rows
        time = t.float()[:, None] if torch.is_tensor(t) else torch.full((1, 1), t, device=x.device)
        for part, (weight, class_ids) in enumerate(self.weights):
            modulated = self.modulated(t, None if class_ids is None else class_ids[rows])
            logits = self.l2d.denoise(self.parts, x, time, modulated).float()
            if self.watch is not None and rows[0] == 0 and part == 0:
                p, token = logits[0, 0].softmax(-1).max(-1)
                self.watch.append((float(t[0] if torch.is_tensor(t) else t), int(token), float(p)))
            yield weight, logits

    def __call__(self, t, x, rows):
        """dx/dt (n, T, Z) at x (n, T, Z) of the sequences `rows`; t a float or a tensor (n,), below 1."""
        shape = [-1] + [1] * (x.dim() - 1)
        remaining = 1 - (t.view(shape) if torch.is_tensor(t) else t)
        # dx/dt = (x̂ − x_t)/(1 − t)                                     (paper Eq. 4)
        # with guidance: w·(conditional) + (1−w)·(unconditional)        (paper Eq. 7, as the official code has it)
        return sum(weight * (self.clean_point(logits, t, rows) - x) / remaining for weight, logits in self.guesses(t, x, rows))

    def clean_point(self, logits, t, rows):
        """x̂ (n, T, Z) from logits (n, T, V)."""
        V = self.l2d.vocabulary()
        if self.estimate == "argmax":
            return V[logits.argmax(-1)]
        temperature = self.temperature if self.temperature != "1-t" else (1 - t).view(-1, 1, 1) if torch.is_tensor(t) else 1 - t
        p = (logits / temperature).softmax(-1)
        if self.estimate == "average":
            return p @ V                                                # Σ_y p_y·V_y
        return V[draw(p, [self.generators[row] for row in rows.tolist()])]

    def logits(self, x, t: float = 1.0):
        """Logits (B, T, V) from which the token is chosen, guided like the velocity."""
        rows = torch.arange(len(x), device=x.device)
        return sum(weight * logits for weight, logits in self.guesses(t, x, rows))


def draw(p, generators):
    """One sample per position of p (n, T, V), each sequence from its own generator, so that no one's draw moves another's."""
    u = torch.stack([torch.rand(p.shape[1], 1, generator=g, device=g.device) for g in generators]).to(p.device)
    cdf = p.cumsum(-1)
    return torch.searchsorted(cdf, u * cdf[..., -1:]).squeeze(-1).clamp_max(p.shape[-1] - 1)


def main():
    """The first claim of the method on the embedded model: a fresh path changes nothing, at any t."""
    lm = LM.from_pretrained("tiny")
    l2d = L2D(lm, L2DConfig(width=64, conditioning=128)).eval()
    ids = torch.randint(lm.config.vocab_size, (4, 33), generator=torch.Generator().manual_seed(0), device=l2d.to_z.weight.device)
    frozen = F.cross_entropy(lm(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())
    for tenth in range(10):
        t = torch.full((4, 32), tenth / 10)
        loss = l2d.loss(ids[:, :-1], ids[:, 1:], t=t)
        print(f"t = {tenth / 10:.1f}  frozen {float(frozen):.6f}  with the path {float(loss):.6f}")


if __name__ == "__main__":
    main()
