"""Cache policies: which keys and values attention keeps, and in which slots."""
