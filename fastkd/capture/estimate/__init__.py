"""What a capture will take, from a slice of it."""
