"""What matching methods share. It knows no method."""
