"""Methods that learn from `theta [K D]` and give new vectors: two verbs, `fit` and `sample`."""
