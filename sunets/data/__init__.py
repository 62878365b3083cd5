"""Data sets: `preparation.prepare` checks and describes one, `loading` feeds it to a network."""
