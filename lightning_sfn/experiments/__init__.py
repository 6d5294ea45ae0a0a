"""The models and the data of the paper's experiments, as ordinary Lightning classes."""
