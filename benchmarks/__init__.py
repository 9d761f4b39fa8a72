"""Measurements behind every performance claim."""
