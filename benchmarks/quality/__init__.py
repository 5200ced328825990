"""What the answers are worth: studies that need a trained generator, and minutes."""
