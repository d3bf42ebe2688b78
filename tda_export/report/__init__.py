"""A report on a calibration or an artifact: one HTML file that needs nothing else."""
