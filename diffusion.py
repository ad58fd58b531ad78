"""The diffusion path beside a frozen language model, its objective, its velocity: all of L2D.

Time runs from noise (t = 0) to data (t = 1): x_0 ~ N(0, σ²I), x_1 = V_y the vector of the next
token, x_t between them. A language model trained with cross-entropy already answers at t = 0, where
x_t says nothing. The path reads the frozen model's keys and values, sees x_t, and adds to the last
hidden state with a weight that is exactly zero at t = 0.

    1 the path        Eq. 5 and 6
    2 the objective   Eq. 3
    3 the velocity    Eq. 4 and 7

Equation numbers are those of "Large Language Models to Diffusion Finetuning" (ICML 2025). Read
solvers.py before and model.py after this file. Run alone it lets noise flow to tokens:

    python diffusion.py
"""

import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.batches import IGNORE, collate
from data.draws import draw_times, draw_tokens
from data.families import choices
from data.figures import draw_points
from data.hub import resolve
from data.path import L2DConfig, check_base, fill, read_path, save_path
from data.tiny.oracle import LINE, Oracle
from data.tiny.topics import Problems
from data.tokenizer import load_tokenizer
from model import LM, LoRA, PathBlock, Reading, two_layers
from solvers import odeint

FREQUENCIES = 128          # of the time sinusoid, as the official code has it
TABLE = 128                # times whose modulation is kept; the paper's longest run has 127
ESTIMATES = ("argmax", "sample", "average")


# --- 1 the path -----------------------------------------------------------------------------------

class Modulation(NamedTuple):
    """All that depends on the time (and class) alone."""
    blocks: list            # L tensors (..., 6·C): two scales, shifts and gates for every layer
    w_d: torch.Tensor       # (..., C) how much of the path enters the last hidden state


