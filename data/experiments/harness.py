"""Our models in lm-evaluation-harness, with all of its tasks: `pip install lm_eval` first.

    python -m data.experiments.harness --init_from=DIR --tasks gsm8k --limit 50
    python -m data.experiments.harness --init_from=out --tasks arc_easy --steps 8 --solver midpoint

The frozen model at `--steps 0`, the path otherwise. The harness requests texts (`generate_until`)
and the probability of a text behind another (`loglikelihood`); with a path that is the mean of p
over draws of the noise, token by token. No other file of this project imports the harness.
"""

import json
import zlib
from dataclasses import replace

from data.system.command import check_range, command, flag_parser, given_flags, refuse_idle

import torch
from tqdm import tqdm

from data.system.disk import claimed_file, write_json
from data.text.answer import Stop
from data.text.formats import check_messages, resolve_style
from data.training.batches import collate
from sample import Settings, forced_log_p, generate, load_model, next_p
from solvers import SOLVERS

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM as HarnessLM
    from lm_eval.tasks import TaskManager
except ImportError:
    HarnessLM = object
    simple_evaluate = None


class Adapter(HarnessLM):
    """The methods that the harness calls, for one of our models."""

    def __init__(self, model, tokenizer, settings: Settings, draws: int, batch_size: int):
        super().__init__()
        self.model = model
        self.tokens = tokenizer
        self.settings = settings
        self.draws = draws
        self.size = batch_size
        self.lm = model.lm
        self.room = self.lm.config.max_positions
        self.chat = False       # are special tokens in texts those of a chat format?

    # --- texts ------------------------------------------------------------------------------------

    def generate_until(self, requests, disable_tqdm=False) -> list:
        """A continuation of every prompt, up to one of its stop strings."""
        # requests of the same options can be batched
        groups = {}
        for place, request in enumerate(requests):
            options = json.dumps(request.args[1], sort_keys=True)
            groups.setdefault(options, []).append(place)
        batches = [(json.loads(options), places[at:at + self.size])
                   for options, places in groups.items()
                   for at in range(0, len(places), self.size)]
        texts = [""] * len(requests)
        for options, places in tqdm(batches, disable=disable_tqdm or None, desc="texts"):
            stops = options.get("until") or []
            stop = Stop.of(self.tokens, [stops] if isinstance(stops, str) else stops)
            length = options.get("max_gen_toks", 256)
            temperature = options.get("temperature", 0.0) if options.get("do_sample") else 0.0
            settings = replace(self.settings, max_new_tokens=length, temperature=temperature,
                               top_p=options.get("top_p"), top_k=options.get("top_k"))
            contexts = [requests[place].args[0] for place in places]
            # a prompt that is too long loses its beginning
            prompts = [self.encode(context)[-(self.room - length):] for context in contexts]
            seeds = [zlib.crc32(context.encode()) for context in contexts]
            answers = generate(self.model, prompts, settings, stop, seeds=seeds)
            for place, answer in zip(places, answers):
                texts[place] = answer.text
        return texts

    # --- probabilities ----------------------------------------------------------------------------

    def loglikelihood(self, requests, disable_tqdm=False) -> list:
        """(log p of the continuation, is it the greedy one?) of every request."""
        pairs = [self.encode_pair(*request.args) for request in requests]
        found = [None] * len(pairs)
        # the options of one question have one context, which is read once
        contexts = {}
        for place, (context, rest) in enumerate(pairs):
            if len(rest) == 1:
                contexts.setdefault(tuple(context), []).append(place)
        with tqdm(total=len(pairs), disable=disable_tqdm or None, desc="probabilities") as bar:
            for at in range(0, len(contexts), self.size):
                batch = list(contexts)[at:at + self.size]
                seeds = [zlib.crc32(repr(context).encode()) for context in batch]
                p, _ = next_p(self.model, list(map(list, batch)), self.settings, seeds, self.draws)
                for context, mean_p in zip(batch, p.mean(0)):           # (V,)
                    for place in contexts[context]:
                        token = pairs[place][1][0]
                        log_p = float(mean_p[token].clamp_min(1e-38).log())
                        found[place] = log_p, int(mean_p.argmax()) == token
                        bar.update()
            others = [place for place, result in enumerate(found) if result is None]
            for at in range(0, len(others), self.size):
                places = others[at:at + self.size]
                for place, result in zip(places, self.score([pairs[place] for place in places])):
                    found[place] = result
                    bar.update()
        return found

    def encode_pair(self, context: str, rest: str) -> tuple:
        """Ids of both; blanks between them belong to the second, as in the harness."""
        blanks = len(context) - len(context.rstrip())
        if blanks:
            rest = context[-blanks:] + rest
            context = context[:-blanks]
        whole = self.encode(context + rest)
        before = self.encode(context) or whole[:1]
        return before[-(self.room - 1):], whole[len(before):]

    @torch.no_grad()
    def score(self, pairs: list) -> list:
        """(log p, is it the greedy one?) of the rest of each pair (context, rest), lists of ids."""
        texts = [(context + rest)[-(self.room + 1):] for context, rest in pairs]
        rows = []
        for ids, (_, rest) in zip(texts, pairs):
            mask = [0] * (len(ids) - len(rest)) + [1] * len(rest)
            # one document
            rows.append((ids, mask, [1] * len(ids)))
        batch = collate(rows).to(next(self.model.parameters()).device)
        seeds = [zlib.crc32(repr(ids).encode()) for ids in texts]
        log_p, _ = forced_log_p(self.model, batch, self.settings, seeds, self.draws)
        y, (row, _) = batch.targets.y, batch.targets.index              # (N,) each
        of_y = log_p.gather(1, y[:, None])[:, 0]
        greedy = log_p.argmax(-1) == y
        return [(float(of_y[row == number].sum()), bool(greedy[row == number].all()))
                for number in range(len(rows))]

    def loglikelihood_rolling(self, requests, disable_tqdm=False) -> list:
        """log p of whole texts, in windows of all positions that do not overlap."""
        found = []
        for request in requests:
            ids = self.encode(request.args[0])
            start = [self.tokens.bos_id if self.tokens.bos_id is not None else self.tokens.eos_id]
            ids = ids if ids[:1] == start else start + ids
            windows = [ids[at:at + self.room + 1] for at in range(0, len(ids) - 1, self.room)]
            found.append(sum(self.score([(window[:1], window[1:])])[0][0] for window in windows))
        return found

    # --- text to ids ------------------------------------------------------------------------------

    def encode(self, text: str) -> list:
        """Ids with the start of a text; a chat format writes special tokens as text."""
        ids = self.tokens.encode(text, special=self.chat)
        start = self.tokens.encode_start("")
        return ids if ids[:len(start)] == start else start + ids

    def apply_chat_template(self, chat_history: list, add_generation_prompt: bool = True) -> str:
        """A conversation as a text in the model's own format."""
        self.chat = True
        style, render = resolve_style("auto", self.tokens)
        if style == "plain":
            raise ValueError("this model has no chat format; leave --apply_chat_template out")
        pieces = render(check_messages(chat_history), add_generation_prompt)
        return "".join(piece.text for piece in pieces)

    @property
    def tokenizer_name(self) -> str:
        return self.tokens.fingerprint

    def chat_template(self, chat_template=False) -> str:
        return self.tokens.template or ""


