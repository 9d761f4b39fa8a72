"""The stages: staged data in, staged data or store writes out. No stage knows what runs it."""
