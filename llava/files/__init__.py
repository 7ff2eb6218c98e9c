"""Reading and writing of files: size limits, atomic writes, JSON, text for a terminal."""
