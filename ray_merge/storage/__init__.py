"""Everything that reads or publishes bytes: stores, safetensors, checkpoints, adapters, the commit protocol."""
