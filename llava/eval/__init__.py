"""Programs that answer question files and score the answers."""
