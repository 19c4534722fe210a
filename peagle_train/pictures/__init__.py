"""What people look at: the flat batch, planned memory, reports of runs. Imported by tools that draw, by nothing else."""
