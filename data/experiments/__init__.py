"""Commands that make the tables of data/RESULTS.md again. They stand above the six scripts.

    headline    every method of training on the embedded topics, several seeds
    untrained   what the embedded problems are worth without training
    finetune    a real model: a path, LoRA of the same size and nothing, on sums
    harness     our models in lm-evaluation-harness
"""
