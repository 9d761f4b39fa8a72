"""Understanding: what a message expresses, read from its vector."""

CLASSIFIER_VERSION = 1
"""To be raised with every change of `classifier.py` that changes results: messages are then classified again."""
