"""The run machinery: checks of options, run folders, checkpoints, metrics, signals, sweeps."""
