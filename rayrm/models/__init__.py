"""The only modules that know an engine's own interface."""
