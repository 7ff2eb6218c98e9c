"""MMBench: table and prompts, circular accuracy, submission file."""
