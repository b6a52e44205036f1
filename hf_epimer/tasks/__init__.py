"""Tasks (data set, classes, templates) and their images."""
