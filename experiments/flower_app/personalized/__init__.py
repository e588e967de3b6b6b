"""A method of fedpers as a Flower app."""
