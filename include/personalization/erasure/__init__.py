"""Erasing a person: from every store at once, and again until nobody can bring them back."""
