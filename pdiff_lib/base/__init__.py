"""What is ours and knows nothing of ours: settings, what is kept, records, the one training loop, the border for vectors."""
