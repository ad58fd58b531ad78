"""Commands that make the tables of data/RESULTS.md again. They may import the six scripts.

    headline    every training method on the embedded topics, several seeds
    untrained   three methods without training on the embedded topics
    forms       chains of a form that no training has seen
    finetune    a real model: a path, a LoRA of the same size and the frozen model, on sums
    harness     our models in lm-evaluation-harness
"""
