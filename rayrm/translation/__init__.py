"""Preference sets in other languages: texts to sentences and back, and what makes a translation unfit."""
