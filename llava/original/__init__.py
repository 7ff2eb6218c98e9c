"""What callers of the original import, as thin entries on what exists; `llava.original_names` is the table."""
