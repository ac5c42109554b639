"""Evaluation of policies that translate."""
