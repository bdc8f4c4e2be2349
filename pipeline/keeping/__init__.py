"""What a run leaves in its folder, how it goes on from it, and who may write there."""
