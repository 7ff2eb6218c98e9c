"""ScienceQA: records and prompts, letters of answers and accuracies."""
