"""Train a diffusion path beside a frozen model, or the baselines it is compared with. One flat script, one loop.

    python train.py                                                     the embedded model, minutes on a laptop
    python train.py --init_from=gpt2-xl --data=DIR                      a real one, on data prepared by data/chat.py
    python train.py --init_from=resume --out_dir=out                    go on after Ctrl-C, to the same bits
    python train.py --init_from=scratch --method=pretrain --data=tiny   make the embedded base again

Training objective: L2D.token_losses in diffusion.py (paper Eq. 3). Read sample.py next.
"""

import argparse
import json
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from data.checkpoint import open_safetensors, write_safetensors
from data.hub import resolve
from data.tokenizer import load_tokenizer
from diffusion import IGNORE, SCHEDULES, L2D, L2DConfig
from model import LM, LoRA, ModelConfig, choices, map_linears, pick_device

METHODS = ("l2d", "pretrain", "lora", "full")
DEFAULTS = {         # tiny   scratch  real checkpoints: the paper's values
    "width":         (64,     64,      256),
    "conditioning":  (128,    128,     256),
    "updates":       (2700,   2600,    27_900),
    "batch_size":    (64,     32,      4),
    "accumulate":    (1,      1,       8),
    "lr":            (2e-3,   3e-3,    1e-4),
    "min_lr":        (0.0,    0.0,     1e-6),
    "warmup":        (50,     100,     100),
    "weight_decay":  (0.01,   0.1,     0.01),
    "eval_every":    (450,    1000,    500),
    "val_rows":      (256,    64,      64),
}
SCRATCH = {          # the embedded base, as a Hugging Face config.json
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 258, "hidden_size": 96, "intermediate_size": 256,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 24, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": True,
    "bos_token_id": 256, "eos_token_id": 257, "torch_dtype": "float32",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    # what
    parser.add_argument("--method", default="l2d", choices=METHODS, help="what to train (default: l2d)")
    parser.add_argument("--init_from", default="tiny", help="model name, directory, `scratch` or `resume` (default: tiny)")
    parser.add_argument("--data", default="tiny", help="`tiny` or a directory made by data/chat.py (default: tiny)")
    parser.add_argument("--out_dir", default="out", help="where everything is written (default: out)")
    parser.add_argument("--cache_dir", help="where downloaded models are kept")
    # diffusion path; those without a default here take theirs from DEFAULTS
    parser.add_argument("--width", type=int, help="Z, width of the diffusion space")
    parser.add_argument("--conditioning", type=int, help="S, width of the time embedding")
    parser.add_argument("--rank", type=int, default=32, help="of the LoRA, in the path and in --method=lora (default: 32)")
    parser.add_argument("--full_copies", action=argparse.BooleanOptionalAction, default=False,
                        help="copy the path's matrices instead of LoRA")
    parser.add_argument("--schedule", default="uniform", choices=SCHEDULES, help="of the training times (default: uniform)")
    # optimisation
    parser.add_argument("--updates", type=int, help="optimizer updates in all")
    parser.add_argument("--batch_size", type=int, help="rows per forward pass")
    parser.add_argument("--accumulate", type=int, help="forward passes per update")
    parser.add_argument("--lr", type=float, help="highest learning rate")
    parser.add_argument("--min_lr", type=float, help="last learning rate")
    parser.add_argument("--warmup", type=int, help="updates of linear warm-up, before the linear decay")
    parser.add_argument("--weight_decay", type=float, help="on matrices only")
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient (default: 1)")
    parser.add_argument("--seed", type=int, default=42, help="of weights, data order, times and noise (default: 42)")
    # reports
    parser.add_argument("--eval_every", type=int, help="updates between validation and saving")
    parser.add_argument("--val_rows", type=int, help="rows of validation data")
    parser.add_argument("--report", type=int, default=64, help="problems a topic and level to answer at the end (default: 64)")
    # machine
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the frozen weights (default: bfloat16 on CUDA)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the objective")
    return parser


def parse(argv=None) -> argparse.Namespace:
    """Flags over checkpoint (where resuming) over DEFAULTS."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.init_from == "resume":
        saved = read_state(args.out_dir)[1]["args"]
        parser.set_defaults(**saved)
        args = parser.parse_args(argv)
        args.init_from, args.resume = saved["init_from"], True
    else:
        args.resume = False
        column = {"tiny": 0, "scratch": 1}.get(args.init_from, 2)
        for name, values in DEFAULTS.items():
            if getattr(args, name) is None:
                setattr(args, name, values[column])
    for name in ("width", "conditioning", "rank", "batch_size", "accumulate", "eval_every", "val_rows"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} is out of range; allowed: 1 or more")
    for name in ("updates", "lr", "min_lr", "warmup", "weight_decay", "report", "clip"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name} {getattr(args, name)} is out of range; allowed: 0 or more")
    if args.init_from == "scratch" and args.method != "pretrain":
        raise ValueError(f"--method {args.method} needs a pretrained model; allowed with --init_from=scratch: pretrain")
    return args


# --- data -------------------------------------------------------------------------------------------------------------

def load_data(args, tokenizer):
    """(train, val) data sets; dataset[i] gives ids, mask, segments and, for tiny, the class."""
    if args.data == "tiny":
        from data.tiny.topics import Documents, Problems
        kind = Documents if args.method == "pretrain" else Problems
        return kind(tokenizer, "train"), kind(tokenizer, "val")
    from data.chat import TokenFiles
    return TokenFiles(args.data, "train", tokenizer), TokenFiles(args.data, "val", tokenizer)


def collate(rows, device) -> dict:
    """Rows of different lengths -> ids, targets (B, T), padded on the right, class ids (B,) where there are any."""
    length = max(len(row[0]) for row in rows)
    ids, mask, segments = (torch.zeros(len(rows), length, dtype=torch.long) for _ in range(3))
    for i, row in enumerate(rows):
        for table, values in zip((ids, mask, segments), row):
            table[i, :len(values)] = torch.as_tensor(values)
    batch = {"ids": ids[:, :-1], "targets": ids.masked_fill(mask == 0, IGNORE)[:, 1:]}
    if segments.max() > 1:      # padding on the right needs no mask: nothing looks ahead
        batch["segments"] = segments[:, :-1]
    if len(rows[0]) > 3:
        batch["class_ids"] = torch.tensor([row[3] for row in rows])
    return {name: value.to(device) for name, value in batch.items()}


def draw_batches(data, args, position, device):
    """The `accumulate` batches that start at row `position` of the endless, freshly shuffled data."""
    rows = []
    for n in range(position, position + args.batch_size * args.accumulate):
        epoch, place = divmod(n, len(data))
        rows.append(data[int(epoch_order(len(data), args.seed + epoch)[place])])
    return [collate(rows[i:i + args.batch_size], device) for i in range(0, len(rows), args.batch_size)]


ORDERS = {}     # of the epoch under way: one permutation is needed thousands of times


def epoch_order(size, seed):
    if (size, seed) not in ORDERS:
        ORDERS.clear()
        ORDERS[size, seed] = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return ORDERS[size, seed]


# --- model, objective, optimizer --------------------------------------------------------------------------------------

def build_model(args, classes: int):
    """(module to train, fingerprint of what stays frozen beside it): an L2D, or the language model itself for the other methods."""
    torch.manual_seed(args.seed)
    device, dtype = pick_device(args.device, args.dtype and getattr(torch, args.dtype))
    if args.init_from == "scratch":
        return LM(ModelConfig.from_hf(SCRATCH)).init_weights(torch.Generator().manual_seed(args.seed)).to(device), None
    lm = LM.from_pretrained(args.init_from, dtype if args.method == "l2d" else torch.float32, device, args.cache_dir)
    if args.method == "l2d":
        l2d = L2D(lm, L2DConfig(args.width, args.conditioning, rank=None if args.full_copies else args.rank,
                                classes=classes, schedule=args.schedule))
        return l2d, l2d.base_sha256
    if args.method in ("full", "pretrain"):
        return lm, None
    frozen = lm.requires_grad_(False).fingerprint()
    map_linears(lm, lambda linear: LoRA(linear, args.rank, alpha=args.rank))
    return lm, frozen


def token_losses(model, batch, generator):
    """(loss of every counted token (N,), its time (N,) or None): the diffusion objective, or plain cross-entropy."""
    if isinstance(model, L2D):
        batch = batch if model.config.classes else {name: value for name, value in batch.items() if name != "class_ids"}
        return model.token_losses(generator=generator, **batch)
    where = (batch["targets"] != IGNORE).nonzero(as_tuple=True)
    device = batch["ids"].device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        hidden = model.context(batch["ids"], batch.get("segments")).hidden
        return model.losses(hidden[where], batch["targets"][where]), None


def build_optimizer(trainable, args):
    """AdamW; matrices decay, biases and norms do not."""
    groups = [{"params": [p for p in trainable.values() if p.dim() >= 2], "weight_decay": args.weight_decay},
              {"params": [p for p in trainable.values() if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))


def learning_rate(update, args):
    """Linear warm-up, then linear decay from lr to min_lr at the last update."""
    if update < args.warmup:
        return args.lr * (update + 1) / args.warmup
    progress = (update - args.warmup) / max(1, args.updates - args.warmup)
    return args.lr + progress * (args.min_lr - args.lr)


@torch.no_grad()
def validate(model, data, args, device) -> dict:
    """Mean loss over the first val_rows rows, and for the diffusion path its mean in each tenth of t."""
    generator, losses, times = torch.Generator().manual_seed(0), [], []
    model.eval()
    for start in range(0, min(args.val_rows, len(data)), args.batch_size):
        rows = [data[i] for i in range(start, min(start + args.batch_size, args.val_rows, len(data)))]
        loss, t = token_losses(model, collate(rows, device), generator)
        losses.append(loss)
        times.append(t)
    model.train()
    losses, result = torch.cat(losses), {}
    if times[0] is not None:
        tenth = (torch.cat(times) * 10).long().clamp_max(9)
        result["by_tenth"] = [round(float(losses[tenth == i].mean()), 4) if (tenth == i).any() else None for i in range(10)]
    return {"val_loss": round(float(losses.mean()), 4), **result}


# --- on disk ----------------------------------------------------------------------------------------------------------

def write_state(trainable, optimizer, generator, progress: dict, args):
    """Everything that the next update depends on, in one file that appears whole: weights, moments, generator, position."""
    tensors = {"generator": generator.get_state()}
    for name, p in trainable.items():
        tensors[f"weights/{name}"] = p.detach().cpu().contiguous()
        for moment, value in optimizer.state[p].items():
            tensors[f"{moment}/{name}"] = value.detach().cpu().contiguous()
    Path(args.out_dir).mkdir(parents=True, exist_ok=True)
    meta = {"args": {k: v for k, v in vars(args).items() if k not in ("resume", "out_dir")}, **progress}
    write_safetensors(tensors, Path(args.out_dir) / "state.safetensors", {"state": json.dumps(meta)})


def read_state(out_dir):
    """(tensors, metadata) of the last saved state. Raises ValueError where there is none."""
    path = Path(out_dir) / "state.safetensors"
    if not path.exists():
        raise ValueError(f"{path} does not exist, so there is nothing to resume; start one with train.py --out_dir={out_dir}")
    meta = open_safetensors(path).metadata()
    if not meta or "state" not in meta:
        raise ValueError(f"{path} is not a training state of this project; start anew with another --out_dir")
    return load_file(path), json.loads(meta["state"])


def restore(trainable, optimizer, generator, out_dir, frozen) -> dict:
    """Put a saved state back; returns where it stopped. Raises ValueError where it belongs to another base or other flags."""
    tensors, meta = read_state(out_dir)
    shape = lambda name: tensors[f"weights/{name}"].shape if f"weights/{name}" in tensors else None
    if wrong := [name for name, p in trainable.items() if shape(name) != p.shape]:
        raise ValueError(f"{out_dir}/state.safetensors does not fit: {len(wrong)} tensors, first {wrong[0]}; "
                         "resume with the flags it was made with")
    if meta["frozen"] != frozen:
        raise ValueError(f"{out_dir}/state.safetensors was trained beside other frozen weights than {meta['args']['init_from']} "
                         "now holds; put those back, or start anew with another --out_dir")
    with torch.no_grad():
        for name, p in trainable.items():
            p.copy_(tensors[f"weights/{name}"])
            # copies: load_file maps the file, which the next save replaces
            optimizer.state[p] = {kind: tensors[f"{kind}/{name}"].to("cpu" if kind == "step" else p.device, copy=True)
                                  for kind in ("step", "exp_avg", "exp_avg_sq")}
    generator.set_state(tensors["generator"])
    return {"update": meta["update"], "position": meta["position"]}


def save_model(model, args):
    """What sample.py and eval.py read: the path alone, or a model directory in Hugging Face layout."""
    if isinstance(model, L2D):
        return model.save(args.out_dir)
    source = resolve("tiny" if args.init_from == "scratch" else args.init_from, args.cache_dir)
    model.save_pretrained(args.out_dir)
    for pattern in ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "encoder.json",
                    "generation_config.json"):
        for path in source.glob(pattern):
            if path.resolve().parent != Path(args.out_dir).resolve():
                shutil.copy(path, args.out_dir)


# --- the loop ---------------------------------------------------------------------------------------------------------

class Interrupt:
    """Ctrl-C ends the run after the update under way, so that what is saved is whole; a second one kills it."""

    def __init__(self):
        self.asked = False
        self.before = signal.signal(signal.SIGINT, self)

    def __call__(self, *_):
        self.asked = True
        signal.signal(signal.SIGINT, self.before)


def train(args) -> dict:
    """Run the training that `args` describes; returns the last validation and the losses of this run."""
    from data.tiny.topics import CLASSES
    model, frozen = build_model(args, classes=len(CLASSES) if args.data == "tiny" else 0)
    source = resolve("tiny" if args.init_from == "scratch" else args.init_from, args.cache_dir)
    tokenizer = load_tokenizer(source, (model.lm if isinstance(model, L2D) else model).config.vocab_size)
    data, val = load_data(args, tokenizer)
    if not len(val):
        raise ValueError(f"--data {args.data} has no validation rows; prepare it again with a larger --val_fraction")
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    device, optimizer = next(iter(trainable.values())).device, build_optimizer(trainable, args)
    generator, progress = torch.Generator().manual_seed(args.seed), {"update": 0, "position": 0, "frozen": frozen}
    if args.resume:
        progress |= restore(trainable, optimizer, generator, args.out_dir, frozen)
    objective = torch.compile(token_losses, dynamic=True) if args.compile else token_losses
    count, dtype = sum(p.numel() for p in trainable.values()), next(iter(trainable.values())).dtype
    print(f"{args.method} on {args.data}, from {args.init_from}: {count:,} trainable parameters, {device}, {dtype}")
    Path(args.out_dir).mkdir(parents=True, exist_ok=True)
    log = open(Path(args.out_dir) / "log.jsonl", "a", encoding="utf-8")
    record = lambda entry: print(json.dumps(entry), file=log, flush=True)
    record({"args": vars(args), "torch": torch.__version__})
    interrupt, model_losses, start = Interrupt(), [], time.time()
    first, result = progress["update"], {}
    bar = tqdm(total=args.updates, initial=first, disable=None, mininterval=0.5)
    model.train()
    while True:
        update = progress["update"]
        last = update >= args.updates or interrupt.asked
        if update % args.eval_every == 0 or last:
            if not interrupt.asked:
                result = {"update": update, **validate(model, val, args, device)}
                record(result)
                tqdm.write(describe(result, args, model_losses, time.time() - start, update - first))
            if update > first or last:
                write_state(trainable, optimizer, generator, progress, args)
                if args.method == "l2d":
                    save_model(model, args)
        if last:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(update, args)
        batches = draw_batches(data, args, progress["position"], device)
        tokens, total = sum(int((batch["targets"] != IGNORE).sum()) for batch in batches), 0.0
        for batch in batches:
            # every counted token of the update weighs the same, however the update is cut into batches
            loss = objective(model, batch, generator)[0].sum() / tokens
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(trainable.values(), args.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress |= {"update": update + 1, "position": progress["position"] + args.batch_size * args.accumulate}
        model_losses.append(float(total))
        bar.update()
        bar.set_postfix(loss=f"{model_losses[-1]:.3f}", refresh=False)
        record({"update": update + 1, "loss": round(model_losses[-1], 5), "lr": learning_rate(update, args),
                "norm": round(float(norm), 4), "tokens": tokens, "seconds": round(time.time() - start, 2)})
    bar.close()
    log.close()
    signal.signal(signal.SIGINT, interrupt.before)
    if interrupt.asked:
        print(f"stopped after update {update}; go on with: python train.py --init_from=resume --out_dir={args.out_dir}")
        raise SystemExit(130)
    if args.method != "l2d":
        if args.method == "lora":
            map_linears(model, lambda module: module.merged())
        save_model(model, args)
    print(f"saved to {args.out_dir} after {time.time() - start:.0f} s")
    return {**result, "losses": model_losses, "model": model, "tokenizer": tokenizer}


def describe(result, args, losses, seconds, done) -> str:
    """One aligned line; loss is the mean of the last 50 updates, time left from the pace so far."""
    recent = f"{sum(losses[-50:]) / len(losses[-50:]):6.3f}" if losses else "     -"
    left = seconds / done * (args.updates - result["update"]) if done else 0
    line = f"update {result['update']:6}/{args.updates}  loss(50) {recent}  val {result['val_loss']:6.3f}"
    if "by_tenth" in result:
        line += "  by tenth of t " + " ".join("  -  " if value is None else f"{value:5.2f}" for value in result["by_tenth"])
    return line + (f"  {1000 * seconds / done:5.0f} ms/update  {left / 60:5.1f} min left" if done else "")


def report(model, tokenizer, problems: int):
    """What the training changed: greedy answers of the frozen model and with the path, on validation problems."""
    from eval import answer_problems
    from data.tiny.topics import LEVELS, make_problem
    from sample import Settings
    print(f"greedy accuracy on {problems} validation problems a row:  frozen  L2D (euler, 8 steps)")
    for topic, levels in LEVELS.items():
        for level in levels:
            some = [make_problem("val", i, topic=topic, level=level) for i in range(problems)]
            answers = [answer_problems(model, tokenizer, some, Settings(steps=steps)) for steps in (0, 8)]
            scores = [sum(answer.right for answer in both) / problems for both in answers]
            print(f"  {topic:9} level {level}  {scores[0]:6.1%}  {scores[1]:6.1%}")


def main(argv=None):
    try:
        args = parse(argv)
        result = train(args)
        if args.method == "l2d" and args.data == "tiny" and args.report:
            report(result["model"], result["tokenizer"], args.report)
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()
