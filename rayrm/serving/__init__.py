"""Reward models behind HTTP, on Ray Serve."""
