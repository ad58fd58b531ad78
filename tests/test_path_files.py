"""A diffusion path on disk, and the default values of its training and use."""

import json
import shutil

import pytest
import torch
from conftest import LLAMA, make_ids, make_l2d, make_lm, path_logits
from safetensors.torch import load_file, save_file

import train
from data.checkpoints.hub import resolve
from data.checkpoints.path import class_number
from data.flags.train import PRESETS, build_parser
from data.tiny.topics import CLASSES
from data.training.optimizer import BETAS
from diffusion import L2D, L2DConfig
from model import LM
from sample import Settings, load_model

VARIANTS = [
    dict(rank=4),
    dict(rank=None),
    dict(rank=4, classes=3),
    dict(rank=None, classes=3, class_names=["a", "b", "c"]),
    dict(sigma=7.0, time_distribution="cosmap"),
]


@pytest.fixture
def saved(tmp_path):
    l2d = make_l2d(classes=2)
    l2d.save(tmp_path)
    return l2d, tmp_path


# --- written and read -----------------------------------------------------------------------------

@pytest.mark.parametrize("options", VARIANTS)
@torch.no_grad()
def test_saving_and_loading_gives_the_same_path_to_the_bit(tmp_path, family, options):
    l2d = make_l2d(family, **options)
    l2d.save(tmp_path)
    again = L2D.load(tmp_path, make_lm(family))
    assert again.config == l2d.config
    assert not again.training
    ids = make_ids()
    x_t = l2d.config.sigma * torch.randn(3, 10, 16)
    t = torch.full((3, 10), 0.5)
    assert torch.equal(path_logits(again, ids, x_t, t), path_logits(l2d, ids, x_t, t))
    # the files hold what is trained, and nothing else
    tensors = load_file(tmp_path / "path.safetensors")
    ours = l2d.path_parameters()
    assert tensors.keys() == ours.keys()
    for name in ours:
        assert torch.equal(tensors[name], ours[name]), name
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["path.json", "path.safetensors"]


def test_a_folded_path_is_saved_like_any_other(saved, tmp_path_factory):
    l2d, directory = saved
    other = tmp_path_factory.mktemp("folded")
    l2d.merge_lora()
    l2d.save(other)
    for name in ("path.json", "path.safetensors"):
        assert (other / name).read_bytes() == (directory / name).read_bytes()


def test_path_finds_its_base_by_the_directory_it_names(tmp_path):
    make_lm().save_pretrained(tmp_path / "base")
    lm = LM.from_pretrained(tmp_path / "base")
    l2d = L2D(lm, L2DConfig(width=16, cond_dim=24, rank=4))
    l2d.save(tmp_path / "path")
    again = L2D.load(tmp_path / "path")
    assert again.lm.fingerprint() == lm.fingerprint()
    assert again.lm.directory == str(tmp_path / "base")


def edit_json(directory, change):
    path = directory / "path.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def test_the_embedded_path_belongs_to_the_embedded_base():
    """It was saved when the final norm had another name, which the fingerprint must not notice."""
    l2d = L2D.load(resolve("tiny"), device="cpu")
    assert l2d.config.class_names == list(CLASSES)


@pytest.mark.parametrize("names, numbers", [
    (["1", "b"], {"1": 0, "b": 1, "0": 0}),
    (None, {"1": 1, "0": 0}),
])
def test_a_class_by_its_name_and_then_by_its_number(names, numbers):
    config = L2DConfig(classes=2, class_names=names)
    for name, number in numbers.items():
        assert class_number(name, config) == number
    with pytest.raises(ValueError, match=f"allowed: {', '.join(numbers) if names else '0, 1'}$"):
        class_number("2", config)


@pytest.mark.parametrize("config", [L2DConfig(), make_lm().config])
def test_without_classes_none_can_be_given(config):
    with pytest.raises(ValueError, match="--class a: this model has no classes; allowed: no --"):
        class_number("a", config)


