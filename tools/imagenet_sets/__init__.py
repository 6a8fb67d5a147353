"""ImageNet's other validation sets: what lies in them, how they are scored, and what is told of it."""
