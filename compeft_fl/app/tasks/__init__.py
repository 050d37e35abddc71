"""What the ready-made app trains: data, model, training."""