# --- refusals: one line each ----------------------------------------------------------------------

def refused(directory, lm, message):
    with pytest.raises(ValueError, match=message) as error:
        L2D.load(directory, lm)
    assert "\n" not in str(error.value)


def test_another_base_is_refused(saved):
    _, directory = saved
    other = make_lm(seed=1)
    other.directory = "elsewhere"
    refused(directory, other,
            r"belongs to the base None \(sha256 \w+\), not to 'elsewhere' .*"
            r"train.py --init_from=elsewhere")


def test_the_same_weights_under_another_config_are_refused(saved):
    _, directory = saved
    refused(directory, make_lm({**LLAMA, "rms_norm_eps": 1e-3}),
            r"belongs to the base None, whose config.json has changed since \(norm_eps\); restore")


@pytest.mark.parametrize("fact, message", [
    ({"tokenizer": "another"}, "was trained with another tokenizer than .* restore the right one"),
    ({"updates": 0}, r"was not trained yet \(0 updates\); go on with train.py --init_from=resume"),
])
def test_a_path_that_cannot_answer_is_refused(fact, message, tmp_path):
    directory = tmp_path / "tiny"
    shutil.copytree(resolve("tiny"), directory)
    load_model(directory)
    edit_json(directory, lambda content: content.update(fact))
    with pytest.raises(ValueError, match=message):
        load_model(directory)


def config_with(**changes):
    def act(directory):
        edit_json(directory, lambda content: content["config"].update(changes))
    return act


def without(name):
    def act(directory):
        edit_json(directory, lambda content: content.pop(name))
    return act


def replaced(name, content):
    def act(directory):
        (directory / name).write_text(content)
    return act


def cut_tensors(directory):
    path = directory / "path.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def removed(name):
    def act(directory):
        (directory / name).unlink()
    return act


def rewritten(change):
    """path.safetensors with changed tensors, and without the config of their training."""
    def act(directory):
        path = directory / "path.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(tensors)
        save_file(tensors, path)
    return act


UNFIT = "does not fit path.json: "


@pytest.mark.parametrize("act, message", [
    (cut_tensors, "path.safetensors is truncated or not a safetensors file"),
    (removed("path.safetensors"), "path.safetensors is truncated or not a safetensors file"),
    (rewritten(lambda tensors: tensors["to_z.bias"].add_(1)),
     "path.safetensors is damaged, or of another training than path.json; copy "),
    (rewritten(lambda tensors: tensors.pop("time_gate.2.weight")),
     UNFIT + "1 tensors differ, first time_gate.2.weight"),
    (removed("path.json"), "path.json does not exist"),
    (replaced("path.json", '{"config": {'), "path.json is not valid JSON"),
    (replaced("path.json", "{}"),
     r"path.json was not written by this version \(it has no valid 'config'\); train the path"),
    (without("base"), "it has no valid 'base'"),
    (without("base_sha256"), "it has no valid 'base_sha256'"),
    (without("base_config"), "it has no valid 'base_config'"),
    (without("digest"), "it has no valid 'digest'"),
    (rewritten(lambda tensors: None), "was trained with another config than path.json says"),
    (config_with(width=8), UNFIT + "3 tensors differ, first from_z.0.weight"),
    (config_with(rank=None), UNFIT),
    (config_with(classes=0), UNFIT + "1 tensors differ, first class_embedding"),
    (config_with(sigma=3.0), "was trained with another config than path.json says"),
    (config_with(depth=2), r"path.json was not written by this version \(.*depth"),
    (config_with(time_distribution="late"),
     "time_distribution 'late' is not supported; allowed: uniform, cosmap"),
])
def test_damaged_path_is_refused_in_one_line(saved, act, message):
    _, directory = saved
    act(directory)
    refused(directory, make_lm(), message)


