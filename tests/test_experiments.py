"""What the embedded problems are worth without training: the rows that stand beside every result."""

import pytest
import torch

from data.checkpoints.hub import resolve
from data.experiments import untrained
from data.tasks import TASKS
from data.text.tokenizer import load_tokenizer
from data.tiny.topics import Problem
from model import LM


@pytest.fixture(scope="module")
def frozen():
    lm = LM.from_pretrained("tiny", torch.float32, "cpu")
    return lm, load_tokenizer(resolve("tiny"), lm.config.vocab_size)


def problems(topic, level, count=8):
    return [TASKS["tiny"].problem((topic, level), i) for i in range(count)]


def test_the_frozen_model_called_again_goes_one_hop_further_each_time(frozen):
    for level, calls in ((1, 1), (2, 2), (5, 5)):
        *shares, by_rule = untrained.repeated_calls(*frozen, problems("chains", level))
        found = dict(zip(untrained.CALLS, shares, strict=True))
        assert found[calls] >= 7 / 8 and by_rule == found[calls]
        # it walks on behind the end
        assert all(share <= 5 / 8 for call, share in found.items() if call != calls)
        assert all(share == 0 for call, share in found.items() if call < calls)


def test_the_shortcut_is_one_of_the_places_that_no_pair_begins_with():
    # b leads to the end a, c over e to the end d
    text = "ba ed ce;b"
    assert untrained.shortcut(Problem("chains", 1, "chains", text, "a")) == 1 / 2


def test_the_frozen_model_knows_the_operations_by_name(frozen):
    some = problems("strings", 1)
    texts = untrained.answer(*frozen, [f"{p.label} {p.prompt[:-1]}: " for p in some])
    assert sum(text.strip() == p.answer for text, p in zip(texts, some)) >= 7


def test_the_command_prints_a_row_for_every_level(capsys):
    untrained.main(["--problems=2"])
    lines = capsys.readouterr().out.splitlines()
    for name in ("chains 1 ", "chains 12", "strings 2", "chains 1-8", "chains 9-12"):
        assert sum(line.startswith(name) for line in lines) == 1
