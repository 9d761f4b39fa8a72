"""The stages: staged data in, staged data or store writes out. No stage knows what runs it."""

from personalization.pipeline.run import run_pipeline

__all__ = ["run_pipeline"]
