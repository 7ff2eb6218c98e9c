"""VQA accuracy of answer files: annotations, question types, confidence intervals, calibration."""
