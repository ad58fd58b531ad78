"""What each saving is worth, as ratios of medians within one run. Not a test: nothing here can pass or fail.

    python tests/bench.py
    python tests/bench.py --init_from=out --batch_size 16 --context 128 --repeats 30
"""

import argparse
import platform
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from diffusion import Flow  # noqa: E402
from sample import Settings, generate, load_model  # noqa: E402


def median_ms(work, repeats: int, device) -> float:
    """Median wall time of work() in milliseconds, after two runs that do not count."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[2:])


@torch.no_grad()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init_from", default="tiny")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--context", type=int, default=64, help="tokens before the one that is drawn")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device")
    args = parser.parse_args(argv)
    model, tokenizer = load_model(args.init_from, device=args.device)
    lm, device = model.lm, next(model.parameters()).device
    print(f"{platform.platform()}, {device}, torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {args.repeats}")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(lm.config.vocab_size, (args.batch_size, args.context), generator=generator).to(device)
    context, read = lm.context(ids).last(), lm.context(ids[:, :-1])
    cache = lambda: replace(read, keys=list(read.keys), values=list(read.values))    # decoding makes its own longer ones
    rows = torch.arange(args.batch_size, device=device)
    x = torch.randn(args.batch_size, 1, model.config.width, generator=generator).to(device)
    flow = Flow(model, context)
    timed = lambda work: median_ms(work, args.repeats, device)
    t = torch.full((1,), 0.5, device=device)

    def fresh_vocabulary():
        model._vocabulary = None
        flow(0.5, x, rows)

    evaluation = timed(lambda: flow(0.5, x, rows))
    print(f"one evaluation of the path: {evaluation:.3f} ms; each line below: what it takes instead, and the ratio")
    for name, work in (
        ("with V computed again", fresh_vocabulary),
        ("with the modulation computed again", lambda: flow(t.expand(args.batch_size), x, rows)),
        ("with the frozen path run again", lambda: (lm.context(ids), flow(0.5, x, rows))),
        ("the frozen model's own next token", lambda: lm.logits(lm.context(ids[:, -1:], cache=cache()).hidden)),
    ):
        ms = timed(work)
        print(f"  {name:38} {ms:8.3f} ms  {ms / evaluation:6.2f}")
    prompts = ids[:, :8].tolist()
    speed = {}
    for steps, solver in ((0, "euler"), (1, "euler"), (8, "euler"), (32, "euler"), (1, "dopri5")):
        settings = Settings(steps=steps, solver=solver, max_new_tokens=16)
        answers = generate(model, prompts, settings, seeds=range(args.batch_size))
        nfe = sum(sum(a.nfe) for a in answers) / sum(len(a.nfe) for a in answers)
        speed[steps, solver] = timed(lambda: generate(model, prompts, settings, seeds=range(args.batch_size)))
        name = "frozen" if not steps else solver if solver == "dopri5" else f"{solver} {steps}"
        print(f"generate 16 tokens, {name:9} NFE {nfe:6.1f}  {speed[steps, solver]:9.1f} ms  {speed[steps, solver] / speed[0, 'euler']:6.2f} times the frozen model")


if __name__ == "__main__":
    main()
