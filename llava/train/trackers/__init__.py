"""Experiment trackers that `--report_to` names: wrong answers with their images, and failures that end no training."""
