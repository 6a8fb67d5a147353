"""What tools/visualize.py draws, and how."""