class L2D(nn.Module):
    """A frozen language model `.lm` and a trainable diffusion path beside it."""

    def __init__(self, lm: LM, config: L2DConfig):
        super().__init__()
        self.lm = lm.requires_grad_(False).eval()
        self.config = config
        c, z, s = lm.config.hidden_size, config.width, config.cond_dim
        self.to_z = nn.Linear(c, z)          # W of Eq. 5; with a bias, as the official code
        self.from_z = two_layers(z, s, c)
        self.time = two_layers(2 * FREQUENCIES, s, s)
        self.class_embedding = None
        if config.classes:
            self.class_embedding = nn.Embedding(config.classes + 1, s)     # last row: no class
        self.blocks = nn.ModuleList()
        for block in lm.blocks:
            self.blocks.append(PathBlock(block, config.rank, config.alpha, s))
        # g of Eq. 6; it has no last bias, which would cancel in w_d
        self.merge = two_layers(s, s, c, bias=False, zero=True)
        self.to(next(lm.parameters()).device)
        self.forget()

    def train(self, mode: bool = True):
        """Path to training or evaluation; the frozen model is always evaluated.

        Call it whenever weights have changed: what sampling keeps is made again from the new ones.
        """
        super().train(mode)
        self.lm.eval()
        self.forget()
        return self

    def forget(self):
        """Drop what was kept while sampling: V, the modulation of every time, folded matrices."""
        self.kept_vocabulary = None
        self.kept_modulation = {}
        self.fold_lora(False)

    def fold_lora(self, on: bool = True):
        """Add every LoRA into a copy of its matrix: fewer products to sample, more memory."""
        for module in self.blocks.modules():
            if isinstance(module, LoRA):
                module.fold(on)

    def path_parameters(self) -> dict:
        """Name -> tensor of everything that is trained; the frozen model is not in it."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    @cached_property
    def base_sha256(self) -> str:
        """Fingerprint of the frozen weights, hashed once: they never change."""
        return self.lm.fingerprint()

    def autocast(self):
        """bfloat16 arithmetic for the path where the frozen model is bfloat16.

        The path's own weights stay float32, or small updates would be lost.
        """
        weight = self.lm.embed.weight
        half = weight.dtype == torch.bfloat16
        return torch.autocast(weight.device.type, torch.bfloat16, enabled=half)

    # --- the diffusion vocabulary ---

    def vectors(self, ids):
        """Rows V_y of the diffusion vocabulary: ids (...) -> (..., Z) float32 of norm √Z."""
        e = self.lm.embed(ids).to(self.to_z.weight.dtype)
        # V_y = √Z · (W e_y) / ‖W e_y‖                                  (paper Eq. 5)
        return math.sqrt(self.config.width) * F.normalize(self.to_z(e), dim=-1)

    def vocabulary(self) -> torch.Tensor:
        """All of V, (V, Z) float32. Made once while sampling."""
        if self.kept_vocabulary is None:
            ids = torch.arange(self.lm.config.vocab_size, device=self.to_z.weight.device)
            with torch.no_grad():
                self.kept_vocabulary = self.vectors(ids)
        return self.kept_vocabulary

    # --- what depends on the time alone ---

    def embed_time(self, t, class_ids=None):
        """e(t), (..., S): a sinusoid of t, two layers, plus the class embedding (None: none)."""
        # sinusoid(t) = [cos(ω_i t), sin(ω_i t)],  ω_i = 10000^(−i/128)
        i = torch.arange(FREQUENCIES, device=t.device)
        omega = 10000 ** (-i / FREQUENCIES)
        angles = t[..., None].float() * omega                           # (..., 128)
        e = self.time(torch.cat((angles.cos(), angles.sin()), dim=-1))
        if self.class_embedding is None:
            return e
        if class_ids is None:
            class_ids = torch.full_like(t, self.config.classes, dtype=torch.long)
        return e + self.class_embedding(class_ids)

    def modulation(self, t, class_ids=None) -> Modulation:
        """What times t (...) and classes (...) do to the path."""
        e = self.embed_time(t, class_ids)
        e_0 = self.embed_time(torch.zeros_like(t), class_ids)
        # w_d(t) = g(e(t)) − g(e(0))                                    (paper Eq. 6)
        w_d = self.merge(e) - self.merge(e_0)
        # zero at t = 0 to the bit, however the device orders its sums
        w_d = w_d * (t > 0)[..., None]
        # the time itself and the difference above need float32, these large layers do not
        with self.autocast():
            return Modulation([block.modulation(e) for block in self.blocks], w_d)

    def modulation_at(self, t, class_ids) -> Modulation:
        """The same while sampling, where times return: t float or (n,), class_ids (n,) or None."""
        if class_ids is None:
            class_ids = torch.tensor([self.config.classes], device=self.to_z.weight.device)
        if torch.is_tensor(t):
            # every sequence is at a time of its own
            tables = [self.modulation_table(time) for time in t.tolist()]
            classes = class_ids.expand(len(tables)).tolist()
            blocks = torch.stack([table[0][c] for table, c in zip(tables, classes)])
            w_d = torch.stack([table[1][c] for table, c in zip(tables, classes)])
        else:
            table = self.modulation_table(t)
            blocks = table[0][class_ids]                                # (n, L, 6·C)
            w_d = table[1][class_ids]                                   # (n, C)
        return Modulation(blocks[:, None].unbind(2), w_d[:, None])

    def modulation_table(self, time: float):
        """Of one time, for each of K classes and none: (K + 1, L, 6·C) and (K + 1, C)."""
        kept = self.kept_modulation
        if time not in kept:
            classes = torch.arange(self.config.classes + 1, device=self.to_z.weight.device)
            times = torch.full_like(classes, time, dtype=torch.float32)
            made = self.modulation(times, classes)
            if len(kept) >= TABLE:
                oldest = next(iter(kept))
                del kept[oldest]
            kept[time] = torch.stack(made.blocks, dim=1), made.w_d
        return kept[time]

    # --- the network ---

    def denoise(self, x_t, t, modulation, reading, where=None):
        """Hidden state (..., C) from which norm and head make the guess f(x_t, t, c): path, merge.

        x_t (..., Z), t (...) and modulation for every token of the reading, or for those `where`.
        """
        hidden, positions = reading.hidden, reading.positions
        if where is not None:
            hidden = hidden[where]
            positions = positions.expand(reading.hidden.shape[:2])[where]
        # u = x_t / √((1−t)²σ² + t²): unit variance at every t
        variance = (1 - t) ** 2 * self.config.sigma ** 2 + t ** 2
        u = x_t.float() / variance.sqrt()[..., None]                    # (..., Z)
        with self.autocast():
            h = self.from_z(u)                                          # (..., C)
            if self.lm.embed_positions is not None:
                h = h + self.lm.position_embedding(positions)
            layers = zip(self.blocks, modulation.blocks, self.lm.blocks)
            for layer, (block, m, frozen) in enumerate(layers):
                h = block(h, m, frozen, reading, layer, where)
        # h_LM + w_d(t)·h                                               (paper Eq. 6)
        return hidden + (modulation.w_d * h).to(hidden.dtype)

    def forward(self, ids, x_t, t, class_ids=None):
        """Logits (B, T, V) = f(x_t, t, c) at every position.

        ids (B, T) tokens so far, x_t (B, T, Z) noisy vector of the *next* token of each position,
        t (B, T) in [0, 1], class_ids (B,) or (B, T) in [0, classes], None for no class.
        Raises ValueError for other shapes.
        """
        expected = (*ids.shape, self.config.width)
        if x_t.shape != expected or t.shape != ids.shape:
            raise ValueError(f"x_t has shape {tuple(x_t.shape)} and t {tuple(t.shape)}; "
                             f"allowed: {expected} and {expected[:2]}")
        modulation = self.modulation(t, self.spread_classes(class_ids, ids))
        reading = self.lm.read(ids)
        return self.lm.logits(self.denoise(x_t, t, modulation, reading))

    def guess(self, x_t, t, class_ids, reading):
        """The same while sampling: logits (n, T, V) float32 after a reading; t a float or (n,)."""
        modulation = self.modulation_at(t, class_ids)
        time = torch.as_tensor(t, dtype=torch.float32, device=x_t.device).view(-1, 1)
        hidden = self.denoise(x_t, time, modulation, reading)
        return self.lm.logits(hidden).float()

    def spread_classes(self, class_ids, ids):
        """class_ids (B,) or (B, T) -> (B, T); None stays None. Raises ValueError for unknown."""
        if class_ids is None:
            return None
        self.check_classes(class_ids)
        return class_ids.view(len(ids), -1).expand_as(ids)

    def check_classes(self, class_ids):
        """Raise ValueError for classes that the path was not made with."""
        some = class_ids.flatten().tolist()[:4]
        if not self.config.classes:
            raise ValueError(f"class ids {some} were given, but this path has no classes; "
                             "allowed: None")
        if class_ids.min() < 0 or class_ids.max() > self.config.classes:
            raise ValueError(f"class ids {some} are out of range; "
                             f"allowed: 0 to {self.config.classes}")

    # --- 2 the objective ---

    def loss(self, *args, **options):
        """Mean of the token losses, a scalar; arguments as of `token_losses`."""
        return self.token_losses(*args, **options)[0].mean()

    def token_losses(self, ids, targets, class_ids=None, documents=None, generator=None,
                     t=None, noise=None):
        """(losses (N,), times (N,)) of the N positions that count.

        ids, targets  (B, T); targets[b, k] is the token after ids[b, k], or IGNORE
        class_ids     (B,) or (B, T) or None; documents (B, T) as in LM.read
        t, noise      (B, T) in [0, 1], (B, T, Z) of unit variance; drawn from `generator` if None
        """
        # 1. Which positions count: only there is the path evaluated, the frozen model everywhere.
        where = (targets != IGNORE).nonzero(as_tuple=True)              # two tensors (N,)
        y = targets[where]                                              # (N,)
        # 2. A time and a noise of its own for each, so that one pass teaches N noise levels.
        if t is None:
            t = draw_times(ids.shape, self.config.time_distribution, generator)
        if noise is None:
            shape = (*ids.shape, self.config.width)
            noise = torch.randn(shape, generator=generator, device=generator.device)
        t = t.to(ids.device)[where]                                     # (N,)
        noise = noise.to(ids.device)[where]                             # (N, Z)
        # 3. Some classes are hidden, or guidance would have nothing to compare with.
        class_ids = self.spread_classes(class_ids, ids)
        if class_ids is not None:
            class_ids = self.drop_classes(class_ids, generator)[where]
        # 4. The frozen model reads the text once, without gradient.
        with torch.no_grad():
            reading = self.lm.read(ids, documents)
        # 5. The noisy vector of the right token; the gradient also goes through V_y.
        x_0 = self.config.sigma * noise
        x_1 = self.vectors(y)
        # x_t = t·x_1 + (1−t)·x_0
        x_t = t[:, None] * x_1 + (1 - t[:, None]) * x_0                 # (N, Z)
        # 6. The path guesses the token, and is scored like any language model.
        modulation = self.modulation(t, class_ids)
        guess = self.denoise(x_t, t, modulation, reading, where)        # (N, C)
        # L = −log f(x_t, t, c)_y                                       (paper Eq. 3)
        return -self.lm.log_p(guess, y), t

    def drop_classes(self, class_ids, generator):
        """Class dropout: position by position, as in the official code, and only in training."""
        if not self.training:
            return class_ids
        u = torch.rand(class_ids.shape, generator=generator, device=generator.device)
        hidden = u < self.config.class_dropout
        return class_ids.masked_fill(hidden.to(class_ids.device), self.config.classes)

    # --- on disk ---

    def save(self, directory: str | Path):
        """Write path.safetensors, the trained tensors alone, and path.json: config and base."""
        meta = {"config": asdict(self.config), "base": self.lm.directory,
                "base_sha256": self.base_sha256}
        save_path(self.path_parameters(), meta, Path(directory))

    @classmethod
    def load(cls, directory: str | Path, lm: LM | None = None, dtype: torch.dtype | None = None,
             device: str | None = None) -> "L2D":
        """Read a path, and its base too unless `lm` is given.

        Raises ValueError for another base than the path was trained beside, or a damaged file.
        """
        directory = Path(directory)
        meta = read_path(directory)
        if lm is None:
            lm = LM.from_pretrained(meta["base"], dtype, device)
        check_base(meta, lm.fingerprint(), lm.directory, directory)
        model = cls(lm, meta["config"])
        fill(model.path_parameters(), directory / "path.safetensors")
        return model.eval()


# --- 3 the velocity -------------------------------------------------------------------------------

@dataclass(frozen=True)
class VelocityField:
    """What `odeint` integrates for the newest tokens of a batch (Algorithm 1); made per token.

    l2d          or another thing with config, vocabulary() and guess(): the oracle
    reading      of the tokens after which the next one is drawn
    estimate     "argmax", "sample" or "average": how logits become the clean point x̂
    temperature  of that estimate, > 0, or "1-t"; argmax does not use it
    class_ids    (B,) or None
    guidance     w: 1 is conditional, 0 unconditional, above 1 pushes towards the class
    generators   a torch.Generator per sequence, for "sample"
    """
    l2d: nn.Module
    reading: Reading
    estimate: str = "argmax"
    temperature: float | str = 1.0
    class_ids: torch.Tensor | None = None
    guidance: float = 1.0
    generators: list | None = None

    def __post_init__(self):
        choices(self.estimate, ESTIMATES, "estimate")

    def __call__(self, t, x):
        """(dx/dt, guess) at x (n, T, Z), t one float or (n,), below 1; guess: logits (n, T, V)."""
        remaining = 1 - t
        if torch.is_tensor(t):
            remaining = remaining.view(-1, 1, 1)
        lines = self.look(t, x)
        x_hat = self.mix([self.clean_point(logits, remaining) for logits in lines])
        # dx/dt = (x̂ − x_t)/(1 − t)                                     (paper Eq. 4)
        return (x_hat - x) / remaining, lines[0]

    def logits(self, x):
        """Logits (B, T, V) from which the token is chosen: a last look, at t = 1."""
        return self.mix(self.look(1.0, x))

    def rows(self, index) -> "VelocityField":
        """The same for some sequences of the batch, index (n,)."""
        class_ids = self.class_ids
        if class_ids is not None:
            class_ids = class_ids[index]
        generators = self.generators
        if generators is not None:
            generators = [generators[row] for row in index.tolist()]
        reading = self.reading and self.reading.rows(index)
        return replace(self, reading=reading, class_ids=class_ids, generators=generators)

    # --- guidance: two lines in one batch, the second without the class ---

    @property
    def guided(self) -> bool:
        return self.class_ids is not None and self.guidance not in (0, 1)

    @property
    def cost(self) -> int:
        """Network evaluations per call."""
        return 2 if self.guided else 1

    @cached_property
    def asked(self):
        """(reading, class ids) of all lines, the conditional one first. Made once per token."""
        if self.class_ids is None or self.guidance == 1:
            return self.reading, self.class_ids
        no_class = torch.full_like(self.class_ids, self.l2d.config.classes)
        if not self.guided:
            return self.reading, no_class
        return self.reading.lines(2), torch.cat((self.class_ids, no_class))

    def look(self, t, x):
        """Logits (n, T, V) of every line."""
        reading, class_ids = self.asked
        if self.guided:
            x = torch.cat((x, x))                                       # (2n, T, Z)
            if torch.is_tensor(t):
                t = torch.cat((t, t))
        return self.l2d.guess(x, t, class_ids, reading).chunk(self.cost)

    def mix(self, lines):
        """Classifier-free guidance of clean points, and so of velocities, or of logits."""
        if not self.guided:
            return lines[0]
        conditional, unconditional = lines
        w = self.guidance
        # w·(conditional) + (1−w)·(unconditional)                       (paper Eq. 7, as the code)
        return w * conditional + (1 - w) * unconditional

    # --- from logits to a point ---

    def clean_point(self, logits, remaining):
        """x̂ (n, T, Z) from logits (n, T, V)."""
        V = self.l2d.vocabulary()
        if self.estimate == "argmax":
            return V[logits.argmax(-1)]
        temperature = self.temperature
        if temperature == "1-t":
            temperature = remaining
        p = (logits / temperature).softmax(-1)                          # (n, T, V)
        if self.estimate == "average":
            # x̂ = Σ_y p_y·V_y
            return p @ V
        return V[draw_tokens(p, self.generators)]


# --- run alone ------------------------------------------------------------------------------------

def show_flow(steps: int):
    """Twenty noises, spread evenly, on their way to four tokens: a row for every evaluation."""
    oracle = Oracle(*LINE, sigma=2.0)
    quantiles = (torch.arange(20) + 0.5) / 20
    x_0 = 2.0 * torch.special.ndtri(quantiles).view(20, 1, 1)
    rows = []

    def watch(_, t, x, guess):
        rows.append((t, x))

    solution = odeint(VelocityField(oracle, None, "average"), x_0, "euler", steps, watch=watch)
    for t, x in [*rows, (1.0, solution.x)]:
        print(f"   t = {t:5.3f}  {draw_points(x.flatten().tolist(), -5, 5)}")


def show_loss():
    """Loss of the embedded path at ten times, beside the frozen model's."""
    l2d = L2D.load(resolve("tiny"))
    tokenizer = load_tokenizer(resolve("tiny"), l2d.lm.config.vocab_size)
    problems = Problems(tokenizer, "val")
    batch = collate([problems[i] for i in range(256)], l2d.to_z.weight.device)
    for tenth in range(11):
        t = torch.full(batch["ids"].shape, tenth / 10)
        with torch.no_grad():
            loss = l2d.loss(generator=torch.Generator().manual_seed(0), t=t, **batch)
        frozen = "  which is the frozen model's" if tenth == 0 else ""
        print(f"   t = {tenth / 10:.1f}  loss {float(loss):.3f}{frozen}")


def main():
    """Noise flows to tokens, by the exact oracle; then the loss by t of the embedded path."""
    places = [vector[0] for vector in LINE[0]]
    print(f"   four tokens  {draw_points(places, -5, 5)}")
    for steps in (1, 2, 4, 8):
        print(f"Euler, {steps} step(s)")
        show_flow(steps)
    print("loss of the embedded path on 256 validation problems")
    show_loss()


if __name__ == "__main__":
    main()
