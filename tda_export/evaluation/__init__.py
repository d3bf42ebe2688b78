"""What a method keeps of the dense model, measured on text."""
