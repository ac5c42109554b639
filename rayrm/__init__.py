"""Reward models in many languages: trained, served and judged on Ray."""

__version__ = "0.1.0"
