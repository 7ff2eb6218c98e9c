"""Image files: names in an image folder, decoding to upright 8-bit RGB, what a file holds instead of an image."""
