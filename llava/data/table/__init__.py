"""Tables of questions about images, converted to LLaVA records and question files."""
