"""Pieces of the network, one idea a page.

    positions    rotary angles, positions and masks of padded and packed rows
    kv_cache     keys and values of all tokens so far
    states       what the frozen model has computed of tokens: all that the path reads
    layout       the order of matrices in memory, for products with few rows
    lora         low-rank corrections of frozen matrices
    log_p        log p under a large vocabulary in little memory
    prediction   what one evaluation hands on to the next: all words or the likeliest
    modulation   what a path does at a time, computed once
    draws        random times, noise, schedules and tokens, a generator a row; class ids

May import checkpoints, system.
"""
