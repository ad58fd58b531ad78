"""The machine around us.

    command     how every command ends, values out of range, flags without effect
    disk        files that appear whole, JSON, the lock of a directory
    processes   several processes, one training; Ctrl-C between two updates
    sharding    weights divided among the processes

Imports nothing of the project.
"""
