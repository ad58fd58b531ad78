"""How often the path is evaluated in training, at which times, and which classes are asked again.

Asked again, a frozen model reads its own prediction in the place of the current token. Where that
leads it to right answers, our own objective trains the path to go on from there, see `held` in
diffusion.py. No label says so: the untrained path shows it. train.py uses this file.
"""

from dataclasses import replace

import torch

from data.checkpoints.path import L2DConfig
from data.parts.draws import RowDraws, check_classes, draw_schedule, draw_times, drop_classes
from data.parts.prediction import Prediction
from data.training.batches import Batch


def unroll_of(objective: str, most: int, asked_again, update: int | None, updates: int) -> int:
    """Most evaluations in an update of our own objective; 0: the paper's.

    objective    "paper", "refine", or "both" by turns
    asked_again  are some classes asked again? Else there are more evaluations as training goes on
    update       None: the validation, which is of the whole training
    """
    if objective == "paper" or (objective == "both" and update is not None and update % 2 == 0):
        return 0
    if asked_again or update is None:
        return most
    # from 1 to `most` over the first half of the updates
    return min(most, 1 + most * 2 * update // max(1, updates))


def draw(config: L2DConfig, batch: Batch, draws: RowDraws, unroll: int = 0,
         hide: bool = True) -> Batch:
    """What is random in an objective, for each of the N positions that count in the loss.

    The loader draws an update ahead, every row from a generator of its own.
    unroll  0: the paper's objective, one time; else the rising times of at most so many evaluations
    hide    some of the classes: guidance needs an unconditional prediction too
    Raises ValueError for classes that the path does not have.
    """
    targets = batch.targets
    class_ids = targets.class_ids
    again = None
    if config.asked_again:
        topics = torch.zeros_like(targets.y) if class_ids is None else class_ids
        again = torch.isin(topics, torch.tensor(config.asked_again))    # (N,)
    if unroll:
        t = draw_schedule(draws, again, unroll)                         # (N, unroll)
    else:
        # t ~ U[0, 1]: one pass teaches N noise levels
        t = draw_times(draws, config.time_distribution)                 # (N,)
    noise = draws.normal(config.width)                                  # (N, Z)
    if class_ids is not None:
        check_classes(class_ids, config.classes)
        if hide:
            class_ids = drop_classes(class_ids, config.class_dropout, config.classes, draws)
    return replace(batch, targets=replace(
        targets, t=t, noise=noise, class_ids=class_ids, again=again))


@torch.no_grad()
def find_asked_again(l2d, batch: Batch, calls: int) -> list:
    """Ids of the classes whose answers the frozen model finds if it is asked again.

    It reads its own prediction in the place of the current token, up to `calls` times. A class
    counts if most of its tokens that are wrong at first are right after some call.

    l2d  untrained, its gate open, so that it computes that; batch: nothing in it is drawn
    """
    targets = batch.targets
    states = l2d.read(batch.ids, batch.documents).at(targets.index)
    # at every t the same, and x_t is not read yet
    t = torch.full_like(states.hidden[:, 0], 0.5)
    x = states.hidden.new_zeros(len(t), l2d.config.width)
    modulation = l2d.modulation(t)
    logits = l2d.lm.logits(states.hidden)
    wrong = logits.argmax(-1) != targets.y
    found = torch.zeros_like(wrong)
    for _ in range(calls):
        before = Prediction.of(logits, l2d.config.prediction_words)
        logits = l2d.lm.logits(l2d.last_hidden(x, t, modulation, states, before))
        found |= logits.argmax(-1) == targets.y
    ids = torch.zeros_like(targets.y) if targets.class_ids is None else targets.class_ids
    return [one for one in ids.unique().tolist()
            if found[wrong & (ids == one)].float().mean() > 0.5]
