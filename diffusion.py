"""The diffusion path beside a frozen language model, its objective, its velocity: all of L2D.

Time runs from noise (t = 0) to data (t = 1): x_0 ~ N(0, σ²I), x_1 = V_y the vector of the next
token, x_t between them. A language model trained with cross-entropy already answers at t = 0, where
x_t says nothing. The path reads the frozen model's keys and values, sees x_t, and adds to the last
hidden state with a weight that is exactly zero at t = 0.

    1 the path        Eq. 5 and 6
    2 the objective   Eq. 3
    3 the velocity    Eq. 4 and 7

Equation numbers are those of "Large Language Models to Diffusion Finetuning" (ICML 2025). Read
solvers.py before and model.py after this file. Run alone it lets noise flow to tokens. In 8 steps:

    python diffusion.py
       tokens                             o           o           o               o
       t = 1.000                          7          o2          o6               3
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.checkpoints.families import choices
from data.checkpoints.path import L2DConfig, base_facts, check_base, fill, read_path, save_path
from data.parts.draws import (
    RowDraws, check_classes, draw_schedule, draw_times, draw_tokens, drop_classes, spread_classes)
from data.parts.kv_cache import KVCache
from data.parts.lora import merge_lora
from data.parts.modulation import Modulation, TimeTable
from data.parts.positions import FREQUENCIES, sinusoid
from data.results.figures import draw_points
from data.tiny.oracle import LINE, Oracle
from data.training.batches import Batch, Targets, Losses, pick
from model import LM, PathBlock, FrozenStates, read_own_kv, run_layer, two_layers
from solvers import odeint

ESTIMATES = ("argmax", "sample", "average")


# --- 1 the path -----------------------------------------------------------------------------------

class L2D(nn.Module):
    """A frozen language model `.lm` and a trainable diffusion path beside it."""

    def __init__(self, lm: LM, config: L2DConfig):
        super().__init__()
        self.lm = lm.requires_grad_(False).eval()
        self.config = config
        self.checkpointing = False
        c, z, s = lm.config.hidden_size, config.width, config.cond_dim
        self.to_z = nn.Linear(c, z)          # W of Eq. 5; with a bias, as the official code
        # with words to read, the path starts as a copy of the frozen layers, which understand them
        working_copy = config.self_conditioning or config.own_kv
        self.from_z = two_layers(z, s, c, zero=working_copy)
        self.from_prediction = None
        if config.self_conditioning:
            self.from_prediction = nn.Linear(c, c, bias=False)
            nn.init.eye_(self.from_prediction.weight)
        self.time = two_layers(2 * FREQUENCIES, s, s)    # of its sinusoid
        self.class_embedding = None
        if config.classes:
            self.class_embedding = nn.Embedding(config.classes + 1, s)     # last row: no class
        self.blocks = nn.ModuleList(
            PathBlock(block, config.rank, config.alpha, s, config.own_kv, working_copy)
            for block in lm.blocks)
        # g of Eq. 6; it has no last bias, which would cancel in w_d
        self.time_gate = two_layers(s, s, c, bias=False, zero=True)
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
        self.cached_vocabulary = None
        self.time_table = TimeTable(self)
        self.merge_lora(False)

    def merge_lora(self, on: bool = True):
        """Add every LoRA into a copy of its matrix: fewer products to sample, more memory."""
        merge_lora(self.blocks, on)

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
        """All of V, (V, Z) float32. Made once while sampling; in training it moves."""
        if self.cached_vocabulary is None or self.training:
            ids = torch.arange(self.lm.config.vocab_size, device=self.to_z.weight.device)
            with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
                self.cached_vocabulary = self.vectors(ids)
        return self.cached_vocabulary

    # --- what depends on the time alone ---

    def embed_time(self, t, class_ids=None):
        """e(t), (..., S): a sinusoid of t, two layers, plus the class embedding (None: none)."""
        e = self.time(sinusoid(t))
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
        w_d = self.time_gate(e) - self.time_gate(e_0)
        # zero at t = 0 to the bit, however the device orders its sums
        w_d = w_d * (t > 0)[..., None]
        # the time itself and the difference above need float32, these large layers do not
        with self.autocast():
            return Modulation([block.modulation(e) for block in self.blocks], w_d)

    # --- the network ---

    def read(self, ids, documents=None, cache: KVCache | None = None, cached=None) -> FrozenStates:
        """What the path looks at: arguments and reading as of LM.read.

        With own reading, keys and values are those of the path's own layers, which run over the
        tokens once, at t = 0, with no class: guidance asks twice and reads once.
        """
        with torch.no_grad():
            states = self.lm.read(ids, documents, cache, cached)
        if not self.config.own_kv:
            return states
        # t = 0: before anything is known of the next token
        if torch.is_grad_enabled():
            modulation = self.modulation(torch.zeros(1, 1, device=ids.device))
        else:
            modulation = self.time_table.at(0.0, None)
        with self.autocast():
            return read_own_kv(self.blocks, modulation.blocks, self.lm, states, cache)

    def last_hidden(self, x_t, t, modulation, states, prediction=None, index=None):
        """Hidden state (..., C) from which norm and head make the guess f(x_t, t, c): path, merge.

        x_t (..., Z), t (...), modulation and the logits of the guess before (..., V) for every
        token of the reading, or for those `where`.
        """
        hidden, positions, inputs = states.hidden, states.positions, states.inputs
        if index is not None:
            positions = positions.expand(hidden.shape[:2])[index]
            hidden = hidden[index]
            inputs = inputs[index]
        # u = x_t / √((1−t)²σ² + t²): unit variance at every t
        variance = (1 - t) ** 2 * self.config.sigma ** 2 + t ** 2
        u = x_t.float() / variance.sqrt()[..., None]                    # (..., Z)
        with self.autocast():
            h = self.from_z(u)                                          # (..., C)
            if self.config.self_conditioning:
                h = h + self.from_prediction(self.embed_prediction(prediction, hidden))
            elif self.config.own_kv:
                h = h + inputs
            h = self.lm.add_positions(h, positions)
            layers = zip(self.blocks, modulation.blocks, self.lm.blocks)
            for layer, (block, m, frozen) in enumerate(layers):
                h = run_layer(self.checkpointing, block, h, m, frozen, states, layer, index)
        # h_LM + w_d(t)·h                                               (paper Eq. 6)
        return hidden + (modulation.w_d * h).to(hidden.dtype)

    def embed_prediction(self, prediction, hidden):
        """What the path reads of its previous guess, logits (..., V): (..., C).

        Before the first evaluation it is the frozen model's, which stands in `hidden` (..., C).
        """
        if prediction is None:
            prediction = self.lm.logits(hidden)
        p = prediction.float().softmax(-1).to(self.lm.embed.weight.dtype)
        # Σ_y p_y·e_y
        return p @ self.lm.embed.weight

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
        modulation = self.modulation(t, spread_classes(class_ids, ids, self.config.classes))
        states = self.read(ids)
        return self.lm.logits(self.last_hidden(x_t, t, modulation, states))

    def predict(self, x_t, t, class_ids, states, before=None):
        """The same while sampling: logits (n, T, V) float32 after a reading; t a float or (n,).

        before  (n, T, V) logits of the evaluation before this one, None at the first
        """
        if not torch.is_tensor(t) and t == 0:
            # w_d(0) = 0: whatever the path would say, these are the frozen model's logits
            return self.lm.logits(states.hidden).float()
        modulation = self.time_table.at(t, class_ids)
        time = torch.as_tensor(t, dtype=torch.float32, device=x_t.device).view(-1, 1)
        hidden = self.last_hidden(x_t, time, modulation, states, before)
        return self.lm.logits(hidden).float()

    # --- 2 the objectives ---

    def draw(self, batch: Batch, generators: list, unroll: int = 0, hide: bool = True) -> Batch:
        """A batch on the CPU with all that is random in it, each row's from its own generator.

        A time and a noise for every position that counts: one pass teaches N noise levels.
        unroll  0: the paper's, one time a position; else the times of at most so many evaluations
        hide    some of the classes, or guidance would have nothing to compare with

        Raises ValueError for classes that this path does not have.
        """
        targets = batch.targets
        counts = targets.index[0].bincount(minlength=len(generators))
        draws = RowDraws(counts.tolist(), generators)
        if unroll:
            t = draw_schedule(draws, targets.hops, unroll)             # (N, unroll)
        else:
            t = draw_times(draws, self.config.time_distribution)        # (N,)
        noise = draws.normal(self.config.width)                         # (N, Z)
        class_ids = targets.class_ids
        if class_ids is not None:
            check_classes(class_ids, self.config.classes)
            if hide:
                share = self.config.class_dropout
                class_ids = drop_classes(class_ids, share, self.config.classes, draws)
        return replace(batch, targets=replace(targets, t=t, noise=noise, class_ids=class_ids))

    def token_losses(self, batch: Batch) -> Losses:
        """The paper's objective: a guess at one random time for each position that counts.

        batch  of `draw`; only where a token counts is the path evaluated
        """
        targets = batch.targets
        # 1. The frozen model reads the text once, without gradient.
        states = self.read(batch.ids, batch.documents, cached=batch.cached)
        # 2. The noisy vector of the right token; the gradient also goes through V_y.
        t = targets.t                                                   # (N,)
        x_0 = self.config.sigma * targets.noise                         # (N, Z)
        x_1 = self.vectors(targets.y)
        # x_t = t·x_1 + (1−t)·x_0
        x_t = t[:, None] * x_1 + (1 - t[:, None]) * x_0                 # (N, Z)
        # 3. The path guesses the token, and is scored like any language model.
        modulation = self.modulation(t, targets.class_ids)
        hidden = self.last_hidden(x_t, t, modulation, states, index=targets.index)
        # L = −log f(x_t, t, c)_y                                       (paper Eq. 3)
        losses = -self.lm.log_p(hidden, targets.y)
        return Losses(losses, losses, t, targets.hops)

    def refined_losses(self, batch: Batch, backprop: int = 3) -> Losses:
        """Our own objective: the path goes through its own steps and is scored at the last ones.

        batch     of `draw` with unroll: the last evaluation is at any time in (0, 1], or the path
                  would learn to act only at the end
        backprop  how many evaluations, the last, have a gradient: `values` are means over these
        """
        # 1. The frozen model reads the text. All positions end together, so those with the most
        #    evaluations begin, and the others join them.
        states = self.read(batch.ids, batch.documents, cached=batch.cached)
        count = (batch.targets.t > 0).sum(1)                            # (N,)
        order = count.argsort(descending=True)
        targets, count = batch.targets.at(order), count[order]
        hops = targets.hops
        if hops is None:
            # nobody knows: the answer may be right at once
            hops = torch.zeros_like(count)
        # 2. From noise step by step; the guesses of the last evaluations come back.
        x_0 = self.config.sigma * targets.noise                         # (N, Z)
        total = scored = loss = torch.zeros_like(x_0[:, 0])
        for left, prediction in self.refine(x_0, targets, states, backprop):
            # 3. Each is scored where it could be right: before it came the frozen model's guess
            #    and those `made`, each one step further on the way to the answer.
            made = count - left
            fair = (made > 0) & (made + 1 >= hops)
            loss = F.cross_entropy(prediction, targets.y, reduction="none")  # (N,)
            total = total + fair * loss
            scored = scored + fair
        return Losses(total / scored.clamp_min(1), loss, targets.t[:, -1], targets.hops)

    def refine(self, x, targets: Targets, states: FrozenStates, backprop: int):
        """The path's own steps from noise x (N, Z): yields (evaluations to come, guess).

        The positions with most evaluations come first; only what the last `backprop` evaluations
        say is yielded, and only they have a gradient.
        """
        times = targets.t                                               # (N, K)
        # at t = 0 the guess is what the frozen model says
        with torch.no_grad():
            prediction = self.lm.logits(states.hidden[targets.index]).float()   # (N, V)
        t = torch.zeros_like(times[:, 0])                               # (N,)
        V = self.vocabulary()
        for left in reversed(range(int(times.any(0).sum()))):
            new_t = times[:, -1 - left]
            # the first n are under way
            n = int((new_t > 0).sum())
            new_t = new_t[:n]
            with torch.set_grad_enabled(torch.is_grad_enabled() and left < backprop):
                new = self.step(
                    x[:n], prediction[:n], t[:n], new_t, V, targets.at(slice(n)), states)
            x = torch.cat((new[0], x[n:]))
            prediction = torch.cat((new[1], prediction[n:]))
            t = torch.cat((new_t, t[n:]))
            if left < backprop:
                yield left, prediction

    def step(self, x, prediction, t, new_t, V, targets: Targets, states: FrozenStates):
        """(x, logits) at new_t: a soft Euler step towards the guess, then the next guess."""
        # x̂ = Σ_y p_y·V_y
        x_hat = prediction.softmax(-1) @ V                                   # (n, Z)
        # x ← x + (x̂ − x)·Δt/(1 − t)
        part = (new_t - t) / (1 - t).clamp_min(1e-6)
        x = x + (x_hat - x) * part[:, None]
        modulation = self.modulation(new_t, targets.class_ids)
        hidden = self.last_hidden(x, new_t, modulation, states, prediction, targets.index)
        return x, self.lm.logits(hidden).float()

    # --- on disk ---

    def save(self, directory: str | Path, **facts):
        """Write path.safetensors, the trained tensors alone, and path.json: config, base, facts."""
        facts = {**base_facts(self.lm, self.base_sha256), **facts}
        save_path(self.path_parameters(), self.config, facts, Path(directory))

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
        check_base(meta, lm, directory)
        model = cls(lm, meta["config"])
        fill(model.path_parameters(), directory / "path.safetensors", model.config)
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
    states: FrozenStates
    estimate: str = "argmax"
    temperature: float | str = 1.0
    class_ids: torch.Tensor | None = None
    guidance: float = 1.0
    generators: list | None = None

    def __post_init__(self):
        choices(self.estimate, ESTIMATES, "estimate")

    def __call__(self, t, x, prediction=None):
        """(dx/dt, new guess) at x (n, T, Z), t one float or (n,), below 1.

        guess  logits (n, T, V) of the evaluation before, None at the first
        """
        remaining = 1 - t
        if torch.is_tensor(t):
            remaining = remaining.view(-1, 1, 1)
        copies = self.look(t, x, prediction)
        x_hat = self.guide([self.clean_point(logits, remaining) for logits in copies])
        # dx/dt = (x̂ − x_t)/(1 − t)                                     (paper Eq. 4)
        return (x_hat - x) / remaining, self.guide(copies)

    def logits(self, x, prediction=None):
        """Logits (B, T, V) from which the token is chosen: a last look, at t = 1."""
        return self.guide(self.look(1.0, x, prediction))

    def rows(self, index) -> "VelocityField":
        """The same for some sequences of the batch, index (n,)."""
        states = self.states and self.states.rows(index)
        generators = self.generators and [self.generators[row] for row in index.tolist()]
        return replace(self, states=states, class_ids=pick(self.class_ids, index),
                       generators=generators)

    # --- guidance: two lines in one batch, the second without the class ---

    @property
    def cost(self) -> int:
        """Network evaluations per call: two where one with and one without the class are mixed."""
        return 2 if self.class_ids is not None and self.guidance not in (0, 1) else 1

    @cached_property
    def guided_inputs(self):
        """(reading, class ids) of all lines, the conditional one first. Made once per token."""
        if self.class_ids is None or self.guidance == 1:
            return self.states, self.class_ids
        no_class = torch.full_like(self.class_ids, self.l2d.config.classes)
        if self.cost == 1:
            return self.states, no_class
        return self.states.copies(2), torch.cat((self.class_ids, no_class))

    def look(self, t, x, prediction):
        """Logits (n, T, V) of every line; both go on from the same guess, the guided one."""
        states, class_ids = self.guided_inputs
        if self.cost == 2:
            x = torch.cat((x, x))                                       # (2n, T, Z)
            if torch.is_tensor(t):
                t = torch.cat((t, t))
            if prediction is not None:
                prediction = torch.cat((prediction, prediction))
        return self.l2d.predict(x, t, class_ids, states, prediction).chunk(self.cost)

    def guide(self, copies):
        """Classifier-free guidance of clean points, and so of velocities, or of logits."""
        if self.cost == 1:
            return copies[0]
        conditional, unconditional = copies
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

def main():
    """Twenty noises, spread evenly, flow to four tokens by the oracle: a row per evaluation."""
    print(f"   tokens     {draw_points([place for place, in LINE[0]], -5, 5)}")
    quantiles = (torch.arange(20) + 0.5) / 20
    x_0 = 2.0 * torch.special.ndtri(quantiles).view(20, 1, 1)
    field = VelocityField(Oracle(*LINE, sigma=2.0), None, "average")

    def watch(_, t, x, prediction=None):
        print(f"   t = {t:5.3f}  {draw_points(x.flatten().tolist(), -5, 5)}")

    for steps in (1, 2, 4, 8):
        print(f"Euler, {steps} step(s)")
        watch(None, 1.0, odeint(field, x_0, "euler", steps, watch=watch).x)


if __name__ == "__main__":
    main()
