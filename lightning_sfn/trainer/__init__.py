"""Saddle-free Newton inside PyTorch Lightning: isolated replays of `training_step`, data windows, callbacks."""
