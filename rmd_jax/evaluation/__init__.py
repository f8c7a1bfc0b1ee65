"""Statistics of an evaluation, on NumPy arrays: intervals, win rates, calibration, divergences."""
