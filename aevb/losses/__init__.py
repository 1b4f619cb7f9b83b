"""The loss of a VAE, and the estimators of its gradient."""
