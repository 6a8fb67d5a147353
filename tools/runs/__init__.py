"""What becomes of trained runs: curves side by side, averages of weights, predictions."""
