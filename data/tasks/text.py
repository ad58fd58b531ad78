"""Held-out text of one's own: how well a model predicts the tokens that count, without a grader.

    python eval.py --task text --data=DATA --init_from=out

The least noisy measure of a path: every counted token of every validation example is scored, and
the same tokens by the frozen model. data/text/chat.py prepares DATA.
"""

from data.text.tokens import TokenFiles


class Text:
    """The validation examples of token files."""
    name = "text"
    kind = "nats"
    folder = ""         # --data instead
    classes = ()        # of the rows, as soon as they are read

    def rows(self, data: str | None, tokenizer, limit: int | None) -> list:
        """The first examples as rows of their own, for data.training.batches.collate.

        Raises ValueError without data, or for data without validation examples.
        """
        if data is None:
            raise ValueError("--task text needs --data=DIR, prepared by data/text/chat.py")
        files = TokenFiles(data, "val", tokenizer)
        self.classes = files.classes
        count = len(files.examples) - 1
        if not count:
            raise ValueError(f"--data {data} has no validation examples; "
                             "prepare it again with a larger --val_fraction")
        return [files.part(number, number + 1) for number in range(min(count, limit or count))]
