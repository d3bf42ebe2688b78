"""A report on a calibration or an artifact: one self-contained HTML file."""
