"""The method: latent forward, attention over kept segments, patch selection, decoding."""
