"""Conversations in, campaign recommendations out."""
