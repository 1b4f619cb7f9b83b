"""Training of VAEs: config, training steps, loop, checkpoints and run folders."""
