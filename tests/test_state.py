"""train.py checks what it reads (state.py): states, values that are not finite, data."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sample
import train
from conftest import exit_status
from data.checkpoints import state
from data.checkpoints.state import read_state
from data.flags.train import check_saved
from data.text import chat
from test_train import flags, log, refused, run


@pytest.fixture
def out(base, tmp_path):
    run(base, tmp_path / "out", updates=2)
    return tmp_path / "out"


def change_state(out, change_tensors=lambda tensors: None, change_meta=lambda meta: None):
    path = out / "state.safetensors"
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["state"])
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change_tensors(tensors)
    change_meta(meta)
    save_file(tensors, path, {"state": json.dumps(meta)})


def resume_refused(capsys, out, *words):
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    line = refused(capsys, "--init_from=resume", f"--out_dir={out}", "--updates=4")
    for word in words:
        assert word in line
    # nothing that was there is changed
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


# --- zero means off -------------------------------------------------------------------------------

def test_clip_0_is_no_clipping(base, tmp_path):
    results = []
    for clip in (0, 1e9, 1e-3):
        run(base, tmp_path / str(clip), clip=clip, updates=4)
        tensors, _ = read_state(tmp_path / str(clip))
        results.append(tensors["exp_avg/" + next(n for n in tensors if "/" in n).split("/", 1)[1]])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


# --- not a number ---------------------------------------------------------------------------------

def test_a_loss_that_is_no_number_stops_the_run_and_the_last_good_state_stays(out, capsys):
    line = refused(capsys, "--init_from=resume", f"--out_dir={out}", "--updates=50", "--lr=1e30")
    assert "update" in line and "learning rate" in line and "lower --lr" in line
    tensors, meta = read_state(out)
    assert meta["update"] >= 2
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert all(np.isfinite(entry["loss"]) for entry in log(out) if "loss" in entry)


# --- states ---------------------------------------------------------------------------------------

def drop(prefix):
    def change(tensors):
        del tensors[next(name for name in sorted(tensors) if name.startswith(prefix))]
    return change


def reshape(tensors):
    name = next(name for name in sorted(tensors) if name.startswith("weights/"))
    tensors[name] = tensors[name].reshape(1, -1)


def retype(tensors):
    name = next(name for name in sorted(tensors) if name.startswith("exp_avg/"))
    tensors[name] = tensors[name].double()


def spoil(tensors):
    name = next(name for name in sorted(tensors) if name.startswith("exp_avg/"))
    tensors[name].view(-1)[0] = float("nan")


def alter(tensors):
    name = next(name for name in sorted(tensors) if name.startswith("exp_avg/"))
    tensors[name].view(-1)[0] += 1


@pytest.mark.parametrize("change, word", [
    (drop("weights/"), "1 tensors, first weights/"),
    (drop("exp_avg_sq/"), "1 tensors, first exp_avg_sq/"),
    (lambda tensors: tensors.update(more=torch.ones(1)), "1 tensors, first more"),
    (reshape, "does not fit"),
    (retype, "is of type torch.float64"),
    (spoil, "holds values that are not finite"),
    (alter, "is damaged: it holds something else than was saved"),
])
def test_a_state_with_missing_or_damaged_parts_is_refused(change, word, out, capsys):
    change_state(out, change)
    resume_refused(capsys, out, word)


@pytest.mark.parametrize("change", [
    lambda meta: meta.clear(),
    lambda meta: meta.update(update="2"),
    lambda meta: meta.update(history=[[1, "low"]]),
    lambda meta: meta["args"].update(lr="fast"),
    lambda meta: meta["args"].update(batch_size=-1),
    lambda meta: meta["args"].update(unknown=1),
    lambda meta: meta.update(facts={}),
    lambda meta: meta.update(position=3),
    lambda meta: meta.update(kept=["../other"]),
    # of the right form
    lambda meta: meta["args"].update(min_lr=0.001),
])
def test_metadata_of_another_form_is_refused(change, out, capsys):
    change_state(out, change_meta=change)
    resume_refused(capsys, out)


def test_a_flag_that_a_state_lacks_is_not_chosen_in_silence(out):
    saved = read_state(out)[1]["args"]
    check_saved(saved, out)
    del saved["unroll"]
    with pytest.raises(ValueError, match=r"not written by this version \(unroll\)"):
        check_saved(saved, out)


def test_data_that_was_replaced_is_refused(base, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    data, out = tmp_path / "data", tmp_path / "out"

    def prepare(plus):
        rows = [{"question": f"{i}+{plus}?", "answer": f"{i + plus}"} for i in range(30)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        words = [str(path), f"--tokenizer={base}", f"--out_dir={data}", "--val_fraction=0.3"]
        assert exit_status(chat.main, words) == 0
    prepare(1)
    train.main([f"--init_from={base}", f"--data={data}", f"--out_dir={out}", *flags(updates=1)])
    prepare(2)
    capsys.readouterr()
    resume_refused(capsys, out, "data has changed since the training in")


def test_a_run_stopped_before_its_first_update_goes_on(base, tmp_path):
    out = tmp_path / "out"
    run(base, out, updates=0)
    assert read_state(out)[1]["update"] == 0
    train.main(["--init_from=resume", f"--out_dir={out}", "--updates=2"])
    run(base, tmp_path / "whole", updates=2)
    whole, parts = read_state(tmp_path / "whole")[0], read_state(out)[0]
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_what_a_state_says_is_neither_found_nor_written_once_more(base, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(base, out, updates=2, preset="tiny", unroll=2)
    meta = read_state(out)[1]
    assert meta["asked_again"] is not None
    with monkeypatch.context() as patch:
        patch.setattr(train, "find_asked_again", None)
        patch.setattr(state, "write_safetensors", None)
        train.main(["--init_from=resume", f"--out_dir={out}"])
    # a flag that has changed is written
    train.main(["--init_from=resume", f"--out_dir={out}", "--keep=1"])
    assert read_state(out)[1]["kept"] == [2] and (out / "best-2" / "path.json").exists()


def test_a_path_that_was_never_trained_is_not_sampled(base, tmp_path, capsys):
    run(base, tmp_path / "out", updates=0)
    words = [f"--init_from={tmp_path / 'out'}", "--prompt=x", "--device=cpu"]
    assert exit_status(sample.main, words) == 2
    err = capsys.readouterr().err
    assert "--init_from=resume" in err and len(err.splitlines()) == 1
