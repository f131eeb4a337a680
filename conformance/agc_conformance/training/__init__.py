"""Training of a small network on real images, step by step."""
