"""What every run of training shares: options, checkpoints, results."""
