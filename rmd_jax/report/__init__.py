"""The report of a pipeline run: plots and one self-contained HTML page."""
