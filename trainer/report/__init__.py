"""The HTML report of a run: what it learned, shown on images."""
