"""What a run tells while it lasts: numbers, signs of life, and whether it is asked to stop or hangs."""
