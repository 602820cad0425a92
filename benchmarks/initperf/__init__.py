"""What a start is worth: fine-tunes networks from many initialisations with one protocol, and compares the accuracies.

`python -m benchmarks.initperf --help` says how; each module says its part of the protocol.
"""
