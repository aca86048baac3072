"""Training tasks: one LightningModule a file."""
