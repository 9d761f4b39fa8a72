"""Understanding: what a message expresses, read from its vector."""

CLASSIFIER_VERSION = 1
"""To be raised with every change of what is learnt or how it is read that changes results: messages are then classified
again."""
