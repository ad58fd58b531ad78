"""Ctrl-C as a wish and not as an accident: a loop asks, between two steps, whether it should end.

train.py asks after every update.
"""

import signal

from data.system import processes


class Interrupt:
    """Ctrl-C ends the run after the update under way, so that what is saved is whole.

    A second one kills it, unless torchrun is there to do so: it passes on what each process has
    heard already.
    """

    def __init__(self):
        self.asked = False
        self.before = signal.signal(signal.SIGINT, self)

    def __call__(self, *_):
        self.asked = True
        if processes.count() == 1:
            self.restore()

    def restore(self):
        signal.signal(signal.SIGINT, self.before)
