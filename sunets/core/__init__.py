"""What every other part rests on; nothing here imports torch at module level."""
