"""What is measured on networks of any origin, and the paper's numbers beside it."""
