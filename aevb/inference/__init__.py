"""Inference with trained models: log p(x), latent dimensions, restoration and visualization."""
