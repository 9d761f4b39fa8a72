"""Reads of the analytics database that tell how the platform does."""
