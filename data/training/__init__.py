"""What the training loop of train.py needs besides the model.

    batches      rows to batches, the order of reading
    loader       the batches of an update, made one update ahead
    evaluations  their number and times, the classes that are asked again
    frozen       what the frozen model computes on the data, cached on disk
    optimizer    first weights, AdamW, learning rate, exponential moving average
    memory       activations: measured, or computed again
    log          loss, time left, log.jsonl

May import text, parts, checkpoints, results, system, tiny.
"""
