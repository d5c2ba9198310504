"""Engines that compute gradients and update weights: plain torch and DeepSpeed."""
