"""Compare evaluated models: leaderboards, languages, agreement, length, calibration, ensembles, tests of difference."""
