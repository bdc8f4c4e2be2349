"""Training and evaluation of interleaved vision-text latent reasoning."""
