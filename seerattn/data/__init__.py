"""Text: reading it, tokens, windows to measure on, samples to train on, and documents that ask for what they hide."""
