"""What makes a run safe and seen: checks, folders, checkpoints, metrics, signals, sweeps."""