@command("data.experiments.harness")
def main(argv=None):
    parser = flag_parser("python -m data.experiments.harness", __doc__)
    add = parser.add_argument
    add("--init_from", required=True, help="name or directory of a model or of a trained path")
    add("--tasks", nargs="+", required=True, help="names of the harness, such as gsm8k")
    add("--include_path", help="folder of further tasks in the harness's form")
    add("--steps", type=int, default=0, help="steps of the solver (default: 0, the frozen model)")
    add("--solver", default="euler", choices=list(SOLVERS), help="default: euler")
    add("--draws", type=int, default=8, help="noises averaged for a probability (default: 8)")
    add("--num_fewshot", type=int, help="worked examples (default: the task's)")
    add("--limit", type=int, help="number of problems, the first ones (default: all)")
    add("--apply_chat_template", action="store_true", help="prompts in the model's chat format")
    add("--batch_size", type=int, default=8, help="requests at a time (default: 8)")
    add("--device", help="cuda, mps or cpu (default: the best available)")
    add("--cache_dir", help="folder of downloaded models")
    add("--out", default="out-harness.json",
        help="file of the results (default: out-harness.json)")
    add("--overwrite", action="store_true", help="replacement of an earlier --out")
    args = parser.parse_args(argv)
    for name in ("draws", "batch_size", "limit"):
        check_range(f"--{name}", 1 if getattr(args, name) is None else getattr(args, name), 1)
    refuse_idle(given_flags(parser, argv), [
        (("solver", "draws"), args.steps > 0, "a diffusion path, --steps of 1 or more")])
    if simple_evaluate is None:
        raise ValueError("the harness is not installed; get it with: pip install lm_eval")
    settings = Settings(steps=args.steps, solver=args.solver)
    with claimed_file(args.out, args.overwrite):
        measure(args, settings)


def measure(args, settings: Settings):
    """Let the harness ask; write its results and print the numbers among them."""
    model, tokenizer = load_model(args.init_from, None, args.device, args.cache_dir)
    adapter = Adapter(model, tokenizer, settings, args.draws, args.batch_size)
    results = simple_evaluate(
        adapter, tasks=args.tasks, num_fewshot=args.num_fewshot, limit=args.limit,
        apply_chat_template=args.apply_chat_template,
        task_manager=TaskManager(include_path=args.include_path), bootstrap_iters=0)
    write_json({"results": results["results"], "samples": results["samples"]}, args.out)
    for task, numbers in results["results"].items():
        for name, value in numbers.items():
            if isinstance(value, float):
                print(f"{task:30} {name:30} {value:.4f}")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
