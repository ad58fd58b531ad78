"""Download the data of a benchmark as published: `python -m data.tasks get gsm8k`."""

import argparse

from data.system.command import command
from data.tasks.files import BY_HAND, PUBLISHED, fetch


@command("data.tasks")
def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m data.tasks", description=__doc__)
    parser.add_argument("action", choices=["get"])
    parser.add_argument("name", choices=[*PUBLISHED, *BY_HAND])
    args = parser.parse_args(argv)
    print(fetch(args.name))


if __name__ == "__main__":
    main()
