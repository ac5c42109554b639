"""Preferences for people to annotate, and what they made of them."""