def test_tensors_of_another_training_of_the_same_shape_are_refused(saved, tmp_path_factory):
    _, directory = saved
    other = tmp_path_factory.mktemp("other")
    make_l2d(seed=0, perturb=0.3, classes=2).save(other)
    (directory / "path.safetensors").write_bytes((other / "path.safetensors").read_bytes())
    refused(directory, make_lm(), "of another training than path.json")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_path_that_is_not_finite_is_refused(value, tmp_path):
    l2d = make_l2d()
    with torch.no_grad():
        l2d.to_z.bias[0] = value
    l2d.save(tmp_path)
    refused(tmp_path, make_lm(), "to_z.bias in .* holds values that are not finite; copy or down")


@pytest.mark.parametrize("options, message", [
    (dict(width=0), "width = 0 is out of range; allowed: 1 to 65536, an integer"),
    (dict(rank=0), "rank = 0 is out of range; allowed: 1 to 65536, an integer"),
    (dict(classes=-1), "classes = -1 is out of range; allowed: 0 to 65536, an integer"),
    (dict(sigma=0.0), "sigma = 0.0 is out of range; allowed: 1e-06 to"),
    (dict(own_kv=1), "own_kv = 1 is out of range; allowed: False to True"),
    (dict(own_kv=True), "own_kv with start = 'paper' is not supported; allowed: start = 'frozen'"),
    (dict(prediction_words=3), "prediction_words = 3 without self_conditioning is not supported"),
    (dict(prediction_words=0), "prediction_words = 0 is out of range; allowed: 1 to 65536"),
    (dict(asked_again=[1]), r"asked_again \[1\] is not supported; allowed: ids below 1"),
    (dict(asked_again=0), "asked_again 0 is not supported"),
    (dict(classes=2, class_names=["a"]), "class names .* allowed: a list of 2 different names"),
    (dict(classes=2, class_names=["a", "a"]), "class names .* are not supported"),
    (dict(classes=2, class_names=["a", " "]), "class names .* are not supported"),
    (dict(classes=1, class_names="a"), "class names 'a' are not supported"),
    (dict(class_names=["a"]), "allowed: a list of 0 different names"),
])
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        L2DConfig(**options)


# --- defaults -------------------------------------------------------------------------------------

def test_noise_scale_follows_the_width():
    """σ² = 16·Z."""
    assert [L2DConfig(width=width).sigma for width in (64, 100, 256)] == [32, 40, 64]
    assert L2DConfig(sigma=3.0).sigma == 3


def test_defaults_are_the_papers_values():
    """One table: the values without any flag, on data of one's own."""
    config = L2DConfig()
    paper = PRESETS["paper"]
    flags = build_parser().parse_args([])
    settings = Settings()
    table = [
        # the path
        (config.width, 256),
        (config.cond_dim, 256),
        (config.sigma, 64.0),
        (config.rank, 32),
        (config.alpha, 32.0),
        (config.class_dropout, 0.2),
        (config.time_distribution, "uniform"),
        # its training
        (paper["width"], 256),
        (paper["cond_dim"], 256),
        (paper["updates"], 27_900),
        (paper["batch_size"] * paper["accumulate"], 32),
        (paper["lr"], 1e-4),
        (paper["min_lr"], 1e-6),
        (paper["warmup"], 100),
        (paper["weight_decay"], 0.01),
        (BETAS, (0.9, 0.95)),
        (flags.clip, 1.0),
        (flags.seed, 42),
        (flags.rank, 32),
        (flags.full_copies, False),
        (flags.time_distribution, "uniform"),
        # its use
        (settings.rtol, 1e-3),
        (settings.atol, 1e-3),
        (settings.guidance, 1.0),
        (settings.estimate, "argmax"),
        (settings.temperature, 0.0),
    ]
    assert [found for found, _ in table] == [expected for _, expected in table]


def test_the_papers_start_has_the_papers_values(tmp_path):
    args = train.parse(["--init_from=gpt2", f"--data={tmp_path}", "--start=paper"])
    assert args.preset == "paper"
    for name, value in PRESETS["paper"].items():
        assert getattr(args, name) == value, name
