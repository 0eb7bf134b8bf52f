"""What checkpoints and adapters call their tensors, and where a checkpoint may be cut."""
