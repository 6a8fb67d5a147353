"""What the scripts share: configuration, processes, seeds, loops, checkpoints and logs."""
