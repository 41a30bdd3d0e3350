"""From recorded activations to steering vectors, their algebra, their files, and their transfer."""
