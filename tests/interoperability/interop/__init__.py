"""What other software makes of the output: environments, models, runs, and the table."""
