"""Inference: devices, the predictor, files."""
