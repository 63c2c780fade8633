"""What a network is trained for and judged by."""
