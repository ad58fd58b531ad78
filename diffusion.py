"""The diffusion path beside a frozen language model, its objectives, its velocity: all of L2D.

Time runs from noise (t = 0) to data (t = 1): x_0 ~ N(0, σ²I), x_1 = V_y the vector of the next
token, x_t between them. A language model trained with cross-entropy is right already at t = 0,
where x_t says nothing. The path reads the frozen model's keys and values and x_t, and adds to the
last hidden state with a weight that is exactly zero at t = 0.

    1 the path         Eq. 5 and 6
    2 the objectives   Eq. 3, and our own
    3 the velocity     Eq. 4 and 7

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

from data.checkpoints.path import L2DConfig, base_facts, check_base, fill, read_path, save_path
from data.parts.draws import draw_tokens
from data.parts.kv_cache import KVCache
from data.parts.lora import merge_lora
from data.parts.modulation import Modulation, TimeTable
from data.parts.prediction import Prediction, predict_after
from data.parts.states import FrozenStates
from data.results.figures import draw_points
from data.system.processes import most_evaluations
from data.tiny.oracle import LINE, Oracle
from data.training.batches import Batch, CachedStates, Losses, pick
from model import LM, PathBlock, two_layers
from solvers import odeint

ESTIMATES = ("argmax", "sample", "average")
FREQUENCIES = 128          # of the sinusoid of a time, as in the official code
# of the tokens of classes that are asked again: their answers are short beside written-out ones
AGAIN_WEIGHT = 5.0


# --- 1 the path -----------------------------------------------------------------------------------

class L2D(nn.Module):
    """A frozen language model `.lm` and a trainable diffusion path beside it."""

    def __init__(self, lm: LM, config: L2DConfig):
        super().__init__()
        self.lm = lm.requires_grad_(False).eval()
        self.config = config
        c, z, s = lm.config.hidden_size, config.width, config.cond_dim
        self.to_z = nn.Linear(c, z)          # W of Eq. 5; with a bias, as the official code
        # The frozen start: the path begins as a copy of the frozen layers, reads the current token
        # as they do, and adds what it changes.
        self.frozen_start = config.start == "frozen"
        self.merges_difference = self.frozen_start and config.without != "difference"
        self.from_z = two_layers(z, s, c, zero=self.frozen_start)
        self.from_prediction = self.prediction_gate = None
        if config.self_conditioning:
            self.from_prediction = nn.Linear(c, c, bias=False)
            nn.init.eye_(self.from_prediction.weight)
            # zero: at first the path reads the current token alone. One, where asking again helps:
            # its prediction takes the place of the token
            self.prediction_gate = two_layers(s, s, c, zero=True)
            if config.asked_again:
                nn.init.ones_(self.prediction_gate[-1].bias)
        self.time = two_layers(2 * FREQUENCIES, s, s)    # of its sinusoid
        self.class_embedding = None
        if config.classes:
            self.class_embedding = nn.Embedding(config.classes + 1, s)     # last row: no class
        self.blocks = nn.ModuleList(PathBlock(block, config) for block in lm.blocks)
        # g of Eq. 6; it has no last bias, which would cancel in w_d
        self.time_gate = two_layers(s, s, c, bias=False, zero=True)
        self.to(next(lm.parameters()).device)
        self.forget()

    def train(self, mode: bool = True):
        """Path to training or evaluation; after a change of the weights nothing stays cached."""
        super().train(mode)
        self.lm.eval()
        self.forget()
        return self

    def forget(self):
        """Drop what sampling has cached: V, the modulation of every time, merged matrices."""
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

    @cached_property
    def untrained(self) -> "L2D":
        """The path as it begins, beside the same frozen model: a LoRA of any rank adds nothing."""
        return L2D(self.lm, replace(self.config, rank=1)).requires_grad_(False)

    def autocast(self):
        """bfloat16 arithmetic where the frozen model is bfloat16; weights of the path: float32."""
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
        """All of V, (V, Z) float32. Computed once while sampling; in training it moves."""
        if self.cached_vocabulary is None or self.training:
            ids = torch.arange(self.lm.config.vocab_size, device=self.to_z.weight.device)
            with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
                self.cached_vocabulary = self.vectors(ids)
        return self.cached_vocabulary

    # --- the network ---

    def modulation(self, t, class_ids=None) -> Modulation:
        """What times t (...) and classes (...), None for no class, do to the path."""
        if class_ids is None:
            class_ids = torch.full_like(t, self.config.classes, dtype=torch.long)
        i = torch.arange(FREQUENCIES, device=t.device)
        omega = 10000 ** (-i / FREQUENCIES)
        embedded = []
        for time in (t, torch.zeros_like(t)):
            # [cos(ω_i t), sin(ω_i t)],  ω_i = 10000^(−i/128)
            angles = time[..., None].float() * omega                    # (..., 128)
            # e(t), (..., S): the sinusoid through two layers, plus the class embedding
            e = self.time(torch.cat((angles.cos(), angles.sin()), dim=-1))
            if self.class_embedding is not None:
                e = e + self.class_embedding(class_ids)
            embedded.append(e)
        e, e_0 = embedded
        # w_d(t) = g(e(t)) − g(e(0))                                    (paper Eq. 6)
        w_d = self.time_gate(e) - self.time_gate(e_0)
        if self.merges_difference:
            # w_d(t) = 1 + g(e(t)) − g(e(0)) for t > 0
            w_d = 1 + w_d
        # zero at t = 0 to the bit, however the device orders its sums
        w_d = w_d * (t > 0)[..., None]
        # the time itself and the difference above need float32, these large layers do not
        with self.autocast():
            gate = self.prediction_gate(e) if self.prediction_gate else None
            return Modulation([block.modulation(e) for block in self.blocks], w_d, gate)

    def read(self, ids, documents=None, cache: KVCache | None = None, cached=None) -> FrozenStates:
        """What the path reads: arguments and states as of LM.read.

        With own keys and values the path's own layers run over the tokens too, once, at t = 0 and
        without a class, so that both predictions of guidance read the same.
        """
        with torch.no_grad():
            states = self.lm.read(ids, documents, cache, cached)
        if not self.config.own_kv:
            return states
        # t = 0: the next token is not known yet
        if torch.is_grad_enabled():
            modulation = self.modulation(torch.zeros(1, 1, device=ids.device))
        else:
            modulation = self.time_table.at(0.0, None)
        keys = []
        values = []
        with self.autocast():
            h = self.lm.add_positions(states.inputs, states.positions)
            for block, m, frozen in zip(self.blocks, modulation.blocks, self.lm.blocks):
                # behind the frozen model's in the cache
                number = len(self.blocks) + len(keys)
                h, k, v = block(h, m, frozen, states, cache=cache, layer=number,
                                last=block is self.blocks[-1])
                keys.append(k)
                values.append(v)
        return replace(states, keys=tuple(keys), values=tuple(values))

    def last_hidden(self, x_t, t, modulation, states, before=None):
        """Hidden state (..., C) from which final norm and head make the logits f(x_t, t, c).

        x_t (..., Z), t (...), modulation and, with self-conditioning, the Prediction before, for
        every token of the states, or for those at their index.
        """
        hidden = states.hidden
        variance = (1 - t) ** 2 * self.config.sigma ** 2 + t ** 2
        if self.frozen_start and self.config.without != "estimate":
            # u = t·x_t / ((1−t)²σ² + t²): the least-squares estimate of x_1, silent at t = 0
            u = x_t.float() * (t / variance)[..., None]                 # (..., Z)
        else:
            # u = x_t / √((1−t)²σ² + t²): unit variance at every t
            u = x_t.float() / variance.sqrt()[..., None]                # (..., Z)
        with self.autocast():
            h = self.from_z(u)                                          # (..., C)
            if self.config.self_conditioning:
                # before the first evaluation it is the frozen model's prediction
                if before is None:
                    before = Prediction.of(self.lm.logits(hidden), self.config.prediction_words)
                # by time and class in place of the current token: a·(E·Σ_y p_y·e_y − e_c)
                predicted = self.from_prediction(before.mean(self.lm.embed.weight))
                h = h + modulation.gate * (predicted - states.inputs)
            if self.frozen_start:
                h = h + states.inputs
            h = self.lm.add_positions(h, states.positions)
            pairs = zip(states.keys, states.values)
            for block, m, frozen, kv in zip(self.blocks, modulation.blocks, self.lm.blocks, pairs):
                h, *_ = block(h, m, frozen, states, kv)
        if self.merges_difference:
            # h_LM + w_d(t)·(h − h_LM): at the start h is h_LM
            h = h - hidden
        # h_LM + w_d(t)·h                                               (paper Eq. 6)
        return hidden + (modulation.w_d * h).to(hidden.dtype)

    def predict(self, x_t, t, class_ids, states, before=None):
        """Logits (n, T, V) float32 while sampling; t a float or (n,), before (n, T, V) or None."""
        if not torch.is_tensor(t) and t == 0:
            # w_d(0) = 0: whatever the path computes, these are the frozen model's logits
            return self.lm.logits(states.hidden).float()
        modulation = self.time_table.at(t, class_ids)
        time = torch.as_tensor(t, dtype=torch.float32, device=x_t.device).view(-1, 1)
        if before is not None:
            before = Prediction.of(before, self.config.prediction_words)
        hidden = self.last_hidden(x_t, time, modulation, states, before)
        return self.lm.logits(hidden).float()

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
        fill(model.path_parameters(), meta, directory)
        return model.eval()


# --- 2 the objectives -----------------------------------------------------------------------------

def paper_losses(l2d: L2D, batch: Batch) -> Losses:
    """The paper's objective: a prediction at one random time for each position that counts.

    batch  of `draw`; the path is evaluated only where a token counts
    """
    targets = batch.targets
    # 1. The frozen model reads the text once, without gradient.
    states = l2d.read(batch.ids, batch.documents, cached=batch.cached).at(targets.index)
    # 2. The noisy vector of the right token; the gradient also goes through V_y.
    t = targets.t                                                       # (N,)
    x_0 = l2d.config.sigma * targets.noise                              # (N, Z)
    x_1 = l2d.vectors(targets.y)
    # x_t = t·x_1 + (1−t)·x_0
    x_t = t[:, None] * x_1 + (1 - t[:, None]) * x_0                     # (N, Z)
    # 3. The path predicts the token, and is scored like any language model.
    modulation = l2d.modulation(t, targets.class_ids)
    before = None
    if l2d.config.self_conditioning:
        # half read the path's own prediction at the same x_t (Analog Bits), by the noise's sign
        with torch.no_grad():
            first = l2d.last_hidden(x_t, t, modulation, states)
        coin = targets.noise[:, :1] > 0
        before, _ = predict_after(
            l2d.lm, torch.where(coin, first, states.hidden), l2d.config.prediction_words)
    hidden = l2d.last_hidden(x_t, t, modulation, states, before)
    # L = −log f(x_t, t, c)_y                                           (paper Eq. 3)
    losses = -l2d.lm.log_p(hidden, targets.y)
    return Losses(losses, losses, t)


def refined_losses(l2d: L2D, batch: Batch, backprop: int = 3) -> Losses:
    """Our own objective: the path takes its own steps, and is scored at the last evaluations.

    batch     of `draw` with unroll: the last evaluation is at any time in (0, 1], or the path
              would learn to act only at the end
    backprop  number of evaluations, the last ones, with a gradient: `values` are means over these
    """
    # 1. The frozen model reads the text. All positions end together, so those with the most
    #    evaluations begin, and the others join them.
    frozen = l2d.lm.read(batch.ids, batch.documents, cached=batch.cached)
    cached = CachedStates(frozen.hidden, frozen.keys, frozen.values)
    states = l2d.read(batch.ids, batch.documents, cached=cached)
    count = (batch.targets.t > 0).sum(1)                                # (N,)
    order = count.argsort(descending=True)
    targets, count = batch.targets.at(order), count[order]
    states = states.at(targets.index)
    # `held` reads the frozen keys and values: without own ones they are those of the path
    frozen = frozen.at(targets.index) if l2d.config.own_kv else states
    # 2. At t = 0: noise, and the frozen model's prediction.
    x = l2d.config.sigma * targets.noise                                # (N, Z)
    words = l2d.config.prediction_words
    prediction, _ = predict_after(l2d.lm, states.hidden, words)
    t = total = last = torch.zeros_like(x[:, 0])                        # (N,)
    V = l2d.vocabulary() if words is None else None
    evaluations = most_evaluations(int(targets.t.any(0).sum()), l2d.blocks[0])
    for left in reversed(range(evaluations)):
        new_t = targets.t[:, -1 - left]
        # the first n have begun
        n = int((new_t > 0).sum())
        some, new_t = targets.at(slice(n)), new_t[:n]
        before, waiting = prediction.at(slice(n)), prediction.at(slice(n, None))
        with torch.set_grad_enabled(torch.is_grad_enabled() and left < backprop):
            # 3. A soft Euler step towards the prediction: x̂ = Σ_y p_y·V_y
            x_hat = before.mean(V) if words is None else before.mean_of(l2d.vectors)    # (n, Z)
            # x ← x + (x̂ − x)·Δt/(1 − t)
            part = (new_t - t[:n]) / (1 - t[:n]).clamp_min(1e-6)
            new_x = x[:n] + (x_hat - x[:n]) * part[:, None]
            # 4. The next prediction, which reads the one before.
            modulation = l2d.modulation(new_t, some.class_ids)
            hidden = l2d.last_hidden(new_x, new_t, modulation, states.rows(slice(n)), before)
            # 5. Every evaluation with a gradient has a loss.
            y = some.y if left < backprop else None
            new, loss = predict_after(l2d.lm, hidden, words, y)         # loss (n,)
        prediction = new.join(waiting)
        x = torch.cat((new_x, x[n:]))
        t = torch.cat((new_t, t[n:]))
        if left >= backprop:
            continue
        last = loss
        if l2d.config.asked_again:
            one = some.again.nonzero()[:, 0]
            logits = new.logits[one] if words is None else l2d.lm.logits(hidden[one]).float()
            loss = loss.index_put((one,), held(
                l2d, frozen.rows(one), some.at(one), x[one], t[one], before.at(one), logits))
        total = total + F.pad(loss, (0, len(x) - n))
    return Losses(total / count.clamp(1, backprop), last, targets.t[:, -1])


def held(l2d: L2D, frozen, targets, x, t, before, logits):
    """Losses (n,) of an evaluation, for classes that are asked again.

    Their answers cannot all be right yet, and no label says which can. So a prediction that is
    right is to stay, and elsewhere the path is to say what the frozen model says when asked again.

    frozen   the frozen model's states of the n positions
    x (n, Z), t (n,), before         what the evaluation has read
    logits   (n, V) its prediction, of all words
    """
    untrained = l2d.untrained
    with torch.no_grad():
        # at first the path's own keys and values are the frozen ones
        hidden = untrained.last_hidden(x, t, untrained.modulation(t), frozen, before)
        q = l2d.lm.logits(hidden).float().softmax(-1)                   # (n, V)
        # the probability of the right token, before or now
        p = torch.maximum(before.p_of(targets.y), Prediction(logits).p_of(targets.y))   # (n, 1)
        # p·[y] + (1 − p)·q
        target = (1 - p) * q + p * F.one_hot(targets.y, q.shape[1])
    return AGAIN_WEIGHT * F.cross_entropy(logits, target, reduction="none")


# --- 3 the velocity -------------------------------------------------------------------------------

@dataclass(frozen=True)
class VelocityField:
    """What `odeint` integrates for the newest tokens of a batch (Algorithm 1); made per token.

    l2d          or another thing with config, vocabulary() and predict(): the oracle
    states       of the tokens after which the next one is drawn
    estimate     one of ESTIMATES: how logits become the clean point x̂
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

    def __call__(self, t, x, before=None):
        """(dx/dt, prediction) at x (n, T, Z), t one float or (n,), below 1.

        prediction  logits (n, T, V); before: those of the last evaluation, None at the first
        """
        remaining = 1 - t
        if torch.is_tensor(t):
            # only the final evaluation is at t = 1, and has no velocity
            remaining = remaining.clamp_min(1e-6).view(-1, 1, 1)
        copies = self.predict(t, x, before)
        x_hat = self.guide([self.clean_point(logits, remaining) for logits in copies])
        # dx/dt = (x̂ − x_t)/(1 − t)                                     (paper Eq. 4)
        return (x_hat - x) / remaining, self.guide(copies)

    def many(self, t, x):
        """The same for one sequence at K times (K,) and states (K, T, Z), without a prediction."""
        # its one class stands for all of them
        return replace(self, states=self.states.copies(len(t)))(t, x)

    def final_logits(self, x, before=None):
        """Logits (B, T, V) from which the token is chosen: the final evaluation, at t = 1."""
        return self.guide(self.predict(1.0, x, before))

    def rows(self, index) -> "VelocityField":
        """The same for some sequences of the batch, index (n,)."""
        states = self.states and self.states.rows(index)
        generators = self.generators and [self.generators[row] for row in index.tolist()]
        return replace(self, states=states, class_ids=pick(self.class_ids, index),
                       generators=generators)

    # --- classifier-free guidance: two predictions in one batch, the second without the class ---

    @cached_property
    def guided_inputs(self):
        """(copies of the tokens, their states, their class ids), the conditional copy first.

        The number of copies is the number of network evaluations per call.
        """
        if self.class_ids is None or self.guidance == 1:
            return 1, self.states, self.class_ids
        no_class = torch.full_like(self.class_ids, self.l2d.config.classes)
        if self.guidance == 0:
            return 1, self.states, no_class
        return 2, self.states.copies(2), torch.cat((self.class_ids, no_class))

    def predict(self, t, x, before):
        """Logits (n, T, V) of every copy; all read the same prediction before, the guided one."""
        count, states, class_ids = self.guided_inputs
        if count == 2:
            x = torch.cat((x, x))                                       # (2n, T, Z)
            if torch.is_tensor(t):
                t = torch.cat((t, t))
            if before is not None:
                before = torch.cat((before, before))
        return self.l2d.predict(x, t, class_ids, states, before).chunk(count)

    def guide(self, copies):
        """The copies' clean points (and so velocities), or their logits, as one."""
        if len(copies) == 1:
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
        temperature = remaining if self.temperature == "1-t" else self.temperature
        p = (logits / temperature).softmax(-1)                          # (n, T, V)
        if self.estimate == "average":
            # x̂ = Σ_y p_y·V_y
            return p @ V
        if self.estimate == "sample":
            return V[draw_tokens(p, self.generators)]
        raise ValueError(f"estimate {self.estimate!r} is unknown; allowed: {', '.join(ESTIMATES)}")


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
