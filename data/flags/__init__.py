"""Every command line, and which flags cannot act together.

    train    train.py, and the values where its command line is silent
    sample   sample.py
    eval     eval.py

May import text, parts, checkpoints, results, system.
"""
