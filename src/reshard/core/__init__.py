"""The algebra: boxes, tensors made of tensors, and checkpoints. Opens no file and knows no format."""
